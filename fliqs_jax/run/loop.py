"""The steps of a run, from where it stands to the last one."""

from collections.abc import Callable, Iterator, Mapping
import dataclasses
import itertools
import logging
import pathlib
import time
from typing import Any

import jax

from fliqs_jax import data
from fliqs_jax.run import experiment as experiment_lib
from fliqs_jax.run import run_log
from fliqs_jax.runtime import checkpoint
from fliqs_jax.runtime import devices as devices_lib
from fliqs_jax.runtime import monitoring
from fliqs_jax.runtime import workdir as workdir_lib
from fliqs_jax.search import calibration
from fliqs_jax.search import policy as policy_lib
from fliqs_jax.search import train_state

_LOG = logging.getLogger(__name__)

_PROFILE_BATCHES = 10  # Table 10c: from 5 on, their number does not matter.


class PreemptedError(RuntimeError):
  """The run was asked to stop, and saved its state."""


@dataclasses.dataclass
class Run:
  """How far a run is, and what it took.

  Attributes:
    state: after the last step.
    seconds_before: wall time of earlier starts, up to the checkpoint.
    compilations: of the step, by this process.
    compile_seconds: what they took.
  """

  state: train_state.TrainState
  seconds_before: float = 0.0
  compilations: int = 0
  compile_seconds: float = 0.0


def run(
  experiment: experiment_lib.Experiment,
  devices: devices_lib.Devices,
  workdir: pathlib.Path,
  stop: Callable[[], bool],
  trace: monitoring.Trace,
  began: float,
) -> Run:
  """Takes every step that is still to be taken.

  Args:
    experiment: the run.
    devices: all of them.
    workdir: of the run.
    stop: whether to save and stop; asked after each step.
    trace: which steps are profiled.
    began: `time.monotonic()` when this start of the run began.

  Raises:
    DivergedError: training diverged; the last good checkpoint stays.
    PreemptedError: `stop` said so; the state is saved.
    ValueError: no checkpoint of several can be used.
  """
  with checkpoint.Checkpoints(
    workdir / workdir_lib.CHECKPOINTS,
    keep=experiment.config.train.checkpoints_kept,
  ) as checkpoints:
    first, result, seen = _start(experiment, devices, checkpoints)
    if first == experiment.phases.steps:
      return result
    with run_log.RunLog(experiment, workdir, first, seen) as journal:
      for done in _steps(first, result, experiment, devices, journal, trace):
        stopping = stop()
        ends = done == experiment.phases.steps
        if done % experiment.config.train.log_every == 0 or ends:
          journal.write(done, result.state)
        if (
          done % experiment.config.train.checkpoint_every == 0
          or ends
          or stopping
        ):
          seconds = result.seconds_before + time.monotonic() - began
          save(checkpoints, result.state, seconds, journal.unwritten(done))
        if stopping:
          checkpoints.wait()
          raise PreemptedError(
            f'asked to stop: saved at step {done} of '
            f'{experiment.phases.steps}; the same command goes on from there'
          )
    checkpoints.wait()
  return result


def save(
  checkpoints: checkpoint.Checkpoints,
  state: train_state.TrainState,
  seconds: float = 0.0,
  unwritten: Mapping[str, Any] | None = None,
) -> None:
  """Saves what `run` goes on from.

  Args:
    checkpoints: of the run.
    state: after as many steps as it says.
    seconds: wall time until now.
    unwritten: metrics that no row of the history has yet, from
      `RunLog.unwritten`.
  """
  extra = dict(seconds=seconds, metrics=unwritten or {})
  checkpoints.save(int(state.step), state, extra)


def _start(experiment, devices, checkpoints):
  """Returns the first step, the run so far, and metrics not yet written."""
  initial_state = experiment.initial_state
  shapes = jax.eval_shape(initial_state)
  where = devices.of_state(shapes)
  restored = checkpoints.restore_latest(
    jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      shapes,
      where,
    )
  )
  if restored is None:
    return 0, Run(jax.jit(initial_state, out_shardings=where)()), {}
  step, state, extra = restored
  _LOG.info('resumed at step %d', step)
  return step, Run(state, extra['seconds']), extra['metrics']


def _steps(first, result, experiment, devices, journal, trace) -> Iterator[int]:
  """Takes a step and yields how many were taken, to the last."""
  config, phases = experiment.config, experiment.phases
  streams = experiment.streams
  batches = zip(
    devices.feed(streams.train(first)), devices.feed(streams.valid(first))
  )
  batch = next(batches)
  step_fn = _compile(experiment, devices, result, batch)
  batches = itertools.chain([batch], batches)
  with trace:
    for step, batch in zip(range(first, phases.steps), batches):
      if step == phases.act_start and config.quant.act_clip == 'profiled':
        result.state = _profile(experiment, devices, result.state)
      trace.before(step)
      with jax.transfer_guard_device_to_host('disallow'):
        result.state, metrics = step_fn(result.state, *batch)
        journal.add(metrics)
      trace.after(step, metrics)
      yield step + 1


def _compile(experiment, devices, result, batch):
  step = experiment.search_step()
  began = time.monotonic()
  _LOG.info('compiling the step for %d devices ...', devices.mesh.size)
  compiled = devices.compile(step, result.state, *batch)
  result.compilations += 1
  result.compile_seconds = time.monotonic() - began
  _LOG.info('compiled in %.1f s', result.compile_seconds)
  return compiled


def _profile(experiment, devices, state):
  """Fills in each layer's clipping multiples from its own activations."""
  policy = jax.device_get(state.search_state.policy)
  variables = {
    'params': state.params,
    'arch': experiment.space.expand(policy_lib.argmax(policy)),
    **state.model_state,
  }
  batches = itertools.islice(
    experiment.streams.train(experiment.phases.act_start), _PROFILE_BATCHES
  )
  stats = calibration.profiled_clips(
    experiment.model.apply,
    experiment.space,
    variables,
    map(data.model_inputs, devices.feed(batches)),
    devices.everywhere,
  )
  stats = jax.device_put(stats, devices.everywhere)
  return state.replace(model_state={**state.model_state, 'quant_stats': stats})
