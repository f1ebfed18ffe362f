"""Figure of a comparison: quality over cost, one curve per method."""

from collections.abc import Sequence

from matplotlib import figure as figure_lib
from matplotlib import ticker

from fliqs_jax.comparison import methods as methods_lib
from fliqs_jax.report import number_text
from fliqs_jax.sweep import figure as sweep_figure
from fliqs_jax.sweep import pareto

# The picture holds the costs of the methods, and a margin of this factor. Most
# uniform networks are far away; the line to them is cut.
_MARGIN = 1.25


def draw(
  points: Sequence[pareto.Point], metric: str, unit: str
) -> figure_lib.Figure:
  """Draws the means with their standard deviations over seeds.

  Args:
    points: points of the methods, at least one; those of uniform networks make
      a line.
    metric: name of the metric, such as `accuracy`.
    unit: unit of the cost.
  """
  figure = sweep_figure.draw(points, metric, unit)
  near = [p for p in points if p.settings['method'] != methods_lib.UNIFORM]
  if near:
    costs = [p.cost for p in near]
    low, high = min(costs) / _MARGIN, max(costs) * _MARGIN
    shown = [p for p in points if low <= p.cost <= high]
    ends = [
      number_text.scale(metric) * (p.value + sign * (p.value_spread or 0))
      for p in shown
      for sign in (-1, 1)
    ]
    margin = 0.1 * (max(ends) - min(ends)) or 1.0
    figure.axes[0].set(
      xlim=(low, high), ylim=(min(ends) - margin, max(ends) + margin)
    )
    if high < 10 * low:  # A decade has too few ticks of its own.
      figure.axes[0].xaxis.set_major_locator(ticker.MaxNLocator(6))
      figure.axes[0].xaxis.set_minor_locator(ticker.NullLocator())
  return figure
