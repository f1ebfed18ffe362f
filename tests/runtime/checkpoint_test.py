import contextlib
import errno
import gc
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
import time
from typing import Any

from absl import logging
import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fliqs_jax.runtime import array_files
from fliqs_jax.runtime import checkpoint
from fliqs_jax.runtime import digests
from fliqs_jax.runtime import restoring
from tests import helpers

SaveError = checkpoint.SaveError


@flax.struct.dataclass
class TrainState:
  step: jax.Array
  params: Any
  opt_state: Any
  stats: Any
  key: jax.Array


def make_state(seed=0):
  """A tree with every kind of leaf and node that a run has."""
  keys = jax.random.split(jax.random.key(seed), 3)
  params = {
    'conv': {'kernel': jax.random.normal(keys[0], (16, 24, 32))},
    'dense': {'kernel': jax.random.normal(keys[1], (8, 4), jnp.bfloat16)},
  }
  return TrainState(
    step=jnp.int32(seed),
    params=params,
    opt_state=optax.chain(optax.clip(1.0), optax.adam(1e-3)).init(params),
    stats={
      'active': jnp.arange(8) % 2 == 0,
      'seen': jnp.uint32(2**32 - 1 - seed),
      'extremes': jnp.array([jnp.nan, jnp.inf, -0.0, 1e-45]),
      'list': [jnp.ones((2, 2)), (jnp.int32(3),)],
    },
    key=keys,
  )


def sharding(devices, *spec):
  mesh = jax.make_mesh(
    (devices,),
    ('data',),
    axis_types=(jax.sharding.AxisType.Auto,),
    devices=jax.devices()[:devices],
  )
  return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))


def abstract(state):
  return jax.eval_shape(lambda: state)


def placed(state, target):
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=target), state
  )


def assert_same_bits(actual, expected):
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected)):
    assert x.dtype == y.dtype
    assert x.shape == y.shape
    assert bits(x) == bits(y)


def bits(leaf):
  return np.asarray(digests.plain(leaf)).tobytes()


def save(directory, *steps, keep=3):
  with checkpoint.Checkpoints(directory, keep) as checkpoints:
    for step in steps:
      checkpoints.save(step, make_state(step), {'position': step})


def restore(directory, state=None):
  with checkpoint.Checkpoints(directory) as checkpoints:
    return checkpoints.restore_latest(abstract(state or make_state()))


def steps_in(directory):
  return sorted(
    int(path.name) for path in directory.iterdir() if path.name.isdigit()
  )


def array_file(directory, step):
  """The file with the data of the arrays: the largest one."""
  files = [
    path for path in (directory / str(step)).rglob('*') if path.is_file()
  ]
  return max(files, key=lambda path: path.stat().st_size)


def flip(path):
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)


