"""Page of a finished run: HTML that needs no other file.

All text from files passes `html.escape`, because the name of a layer may hold
any characters.
"""

import base64
from collections.abc import Mapping, Sequence
import html
import json
import math

from fliqs_jax.report import costs_table
from fliqs_jax.report import figures
from fliqs_jax.report import finished_run
from fliqs_jax.report import number_text
from fliqs_jax.report import tables

_REPRODUCE = """python - <<'END'
import json, ml_collections
from fliqs_jax.run import train
with open('config.json') as file:
  config = ml_collections.ConfigDict(json.load(file))
train.train_and_evaluate(config, 'again')
END"""

_CSS = """
:root { color-scheme: light dark; --ink: #22272e; --soft: #667180;
  --line: #e4e7eb; --paper: #ffffff; --tile: #f6f7f9; --warn: #b3472f;
  --bar: #4c8dc42e; }
@media (prefers-color-scheme: dark) { :root { --ink: #d5dae0; --soft: #8e99a6;
  --line: #2c323a; --paper: #15181c; --tile: #1d2127; --warn: #f0926f;
  --bar: #4c8dc44d; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 3rem 1.5rem 5rem; max-width: 67rem;
  background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif; }
h1 { font-size: 2rem; font-weight: 650; line-height: 1.2; margin: 0 0 .5rem;
  letter-spacing: -.015em; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; font-weight: 650; margin: 3.5rem 0 .3rem; }
p { margin: .2rem 0 1rem; max-width: 44rem; }
.soft, figcaption, th, dt, dd small { color: var(--soft); }
.warn { color: var(--warn); }
dl { display: grid; gap: .8rem; margin: 1.8rem 0 0; padding: 0;
  grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); }
dl div { background: var(--tile); border-radius: .6rem; padding: .9rem 1.1rem; }
dt, dd small { font-size: .85rem; }
dd { margin: 0; font-size: 1.6rem; font-weight: 650; line-height: 1.3;
  letter-spacing: -.01em; font-variant-numeric: tabular-nums; }
dd small { display: block; font-weight: 400; letter-spacing: 0; }
figure { margin: .2rem 0 0; }
.wide + figure, figure + figure { margin-top: 1.6rem; }
figcaption { max-width: 44rem; margin-bottom: 1rem; }
.wide { overflow-x: auto; }
img { display: block; max-width: 100%; height: auto; }
table { border-collapse: collapse; font-size: .875rem; width: 100%;
  font-variant-numeric: tabular-nums; }
th, td { padding: .32rem .7rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
th { font-weight: 500; }
.tight { font-size: .8rem; }
.tight th, .tight td { padding: .32rem .33rem; }
.open { text-decoration: underline; text-underline-offset: .2em; }
.left, th.left { text-align: left; }
tr.found td { font-weight: 650; }
.facts { width: auto; }
.chip { display: inline-block; min-width: 3.4em; padding: 0 .45em;
  border-radius: .3em; text-align: center; font-weight: 600;
  font-size: .92em; }
pre { background: var(--tile); border-radius: .6rem; padding: 1rem 1.2rem;
  overflow-x: auto; font-size: .82rem; line-height: 1.5; }
summary { cursor: pointer; margin-top: .8rem; }
@media (max-width: 45rem) { body { padding: 1.6rem 1rem 3rem; }
  h1 { font-size: 1.6rem; } .large { max-width: 46rem; }
  dl { grid-template-columns: 1fr 1fr; } dl div { padding: .7rem .8rem; }
  dd { font-size: 1.25rem; } }
"""

_PLURALS = {'format': 'formats', 'channels': 'channels', 'kernel': 'kernels'}
_CAPTIONS = {
  'architecture': 'Every cell is a layer, in the order of the model, from few '
  'bits (red) to many (green); layers on a shortcut are raised above the '
  'row.{sizes}',
  'pictures': 'Crops of test pictures: the input enlarged (bicubic), what each '
  'network makes of it, and what it should; below each the PSNR of its luma.',
  'pareto': 'Up and to the left is better. The star is the model that the run '
  'found, the dots are {same} with one format everywhere.',
  'curves': 'Logged metrics over the steps of the one training run; dashed '
  'lines mark the beginning of its phases.',
  'policy': 'The probability of each format, by decision, over the steps; a '
  'decision is settled when one colour fills the height.',
  'policy_of_sizes': 'The probability of each number of channels and each size '
  'of a kernel, by decision, from the smallest (light) to the largest (dark); '
  'layers that must agree share a decision.',
  'scores': 'What each option costs in quality, one decision at a time, as '
  'scored in training on validation data; a dot is the most precise option, '
  'from which the others are measured.',
  'allocation': 'A dot is a layer, beside others of as many bits and the same '
  'size; channels are shown as a part of the largest option. In the '
  'paper’s searches (A.7) fewer bits come with more channels and, less '
  'clearly, with larger kernels. One search is one sample, and layers that '
  'share a decision are not independent.',
  'cost_per_layer': 'The coloured bar is the share of each layer in the cost '
  'of the model, the blue mark its share in all multiply-accumulates{uniform}.',
}


