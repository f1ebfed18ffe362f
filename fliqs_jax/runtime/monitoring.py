"""Monitoring of a run from outside: heartbeats, and a profile of steps."""

import os
import pathlib
import re
import time
from typing import Any

import jax

from fliqs_jax.runtime import files
from fliqs_jax.runtime import processes
from fliqs_jax.runtime import workdir as workdir_lib


def heartbeat(workdir: str | os.PathLike[str], step: int) -> None:
  """Replaces `heartbeat/PROCESS.json`: how far this process is, and when.

  `time` is in seconds since 1970, `pid` the operating system's number.
  """
  path = (
    pathlib.Path(workdir) / workdir_lib.HEARTBEAT / f'{processes.index()}.json'
  )
  path.parent.mkdir(exist_ok=True)
  files.write_json(path, dict(step=step, time=time.time(), pid=os.getpid()))


class Trace:
  """A profile of a run's steps, for TensorBoard's profiler; of one process."""

  def __init__(
    self, steps: str, run_steps: int, directory: str | os.PathLike[str]
  ):
    """Reads which steps.

    Args:
      steps: `N:M`, from step N, counted from 0, to before step M; '' for none.
      run_steps: of the run.
      directory: where the first process leaves it.

    Raises:
      ValueError: it is something else, or beyond the run.
    """
    self._directory, self._is_on = str(directory), False
    self._first, self._end = -1, -1
    if match := re.fullmatch(r'(\d+):(\d+)', steps):
      self._first, self._end = map(int, match.groups())
    if steps and not 0 <= self._first < self._end <= run_steps:
      raise ValueError(
        f'profile_steps={steps!r} must be N:M with N below M, steps of the run '
        f'counted from 0; it has {run_steps}'
      )

  def before(self, step: int) -> None:
    """Starts the profile if it starts with this step."""
    if step == self._first and processes.index() == 0:
      jax.profiler.start_trace(self._directory)
      self._is_on = True

  def after(self, step: int, result: Any) -> None:
    """Ends the profile if it ends with this step; waits for its result."""
    if self._is_on and step + 1 == self._end:
      jax.block_until_ready(result)
      self._stop()

  def __enter__(self) -> 'Trace':
    return self

  def __exit__(self, *_) -> None:
    if self._is_on:
      self._stop()

  def _stop(self) -> None:
    jax.profiler.stop_trace()
    self._is_on = False
