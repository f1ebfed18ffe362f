"""Figure of a sensitivity table: a row per decision, a column per option."""

from collections.abc import Mapping, Sequence
import math
from typing import Any

from matplotlib import cm
from matplotlib import colors
from matplotlib import figure as figure_lib
import numpy as np

from fliqs_jax.numerics import formats
from fliqs_jax.report import figures

# One hue, from pale to dark, which is no format's and no size's colour.
_SHADES = colors.LinearSegmentedColormap.from_list(
  'scores', ('#e6eef6', '#9dbfdd', '#4c8dc4', '#1d4f7c', '#0c2238')
)
_MOST_ROWS = 40  # Of one pane.
_ROW, _CELL, _GAP = 0.19, 0.56, 0.25  # Inches.
_BAR = (0.12, 2.4)  # Width and largest height of the scale, inches.
# Scores below this share of the largest one have the palest shade.
_LEAST = 1e-6

Decisions = Mapping[str, Mapping[str, Any]]


def columns(decisions: Decisions) -> list[str]:
  """Returns the formats of all decisions, from few bits to many.

  Args:
    decisions: {name: mapping with `options`}, decisions about formats.
  """

  def precision(name: str) -> tuple[int, int]:
    numeric_format = formats.parse(name)
    return numeric_format.bits, numeric_format.mantissa_bits

  names = {option for d in decisions.values() for option in d['options']}
  return sorted(names, key=precision)


def sensitivity(decisions: Decisions, metric: str) -> figure_lib.Figure:
  """Draws the scores as shades on a logarithmic scale, and their values.

  The columns are formats, or the options of channels and kernels from the
  smallest to the largest, which the cells name. A dot is the option from which
  the others are measured. A score of zero or less has no shade.

  Args:
    decisions: {name: mapping with `kind`, `options`, `anchor` and `scores`},
      the decisions of a sensitivity.json.
    metric: name of the metric.
  """
  panes = _panes(decisions)
  letters = min(34, max(map(len, decisions)))
  names = letters * 0.058 + 0.1
  counts = [_count(part) for part in panes]
  rows = max(map(len, panes))
  width = sum(names + _CELL * n for n in counts) + _GAP * len(panes) + 0.6
  height = _ROW * rows
  figure = figure_lib.Figure((width, height))
  norm = _norm(decisions)
  left = 0.0
  for part, count in zip(panes, counts):
    left += names
    share = len(part) / rows
    axes = figure.add_axes(
      (left / width, 1 - share, _CELL * count / width, share)
    )
    _draw(axes, part, count, norm)
    axes.set_yticks(
      range(len(part)), [figures.fit(name, names, 6.5) for name in part]
    )
    left += _CELL * count + _GAP
  tall = min(1, _BAR[1] / height)
  bar = figure.add_axes((left / width, 1 - tall, _BAR[0] / width, tall))
  figure.colorbar(cm.ScalarMappable(norm, _SHADES), cax=bar, format='{x:.0e}')
  bar.tick_params(length=2)
  bar.tick_params('y', which='minor', length=0, labelright=False)
  bar.set_title(metric, fontsize=7.5, loc='left', pad=6)
  return figure


def _panes(decisions: Decisions) -> list[dict[str, Mapping[str, Any]]]:
  """Returns parts of one kind each, with no more rows than fit on a screen."""
  parts = []
  for kind in dict.fromkeys(d['kind'] for d in decisions.values()):
    names = [name for name, d in decisions.items() if d['kind'] == kind]
    rows = math.ceil(len(names) / math.ceil(len(names) / _MOST_ROWS))
    parts += [
      {name: decisions[name] for name in names[i : i + rows]}
      for i in range(0, len(names), rows)
    ]
  return parts


def _count(part: Decisions) -> int:
  if _has_formats(part):
    return len(columns(part))
  return max(len(d['options']) for d in part.values())


def _has_formats(part: Decisions) -> bool:
  return next(iter(part.values()))['kind'] == 'format'


def _norm(decisions: Decisions) -> colors.LogNorm:
  scores = [s for d in decisions.values() for s in d['scores'] if s > 0]
  most = max(scores, default=1.0)
  least = max(min(scores, default=0.1), _LEAST * most)
  return colors.LogNorm(least if least < most else most / 10, most)


def _draw(axes: Any, part: Decisions, count: int, norm: colors.LogNorm) -> None:
  """Draws the decisions of one kind."""
  is_format = _has_formats(part)
  heads: Sequence[Any] = columns(part) if is_format else range(1, count + 1)
  shades = np.full((len(part), count), np.nan)
  for y, decision in enumerate(part.values()):
    options = decision['options']
    ordered = heads if is_format else sorted(options)
    for option, score in zip(options, decision['scores'], strict=True):
      x = ordered.index(option)
      if score > 0:
        shades[y, x] = score
      shade = colors.to_hex(_SHADES(norm(score))) if score > 0 else None
      value = '•' if option == decision['anchor'] else f'{score:.1e}'
      axes.text(
        x,
        y,
        value if is_format else f'{option}: {value}',
        fontsize=5.5,
        ha='center',
        va='center_baseline',
        **({'color': figures.ink_on(shade)} if shade else {}),
      )
  axes.imshow(np.ma.masked_invalid(shades), _SHADES, norm, aspect='auto')
  axes.set_xticks(range(count), heads if is_format else [])
  axes.tick_params(length=0, top=False, labeltop=True, labelbottom=False)
  axes.tick_params('y', labelsize=6.5)
  axes.spines[:].set_visible(False)
  # Lines between the cells: equal neighbours stay apart.
  paper = axes.get_facecolor()
  axes.hlines(np.arange(len(part) - 1) + 0.5, -0.5, count - 0.5, paper, lw=0.6)
  axes.vlines(np.arange(count - 1) + 0.5, -0.5, len(part) - 0.5, paper, lw=0.6)
