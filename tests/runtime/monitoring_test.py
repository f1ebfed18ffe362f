"""Heartbeats, and the steps between which a profile is taken."""

import json
import os
import time

import jax
import jax.numpy as jnp
import pytest

from fliqs_jax.runtime import monitoring


def test_a_heartbeat_says_step_time_and_process(tmp_path):
  for step in (3, 5):  # The second replaces the first.
    monitoring.heartbeat(tmp_path, step)
  beat = json.loads((tmp_path / 'heartbeat' / '0.json').read_text())
  assert beat.keys() == {'step', 'time', 'pid'}
  assert (beat['step'], beat['pid']) == (5, os.getpid())
  assert 0 <= time.time() - beat['time'] < 60


@pytest.fixture(name='profiler')
def _profiler(monkeypatch):
  """Returns what the profiler is asked to do."""
  asked = []
  monkeypatch.setattr(jax.profiler, 'start_trace', asked.append)
  monkeypatch.setattr(jax.profiler, 'stop_trace', lambda: asked.append('stop'))
  return asked


@pytest.mark.parametrize(
  ('steps', 'profiled'),
  [
    ('', []),
    ('0:1', [0]),  # The first step ...
    ('1:3', [1, 2]),
    ('3:4', [3]),  # ... and the last one of four.
    ('0:4', [0, 1, 2, 3]),
  ],
)
def test_the_steps_from_n_to_m_are_profiled(profiler, steps, profiled):
  inside = []
  with monitoring.Trace(steps, 4, 'there') as trace:
    for step in range(4):
      trace.before(step)
      if profiler == ['there']:
        inside.append(step)
      trace.after(step, jnp.zeros(()))
  assert inside == profiled
  assert profiler == (['there', 'stop'] if profiled else [])


def test_a_profile_ends_with_the_run(profiler):
  with monitoring.Trace('0:4', 4, 'there') as trace:
    trace.before(0)
    trace.after(0, jnp.zeros(()))
  assert profiler == ['there', 'stop']


@pytest.mark.parametrize('steps', ['2:2', '3:5', '3:2', '1', 'a:b', ' 1:2'])
def test_a_range_that_is_no_part_of_the_run_is_refused(steps):
  with pytest.raises(ValueError, match=f"'{steps}' must be N:M .* it has 4"):
    monitoring.Trace(steps, 4, 'there')
