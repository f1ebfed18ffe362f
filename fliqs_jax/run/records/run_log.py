"""Log of a run at logging points, which stops a run that diverged."""

import logging
import math
import os
import pathlib
import time
from typing import Any

import jax

from fliqs_jax.run import experiment as experiment_lib
from fliqs_jax.run.records import metrics as metrics_lib
from fliqs_jax.runtime import monitoring
from fliqs_jax.runtime import processes
from fliqs_jax.runtime import workdir as workdir_lib
from fliqs_jax.search import policy as policy_lib
from fliqs_jax.search import train_state

_LOG = logging.getLogger(__name__)


class DivergedError(RuntimeError):
  """A loss or a policy is no longer finite, or `train.max_loss` is exceeded."""


class RunLog:
  """Averages of metrics between logging points, and the files that log them.

  Between logging points nothing leaves the device. All processes print to their
  own log; only the first writes history and TensorBoard files.
  """

  def __init__(
    self,
    experiment: experiment_lib.Experiment,
    workdir: pathlib.Path,
    step: int,
    seen: dict[str, list[str]],
  ):
    """Opens the files.

    Args:
      experiment: parts of the run.
      workdir: path of the run's workdir.
      step: number of steps taken before; 0 for a new run.
      seen: result of `unwritten` at the restored checkpoint; empty for a new
        run.
    """
    monitoring.heartbeat(workdir, step)
    self._experiment = experiment
    self._workdir = workdir
    self._sums = metrics_lib.unpacked(seen) if seen else None
    self._logged: tuple[int, float] | None = None
    self._writer = None
    if processes.index() == 0:
      self._writer = metrics_lib.Writer(workdir, step or None)

  def add(self, step_metrics: dict[str, jax.Array]) -> None:
    """Adds a step's metrics on the device, without waiting for them."""
    self._sums = metrics_lib.accumulate(self._sums, step_metrics)

  def write(self, step: int, state: train_state.TrainState) -> None:
    """Writes and prints the averages of the steps since the last `write`.

    Args:
      step: number of steps taken; at least one since the last `write`.
      state: training state after these steps.

    Raises:
      DivergedError: a loss, a gradient or the policy is not finite, or the loss
        exceeds `train.max_loss`.
    """
    assert self._sums is not None
    scalars = metrics_lib.compute(self._sums)
    _check_finite(scalars, step, self._workdir)
    config = self._experiment.config
    if scalars['loss'] > config.train.max_loss:
      raise _diverged('loss', scalars['loss'], step, self._workdir)
    self._sums = None
    now = time.monotonic()
    timing = {}
    if self._logged is not None:
      logged, at = self._logged
      timing = dict(steps_per_second=(step - logged) / (now - at))
    self._logged = step, now
    if self._writer:
      policy = jax.device_get(state.search_state.policy)
      probabilities = {
        name: [float(p) for p in pi]
        for name, pi in policy_lib.probabilities(policy).items()
      }
      self._writer.write(step, scalars, probabilities, timing)
    monitoring.heartbeat(self._workdir, step)
    _LOG.info('%s', _progress(self._experiment, step, scalars, timing))

  def unwritten(self, step: int) -> dict[str, list[str]]:
    """Returns the sums since the last `write`, in a form for JSON.

    Args:
      step: number of steps taken.

    Raises:
      DivergedError: a loss, a gradient or the policy is not finite.
    """
    if self._sums is None:
      return {}
    _check_finite(metrics_lib.compute(self._sums), step, self._workdir)
    return metrics_lib.packed(self._sums)

  def __enter__(self) -> 'RunLog':
    return self

  def __exit__(self, *_) -> None:
    if self._writer:
      self._writer.close()


def _check_finite(scalars, step, workdir) -> None:
  for name in ('loss', 'grad_norm'):
    if not math.isfinite(scalars[name]):
      raise _diverged(name, scalars[name], step, workdir)
  # Of the policy and its controller, which learn apart from the weights.
  for name in ('entropy', 'cost', 'reward'):
    if not math.isfinite(scalars.get(name, 0.0)):
      raise DivergedError(
        f'the search diverged: mean {name} is {scalars[name]} at step {step}; '
        f'{_last_good(workdir)}. Lower search.learning_rate, search.gamma or '
        'search.entropy_beta'
      )


def _diverged(
  name: str, value: float, step: int, workdir: str | os.PathLike[str]
) -> DivergedError:
  return DivergedError(
    f'training diverged: mean {name} is {value} at step {step} (allowed: '
    f'finite, loss up to train.max_loss); {_last_good(workdir)}. Lower '
    'optimizer.learning_rate or lengthen optimizer.warmup'
  )


def _last_good(workdir: str | os.PathLike[str]) -> str:
  path = pathlib.Path(workdir) / workdir_lib.CHECKPOINTS
  return f'the last good checkpoint is in {path}'


def _progress(
  experiment: experiment_lib.Experiment,
  step: int,
  scalars: dict[str, Any],
  timing: dict[str, float],
) -> str:
  steps = experiment.phases.steps
  line = f'step {step}/{steps}  loss {scalars["loss"]:.3f}'
  if not experiment.space.is_fixed:
    cost = scalars['cost'] * experiment.target
    if 'quality' in scalars:
      line += f'  quality {scalars["quality"]:.3f}'
    line += (
      f'  cost {cost:.4g}/'
      f'{experiment.target:.4g} {experiment.cost.unit}'
      f'  entropy {scalars["entropy"]:.2f}'
    )
  if scalars.get('dropped'):
    line += f'  not finite, dropped: {scalars["dropped"]:.2g} judgements a step'
  if speed := timing.get('steps_per_second'):
    left = round((steps - step) / speed)
    line += f'  {speed:.1f} steps/s  {left // 60}:{left % 60:02d} left'
  return line
