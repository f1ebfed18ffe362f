"""ImageNet (ILSVRC 2012), as a user prepared it with TFDS.

Crops are those of Inception and ResNet training, in the arithmetic of
torchvision and timm, whose recipes (DeiT's, ResNet's) then carry over: PIL,
antialiased bicubic interpolation. PIL decodes and resizes a 500x375 image to
224x224 in 1.7 ms of one core; OpenCV would take 0.75 ms, is another 150 MB to
install, and does not antialias.
"""

from collections.abc import Callable
import concurrent.futures
import math
import os

import numpy as np
from PIL import Image

from fliqs_jax.data import dataset as dataset_lib
from fliqs_jax.data import deit_augment
from fliqs_jax.data import images
from fliqs_jax.data import random_bits
from fliqs_jax.data.sources import tfds_records

NAME = 'imagenet2012'
AUGMENTATIONS = ('none', 'crop_flip', 'randaugment')

# The usual mean and standard deviation of each channel of the training images.
_MEAN = tuple(255 * mean for mean in (0.485, 0.456, 0.406))
_STD = tuple(255 * std for std in (0.229, 0.224, 0.225))

_AREA = (0.08, 1.0)  # Share of the image that a training crop shows.
_ASPECT = (3 / 4, 4 / 3)  # Its width over its height.
_ATTEMPTS = 10
_EVAL_RATIO = 0.875  # 224 of 256.

# Images that one task of the thread pool decodes.
_CHUNK = 8

_HOW_TO_PREPARE = (
  'python -c "import tensorflow_datasets as tfds; '
  "tfds.builder('imagenet2012', data_dir='{data_dir}')"
  ".download_and_prepare(file_format='array_record', "
  "download_config=tfds.download.DownloadConfig(manual_dir='TARS'))\", where "
  'TARS holds ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar from '
  'https://image-net.org/download-images'
)


def random_crop_box(
  width: int, height: int, draws: random_bits.Draws
) -> tuple[int, int, int, int]:
  """Returns (left, upper, right, lower) of a training crop, in pixels.

  Area and aspect ratio are drawn until the crop fits. After ten draws the crop
  is the largest central one with an allowed aspect ratio, as in torchvision.
  """
  for _ in range(_ATTEMPTS):
    area = width * height * draws.uniform(*_AREA)
    aspect = math.exp(draws.uniform(*map(math.log, _ASPECT)))
    w = round(math.sqrt(area * aspect))
    h = round(math.sqrt(area / aspect))
    if 0 < w <= width and 0 < h <= height:
      left = draws.below(width - w + 1)
      upper = draws.below(height - h + 1)
      return left, upper, left + w, upper + h
  narrowest, widest = _ASPECT
  w = min(width, max(1, round(height * widest)))
  h = min(height, max(1, round(width / narrowest)))
  left, upper = (width - w) // 2, (height - h) // 2
  return left, upper, left + w, upper + h


