"""Functions that image data sets share: pixels to inputs, small shifts."""

from collections.abc import Callable
import io

import numpy as np
from PIL import Image


def decode(encoded: bytes) -> np.ndarray:
  """Returns uint8 [H, W, C] of a PNG or JPEG."""
  pixels = np.asarray(Image.open(io.BytesIO(encoded)))
  return pixels if pixels.ndim == 3 else pixels[..., None]


def normaliser(
  mean: tuple[float, ...], std: tuple[float, ...]
) -> Callable[[np.ndarray], np.ndarray]:
  """Returns the function from uint8 [..., C] to (x - mean) / std in float32.

  Args:
    mean: [C] of the training images, 0 to 255.
    std: [C], their standard deviation.
  """
  means, stds = np.asarray(mean, np.float32), np.asarray(std, np.float32)

  def normalise(images: np.ndarray) -> np.ndarray:
    # A whole row at a time: NumPy loops over the last axis, and over one of
    # three channels it takes five times as long.
    *outer, width, channels = images.shape
    result = np.subtract(
      images.reshape(*outer, width * channels), np.tile(means, width)
    )
    result /= np.tile(stds, width)
    return result.reshape(images.shape)

  return normalise


def shift(images: np.ndarray, bits: np.ndarray, most: int) -> np.ndarray:
  """Moves every image by up to `most` pixels each way; zeros enter.

  The same as padding with `most` zeros all around and cropping at random.

  Args:
    images: uint8 [N, H, W, C].
    bits: uint64 [N], random.
    most: at least 0.

  Returns:
    uint8 [N, H, W, C].
  """
  count, height, width, _ = np.shape(images)
  padded = np.pad(images, ((0, 0), (most, most), (most, most), (0, 0)))
  # Equally likely ways, but for a few in 2**62.
  ways = np.uint64(2 * most + 1)
  down, right = (bits % ways).astype(int), (bits // ways % ways).astype(int)
  rows = down[:, None] + np.arange(height)
  columns = right[:, None] + np.arange(width)
  return padded[
    np.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]
  ]


def flip(images: np.ndarray, bits: np.ndarray) -> np.ndarray:
  """Mirrors every other image, by the highest bit, left to right.

  Args:
    images: [N, H, W, C].
    bits: uint64 [N], random.
  """
  mirrored = (bits >> np.uint64(63)).astype(bool)
  return np.where(mirrored[:, None, None, None], images[:, :, ::-1], images)
