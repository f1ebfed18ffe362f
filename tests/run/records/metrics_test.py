import errno
import json
import math
import os
import pathlib
import stat
import struct
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from fliqs_jax.run.records import metrics
from fliqs_jax.runtime import checkpoint
from fliqs_jax.runtime import files


def events(workdir):
  """Returns (step, tag, value) of every scalar, and the purge steps."""
  scalars, purged = [], []
  for path in sorted(workdir.glob('events.out.tfevents.*')):
    data = path.read_bytes()
    while data:
      # TFRecord: length, checksum of it, message, checksum of that.
      (length,) = struct.unpack('<Q', data[:8])
      event = event_pb2.Event.FromString(data[12 : 12 + length])
      data = data[16 + length :]
      if event.HasField('session_log'):
        purged.append(event.step)
      for value in event.summary.value:
        scalars.append((event.step, value.tag, value.simple_value))
  return scalars, purged


def write_rows(writer, steps):
  for step in steps:
    writer.write(
      step,
      {'train/loss': 1 / (step + 1), 'cost': float(np.float32(0.1) * step)},
      {'conv2': [0.25, 0.75], 'conv1': [1 / 3, 2 / 3]},
      {'steps_per_second': 100.0},
    )


def history(workdir):
  return (workdir / 'history.jsonl').read_bytes()


def test_a_metric_is_averaged_over_the_steps():
  accumulators = None
  for loss in (1.0, 2.0, 6.0):
    accumulators = metrics.accumulate(
      accumulators, {'train/loss': jnp.float32(loss), 'count': jnp.int32(2)}
    )
  # (1 + 2 + 6) / 3 and (2 + 2 + 2) / 3.
  assert metrics.compute(accumulators) == {'train/loss': 3.0, 'count': 2.0}


def test_of_some_metrics_the_last_value_counts():
  accumulators = metrics.empty({'loss': 0, 'rate': 0}, last=['rate'])
  for i in (1.0, 3.0):
    accumulators = metrics.accumulate(
      accumulators, {'loss': jnp.float32(i), 'rate': jnp.float32(i)}
    )
  assert metrics.compute(accumulators) == {'loss': 2.0, 'rate': 3.0}


def test_low_precision_is_summed_in_float32():
  accumulators = None
  for _ in range(512):
    accumulators = metrics.accumulate(
      accumulators, {'loss': jnp.ones((), jnp.bfloat16)}
    )
  # A sum in bfloat16 would have stopped at 256.
  assert metrics.compute(accumulators) == {'loss': 1.0}


def test_nothing_leaves_the_device_before_compute():
  values = [jax.device_put(jnp.float32(i)) for i in range(3)]
  accumulators = metrics.empty({'loss': 0})
  metrics.accumulate(accumulators, {'loss': values[0]})  # Compiles.
  with jax.transfer_guard('disallow'):
    for value in values:
      accumulators = metrics.accumulate(accumulators, {'loss': value})
    result = metrics.compute(accumulators)
  assert result == {'loss': 1.0}


def test_steps_after_the_first_are_not_traced():
  accumulators = metrics.accumulate(None, {'loss': jnp.float32(0)})
  step = {'loss': jnp.float32(4)}
  with jax.no_tracing(True):
    accumulators = metrics.accumulate(accumulators, step)
  assert metrics.compute(accumulators) == {'loss': 2.0}


def test_empty_accumulators_have_the_structure_of_all_others():
  step = {'b': jnp.float32(1), 'a': jnp.int32(2)}
  empty = metrics.empty(jax.eval_shape(lambda: step), last=['a'])
  after = metrics.accumulate(empty, step)
  assert jax.tree.structure(after) == jax.tree.structure(empty)
  assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, empty)
  assert all(map(math.isnan, metrics.compute(empty).values()))


def test_accumulators_can_be_part_of_a_checkpoint(tmp_path):
  step = {'train/loss': jnp.float32(1), 'rate': jnp.float32(1)}
  empty = metrics.empty(step, last=['rate'])
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, {'metrics': metrics.accumulate(empty, step)}, {})
    restored = checkpoints.restore_latest(
      jax.eval_shape(lambda: {'metrics': empty})
    )
  accumulators = metrics.accumulate(
    restored.state['metrics'], jax.tree.map(lambda x: x + 2, step)
  )
  assert metrics.compute(accumulators) == {'train/loss': 2.0, 'rate': 3.0}


def test_metrics_of_another_step_are_refused():
  accumulators = metrics.accumulate(None, {'loss': jnp.float32(1)})
  with pytest.raises(ValueError, match=r"\['accuracy'\].*\['loss'\]"):
    metrics.accumulate(accumulators, {'accuracy': jnp.float32(1)})
  with pytest.raises(ValueError, match=r'loss has shape \(2,\)'):
    metrics.accumulate(accumulators, {'loss': jnp.ones((2,))})
  with pytest.raises(ValueError, match='rate'):
    metrics.empty({'loss': 0}, last=['rate'])


