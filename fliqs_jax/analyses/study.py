"""Studies: analyses that train. Settings times seeds, as a sweep."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import pathlib
import statistics
import types
from typing import Any

from fliqs_jax.analyses import finding as finding_lib
from fliqs_jax.analyses import study_figure
from fliqs_jax.report import number_text
from fliqs_jax.run import experiment as experiment_lib
from fliqs_jax.runtime import files
from fliqs_jax.runtime import workdir as workdir_lib
from fliqs_jax.sweep import checks as sweep_checks
from fliqs_jax.sweep import collect
from fliqs_jax.sweep import curves
from fliqs_jax.sweep import pareto
from fliqs_jax.sweep import perform as sweep_perform
from fliqs_jax.sweep import sweep_file

# A difference is certain if it is this number of standard errors from zero.
_ERRORS = 2.0


@dataclasses.dataclass(frozen=True)
class Study:
  """A named analysis that trains networks.

  Attributes:
    title: title of its page.
    text: paragraphs: what is compared, and what the paper found.
    runs: grids of settings, items of `runs` of a sweep file.
    varied: the argument or key that is varied.
    heading: what a reader calls it.
    base: the value with which all are compared; empty: uniform formats at equal
      cost, the runs that do not set `varied`. A study with `retrained` compares
      each network with itself, trained from the beginning.
    series: another argument or key that is varied; empty: none.
    arguments: arguments that `--config` may replace.
    paper: {network: {value: top-1 in percent}}, of the paper; differences in
      points if there is no `base`.
    quoted: pairs of points, (value, series), of which the difference is a
      verdict.
    retrained: whether each found network is also trained from the beginning.
  """

  title: str
  text: Sequence[str]
  runs: Sequence[Mapping[str, Mapping[str, Any]]]
  varied: str
  heading: str
  base: str = ''
  series: str = ''
  arguments: Mapping[str, str] = dataclasses.field(default_factory=dict)
  paper: Mapping[str, Mapping[str, float]] = dataclasses.field(
    default_factory=dict
  )
  quoted: Sequence[tuple[tuple[str, str], tuple[str, str]]] = ()
  retrained: bool = False

  @property
  def compared(self) -> str:
    """What all networks are compared with."""
    if self.retrained:
      return 'the same network trained from the beginning'
    return self.base or 'uniform formats at equal cost'

  def ahead(self, network: str) -> dict[str, float]:
    """Returns {value: difference in points} of a network of the paper."""
    top1 = self.paper[network]
    least = top1[self.base] if self.base else 0.0
    return {value: number - least for value, number in top1.items()}


# A point of a study: (value of `varied`, value of `series`), or for the uniform
# networks ('', format).
Point = tuple[str, str]


@dataclasses.dataclass(frozen=True)
class Measured:
  """The finished runs of a point: {seed: content of result.json}."""

  metric: str
  results: Mapping[str, Mapping[str, Any]]

  @property
  def runs(self) -> dict[str, tuple[float, float]]:
    """{seed: (cost, metric as a fraction)}."""
    return {
      seed: (r['found']['cost'], r['found'][self.metric])
      for seed, r in self.results.items()
    }

  @property
  def served(self) -> dict[str, tuple[float, float]]:
    """The same, as if all had one cost."""
    return {seed: (1.0, value) for seed, (_, value) in self.runs.items()}

  @property
  def from_the_beginning(self) -> dict[str, tuple[float, float]]:
    """{seed: (1, metric)} of the networks that were trained again."""
    return {
      seed: (1.0, result['retrained'][self.metric])
      for seed, result in self.results.items()
    }

  def of(self, key: str) -> list[Any]:
    """Returns a value of what was found, one for each seed."""
    return [result['found'][key] for result in self.results.values()]


def plan(
  study: Study, config: str, seeds: int, overrides: Mapping[str, str]
) -> sweep_file.Sweep:
  """Returns the runs of a study.

  Args:
    study: what is compared.
    config: a config file, and its arguments after a colon.
    seeds: number of seeds, 0, 1, ...
    overrides: {dotted key: text} of keys that are overridden in every run.

  Raises:
    ValueError: a run cannot work; the message says why.
  """
  if seeds < 1:
    raise ValueError(f'--seeds={seeds} must be at least 1')
  file, _, text = config.partition(':')
  own = dict(study.arguments)
  for item in filter(None, text.split(',')):
    name, equals, value = item.partition('=')
    own[name.strip()] = value if equals else 'true'
  grids = [set().union(*grid.values()) for grid in study.runs]
  taken = set.intersection(*grids) | {'seed'}
  for name in (*own, *overrides):
    if name in taken:
      raise ValueError(
        f'--config={config}: the analysis sets {name} in each run; leave it out'
      )
  content = dict(
    config=file,
    arguments=own | dict(seed=list(range(seeds))),
    overrides=dict(overrides),
    runs=[dict(grid) for grid in study.runs],
  )
  return sweep_file.declared('study', content, f'for --config={config}')


def perform(
  study: Study,
  sweep: sweep_file.Sweep,
  out: pathlib.Path,
  stop: Callable[[], bool],
) -> dict[str, str]:
  """Starts or continues the runs of a study; returns why runs failed, by name.

  Args:
    study: what is compared.
    sweep: its runs.
    out: directory of the runs' workdirs.
    stop: `() -> bool`, called after each step of training; True: save and stop.

  Raises:
    ValueError: a run cannot work, or `out` holds other runs of these names.
    PreemptedError: `stop` returned True; the state of the run is saved.
  """
  sweep_checks.workdirs(sweep, out)
  for run in sweep.runs:
    if run.swept['seed'] == '0':
      experiment_lib.build(sweep_file.load(run))
  out.mkdir(parents=True, exist_ok=True)
  with workdir_lib.held(out):
    return sweep_perform.perform(
      sweep, out, stop, retrained=lambda run: study.retrained
    )


def read(
  study: Study,
  sweep: sweep_file.Sweep,
  out: pathlib.Path,
  failed: Mapping[str, str] = types.MappingProxyType({}),
) -> dict[Point, Measured]:
  """Returns the finished runs of each point, in the order of the sweep.

  Args:
    study: what is compared.
    sweep: its runs.
    out: directory of the runs' workdirs.
    failed: {name of a run that failed a moment ago: why}.

  Raises:
    ValueError: no run is finished.
  """
  summary = collect.collect(sweep, out, failed=failed)
  points: dict[Point, dict[str, Any]] = {}
  for run in summary.runs:
    if run['state'] == 'finished':
      result = files.read_json(out / run['name'] / workdir_lib.RESULT)
      swept = run['swept']
      others = pareto.without_seed(swept)
      point = (
        (swept[study.varied], swept.get(study.series, ''))
        if study.varied in swept
        else ('', ', '.join(others.values()))
      )
      points.setdefault(point, {})[swept['seed']] = result
  return {p: Measured(summary.metric, r) for p, r in points.items()}


def finding(
  study: Study, points: Mapping[Point, Measured]
) -> finding_lib.Finding:
  """Returns the table of a study, the paper's numbers beside ours.

  Args:
    study: what is compared.
    points: the finished runs of each point.
  """
  first = next(iter(points.values()))
  metric, unit = first.metric, first.of('unit')[0]
  rows = [_row(study, points, point) for point in points]
  scale = number_text.scale(metric)
  places = number_text.decimals(max(row['cost'] for row in rows))
  over = f'minus {study.base}' if study.base else 'over uniform'
  if study.retrained:
    over = 'minus retrained'
  columns = [
    finding_lib.Column('value', study.heading),
    *(
      [finding_lib.Column('series', study.series.rpartition('.')[2])]
      if study.series
      else []
    ),
    finding_lib.Column('runs', 'runs', 'd'),
    finding_lib.Column(
      'quality', number_text.title(metric), '.2f', 'quality_spread', scale
    ),
    finding_lib.Column('loss', 'loss', '.3f', 'loss_spread'),
    finding_lib.Column('cost', f'cost, {unit}', f',.{places}f', 'cost_spread'),
    finding_lib.Column(
      'ahead',
      f'{over}, {number_text.points(metric)}',
      '+.2f',
      'ahead_error',
      scale,
    ),
    *(
      finding_lib.Column(network, f'{network}, paper', '.2f')
      for network in study.paper
    ),
  ]
  return finding_lib.Finding(
    title=study.title,
    text=study.text,
    columns=columns,
    rows=rows,
    verdicts=[
      *(_verdict(study, points, pair) for pair in study.quoted),
      *(_settled(row, scale) for row in rows if study.retrained),
    ],
    draw=functools.partial(study_figure.draw, study, rows, metric),
    caption=f'Difference from {study.compared} over the {study.heading}: ours '
    'with the standard error over seeds'
    + (', and the paper’s on ImageNet.' if study.paper else '.'),
  )


def _row(
  study: Study, points: Mapping[Point, Measured], point: Point
) -> dict[str, Any]:
  measured = points[point]
  value, series = point
  qualities, losses = measured.of(measured.metric), measured.of('loss')
  costs = measured.of('cost')
  row = dict(
    value=value or series,
    series=series if value else 'uniform',
    runs=len(qualities),
    quality=statistics.fmean(qualities),
    quality_spread=_spread(qualities),
    loss=statistics.fmean(losses),
    loss_spread=_spread(losses),
    cost=statistics.fmean(costs),
    cost_spread=_spread(costs),
  )
  base = {
    other: points[other].runs for other in points if other[0] == study.base
  }
  apart = None
  if study.retrained:
    apart = curves.difference(
      {0: measured.served}, {0: measured.from_the_beginning}
    )
  elif value:
    apart = curves.difference({point: measured.runs}, base)
  if apart:
    row |= dict(ahead=apart.value, ahead_error=apart.error)
  papers = {
    network: top1[value]
    for network, top1 in study.paper.items()
    if value in top1
  }
  return row | papers


def _spread(values: Sequence[float]) -> float | None:
  return statistics.stdev(values) if len(values) > 1 else None


def _settled(row: Mapping[str, Any], scale: float) -> str:
  """Returns whether a network gains by being trained again."""
  text = f'{row["value"]}: served minus retrained {scale * row["ahead"]:+.2f}'
  if row['ahead_error'] is None:
    return f'{text}, of one seed'
  is_small = abs(row['ahead']) < _ERRORS * row['ahead_error']
  return (
    f'{text} ± {scale * row["ahead_error"]:.2f}, '
    f'{"less" if is_small else "NOT less"} than two standard errors'
  )


def _verdict(
  study: Study,
  points: Mapping[Point, Measured],
  pair: tuple[Point, Point],
) -> str:
  """Returns a sentence with the difference of two points."""
  one, other = pair
  name = ' minus '.join(' '.join(filter(None, point)) for point in pair)
  if one not in points or other not in points:
    return f'{name}: not measured'
  apart = _at_equal_cost(study, points, pair)
  metric = points[one].metric
  unit, scale = number_text.points(metric), number_text.scale(metric)
  if apart is None:
    return f'{name}: no common cost'
  text = f'{name}: {scale * apart.value:+.2f}'
  if apart.error is not None:
    text += f' ± {scale * apart.error:.2f}'
  papers = [
    f'{ahead[one[0]] - ahead[other[0]]:+.2f} {network}'
    for network in study.paper
    if one[0] in (ahead := study.ahead(network))
  ]
  also = f'; the paper: {", ".join(papers)}' if papers else ''
  return f'{text} {unit}{also}'


def _at_equal_cost(
  study: Study, points: Mapping[Point, Measured], pair: tuple[Point, Point]
) -> curves.Difference | None:
  """Returns the difference of two points, each less uniform formats there."""
  if study.base:
    one, other = ({0: points[point].runs} for point in pair)
    return curves.difference(one, other)
  uniform = {p: points[p].runs for p in points if not p[0]}
  ahead = []
  for point in pair:
    over = {}
    for seed, (cost, value) in points[point].runs.items():
      line = curves.curve([r[seed] for r in uniform.values() if seed in r])
      if line and (there := curves.at(line, cost)) is not None:
        over[seed] = (1.0, value - there)
    ahead.append({0: over} if over else {})
  return curves.difference(*ahead)
