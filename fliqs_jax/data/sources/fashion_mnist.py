"""Fashion-MNIST: 70,000 grey photographs of clothes, 28x28, ten classes.

Xiao et al. 2017 (arXiv:1708.07747). A user names a directory with its four IDX
files, packed or not; Debian's package dataset-fashion-mnist has them.
"""

import functools
import gzip
import math
import pathlib
import struct
import zlib

import numpy as np

from fliqs_jax.data import dataset as dataset_lib
from fliqs_jax.data import images

NAME = 'fashion_mnist'
NUM_CLASSES = 10
SHAPE = (28, 28, 1)
SPLIT_SIZES = {'train': 60_000, 'test': 10_000}

_PREFIXES = {'train': 'train', 'test': 't10k'}
# An IDX file begins with 0, 0, the type of its numbers and the number of its
# axes, a byte each; then the length of each axis, a big-endian uint32.
_UINT8 = 8

_HOW_TO_GET = (
  'Nothing is downloaded for you; apt-get install dataset-fashion-mnist puts '
  'the four files into /usr/share/datasets/fashion-mnist'
)


def _content(directory: pathlib.Path, name: str) -> bytes:
  """Returns the bytes of `name`.gz without its packing, or of `name`."""
  packed, plain = directory / f'{name}.gz', directory / name
  if not packed.exists() and not plain.exists():
    raise ValueError(
      f'config.data.data_dir={str(directory)!r} has neither {packed.name} nor '
      f'{name}. {_HOW_TO_GET}'
    )
  try:
    if packed.exists():
      return gzip.decompress(packed.read_bytes())
    return plain.read_bytes()
  except (OSError, EOFError, zlib.error) as error:
    raise ValueError(
      f'{packed if packed.exists() else plain} cannot be read: {error!r}; get '
      f'the file again. {_HOW_TO_GET}'
    ) from error


def _read(directory: pathlib.Path, name: str, *shape: int) -> np.ndarray:
  """Returns uint8 `shape`, the numbers of the IDX file `name`."""
  content = _content(directory, name)
  expected = ((_UINT8 << 8) + len(shape), *shape)
  header = struct.pack(f'>{len(expected)}I', *expected)
  if not content.startswith(header):
    raise ValueError(
      f'{directory / name} begins with the bytes '
      f'{content[: len(header)].hex()}, not with {header.hex()}, the IDX '
      f'header of shape {shape}; get the file again. {_HOW_TO_GET}'
    )
  size = len(content) - len(header)
  if size != math.prod(shape):
    raise ValueError(
      f'{directory / name} holds {size} bytes after its header, not the '
      f'{math.prod(shape)} of shape {shape}; get the file again. {_HOW_TO_GET}'
    )
  return np.frombuffer(content, np.uint8, offset=len(header)).reshape(shape)


def _open(directory: pathlib.Path, split: str) -> dataset_lib.Arrays:
  prefix, size = _PREFIXES[split], SPLIT_SIZES[split]
  pixels = _read(directory, f'{prefix}-images-idx3-ubyte', size, *SHAPE[:2])
  name = f'{prefix}-labels-idx1-ubyte'
  labels = _read(directory, name, size)
  if labels.max() >= NUM_CLASSES:
    raise ValueError(
      f'{directory / name} holds the label {labels.max()}; those of '
      f'Fashion-MNIST are 0 to {NUM_CLASSES - 1}'
    )
  return dataset_lib.Arrays(
    image=pixels[..., None], label=labels.astype(np.int64)
  )


def dataset(
  data_dir: str, augment: str = 'crop_flip', read: bool = True
) -> dataset_lib.Dataset:
  """Returns Fashion-MNIST's splits 'train' and 'test'; `open` checks the files.

  Args:
    data_dir: a local directory with train-images-idx3-ubyte,
      train-labels-idx1-ubyte, t10k-images-idx3-ubyte and
      t10k-labels-idx1-ubyte, each as it is or packed (.gz).
    augment: augmentation of training images, a name that
      `images.augmentation` knows.
    read: whether the files are looked for; if not, the data set has its shapes
      and no examples.

  Raises:
    ValueError: the augmentation is unknown, or `data_dir` is no local
      directory.
  """
  augmented = images.augmentation(augment)
  directory = dataset_lib.local_path(data_dir)
  if read and (not data_dir or not directory.is_dir()):
    raise ValueError(
      f'config.data.data_dir={data_dir!r} must be a local directory with the '
      f'four IDX files of Fashion-MNIST. {_HOW_TO_GET}'
    )
  normalise = images.normaliser(mean=(72.94,), std=(90.02,))  # Of 'train'.
  return dataset_lib.Dataset(
    name=NAME,
    num_classes=NUM_CLASSES,
    inputs={'image': dataset_lib.Spec(SHAPE)},
    split_sizes=SPLIT_SIZES,
    open=functools.partial(_open, directory),
    train_inputs=lambda columns, bits: dict(
      image=normalise(augmented(columns['image'], bits))
    ),
    eval_inputs=lambda columns: dict(image=normalise(columns['image'])),
  )
