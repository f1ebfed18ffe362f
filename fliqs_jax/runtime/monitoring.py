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
  """Replaces `heartbeat/PROCESS.json` with the step and the time.

  The file holds `step`, `time` in seconds since 1970, and `pid`, the number
  that the operating system gave to the process.

  Args:
    workdir: the run's directory.
    step: number of steps that this process has completed.
  """
  path = (
    pathlib.Path(workdir) / workdir_lib.HEARTBEAT / f'{processes.index()}.json'
  )
  path.parent.mkdir(exist_ok=True)
  files.write_json(path, dict(step=step, time=time.time(), pid=os.getpid()))


class Trace:
  """A profile of some steps of the first process, for TensorBoard."""

  def __init__(
    self, steps: str, run_steps: int, directory: str | os.PathLike[str]
  ):
    """Parses the range of steps.

    Args:
      steps: `N:M` for the steps N to M - 1, counted from 0; '' for none.
      run_steps: the number of steps of the run.
      directory: the directory in which the first process writes the profile.

    Raises:
      ValueError: `steps` is something else, or a step is not in the run.
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
    """Starts the profile if `step` is its first one."""
    if step == self._first and processes.index() == 0:
      jax.profiler.start_trace(self._directory)
      self._is_on = True

  def after(self, step: int, result: Any) -> None:
    """Ends the profile if `step` is its last one.

    Args:
      step: number of the step, from 0.
      result: pytree of arrays that the step returned; the profile ends when
        they are computed.
    """
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
