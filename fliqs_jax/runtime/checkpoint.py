"""Checkpoints: a run's state saved, restored, and checked for damage.

Orbax writes the arrays. This module adds three things. Every leaf is stored
with a digest of its bits, because Orbax restores a flipped byte without an
error. If a checkpoint cannot be used, a warning names it and the next older one
is used. A damaged checkpoint is deleted when training reaches its step again.
"""

import asyncio
from collections.abc import Mapping
import json
import logging
import os
import pathlib
import re
from typing import Any, NamedTuple
import zlib

from etils import epath
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from fliqs_jax.runtime import digests
from fliqs_jax.runtime import processes

_LOG = logging.getLogger(__name__)


class Restored(NamedTuple):
  """A restored checkpoint.

  Attributes:
    step: the step at which it was saved.
    state: the pytree of arrays, with the structure that was asked for.
    extra: the JSON values that were saved with it.
  """

  step: int
  state: Any
  extra: dict[str, Any]


class Checkpoints:
  """The checkpoints of one run, in one directory.

  Invariants:
    * A kill at any moment leaves every complete checkpoint unchanged. An
      incomplete one has another name.
    * `save` stores the values at the time of the call: the arrays may be
      donated or overwritten as soon as it returns.
    * `restore_latest` deletes nothing. After a new checkpoint is complete,
      `save` deletes all but the newest `keep`. It also deletes a checkpoint
      that `restore_latest` could not use, once its step is reached again.
    * Steps increase strictly; unusable checkpoints do not count.

  Only one run may use a directory at a time: it deletes incomplete checkpoints
  as the remains of a killed run. All processes of a run use the directory
  together and call the methods in the same order.
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
    self._directory = epath.Path(directory).absolute()
    with processes.together():
      _check_writable(self._directory)
    self._unusable: dict[int, str] = {}  # Reason by step.
    self._saving: int | None = None  # Step of the last save.
    arrays = ocp.type_handlers.create_type_handler_registry(
      (jax.Array, _LeafByLeaf())
    )
    self._manager = _Manager(
      self._directory,
      options=ocp.CheckpointManagerOptions(
        preservation_policy=_NewestUsable(keep, self._unusable),
        cleanup_tmp_directories=True,
      ),
      item_handlers={
        'state': ocp.PyTreeCheckpointHandler(type_handler_registry=arrays),
        'record': ocp.JsonCheckpointHandler(),
      },
    )

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
      RuntimeError: this save or the previous one failed.
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
        for damaged in sorted(self._unusable):
          if damaged <= step:
            self._manager.delete(damaged)
            del self._unusable[damaged]
            _LOG.info('deleted the unusable checkpoint of step %d', damaged)
        self._manager.save(
          step,
          args=ocp.args.Composite(
            state=ocp.args.PyTreeSave(
              {name: digests.plain(leaf) for name, leaf in leaves.items()}
            ),
            record=ocp.args.JsonSave({'crc32': _crc32(record), **record}),
          ),
          # Else Orbax would skip a step below that of a damaged checkpoint.
          force=True,
        )
      except Exception as error:
        raise self._failed(error) from error

  def wait(self) -> None:
    """Returns when a save in progress, if any, is complete.

    Raises:
      RuntimeError: the save failed; earlier checkpoints are unchanged.
    """
    try:
      self._manager.wait_until_finished()
    except Exception as error:
      # The checkpoints that Orbax would have deleted after this save still
      # exist; it must list them again.
      self._manager.reload()
      raise self._failed(error) from error

  def restore_latest(self, abstract_state: Any) -> Restored | None:
    """Restores the newest checkpoint that is undamaged and fits.

    A warning names every newer one, with the reason why it cannot be used.

    Args:
      abstract_state: pytree of `jax.ShapeDtypeStruct`, or of arrays. A leaf is
        restored to its sharding; without one, to the first local device.

    Returns:
      The checkpoint; None if there is none.

    Raises:
      ValueError: there are checkpoints, but none can be used.
    """
    self.wait()
    self._manager.reload()
    self._unusable.clear()
    for step in sorted(self._manager.all_steps(), reverse=True):
      restored, problem = None, ''
      try:
        with jax.transfer_guard('allow'):
          restored = self._restore(step, abstract_state)
      except _UnusableError as error:
        problem = str(error)
      # All processes must use the same checkpoint: one that all can read.
      problem = next(filter(None, processes.texts(problem)), '')
      if not problem:
        return Restored(step, *restored)
      _LOG.warning(
        'checkpoint of step %d in %s cannot be used: %s',
        step,
        self._directory,
        problem,
      )
      self._unusable[step] = problem
    if not self._unusable:
      return None
    reasons = ''.join(
      f'\n  step {step}: {reason}' for step, reason in self._unusable.items()
    )
    # If the caller continues after this error, `save` must not delete them.
    self._unusable.clear()
    raise ValueError(
      f'no checkpoint in {self._directory} can be used:{reasons}\nNothing was '
      'deleted. If they were written with another config, run with that one; '
      'to start afresh, choose another directory or move this one away.'
    )

  def close(self) -> None:
    """Waits for a save in progress and releases Orbax's threads.

    Raises:
      RuntimeError: that save failed.
    """
    try:
      self.wait()
    finally:
      self._manager.close()

  def __enter__(self) -> 'Checkpoints':
    return self

  def __exit__(self, exception_type, *_) -> None:
    try:
      self.close()
    except RuntimeError as error:
      if exception_type is None:
        raise
      # The exception that ended the run matters more.
      _LOG.error('%s', error)

  def _check_step(self, step: int) -> None:
    usable = set(self._manager.all_steps()) - set(self._unusable)
    if usable and step <= max(usable):
      raise ValueError(
        f'step {step} cannot be saved to {self._directory}, which holds a '
        f'checkpoint of step {max(usable)}: restore that one first, or choose '
        'another directory'
      )

  def _failed(self, error: Exception) -> RuntimeError:
    return RuntimeError(
      f'the checkpoint of step {self._saving} could not be written to '
      f'{self._directory}: {_one_line(error)}. Earlier checkpoints are '
      'unharmed.'
    )

  def _restore(
    self, step: int, abstract_state: Any
  ) -> tuple[Any, dict[str, Any]]:
    """Returns state and extra of one checkpoint.

    Raises:
      _UnusableError: it is damaged, or of another state.
    """
    stored, extra = _checked_record(
      self._read(step, 'record', ocp.args.JsonRestore())
    )
    wanted = digests.named_leaves(abstract_state)
    if problem := digests.mismatch(
      {name: description for name, (description, _) in stored.items()},
      {name: digests.describe(leaf) for name, leaf in wanted.items()},
    ):
      raise _UnusableError(problem)
    targets = {name: _target(leaf) for name, leaf in wanted.items()}
    restore_args = ocp.checkpoint_utils.construct_restore_args(targets)
    arrays = self._read(
      step, 'state', ocp.args.PyTreeRestore(targets, restore_args=restore_args)
    )
    restored = digests.digests(arrays)
    changed = [name for name in wanted if restored[name] != stored[name][1]]
    if changed:
      raise _UnusableError(
        f'{digests.some(changed)} not what was saved (digest differs)'
      )
    leaves = [_typed(arrays[name], leaf) for name, leaf in wanted.items()]
    return jax.tree.structure(abstract_state).unflatten(leaves), extra

  def _read(self, step: int, item: str, args: Any) -> Any:
    try:
      return self._manager.restore(
        step, args=ocp.args.Composite(**{item: args})
      )[item]
    except _UnusableError:
      raise
    except Exception as error:
      # Damage can raise any exception of Orbax, TensorStore or a parser.
      raise _UnusableError(
        f'its {item} cannot be read ({_one_line(error)})'
      ) from error


class _Manager(ocp.CheckpointManager):
  """Orbax's manager, but it never asks JAX about preemption.

  JAX counts these questions, and `processes.Stop` asks them, once a step.
  """

  def reached_preemption(self, step: int) -> bool:
    del step
    return False


class _UnusableError(Exception):
  """A checkpoint cannot be used; the message says why, in one line."""


class _NewestUsable(ocp.checkpoint_managers.PreservationPolicy):
  """Keeps the newest checkpoints by step, not counting the unusable ones.

  Orbax's own policy counts in the order of saving, damaged ones included: after
  a return to an older checkpoint it would delete good ones before bad ones.
  """

  def __init__(self, keep: int, unusable: Mapping[int, str]):
    self._keep = keep
    self._unusable = unusable

  def should_preserve(self, checkpoints, *, context) -> list[bool]:
    del context
    steps = [checkpoint.step for checkpoint in checkpoints]
    usable = sorted(set(steps) - set(self._unusable))
    kept = {*usable[-self._keep :], *self._unusable}
    return [step in kept for step in steps]


class _LeafByLeaf(ocp.type_handlers.ArrayHandler):
  """Reads every leaf even if one fails, and names those that failed.

  Orbax stops at the first failure and closes the event loop while it reads the
  others; each of these then prints a long message of TensorStore.
  """

  async def deserialize(self, infos, args=None) -> list[jax.Array]:
    before = asyncio.all_tasks()
    read = super().deserialize
    results = await asyncio.gather(
      *(read([info], [arg]) for info, arg in zip(infos, args)),
      return_exceptions=True,
    )
    # Further shards of a leaf that failed are still being read.
    await asyncio.gather(
      *(asyncio.all_tasks() - before), return_exceptions=True
    )
    failed = {
      info.name: result
      for info, result in zip(infos, results)
      if isinstance(result, BaseException)
    }
    if failed:
      raise _UnusableError(
        f'{digests.some(failed)} unreadable '
        f'({_one_line(next(iter(failed.values())))})'
      )
    return [array for (array,) in results]


def _check_writable(directory: epath.Path) -> None:
  try:
    directory.mkdir(parents=True, exist_ok=True)
    probe = directory / f'.probe{processes.index()}'
    probe.write_bytes(b'')
    probe.unlink(missing_ok=True)
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


def _crc32(record: Mapping[str, Any]) -> int:
  return zlib.crc32(json.dumps(record, sort_keys=True).encode())


def _checked_record(record: Any) -> tuple[dict[str, Any], dict[str, Any]]:
  """Returns `leaves` and `extra` of a record, after a check of its CRC."""
  try:
    content = {key: record[key] for key in ('leaves', 'extra')}
    if record['crc32'] == _crc32(content):
      return content['leaves'], content['extra']
  except (KeyError, TypeError):
    pass
  raise _UnusableError('its record is damaged, or of another program')


def _target(leaf: Any) -> jax.ShapeDtypeStruct:
  """Returns shape, dtype and sharding of the plain data of a leaf."""
  sharding = getattr(leaf, 'sharding', None)
  if sharding is None:
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  plain = jax.eval_shape(digests.plain, leaf)
  return jax.ShapeDtypeStruct(plain.shape, plain.dtype, sharding=sharding)


def _typed(array: jax.Array, leaf: Any) -> jax.Array:
  """Undoes `digests.plain` if `leaf` is an array of typed keys."""
  if not digests.is_key(leaf):
    return array
  # `key_impl` looks at an array, not at a ShapeDtypeStruct.
  impl = jax.random.key_impl(jnp.empty((), leaf.dtype))
  return jax.random.wrap_key_data(array, impl=impl)


def _one_line(error: BaseException) -> str:
  """Returns the cause of an error, without TensorStore's list of options."""
  while error.__cause__ is not None:
    error = error.__cause__
  # `... [tensorstore_spec='{...`, `... [source locations='...`
  text = re.split(r' \[[\w ]+(?:\[\d+\])?=', str(error))[0]
  text = ' '.join(text.split())
  # A long message gives the cause at its end.
  if len(text) > 200:
    text = f'...{text[-200:]}'
  return f'{type(error).__name__}: {text}'


def read_tree(directory: pathlib.Path) -> Any:
  """Returns the tree of arrays that Orbax wrote to a directory, of any program.

  Raises:
    ValueError: Orbax cannot read it.
  """
  try:
    with ocp.PyTreeCheckpointer() as checkpointer:
      return checkpointer.restore(directory.resolve())
  except Exception as error:  # Orbax has no common class of its errors.
    raise ValueError(
      f'{directory} is no directory that Orbax can read as a tree of arrays: '
      f'{" ".join(str(error).split())[:300]}'
    ) from error