def truncate(path):
  os.truncate(path, path.stat().st_size // 2)


def contents(directory):
  return {
    path: path.read_bytes() for path in directory.rglob('*') if path.is_file()
  }


def warnings(caplog):
  return [
    record.getMessage()
    for record in caplog.records
    if record.levelno >= logging.converter.STANDARD_WARNING
  ]


@pytest.mark.slow
def test_a_state_comes_back_bit_for_bit(tmp_path):
  state, extra = make_state(7), {'position': [1, 2], 'versions': {'jax': '1'}}
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(7, state, extra)
    restored = checkpoints.restore_latest(abstract(state))
  assert restored.step == 7
  assert restored.extra == extra
  assert_same_bits(restored.state, state)
  # The keys work as keys.
  jax.random.normal(restored.state.key[0])


def test_an_empty_directory_holds_no_checkpoint(tmp_path):
  assert restore(tmp_path / 'new') is None


@pytest.mark.parametrize(('how', 'kept'), [(dict(keep=2), 2), ({}, 3)])
def test_only_the_newest_are_kept(tmp_path, how, kept):
  with checkpoint.Checkpoints(tmp_path, **how) as checkpoints:
    for step in range(1, 6):
      checkpoints.save(step, {'x': jnp.ones(())}, {})
  assert steps_in(tmp_path) == [1, 2, 3, 4, 5][-kept:]


@pytest.mark.slow
def test_a_leaf_is_restored_to_the_sharding_of_its_target(tmp_path):
  state = make_state()
  targets = {
    'single': sharding(1),
    'replicated': sharding(8),
    'sharded': sharding(8, 'data'),
  }
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    for step, name in enumerate(targets):
      source = {'x': jax.device_put(state.params['conv'], targets[name])}
      source['key'] = jax.device_put(
        jax.random.split(state.key[0], 8), targets[name]
      )
      checkpoints.save(step, source, {})
      for target in targets.values():
        restored = checkpoints.restore_latest(placed(source, target))
        assert restored.step == step
        assert_same_bits(restored.state, source)
        expected = jax.device_put(source, target)
        assert jax.tree.map(lambda x: x.sharding, restored.state) == (
          jax.tree.map(lambda x: x.sharding, expected)
        )


@pytest.mark.parametrize('dtype', ['bfloat16', 'bool'])
def test_a_digest_does_not_depend_on_the_devices(dtype):
  x = jax.random.normal(jax.random.key(0), (16, 8)).astype(dtype)
  expected = int(digests.digest(x))
  for placement in (
    sharding(2, 'data'),
    sharding(8),
    sharding(8, 'data'),
    sharding(8, None, 'data'),
  ):
    assert int(digests.digest(jax.device_put(x, placement))) == expected


@pytest.mark.parametrize(
  ('dtype', 'width'),
  [('float32', 32), ('bfloat16', 16), ('float8_e4m3fn', 8), ('uint32', 32)],
)
def test_every_single_bit_changes_the_digest(dtype, width):
  zeros = jnp.zeros((4,), f'uint{width}')
  flipped = [
    zeros.at[i].set(1 << bit) for i in range(4) for bit in range(width)
  ]
  seen = {
    int(digests.digest(jax.lax.bitcast_convert_type(x, dtype)))
    for x in [zeros, *flipped]
  }
  assert len(seen) == 1 + 4 * width


def test_the_digest_sees_an_exchange_of_values():
  # Equal multiples of large powers of two, which linear weights would confuse.
  x = jnp.zeros((1024,)).at[0].set(1.0)
  y = jnp.zeros((1024,)).at[512].set(1.0)
  assert int(digests.digest(x)) != int(digests.digest(y))


def test_a_transposed_matrix_has_another_digest():
  x = jnp.arange(12.0).reshape(3, 4)
  assert int(digests.digest(x)) != int(digests.digest(x.T))
  square = x[:, :3]
  assert int(digests.digest(square)) != int(digests.digest(square.T))
  # It is the order that counts, not the shape.
  assert int(digests.digest(x)) == int(digests.digest(x.reshape(4, 3)))


def test_a_complex_number_is_two_words():
  x = jnp.arange(8.0).reshape(2, 2, 2)
  pairs = jax.lax.complex(x[..., 0], x[..., 1])
  assert int(digests.digest(pairs)) == int(digests.digest(x))


def test_what_is_saved_is_the_state_at_the_call(tmp_path):
  @jax.jit
  def fresh():
    return {'x': jnp.zeros((1 << 20,)), 'key': jax.random.key(0)}

  def step(state):
    return {'x': state['x'] + 1, 'key': jax.random.split(state['key'])[0]}

  step = jax.jit(step, donate_argnums=0)
  state = fresh()
  with checkpoint.Checkpoints(tmp_path, keep=1) as checkpoints:
    for i in range(5):
      saved_key = bits(state['key'])
      checkpoints.save(i, state, {})
      for _ in range(20):
        donated = state['x']
        state = step(state)
      assert donated.is_deleted()
      restored = checkpoints.restore_latest(abstract(state))
      np.testing.assert_array_equal(restored.state['x'], 20.0 * i)
      assert bits(restored.state['key']) == saved_key
      step(restored.state)
      assert restored.state['x'].is_deleted()


def test_saving_is_allowed_where_transfers_are_not(tmp_path):
  state = make_state()
  with (
    checkpoint.Checkpoints(tmp_path) as checkpoints,
    jax.transfer_guard('disallow'),
  ):
    checkpoints.save(1, state, {})
    assert checkpoints.restore_latest(abstract(state)).step == 1


@pytest.mark.parametrize(
  ('damage', 'reason'),
  [
    (flip, 'leaf params/conv/kernel is not what was saved (digest differs)'),
    (truncate, 'unreadable'),
    (pathlib.Path.unlink, 'unreadable'),
  ],
)
def test_damaged_arrays_are_named_and_the_one_before_is_used(
  tmp_path, caplog, damage, reason
):
  save(tmp_path, 100, 200)
  damage(array_file(tmp_path, 200))
  restored = restore(tmp_path)
  assert restored.step == 100
  assert restored.extra == {'position': 100}
  assert_same_bits(restored.state, make_state(100))
  (warning,) = warnings(caplog)
  assert warning.startswith(f'checkpoint of step 200 in {tmp_path}')
  assert 'leaf ' in warning
  assert reason in warning
  assert '\n' not in warning
  assert len(warning) < 600


@pytest.mark.slow
def test_of_damage_nothing_else_is_printed(tmp_path, capfd):
  source = jax.device_put(helpers.large_state(0), sharding(8, 'data'))
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, source, {})
    checkpoints.save(2, source, {})
    checkpoints.wait()
    truncate(array_file(tmp_path, 2))
    capfd.readouterr()
    assert checkpoints.restore_latest(source).step == 1
  gc.collect()  # What was never awaited complains when it is collected.
  lines = ''.join(capfd.readouterr()).splitlines()
  assert all('checkpoint of step 2' in line for line in lines)


