"""Table of a network's costs: what is allowed, and where a chip gains nothing.

All text from files passes `html.escape`, as in `page`.
"""

from collections.abc import Mapping, Sequence
import html
from typing import Any

from fliqs_jax.report import number_text
from fliqs_jax.report import tables

_SHOWN = 12  # More layers than these are counted, not named.


def costs(rows: Sequence[Mapping[str, Any]]) -> str:
  """Returns the table of costs, and a text for each chip.

  Args:
    rows: `costs` of a result.json.
  """
  uniform = list(dict.fromkeys(name for row in rows for name in row['uniform']))
  body = []
  for row in rows:
    limit, places = row['limit'], number_text.decimals(row['value'])
    allowed = share = number_text.UNKNOWN
    if limit is not None:
      near = 'near ' if row['bound'] == 'near' else ''
      allowed = near + number_text.fixed(limit, places)
      share = number_text.percent(row['value'] / limit, 1)
    values = [
      number_text.fixed(row['uniform'][name], places)
      if name in row['uniform']
      else number_text.UNKNOWN
      for name in uniform
    ]
    cells = [number_text.fixed(row['value'], places), allowed, share, *values]
    name = f'{row["kind"]}, {row["unit"]}'
    body.append(
      f'<tr><td class=left>{html.escape(name)}</td>'
      + ''.join(f'<td>{cell}</td>' for cell in cells)
      + '</tr>'
    )
  head = ['cost', 'found', 'allowed', 'used']
  head += [f'uniform {html.escape(name)}' for name in uniform]
  texts = [_of_chip(row) for row in rows if 'chip' in row]
  return tables.table(head, body, left=[0]) + ''.join(texts)


def _of_chip(row: Mapping[str, Any]) -> str:
  """Returns which layers gain nothing on a chip, and how sure prices are."""
  layers = row['layers']
  inputs = (
    f'{row["batch"]} inputs cost' if row['batch'] > 1 else 'an input costs'
  )
  text = (
    f'<b>{html.escape(row["kind"])}</b> predicts what {inputs} on '
    f'{html.escape(row["chip"])}; it is not measured here. '
  )
  idle = [x for x in layers if not x['gains']]
  if idle:
    used = sorted(
      {name for x in idle for name in (x['weights'], x['activations'])}
    )
    text += (
      f'<span class=warn>No gain on this chip: {_named(idle)}</span>; it '
      f'multiplies them as {html.escape(", ".join(used))}, at the same cost. '
    )
  else:
    text += 'No layer would cost the same there with more bits. '
  for confidence, what in (
    ('interpolated', 'between those of measured layers'),
    ('assumed', 'by figures that are assumptions'),
  ):
    some = [x for x in layers if x['confidence'] == confidence]
    if some:
      text += f'Priced {what}: {_named(some, len(layers))}. '
  return f'<p style="margin-top:1rem">{text.strip()}</p>'


def _named(rows: Sequence[Mapping[str, Any]], count: int = 0) -> str:
  """Returns the paths of layers, or their number if there are many."""
  if len(rows) == count:
    return 'all layers'
  if len(rows) > _SHOWN:
    return f'{len(rows)} layers'
  return html.escape(', '.join(row['path'] for row in rows))
