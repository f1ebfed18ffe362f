"""Tables of a report's page: models and layers.

All text from files passes `html.escape`, as in `page`.
"""

from collections.abc import Mapping, Sequence
import html
import math

from fliqs_jax.report import figures
from fliqs_jax.report import finished_run
from fliqs_jax.report import number_text

_SETTLED = 0.9  # Least probability of a settled decision.


def table(
  head: Sequence[str], rows: Sequence[str], left: Sequence[int], look: str = ''
) -> str:
  """Returns the HTML of a table.

  Args:
    head: names of the columns.
    rows: HTML of each row.
    left: indices of the columns whose text is aligned to the left.
    look: HTML attributes of the table.
  """
  cells = ''.join(
    f'<th{" class=left" if i in left else ""}>{name}</th>'
    for i, name in enumerate(head)
  )
  return (
    f'<div class="wide"><table{look}><thead><tr>{cells}</tr></thead><tbody>'
    + '\n'.join(rows)
    + '</tbody></table></div>'
  )


def references(run: finished_run.FinishedRun) -> str:
  """Returns the table of the selected model and the uniform ones, by cost."""
  found = run.found
  models = sorted(
    [('found', found), *run.references.items()],
    key=lambda item: item[1]['cost'],
  )
  places = number_text.decimals(found['cost'])
  rows = []
  for name, model in models:
    ahead = number_text.scale(run.metric) * (
      model[run.metric] - found[run.metric]
    )
    points = f'{ahead:+.2f}'.replace('-', '−')
    cells = [
      number_text.quality(model[run.metric], run.metric),
      '' if model is found or not math.isfinite(ahead) else points,
      number_text.fixed(model['cost'], places),
      f'{number_text.fixed(model["cost"] / found["cost"], 2)}×',
      number_text.fixed(model['average_bits'], 2),
      number_text.fixed(model['size_bits'] / 8000, 1),
    ]
    mark = ' class=found' if model is found else ''
    rows.append(
      f'<tr{mark}><td class=left>{html.escape(name)}</td>'
      + ''.join(f'<td>{cell}</td>' for cell in cells)
      + '</tr>'
    )
  head = ['format', f'test {html.escape(run.metric)}']
  head += [number_text.points(run.metric)]
  head += [f'cost, {html.escape(found["unit"])}', 'of found']
  head += ['average bits', 'size, kB']
  return table(head, rows, left=[0])


def _chip(name: str | None, tint: Mapping[str, str]) -> str:
  if not name:
    return f'<span class=soft>{number_text.UNKNOWN}</span>'
  colour = tint[name]
  return (
    f'<span class=chip style="background:{colour};'
    f'color:{figures.ink_on(colour)}">{html.escape(name)}</span>'
  )


def layers(run: finished_run.FinishedRun, tint: Mapping[str, str]) -> str:
  """Returns a text about all layers, and their table."""
  largest = max(
    (x['cost'] for x in run.layers if math.isfinite(x['cost'])), default=0.0
  )
  places = number_text.decimals(largest)
  sized = {what for layer in run.layers for what in layer['sizes']}
  columns = {}
  if sized & {'input_channels', 'output_channels'}:
    columns['channels'] = _channels
  if 'kernel' in sized:
    columns['kernel'] = _kernel
  rows = []
  for i, layer in enumerate(run.layers, 1):
    bar = 100 * layer['share'] if math.isfinite(layer['share']) else 0
    chances = layer['probabilities'].values()
    chance = ' / '.join(number_text.fixed(p, 3) for p in chances)
    if any(p < _SETTLED for p in chances):
      chance = f'<span class=warn>unsettled {chance}</span>'
    cells = [
      f'<td class=soft>{i}</td>',
      f'<td class=left>{html.escape(layer["path"])}</td>',
      f'<td class="left soft">{html.escape(layer["kind"])}</td>',
      *(f'<td>{_chip(layer[s], tint)}</td>' for s in finished_run.SIDES),
      *(f'<td>{cell(layer["sizes"])}</td>' for cell in columns.values()),
      f'<td>{number_text.fixed(layer["macs"], 0)}</td>',
      f'<td>{number_text.fixed(layer["params"], 0)}</td>',
      f'<td>{number_text.fixed(layer["cost"], places)}</td>',
      f'<td style="background:linear-gradient(to right,var(--bar) '
      f'{bar:.1f}%,transparent 0)">'
      f'{number_text.percent(layer["share"], 1)}</td>',
      f'<td>{chance or number_text.UNKNOWN}</td>',
    ]
    rows.append(f'<tr>{"".join(cells)}</tr>')
  head = ['', 'layer', 'kind', *finished_run.SIDES, *columns]
  head += ['MACs', 'parameters']
  head += [f'cost, {html.escape(run.arch["cost"]["unit"])}', 'share']
  head += ['probability']
  look = ' class=tight' if columns else ''
  said = _settled(run)
  if columns:
    said += (
      f'<p class=soft>Where {" and ".join(columns)} were searched, the '
      'probability of the selected option follows in grey, underlined if it is '
      f'below {_SETTLED}; the last column has that of the formats.</p>'
    )
  return said + table(head, rows, left=[1, 2], look=look)


def _channels(sizes: Mapping[str, finished_run.Size]) -> str:
  """Returns the input and output channels that decisions picked."""
  inputs, outputs = (sizes.get(f'{x}_channels') for x in ('input', 'output'))
  if not inputs and not outputs:
    return ''
  text = f'{html.escape(str(inputs.count))} → ' if inputs else ''
  if outputs:
    text += html.escape(str(outputs.count))
  # The input channels are output channels of an earlier layer.
  return text.rstrip() + _chance(outputs or inputs)


def _kernel(sizes: Mapping[str, finished_run.Size]) -> str:
  kernel = sizes.get('kernel')
  if not kernel:
    return ''
  count = html.escape(str(kernel.count))
  return f'{count}×{count}' + _chance(kernel)


def _chance(size: finished_run.Size) -> str:
  """Returns the probability of a size, if there were several options."""
  if len(size.options) < 2:
    return ''
  # A word, as for formats, would make the table too wide for its page.
  look = '"warn open"' if size.probability < _SETTLED else 'soft'
  return f' <span class={look}>{number_text.fixed(size.probability, 3)}</span>'


def _settled(run: finished_run.FinishedRun) -> str:
  """Returns a text that names the unsettled decisions."""
  if not run.searched:
    what = 'formats and sizes' if run.has_sizes else 'formats'
    return f'<p>The {what} were given, not searched.</p>'
  searched = {'format': run.searched_formats, 'size': run.searched_sizes}
  kinds = [kind for kind, decisions in searched.items() if decisions]
  open_ = [
    html.escape(name)
    for name, decision in run.searched.items()
    if not max(decision['probabilities']) >= _SETTLED
  ]
  if not open_:
    return (
      f'<p>All {len(run.searched)} decisions are settled: the policy gives '
      f'each selected {" and ".join(kinds)} a probability of at least '
      f'{_SETTLED}.</p>'
    )
  return (
    f'<p><span class=warn>{len(open_)} of {len(run.searched)} decisions are '
    f'unsettled</span>, the policy gives none of their '
    f'{" or ".join(f"{kind}s" for kind in kinds)} a probability of '
    f'{_SETTLED}: {", ".join(open_)}.</p>'
  )
