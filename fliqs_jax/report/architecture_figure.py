"""Figure of an architecture: rows of coloured cells (paper, Figures 3, 7)."""

from collections.abc import Mapping, Sequence
import dataclasses
import math
import re
from typing import Any

from matplotlib import figure as figure_lib
from matplotlib import patches

from fliqs_jax.report import figures

_GAP, _BETWEEN = 0.05, 0.14  # Between cells, between blocks; all in inches.
_LIFT = 0.14  # From a cell up to one on the shortcut above it.
_LETTER = 0.05  # Width of a letter of the names below the cells.
_LINE = 0.125  # Height of a line of text in or above a cell.
_PALE = 0.22  # Opacity of the unused part of a cell.
_RAISED = ('shortcut', 'projection', 'downsample')


@dataclasses.dataclass(frozen=True)
class _Canvas:
  """The axes of the figure, and the properties that all cells share.

  Lengths are in inches. `above` is the space for sizes above a cell, `spine`
  the distance from the top of a cell down to the line that joins all cells.
  """

  axes: Any
  layers: Sequence[Mapping[str, Any]]
  names: Sequence[Sequence[str | None]]
  tint: Mapping[str, str]
  kernels: Mapping[int, str]
  width: float
  height: float
  above: float
  spine: float


def architecture(
  layers: Sequence[Mapping[str, Any]], tint: Mapping[str, str]
) -> figure_lib.Figure:
  """Draws one cell per layer in model order, shortcuts above the main row.

  Args:
    layers: mappings with `path`, `weights` and `activations` (names of formats;
      None for a tensor that is not quantized), and `sizes` as in
      `FinishedRun.layers`. If a decision picked a layer's output channels, the
      cell is filled up to their share.
    tint: {format: colour}.
  """
  paths = [layer['path'] for layer in layers]
  # A side that no layer quantizes would only fill half of each cell with grey.
  sides = [s for s in ('weights', 'activations') if any(x[s] for x in layers)]
  names = [[layer[side] for side in sides] or [None] for layer in layers]
  split = any(len(set(pair)) > 1 for pair in names)
  rows = _rows(paths)
  width = min(
    (figures.WIDTH - _BETWEEN * len(row)) / _columns(row) - _GAP for row in rows
  )
  figure = figure_lib.Figure()
  axes = figure.add_axes((0, 0, 1, 1))
  sized = {what for layer in layers for what in layer['sizes']}
  kernels = figures.kernel_palette(
    option
    for layer in layers
    if (size := layer['sizes'].get('kernel'))
    for option in (*size.options, size.count)
  )
  height = 0.5 if split else 0.4
  above = _LINE * (('output_channels' in sized) + 1.2 * ('kernel' in sized))
  spine = height / 2
  if 'output_channels' in sized:  # A cell may be filled only at its foot.
    height += 0.2
    spine = height - 0.05
  canvas = _Canvas(
    axes, layers, names, tint, kernels, min(0.82, width), height, above, spine
  )
  bottom, right = 0.0, 0.0
  for row in rows:
    bottom, end = _draw_row(canvas, row, bottom)
    right = max(right, end)
  used = {name for pair in names for name in pair}
  handles = [patches.Patch(color=tint[n], label=n) for n in tint if n in used]
  if None in used:
    handles.append(patches.Patch(color=figures.GREY, label='not quantized'))
  if split:
    halves = 'halves: weights above, activations below'
    handles.append(patches.Patch(alpha=0, label=halves))
  figure.set_size_inches(right + 0.2, bottom)  # Legends are placed by it.
  explained = _sizes_key(canvas)
  figures.key(figure, explained)
  figures.key(figure, handles, lift=0.2 * bool(explained))
  axes.set(xlim=(-0.1, right + 0.1), ylim=(bottom, 0))
  axes.set_axis_off()
  return figure


def _sizes_key(canvas: _Canvas) -> list[patches.Patch]:
  """Returns the entries of the legend that explain sizes."""
  handles = [
    patches.Patch(color=colour, label=f'kernel {size}×{size}')
    for size, colour in canvas.kernels.items()
  ]
  if any(_share(layer) < 1 for layer in canvas.layers):
    label = 'channels not taken, of the most to pick from'
    handles.append(patches.Patch(color=figures.GREY, alpha=_PALE, label=label))
  return handles


