"""Images made of a pattern per class and noise: to try things out, no disk."""

import numpy as np

from fliqs_jax.data import dataset as dataset_lib

# A pattern is this many flat blocks high and wide: coarse enough to survive
# strides and pooling, and tiny whatever the size of the image.
_BLOCKS = 4


def _random_bytes(shape: tuple[int, ...], *key: int) -> np.ndarray:
  """Returns uint8 `shape`, the same for the same two numbers, everywhere."""
  generator = np.random.Philox(key=np.array(key, np.uint64))
  size = int(np.prod(shape))
  words = generator.random_raw(-(-size // 8)).astype('<u8')
  return words.view(np.uint8)[:size].reshape(shape)


class _Examples:
  """The examples of one split, made when they are read."""

  def __init__(
    self, size: int, shape: tuple[int, int, int], num_classes: int, split: int
  ):
    self._size, self._shape, self._split = size, shape, split
    self._patterns = _random_bytes(
      (num_classes, _BLOCKS, _BLOCKS, shape[-1]), 0, 0
    )

  def __len__(self) -> int:
    return self._size

  def __getitem__(self, index: int) -> dict[str, np.ndarray | int]:
    height, width, _ = self._shape
    label = index % len(self._patterns)
    rows = np.arange(height) * _BLOCKS // height
    columns = np.arange(width) * _BLOCKS // width
    pattern = self._patterns[label][rows[:, None], columns]
    noise = _random_bytes(self._shape, 1 + self._split, index)
    return dict(image=pattern // 2 + noise // 2, label=label)


def dataset(
  input_shape: tuple[int, int, int] = (32, 32, 3),
  num_classes: int = 10,
  num_train: int = 1024,
  num_test: int = 256,
) -> dataset_lib.Dataset:
  """Returns a learnable synthetic data set with splits 'train' and 'test'.

  Half of every pixel is the pattern of its class, half is noise of its own;
  both splits show the same patterns. Classes are equally frequent.

  Args:
    input_shape: (H, W, C) of an image.
    num_classes: number of classes.
    num_train: examples of 'train'.
    num_test: examples of 'test'.

  Raises:
    ValueError: if any of these is below 1.
  """
  if min(*input_shape, num_classes, num_train, num_test) < 1:
    raise ValueError(
      f'a synthetic data set of {num_train} + {num_test} images of '
      f'{input_shape} in {num_classes} classes: all must be at least 1'
    )
  sizes = dict(train=num_train, test=num_test)

  def open_split(split: str) -> _Examples:
    return _Examples(
      sizes[split], input_shape, num_classes, list(sizes).index(split)
    )

  channels = input_shape[-1]
  return dataset_lib.Dataset(
    name='synthetic',
    num_classes=num_classes,
    input_shape=input_shape,
    split_sizes=sizes,
    # Of the mean of two independent uniform bytes.
    mean=(127.0,) * channels,
    std=(52.0,) * channels,
    open=open_split,
    in_memory=True,
  )
