"""Augmentation of DeiT's recipe: RandAugment and random erasing.

Both are as in timm, for which DeiT's recipe is written: 'rand-m9-mstd0.5-inc1'
with two operations, and erasing in 'pixel' mode. There are two differences.
Posterizing keeps at least one bit, which Pillow requires. Erasing works on
bytes, so its noise is clipped at black and white and has 256 levels.
"""

from collections.abc import Callable, Mapping
import math
import statistics

import numpy as np
from PIL import Image
from PIL import ImageEnhance
from PIL import ImageOps

from fliqs_jax.data import random_bits

_OPERATIONS = 2  # Per image, each skipped half of the time.
_MAGNITUDE, _MAGNITUDE_STD, _MOST = 9.0, 0.5, 10.0

_ERASED_AREA = (0.02, 1 / 3)  # Share of the image.
_ERASED_ASPECT = (0.3, 1 / 0.3)
_ATTEMPTS = 10

# (image, strength in [0, 1], sign -1 or 1, colour of the borders) -> image.
_Operation = Callable[[Image.Image, float, int, tuple], Image.Image]


def _affine(image, matrix, fill):
  return image.transform(
    image.size,
    Image.Transform.AFFINE,
    matrix,
    Image.Resampling.BICUBIC,
    fillcolor=fill,
  )


def _rotate(image, strength, sign, fill):
  degrees = sign * 30 * strength
  return image.rotate(degrees, Image.Resampling.BICUBIC, fillcolor=fill)


def _shear_x(image, strength, sign, fill):
  return _affine(image, (1, sign * 0.3 * strength, 0, 0, 1, 0), fill)


def _shear_y(image, strength, sign, fill):
  return _affine(image, (1, 0, 0, sign * 0.3 * strength, 1, 0), fill)


def _translate_x(image, strength, sign, fill):
  by = sign * 0.45 * strength * image.size[0]
  return _affine(image, (1, 0, by, 0, 1, 0), fill)


def _translate_y(image, strength, sign, fill):
  by = sign * 0.45 * strength * image.size[1]
  return _affine(image, (1, 0, 0, 0, 1, by), fill)


def _posterize(image, strength, sign, fill):
  del sign, fill
  return ImageOps.posterize(image, max(1, 4 - int(4 * strength)))


def _solarize(image, strength, sign, fill):
  del sign, fill
  return ImageOps.solarize(image, 256 - min(256, int(256 * strength)))


def _solarize_add(image, strength, sign, fill):
  del sign, fill
  brighter = min(128, int(110 * strength))
  table = [min(255, i + brighter) if i < 128 else i for i in range(256)]
  return image.point(table * len(image.getbands()))


def _enhance(enhancer: type) -> _Operation:
  def enhance(image, strength, sign, fill):
    del fill
    return enhancer(image).enhance(max(0.1, 1 + sign * 0.9 * strength))

  return enhance


def _plain(function: Callable[[Image.Image], Image.Image]) -> _Operation:
  return lambda image, strength, sign, fill: function(image)


OPERATIONS: Mapping[str, _Operation] = {
  'auto_contrast': _plain(ImageOps.autocontrast),
  'equalize': _plain(ImageOps.equalize),
  'invert': _plain(ImageOps.invert),
  'rotate': _rotate,
  'posterize': _posterize,
  'solarize': _solarize,
  'solarize_add': _solarize_add,
  'color': _enhance(ImageEnhance.Color),
  'contrast': _enhance(ImageEnhance.Contrast),
  'brightness': _enhance(ImageEnhance.Brightness),
  'sharpness': _enhance(ImageEnhance.Sharpness),
  'shear_x': _shear_x,
  'shear_y': _shear_y,
  'translate_x': _translate_x,
  'translate_y': _translate_y,
}


def randaugment(
  image: Image.Image, draws: random_bits.Draws, fill: tuple[int, ...]
) -> Image.Image:
  """Returns the image after two random operations of magnitude 9 of 10.

  Args:
    image: an RGB image.
    draws: the source of all randomness.
    fill: RGB colour, 0 to 255, of pixels beyond the borders.
  """
  names = list(OPERATIONS)
  for _ in range(_OPERATIONS):
    operation = OPERATIONS[names[draws.below(len(names))]]
    skipped = draws.below(2)
    magnitude = _MAGNITUDE + _MAGNITUDE_STD * _normal(draws)
    sign = 1 - 2 * draws.below(2)
    if not skipped:
      strength = min(max(magnitude, 0.0), _MOST) / _MOST
      image = operation(image, strength, sign, fill)
  return image


def _normal(draws: random_bits.Draws) -> float:
  """Returns a number of mean 0 and variance 1 (Box and Muller)."""
  radius = math.sqrt(-2 * math.log(1 - draws.uniform()))
  return radius * math.cos(2 * math.pi * draws.uniform())


# The middle of each of 256 equally likely parts of the normal distribution.
_LEVELS = np.array(
  [statistics.NormalDist().inv_cdf((i + 0.5) / 256) for i in range(256)]
)


def erase(
  pixels: np.ndarray,
  draws: random_bits.Draws,
  mean: tuple[float, ...],
  std: tuple[float, ...],
) -> None:
  """Overwrites a random rectangle with normal noise for each pixel and channel.

  Args:
    pixels: uint8 [H, W, C] image, changed in place.
    draws: the source of all randomness.
    mean: [C] mean of the noise, 0 to 255.
    std: [C] standard deviation of the noise.
  """
  height, width, channels = pixels.shape
  for _ in range(_ATTEMPTS):
    area = height * width * draws.uniform(*_ERASED_AREA)
    aspect = math.exp(draws.uniform(*map(math.log, _ERASED_ASPECT)))
    h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
    if 0 < h < height and 0 < w < width:
      break
  else:
    return
  top, left = draws.below(height - h + 1), draws.below(width - w + 1)
  count = h * w * channels
  noise = random_bits.words(draws.bits(), 0, -(-count // 8)).astype('<u8')
  levels = _LEVELS[noise.view(np.uint8)[:count].reshape(h, w, channels)]
  values = np.round(np.asarray(mean) + np.asarray(std) * levels)
  pixels[top : top + h, left : left + w] = np.clip(values, 0, 255)
