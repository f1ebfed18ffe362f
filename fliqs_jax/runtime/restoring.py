"""Checkpoints read, and checked for damage; nothing on the disk changes.

So the directory may be one of a live run, or one without permission to write.
"""

from collections.abc import Mapping
import contextlib
import json
import logging
import os
import pathlib
from typing import Any, NamedTuple
import zlib

import jax
import jax.numpy as jnp

from fliqs_jax.runtime import array_files
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


def restore_latest(
  directory: str | os.PathLike[str], abstract_state: Any
) -> Restored | None:
  """Restores the newest checkpoint that is undamaged and fits.

  A warning names every newer one, with the reason why it cannot be used.

  Args:
    directory: directory of `checkpoint.Checkpoints`.
    abstract_state: pytree of `jax.ShapeDtypeStruct`, or of arrays. A leaf is
      restored to its sharding; without one, to the first local device.

  Returns:
    The checkpoint; None if there is none.

  Raises:
    ValueError: there are checkpoints, but none can be used.
  """
  path = pathlib.Path(directory).absolute()
  return newest_usable(path, abstract_state)[0]


def newest_extra(directory: str | os.PathLike[str]) -> dict[str, Any] | None:
  """Returns what was saved beside the newest state, without reading arrays.

  Args:
    directory: directory of `checkpoint.Checkpoints`.

  Returns:
    `extra` of the newest checkpoint whose record is undamaged; None if there is
    none.
  """
  path = pathlib.Path(directory).absolute()
  for step in reversed(_listed(path)):
    with contextlib.suppress(array_files.UnreadableError):
      return _read_record(path / str(step))[1]
  return None


def newest_usable(
  directory: pathlib.Path, abstract_state: Any
) -> tuple[Restored | None, dict[int, str]]:
  """Returns a checkpoint, and {step: why it cannot be used} of the newer ones.

  Raises:
    ValueError: there are checkpoints, but none can be used.
  """
  unusable: dict[int, str] = {}
  # Listed each time, because a live run saves and deletes.
  while steps := [s for s in steps_in(directory) if s not in unusable]:
    step, restored, problem = steps[-1], None, ''
    try:
      with jax.transfer_guard('allow'):
        restored = _restore(directory / str(step), abstract_state)
    except array_files.UnreadableError as error:
      problem = str(error)
    # All processes must use the same checkpoint: one that all can read.
    problem = next(filter(None, processes.texts(problem)), '')
    if not problem:
      return Restored(step, *restored), unusable
    _LOG.warning(
      'checkpoint of step %d in %s cannot be used: %s', step, directory, problem
    )
    unusable[step] = problem
  if not unusable:
    return None, {}
  reasons = ''.join(
    f'\n  step {step}: {reason}' for step, reason in unusable.items()
  )
  raise ValueError(
    f'no checkpoint in {directory} can be used:{reasons}\nNothing was '
    'deleted. If they were written with another config, run with that one; '
    'to start afresh, choose another directory or move this one away.'
  )


def steps_in(directory: pathlib.Path) -> list[int]:
  """Returns the steps of complete checkpoints, the same in all processes."""
  return json.loads(processes.texts(json.dumps(_listed(directory)))[0])


def _listed(directory: pathlib.Path) -> list[int]:
  if not directory.is_dir():
    return []
  return sorted(int(p.name) for p in directory.iterdir() if p.name.isdecimal())


def _restore(
  directory: pathlib.Path, abstract_state: Any
) -> tuple[Any, dict[str, Any]]:
  """Returns state and extra of one checkpoint.

  Raises:
    UnreadableError: it is damaged, or of another state.
  """
  stored, extra = _read_record(directory)
  wanted = digests.named_leaves(abstract_state)
  if problem := digests.mismatch(
    {name: description for name, (description, _) in stored.items()},
    {name: digests.describe(leaf) for name, leaf in wanted.items()},
  ):
    raise array_files.UnreadableError(problem)
  targets = {name: _target(leaf) for name, leaf in wanted.items()}
  arrays = array_files.read_arrays(directory, targets)
  restored = digests.digests(arrays)
  changed = [name for name in wanted if restored[name] != stored[name][1]]
  if changed:
    raise array_files.UnreadableError(
      f'{digests.some(changed)} not what was saved (digest differs)'
    )
  leaves = [_typed(arrays[name], leaf) for name, leaf in wanted.items()]
  return jax.tree.structure(abstract_state).unflatten(leaves), extra


def _read_record(
  directory: pathlib.Path,
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Returns `leaves` and `extra` of a checkpoint, after a check of its CRC.

  Raises:
    UnreadableError: the record is damaged.
  """
  record = array_files.read_record(directory)
  try:
    content = {key: record[key] for key in ('leaves', 'extra')}
    if record['crc32'] == crc32(content):
      return content['leaves'], content['extra']
  except (KeyError, TypeError):
    pass
  raise array_files.UnreadableError(
    'its record is damaged, or of another program'
  )


def crc32(record: Mapping[str, Any]) -> int:
  """Returns the checksum of a record, {'leaves': ..., 'extra': ...}."""
  return zlib.crc32(json.dumps(record, sort_keys=True).encode())


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
