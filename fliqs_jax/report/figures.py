"""Figures of a finished run, and the colours of all figures, with matplotlib.

Every figure is a function of plain values; no file is read here. `png` turns a
figure into bytes, dark on white; `pngs` also white on dark. Colours follow the
paper's Figures 3 and 7: few bits are red, many are green. Since this pair is
the worst for a colour-blind reader, reds are warm, greens are bluish, and every
colour comes with the format's name. Sizes are violet, which is no format's
colour, from light to dark.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import io
import math
from typing import Any

import matplotlib
from matplotlib import colors
from matplotlib import figure as figure_lib
from matplotlib import lines as lines_lib
from matplotlib import patches
from matplotlib import ticker
from matplotlib import transforms
from matplotlib.backends import backend_agg
import numpy as np

from fliqs_jax.numerics import formats
from fliqs_jax.report import number_text

DPI = 160
WIDTH = 9.6  # Inches; a page shows 100 pixels for one.
_BITS_COLOURS = {
  2: '#8f1d4a',
  3: '#b5304a',
  4: '#dc5c4c',
  5: '#f09a5f',
  6: '#f7d77c',
  7: '#b4d486',
  8: '#52b08a',
  16: '#1a7470',
}
_SIZES_COLOURS = ('#d9cdf2', '#a488d6', '#4d2f8c')
GREY = '#a7aeb6'
_ACCENT = '#4c8dc4'
_INK, _PAPER = '#22272e', '#ffffff'
_DARK_INK, _DARK_PAPER = '#d5dae0', '#15181c'


def png(draw: Callable[[], figure_lib.Figure]) -> bytes:
  """Returns the figure that `draw` makes, as the bytes of a PNG file.

  Args:
    draw: () -> figure; it is called with the style set.
  """
  return _saved(draw, _INK, _PAPER)[0]


def pngs(draw: Callable[[], figure_lib.Figure]) -> tuple[bytes, bytes]:
  """Returns the figures of `draw` for a light and for a dark page, as `png`.

  Args:
    draw: () -> figure; it is called with each style set.
  """
  light, box = _saved(draw, _INK, _PAPER)
  return light, _saved(draw, _DARK_INK, _DARK_PAPER, box)[0]


def _saved(
  draw: Callable[[], figure_lib.Figure],
  ink: str,
  paper: str,
  box: transforms.BboxBase | None = None,
) -> tuple[bytes, transforms.BboxBase]:
  """Returns the PNG of a figure, and its box in inches; None: it is measured.

  Colours do not move anything. To measure takes nearly as long as to draw.
  """
  style = dict.fromkeys(
    ('figure.facecolor', 'savefig.facecolor', 'axes.facecolor'), paper
  )
  style |= dict.fromkeys(
    ('text.color', 'axes.labelcolor', 'axes.edgecolor', 'xtick.color'), ink
  )
  style |= {'ytick.color': ink, 'font.family': 'DejaVu Sans', 'font.size': 8}
  style |= {'axes.spines.top': False, 'axes.spines.right': False}
  # A dollar sign in the name of a layer does not begin a formula.
  style |= {'text.usetex': False, 'text.parse_math': False}
  style |= {'axes.linewidth': 0.6, 'xtick.labelsize': 7, 'ytick.labelsize': 7}
  with matplotlib.rc_context(style):
    figure = draw()
    canvas = backend_agg.FigureCanvasAgg(figure)
    figure.set_dpi(DPI)
    # Unlike `bbox_inches='tight'`, which also draws all once to no effect.
    box = box or figure.get_tightbbox(canvas.get_renderer()).padded(0.04)
    file = io.BytesIO()
    figure.savefig(file, format='png', dpi=DPI, bbox_inches=box)
  return file.getvalue(), box


def palette(names: Iterable[str]) -> dict[str, str]:
  """Returns a colour for each format: hue by bits, shade among equal bits."""
  same: dict[int, list[str]] = {}
  for name in sorted(set(names)):
    same.setdefault(formats.parse(name).bits, []).append(name)
  result = {}
  for bits, group in sorted(same.items()):
    base = np.array(colors.to_rgb(_BITS_COLOURS[bits]))
    for i, name in enumerate(group):
      # Slightly darker to much lighter: dark yellow would look like green.
      shade = 0.72 * i / max(1, len(group) - 1) - 0.12 * (len(group) > 1)
      mixed = base + abs(shade) * (np.float64(shade > 0) - base)
      result[name] = colors.to_hex(mixed)
  return result


def shades(count: int) -> list[str]:
  """Returns `count` colours for sizes, from the smallest to the largest."""
  scale = colors.LinearSegmentedColormap.from_list('sizes', _SIZES_COLOURS)
  # A single colour is the middle one, which does not look like an extreme.
  at = np.linspace(0, 1, count) if count > 1 else np.full(count, 0.5)
  return [colors.to_hex(colour) for colour in scale(at)]


def kernel_palette(sizes: Iterable[int]) -> dict[int, str]:
  """Returns {size of a kernel: colour}."""
  ordered = sorted(set(sizes))
  return dict(zip(ordered, shades(len(ordered))))


def ink_on(colour: str) -> str:
  """Returns black or white, whichever is read more easily on `colour`."""
  linear = [
    c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
    for c in colors.to_rgb(colour)
  ]
  # Relative luminance as WCAG 2 defines it.
  luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
  return '#111111' if luminance > 0.2 else '#ffffff'


def fit(text: str, inches: float, points: float) -> str:
  """Shortens `text` from the left: the end of a path is more important.

  Args:
    text: the text, such as a path.
    inches: the space for it.
    points: size of the font.
  """
  room = int(inches / (0.58 * points / 72))
  return text if len(text) <= room else '…' + text[len(text) - room + 1 :]


def key(
  figure: figure_lib.Figure, handles: Sequence[Any], lift: float = 0
) -> None:
  """Puts a legend `lift` inches above a figure's upper edge."""
  if not handles:
    return
  figure.legend(
    handles=handles,
    loc='lower left',
    bbox_to_anchor=(0, 1 + lift / figure.get_figheight()),
    # One row, because a legend of several rows is ordered by columns.
    ncols=len(handles),
    frameon=False,
    borderaxespad=0,
    borderpad=0.3,
    handlelength=1,
    handleheight=1,
    columnspacing=1.2,
    fontsize=7.5,
  )


