"""Curves of quality over cost, and one number for a pair of them.

Between its points a curve is linear in the logarithm of the cost. Beyond its
ends it is not known.
"""

from collections.abc import Mapping, Sequence
import math
import statistics
from typing import Any, NamedTuple

import numpy as np

# Points of equal costs would give a step; costs are sums of float32.
_SAME_COST = 1e-6

# {point: {seed: (cost, quality)}}; a point is a target or a format.
Runs = Mapping[Any, Mapping[Any, tuple[float, float]]]
Curve = Sequence[tuple[float, float]]  # (cost, quality), by cost


class Difference(NamedTuple):
  """The mean difference of two curves.

  Attributes:
    value: the difference, in the unit of the quality.
    error: its standard error over seeds; None for less than two seeds.
    low: the lower end of its 95 % interval; None for less than two seeds.
    high: the upper end.
  """

  value: float
  error: float | None = None
  low: float | None = None
  high: float | None = None

  def reversed(self) -> 'Difference':
    """Returns the difference of the second curve from the first one."""
    if self.low is None or self.high is None:
      return self._replace(value=-self.value)
    return Difference(-self.value, self.error, -self.high, -self.low)


def curve(points: Sequence[tuple[float, float]]) -> Curve:
  """Returns points by cost; of points of equal cost the best one.

  Args:
    points: (cost, quality) of each point; costs are positive.
  """
  result: list[tuple[float, float]] = []
  for cost, quality in sorted(points):
    if result and cost <= result[-1][0] * (1 + _SAME_COST):
      result[-1] = (result[-1][0], max(result[-1][1], quality))
    else:
      result.append((cost, quality))
  return result


def at(line: Curve, cost: float) -> float | None:
  """Returns the quality of a curve at a cost, linear in the log of the cost.

  Args:
    line: the curve.
    cost: the cost, in the unit of the curve.

  Returns:
    The quality; None if the cost is beyond the ends of the curve.
  """
  low, high = line[0][0] * (1 - _SAME_COST), line[-1][0] * (1 + _SAME_COST)
  if not low <= cost <= high:
    return None
  costs, qualities = zip(*line)
  return float(np.interp(math.log(cost), np.log(costs), qualities))


def mean_difference(a: Curve, b: Curve) -> float | None:
  """Returns the mean of a - b at equal cost, over the common range.

  The mean is over the logarithm of the cost. If one curve has a single point,
  it is the difference there.

  Args:
    a: a curve.
    b: another one, in the same units.

  Returns:
    The difference; None if no cost is within both curves.
  """
  for one, other, sign in ((a, b, 1.0), (b, a, -1.0)):
    if len(one) == 1:
      there = at(other, one[0][0])
      return None if there is None else sign * (one[0][1] - there) + 0.0
  low, high = max(a[0][0], b[0][0]), min(a[-1][0], b[-1][0])
  if low >= high:
    return None
  # Both are linear between these costs, so that trapezoids are exact.
  costs = sorted({low, high, *(c for c, _ in (*a, *b) if low < c < high)})
  logs = np.log(costs)
  apart = [
    np.interp(logs, np.log([c for c, _ in line]), [q for _, q in line])
    for line in (a, b)
  ]
  return float(np.trapezoid(apart[0] - apart[1], logs) / (logs[-1] - logs[0]))


def difference(a: Runs, b: Runs, samples: int = 1000) -> Difference | None:
  """Returns the mean difference of two curves of means over seeds.

  Its spread is that of a bootstrap over the seeds that all points of both have:
  a sample of seeds makes both curves, so that what a seed does to both cancels.

  Args:
    a: runs of a curve.
    b: runs of another one, in the same units.
    samples: number of samples of the bootstrap.

  Returns:
    The difference; None if no cost is within both curves, or a curve has no
    runs.
  """
  if not a or not b:
    return None
  value = mean_difference(_means(a), _means(b))
  if value is None:
    return None
  seeds = sorted(
    set.intersection(*(set(runs) for runs in (*a.values(), *b.values()))),
    key=str,
  )
  if len(seeds) < 2:
    return Difference(value)
  rng = np.random.default_rng(0)
  seen = []
  for _ in range(samples):
    drawn = [seeds[i] for i in rng.integers(len(seeds), size=len(seeds))]
    apart = mean_difference(_means(a, drawn), _means(b, drawn))
    if apart is not None:
      seen.append(apart)
  if len(seen) < 2:
    return Difference(value)
  # Means of drawn seeds vary less than means of new ones, by (n - 1) / n.
  wider = math.sqrt(len(seeds) / (len(seeds) - 1))
  seen = [value + wider * (apart - value) for apart in seen]
  low, high = np.quantile(seen, (0.025, 0.975))
  return Difference(value, statistics.stdev(seen), float(low), float(high))


def _means(runs: Runs, seeds: Sequence[Any] | None = None) -> Curve:
  """Returns the curve of means, over given seeds or over all of each point."""
  points = []
  for of_seed in runs.values():
    costs, qualities = zip(
      *(of_seed[seed] for seed in (of_seed if seeds is None else seeds))
    )
    points.append((statistics.fmean(costs), statistics.fmean(qualities)))
  return curve(points)
