"""Figure of a sweep: quality against cost, with the points of the front."""

from collections.abc import Mapping, Sequence
import itertools

from matplotlib import figure as figure_lib
from matplotlib import lines as lines_lib
from matplotlib import ticker
import numpy as np

from fliqs_jax.report import figures
from fliqs_jax.report import number_text
from fliqs_jax.sweep import pareto
from fliqs_jax.sweep import sweep_file

# A colour-blind reader can distinguish the first five; shapes differ, too.
_COLOURS = (
  *('#4c8dc4', '#dc5c4c', '#2e9c80', '#c98a1b', '#8a63b8'),
  *('#c8558f', '#7d8f2f', '#3fa7b8', '#9a6b4c', '#5d6b7e'),
)
_SHAPES = 'osD^vPX'
_PLAIN = (
  sweep_file.SWEEP,
  'space',
  'method',
  'format',
)  # Settings whose values say enough.
_LEGEND = 12  # More entries would leave too little space for the axes.


def draw(
  points: Sequence[pareto.Point], metric: str, unit: str
) -> figure_lib.Figure:
  """Draws the means with their standard deviations over seeds.

  Points that differ only in the cost target, the size of the network or the one
  format of it are one curve, with an entry in the legend; a single point has
  its name beside it, and one of a uniform network, too. Points of the front are
  filled.

  Args:
    points: points of a sweep, at least one.
    metric: name of the metric, such as `accuracy`.
    unit: unit of the cost.
  """
  figure = figure_lib.Figure((7.2, 4.2))
  axes = figure.add_subplot()
  axes.set_xscale('log')
  axes.margins(0.1, 0.12)
  scale = number_text.scale(metric)
  _front(axes, points, scale)
  curves: dict[tuple, list[pareto.Point]] = {}
  for point in points:
    curves.setdefault(tuple(point.series.items()), []).append(point)
  # The points of methods are too close to each other for names beside them.
  named = [
    series
    for series, curve in curves.items()
    if len(curve) > 1 or 'method' in dict(series)
  ]
  looks, handles = _looks(named)
  alone = []
  for series, curve in curves.items():
    _curve(axes, curve, scale, *looks.get(series, (figures.GREY, 'o')))
    if series not in looks or dict(series).get('space') != curve[
      0
    ].settings.get('space'):
      alone += curve
  _name(axes, alone, scale)
  handles.append(
    lines_lib.Line2D([], [], color=figures.GREY, ls=':', label='not dominated')
  )
  axes.legend(
    handles=handles,
    loc='center left',
    bbox_to_anchor=(1.01, 0.5),
    frameon=False,
    labelspacing=0.8,
  )
  axes.set(xlabel=f'cost, {unit}', ylabel=number_text.title(metric))
  axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
  axes.xaxis.set_major_formatter('{x:,.12g}')
  axes.xaxis.set_minor_formatter(ticker.NullFormatter())
  axes.tick_params(length=2, which='both')
  return figure


def _looks(
  named: Sequence[tuple],
) -> tuple[dict[tuple, tuple[str, str]], list[lines_lib.Line2D]]:
  """Returns {series: (colour, shape)} and the entries of the legend.

  Of several sweeps, such as one for each network, the colour says what differs
  within them, and the shape which sweep it is, as in the paper's Figure 11.
  """
  entry = lines_lib.Line2D
  sweeps = list(dict.fromkeys(dict(s).get(sweep_file.SWEEP) for s in named))
  if len(sweeps) < 2:
    looks = dict(
      zip(
        named[:_LEGEND],
        zip(itertools.cycle(_COLOURS), itertools.cycle(_SHAPES)),
      )
    )
    return looks, [
      entry([], [], color=colour, marker=shape, label=label(dict(series)))
      for series, (colour, shape) in looks.items()
    ]
  shapes = dict(zip(sweeps, itertools.cycle(_SHAPES)))
  kinds = {
    s: label({k: v for k, v in s if k != sweep_file.SWEEP}) for s in named
  }
  colours = dict(zip(dict.fromkeys(kinds.values()), itertools.cycle(_COLOURS)))
  handles = [entry([], [], color=c, label=kind) for kind, c in colours.items()]
  handles += [
    entry([], [], color=figures.GREY, marker=shape, ls='', label=sweep)
    for sweep, shape in shapes.items()
  ]
  return {
    s: (colours[kinds[s]], shapes[dict(s)[sweep_file.SWEEP]]) for s in named
  }, handles


def label(settings: Mapping[str, str]) -> str:
  """Returns settings as a short text: `int_l` for a single `space=int_l`."""
  return (
    ', '.join(
      value if key in _PLAIN else f'{key}={value}'
      for key, value in settings.items()
    )
    or 'searched'
  )


def _front(axes, points: Sequence[pareto.Point], scale: float) -> None:
  """Draws the best quality at or below each cost, as a staircase."""
  best = sorted((p for p in points if p.front), key=lambda p: p.cost)
  axes.step(
    [p.cost for p in best],
    [scale * p.value for p in best],
    where='post',
    color=figures.GREY,
    linestyle=':',
    linewidth=1.2,
    zorder=0,
  )


def _curve(
  axes, curve: Sequence[pareto.Point], scale: float, colour: str, shape: str
) -> None:
  axes.plot(
    [p.cost for p in curve],
    [scale * p.value for p in curve],
    color=colour,
    linewidth=1,
    alpha=0.7,
  )
  ground = axes.get_facecolor()
  for point in curve:
    spread = point.cost_spread or 0
    # On a logarithmic axis a bar cannot reach zero.
    bar = [[min(spread, 0.9 * point.cost)], [spread]]
    axes.errorbar(
      point.cost,
      scale * point.value,
      xerr=bar if spread else None,
      yerr=scale * (point.value_spread or 0) or None,
      color=colour,
      marker=shape,
      markersize=6.5,
      markerfacecolor=colour if point.front else ground,
      elinewidth=0.9,
      capsize=2,
      zorder=3,
    )


def _name(axes, points: Sequence[pareto.Point], scale: float) -> None:
  """Writes names beside points, on different sides if points are close."""
  seen: list[np.ndarray] = []
  for point in points:
    place = point.cost, scale * point.value
    spot = axes.transData.transform(place)
    close = sum(np.all(np.abs(spot - other) < (60, 18)) for other in seen)
    seen.append(spot)
    x, y = ((1, 1), (1, -1), (-1, 1), (-1, -1))[close % 4]
    axes.annotate(
      label(point.settings),
      place,
      xytext=(5 * x, 6 * y),
      textcoords='offset points',
      ha=('right', '', 'left')[x + 1],
      va=('top', '', 'bottom')[y + 1],
      fontsize=7.5,
    )
