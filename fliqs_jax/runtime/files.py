"""Atomic replacement of small files: a kill leaves the old or the new one.

One writer per file at a time: the temporary file has a fixed name, so that
what a killed run leaves behind is overwritten and never piles up.
"""

import json
import os
import pathlib
from typing import Any


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
  """Replaces the file at `path`; its directory must exist."""
  path = pathlib.Path(path)
  temporary = path.with_name(f'.{path.name}.tmp')
  with temporary.open('wb') as file:
    file.write(data)
    file.flush()
    # Without it a power cut may keep the new name and lose the new bytes.
    os.fsync(file.fileno())
  temporary.replace(path)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
  """Replaces the file at `path` with `value` as indented JSON.

  The same value gives the same bytes: keys stay in the order given, and a
  float is written with the fewest digits that read back to it.

  Raises:
    ValueError: for NaN or infinity, which JSON cannot express.
  """
  try:
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
  except ValueError as error:
    raise ValueError(f'{path} cannot be written as JSON: {error}') from error
  write_bytes(path, text.encode() + b'\n')
