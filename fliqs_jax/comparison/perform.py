"""Performs a comparison: chooses architectures, and starts the runs.

A comparison that was stopped is continued by the same command.
"""

from collections.abc import Callable

from fliqs_jax.comparison import methods as methods_lib
from fliqs_jax.comparison import plan as plan_lib
from fliqs_jax.run import evaluation
from fliqs_jax.run import sensitivity_table
from fliqs_jax.run.records import results
from fliqs_jax.runtime import files
from fliqs_jax.runtime import workdir as workdir_lib
from fliqs_jax.search import presets
from fliqs_jax.search import sensitivity
from fliqs_jax.sweep import perform as sweep_perform
from fliqs_jax.sweep import sweep_file


def perform(
  plan: plan_lib.Plan, retrain: bool, stop: Callable[[], bool]
) -> dict[str, str]:
  """Starts or continues each run that is not finished.

  Args:
    plan: what is compared, checked.
    retrain: whether each searched network is also trained from the beginning.
    stop: `() -> bool`, called after each step of training; True: save and stop.

  Returns:
    {name of a run that failed: why}.

  Raises:
    PreemptedError: `stop` returned True; the state of the run is saved.
    ValueError: another comparison is performed in the same directory.
  """
  plan.out.mkdir(parents=True, exist_ok=True)
  planned = {p.run.name: p for p in plan.runs}

  def before(run: sweep_file.Run) -> None:
    if planned[run.name].method in methods_lib.ASSIGNED:
      _assign(plan, planned[run.name], stop)

  with workdir_lib.held(plan.out):
    files.write_json(plan.out / workdir_lib.COMPARISON_PLAN, plan.claim)
    return sweep_perform.perform(
      plan.sweep,
      plan.out,
      stop,
      retrained=lambda run: (
        retrain and planned[run.name].method in presets.PRESETS
      ),
      before=before,
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
  if not sweep_perform.is_finished(run, plan.workdir(run)):
    sweep_perform.train(run, plan.workdir(run), stop)
  if not path.exists():
    restored = evaluation.restore(str(plan.workdir(run)))
    table = sensitivity_table.measure(restored, plan.metric)
    files.write_json(path, table)
  return sensitivity_table.raw_scores(files.read_json(path))
