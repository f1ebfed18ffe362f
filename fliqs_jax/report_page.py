"""The page of a finished run: HTML that needs nothing but itself.

Whatever comes from a file goes through `html.escape`: a layer may be called
anything.
"""

import base64
from collections.abc import Mapping, Sequence
import html
import json
import math

from fliqs_jax import finished_run
from fliqs_jax import pictures

_SETTLED = 0.9  # Least probability at which a decision counts as made.
_UNKNOWN = '–'
_REPRODUCE = """python - <<'END'
import json, ml_collections
from fliqs_jax import train
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
.wide + figure { margin-top: 1.6rem; }
figcaption { max-width: 44rem; margin-bottom: 1rem; }
.wide { overflow-x: auto; }
img { display: block; max-width: 100%; height: auto; }
table { border-collapse: collapse; font-size: .875rem; width: 100%;
  font-variant-numeric: tabular-nums; }
th, td { padding: .32rem .7rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
th { font-weight: 500; }
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

_CAPTIONS = {
  'architecture': 'Every cell is a layer, in the order of the model, from few '
  'bits (red) to many (green); layers on a shortcut are raised above the row.',
  'pareto': 'Up and to the left is better: the star is the found model, the '
  'dots are the same network with one format everywhere.',
  'curves': 'What was logged over the steps of the one training run; dashed '
  'lines mark where its phases begin.',
  'policy': 'The probability of each format, by decision, over the steps; a '
  'decision is made once one colour fills the height.',
  'cost_per_layer': 'Coloured is the share that each layer takes of the found '
  'model’s cost, blue its share of all multiply-accumulates{uniform}.',
}


def render(
  run: finished_run.FinishedRun,
  images: Mapping[str, tuple[bytes, bytes]],
  tint: Mapping[str, str],
) -> str:
  """Returns the page.

  Args:
    run: what to tell.
    images: PNG files for light and for dark surroundings, by name.
    tint: colours by format.
  """
  title = ' on '.join(
    str(finished_run.config_value(run.config, key))
    for key in ('model.name', 'data.name')
  )
  body = [
    f'<h1>{html.escape(title)}</h1>',
    _lede(run),
    _tiles(run),
    f'<h2>{"Found architecture" if run.searched else "Architecture"}</h2>',
    _figure('architecture', images),
  ]
  if run.references:
    body += ['<h2>Beside uniform formats</h2>', _references(run)]
    body += [_figure('pareto', images)]
  body += ['<h2>Training and search</h2>', _figure('curves', images)]
  body += ['<h2>Policy</h2>', _policy(run, images)]
  uniform = f', grey its share at {run.reference}' if run.reference else ''
  body += ['<h2>Cost of each layer</h2>']
  body += [_figure('cost_per_layer', images, uniform=uniform)]
  body += ['<h2>Layers</h2>', _layers(run, tint)]
  if run.result['warnings']:
    items = ''.join(
      f'<li>{html.escape(str(text))}</li>' for text in run.result['warnings']
    )
    body += ['<h2 id="warnings">Warnings</h2>', f'<ul>{items}</ul>']
  body += ['<h2>This run</h2>', _provenance(run)]
  return document(title, body)


def document(title: str, body: Sequence[str]) -> str:
  """Returns a whole page in the house's look, from pieces of HTML."""
  return (
    '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    f'<title>{html.escape(title)}</title>\n<style>{_CSS}</style>\n</head>\n'
    '<body>\n' + '\n'.join(body) + '\n</body>\n</html>\n'
  )


def _digits(value: float, digits: int = 3) -> str:
  """Spells a number with so many significant digits, never as 1e6."""
  if not math.isfinite(value):
    return _UNKNOWN
  least = digits - 1 - math.floor(math.log10(abs(value))) if value else 0
  return f'{value:,.{max(0, least)}f}'


def _fixed(value: float, decimals: int) -> str:
  return f'{value:,.{decimals}f}' if math.isfinite(value) else _UNKNOWN


def _percent(fraction: float, digits: int = 2) -> str:
  known = math.isfinite(fraction)
  return f'{100 * fraction:.{digits}f}%' if known else _UNKNOWN


