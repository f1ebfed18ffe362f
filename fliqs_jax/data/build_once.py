"""Builds a large directory once: whole or not at all, by one process."""

from collections.abc import Iterator
import contextlib
import fcntl
import os
import pathlib


@contextlib.contextmanager
def directory(path: pathlib.Path) -> Iterator[pathlib.Path | None]:
  """Yields where to write what becomes `path` when the block ends well.

  A second process waits for the first, and finds `path` made. A kill or an
  error leaves the unfinished directory, PATH.incomplete, and the next start is
  given it again, so that nothing piles up and work may be kept.

  Args:
    path: the directory to make.

  Yields:
    The unfinished directory; None if `path` is there.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  # The system frees the lock with the process, whatever kills it.
  with path.with_name(f'.{path.name}.lock').open('w') as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    if path.exists():
      yield None
      return
    unfinished = path.with_name(f'{path.name}.incomplete')
    unfinished.mkdir(exist_ok=True)
    yield unfinished
    os.rename(unfinished, path)
