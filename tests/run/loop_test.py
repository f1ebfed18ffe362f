"""The loop over steps: which batches a step gets, and when it profiles."""

import contextlib
import itertools
import pathlib
import types

import pytest

from fliqs_jax.run import loop
from fliqs_jax.runtime import monitoring


@pytest.mark.parametrize('act_clip', ['laplacian', 'profiled'])
@pytest.mark.parametrize(
  ('first', 'states', 'profiled_at'),
  [
    # A state is the number of steps taken, and 100 more once it is profiled.
    (0, [0, 1, 2, 103, 104], [3]),
    (2, [2, 103, 104], [3]),
    (3, [103, 104], [3]),
    (4, [4], []),  # It was profiled before it was saved.
  ],
)
def test_a_step_gets_the_batches_of_its_number(
  monkeypatch, act_clip, first, states, profiled_at
):
  ns = types.SimpleNamespace
  experiment = ns(
    config=ns(quant=ns(act_clip=act_clip), train=ns(frozen=False)),
    spec=ns(has_strategies=False),
    phases=ns(steps=5, act_start=3),
    streams=ns(
      train=itertools.count, valid=lambda step: itertools.count(-step, -1)
    ),
    search_step=lambda: None,
    calibrations=(),
    allocations=(),
  )
  taken, profiled, metrics = [], [], []

  def step(state, train_batch, valid_batch):
    taken.append((state, train_batch, valid_batch))
    return state + 1, 'metrics'

  def profile(experiment, state, devices):
    profiled.append(state)
    return state + 100

  monkeypatch.setattr(loop.statistics, 'profiled', profile)
  step.memory_analysis = lambda: ns(temp_size_in_bytes=7)
  monkeypatch.setattr(loop.allocator, 'Allocator', lambda *args: None)
  monkeypatch.setattr(loop.statistics, 'Calibrator', lambda *args: None)
  result = loop.Run(state=first)
  devices = ns(feed=iter, mesh=ns(size=1), compile=lambda *args: step)
  done = loop._steps(
    first,
    *loop._compiled(first, result, experiment, devices),
    result,
    experiment,
    devices,
    ns(add=metrics.append),
    monitoring.Trace('', 5, ''),
  )
  assert list(done) == list(range(first + 1, 6))
  if act_clip != 'profiled':
    states, profiled_at = list(range(first, 5)), []
  assert taken == [(s, s % 100, -(s % 100)) for s in states]
  assert profiled == profiled_at
  assert metrics == ['metrics'] * (5 - first)
  assert (result.effort.compilations, result.effort.step_bytes) == (1, 7)


class _Checkpoints:
  """Checkpoints of which the last one is kept as it was saved."""

  def __init__(self, extra=None):
    self.extra = extra

  def save(self, step, state, extra):
    self.extra = extra

  def restore_latest(self, abstract):
    return 3, types.SimpleNamespace(step=3), self.extra


def _resumed(checkpoints):
  ns = types.SimpleNamespace
  experiment = ns(initial_state=lambda: None)
  return loop._start(experiment, ns(of_state=lambda shapes: None), checkpoints)


def test_what_a_run_took_is_that_of_all_its_starts(monkeypatch):
  ns = types.SimpleNamespace
  effort = loop.Effort(
    seconds=50.0,
    step_seconds=20.0,
    compilations=1,
    compile_seconds=4.0,
    step_bytes=9,
  )
  checkpoints, experiment = _Checkpoints(), ns(binding={})
  loop.save(checkpoints, experiment, ns(step=3), effort, {'loss': ['1']})
  first, run, unwritten = _resumed(checkpoints)
  assert (first, run.effort, unwritten) == (3, effort, {'loss': ['1']})
  # The second start compiles for 2.5 s what needs 7 bytes.
  clock = itertools.count(100.0, 2.5)
  monkeypatch.setattr(loop, 'time', ns(monotonic=lambda: next(clock)))
  step = ns(memory_analysis=lambda: ns(temp_size_in_bytes=7))
  experiment = ns(
    streams=ns(train=itertools.count, valid=itertools.count),
    search_step=lambda: None,
  )
  devices = ns(feed=iter, mesh=ns(size=1), compile=lambda *args: step)
  loop._compiled(first, run, experiment, devices)
  assert run.effort == loop.Effort(50.0, 20.0, 2, 6.5, 7)
  # It began at 90 on the clock, which shows 105 now.
  assert run.effort.since(90.0) == 50 + 15


def test_a_checkpoint_of_an_earlier_version_says_the_seconds(caplog):
  _, run, _ = _resumed(_Checkpoints(dict(seconds=50.0, metrics={})))
  assert run.effort == loop.Effort(seconds=50.0)
  assert (
    'step_seconds, compilations, compile_seconds, step_bytes of ' in caplog.text
  )


@pytest.mark.parametrize(
  ('stops', 'saved'),
  [
    ([False] * 5, [4.5, 5.5]),  # At step 4 and at the last one, the fifth.
    ([False, False, True], [3.5]),
  ],
)
def test_the_time_of_steps_is_theirs_alone(monkeypatch, stops, saved):
  """A step takes 1 s, scores 10 s, a row 100 s, a checkpoint 1000 s."""
  ns, now, seen = types.SimpleNamespace, [0.0], []

  def takes(seconds, result=None):
    def passing(*args):
      now[0] += seconds
      return result

    return passing

  def save(checkpoints, experiment, state, effort, unwritten):
    now[0] += 1000.0
    seen.append(effort.step_seconds)

  experiment = ns(
    config=ns(
      quant=ns(act_clip='laplacian'),
      train=ns(
        frozen=False, log_every=2, checkpoint_every=4, checkpoints_kept=1
      ),
    ),
    spec=ns(has_strategies=False),
    phases=ns(steps=5, act_start=2),
    calibrations=(),
    allocations=(1,),
  )
  log = ns(add=takes(0.0), write=takes(100.0), unwritten=takes(0.0))
  closing = contextlib.nullcontext
  started = loop.Run(0, loop.Effort(step_seconds=0.5))
  monkeypatch.setattr(loop, 'time', ns(monotonic=lambda: now[0]))
  monkeypatch.setattr(loop, 'save', save)
  monkeypatch.setattr(loop, '_start', lambda *args: (0, started, {}))
  step = takes(1.0, (0, 'metrics'))
  monkeypatch.setattr(
    loop, '_compiled', takes(70.0, (step, itertools.repeat(())))
  )
  monkeypatch.setattr(
    loop.checkpoint,
    'Checkpoints',
    lambda path, keep: closing(ns(wait=takes(0.0))),
  )
  monkeypatch.setattr(loop.run_log, 'RunLog', lambda *args: closing(log))
  monkeypatch.setattr(loop.allocator, 'Allocator', lambda *_: takes(10.0, 0))
  monkeypatch.setattr(loop.statistics, 'Calibrator', lambda *_: None)
  trace, asked = monitoring.Trace('', 5, ''), iter(stops)
  with pytest.raises(loop.PreemptedError) if any(stops) else closing():
    loop.run(experiment, ns(), pathlib.Path(), asked.__next__, trace, began=0.0)
  assert seen == saved
