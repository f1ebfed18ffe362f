"""Performs runs of a sweep in this process, each that is not finished.

A run that fails, because training diverges or a score is not finite, does not
stop the others.
"""

from collections.abc import Callable
import logging
import pathlib

from fliqs_jax.run import train as train_lib
from fliqs_jax.run.records import run_log
from fliqs_jax.runtime import commands
from fliqs_jax.runtime import files
from fliqs_jax.runtime import workdir as workdir_lib
from fliqs_jax.sweep import collect
from fliqs_jax.sweep import sweep_file

_LOG = logging.getLogger(__name__)


def perform(
  sweep: sweep_file.Sweep,
  out: pathlib.Path,
  stop: Callable[[], bool],
  *,
  retrained: Callable[[sweep_file.Run], bool] = lambda run: False,
  before: Callable[[sweep_file.Run], None] = lambda run: None,
) -> dict[str, str]:
  """Starts or continues each run that is not finished, one after another.

  Args:
    sweep: the planned runs.
    out: directory of the runs' workdirs.
    stop: `() -> bool`, called after each step of training; True: save and stop.
    retrained: `run -> bool`, whether the selected network is also trained from
      the beginning.
    before: `run -> None`, called before a run starts.

  Returns:
    {name of a run that failed: why}.

  Raises:
    PreemptedError: `stop` returned True; the state of the run is saved.
  """
  failed = {}
  for i, run in enumerate(sweep.runs, 1):
    if is_finished(run, out / run.name, retrained(run)):
      continue
    _LOG.info('[%d/%d] %s', i, len(sweep.runs), run.name)
    try:
      before(run)
      train(run, out / run.name, stop, retrained(run))
    except (ValueError, run_log.DivergedError) as error:
      failed[run.name] = commands.line(error)
      _LOG.error('%s: %s', run.name, failed[run.name])
  return failed


def is_finished(
  run: sweep_file.Run, workdir: pathlib.Path, retrained: bool = False
) -> bool:
  """Returns whether a run is finished, and retrained if it shall be."""
  if collect.look(run, workdir)['state'] not in ('finished', 'failed'):
    return False
  result = files.read_json(workdir / workdir_lib.RESULT)
  return not retrained or bool(result.get('retrained'))


def train(
  run: sweep_file.Run,
  workdir: pathlib.Path,
  stop: Callable[[], bool],
  retrained: bool = False,
) -> None:
  """Starts or continues a run; raises as `train_and_evaluate` does."""
  train_lib.train_and_evaluate(
    sweep_file.load(run), workdir, stop=stop, retrain=retrained
  )