def _bytes(bits: float) -> str:
  if not math.isfinite(bits):
    return _UNKNOWN
  size, unit = bits / 8, 'B'
  for larger in ('kB', 'MB', 'GB'):
    if size >= 1000:
      size, unit = size / 1000, larger
  return f'{_digits(size)} {unit}'


def _seconds(seconds: float) -> str:
  minutes, rest = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  if hours:
    return f'{hours} h {minutes} min'
  return f'{minutes} min {rest} s' if minutes else f'{seconds:.1f} s'


def _lede(run: finished_run.FinishedRun) -> str:
  decisions = len(run.searched)
  what = (
    f'One search over {decisions} decisions'
    if decisions
    else 'Training with fixed formats'
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
    f'{_seconds(run.result["wall_seconds"])}.{warned}</p>'
  )


def _tiles(run: finished_run.FinishedRun) -> str:
  """Returns what a reader wants first."""
  found = run.found
  unit, target = html.escape(found['unit']), found['cost_target']
  against = 'no target'
  if math.isfinite(target):
    apart = found['cost'] / target - 1
    where = 'above' if apart > 0 else 'below'
    against = f'{_percent(abs(apart), 1)} {where} the target of '
    against += f'{_digits(target)}'
  tiles = [
    (
      f'Test {run.metric}',
      _percent(found[run.metric]),
      f'{found["examples"]:,} examples, loss {_digits(found["loss"])}',
    ),
    ('Cost', f'{_digits(found["cost"])} {unit}', against),
    ('Average bits', _digits(found['average_bits']), 'of a weight'),
    ('Size', _bytes(found['size_bits']), 'of all parameters'),
  ]
  return (
    '<dl>'
    + ''.join(
      f'<div><dt>{name}</dt><dd>{value}<small>{more}</small></dd></div>'
      for name, value, more in tiles
    )
    + '</dl>'
  )


def _figure(
  name: str, images: Mapping[str, tuple[bytes, bytes]], **words: str
) -> str:
  return figure(images[name], _CAPTIONS[name].format(**words))


def figure(image: tuple[bytes, bytes], caption: str) -> str:
  """Returns a picture that follows the surroundings, light or dark."""
  caption = html.escape(caption)
  sources = [
    'data:image/png;base64,' + base64.b64encode(shade).decode()
    for shade in image
  ]
  # A PNG file has its width in pixels at bytes 16 to 20.
  width = int.from_bytes(image[0][16:20]) * 100 // pictures.DPI
  # Shrunk to a phone's width, a small picture can still be read.
  size = 'large' if width > 640 else 'small'
  return (
    f'<figure><figcaption>{caption}</figcaption><div class="wide"><picture>'
    f'<source media="(prefers-color-scheme: dark)" srcset="{sources[1]}">'
    f'<img class={size} src="{sources[0]}" width="{width}" alt="{caption}">'
    '</picture></div></figure>'
  )


def table(head: Sequence[str], rows: Sequence[str], left: Sequence[int]) -> str:
  """Returns a table of rows that are HTML; columns `left` start at the left."""
  cells = ''.join(
    f'<th{" class=left" if i in left else ""}>{name}</th>'
    for i, name in enumerate(head)
  )
  return (
    f'<div class="wide"><table><thead><tr>{cells}</tr></thead><tbody>'
    + '\n'.join(rows)
    + '</tbody></table></div>'
  )


def _references(run: finished_run.FinishedRun) -> str:
  found = run.found
  models = sorted(
    [('found', found), *run.references.items()],
    key=lambda item: item[1]['cost'],
  )
  # One number of decimals to a column, so that the points are below each other.
  decimals = len(_digits(found['cost'], 4).partition('.')[2])
  rows = []
  for name, model in models:
    ahead = 100 * (model[run.metric] - found[run.metric])
    points = f'{ahead:+.2f}'.replace('-', '−')
    cells = [
      _percent(model[run.metric]),
      '' if model is found or not math.isfinite(ahead) else points,
      _fixed(model['cost'], decimals),
      f'{_fixed(model["cost"] / found["cost"], 2)}×',
      _fixed(model['average_bits'], 2),
      _fixed(model['size_bits'] / 8000, 1),
    ]
    mark = ' class=found' if model is found else ''
    rows.append(
      f'<tr{mark}><td class=left>{html.escape(name)}</td>'
      + ''.join(f'<td>{cell}</td>' for cell in cells)
      + '</tr>'
    )
  head = ['format', f'test {run.metric}', 'points']
  head += [f'cost, {html.escape(found["unit"])}', 'of found']
  head += ['average bits', 'size, kB']
  return table(head, rows, left=[0])


