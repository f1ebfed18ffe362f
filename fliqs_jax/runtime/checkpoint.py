"""Checkpoints: a run's state saved, restored, and checked for damage.

Three things are added to what `array_files` does. Every leaf is stored with a
digest of its bits, because Orbax restores a flipped byte without an error. If a
checkpoint cannot be used, a warning names it and the next older one is used. An
older checkpoint is deleted only when a newer one would survive a power cut.
"""

from collections.abc import Mapping
import errno
import json
import logging
import os
import pathlib
import shutil
from typing import Any

import jax

from fliqs_jax.runtime import array_files
from fliqs_jax.runtime import digests
from fliqs_jax.runtime import files
from fliqs_jax.runtime import processes
from fliqs_jax.runtime import restoring

_LOG = logging.getLogger(__name__)

# Space in bytes for what a checkpoint holds beside its arrays.
_SLACK = 1 << 20


class SaveError(RuntimeError):
  """A checkpoint could not be written; earlier ones are unharmed."""


class Checkpoints:
  """The checkpoints of one run, in one directory.

  Invariants:
    * A kill or a power cut at any moment leaves every complete checkpoint
      unchanged. An incomplete one has another name.
    * `save` stores the values at the time of the call: the arrays may be
      donated or overwritten as soon as it returns.
    * `restore_latest` deletes nothing. `wait` deletes all but the newest
      `keep`, after the new one is on the disk. `save` deletes a checkpoint that
      `restore_latest` could not use, once its step is reached again.
    * Steps increase strictly; unusable checkpoints do not count.

  Only one run may use a directory at a time (`workdir_lib.held`): it deletes
  incomplete checkpoints as the remains of a killed run. All processes of a run
  use the directory together and call the methods in the same order. Who only
  reads calls `restoring.restore_latest`.
  """

  def __init__(self, directory: str | os.PathLike[str], keep: int = 3):
    """Opens the directory, and creates it if it does not exist.

    Args:
      directory: a directory for checkpoints only, with space for `keep` + 1.
      keep: the number of complete checkpoints to keep, at least 1.

    Raises:
      ValueError: `keep` is not positive, or the directory is not writable.
    """
    if keep < 1:
      raise ValueError(f'keep={keep} must be at least 1')
    self._directory = pathlib.Path(directory).absolute()
    self._keep = keep
    with processes.together():
      _prepare(self._directory)
    self._unusable: dict[int, str] = {}  # Reason by step.
    self._saving: int | None = None  # Step of the save in progress.
    self._writer = array_files.Writer()

  def save(self, step: int, state: Any, extra: Mapping[str, Any]) -> None:
    """Starts to save; waits for the previous save and for `state` itself.

    Args:
      step: number of the step, greater than that of every usable checkpoint in
        the directory.
      state: pytree of `jax.Array`; typed keys are allowed, empty arrays are
        not.
      extra: plain JSON values with string keys, which are restored unchanged.

    Raises:
      ValueError: an argument is not as described.
      SaveError: this save or the previous one failed.
    """
    self.wait()
    self._check_step(step)
    leaves = _checked_leaves(state)
    # These transfers are intended; the training loop may be under a guard.
    with jax.transfer_guard('allow'):
      digest_of = digests.digests(leaves)
      record = {
        'leaves': {
          name: [digests.describe(leaf), digest_of[name]]
          for name, leaf in leaves.items()
        },
        'extra': _checked_json(extra),
      }
      self._saving = step
      try:
        self._check_space(leaves)
        for damaged in sorted(self._unusable):
          if damaged <= step:
            self._delete(damaged)
            del self._unusable[damaged]
            _LOG.info('deleted the unusable checkpoint of step %d', damaged)
        self._writer.start(
          self._path(step),
          {name: digests.plain(leaf) for name, leaf in leaves.items()},
          {'crc32': restoring.crc32(record), **record},
        )
      except Exception as error:
        raise self._failed(error) from error

  def wait(self) -> None:
    """Returns when a save in progress, if any, is complete.

    Raises:
      SaveError: the save failed; earlier checkpoints are unchanged.
    """
    if self._saving is None:
      return
    try:
      self._writer.wait()
      if processes.index() == 0:
        files.sync_tree(self._path(self._saving))
        files.sync(self._directory)
    except Exception as error:
      raise self._failed(error) from error
    self._saving = None
    for step in self._usable()[: -self._keep]:
      self._delete(step)

  def restore_latest(self, abstract_state: Any) -> restoring.Restored | None:
    """Restores the newest checkpoint that is undamaged and fits.

    Args and errors are those of `restoring.restore_latest`.
    """
    self.wait()
    # If the caller continues after an error, `save` must delete nothing.
    self._unusable = {}
    restored, self._unusable = restoring.newest_usable(
      self._directory, abstract_state
    )
    return restored

  def close(self) -> None:
    """Waits for a save in progress and releases Orbax's threads.

    Raises:
      SaveError: that save failed.
    """
    try:
      self.wait()
    finally:
      self._writer.close()

  def __enter__(self) -> 'Checkpoints':
    return self

  def __exit__(self, exception_type, *_) -> None:
    try:
      self.close()
    except SaveError as error:
      if exception_type is None:
        raise
      # The exception that ended the run matters more.
      _LOG.error('%s', error)

  def _path(self, step: int) -> pathlib.Path:
    return self._directory / str(step)

  def _usable(self) -> list[int]:
    steps = restoring.steps_in(self._directory)
    return [step for step in steps if step not in self._unusable]

  def _delete(self, step: int) -> None:
    if processes.index() == 0:
      # A kill must not leave half of a checkpoint under the name of a whole.
      doomed = self._directory / f'{step}{array_files.UNFINISHED}-deleted'
      self._path(step).rename(doomed)
      shutil.rmtree(doomed)

  def _check_step(self, step: int) -> None:
    usable = self._usable()
    if usable and step <= usable[-1]:
      raise ValueError(
        f'step {step} cannot be saved to {self._directory}, which holds a '
        f'checkpoint of step {usable[-1]}: restore that one first, or choose '
        'another directory'
      )

  def _check_space(self, leaves: Mapping[str, jax.Array]) -> None:
    # Orbax would find it out in the middle, with a page of messages.
    needed = sum(leaf.nbytes for leaf in leaves.values()) + _SLACK
    free = shutil.disk_usage(self._directory).free
    if free < needed:
      raise OSError(
        errno.ENOSPC,
        f'{os.strerror(errno.ENOSPC)}: {needed / 1e6:.2f} MB are needed and '
        f'{free / 1e6:.2f} are free',
      )

  def _failed(self, error: Exception) -> SaveError:
    step, self._saving = self._saving, None
    return SaveError(
      f'the checkpoint of step {step} could not be written to '
      f'{self._directory}: {array_files.one_line(error)}. Earlier checkpoints '
      'are unharmed.'
    )