def render(
  run: finished_run.FinishedRun,
  images: Mapping[str, tuple[bytes, bytes]],
  tint: Mapping[str, str],
) -> str:
  """Returns the page.

  Args:
    run: the finished run.
    images: {name of a figure: its PNG file for a light and for a dark page}.
    tint: {format: colour}.
  """
  title = ' on '.join(
    str(finished_run.config_value(run.config, key))
    for key in ('model.name', 'data.name')
  )
  body = [
    f'<h1>{html.escape(title)}</h1>',
    _lede(run),
    _tiles(run),
    *(
      ['<h2>Pictures</h2>', _figure('pictures', images)]
      if 'pictures' in images
      else []
    ),
    f'<h2>{"Found architecture" if run.searched else "Architecture"}</h2>',
    _figure('architecture', images, sizes=_sizes(run)),
  ]
  if 'allocation' in images:
    body += ['<h2>Bits beside sizes</h2>', _figure('allocation', images)]
  # Results of earlier versions lack the key.
  if costs := run.result.get('costs'):
    body += ['<h2>Costs</h2>', costs_table.costs(costs)]
  if run.references:
    body += ['<h2>Beside other networks</h2>', tables.references(run)]
    same = 'networks' if run.searched_sizes else 'the same network'
    body += [_figure('pareto', images, same=same)]
  body += ['<h2>Training and search</h2>', _figure('curves', images)]
  body += ['<h2>Policy</h2>', _policy(run, images)]
  if 'scores' in images:
    body += ['<h2>Scores</h2>', _scores(run), _figure('scores', images)]
  uniform = (
    f', the grey bar its share at {run.reference}' if run.reference else ''
  )
  body += ['<h2>Cost of each layer</h2>']
  body += [_figure('cost_per_layer', images, uniform=uniform)]
  body += ['<h2>Layers</h2>', tables.layers(run, tint)]
  if run.result['warnings']:
    items = ''.join(
      f'<li>{html.escape(str(text))}</li>' for text in run.result['warnings']
    )
    body += ['<h2 id="warnings">Warnings</h2>', f'<ul>{items}</ul>']
  body += ['<h2>This run</h2>', _provenance(run)]
  return document(title, body)


def document(title: str, body: Sequence[str]) -> str:
  """Returns a complete page in the common style, from pieces of HTML."""
  return (
    '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    f'<title>{html.escape(title)}</title>\n<style>{_CSS}</style>\n</head>\n'
    '<body>\n' + '\n'.join(body) + '\n</body>\n</html>\n'
  )


def _lede(run: finished_run.FinishedRun) -> str:
  decisions = len(run.searched)
  what = 'Training with fixed formats' + ' and sizes' * run.has_sizes
  if decisions:
    what = f'One search over {decisions} decisions'
  if run.searched_sizes:
    kinds = [d['kind'] for d in run.searched.values()]
    what += ': ' + ', '.join(
      f'{kinds.count(kind)} of {plural}'
      for kind, plural in _PLURALS.items()
      if kind in kinds
    )
  count = len(run.result['warnings'])
  warned = (
    f' <a class="warn" href="#warnings">{count} '
    f'warning{"s" if count > 1 else ""}.</a>'
    if count
    else ''
  )
  return (
    f'<p class="soft">{what}, {run.result["steps"]:,} steps in '
    f'{number_text.duration(run.result["wall_seconds"])}.{warned}</p>'
  )


