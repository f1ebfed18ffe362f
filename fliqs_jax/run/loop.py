"""Training loop of a run: from the last checkpoint to the last step."""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import dataclasses
import itertools
import logging
import pathlib
import time
from typing import Any

import jax

from fliqs_jax.run import allocator
from fliqs_jax.run import experiment as experiment_lib
from fliqs_jax.run import pretrained
from fliqs_jax.run import statistics
from fliqs_jax.run.records import run_log
from fliqs_jax.runtime import checkpoint
from fliqs_jax.runtime import devices as devices_lib
from fliqs_jax.runtime import monitoring
from fliqs_jax.runtime import processes
from fliqs_jax.runtime import workdir as workdir_lib
from fliqs_jax.search import train_state

_LOG = logging.getLogger(__name__)


class PreemptedError(RuntimeError):
  """The run was asked to stop, and saved its state."""


@dataclasses.dataclass(frozen=True)
class Effort:
  """What a run took, in all its starts; a checkpoint keeps it.

  Attributes:
    seconds: wall time in seconds of earlier starts, up to the checkpoint.
    step_seconds: wall time in seconds of the steps with their batches; without
      what is compiled, scored, calibrated, logged and saved between them.
    compilations: number of compilations of the step: one for each start that
      took steps.
    compile_seconds: wall time of these compilations in seconds.
    step_bytes: memory that the step needs beside its arguments, on one device,
      as compiled last; None if the compiler does not know.
  """

  seconds: float = 0.0
  step_seconds: float = 0.0
  compilations: int = 0
  compile_seconds: float = 0.0
  step_bytes: int | None = None

  def since(self, began: float) -> float:
    """Returns the wall time in seconds of all starts.

    Args:
      began: `time.monotonic()` when this start of the run began.
    """
    return self.seconds + time.monotonic() - began


@dataclasses.dataclass
class Run:
  """State of a run, and what it took.

  Attributes:
    state: training state after the last step taken.
    effort: what the run took until then; its `seconds` without this start.
    resumed: `time.monotonic()` when the steps began, or after the last pause.
  """

  state: train_state.TrainState
  effort: Effort = Effort()
  resumed: float = 0.0

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """Keeps what is done between two steps out of the time of the steps."""
    jax.block_until_ready(self.state)  # A step returns before it is computed.
    seconds = self.effort.step_seconds + time.monotonic() - self.resumed
    self.effort = dataclasses.replace(self.effort, step_seconds=seconds)
    yield
    jax.block_until_ready(self.state)
    self.resumed = time.monotonic()


def run(
  experiment: experiment_lib.Experiment,
  devices: devices_lib.Devices,
  workdir: pathlib.Path,
  stop: Callable[[], bool],
  trace: monitoring.Trace,
  began: float,
) -> Run:
  """Takes every step that the run has not taken yet.

  Args:
    experiment: parts of the run.
    devices: all devices.
    workdir: path of the run's workdir.
    stop: `() -> bool`, called after each step; True: save and stop.
    trace: profiler of the chosen steps.
    began: `time.monotonic()` when this start of the run began.

  Raises:
    DivergedError: training diverged; the last good checkpoint remains.
    PreemptedError: `stop` returned True; the state is saved.
    ValueError: there are checkpoints, but none of them can be used.
  """
  with checkpoint.Checkpoints(
    workdir / workdir_lib.CHECKPOINTS,
    keep=experiment.config.train.checkpoints_kept,
  ) as checkpoints:
    first, result, seen = _start(experiment, devices, checkpoints)
    if first == experiment.phases.steps:
      return result
    step, batches = _compiled(first, result, experiment, devices)
    with (
      run_log.RunLog(experiment, workdir, first, seen) as log,
      processes.stepping(),
    ):
      for done in _steps(
        first, step, batches, result, experiment, devices, log, trace
      ):
        stopping = stop()
        ends = done == experiment.phases.steps
        logs = done % experiment.config.train.log_every == 0 or ends
        saves = done % experiment.config.train.checkpoint_every == 0 or ends
        if logs or saves or stopping:
          with result.paused():
            if logs:
              log.write(done, result.state)
            if saves or stopping:
              effort = dataclasses.replace(
                result.effort, seconds=result.effort.since(began)
              )
              unwritten = log.unwritten(done)
              save(checkpoints, experiment, result.state, effort, unwritten)
        if stopping:
          checkpoints.wait()
          raise PreemptedError(
            f'asked to stop: saved at step {done} of '
            f'{experiment.phases.steps}; the same command resumes the run'
          )
      checkpoints.wait()
  return result


