"""Rows of a comparison: the finished runs of one method at one target."""

from collections.abc import Mapping, Sequence
import dataclasses
import pathlib
import statistics
from typing import Any

from fliqs_jax.comparison import methods as methods_lib
from fliqs_jax.comparison import passes
from fliqs_jax.comparison import plan as plan_lib
from fliqs_jax.run.configs import config as config_lib
from fliqs_jax.runtime import files
from fliqs_jax.runtime import workdir as workdir_lib
from fliqs_jax.space import allocation
from fliqs_jax.sweep import collect
from fliqs_jax.sweep import curves


@dataclasses.dataclass(frozen=True)
class Mean:
  """The mean of a number over seeds.

  Attributes:
    value: the mean.
    spread: the standard deviation; None for one run.
  """

  value: float
  spread: float | None

  def text(self, form: str, scale: float = 1.0) -> str:
    """Returns the mean, and the spread after a plus-minus sign."""
    text = f'{scale * self.value:{form}}'
    if self.spread is None:
      return text
    return f'{text} ± {scale * self.spread:{form.lstrip("+")}}'


def mean(values: Sequence[float]) -> Mean:
  """Returns the mean of at least one number over seeds."""
  spread = statistics.stdev(values) if len(values) > 1 else None
  return Mean(statistics.fmean(values), spread)


@dataclasses.dataclass(frozen=True)
class Row:
  """The runs of one method at one target.

  Attributes:
    method: name of the method.
    point: the target, or the format of a uniform network; empty for neither.
    finished: number of finished runs.
    planned: number of planned runs.
    cost: cost, in the unit of the comparison.
    relative: cost / target of the plan; None if the method has no target.
    within: share of the runs that cost at most the target; None as above.
    quality: test metric of the served network, a fraction of 1.
    loss: test loss of the served network.
    ahead: quality minus that of uniform formats at equal cost; None if no
      uniform networks are on both sides of the cost.
    scratch: test metric of the same networks trained from the beginning; None
      if they were not.
    gap: quality minus `scratch`, seed by seed.
    loss_gap: the same of the loss.
    seconds: wall time of the steps in seconds (`loop.Effort`); None if a run of
      an earlier version did not measure it.
    forward: forward passes, in training batches.
    backward: backward passes, in training batches.
    memory: bytes that a step of training needs beside its arguments, by the
      compiler's accounting; the largest of all seeds, None if unknown.
  """

  method: str
  point: str
  finished: int
  planned: int
  cost: Mean
  relative: Mean | None
  within: float | None
  quality: Mean
  loss: Mean
  ahead: curves.Difference | None
  scratch: Mean | None
  gap: Mean | None
  loss_gap: Mean | None
  seconds: Mean | None
  forward: float
  backward: float
  memory: int | None

  @property
  def label(self) -> str:
    """The method and its target."""
    return f'{self.method} at {self.point}' if self.point else self.method


def of_plan(plan: plan_lib.Plan, sweep: collect.Summary) -> list[Row]:
  """Returns a row per method and target, in the order of the plan.

  Args:
    plan: what is compared.
    sweep: the runs and their points, as of a sweep.
  """
  uniform = sweep.lines.get(methods_lib.UNIFORM, {})
  return [
    _row(
      plan,
      key,
      runs,
      curves.difference(
        {key: {m.seed: (m.found['cost'], m.value) for m in runs}}, uniform
      ),
    )
    for key, runs in _measured(plan, sweep).items()
  ]


@dataclasses.dataclass(frozen=True)
class _Run:
  """A finished run: its seed, result.json, metric, time and passes."""

  seed: str
  result: Mapping[str, Any]
  value: float
  seconds: float | None
  passes: passes.Passes

  @property
  def found(self) -> Mapping[str, Any]:
    return self.result['found']


def _measured(
  plan: plan_lib.Plan, sweep: collect.Summary
) -> dict[tuple[str, str], list[_Run]]:
  """Returns {(method, point): finished runs}, in the order of the plan."""
  order = {
    (run['swept']['method'], _point(run['swept'])): []
    for run in sorted(
      sweep.runs, key=lambda r: plan.methods.index(r['swept']['method'])
    )
  }
  for run in sweep.runs:
    if run['state'] == 'finished':
      key = run['swept']['method'], _point(run['swept'])
      order[key].append(_read(plan, run))
  return {key: runs for key, runs in order.items() if runs}


def _point(swept: Mapping[str, str]) -> str:
  return swept.get('target', swept.get('format', ''))


def _read(plan: plan_lib.Plan, run: Mapping[str, Any]) -> _Run:
  swept = run['swept']
  result, seconds, counted = _compute(plan.out / run['name'])
  row = methods_lib.ASSIGNED.get(swept['method'])
  if row and row.has_scores:
    # As if the scores were for this run alone.
    base = plan.workdir(plan.dearest(int(swept['seed'])))
    if (base / workdir_lib.RESULT).exists():
      _, more, before = _compute(base)
      seconds = seconds + more if seconds and more else None
      counted = passes.Passes(
        counted.forward + before.forward, counted.backward + before.backward
      )
  return _Run(swept['seed'], result, run['value'], seconds, counted)


def _compute(
  workdir: pathlib.Path,
) -> tuple[dict[str, Any], float | None, passes.Passes]:
  """Returns result.json, the seconds of the steps, and the passes of a run."""
  config = config_lib.read(workdir / workdir_lib.CONFIG)
  result = files.read_json(workdir / workdir_lib.RESULT)
  # Results of earlier versions lack the key.
  seconds = result.get('step_seconds') or None
  return result, seconds, passes.of_run(config, result)


def _row(
  plan: plan_lib.Plan,
  key: tuple[str, str],
  runs: Sequence[_Run],
  ahead: curves.Difference | None,
) -> Row:
  method, point = key
  relative = []
  if point in plan.targets:
    target = plan.experiment(point).target
    relative = [run.found['cost'] / target for run in runs]
  metric = runs[0].result['metric']
  times = [run.seconds for run in runs if run.seconds is not None]

  def found(name: str) -> Mean:
    return mean([run.found[name] for run in runs])

  return Row(
    method=method,
    point=point,
    finished=len(runs),
    planned=plan.seeds,
    cost=found('cost'),
    relative=mean(relative) if relative else None,
    within=statistics.fmean(r <= 1 + allocation.TOLERANCE for r in relative)
    if relative
    else None,
    quality=found(metric),
    loss=found('loss'),
    ahead=ahead,
    **_from_scratch(runs, metric),
    seconds=mean(times) if len(times) == len(runs) else None,
    forward=statistics.fmean(run.passes.forward for run in runs),
    backward=statistics.fmean(run.passes.backward for run in runs),
    memory=max(
      (m for run in runs if (m := run.result.get('step_bytes'))), default=None
    ),
  )


def _from_scratch(runs: Sequence[_Run], metric: str) -> dict[str, Mean | None]:
  """Returns the fields of a row that need networks trained again."""
  pairs = [
    (run.found, scratch)
    for run in runs
    if (scratch := run.result.get('retrained'))
  ]
  if not pairs:
    return dict(scratch=None, gap=None, loss_gap=None)
  return dict(
    scratch=mean([scratch[metric] for _, scratch in pairs]),
    gap=mean([found[metric] - scratch[metric] for found, scratch in pairs]),
    loss_gap=mean(
      [found['loss'] - scratch['loss'] for found, scratch in pairs]
    ),
  )
