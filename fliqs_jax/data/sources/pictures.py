"""Pictures of a directory, cut into patches, and shrunk: for super-resolution.

A user names a directory with PNGs or JPEGs. Its pictures in sorted order are
the split 'pictures', so 'pictures[:70%]' has 70 % of the pictures. If the
directory has folders, each folder of it, with all below, is one picture of
which the files are versions, such as other sizes: the largest one is used.
"""

from collections.abc import Callable, Sequence
import functools
import logging
import pathlib

import numpy as np

from fliqs_jax.data import dataset as dataset_lib
from fliqs_jax.data import random_bits
from fliqs_jax.data.sources import bicubic
from fliqs_jax.data.sources import picture_store

_LOG = logging.getLogger(__name__)

NAME, SPLIT = 'pictures', 'pictures'
_SUFFIXES = '.png', '.jpg', '.jpeg'
# Random places of which a patch is the one with most texture: most of a
# photograph is smooth and teaches nothing. A small EDSR is 0.8 dB better for it
# after 600 steps.
_PLACES = 4
# SSIM looks at windows of so many pixels inside of the border.
_WINDOW = 11


def dataset(
  data_dir: str,
  patch: int,
  scale: int,
  crop: int,
  crops: int,
  read: bool = True,
) -> dataset_lib.Dataset:
  """Returns the pictures of a directory; `open` decodes them on first use.

  Args:
    data_dir: a local directory with PNGs or JPEGs, at any depth. JPEGs are
      shrunk by two.
    patch: height and width in pixels of what training shows of a picture.
    scale: factor between labels and inputs.
    crop: height and width in pixels of what valid and test show.
    crops: number of examples of a picture: patches for training, each the one
      with most texture of four random places, turned and mirrored; and the
      crops with most texture for valid and test.
    read: whether the files are looked for; if not, the data set has its shapes
      and no examples.

  Raises:
    ValueError: the directory has no pictures, a number is not allowed, or a
      picture is damaged or too small; the message names it.
  """
  check(patch, scale, crop, crops)
  if not read:
    return of(NAME, 0, list, (patch, scale, crop, crops))
  directory = dataset_lib.local_path(data_dir)
  if not data_dir or not directory.is_dir():
    raise ValueError(
      f'config.data.data_dir={data_dir!r} must be a local directory with '
      'pictures (PNG or JPEG). Nothing is downloaded for you; apt-get install '
      'plasma-workspace-wallpapers puts photographs into /usr/share/wallpapers'
    )
  found = _find(directory)
  for file in found:
    _check_size(file, patch, crop, crops)
  return of(
    NAME,
    len(found),
    functools.partial(picture_store.pixels, found),
    (patch, scale, crop, crops),
  )


def of(
  name: str,
  count: int,
  pixels: Callable[[], Sequence[np.ndarray]],
  cut: tuple[int, int, int, int],
) -> dataset_lib.Dataset:
  """Returns a data set of pictures.

  Args:
    name: name of the data set.
    count: number of pictures.
    pixels: () -> uint8 [H, W, 3] of each picture; it is called once.
    cut: `patch`, `scale`, `crop` and `crops`, as in `dataset`.
  """
  patch, scale, crop, crops = cut
  pixels = functools.cache(pixels)
  textured = functools.cache(lambda i: _textured(pixels()[i], crop, crops))

  def open_split(split: str) -> '_Parts':
    del split  # There is one.
    pixels()
    return _Parts(count, crops)

  def train_inputs(
    columns: dataset_lib.Columns, bits: np.ndarray
  ) -> dataset_lib.Columns:
    patches = [
      _patch(pixels()[i], patch, random_bits.Draws(one))
      for i, one in zip(columns['picture'], bits)
    ]
    return _shown(np.stack(patches), scale)

  def eval_inputs(columns: dataset_lib.Columns) -> dataset_lib.Columns:
    cuts = []
    for i, part in zip(columns['picture'], columns['part']):
      top, left = textured(i)[part]
      cuts.append(pixels()[i][top : top + crop, left : left + crop])
    return _shown(np.stack(cuts), scale)

  low = patch // scale
  return dataset_lib.Dataset(
    name=name,
    num_classes=0,
    inputs={'image': dataset_lib.Spec((low, low, 3))},
    split_sizes={SPLIT: count},
    open=open_split,
    train_inputs=train_inputs,
    eval_inputs=eval_inputs,
    label=dataset_lib.Spec((patch, patch, 3), np.dtype(np.uint8)),
    parts=crops,
  )