def curves(
  history: Sequence[Mapping[str, Any]],
  marks: Mapping[str, int],
  searched: bool,
) -> figure_lib.Figure:
  """Draws the logged metrics over the steps.

  Args:
    history: rows with `step`, `loss`, `quality`, `reward`, `cost` and
      `entropy`; a value that is not finite leaves a gap, and a metric without
      any value, such as the reward of a search that judges nothing, no panel.
    marks: {description of a phase: its first step}.
    searched: whether there are other metrics to draw than the loss.
  """
  titles = {'loss': 'training loss'}
  if searched:
    titles |= {
      'quality': 'quality (validation)',
      'reward': 'reward',
      'cost': 'expected cost / target',
      'entropy': 'policy entropy (nats)',
    }
  series = {
    name: np.array([row[name] for row in history], float) for name in titles
  }
  titles = {
    name: title
    for name, title in titles.items()
    if name == 'loss' or np.isfinite(series[name]).any()
  }
  # Four fields, the legend's included, make a square.
  across = 2 if len(titles) == 3 else min(3, len(titles) + 1)
  down = math.ceil((len(titles) + 1) / across)
  figure = figure_lib.Figure((WIDTH / 3 * across, 2.1 * down))
  figure.subplots_adjust(0, 0, 1, 1, 0.2, 0.36)
  grid = figure.subplots(down, across, squeeze=False, sharex=True).flat
  dashes = ((0, (1, 1.5)), (0, (4, 2)), (0, (7, 2, 1.5, 2)))
  lines = [
    {'color': GREY, 'linestyle': dash, 'linewidth': 1.1} for dash in dashes
  ]
  goal = {'color': _BITS_COLOURS[4], 'linewidth': 1}
  steps = [row['step'] for row in history]
  for (name, title), axes in zip(titles.items(), grid):
    values = series[name]
    known = np.isfinite(values).sum()
    # A single point has no line.
    marker = '.' if known == 1 else ''
    axes.plot(steps, values, color=_ACCENT, linewidth=1.2, marker=marker)
    if name == 'cost':
      axes.axhline(1, **goal)
    for step, line in zip(marks.values(), lines):
      axes.axvline(step, zorder=1, **line)
    if not known:
      axes.text(0.5, 0.5, 'no values', transform=axes.transAxes, ha='center')
      axes.set_yticks([])
    axes.set_title(title, fontsize=8.5, loc='left')
    axes.tick_params(length=2, labelbottom=True)
  handles = [
    lines_lib.Line2D([], [], label=f'{label}: step {step:,}', **line)
    for (label, step), line in zip(marks.items(), lines)
  ]
  if searched:
    handles.append(lines_lib.Line2D([], [], label='cost target', **goal))
  corner = next(grid)
  corner.legend(
    handles=handles,
    loc='center left',
    frameon=False,
    handlelength=3.5,
    labelspacing=1.1,
  )
  for axes in (corner, *grid):
    axes.set_axis_off()
  return figure


