"""Files that survive a kill and a power cut.

A small file is replaced as a whole: a kill leaves the old or the new one. It
may have one writer at a time. The temporary file has a fixed name, so that the
next run overwrites what a killed run leaves behind.
"""

import errno
import json
import os
import pathlib
from typing import Any

import yaml


def user_cache() -> pathlib.Path:
  """Returns our directory in the user's cache; `~` in it is the user's home."""
  cache = os.environ.get('XDG_CACHE_HOME') or '~/.cache'
  return pathlib.Path(cache) / 'fliqs_jax'


def at_home(
  path: str | os.PathLike[str], remedy: str = 'Write the whole path'
) -> pathlib.Path:
  """Returns a path of which a `~` at the beginning is the user's home.

  Args:
    path: the path.
    remedy: what a user without a home can do, for the message.

  Raises:
    ValueError: the user has no home directory, or there is no such user.
  """
  try:
    return pathlib.Path(path).expanduser()
  except RuntimeError as error:
    raise ValueError(f'{os.fspath(path)!r}: {error} {remedy}') from None


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
  """Replaces the file at `path`; its directory must exist."""
  final = pathlib.Path(path)
  temporary = final.with_name(f'.{final.name}.tmp')
  try:
    with temporary.open('wb') as file:
      file.write(data)
      file.flush()
      # Else a power cut could keep the new name but lose the new bytes.
      os.fsync(file.fileno())
    temporary.replace(final)
    sync(final.parent)
  except OSError as error:
    # Not the name of the temporary file, or none.
    raise OSError(error.errno, error.strerror, str(final)) from error


def read_json(path: str | os.PathLike[str]) -> Any:
  """Returns the content of a JSON file.

  Raises:
    FileNotFoundError: there is none.
    ValueError: it is no JSON, so the file is damaged; the message names it.
  """
  try:
    return json.loads(pathlib.Path(path).read_text('utf-8'))
  except (ValueError, RecursionError) as error:  # No UTF-8, no JSON, too deep.
    raise ValueError(f'{path} is damaged: {error}') from None


def read_yaml(path: str | os.PathLike[str]) -> Any:
  """Returns the content of a YAML file.

  Raises:
    OSError: the file cannot be read.
    ValueError: it is no YAML, gives a key twice, or is nested too deeply.
  """
  try:
    text = pathlib.Path(path).read_text(encoding='utf-8')
    return yaml.load(text, Loader=_Loader)
  except RecursionError:
    raise ValueError('it is nested too deeply') from None
  except (UnicodeDecodeError, yaml.YAMLError, ValueError) as error:
    raise ValueError(' '.join(str(error).split())) from None


class _Loader(yaml.SafeLoader):
  """YAML that refuses a repeated key; PyYAML keeps the last one silently."""

  def construct_mapping(self, node, deep=False):
    keys = [self.construct_object(key, deep=True) for key, _ in node.value]
    for i, key in enumerate(keys):
      if key in keys[:i]:
        raise ValueError(f'{key!r} is given twice; give it once')
    return super().construct_mapping(node, deep)


def sync(path: str | os.PathLike[str]) -> None:
  """Returns when a file, or the list of names in a directory, is on the disk.

  Until then a power cut can undo what was written, made or renamed.
  """
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  except OSError as error:
    # Some file systems have no such operation for a directory.
    if error.errno not in (errno.EINVAL, errno.ENOTSUP):
      raise
  finally:
    os.close(descriptor)


def sync_tree(directory: str | os.PathLike[str]) -> None:
  """Calls `sync` for a directory and for everything below it."""
  for folder, _, names in os.walk(directory, topdown=False):
    for name in names:
      sync(os.path.join(folder, name))
    sync(folder)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
  """Replaces the file at `path` with `value` as indented JSON.

  The same value gives the same bytes: keys keep their order, and a float is
  written with the fewest digits that read back to it.

  Args:
    path: the file; its directory must exist.
    value: plain JSON values.

  Raises:
    ValueError: the value holds NaN or infinity, which JSON cannot express.
  """
  try:
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
  except ValueError as error:
    raise ValueError(f'{path} cannot be written as JSON: {error}') from error
  write_bytes(path, text.encode() + b'\n')