@pytest.mark.parametrize('damage', [flip, truncate, pathlib.Path.unlink])
def test_a_damaged_record_is_named_and_the_one_before_is_used(
  tmp_path, caplog, damage
):
  save(tmp_path, 100, 200)
  damage(tmp_path / '200' / 'record' / 'metadata')
  assert restore(tmp_path).step == 100
  (warning,) = warnings(caplog)
  assert 'step 200' in warning
  assert 'its record' in warning


def test_a_changed_number_in_the_record_is_noticed(tmp_path):
  save(tmp_path, 100, 200)
  path = tmp_path / '200' / 'record' / 'metadata'
  text = path.read_text()
  path.write_text(text.replace('"position": 200', '"position": 300'))
  assert restore(tmp_path).step == 100


@pytest.mark.parametrize(
  ('other', 'reason'),
  [
    ({'x': jnp.zeros((3,))}, 'leaf y is not in it'),
    (
      {'x': jnp.zeros((3,)), 'y': jnp.zeros(()), 'z': jnp.zeros(())},
      'leaf z is in it, but not in this run',
    ),
    (
      {'x': jnp.zeros((4,)), 'y': jnp.zeros(())},
      'leaf x is float32 [4] in it, but float32 [3] in this run',
    ),
    (
      {'x': jnp.zeros((3,)), 'y': jnp.zeros((), jnp.int32)},
      'leaf y is int32 [] in it, but float32 [] in this run',
    ),
  ],
)
def test_a_foreign_checkpoint_is_named(tmp_path, caplog, other, reason):
  state = {'x': jnp.zeros((3,)), 'y': jnp.zeros(())}
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, state, {})
    checkpoints.save(2, other, {})
    assert checkpoints.restore_latest(abstract(state)).step == 1
  (warning,) = warnings(caplog)
  assert warning.endswith(f'step 2 in {tmp_path} cannot be used: {reason}')