def _prepare(directory: pathlib.Path) -> None:
  """Makes the directory, and clears away what a killed run left in it.

  Raises:
    ValueError: it cannot be written, or not be read again.
  """
  array_files.check_path(directory)
  try:
    directory.mkdir(parents=True, exist_ok=True)
    probe = directory / f'.probe{processes.index()}'
    probe.write_bytes(b'')
    probe.unlink(missing_ok=True)
    if processes.index() == 0:
      for path in directory.iterdir():
        if array_files.UNFINISHED in path.name:
          shutil.rmtree(path)
  except OSError as error:
    raise ValueError(
      f'checkpoint directory {directory} cannot be written: {error}'
    ) from error


def _checked_leaves(state: Any) -> dict[str, jax.Array]:
  leaves = digests.named_leaves(state)
  for name, leaf in leaves.items():
    # Orbax saves no empty arrays, and restores a Python number as an array.
    if not isinstance(leaf, jax.Array) or not leaf.size:
      raise ValueError(
        f'leaf {name} of the state is {leaf!r}; only a jax.Array of at least '
        'one element can be saved'
      )
  return leaves


def _checked_json(extra: Mapping[str, Any]) -> dict[str, Any]:
  try:
    copy = json.loads(json.dumps(extra, allow_nan=False))
  except (TypeError, ValueError) as error:
    raise ValueError(f'extra={extra} cannot be written as JSON') from error
  if copy != extra:
    raise ValueError(f'extra={extra} would be restored as {copy}')
  return copy
