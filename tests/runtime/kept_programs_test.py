"""Compiled programs that are kept for later starts."""

import os
import pathlib
import subprocess
import sys

import jax
import pytest

from fliqs_jax.runtime import devices

# Prints what the compiled program returned, and how often it was on the disk.
_PROGRAM = """
import sys
import jax
import jax.numpy as jnp
from fliqs_jax.runtime import devices
hits = []
jax.monitoring.register_event_listener(
  lambda event, **_: hits.append(1) if event.endswith('/cache_hits') else None
)
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
devices.keep_compiled(*sys.argv[1:])
x = jnp.arange(8.0)
hits.clear()
print(jax.jit(lambda x: jnp.sum(jnp.sin(x) * x))(x), len(hits))
"""


def _start(home, *args):
  env = {k: v for k, v in os.environ.items() if 'CACHE' not in k}
  return subprocess.Popen(
    [sys.executable, '-W', 'error', '-c', _PROGRAM, *args],
    env={**env, 'XDG_CACHE_HOME': str(home)},
    stdout=subprocess.PIPE,
    text=True,
  )


def _printed(process):
  out, _ = process.communicate()
  assert process.returncode == 0
  return out.split()


def test_two_runs_share_programs_and_a_third_loads_them(tmp_path):
  both = [_start(tmp_path), _start(tmp_path)]
  (value, _), (other, _) = map(_printed, both)
  assert value == other
  folder = tmp_path / 'fliqs_jax' / 'compiled'
  assert folder.stat().st_mode & 0o777 == 0o700
  # A process that was killed while it wrote leaves half a program, no time.
  programs = list(folder.glob('*-cache'))
  damaged = max(programs, key=lambda path: path.stat().st_size)
  whole = damaged.read_bytes()
  damaged.write_bytes(whole[:100])
  time = damaged.with_name(damaged.name.removesuffix('cache') + 'atime')
  time.unlink()
  assert _printed(_start(tmp_path))[0] == value
  assert damaged.stat().st_size > 100
  assert time.exists()
  assert _printed(_start(tmp_path)) == [value, '1']
  # An empty flag keeps nothing and reads nothing.
  assert _printed(_start(tmp_path, '')) == [value, '0']


def test_what_jax_was_told_stays(tmp_path, monkeypatch):
  before = jax.config.jax_compilation_cache_dir
  assert before  # Of conftest.py.
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  devices.keep_compiled()
  assert jax.config.jax_compilation_cache_dir == before
  assert not list(tmp_path.iterdir())


def test_a_directory_that_cannot_be_used_is_refused(tmp_path):
  (tmp_path / 'file').touch()
  with pytest.raises(ValueError, match=r"--compilation_cache=.*''"):
    devices.keep_compiled(str(tmp_path / 'file' / 'below'))
  with pytest.raises(ValueError, match='--compilation_cache=gs://bucket/x is'):
    devices.keep_compiled('gs://bucket/x')
  assert not pathlib.Path('gs:').exists()


def test_a_user_without_a_home_keeps_nothing_and_is_told(monkeypatch, caplog):
  def expanduser(path):
    raise RuntimeError('Could not determine home directory.')

  before = jax.config.jax_compilation_cache_dir
  jax.config.update('jax_compilation_cache_dir', None)
  try:
    monkeypatch.setattr(pathlib.Path, 'expanduser', expanduser)
    devices.keep_compiled()
    assert jax.config.jax_compilation_cache_dir is None
  finally:
    jax.config.update('jax_compilation_cache_dir', before)
  assert 'not kept: Could not determine home directory' in caplog.text
