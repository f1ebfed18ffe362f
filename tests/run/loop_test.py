"""The loop over steps: which batches a step gets, and when it profiles."""

import itertools
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
  assert (result.compilations, result.step_bytes) == (1, 7)
