"""Performs a comparison: one run after another, each that is not finished.

A comparison that was stopped is continued by the same command. A run that
fails, because training diverges or a score is not finite, does not stop the
others.
"""

from collections.abc import Callable
import logging

from fliqs_jax.comparison import methods as methods_lib
from fliqs_jax.comparison import plan as plan_lib
from fliqs_jax.run import evaluation
from fliqs_jax.run import results
from fliqs_jax.run import sensitivity_table
from fliqs_jax.run import train
from fliqs_jax.run.records import run_log
from fliqs_jax.runtime import files
from fliqs_jax.runtime import workdir as workdir_lib
from fliqs_jax.search import presets
from fliqs_jax.search import sensitivity
from fliqs_jax.sweep import collect
from fliqs_jax.sweep import sweep_file

_LOG = logging.getLogger(__name__)


def perform(
  plan: plan_lib.Plan, retrain: bool, stop: Callable[[], bool]
) -> list[str]:
  """Starts or continues each run that is not finished.

  Args:
    plan: what is compared, checked.
    retrain: whether each searched network is also trained from the beginning.
    stop: `() -> bool`, called after each step of training; True: save and stop.

  Returns:
    The names of the runs that failed.

  Raises:
    PreemptedError: `stop` returned True; the state of the run is saved.
    ValueError: another comparison is performed in the same directory.
  """
  plan.out.mkdir(parents=True, exist_ok=True)
  with workdir_lib.held(plan.out):
    return _performed(plan, retrain, stop)


def _performed(
  plan: plan_lib.Plan, retrain: bool, stop: Callable[[], bool]
) -> list[str]:
  """Starts or continues each run; returns the names of those that failed."""
  files.write_json(plan.out / workdir_lib.COMPARISON_PLAN, plan.claim)
  failed = []
  for i, planned in enumerate(plan.runs, 1):
    name = planned.run.name
    searched = planned.method in presets.PRESETS
    if _is_finished(plan, planned.run, retrain and searched):
      continue
    _LOG.info('[%d/%d] %s', i, len(plan.runs), name)
    try:
      if planned.method in methods_lib.ASSIGNED:
        _assign(plan, planned, stop)
      _train(plan, planned.run, stop, retrain and searched)
    except (ValueError, run_log.DivergedError) as error:
      _LOG.error('%s: %s', name, error)
      failed.append(name)
  return failed


def _is_finished(
  plan: plan_lib.Plan, run: sweep_file.Run, retrained: bool = False
) -> bool:
  """Returns whether a run is finished, and retrained if it shall be."""
  workdir = plan.workdir(run)
  if collect.look(run, workdir)['state'] not in ('finished', 'failed'):
    return False
  result = files.read_json(workdir / workdir_lib.RESULT)
  return not retrained or bool(result.get('retrained'))


def _train(
  plan: plan_lib.Plan,
  run: sweep_file.Run,
  stop: Callable[[], bool],
  retrain: bool = False,
) -> None:
  config = sweep_file.load(run)
  train.train_and_evaluate(
    config, plan.workdir(run), stop=stop, retrain=retrain
  )


def _assign(
  plan: plan_lib.Plan, planned: plan_lib.Planned, stop: Callable[[], bool]
) -> None:
  """Writes the architecture that a run is given, unless it is there."""
  row = methods_lib.ASSIGNED[planned.method]
  path = plan.workdir(planned.run) / workdir_lib.ASSIGNED
  if path.exists():
    return
  scores = _scores(plan, planned.seed, stop) if row.has_scores else None
  experiment = plan.experiment(planned.target or plan.targets[0])
  choices = row.choose(experiment, planned.seed, scores)
  path.parent.mkdir(parents=True, exist_ok=True)
  files.write_json(path, results.arch(experiment, choices))


def _scores(
  plan: plan_lib.Plan, seed: int, stop: Callable[[], bool]
) -> sensitivity.Scores:
  """Returns the scores of a seed, from a network trained at the dearest."""
  run = plan.dearest(seed)
  path = plan.workdir(run) / workdir_lib.SENSITIVITY
  if not _is_finished(plan, run):
    _train(plan, run, stop)
  if not path.exists():
    restored = evaluation.restore(str(plan.workdir(run)))
    table = sensitivity_table.measure(restored, plan.metric)
    files.write_json(path, table)
  return sensitivity_table.raw_scores(files.read_json(path))