def save(
  checkpoints: checkpoint.Checkpoints,
  experiment: experiment_lib.Experiment,
  state: train_state.TrainState,
  effort: Effort = Effort(),
  unwritten: Mapping[str, Any] | None = None,
) -> None:
  """Saves a checkpoint from which `run` can continue.

  Args:
    checkpoints: checkpoints of the run.
    experiment: parts of the run, to which the checkpoint is bound.
    state: training state, whose `step` names the checkpoint.
    effort: what the run took until now.
    unwritten: metrics that no row of the history has yet, from
      `RunLog.unwritten`; None: no metrics.
  """
  extra = dict(
    **dataclasses.asdict(effort),
    metrics=unwritten or {},
    binding=experiment.binding,
  )
  checkpoints.save(int(state.step), state, extra)


def _start(experiment, devices, checkpoints):
  """Returns the first step to take, the run so far, and unwritten metrics."""
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
    state = devices.create(initial_state)
    if path := experiment.config.init_from:
      state = pretrained.started(state, path)
    return 0, Run(state), {}
  step, state, extra = restored
  _LOG.info('resumed at step %d', step)
  return step, Run(state, _saved_effort(extra)), extra['metrics']


def _saved_effort(extra: Mapping[str, Any]) -> Effort:
  """Returns what was saved; earlier versions saved the seconds alone."""
  names = [field.name for field in dataclasses.fields(Effort)]
  if missing := [name for name in names if name not in extra]:
    _LOG.warning(
      'an earlier version saved the checkpoint: %s of result.json will lack '
      'what was before it',
      ', '.join(missing),
    )
  return Effort(**{name: extra[name] for name in names if name in extra})


def _compiled(first, result, experiment, devices):
  """Returns the compiled step, and the batches from a step on."""
  batches = zip(
    devices.feed(experiment.streams.train(first)),
    devices.feed(experiment.streams.valid(first)),
  )
  batch = next(batches)
  step = experiment.search_step()
  began = time.monotonic()
  _LOG.info('compiling the step for %d devices ...', devices.mesh.size)
  compiled = devices.compile(step, result.state, *batch)
  seconds, before = time.monotonic() - began, result.effort
  result.effort = dataclasses.replace(
    before,
    compilations=before.compilations + 1,
    compile_seconds=before.compile_seconds + seconds,
    step_bytes=devices_lib.step_bytes(compiled),
  )
  _LOG.info('compiled in %.1f s', seconds)
  return compiled, itertools.chain([batch], batches)


def _steps(
  first, step_fn, batches, result, experiment, devices, log, trace
) -> Iterator[int]:
  """Takes the steps one by one; yields how many are taken after each."""
  config, phases = experiment.config, experiment.phases
  allocate = allocator.Allocator(experiment, devices)
  calibrate = statistics.Calibrator(experiment, devices)
  if experiment.calibrations:
    calibrate.warn(result.state)

  def changes(step: int) -> list[Callable[[Any], Any]]:
    """Returns what changes the state before a step."""
    due = []
    if step == phases.act_start and config.quant.act_clip == 'profiled':
      due.append(lambda state: statistics.profiled(experiment, state, devices))
    if step == 0 and config.train.frozen:
      due.append(lambda state: statistics.observed(experiment, state, devices))
    if step in experiment.calibrations:
      due.append(lambda state: calibrate(state, step))
    if step in experiment.allocations:
      due.append(lambda state: allocate(state, step))
      # Again, with the formats that were chosen in the layers before.
      if experiment.spec.has_strategies:
        due.append(lambda state: calibrate(state, step))
    return due

  with trace:
    result.resumed = time.monotonic()
    for step, batch in zip(range(first, phases.steps), batches):
      if due := changes(step):
        with result.paused():
          for change in due:
            result.state = change(result.state)
      trace.before(step)
      with jax.transfer_guard_device_to_host('disallow'):
        result.state, metrics = step_fn(result.state, *batch)
        log.add(metrics)
      trace.after(step, metrics)
      yield step + 1
