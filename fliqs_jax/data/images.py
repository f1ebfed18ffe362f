"""Functions that image data sets share: pixels to inputs, augmentation."""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import io
import struct

import numpy as np
import PIL
from PIL import Image

# What Pillow raises for damaged data, and for more pixels than it trusts.
_UNDECODABLE = (
  OSError,
  SyntaxError,
  ValueError,
  EOFError,
  struct.error,
  Image.DecompressionBombError,
)


def opened(encoded: bytes) -> Image.Image:
  """Opens a PNG or JPEG, of which the pixels are decoded when they are used.

  An image of 16 bits becomes one of 8: Pillow would clip it at 255.

  Raises:
    ValueError: it is neither.
  """
  try:
    image = Image.open(io.BytesIO(encoded))
  except PIL.UnidentifiedImageError as error:  # Its text is an address.
    raise ValueError('it is neither a PNG nor a JPEG') from error
  if image.mode.startswith('I'):
    deep = np.asarray(image, np.float64)
    return Image.fromarray(np.round(deep / 257).clip(0, 255).astype(np.uint8))
  return image


@contextlib.contextmanager
def decoding(
  name: str, remedy: str = 'prepare the data set again'
) -> Iterator[None]:
  """Names the image that is decoded inside, if that fails.

  Args:
    name: what the image is called.
    remedy: what the user can do.

  Raises:
    ValueError: the image is damaged or too large.
  """
  try:
    yield
  except _UNDECODABLE as error:
    raise ValueError(f'{name} cannot be decoded: {error}; {remedy}') from error


def decode(encoded: bytes) -> np.ndarray:
  """Returns uint8 [H, W, C] of a PNG or JPEG, grey (C = 1) or RGB (C = 3)."""
  image = opened(encoded)
  if image.mode not in ('L', 'RGB'):
    image = image.convert('L' if image.mode in ('1', 'LA') else 'RGB')
  pixels = np.asarray(image)
  return pixels if pixels.ndim == 3 else pixels[..., None]


def decode_all(
  encoded: Sequence[bytes], shape: tuple[int, int, int], source: str
) -> np.ndarray:
  """Returns uint8 [N, H, W, C] of N images of one shape.

  Args:
    encoded: PNGs or JPEGs.
    shape: H, W and C.
    source: name of the split, for messages.

  Raises:
    ValueError: an image cannot be decoded or has another shape; the message
      names it.
  """
  result = np.empty((len(encoded), *shape), np.uint8)
  for i, one in enumerate(encoded):
    name = f'image {i} of {source}'
    with decoding(name):
      pixels = decode(one)
    if pixels.shape != shape:
      raise ValueError(
        f'{name} has the shape {pixels.shape}, not {shape}; prepare the data '
        'set again'
      )
    result[i] = pixels
  return result


def normaliser(
  mean: tuple[float, ...], std: tuple[float, ...]
) -> Callable[[np.ndarray], np.ndarray]:
  """Returns the function from uint8 [..., C] to (x - mean) / std in float32.

  Args:
    mean: [C] mean of the training images, 0 to 255.
    std: [C] standard deviation of the training images.
  """
  means, stds = np.asarray(mean, np.float32), np.asarray(std, np.float32)

  def normalise(images: np.ndarray) -> np.ndarray:
    # One row at a time: NumPy loops over the last axis, and a loop over three
    # channels takes five times as long.
    *outer, width, channels = images.shape
    result = np.subtract(
      images.reshape(*outer, width * channels), np.tile(means, width)
    )
    result /= np.tile(stds, width)
    return result.reshape(images.shape)

  return normalise


def shift(images: np.ndarray, bits: np.ndarray, most: int) -> np.ndarray:
  """Moves each image by up to `most` pixels each way and fills with zeros.

  The result equals padding with `most` zeros on each side and a random crop.

  Args:
    images: uint8 [N, H, W, C] images.
    bits: uint64 [N] random bits.
    most: largest distance in pixels, at least 0.

  Returns:
    uint8 [N, H, W, C].
  """
  count, height, width, _ = np.shape(images)
  padded = np.pad(images, ((0, 0), (most, most), (most, most), (0, 0)))
  # The distances are equally likely, up to a few in 2**62.
  ways = np.uint64(2 * most + 1)
  down, right = (bits % ways).astype(int), (bits // ways % ways).astype(int)
  rows = down[:, None] + np.arange(height)
  columns = right[:, None] + np.arange(width)
  return padded[
    np.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]
  ]


def flip(images: np.ndarray, bits: np.ndarray) -> np.ndarray:
  """Mirrors the images whose highest bit is set, left to right.

  Args:
    images: [N, H, W, C] images.
    bits: uint64 [N] random bits.
  """
  mirrored = (bits >> np.uint64(63)).astype(bool)
  return np.where(mirrored[:, None, None, None], images[:, :, ::-1], images)


def crop_flip(images: np.ndarray, bits: np.ndarray) -> np.ndarray:
  """Moves images by up to 4 pixels each way and mirrors every other one.

  He et al. 2015 (arXiv:1512.03385), section 4.2. Fills with zeros.

  Args:
    images: uint8 [N, H, W, C].
    bits: uint64 [N], random.

  Returns:
    uint8 [N, H, W, C].
  """
  return flip(shift(images, bits, most=4), bits)


_AUGMENTATIONS = {'none': lambda images, bits: images, 'crop_flip': crop_flip}


def augmentation(name: str) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
  """Returns a function from uint8 [N, H, W, C] and random bits to the same.

  Args:
    name: value of `config.data.augment`: 'crop_flip', or 'none', which changes
      nothing.

  Raises:
    ValueError: the name is unknown.
  """
  if name not in _AUGMENTATIONS:
    raise ValueError(
      f'config.data.augment={name!r} is unknown; allowed: '
      f'{", ".join(_AUGMENTATIONS)}'
    )
  return _AUGMENTATIONS[name]