def _tiles(run: finished_run.FinishedRun) -> str:
  """Returns the most important numbers."""
  found = run.found
  unit, target = html.escape(found['unit']), found['cost_target']
  against = 'no target'
  if math.isfinite(target):
    apart = found['cost'] / target - 1
    where = 'above' if apart > 0 else 'below'
    against = f'{number_text.percent(abs(apart), 1)} {where} the target of '
    against += f'{number_text.significant(target)}'
  loss, cost, bits = (
    number_text.significant(found[key])
    for key in ('loss', 'cost', 'average_bits')
  )
  tiles = [
    (
      f'Test {html.escape(run.metric)}',
      number_text.quality(found[run.metric], run.metric),
      f'{found["examples"]:,} examples, loss {loss}',
    ),
    ('Cost', f'{cost} {unit}', against),
    ('Average bits', bits, 'of a weight'),
    ('Size', number_text.memory(found['size_bits']), 'of all parameters'),
  ]
  return (
    '<dl>'
    + ''.join(
      f'<div><dt>{name}</dt><dd>{value}<small>{more}</small></dd></div>'
      for name, value, more in tiles
    )
    + '</dl>'
  )


def _sizes(run: finished_run.FinishedRun) -> str:
  """Returns an explanation of how the architecture's figure shows sizes."""
  sizes = {what for layer in run.layers for what in layer['sizes']}
  said = ''
  if 'output_channels' in sizes:
    said += ' A number above a cell is the number of output channels'
    if run.searched_sizes:
      said += '; the cell is filled up to their part of the largest option'
    said += '.'
  if 'kernel' in sizes:
    said += ' Violet marks a kernel whose size was selected.'
  return said


def _figure(
  name: str, images: Mapping[str, tuple[bytes, bytes]], **words: str
) -> str:
  return figure(images[name], _CAPTIONS[name].format(**words))


def figure(image: tuple[bytes, bytes], caption: str) -> str:
  """Returns the HTML of a figure for light and dark pages."""
  caption = html.escape(caption)
  sources = [
    'data:image/png;base64,' + base64.b64encode(shade).decode()
    for shade in image
  ]
  # Bytes 16 to 20 of a PNG file are its width in pixels.
  width = int.from_bytes(image[0][16:20]) * 100 // figures.DPI
  # A small picture is still readable at the width of a phone.
  size = 'large' if width > 640 else 'small'
  return (
    f'<figure><figcaption>{caption}</figcaption><div class="wide"><picture>'
    f'<source media="(prefers-color-scheme: dark)" srcset="{sources[1]}">'
    f'<img class={size} src="{sources[0]}" width="{width}" alt="{caption}">'
    '</picture></div></figure>'
  )


def _policy(
  run: finished_run.FinishedRun, images: Mapping[str, tuple[bytes, bytes]]
) -> str:
  if not run.searched:
    what = 'option' if run.has_sizes else 'format'
    return (
      f'<p>Nothing was searched: every decision of this run has one {what}, so '
      'there is no policy to draw.</p>'
    )
  names = [n for n in ('policy', 'policy_of_sizes') if n in images]
  if not names:
    return '<p>The history holds too few policies to draw their course.</p>'
  return '\n'.join(_figure(name, images) for name in names)


def _scores(run: finished_run.FinishedRun) -> str:
  """Returns the sum of the scores beside the measured change of the loss."""
  scored = run.result['scored']
  text = (
    f'The {scored["metric"]} scores of the selected options sum to '
    f'{scored["sum"]:.3g}; the search takes them to add up.'
  )
  name, *others = {decision['anchor'] for decision in run.scored.values()}
  if name in run.references and not others:
    change = run.found['loss'] - run.references[name]['loss']
    if math.isfinite(change):
      text += (
        f' On test data the loss of the served network is {change:+.3f} from '
        f'that of uniform {name}.'
      )
  return f'<p>{html.escape(text)}</p>'


def _provenance(run: finished_run.FinishedRun) -> str:
  """Returns the versions and config of the run, and how to make it again."""
  result = run.result
  facts = {
    'seed': result['seed'],
    'steps': f'{result["steps"]:,}',
    'wall time': number_text.duration(result['wall_seconds']),
    'compiling': number_text.duration(result['compile_seconds']),
    'compilations': result['compilations'],
    'hash of the config': run.arch['config_hash'],
    **run.arch['versions'],
  }
  rows = [
    f'<tr><td class="left soft">{html.escape(str(name))}</td>'
    f'<td class=left>{html.escape(str(value))}</td></tr>'
    for name, value in facts.items()
  ]
  config = html.escape(json.dumps(run.config, indent=2))
  return (
    f'<table class=facts><tbody>{"".join(rows)}</tbody></table>'
    f'<details><summary>The exact config</summary><pre>{config}</pre></details>'
    '<p style="margin-top:1.5rem">To make this run again, in its directory:</p>'
    f'<pre>{html.escape(_REPRODUCE)}</pre>'
    '<p class="soft">Bit operations, sizes and the costs of chips are computed '
    'from the formats; none is a measured time.</p>'
  )