def _place(path: str) -> tuple[str, bool]:
  """Returns the block of a layer, and whether the layer is on its shortcut."""
  parts = path.split('/')
  for i, part in enumerate(parts):
    if any(word in part.lower() for word in _RAISED):
      return '/'.join(parts[:i]), True
  return '/'.join(parts[:-1]), False


def _blocks(paths: Sequence[str], most: int) -> list[dict[str, Any]]:
  """Cuts a model into blocks of at most `most` columns.

  Returns:
    A list of {'name', 'main', 'raised'}; `main` and `raised` are lists of
    indices of layers.
  """
  blocks: list[dict[str, Any]] = []
  for i, path in enumerate(paths):
    name, raised = _place(path)
    lane = 'raised' if raised else 'main'
    last = blocks[-1] if blocks else None
    if not last or last['name'] != name or len(last[lane]) == most:
      blocks.append({'name': name, 'main': [], 'raised': []})
    blocks[-1][lane].append(i)
  for block in blocks:
    if not block['main']:  # Without a main row a shortcut is an ordinary layer.
      block['main'], block['raised'] = block['raised'], []
  return blocks


def _columns(row: Sequence[Mapping[str, Any]]) -> int:
  return sum(max(len(b['main']), len(b['raised'])) for b in row)


def _wrap(paths: Sequence[str], most: int) -> list[list[dict[str, Any]]]:
  rows: list[list[dict[str, Any]]] = [[]]
  for block in _blocks(paths, most):
    if rows[-1] and _columns([*rows[-1], block]) > most:
      rows.append([])
    rows[-1].append(block)
  return rows


def _rows(paths: Sequence[str]) -> list[list[dict[str, Any]]]:
  """Wraps a model into the fewest rows with space for the formats' names."""
  most = 20
  rows = _wrap(paths, most)
  # The narrowest rows of this number, so that the last one is not short.
  while most > 1 and len(narrower := _wrap(paths, most - 1)) == len(rows):
    rows, most = narrower, most - 1
  return rows


def _draw_row(canvas, row, top) -> tuple[float, float]:
  """Draws a row of blocks; returns its bottom and its right end."""
  pitch = canvas.width + _GAP
  leaves = {
    i: _broken(canvas.layers[i]['path'].split('/')[-1], pitch)
    for block in row
    for i in block['main']
  }
  letters = max(len(line) for leaf in leaves.values() for line in leaf)
  upright = letters * _LETTER > pitch + 0.06
  foot = 0.04 + 0.11 * max(map(len, leaves.values()))
  if upright:
    leaves = {
      i: [figures.fit(''.join(leaf), 0.85, 6.5)] for i, leaf in leaves.items()
    }
    foot = 0.06 + _LETTER * max(len(leaf[0]) for leaf in leaves.values())
  y = top + 0.16 + canvas.above
  y += (canvas.height + _LIFT + canvas.above) * any(b['raised'] for b in row)
  x = 0.0
  for block in row:
    right = x + _columns([block]) * pitch - _GAP
    for k, i in enumerate(block['main']):
      _draw_cell(canvas, i, x + k * pitch, y)
      _draw_text(
        canvas,
        '\n'.join(leaves[i]),
        x + k * pitch + canvas.width / 2,
        y + canvas.height + 0.045,
        90 if upright else 0,
      )
    _draw_shortcut(canvas, block, x, right, y)
    if block['name']:
      below = y + canvas.height + foot + 0.04
      canvas.axes.plot([x, right], [below] * 2, color=figures.GREY, lw=0.8)
      label = figures.fit(block['name'], right - x + 0.05, 6.5)
      _draw_text(canvas, label, (x + right) / 2, below + 0.045, 0)
    x = right + _BETWEEN
  middle = [y + canvas.spine] * 2
  canvas.axes.plot(
    [-0.1, right + 0.1], middle, color=figures.GREY, lw=1, zorder=0
  )
  return y + canvas.height + foot + 0.26, right


