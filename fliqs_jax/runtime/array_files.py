"""Trees of arrays in directories, as Orbax writes and reads them.

A directory of `Writer` appears under its name when it is whole. Reading creates
and changes nothing, so a directory may be read while a run writes others beside
it, and without permission to write.
"""

import asyncio
from collections.abc import Mapping
import os
import pathlib
import re
from typing import Any

from etils import epath
import jax
import orbax.checkpoint as ocp

from fliqs_jax.runtime import digests

_ARRAYS, _RECORD = 'state', 'record'
# In the name of a directory that is being written.
UNFINISHED = '.orbax-checkpoint-tmp'


class UnreadableError(Exception):
  """A directory cannot be read; the message says why, in one line."""


class Writer:
  """Writes one directory at a time, in a thread of its own.

  All processes of a run write each directory together.
  """

  def __init__(self):
    self._orbax = ocp.AsyncCheckpointer(
      ocp.CompositeCheckpointHandler(
        **{_ARRAYS: _array_handler(), _RECORD: ocp.JsonCheckpointHandler()}
      )
    )

  def start(
    self,
    directory: pathlib.Path,
    arrays: Mapping[str, jax.Array],
    record: Mapping[str, Any],
  ) -> None:
    """Copies the arrays and starts to write them; waits for the one before.

    Args:
      directory: path of a directory that does not exist.
      arrays: {name: array} without typed keys and without empty arrays.
      record: plain JSON values.

    Raises:
      Exception: of any class: this or the previous directory failed.
    """
    self._orbax.save(
      epath.Path(directory),
      args=ocp.args.Composite(
        **{
          _ARRAYS: ocp.args.PyTreeSave(dict(arrays)),
          _RECORD: ocp.args.JsonSave(dict(record)),
        }
      ),
    )

  def wait(self) -> None:
    """Returns when the directory is whole.

    Raises:
      Exception: of any class: it could not be written.
    """
    self._orbax.wait_until_finished()

  def close(self) -> None:
    """Releases the thread; call `wait` before."""
    self._orbax.close()


def read_record(directory: pathlib.Path) -> Any:
  """Returns the record that a directory of `Writer` holds.

  Raises:
    UnreadableError: it is missing or no JSON.
  """
  try:
    return ocp.JsonCheckpointHandler().restore(epath.Path(directory) / _RECORD)
  except Exception as error:
    raise UnreadableError(
      f'its record cannot be read ({one_line(error)})'
    ) from error


def read_arrays(
  directory: pathlib.Path, targets: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
  """Returns the arrays that a directory of `Writer` holds.

  Args:
    directory: path of the directory.
    targets: {name: shape, dtype and sharding} of all its arrays.

  Raises:
    UnreadableError: an array cannot be read; the message names the first.
  """
  try:
    return _array_handler().restore(
      epath.Path(directory) / _ARRAYS,
      args=ocp.args.PyTreeRestore(
        dict(targets),
        restore_args=ocp.checkpoint_utils.construct_restore_args(dict(targets)),
      ),
    )
  except UnreadableError:
    raise
  except Exception as error:
    # Damage can raise any exception of Orbax, TensorStore or a parser.
    raise UnreadableError(
      f'its arrays cannot be read ({one_line(error)})'
    ) from error


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


def check_path(directory: str | os.PathLike[str]) -> None:
  """Checks that Orbax can write to a directory of this name, and read it again.

  Raises:
    ValueError: the path has a character that Orbax takes for a pattern or that
      TensorStore refuses.
  """
  path = os.fspath(directory)
  bad = sorted(set(path) & set('*?[\\'))
  if not path.isprintable():  # Bytes that are no text, for example.
    bad.append('a character that this locale lacks (not LC_ALL=C.UTF-8)')
  if any(part.endswith(':') for part in pathlib.Path(path).parts):
    bad.append('a name that ends with a colon, such as gs:')
  if bad:
    raise ValueError(
      f'{path!r} has {" and ".join(bad)} in its path, and checkpoints below it '
      'could not be restored; choose another local directory'
    )


def one_line(error: BaseException) -> str:
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


def _array_handler() -> ocp.PyTreeCheckpointHandler:
  registry = ocp.type_handlers.create_type_handler_registry(
    (jax.Array, _LeafByLeaf())
  )
  return ocp.PyTreeCheckpointHandler(type_handler_registry=registry)


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
      raise UnreadableError(
        f'{digests.some(failed)} unreadable '
        f'({one_line(next(iter(failed.values())))})'
      )
    return [array for (array,) in results]