def test_a_row_has_its_step_the_scalars_and_the_policy(tmp_path):
  with metrics.Writer(tmp_path, None) as writer:
    writer.write(
      5,
      {'b': 2.0, 'a': np.float32(0.5)},
      {'conv': np.array([0.25, 0.75])},
      {'steps_per_second': 9.0},
    )
  assert history(tmp_path) == (
    b'{"step": 5, "a": 0.5, "b": 2.0, "policy": {"conv": [0.25, 0.75]}}\n'
  )
  assert metrics.read_history(tmp_path) == [
    {'step': 5, 'a': 0.5, 'b': 2.0, 'policy': {'conv': [0.25, 0.75]}}
  ]


def test_values_that_are_not_finite_are_null(tmp_path):
  with metrics.Writer(tmp_path, None) as writer:
    writer.write(1, {'a': math.nan, 'b': -math.inf}, {'c': [math.inf]}, {})

  def refuse(name):
    raise AssertionError(f'{name} is not JSON')

  row = json.loads(history(tmp_path), parse_constant=refuse)
  assert row == {'step': 1, 'a': None, 'b': None, 'policy': {'c': [None]}}


def test_timing_is_in_tensorboard_only(tmp_path):
  with metrics.Writer(tmp_path, None) as writer:
    writer.write(3, {'train/loss': 0.5}, {}, {'steps_per_second': 9.0})
  assert b'steps' not in history(tmp_path)
  scalars, _ = events(tmp_path)
  assert scalars == [(3, 'steps_per_second', 9.0), (3, 'train/loss', 0.5)]


@pytest.mark.parametrize('torn', [b'', b'{"step": 6, "loss": 0.', b'{"ste\xc3'])
def test_a_resumed_history_is_that_of_an_uninterrupted_run(tmp_path, torn):
  whole, resumed = tmp_path / 'whole', tmp_path / 'resumed'
  with metrics.Writer(whole, None) as writer:
    write_rows(writer, range(8))
  with metrics.Writer(resumed, None) as writer:
    write_rows(writer, range(6))
  with (resumed / 'history.jsonl').open('ab') as file:
    file.write(torn)
  with metrics.Writer(resumed, 3) as writer:
    assert [row['step'] for row in metrics.read_history(resumed)] == [
      0,
      1,
      2,
      3,
    ]
    write_rows(writer, range(4, 8))
  assert history(resumed) == history(whole)
  # TensorBoard hides what the first run logged after the checkpoint.
  scalars, purged = events(resumed)
  assert purged == [0, 4]
  assert len(scalars) == 3 * (6 + 4)


def test_a_run_that_starts_afresh_drops_every_row(tmp_path):
  with metrics.Writer(tmp_path, None) as writer:
    write_rows(writer, range(3))
  with metrics.Writer(tmp_path, None) as writer:
    write_rows(writer, [0])
  assert [row['step'] for row in metrics.read_history(tmp_path)] == [0]


def test_a_row_is_on_disk_when_write_returns(tmp_path):
  writer = metrics.Writer(tmp_path, None)
  write_rows(writer, [1])
  assert len(metrics.read_history(tmp_path)) == 1
  writer.close()


@pytest.fixture(name='synced')
def _synced(monkeypatch):
  """Returns (inode, size) of each file when it is forced onto the disk."""
  seen = []

  def record(descriptor):
    status = os.fstat(descriptor)
    is_folder = stat.S_ISDIR(status.st_mode)
    seen.append((status.st_ino, None if is_folder else status.st_size))

  monkeypatch.setattr(os, 'fsync', record)
  return seen


def test_a_row_survives_a_power_cut(tmp_path, synced):
  with metrics.Writer(tmp_path, None) as writer:
    write_rows(writer, [1])
    assert [size for _, size in synced] == [len(history(tmp_path))]


def test_a_file_that_is_replaced_survives_a_power_cut(tmp_path, synced):
  files.write_json(tmp_path / 'arch.json', ['INT4'])
  file = (tmp_path / 'arch.json').stat()
  # The bytes before the name: otherwise the name of an empty file could stay.
  assert synced == [(file.st_ino, file.st_size), (tmp_path.stat().st_ino, None)]


