import errno
import os
import pathlib
import subprocess
import sys

import pytest

from fliqs_jax.runtime import checkpoint
from fliqs_jax.runtime import commands
from fliqs_jax.runtime import files

_ROOT = pathlib.Path(__file__).parents[2]


def _of_system(number, name=None):
  return OSError(number, os.strerror(number), name)


@pytest.mark.parametrize(
  ('error', 'line', 'status'),
  [
    (ValueError('x=1 must be\n  2'), 'x=1 must be 2', 2),
    (FileNotFoundError('arch.json is missing'), 'arch.json is missing', 2),
    (
      _of_system(errno.ENOSPC, '/d/f'),
      "[Errno 28] No space left on device: '/d/f'; free some space and start "
      'the same command again',
      2,
    ),
    (
      _of_system(errno.EACCES, '/d/f'),
      "[Errno 13] Permission denied: '/d/f'; choose a place that can be read "
      'and written',
      2,
    ),
    # TensorStore's words for it.
    (
      checkpoint.SaveError('step 10: Failed: No space left on device.'),
      'step 10: Failed: No space left on device; free some space and start the '
      'same command again',
      2,
    ),
    # A file server may answer the next time, so launchers start it again.
    (_of_system(errno.EIO), '[Errno 5] Input/output error', 1),
    (_of_system(errno.ESTALE), '[Errno 116] Stale file handle', 1),
    (checkpoint.SaveError('step 10: timed out'), 'step 10: timed out', 1),
  ],
)
def test_an_error_is_a_line_with_its_remedy_and_a_status(error, line, status):
  assert commands.line(error) == line
  assert commands.status(error) == status


def test_a_file_that_is_a_directory_is_named_once(tmp_path):
  (tmp_path / 'a').mkdir()
  with pytest.raises(IsADirectoryError) as caught:
    files.write_bytes(tmp_path / 'a', b'')
  assert commands.line(caught.value) == (
    f"[Errno 21] Is a directory: '{tmp_path / 'a'}'; check the path"
  )


def test_a_command_ends_with_the_line_and_the_status(capsys):
  @commands.reported
  def full(argv):
    raise _of_system(errno.ENOSPC, argv[0])

  assert full(['/d/f']) == 2
  out, line = capsys.readouterr()
  assert (out, line.count('\n')) == ('', 1)
  assert "No space left on device: '/d/f'; free some space" in line


def test_a_path_at_home_is_whole_also_behind_an_equals_sign(monkeypatch):
  monkeypatch.setenv('HOME', '/h')
  as_given = ['gs://b/~', '--config.data.data_dir=~/d', '--x=a~', './~', '--f']
  given = ['~/a', '--out=~/b/c', '--config=~/c.py:arch=~', *as_given]
  seen = []
  assert commands.reported(lambda argv: seen.extend(argv) or 0)(given) == 0
  assert seen == ['/h/a', '--out=/h/b/c', '--config=/h/c.py:arch=~', *as_given]


def test_a_user_without_a_home_is_told(monkeypatch, capsys):
  # It returns the path as it is if neither HOME nor the system knows the user.
  monkeypatch.setattr(os.path, 'expanduser', lambda path: path)
  assert commands.reported(lambda argv: 0)(['--out=~/a']) == 2
  line = capsys.readouterr().err
  assert line.startswith("'~/a': Could not determine home directory. Write the")
  assert line.count('\n') == 1


def test_errors_of_our_own_are_not_hidden():
  @commands.reported
  def wrong(argv):
    assert argv

  with pytest.raises(AssertionError):
    wrong([])


@pytest.mark.parametrize(
  ('limit', 'line'),
  [
    # No file may grow at all; none beyond a kilobyte.
    (0, "config.json'; allow larger files"),
    (1, "config.json'; allow larger files"),
  ],
)
def test_a_run_that_cannot_write_ends_with_a_line(tmp_path, limit, line):
  done = subprocess.run(
    [
      'bash',
      '-c',
      f'ulimit -f {limit}; exec "$0" -m fliqs_jax.main "$@"',
      sys.executable,
      '--config=tests/tiny.py',
      '--workdir=~/run',
    ],
    cwd=_ROOT,
    capture_output=True,
    text=True,
    env={
      **os.environ,
      'JAX_PLATFORMS': 'cpu',
      'HOME': str(tmp_path),
      # The digits are prepared there.
      'XDG_CACHE_HOME': str(files.user_cache().expanduser().parent),
    },
    check=False,
  )
  assert done.returncode == 2
  assert 'Traceback' not in done.stderr
  assert f'{tmp_path}/run/{line}' in done.stderr.splitlines()[-1]


def test_a_terminal_that_knows_ascii_only_is_served():
  program = (
    'from fliqs_jax.runtime import commands\n'
    "commands.run(lambda argv: print('1 \\u00b1 2', *argv))"
  )
  done = subprocess.run(
    [sys.executable, '-c', program, 'argument'],
    capture_output=True,
    env={**os.environ, 'PYTHONIOENCODING': 'ascii'},
    check=True,
  )
  assert done.stdout == b'1 \\xb1 2 argument\n'


def test_ctrl_c_ends_a_command_without_a_traceback():
  program = (
    'import os, signal\n'
    'from fliqs_jax.runtime import commands\n'
    'commands.run(lambda argv: os.kill(os.getpid(), signal.SIGINT))'
  )
  done = subprocess.run(
    [sys.executable, '-c', program], capture_output=True, check=False
  )
  assert (done.returncode, done.stderr) == (-2, b'')
