"""Builds a large directory once, by one process, completely or not at all."""

from collections.abc import Iterator
import contextlib
import fcntl
import os
import pathlib


@contextlib.contextmanager
def directory(path: pathlib.Path) -> Iterator[pathlib.Path | None]:
  """Yields a directory to fill, which is renamed to `path` after the block.

  A second process waits until the first has made `path`. A kill or an error
  leaves the unfinished directory, PATH.incomplete; the next call yields it
  again, so that unfinished directories do not accumulate and work can be kept.

  Args:
    path: the directory to make.

  Yields:
    The unfinished directory; None if `path` exists.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  # The system releases the lock when the process ends, however it ends.
  with path.with_name(f'.{path.name}.lock').open('w') as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    if path.exists():
      yield None
      return
    unfinished = path.with_name(f'{path.name}.incomplete')
    unfinished.mkdir(exist_ok=True)
    yield unfinished
    os.rename(unfinished, path)