def test_without_a_usable_checkpoint_all_are_named_and_left_alone(tmp_path):
  save(tmp_path, 100, 200, 300)
  flip(array_file(tmp_path, 100))
  truncate(array_file(tmp_path, 200))
  (tmp_path / '300' / 'record' / 'metadata').unlink()
  before = contents(tmp_path)
  with pytest.raises(ValueError, match='no checkpoint in') as error:
    restore(tmp_path)
  lines = str(error.value).splitlines()
  assert str(tmp_path) in lines[0]
  for line, step in zip(lines[1:4], (300, 200, 100)):
    assert line.startswith(f'  step {step}: ')
  assert 'choose another directory' in lines[4]
  assert contents(tmp_path) == before


def test_after_falling_back_the_damaged_step_is_saved_again(tmp_path):
  save(tmp_path, 100, 200)
  truncate(array_file(tmp_path, 200))
  state = make_state()
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.restore_latest(abstract(state)).step == 100
    checkpoints.save(150, make_state(150), {})
    checkpoints.wait()
    assert steps_in(tmp_path) == [100, 150, 200]
    checkpoints.save(200, make_state(201), {})
  assert steps_in(tmp_path) == [100, 150, 200]
  restored = restore(tmp_path)
  assert restored.step == 200
  assert_same_bits(restored.state, make_state(201))


def test_a_damaged_checkpoint_counts_for_none_that_is_kept(tmp_path):
  save(tmp_path, 100, 200, 300)
  flip(array_file(tmp_path, 200))
  flip(array_file(tmp_path, 300))
  with checkpoint.Checkpoints(tmp_path, keep=2) as checkpoints:
    checkpoints.restore_latest(abstract(make_state()))
    checkpoints.save(150, make_state(150), {})
    checkpoints.wait()
    assert steps_in(tmp_path) == [100, 150, 200, 300]
    # 200 makes way for a later step too, and 100 is no longer among two.
    checkpoints.save(250, make_state(250), {})
  assert steps_in(tmp_path) == [150, 250, 300]


@contextlib.contextmanager
def full_disk():
  """As if the disk were full, for any file beyond 1 MB."""
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def one_leaf():
  # Orbax closes the event loop under further leaves, and that is a warning.
  return {'x': jax.random.normal(jax.random.key(0), (1 << 20,))}


def test_a_disk_without_room_is_noticed_before_it_is_full(
  tmp_path, monkeypatch
):
  usage = shutil.disk_usage(tmp_path)
  state = {'x': jnp.zeros((1 << 20,))}  # 4.2 MB, and one more for the rest.
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, state, {})
    checkpoints.wait()
    for free, fits in ((5_200_000, False), (5_300_000, True)):
      with monkeypatch.context() as patched:
        patched.setattr(
          shutil, 'disk_usage', lambda _, free=free: usage._replace(free=free)
        )
        if fits:
          checkpoints.save(2, state, {})
        else:
          with pytest.raises(
            SaveError, match='5.24 MB are needed and 5.20 are free'
          ):
            checkpoints.save(2, state, {})
          assert not list(tmp_path.glob('2*'))
  assert steps_in(tmp_path) == [1, 2]


@pytest.mark.parametrize('call', ['wait', 'save', 'restore_latest'])
def test_a_failed_save_is_reported_at_the_next_call(tmp_path, call):
  state = one_leaf()
  with checkpoint.Checkpoints(tmp_path, keep=1) as checkpoints:
    checkpoints.save(1, state, {})
    checkpoints.wait()
    arguments = {'save': (3, state, {}), 'restore_latest': (state,)}
    with full_disk():
      checkpoints.save(2, state, {})
      with pytest.raises(
        checkpoint.SaveError, match='step 2 could not be written'
      ):
        getattr(checkpoints, call)(*arguments.get(call, ()))
    # The one before is unharmed, and saving goes on when there is room.
    assert checkpoints.restore_latest(abstract(state)).step == 1
    checkpoints.save(2, state, {})
    assert checkpoints.restore_latest(abstract(state)).step == 2
  assert steps_in(tmp_path) == [2]