def _broken(leaf: str, room: float) -> list[str]:
  """Breaks a layer's own name after underscores, if it is too long."""
  if len(leaf) * _LETTER <= room + 0.06:
    return [leaf]
  return [line for line in re.split('(?<=_)', leaf) if line]


def _draw_shortcut(canvas, block, x, right, y) -> None:
  """Draws the branch above a block that spans `x` to `right`, if it has one."""
  if not block['raised']:
    return
  top = y - canvas.height - _LIFT - canvas.above
  low, high = y + canvas.spine, top + canvas.spine
  # Less than half the space between blocks, so that neighbours do not touch.
  x, right = x - 0.045, right + 0.045
  canvas.axes.plot(
    [x, x, right, right],
    [low, high, high, low],
    color=figures.GREY,
    lw=1,
    zorder=0,
  )
  pitch = canvas.width + _GAP
  start = (x + right - len(block['raised']) * pitch + _GAP) / 2
  for k, i in enumerate(block['raised']):
    _draw_cell(canvas, i, start + k * pitch, top)


def _draw_cell(canvas, i, x, y) -> None:
  """Draws layer `i` with its corner at (x, y): one piece, or two halves."""
  names = canvas.names[i]
  pieces = names[:1] if len(set(names)) == 1 else names
  share = _share(canvas.layers[i])
  if share < 1:
    _draw_box(canvas, x, y, canvas.height, figures.GREY, alpha=_PALE)
  top = y + canvas.height * (1 - share)
  height = canvas.height * share / len(pieces)
  inside = height >= _LINE + 0.02
  for k, name in enumerate(pieces):
    colour = canvas.tint[name] if name else figures.GREY
    gap = 0.02 if k + 1 < len(pieces) else 0
    _draw_box(canvas, x, top + k * height, height - gap, colour)
    middle = top + (k + 0.5) * height
    if not inside:  # The lines are above the cell, one below the other.
      middle = top + (k + 0.5 - len(pieces)) * _LINE - 0.01
    canvas.axes.text(
      x + canvas.width / 2,
      middle,
      name or '–',
      ha='center',
      va='center_baseline',
      color=figures.ink_on(colour) if inside else None,
      fontsize=7,
      fontweight='bold',
    )
  _draw_sizes(canvas, i, x, y)


def _share(layer: Mapping[str, Any]) -> float:
  """Returns the part of a cell that is filled, 0 to 1."""
  size = layer['sizes'].get('output_channels')
  known = size is not None and math.isfinite(size.share)
  return size.share if known else 1.0


def _draw_sizes(canvas, i, x, y) -> None:
  """Writes the sizes that decisions picked above the cell at (x, y)."""
  sizes = canvas.layers[i]['sizes']
  if size := sizes.get('output_channels'):
    text = str(size.count)
    _draw_text(canvas, text, x + canvas.width / 2, y - _LINE + 0.01, 0)
  if size := sizes.get('kernel'):
    y -= canvas.above
    colour = canvas.kernels[size.count]
    width = min(canvas.width, 0.32)
    left = x + (canvas.width - width) / 2
    _draw_box(canvas, left, y, _LINE, colour, width=width)
    canvas.axes.text(
      x + canvas.width / 2,
      y + _LINE / 2,
      f'{size.count}×{size.count}',
      ha='center',
      va='center_baseline',
      color=figures.ink_on(colour),
      fontsize=6.5,
    )


def _draw_box(canvas, x, y, height, colour, alpha=None, width=None) -> None:
  canvas.axes.add_patch(
    patches.FancyBboxPatch(
      (x, y),
      width or canvas.width,
      height,
      boxstyle='round,pad=0,rounding_size=0.035',
      facecolor=colour,
      alpha=alpha,
      linewidth=0,
    )
  )


def _draw_text(canvas, text, x, y, rotation) -> None:
  canvas.axes.text(
    x,
    y,
    text,
    ha='center',
    va='top',
    fontsize=6.5,
    rotation=rotation,
  )