def test_a_full_disk_names_the_file_and_keeps_the_old_one(
  tmp_path, monkeypatch
):
  def full(_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  path = tmp_path / 'arch.json'
  files.write_json(path, ['INT4'])
  monkeypatch.setattr(os, 'fsync', full)
  with pytest.raises(OSError, match=f"No space left on device: '{path}'"):
    files.write_json(path, ['INT8'])
  assert files.read_json(path) == ['INT4']


@pytest.mark.parametrize(
  'content', [b'', b'{"a": ', b'\xff', b'\x00', b'[' * 9999]
)
def test_a_damaged_file_is_named(tmp_path, content):
  path = tmp_path / 'result.json'
  path.write_bytes(content)
  with pytest.raises(ValueError, match=f'{path} is damaged: '):
    files.read_json(path)


def test_the_workdir_is_made_with_its_parents(tmp_path):
  workdir = tmp_path / 'sweep' / 'run'
  with metrics.Writer(workdir, None) as writer:
    write_rows(writer, [1])
  assert len(metrics.read_history(workdir)) == 1


def test_a_torn_last_line_is_passed_over_by_a_reader(tmp_path):
  (tmp_path / 'history.jsonl').write_bytes(b'{"step": 1}\n{"step": 2, "lo')
  assert metrics.read_history(tmp_path) == [{'step': 1}]


def test_no_history_is_no_rows(tmp_path):
  assert metrics.read_history(tmp_path) == []


def test_a_damaged_line_is_named_and_left_alone(tmp_path):
  data = b'{"step": 1}\nfoo\n{"step": 2}\n'
  (tmp_path / 'history.jsonl').write_bytes(data)
  with pytest.raises(ValueError, match=r'history.jsonl, line 2 '):
    metrics.Writer(tmp_path, 2)
  assert history(tmp_path) == data


def test_a_row_must_follow_the_one_before(tmp_path):
  with metrics.Writer(tmp_path, None) as writer:
    write_rows(writer, [2, 4])
    with pytest.raises(ValueError, match='step 4 cannot follow'):
      write_rows(writer, [4])
  # The one before may have been written by the start before.
  with metrics.Writer(tmp_path, 4) as writer:
    with pytest.raises(ValueError, match='step 3 cannot follow .* step 4'):
      write_rows(writer, [3])
    write_rows(writer, [5])


@pytest.mark.parametrize('name', ['step', 'policy', 'speed'])
def test_a_name_is_used_once(tmp_path, name):
  with (
    metrics.Writer(tmp_path, None) as writer,
    pytest.raises(ValueError, match=name),
  ):
    writer.write(1, {name: 1.0}, {}, {'speed': 1.0})


def test_a_workdir_that_cannot_be_written_is_named(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(ValueError, match='file/run cannot be written'):
    metrics.Writer(tmp_path / 'file' / 'run', None)


def test_json_keeps_the_order_of_keys_and_the_digits_of_floats(tmp_path):
  path = tmp_path / 'arch.json'
  path.write_text('old')
  files.write_json(path, {'b': 0.1, 'a': ['INT4', 1]})
  assert path.read_text() == (
    '{\n  "b": 0.1,\n  "a": [\n    "INT4",\n    1\n  ]\n}\n'
  )
  assert list(tmp_path.iterdir()) == [path]


def test_json_without_a_number_is_refused_and_the_old_file_kept(tmp_path):
  path = tmp_path / 'arch.json'
  path.write_text('old')
  with pytest.raises(ValueError, match=str(path)):
    files.write_json(path, [math.nan])
  assert path.read_text() == 'old'


_IMPORTS = """
import sys

class Watch:
  tried = set()
  def find_spec(self, name, path=None, target=None):
    self.tried.add(name.partition('.')[0])

sys.meta_path.insert(0, Watch())
import fliqs_jax
assert not Watch.tried & {'orbax', 'clu', 'tensorboardX', 'tensorflow'}
import fliqs_jax.runtime.checkpoint
import fliqs_jax.run.records.metrics
assert {'orbax', 'clu', 'tensorboardX'} <= Watch.tried
assert 'tensorflow' not in Watch.tried
"""


def test_the_package_imports_no_effects_and_nothing_tries_tensorflow():
  subprocess.run(
    [sys.executable, '-W', 'error', '-c', _IMPORTS],
    cwd=pathlib.Path(__file__).parents[2],
    check=True,
  )


def test_sums_are_packed_to_the_bit():
  sums = None
  for value in (0.1, 1e30, float('nan')):
    sums = metrics.accumulate(sums, dict(a=jnp.float32(value), b=jnp.ones(())))
  packed = json.loads(json.dumps(metrics.packed(sums)))
  again = metrics.unpacked(packed)
  assert jax.tree.structure(again) == jax.tree.structure(sums)
  for x, y in zip(jax.tree.leaves(sums), jax.tree.leaves(again)):
    assert x.dtype == y.dtype
    assert np.asarray(x).tobytes() == np.asarray(y).tobytes()
  more = dict(a=jnp.ones(()), b=jnp.ones(()))
  assert metrics.compute(metrics.accumulate(again, more))['b'] == 1.0