def _policy(
  run: finished_run.FinishedRun, images: Mapping[str, tuple[bytes, bytes]]
) -> str:
  if not run.searched:
    return (
      '<p>Nothing was searched: every decision of this run has one format, so '
      'there is no policy to draw.</p>'
    )
  if 'policy' not in images:
    return '<p>The history holds too few policies to draw their course.</p>'
  return _figure('policy', images)


def _chip(name: str | None, tint: Mapping[str, str]) -> str:
  if not name:
    return f'<span class=soft>{_UNKNOWN}</span>'
  colour = tint[name]
  return (
    f'<span class=chip style="background:{colour};'
    f'color:{pictures.ink_on(colour)}">{html.escape(name)}</span>'
  )


def _layers(run: finished_run.FinishedRun, tint: Mapping[str, str]) -> str:
  """Returns the table of layers, after what is to be said of them all."""
  largest = max(
    (x['cost'] for x in run.layers if math.isfinite(x['cost'])), default=0.0
  )
  # One number of decimals, so that the points are below each other.
  decimals = len(_digits(largest, 4).partition('.')[2])
  rows = []
  for i, layer in enumerate(run.layers, 1):
    share = layer['share'] if math.isfinite(layer['share']) else 0
    chances = layer['probabilities'].values()
    chance = ' / '.join(_fixed(p, 3) for p in chances)
    if any(p < _SETTLED for p in chances):
      chance = f'<span class=warn>unsettled {chance}</span>'
    cells = [
      f'<td class=soft>{i}</td>',
      f'<td class=left>{html.escape(layer["path"])}</td>',
      f'<td class="left soft">{html.escape(layer["kind"])}</td>',
      *(f'<td>{_chip(layer[s], tint)}</td>' for s in finished_run.SIDES),
      *(f'<td>{_fixed(layer[key], 0)}</td>' for key in ('macs', 'params')),
      f'<td>{_fixed(layer["cost"], decimals)}</td>',
      f'<td style="background:linear-gradient(to right,var(--bar) '
      f'{100 * share:.1f}%,transparent 0)">{_percent(layer["share"], 1)}</td>',
      f'<td>{chance or _UNKNOWN}</td>',
    ]
    rows.append(f'<tr>{"".join(cells)}</tr>')
  head = ['', 'layer', 'kind', 'weights', 'activations', 'MACs', 'parameters']
  head += [f'cost, {html.escape(run.arch["cost"]["unit"])}', 'share']
  head += ['probability']
  return _settled(run) + table(head, rows, left=[1, 2])


def _settled(run: finished_run.FinishedRun) -> str:
  """Says which decisions the policy left open."""
  if not run.searched:
    return '<p>The formats were given, not searched.</p>'
  open_ = [
    html.escape(name)
    for name, decision in run.searched.items()
    if not max(decision['probabilities']) >= _SETTLED
  ]
  if not open_:
    return (
      f'<p>All {len(run.searched)} decisions are settled: the policy gives '
      f'each found format a probability of at least {_SETTLED}.</p>'
    )
  return (
    f'<p><span class=warn>{len(open_)} of {len(run.searched)} decisions are '
    'unsettled</span>, the policy gives none of their formats a probability of '
    f'{_SETTLED}: {", ".join(open_)}.</p>'
  )


def _provenance(run: finished_run.FinishedRun) -> str:
  """Returns with what the run was made, and how to make it again."""
  result = run.result
  facts = {
    'seed': result['seed'],
    'steps': f'{result["steps"]:,}',
    'wall time': _seconds(result['wall_seconds']),
    'compiling': _seconds(result['compile_seconds']),
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
    '<p class="soft">Bit operations and sizes are computed from the formats; '
    'they are not measured times.</p>'
  )
