"""Pictures decoded once, as arrays that are mapped into memory.

A PNG of 15 megapixels takes a second to decode, and a training step needs
pieces of sixteen pictures.
"""

from collections.abc import Sequence
import dataclasses
import hashlib
import json
import logging
import pathlib

import numpy as np

from fliqs_jax.data import build_once
from fliqs_jax.data import dataset as dataset_lib
from fliqs_jax.data import images
from fliqs_jax.runtime import files

_LOG = logging.getLogger(__name__)

_VERSION = 1
# JPEG leaves blocks and ringing, which a mean of four pixels hides.
_JPEG = 2


@dataclasses.dataclass(frozen=True)
class File:
  """A file with a picture.

  Attributes:
    path: path of a PNG or JPEG.
    height: height of the picture as it is used, in pixels.
    width: width of it.
  """

  path: pathlib.Path
  height: int
  width: int


def look(path: pathlib.Path) -> File:
  """Returns a file after reading its header.

  Raises:
    ValueError: it is damaged; the message names it.
  """
  with _named(path):
    image = images.opened(path.read_bytes())
    width, height = image.size
    shrunk = _JPEG if image.format == 'JPEG' else 1
    return File(path, height // shrunk, width // shrunk)


def pixels(found: Sequence[File]) -> list[np.ndarray]:
  """Returns uint8 [H, W, 3] of each file, mapped; decodes them on first use.

  They are kept in the user's cache, by the paths, sizes and times of the files:
  if one of them changes, all are decoded again.

  Args:
    found: the files.

  Raises:
    ValueError: a picture is damaged, or the cache is; the message names it.
  """
  root = dataset_lib.local_path(str(files.user_cache() / 'data' / 'pictures'))
  store = root / _key(found)
  try:
    with build_once.directory(store) as unfinished:
      if unfinished is not None:
        _LOG.info('decoding %d pictures into %s', len(found), store)
        for i, file in enumerate(found):
          np.save(unfinished / f'{i}.npy', _decoded(file))
        files.sync_tree(unfinished)
  except OSError as error:
    raise ValueError(
      f'the pictures cannot be decoded into {root}: {error}; set '
      'XDG_CACHE_HOME to a directory that can be written and has space'
    ) from error
  try:
    return [
      np.load(store / f'{i}.npy', mmap_mode='r') for i in range(len(found))
    ]
  except (OSError, ValueError) as error:
    raise ValueError(
      f'{store} is damaged: {error}; delete it, and the next start makes it '
      'again'
    ) from error


def _named(path: pathlib.Path):
  return images.decoding(str(path), 'remove the file or get it again')


def _key(found: Sequence[File]) -> str:
  """Returns a name that changes with the files."""
  facts: list = [_VERSION]
  for file in found:
    status = file.path.stat()
    facts.append(
      [str(file.path.absolute()), status.st_size, status.st_mtime_ns]
    )
  return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _decoded(file: File) -> np.ndarray:
  with _named(file.path):
    image = images.opened(file.path.read_bytes())
    if image.format == 'JPEG':
      image = image.convert('RGB').reduce(_JPEG)
    array = np.asarray(image.convert('RGB'))
  return array[: file.height, : file.width]