def train_crop(
  image: Image.Image, size: int, draws: random_bits.Draws
) -> Image.Image:
  """Returns a random crop as a size x size image, mirrored every other time."""
  width, height = image.size
  left, upper, right, lower = random_crop_box(width, height, draws)
  # A JPEG can be decoded at a half, a quarter or an eighth of its size: three
  # times faster for 1600x1200 pixels. The crop must not need enlarging.
  image.draft(
    None,
    (size * width // (right - left), size * height // (lower - upper)),
  )
  across, down = image.size[0] / width, image.size[1] / height
  box = (left * across, upper * down, right * across, lower * down)
  crop = _resize(image, size, box)
  if draws.below(2):
    crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
  return crop


def eval_crop(image: Image.Image, size: int) -> Image.Image:
  """Returns the size x size centre of an image after resizing.

  The shorter side becomes size / 0.875, rounded: 256 for 224. Only the centre
  is computed; the result equals resizing the whole image and cropping it.
  """
  shorter = round(size / _EVAL_RATIO)
  # Rounded as torchvision rounds them.
  resized = [side * shorter // min(image.size) for side in image.size]
  box = []
  for side, new_side in zip(image.size, resized):
    first, scale = round((new_side - size) / 2), side / new_side
    box.append((first * scale, (first + size) * scale))
  (left, right), (upper, lower) = box
  return _resize(image, size, (left, upper, right, lower))


def _resize(
  image: Image.Image, size: int, box: tuple[float, float, float, float]
) -> Image.Image:
  # Some images are grey, and CMYK if an older TFDS prepared them.
  if image.mode != 'RGB':
    image = image.convert('RGB')
  return image.resize((size, size), Image.Resampling.BICUBIC, box=box)


class _Crops:
  """Makes normalised crops of encoded images, on one core per image.

  The images of one batch are decoded in parallel. With one thread per batch
  there would be one batch per core in memory, 1.2 GB each for 2048 images.
  """

  def __init__(self, size: int, augment: str, random_erasing: float):
    self._size, self._augment = size, augment
    self._random_erasing = random_erasing
    self._normalise = images.normaliser(_MEAN, _STD)
    self._pool = concurrent.futures.ThreadPoolExecutor(os.cpu_count())

  def train_inputs(
    self, columns: dataset_lib.Columns, bits: np.ndarray
  ) -> dataset_lib.Columns:
    return self._inputs(
      columns, lambda image, row: self._train_pixels(image, bits[row])
    )

  def eval_inputs(self, columns: dataset_lib.Columns) -> dataset_lib.Columns:
    return self._inputs(
      columns, lambda image, row: np.asarray(eval_crop(image, self._size))
    )

  def _train_pixels(self, image: Image.Image, bits: int) -> np.ndarray:
    """Returns uint8 [H, W, 3] of an opened image."""
    draws = random_bits.Draws(bits)
    if self._augment == 'none':
      crop = eval_crop(image, self._size)
    else:
      crop = train_crop(image, self._size, draws)
    if self._augment == 'randaugment':
      fill = tuple(map(round, _MEAN))
      crop = deit_augment.randaugment(crop, draws, fill)
    pixels = np.array(crop)
    if draws.uniform() < self._random_erasing:
      deit_augment.erase(pixels, draws, _MEAN, _STD)
    return pixels

  def _inputs(
    self,
    columns: dataset_lib.Columns,
    pixels: Callable[[Image.Image, int], np.ndarray],
  ) -> dataset_lib.Columns:
    count = len(columns['image'])
    result = np.empty((count, self._size, self._size, 3), np.float32)

    def fill(first: int) -> None:
      for row in range(first, min(first + _CHUNK, count)):
        name = f'{columns["file_name"][row].decode()} of {NAME!r}'
        with images.decoding(name):
          image = images.opened(columns['image'][row])
          result[row] = self._normalise(pixels(image, row))

    # The list raises an error of `fill`.
    list(self._pool.map(fill, range(0, count, _CHUNK)))
    return dict(image=result)


def dataset(
  data_dir: str,
  image_size: int = 224,
  augment: str = 'crop_flip',
  random_erasing: float = 0.0,
  read: bool = True,
) -> dataset_lib.Dataset:
  """Returns ImageNet's splits 'train' and 'validation'.

  Args:
    data_dir: directory in which TFDS prepared the data set as ArrayRecord,
      local or in a bucket (gs://, needs gcsfs; not tested); '' for TFDS's own.
    image_size: height and width of an image in a batch, in pixels.
    augment: augmentation of training images. 'crop_flip' shows 8 to 100 % of an
      image at an aspect ratio of 3/4 to 4/3 and mirrors every other image.
      'randaugment' does the same and then DeiT's RandAugment. 'none' shows the
      evaluation crop.
    random_erasing: share, in [0, 1], of training images in which a rectangle is
      overwritten with noise.
    read: whether the files are looked for; if not, the data set has its shapes
      and no examples.

  Raises:
    ValueError: a value is not allowed, or the data set is not prepared; nothing
      is downloaded.
  """
  if image_size < 1:
    raise ValueError(f'config.data.image_size={image_size} must be at least 1')
  if augment not in AUGMENTATIONS:
    raise ValueError(
      f'config.data.augment={augment!r} is unknown; allowed: '
      f'{", ".join(AUGMENTATIONS)}'
    )
  if not 0 <= random_erasing <= 1:
    raise ValueError(
      f'config.data.random_erasing={random_erasing} must be from 0 to 1: the '
      'share of training images with an erased rectangle'
    )
  prepared = (
    tfds_records.find(NAME, data_dir, _HOW_TO_PREPARE)
    if read
    else tfds_records.UNREAD
  )
  sizes = dict(prepared.split_sizes)
  sizes.pop('test', None)  # It has no labels.
  crops = _Crops(image_size, augment, random_erasing)
  return dataset_lib.Dataset(
    name=NAME,
    num_classes=1000,
    inputs={'image': dataset_lib.Spec((image_size, image_size, 3))},
    split_sizes=sizes,
    open=prepared.open,
    train_inputs=crops.train_inputs,
    eval_inputs=crops.eval_inputs,
    threads=2,
  )
