"""Antialiased bicubic shrinking, as MATLAB's `imresize` does it.

Low-resolution pictures of the literature are made so. Keys 1981 with a = -0.5,
widened by the factor; pictures are continued by their mirror images.
"""

import functools

import numpy as np

_A = -0.5


def shrink(pictures: np.ndarray, scale: int) -> np.ndarray:
  """Returns uint8 [N, H / scale, W / scale, C] of pictures uint8 [N, H, W, C].

  Args:
    pictures: height and width are multiples of `scale`.
    scale: factor, at least 1.
  """
  count, height, width, channels = pictures.shape
  rows = weights(height, scale) @ pictures.reshape(count, height, -1)
  rows = rows.reshape(count, -1, width, channels).transpose(0, 2, 1, 3)
  low = weights(width, scale) @ rows.reshape(count, width, -1)
  low = low.reshape(count, width // scale, height // scale, channels)
  return np.round(low.transpose(0, 2, 1, 3)).clip(0, 255).astype(np.uint8)


@functools.lru_cache(maxsize=8)
def weights(size: int, scale: int) -> np.ndarray:
  """Returns float64 [size / scale, size], the weights of pixels of an axis.

  Every row sums to 1.

  Args:
    size: number of pixels before shrinking.
    scale: factor by which the number is divided.
  """
  low = np.arange(size // scale)
  # The middle of a small pixel, in pixels of the large picture.
  middles = scale * (low + 0.5) - 0.5
  reach = np.arange(-2 * scale, 2 * scale + 1)
  places = np.floor(middles).astype(int)[:, None] + reach
  values = _keys((middles[:, None] - places) / scale)
  values /= values.sum(axis=1, keepdims=True)
  result = np.zeros((len(low), size))
  np.add.at(result, (low[:, None], _mirrored(places, size)), values)
  return result


def _keys(x: np.ndarray) -> np.ndarray:
  """Returns Keys' kernel at distances x."""
  x = np.abs(x)
  near = ((_A + 2) * x - (_A + 3)) * x**2 + 1
  far = _A * (((x - 5) * x + 8) * x - 4)
  return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def _mirrored(places: np.ndarray, size: int) -> np.ndarray:
  """Returns places inside of an axis: -1 is 0, `size` is `size` - 1."""
  places = places % (2 * size)
  return np.minimum(places, 2 * size - 1 - places)
