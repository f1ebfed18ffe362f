"""Points of a sweep: means over seeds, and the front of cost and quality."""

from collections.abc import Mapping, Sequence
import dataclasses
import statistics

from fliqs_jax.numerics import formats

# The names of a run's seed, and of what moves it along a curve: its cost
# target, as argument and as key, the one format of a uniform network, or the
# size of the network.
_SEEDS = ('seed',)
_TARGETS = ('target', 'cost.target', 'format')
_SIZES = ('width', 'variant')


@dataclasses.dataclass(frozen=True)
class Point:
  """The runs of a sweep that differ only in the seed.

  Attributes:
    settings: {argument or dotted key: text} that the runs share.
    planned: number of planned runs.
    values: the metric of each finished run, a fraction of 1.
    costs: the cost of each finished run.
    front: whether no other point is at least as good in both means and better
      in one.
  """

  settings: Mapping[str, str]
  planned: int
  values: Sequence[float]
  costs: Sequence[float]
  front: bool = False

  @property
  def value(self) -> float:
    """The mean of the metric."""
    return statistics.fmean(self.values)

  @property
  def cost(self) -> float:
    """The mean of the cost."""
    return statistics.fmean(self.costs)

  @property
  def value_spread(self) -> float | None:
    """The standard deviation of the metric over seeds; None for one run."""
    return _spread(self.values)

  @property
  def cost_spread(self) -> float | None:
    """The standard deviation of the cost over seeds; None for one run."""
    return _spread(self.costs)

  @property
  def series(self) -> dict[str, str]:
    """The settings that all points of a curve share."""
    return series(self.settings)


def series(settings: Mapping[str, str]) -> dict[str, str]:
  """Returns the settings that all points of a curve share.

  Without several sizes of the network, those of one format are a curve, too:
  one of integers and one of floats.

  Args:
    settings: settings of a point.
  """
  moving = (*_TARGETS, *_SIZES)
  kept = {k: v for k, v in settings.items() if k not in moving}
  if 'space' in kept and not any(key in settings for key in _SIZES):
    kept['space'] = _kind(kept['space'])
  return kept


def _kind(space: str) -> str:
  """Returns `uniform integers` or `uniform floats` for one format."""
  try:
    fmt = formats.parse(space)
  except ValueError:
    return space
  if not fmt.scaled:
    return space
  return f'uniform {"integers" if fmt.is_integer else "floats"}'


def without_seed(settings: Mapping[str, str]) -> dict[str, str]:
  """Returns settings without the seed, which make one point."""
  return {k: v for k, v in settings.items() if k not in _SEEDS}


def _spread(values: Sequence[float]) -> float | None:
  return statistics.stdev(values) if len(values) > 1 else None


def points(
  runs: Sequence[tuple[Mapping[str, str], tuple[float, float] | None]],
) -> list[Point]:
  """Returns the points of a sweep with at least one finished run, by cost.

  Args:
    runs: for each planned run its settings, with the seed, and its (metric,
      cost), or None if the run is not finished.
  """
  groups: dict[tuple, list] = {}
  for settings, measured in runs:
    key = tuple(without_seed(settings).items())
    groups.setdefault(key, []).append(measured)
  found = []
  for key, group in groups.items():
    finished = [measured for measured in group if measured is not None]
    if finished:
      values, costs = zip(*finished)
      found.append(Point(dict(key), len(group), values, costs))
  found = [
    dataclasses.replace(p, front=not any(_beats(q, p) for q in found))
    for p in found
  ]
  return sorted(found, key=lambda p: (p.cost, -p.value))


def _beats(a: Point, b: Point) -> bool:
  at_least = a.cost <= b.cost and a.value >= b.value
  return at_least and (a.cost < b.cost or a.value > b.value)
