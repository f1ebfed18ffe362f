"""Page of a sweep: HTML that needs no other file."""

from collections.abc import Mapping, Sequence
import html
from typing import Any

from fliqs_jax.report import number_text
from fliqs_jax.report import page
from fliqs_jax.report import tables

_NUMBERS = 5  # Number of the last columns, which are no settings.
_CAPTION = (
  'Up and to the left is better. Points are means over seeds, bars one '
  'standard deviation. No other point dominates a filled one; curves join what '
  'differs in cost target, size or one format alone.'
)

_PAIRS = (
  'The row minus the column, in {unit}, with the standard error over seeds: '
  'the mean over the logarithm of the cost, where both have costs in common.'
)


def render(
  summary: Mapping[str, Any],
  cells: Sequence[Sequence[str]],
  differences: Sequence[Sequence[Sequence[str]]],
  image: tuple[bytes, bytes],
) -> str:
  """Returns the page.

  Args:
    summary: content of sweep.json.
    cells: cells of the table; the first row is the head.
    differences: tables of pairs of curves.
    image: PNG files for a light and for a dark page.
  """
  head, *rows = cells
  left = range(len(cells[0]) - _NUMBERS)
  lines = []
  for row, point in zip(rows, summary['points']):
    mark = ' class=found' if point['not_dominated'] else ''
    text = ''.join(
      f'<td{" class=left" if i in left else ""}>{html.escape(cell)}</td>'
      for i, cell in enumerate(row)
    )
    lines.append(f'<tr{mark}>{text}</tr>')
  missing = [r for r in summary['runs'] if r['state'] != 'finished']
  count = len(summary['runs'])
  progress = f'{count - len(missing)} of {count} runs are finished.'
  if missing:
    progress += ' <a class="warn" href="#missing">The others.</a>'
  body = [
    f'<h1>{html.escape(summary["sweep"])}</h1>',
    f'<p class="soft">{progress}</p>',
    page.figure(image, _CAPTION),
    '<h2>Means over seeds</h2>',
    '<p>Bold: no other row is as good in both and better in one.</p>',
    tables.table([html.escape(name) for name in head], lines, left),
  ]
  body += pairs(differences, summary['metric'])
  if missing:
    body += ['<h2 id="missing">Not finished</h2>', missing_table(missing)]
  body += ['<h2>Runs</h2>', finished_table(summary)]
  return page.document(summary['sweep'], body)


def pairs(
  differences: Sequence[Sequence[Sequence[str]]], metric: str
) -> list[str]:
  """Returns the HTML of the differences of curves; empty if there are none.

  Args:
    differences: tables of pairs of curves; the first row is the head.
    metric: name of the metric.
  """
  if not differences:
    return []
  return [
    '<h2>Pairs</h2>',
    f'<p>{_PAIRS.format(unit=number_text.points(metric))}</p>',
    *(cell_table(cells, left=(0,)) for cells in differences),
  ]


def missing_table(runs: Sequence[Mapping[str, Any]]) -> str:
  """Returns the runs that are not finished: items of sweep.json's `runs`."""
  rows = [
    f'<tr><td class=left>{html.escape(run["name"])}</td>'
    f'<td class="left warn">{html.escape(run["state"])}</td>'
    f'<td class=left>{html.escape(run["detail"])}</td></tr>'
    for run in runs
  ]
  return tables.table(['run', 'state', ''], rows, range(3))


def finished_table(summary: Mapping[str, Any]) -> str:
  """Returns every finished run, with a link to its own report.

  Args:
    summary: content of sweep.json.
  """
  rows, scale = [], number_text.scale(summary['metric'])
  for run in summary['runs']:
    if run['state'] != 'finished':
      continue
    name = html.escape(run['name'])
    # These are the only characters of a name that a link must escape.
    link = name.replace('=', '%3D').replace(',', '%2C').replace('+', '%2B')
    rows.append(
      f'<tr><td class=left><a href="{link}/report.html">{name}</a></td>'
      f'<td>{scale * run["value"]:.2f}</td><td>{run["cost"]:.4g}</td>'
      f'<td>{len(run["warnings"])}</td></tr>'
    )
  unit = html.escape(summary['unit'])
  metric = html.escape(number_text.title(summary['metric']))
  head = ['run', metric, f'cost, {unit}', 'warnings']
  return tables.table(head, rows, [0])


def cell_table(cells: Sequence[Sequence[str]], left: Sequence[int]) -> str:
  """Returns the HTML of a table of texts.

  Args:
    cells: texts of each row; the first row is the head.
    left: indices of the columns whose text is aligned to the left.
  """
  head, *rows = [[html.escape(cell) for cell in row] for row in cells]
  lines = [
    '<tr>'
    + ''.join(
      f'<td{" class=left" if i in left else ""}>{cell}</td>'
      for i, cell in enumerate(row)
    )
    + '</tr>'
    for row in rows
  ]
  return tables.table(head, lines, left, ' class=tight')
