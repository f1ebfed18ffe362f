"""The log between logging points: averages, speed, divergence, resumption."""

import math
import types

import jax.numpy as jnp
import pytest

from fliqs_jax.run.records import metrics
from fliqs_jax.run.records import run_log

# A run of 60 steps with nothing to search; a loss may reach 3.
EXPERIMENT = types.SimpleNamespace(
  config=types.SimpleNamespace(train=types.SimpleNamespace(max_loss=3.0)),
  phases=types.SimpleNamespace(steps=60),
  space=types.SimpleNamespace(is_fixed=True),
)
STATE = types.SimpleNamespace(
  search_state=types.SimpleNamespace(policy={'a': jnp.zeros(2)})
)


def _step(loss, grad_norm=1.0):
  return dict(loss=jnp.float32(loss), grad_norm=jnp.float32(grad_norm))


def _rows(workdir):
  return {row['step']: row for row in metrics.read_history(workdir)}


def test_each_row_averages_the_steps_since_the_one_before(tmp_path):
  with run_log.RunLog(EXPERIMENT, tmp_path, 0, {}) as log:
    for step, loss in enumerate((1.0, 2.0, 0.5, 1.5), 1):
      log.add(_step(loss))
      if step % 2 == 0:
        log.write(step, STATE)
  rows = _rows(tmp_path)
  assert {step: row['loss'] for step, row in rows.items()} == {2: 1.5, 4: 1.0}
  assert rows[4]['policy'] == {'a': [0.5, 0.5]}


def test_the_speed_is_that_since_the_row_before(tmp_path, monkeypatch):
  times = iter([100.0, 102.0, 103.0])
  clock = types.SimpleNamespace(monotonic=lambda: next(times))
  monkeypatch.setattr(run_log, 'time', clock)
  timings = []
  with run_log.RunLog(EXPERIMENT, tmp_path, 0, {}) as log:
    write = log._writer.write
    log._writer.write = lambda *row: timings.append(row[-1]) or write(*row)
    for step in (5, 10, 18):
      log.add(_step(1.0))
      log.write(step, STATE)
  # 5 steps in 2 s, 8 steps in 1 s; of the first row nothing is known.
  assert timings == [{}, dict(steps_per_second=2.5), dict(steps_per_second=8)]


def test_a_policy_that_is_not_finite_ends_the_run(tmp_path):
  with run_log.RunLog(EXPERIMENT, tmp_path, 0, {}) as log:
    log.add(_step(1.0) | dict(entropy=jnp.float32(math.nan)))
    with pytest.raises(
      run_log.DivergedError, match='mean entropy is nan at step 5; .*search'
    ):
      log.write(5, STATE)
  assert not _rows(tmp_path)


@pytest.mark.parametrize(
  ('loss', 'grad_norm', 'named'),
  [
    (3.0, 1.0, None),
    (3.25, 1.0, 'mean loss is 3.25 at step 5'),
    (math.inf, 1.0, 'mean loss is inf at step 5'),
    (1.0, math.nan, 'mean grad_norm is nan at step 5'),
  ],
)
def test_divergence_leaves_no_row(tmp_path, loss, grad_norm, named):
  with run_log.RunLog(EXPERIMENT, tmp_path, 0, {}) as log:
    log.add(_step(loss, grad_norm))
    if named is None:
      log.write(5, STATE)
    else:
      with pytest.raises(run_log.DivergedError, match=named):
        log.write(5, STATE)
  assert len(_rows(tmp_path)) == (named is None)


def test_what_no_row_has_yet_goes_on_after_a_restart(tmp_path):
  with run_log.RunLog(EXPERIMENT, tmp_path, 0, {}) as log:
    for step in (2, 4, 6):
      log.add(_step(0.5))
      log.write(step, STATE)
    assert log.unwritten(6) == {}
    log.add(_step(1.0))
    seen = log.unwritten(7)
    log.add(_step(math.nan))
    with pytest.raises(run_log.DivergedError, match='at step 8'):
      log.unwritten(8)
  # As if it had been killed after a checkpoint of step 5: row 6 is dropped.
  with run_log.RunLog(EXPERIMENT, tmp_path, 5, seen) as log:
    assert list(_rows(tmp_path)) == [2, 4]
    log.add(_step(2.0))
    log.write(6, STATE)
  assert _rows(tmp_path)[6]['loss'] == 1.5
  with run_log.RunLog(EXPERIMENT, tmp_path, 0, {}):
    assert _rows(tmp_path) == {}
