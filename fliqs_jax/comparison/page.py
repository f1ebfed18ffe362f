"""Page of a comparison: HTML that needs no other file."""

from collections.abc import Mapping, Sequence
import html
from typing import Any

from fliqs_jax.report import page
from fliqs_jax.sweep import page as sweep_page

_CAPTION = (
  'Up and to the left is better. Points are means over seeds, bars one '
  'standard deviation; the curve of a method joins its targets, that of '
  '“uniform” networks with one format everywhere. No other point dominates a '
  'filled one.'
)
_QUALITIES = (
  'Means and standard deviations over seeds. “Of target” is cost / target, '
  '“within” the share of runs that cost at most the target. “Over uniform” is '
  'the quality minus that of uniform formats at equal cost, interpolated in '
  'the logarithm of the cost, with its standard error over seeds.'
)
_EFFORTS = (
  '“From scratch” is the same network trained from the beginning with the same '
  'seed, and the gap what the served one has more; methods without such '
  'numbers train so anyway. “Forward” and “backward” are passes of a training '
  'batch, and times are those of the steps alone, without what is compiled, '
  'scored or evaluated; those of greedy and ilp hold the network whose '
  'sensitivities they use. “Memory” is what a step of training needs beside '
  'weights and batch, by the compiler’s accounting.'
)


def render(
  config: str,
  summary: Mapping[str, Any],
  qualities: Sequence[Sequence[str]],
  efforts: Sequence[Sequence[str]],
  differences: Sequence[Sequence[Sequence[str]]],
  warnings: Sequence[str],
  image: tuple[bytes, bytes],
) -> str:
  """Returns the page.

  Args:
    config: the config file and its arguments.
    summary: the runs as in a sweep.json.
    qualities: cells of a table; the first row is the head.
    efforts: the same of what the methods take.
    differences: tables of pairs of methods.
    warnings: sentences.
    image: PNG files for a light and for a dark page.
  """
  missing = [r for r in summary['runs'] if r['state'] != 'finished']
  count = len(summary['runs'])
  lede = f'{count - len(missing)} of {count} runs are finished.'
  if missing:
    lede += ' <a class="warn" href="#missing">The others.</a>'
  if warnings:
    lede += f' <a class="warn" href="#warnings">{len(warnings)} warnings.</a>'
  body = [
    '<h1>Methods side by side</h1>',
    f'<p class="soft">{html.escape(config)}. {lede}</p>',
    page.figure(image, _CAPTION),
    '<h2>Quality at a cost</h2>',
    f'<p>{_QUALITIES}</p>',
    sweep_page.cell_table(qualities, left=(0, 1)),
    *sweep_page.pairs(differences, summary['metric']),
    '<h2>What serving and searching cost</h2>',
    f'<p>{_EFFORTS}</p>',
    sweep_page.cell_table(efforts, left=(0, 1)),
  ]
  if warnings:
    items = ''.join(f'<li>{html.escape(text)}</li>' for text in warnings)
    body += ['<h2 id="warnings">Warnings</h2>', f'<ul>{items}</ul>']
  if missing:
    body += ['<h2 id="missing">Not finished</h2>']
    body += [sweep_page.missing_table(missing)]
  body += ['<h2>Runs</h2>', sweep_page.finished_table(summary)]
  return page.document('Methods side by side', body)
