import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys

import pytest

from fliqs_jax.runtime import workdir as workdir_lib

_HOLDS = """
import sys, time
from fliqs_jax.runtime import workdir as workdir_lib
with workdir_lib.held(sys.argv[1]):
  print('held', flush=True)
  time.sleep(600)
"""


def test_a_directory_has_one_user_until_that_is_killed(tmp_path):
  with subprocess.Popen(
    [sys.executable, '-c', _HOLDS, tmp_path], stdout=subprocess.PIPE, text=True
  ) as other:
    assert other.stdout.readline() == 'held\n'
    user = f'process {other.pid} on {socket.gethostname()}'
    with (
      pytest.raises(ValueError, match=f'in use by {user}: .*choose another'),
      workdir_lib.held(tmp_path),
    ):
      pass
    other.send_signal(signal.SIGKILL)
  with workdir_lib.held(tmp_path):
    assert f'process {os.getpid()} on' in (tmp_path / '.lock').read_text()
  with workdir_lib.held(tmp_path):  # And once more, by the same process.
    pass


def test_a_lock_ends_with_an_error(tmp_path):
  with pytest.raises(KeyError), workdir_lib.held(tmp_path):
    raise KeyError
  with workdir_lib.held(tmp_path):
    pass


@pytest.mark.parametrize('comes_back', [True, False])
def test_a_user_on_another_machine_may_be_gone(
  tmp_path, monkeypatch, comes_back
):
  """The file server keeps the lock of a crashed machine for a while."""
  clock, tries = [0.0], []

  def lock(file, how):
    tries.append(clock[0])
    if comes_back or clock[0] < 90:
      raise BlockingIOError

  (tmp_path / '.lock').write_text('process 1 on some-other-machine')
  monkeypatch.setattr(fcntl, 'flock', lock)
  monkeypatch.setattr(workdir_lib.time, 'monotonic', lambda: clock[0])
  monkeypatch.setattr(
    workdir_lib.time, 'sleep', lambda s: clock.__setitem__(0, clock[0] + s)
  )
  if comes_back:
    with pytest.raises(ValueError, match='in use by process 1 on some-other'):
      workdir_lib.held(tmp_path).__enter__()
    # NFSv4 grants it after 90 s.
    assert tries[-1] > 120
  else:
    with workdir_lib.held(tmp_path):
      assert 90 <= tries[-1] <= 120


def test_a_file_system_without_locks_is_warned_of(
  tmp_path, monkeypatch, caplog
):
  def no_locks(*_):
    raise OSError(errno.ENOLCK, 'No locks available')

  monkeypatch.setattr(fcntl, 'flock', no_locks)
  with workdir_lib.held(tmp_path):
    pass
  assert 'No locks available' in caplog.text


def test_a_directory_that_cannot_be_written_is_named(tmp_path):
  with (
    pytest.raises(ValueError, match='none cannot be written'),
    workdir_lib.held(tmp_path / 'none'),
  ):
    pass
