"""Synthetic data, made of a pattern and noise, for trials without a disk.

There are images, rows like Criteo's, and pictures for super-resolution; a model
can learn each.
"""

import numpy as np

from fliqs_jax.data import dataset as dataset_lib
from fliqs_jax.data import images as images_lib
from fliqs_jax.data import random_bits
from fliqs_jax.data.sources import criteo
from fliqs_jax.data.sources import criteo_store
from fliqs_jax.data.sources import pictures as pictures_lib

# Number of uniform blocks of a pattern in each direction: coarse enough for
# strides and pooling.
_BLOCKS = 4

# Number of categories of a column of clicks; the frequency of the n-th is about
# proportional to 1/n.
_CATEGORIES = 100


def _random_bytes(shape: tuple[int, ...], *key: int) -> np.ndarray:
  """Returns uint8 `shape`, a function of the two numbers on every machine."""
  generator = np.random.Philox(key=np.array(key, np.uint64))
  size = int(np.prod(shape))
  words = generator.random_raw(-(-size // 8)).astype('<u8')
  return words.view(np.uint8)[:size].reshape(shape)


def _images(
  size: int, shape: tuple[int, int, int], num_classes: int, split: int
) -> dataset_lib.Arrays:
  height, width, channels = shape
  labels = np.arange(size) % num_classes
  patterns = _random_bytes((num_classes, _BLOCKS, _BLOCKS, channels), 0, 0)
  rows = np.arange(height) * _BLOCKS // height
  columns = np.arange(width) * _BLOCKS // width
  pixels = np.empty((size, *shape), np.uint8)
  for i, label in enumerate(labels):
    pattern = patterns[label][rows[:, None], columns]
    pixels[i] = pattern // 2 + _random_bytes(shape, 1 + split, i) // 2
  return dataset_lib.Arrays(image=pixels, label=labels)


def images(
  input_shape: tuple[int, int, int] = (32, 32, 3),
  num_classes: int = 10,
  num_train: int = 1024,
  num_test: int = 256,
) -> dataset_lib.Dataset:
  """Returns a learnable set of images with splits 'train' and 'test'.

  A pixel is the mean of the pattern of its class and of independent noise; both
  splits show the same patterns. Classes are equally frequent.

  Args:
    input_shape: shape (H, W, C) of an image.
    num_classes: number of classes.
    num_train: number of examples of 'train'.
    num_test: number of examples of 'test'.

  Raises:
    ValueError: one of these numbers is below 1.
  """
  if min(*input_shape, num_classes, num_train, num_test) < 1:
    raise ValueError(
      f'a synthetic data set of {num_train} + {num_test} images of '
      f'{input_shape} in {num_classes} classes: all must be at least 1'
    )
  sizes = dict(train=num_train, test=num_test)
  channels = input_shape[-1]
  # Mean and standard deviation of the mean of two independent uniform bytes.
  normalise = images_lib.normaliser((127.0,) * channels, (52.0,) * channels)
  return dataset_lib.Dataset(
    name='synthetic',
    num_classes=num_classes,
    inputs={'image': dataset_lib.Spec(input_shape)},
    split_sizes=sizes,
    open=lambda split: _images(
      sizes[split], input_shape, num_classes, list(sizes).index(split)
    ),
    train_inputs=lambda columns, bits: dict(image=normalise(columns['image'])),
    eval_inputs=lambda columns: dict(image=normalise(columns['image'])),
  )


def _uniform(split: int, key: int, shape: tuple[int, ...]) -> np.ndarray:
  words = random_bits.words(1000 * split + key, 0, int(np.prod(shape)))
  return ((words >> np.uint64(11)) * 2.0**-53).reshape(shape)


def _clicks(size: int, split: int) -> np.ndarray:
  """Returns rows of type `criteo_store.ROW`."""
  rows = np.zeros(size, criteo_store.ROW)
  dense_shape = rows['integers'].shape
  # Most counts are small, some are thousands, a tenth is missing.
  counts = np.exp(8 * _uniform(split, 1, dense_shape) ** 2) - 1
  absent = _uniform(split, 2, dense_shape) < 0.1
  rows['integers'] = np.where(absent, criteo_store.MISSING, counts)
  ids_shape = rows['categories'].shape
  rows['categories'] = _CATEGORIES ** _uniform(split, 3, ids_shape)
  bits = 1 << np.arange(criteo_store.NUM_CATEGORIES, dtype=np.uint32)
  absent_ids = (_uniform(split, 4, ids_shape) < 0.1).astype(np.uint32)
  rows['missing'] = absent_ids @ bits
  # A click depends on the parity of every category and on the first count.
  odd = (rows['categories'] % 2) * (1 - absent_ids)
  score = (odd.sum(1) - 8.0) / 2 + criteo.log_transform(rows['integers'])[:, 0]
  rows['label'] = _uniform(split, 5, (size,)) < 1 / (1 + np.exp(2 - score))
  return rows


def clicks(
  buckets: int, num_train: int = 8192, num_test: int = 2048
) -> dataset_lib.Dataset:
  """Returns a learnable set like Criteo's, with splits 'train' and 'test'.

  Args:
    buckets: number of buckets that the categories of a column share.
    num_train: number of examples of 'train'.
    num_test: number of examples of 'test'.

  Raises:
    ValueError: the number of buckets is not allowed.
  """
  criteo.check_buckets(buckets)
  splits = dict(train=_clicks(num_train, 0), test=_clicks(num_test, 1))
  return criteo.table('synthetic_criteo', splits, buckets)


def _picture(size: int, number: int) -> np.ndarray:
  """Returns uint8 [size, size, 3]: edges in a random direction, slopes."""
  words = random_bits.words(number, 0, 9)
  angle, *rest = (words >> np.uint64(11)) * 2.0**-53
  across = np.arange(size)[:, None], np.arange(size)[None, :]
  along = np.cos(6.3 * angle) * across[0] + np.sin(6.3 * angle) * across[1]
  colours = np.reshape(rest[:6], (2, 3)) * 200
  edges = (along // (6 + 6 * rest[6]) % 2)[..., None]
  slope = 55 * across[0][..., None] / size
  return (edges * colours[0] + (1 - edges) * colours[1] + slope).astype(
    np.uint8
  )


def pictures(
  patch: int, scale: int, crop: int, crops: int, count: int = 20
) -> dataset_lib.Dataset:
  """Returns pictures of stripes, of which the edges can be sharpened.

  Args:
    patch: as in `pictures.dataset`, like the next three.
    scale: factor between labels and inputs.
    crop: height and width of what valid and test show.
    crops: number of examples of a picture.
    count: number of pictures.

  Raises:
    ValueError: a number is not allowed.
  """
  pictures_lib.check(patch, scale, crop, crops)
  tiles = int(np.ceil(np.sqrt(crops)))
  size = max(patch, tiles * crop)
  return pictures_lib.of(
    'synthetic_pictures',
    count,
    lambda: [_picture(size, i) for i in range(count)],
    (patch, scale, crop, crops),
  )