def cost_per_layer(
  layers: Sequence[Mapping[str, Any]],
  tint: Mapping[str, str],
  reference: str | None,
) -> figure_lib.Figure:
  """Draws each layer's share of the cost, beside its share of a reference.

  Args:
    layers: mappings with `path`, `weights`, `activations`, and the fractions
      `share`, `reference_share` and `macs_share`.
    tint: {format: colour}.
    reference: description of the model of `reference_share`; None omits it.
  """
  down = math.ceil(len(layers) / 50)
  across = math.ceil(len(layers) / down)
  letters = min(28, max(len(layer['path']) for layer in layers))
  pane, foot = 2.0, letters * 0.05 + 0.25
  figure = figure_lib.Figure(
    (min(WIDTH, 1.5 + 0.55 * across), down * (pane + foot) - foot)
  )
  figure.subplots_adjust(0, 0, 1, 1, hspace=foot / pane)
  grid = figure.subplots(down, 1, squeeze=False, sharey=True).flat
  uniform = {'color': GREY, 'alpha': 0.6, 'linewidth': 0}
  used = []
  for i, axes in enumerate(grid):
    part = layers[i * across : (i + 1) * across]
    names = [row['weights'] or row['activations'] for row in part]
    used += names
    percent = {
      what: [100 * row[what] for row in part]
      for what in ('share', 'reference_share', 'macs_share')
    }
    at = np.arange(len(part))
    colours = [tint.get(name, GREY) for name in names]
    axes.bar(at - 0.2, percent['share'], 0.4, color=colours)
    if reference:
      axes.bar(at + 0.2, percent['reference_share'], 0.4, **uniform)
    axes.hlines(percent['macs_share'], at, at + 0.4, color=_ACCENT, lw=1.3)
    ticks = [fit(row['path'], letters * 0.06, 6.5) for row in part]
    axes.set_xticks(at, ticks, rotation=90)
    axes.tick_params('x', length=0, labelsize=6.5)
    axes.tick_params('y', length=2)
    axes.set(xlim=(-0.6, across - 0.4), ylabel='share, %')
  handles = [patches.Patch(color=tint[n], label=n) for n in tint if n in used]
  if None in used:
    handles.append(patches.Patch(color=GREY, label='not quantized'))
  key(figure, handles, lift=0.3)
  others = [lines_lib.Line2D([], [], color=_ACCENT, label='share of MACs')]
  if reference:
    others.append(patches.Patch(label=f'share at {reference}', **uniform))
  key(figure, others, lift=0.08)
  return figure


def pareto(
  found: Mapping[str, Any],
  references: Mapping[str, Mapping[str, Any]],
  metric: str,
  tint: Mapping[str, str],
) -> figure_lib.Figure:
  """Draws the test metric against cost: the selected model and the references.

  Args:
    found: measurements of the selected model: the metric, `cost`, `cost_target`
      and `unit`; a number that is NaN is not drawn.
    references: {name: measurements of a reference}.
    metric: name of the metric, such as `accuracy`.
    tint: {format: colour}; a reference of another name is grey.
  """
  figure = figure_lib.Figure((5.8, 3.3))
  axes = figure.add_subplot()
  points = [
    (model['cost'], number_text.scale(metric) * model[metric], name)
    for name, model in {'found': found, **references}.items()
    if np.isfinite([model['cost'], model[metric]]).all()
  ]
  axes.set_xscale('log')
  axes.margins(0.14, 0.2)
  for cost, value, name in points:
    look = {'marker': 'o', 'ms': 8, 'color': tint.get(name, GREY)}
    if name == 'found':
      look = {'marker': '*', 'ms': 15, 'color': _ACCENT, 'zorder': 3}
    axes.plot(cost, value, **look)
  if np.isfinite(found['cost_target']):
    axes.axvline(found['cost_target'], color=GREY, lw=1, ls='--', zorder=0)
    axes.text(
      found['cost_target'],
      1,
      ' target',
      transform=axes.get_xaxis_transform(),
      fontsize=7,
      va='top',
    )
  seen: list[np.ndarray] = []
  for cost, value, name in points:
    spot = axes.transData.transform((cost, value))
    # Formats of equal bits have equal costs, so points may nearly coincide.
    # Their names are on different sides.
    close = sum(np.all(np.abs(spot - other) < (45, 18)) for other in seen)
    seen.append(spot)
    x, y = ((0, 1), (0, -1), (1, 0), (-1, 0))[close % 4]
    axes.annotate(
      name,
      (cost, value),
      xytext=(9 * x, 9 * y),
      textcoords='offset points',
      ha=('center', 'left', 'right')[x],
      va=('center', 'bottom', 'top')[y],
      fontweight='bold' if name == 'found' else 'normal',
    )
  axes.set(xlabel=f'cost, {found["unit"]}', ylabel=number_text.title(metric))
  axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
  axes.xaxis.set_major_formatter('{x:,.12g}')
  axes.xaxis.set_minor_formatter(ticker.NullFormatter())
  axes.tick_params(length=2, which='both')
  return figure