def test_a_failed_save_is_reported_at_the_end(tmp_path):
  with (
    full_disk(),
    pytest.raises(SaveError, match='step 1 could not be written'),
    checkpoint.Checkpoints(tmp_path) as checkpoints,
  ):
    checkpoints.save(1, one_leaf(), {})


def test_a_failed_save_does_not_hide_why_the_run_ended(tmp_path, caplog):
  def run():
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
      checkpoints.save(1, one_leaf(), {})
      raise KeyboardInterrupt

  with full_disk(), pytest.raises(KeyboardInterrupt):
    run()
  assert 'step 1 could not be written' in warnings(caplog)[-1]


_SAVES_UNTIL_KILLED = """
import sys
from fliqs_jax.runtime import checkpoint
sys.path.append(sys.argv[1])
from tests import helpers
with checkpoint.Checkpoints(sys.argv[2], keep=2) as checkpoints:
  restored = checkpoints.restore_latest(helpers.large_state(0))
  step = restored.step if restored else 0
  while True:
    step += 1
    checkpoints.save(step, helpers.large_state(step), {'step': step})
"""


@pytest.mark.slow
def test_a_killed_run_leaves_its_last_complete_checkpoint(tmp_path):
  root = pathlib.Path(__file__).parents[2]
  reached = 0
  for _ in range(2):
    process = subprocess.Popen(
      [sys.executable, '-c', _SAVES_UNTIL_KILLED, root, tmp_path],
      cwd=root,
    )
    try:
      # Killed in the middle of a save, after a few that were completed.
      deadline = time.monotonic() + 60
      while max(steps_in(tmp_path), default=0) < reached + 3 or not list(
        tmp_path.glob('*tmp*')
      ):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.001)
    finally:
      process.send_signal(signal.SIGKILL)
      process.wait()
    assert list(tmp_path.glob('*tmp*'))
    reached = max(steps_in(tmp_path))
    restored = restore(tmp_path, helpers.large_state(0))
    assert restored.step == reached
    assert restored.extra == {'step': reached}
    assert_same_bits(restored.state, helpers.large_state(reached))
    assert not list(tmp_path.glob('*tmp*'))


def test_a_step_that_is_not_newer_is_refused(tmp_path):
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(2, make_state(), {})
    for step in (1, 2):
      with pytest.raises(ValueError, match='holds a checkpoint of step 2'):
        checkpoints.save(step, make_state(), {})


@pytest.mark.parametrize(
  ('state', 'extra', 'message'),
  [
    ({'x': 1.0}, {}, 'leaf x of the state is 1.0; only a jax.Array'),
    ({'x': jnp.zeros((0, 2))}, {}, 'only a jax.Array of at least one'),
    ({'a/b': jnp.ones(()), 'a': {'b': jnp.ones(())}}, {}, 'same path'),
    ({'x': jnp.ones(())}, {'position': object()}, 'JSON'),
    ({'x': jnp.ones(())}, {'position': (1, 2)}, 'would be restored as'),
  ],
)
def test_what_would_not_come_back_is_refused(tmp_path, state, extra, message):
  with (
    checkpoint.Checkpoints(tmp_path) as checkpoints,
    pytest.raises(ValueError, match=message),
  ):
    checkpoints.save(1, state, extra)


def test_reading_changes_nothing_and_spares_what_a_live_run_writes(tmp_path):
  save(tmp_path, 100)
  live = tmp_path / f'200{array_files.UNFINISHED}'
  live.mkdir()
  (live / 'being written').write_text('')
  before = helpers.tree_of(tmp_path)
  restored = restoring.restore_latest(tmp_path, abstract(make_state()))
  assert (restored.step, restored.extra) == (100, {'position': 100})
  assert restoring.newest_extra(tmp_path) == {'position': 100}
  assert helpers.tree_of(tmp_path) == before
  # The run itself knows that nobody else writes, and clears it away.
  with checkpoint.Checkpoints(tmp_path):
    assert not live.exists()


