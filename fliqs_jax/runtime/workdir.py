"""A run's workdir: the names of its files and folders, and the lock on it.

A sweep's folder holds the workdirs of its runs and three more files. A workdir
has one user at a time. The system keeps the lock and releases it when the
process ends, also by `kill -9`. The lock's file stays: whoever deleted it could
lock another file of that name.
"""

from collections.abc import Iterator
import contextlib
import fcntl
import logging
import os
import pathlib
import socket
import time
from typing import TextIO

# The config of the run; written before its first step.
CONFIG = 'config.json'
# The resulting architecture: formats and sizes of each layer.
ARCH = 'arch.json'
# The measurements of it. A run that has this file is finished: it is written
# last.
RESULT = 'result.json'
# The scores of every option, if they were measured; SENSITIVITY_FIGURE is the
# picture of them.
SENSITIVITY = 'sensitivity.json'
SENSITIVITY_FIGURE = 'sensitivity.png'
# Some test pictures, if the network makes pictures: what goes in, what comes
# out, and what should.
PICTURES = 'pictures.npz'
# A row of averaged metrics for each logging point.
HISTORY = 'history.jsonl'
# The workdir of the same network trained from the beginning.
RETRAINED = 'retrained'
REPORT = 'report.html'
CHECKPOINTS = 'checkpoints'
# A folder with one JSON file per process: its step and the time.
HEARTBEAT = 'heartbeat'
# Says which process uses the workdir, which holds a lock on this file.
LOCK = '.lock'
# A folder with the profile of chosen steps, for TensorBoard.
PROFILE = 'profile'

SWEEP_RESULT = 'sweep.json'
SWEEP_PAGE = 'sweep.html'
SWEEP_FIGURE = 'pareto.png'

# A comparison's folder: what its runs share, and its results.
COMPARISON_PLAN = 'plan.json'
COMPARISON_RESULT = 'compare.json'
COMPARISON_PAGE = 'compare.html'
COMPARISON_FIGURE = 'compare.png'
# In the workdir of a run: the architecture that it was given.
ASSIGNED = 'assigned.json'

_LOG = logging.getLogger(__name__)

# A file server notices that a machine is gone after 90 s (NFSv4's usual lease).
_LEASE = 120


def reference(name: str) -> str:
  """Returns the folder of a network beside the found one.

  Args:
    name: `retrained`, or the format of a uniform network.
  """
  return name if name == RETRAINED else f'uniform_{name}'


@contextlib.contextmanager
def held(directory: str | os.PathLike[str]) -> Iterator[None]:
  """Holds the lock of a directory; only one process of a run may ask for it.

  If a process of another machine holds it, which may have crashed together with
  that machine, this waits until a file server must have noticed it. On a file
  system without locks it warns and goes on.

  Args:
    directory: path of the directory, which exists.

  Raises:
    ValueError: another process holds the lock, or the directory cannot be
      written.
  """
  path = pathlib.Path(directory, LOCK)
  try:
    file = path.open('a+', encoding='utf-8')
  except OSError as error:
    raise ValueError(
      f'{directory} cannot be written: {error}; choose another directory'
    ) from None
  with file:
    began = time.monotonic()
    while not _locked(file):
      file.seek(0)
      user = file.read() or 'another process'
      is_here = user.endswith(_here())
      if is_here or time.monotonic() - began > _LEASE:
        raise ValueError(
          f'{directory} is in use by {user}: two runs would mix their files. '
          'Wait for that one, end it, or choose another directory'
        )
      _LOG.info('waiting: %s is in use by %s', directory, user)
      time.sleep(_LEASE / 8)
    # The text is for a message, which a full disk may do without.
    with contextlib.suppress(OSError):
      os.ftruncate(file.fileno(), 0)
      os.write(file.fileno(), f'process {os.getpid()}{_here()}'.encode())
    yield


def _here() -> str:
  return f' on {socket.gethostname()}'


def _locked(file: TextIO) -> bool:
  """Returns whether this process has the lock now."""
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    return False
  except OSError as error:  # Such as ENOLCK or ENOTSUP.
    _LOG.warning(
      '%s cannot be locked (%s): do not start a second run there',
      file.name,
      error.strerror,
    )
  return True
