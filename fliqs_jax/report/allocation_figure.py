"""Figure of the allocation: bits beside channels and kernels (paper, A.7)."""

from collections.abc import Mapping, Sequence
import math
from typing import Any

from matplotlib import figure as figure_lib
from matplotlib import lines as lines_lib
from matplotlib import ticker
import numpy as np

from fliqs_jax.numerics import formats
from fliqs_jax.report import figures
from fliqs_jax.report import finished_run

_ORDER = ('pointwise', 'depthwise')  # These come first.
# The colours of some formats are as pale as the page.
_RIM = {'mec': figures.GREY, 'mew': 0.4}
_DOT = {'ms': 4.5, **_RIM}
_DRAWN = {'output_channels': 'channels', 'kernel': 'kernel'}


def panes(
  layers: Sequence[Mapping[str, Any]],
) -> dict[tuple[str, str, str], list[Mapping[str, Any]]]:
  """Sorts layers into panes; there is none if there is nothing to compare.

  Args:
    layers: rows of `FinishedRun.layers`.

  Returns:
    {(size, kind of layer, side): layers whose size had several options and
    whose side is quantized}. It is empty if all of them have equally many bits.
  """
  sides = [s for s in finished_run.SIDES if any(x[s] for x in layers)]
  if all(x['weights'] == x['activations'] for x in layers):
    sides = sides[:1]
  found: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
  for side in sides:
    for what in _DRAWN:
      for layer in layers:
        size = layer['sizes'].get(what)
        if layer[side] and size and len(size.options) > 1:
          key = what, layer['kind'], side
          found.setdefault(key, []).append(layer)
  bits = {_bits(x, key[2]) for key, part in found.items() for x in part}
  if len(bits) < 2:
    return {}
  places = {name: i for i, name in enumerate((*_DRAWN, *sides, *_ORDER))}
  return dict(
    sorted(
      found.items(),
      key=lambda item: (
        places[item[0][2]],
        places[item[0][0]],
        places.get(item[0][1], len(places)),
      ),
    )
  )


def allocation(
  layers: Sequence[Mapping[str, Any]], tint: Mapping[str, str]
) -> figure_lib.Figure:
  """Draws a dot per layer: its channels or its kernel against its bits.

  Args:
    layers: rows of `FinishedRun.layers`, for which `panes` is not empty.
    tint: {format: colour}.
  """
  parts = panes(layers)
  # One row of panes for each side, if it fits.
  across = min(4, math.ceil(len(parts) / len({key[2] for key in parts})))
  down = math.ceil(len(parts) / across)
  width, height = figures.WIDTH / max(3, across), 2.3
  figure = figure_lib.Figure((width * across, height * down))
  figure.subplots_adjust(0, 0, 1, 1, 0.24, 0.42)
  grid = figure.subplots(down, across, squeeze=False).flat
  same = all(x['weights'] == x['activations'] for x in layers)
  bits = sorted({_bits(x, key[2]) for key, part in parts.items() for x in part})
  for (key, part), axes in zip(parts.items(), grid):
    _draw(axes, key, part, bits, tint)
    axes.set_xlabel('bits' if same else f'bits of {key[2]}', fontsize=7.5)
  for axes in grid:  # The unused panes.
    axes.set_axis_off()
  used = {x[key[2]] for key, part in parts.items() for x in part}
  handles = [
    lines_lib.Line2D([], [], color=tint[n], marker='o', ls='', label=n, **_DOT)
    for n in tint
    if n in used
  ]
  mean = lines_lib.Line2D([], [], color=figures.GREY, lw=1.2, label='mean')
  figures.key(figure, [*handles, mean], lift=0.36)
  return figure


def _bits(layer: Mapping[str, Any], side: str) -> int:
  return formats.parse(layer[side]).bits


def _draw(axes, key, layers, bits, tint) -> None:
  """Draws one pane, with a column of layers for each number of bits."""
  what, kind, side = key
  sizes = [layer['sizes'][what] for layer in layers]
  channels = what == 'output_channels'
  values = [100 * s.share if channels else float(s.label) for s in sizes]
  labels = {option for s in sizes for option in s.options}
  low, high = (0, 110) if channels else (min(labels) - 1, max(labels) + 1)
  columns = [bits.index(_bits(layer, side)) for layer in layers]
  axes.set(xlim=(-0.5, len(bits) - 0.5), ylim=(low, high))
  axes.set_xticks(range(len(bits)), bits)
  axes.tick_params(length=2)
  if channels:
    axes.yaxis.set_major_formatter(ticker.PercentFormatter(decimals=0))
    axes.set_yticks((0, 25, 50, 75, 100))
  else:
    axes.set_yticks(sorted(labels), [f'{k}×{k}' for k in sorted(labels)])
  spots, points = _spread(axes, columns, values)
  for layer, (x, y) in zip(layers, spots):
    axes.plot(x, y, 'o', ms=points, color=tint[layer[side]], **_RIM)
  means = {
    column: np.mean([v for c, v in zip(columns, values) if c == column])
    for column in sorted(set(columns))
  }
  line = {'color': figures.GREY, 'lw': 1.2, 'zorder': 0, 'marker': '_'}
  axes.plot(list(means), list(means.values()), ms=14, **line)
  decisions = len({size.decision for size in sizes})
  axes.set_title(f'{_DRAWN[what]}, {kind}', fontsize=8.5, loc='left', pad=15)
  axes.text(
    0,
    1.03,
    f'{_count(len(layers), "layer")}, {_count(decisions, "decision")}',
    transform=axes.transAxes,
    fontsize=7,
  )


def _count(number: int, noun: str) -> str:
  return f'{number} {noun}{"s" * (number != 1)}'


def _spread(
  axes: Any, columns: Sequence[int], values: Sequence[float]
) -> tuple[list[tuple[float, float]], float]:
  """Places dots that would coincide beside and above each other.

  Returns:
    The position of each dot on the axes, and the size of all dots in points.
  """
  box = axes.get_position()
  figure = axes.get_figure()
  left, right = axes.get_xlim()
  low, high = axes.get_ylim()
  # The size of a typographic point in units of the axes.
  dx = (right - left) / (box.width * figure.get_figwidth() * 72)
  dy = (high - low) / (box.height * figure.get_figheight() * 72)
  cells: dict[tuple[int, int], list[int]] = {}
  for i, (column, value) in enumerate(zip(columns, values)):
    # Shares that differ only by rounding have the same place.
    cell = column, round(value / (high - low) * 22)
    cells.setdefault(cell, []).append(i)
  most = max(map(len, cells.values()))
  # The largest dots that fit into the fullest place, in a square.
  for pitch in (5.5, 4.5, 3.5, 2.5):
    across = max(1, int(0.84 / dx / pitch))
    if math.ceil(most / across) * pitch * dy < 0.2 * (high - low):
      break
  spots = [(0.0, 0.0)] * len(values)
  for (column, _), members in cells.items():
    middle = sum(values[i] for i in members) / len(members)
    rows = math.ceil(len(members) / across)
    # Rows of nearly equal length make a round group.
    for row in range(rows):
      part = members[row::rows]
      for k, i in enumerate(part):
        spots[i] = (
          column + (k - (len(part) - 1) / 2) * pitch * dx,
          middle + ((rows - 1) / 2 - row) * pitch * dy,
        )
  return spots, 0.85 * pitch