class _Parts:
  """Numbers of pictures and of their parts, of which inputs are made."""

  def __init__(self, pictures: int, parts: int):
    self._size, self._parts = pictures * parts, parts

  def __len__(self) -> int:
    return self._size

  def __getitem__(self, numbers: np.ndarray) -> dataset_lib.Columns:
    picture, part = np.divmod(numbers, self._parts)
    return dict(picture=picture, part=part)


def _shown(labels: np.ndarray, scale: int) -> dataset_lib.Columns:
  """Returns pictures as labels, and the small ones in [0, 1] as inputs."""
  image = bicubic.shrink(labels, scale) / np.float32(255)
  return dict(image=image, label=labels)


def _patch(
  picture: np.ndarray, size: int, draws: random_bits.Draws
) -> np.ndarray:
  """Returns the best of random patches, turned and perhaps mirrored."""
  patches = []
  for _ in range(_PLACES):
    top, left = (draws.below(n - size + 1) for n in picture.shape[:2])
    patches.append(picture[top : top + size, left : left + size])
  patch = max(patches, key=lambda p: _texture(p).sum())
  patch = np.rot90(patch, draws.below(4))
  return patch[:, ::-1] if draws.below(2) else patch


def _texture(picture: np.ndarray) -> np.ndarray:
  """Returns float32 [H, W], squared gradients of the grey of [H, W, 3]."""
  grey = picture.mean(-1, dtype=np.float32)
  energy = np.zeros_like(grey)
  energy[1:] += np.diff(grey, axis=0) ** 2
  energy[:, 1:] += np.diff(grey, axis=1) ** 2
  return energy


def _textured(
  picture: np.ndarray, size: int, count: int
) -> list[tuple[int, int]]:
  """Returns the corners of the tiles with the largest squared gradients.

  Args:
    picture: uint8 [H, W, 3].
    size: height and width of a tile.
    count: number of tiles, at most those of the picture.
  """
  down, across = (n // size for n in picture.shape[:2])
  energy = _texture(picture[: down * size, : across * size])
  tiles = energy.reshape(down, size, across, size).sum((1, 3), np.float64)
  best = np.argsort(-tiles.ravel(), kind='stable')[:count]
  return [(size * int(i // across), size * int(i % across)) for i in best]


def _find(directory: pathlib.Path) -> list[picture_store.File]:
  """Returns the file of each picture, in sorted order."""
  versions: dict[str, list[pathlib.Path]] = {}
  for path in sorted(directory.rglob('*')):
    if path.suffix.lower() in _SUFFIXES and path.is_file():
      name = path.relative_to(directory).parts[0]
      versions.setdefault(name, []).append(path)
  if not versions:
    raise ValueError(
      f'config.data.data_dir={str(directory)!r} holds no picture '
      f'({", ".join(_SUFFIXES)}); name a directory with some'
    )
  found = [
    # Of several of the largest, the first.
    max(map(picture_store.look, paths), key=lambda f: f.height * f.width)
    for paths in versions.values()
  ]
  count = sum(map(len, versions.values()))
  _LOG.info('%d pictures of %d files in %s', len(found), count, directory)
  return found


def check(patch: int, scale: int, crop: int, crops: int) -> None:
  """Checks how pictures are cut; the arguments are those of `dataset`.

  Raises:
    ValueError: a number is not allowed.
  """
  if scale < 2 or crops < 1:
    raise ValueError(
      f'config.data.scale={scale} must be at least 2, and config.data.crops='
      f'{crops} at least 1'
    )
  least = _WINDOW + 2 * scale
  for key, size in (('patch', patch), ('crop', crop)):
    if size < least or size % scale:
      raise ValueError(
        f'config.data.{key}={size} must be a multiple of config.data.scale='
        f'{scale}, and at least {least}'
      )


def _check_size(
  file: picture_store.File, patch: int, crop: int, crops: int
) -> None:
  shown = f'{file.path} has {file.width} x {file.height} pixels'
  if min(file.height, file.width) < max(patch, crop):
    raise ValueError(
      f'{shown}, too few for config.data.patch={patch} and config.data.crop='
      f'{crop} (a JPEG is shrunk by two first); remove it, or lower them'
    )
  room = (file.height // crop) * (file.width // crop)
  if room < crops:
    raise ValueError(
      f'{shown}, which hold {room} crops of {crop}, fewer than '
      f'config.data.crops={crops}; remove it, or lower one of them'
    )