def test_a_reader_makes_no_directory(tmp_path):
  path = tmp_path / 'none'
  assert restoring.restore_latest(path, abstract(make_state())) is None
  assert restoring.newest_extra(path) is None
  assert not path.exists()


def test_a_reader_follows_a_run_that_saves_and_deletes(tmp_path, monkeypatch):
  save(tmp_path, 100)
  read = array_files.read_arrays

  def overtaken(directory, targets):
    monkeypatch.setattr(array_files, 'read_arrays', read)
    with checkpoint.Checkpoints(tmp_path, keep=1) as checkpoints:
      checkpoints.save(200, make_state(200), {})
    assert steps_in(tmp_path) == [200]
    return read(directory, targets)

  monkeypatch.setattr(array_files, 'read_arrays', overtaken)
  restored = restoring.restore_latest(tmp_path, abstract(make_state()))
  assert restored.step == 200


def test_the_newest_undamaged_record_is_read(tmp_path):
  save(tmp_path, 100, 200)
  flip(tmp_path / '200' / 'record' / 'metadata')
  assert restoring.newest_extra(tmp_path) == {'position': 100}


def test_a_checkpoint_is_on_the_disk_before_the_one_before_goes(
  tmp_path, monkeypatch
):
  synced, seen, sync = set(), [], os.fsync

  def record(descriptor):
    synced.add(os.fstat(descriptor).st_ino)
    sync(descriptor)

  def delete(path):
    seen.append(path.name)
    kept = (tmp_path, tmp_path / '2', *(tmp_path / '2').rglob('*'))
    assert len(kept) > 10
    for path in kept:
      assert path.stat().st_ino in synced, path

  monkeypatch.setattr(os, 'fsync', record)
  monkeypatch.setattr(shutil, 'rmtree', delete)
  save(tmp_path, 1, 2, keep=1)
  # Deleted under another name: a kill must not leave a part of a checkpoint.
  assert seen == [f'1{array_files.UNFINISHED}-deleted']
  assert steps_in(tmp_path) == [2]


def test_a_disk_that_fails_at_the_last_moment_deletes_nothing(
  tmp_path, monkeypatch
):
  def fail(descriptor):
    raise OSError(errno.EIO, 'Input/output error')

  save(tmp_path, 1, keep=1)
  with checkpoint.Checkpoints(tmp_path, keep=1) as checkpoints:
    checkpoints.save(2, make_state(2), {})
    monkeypatch.setattr(os, 'fsync', fail)
    with pytest.raises(
      checkpoint.SaveError, match='step 2 could .*output error'
    ):
      checkpoints.wait()
  assert steps_in(tmp_path) == [1, 2]


@pytest.mark.parametrize(
  'name', ['run [x]', 'a*', 'what?', 'back\\slash', 'gs:', 'latin-\udce9']
)
def test_a_path_that_could_not_be_restored_is_refused(tmp_path, name):
  with pytest.raises(ValueError, match='choose another local directory') as why:
    checkpoint.Checkpoints(tmp_path / name / 'checkpoints')
  assert repr(str(tmp_path / name / 'checkpoints')) in str(why.value)
  assert not (tmp_path / name).exists()


@pytest.mark.parametrize(
  'name', ['a b', "%20 #1 {x},y;'$&", 'été 日', '~', ']']
)
def test_paths_of_other_characters_are_restored(tmp_path, name):
  save(tmp_path / name, 100)
  assert restore(tmp_path / name).step == 100


def test_a_directory_that_cannot_be_written_is_named(tmp_path):
  (tmp_path / 'file').write_text('')
  path = tmp_path / 'file' / 'checkpoints'
  with pytest.raises(ValueError, match=f'{path} cannot be written'):
    checkpoint.Checkpoints(path)


def test_keep_must_be_positive(tmp_path):
  with pytest.raises(ValueError, match='keep=0'):
    checkpoint.Checkpoints(tmp_path, keep=0)
