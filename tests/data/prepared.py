"""Tiny data sets as TFDS prepares them: its layout, features and format."""

import contextlib
import io

import numpy as np
from PIL import Image
import tensorflow_datasets as tfds


def encoded(pixels, kind='JPEG', mode=None):
  """Returns the bytes of an image file."""
  file = io.BytesIO()
  image = Image.fromarray(pixels)
  image.convert(mode or image.mode).save(file, kind, quality=95)
  return file.getvalue()


def smooth(seed, height, width):
  """Returns a coloured image without sharp edges, uint8 [H, W, 3]."""
  coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), np.uint8)
  image = Image.fromarray(coarse).resize((width, height), Image.BICUBIC)
  return np.asarray(image)


def imagenet_examples(split):
  """Returns a list of dicts: 40 train, 10 validation, 3 test."""
  size, offset = {'train': (40, 0), 'validation': (10, 100), 'test': (3, 200)}[
    split
  ]
  examples = []
  for i in range(size):
    rng = np.random.default_rng(offset + i)
    height, width = rng.integers(40, 120, 2)
    # Real ImageNet has grey images; CMYK is what old preparations left.
    mode = {0: 'L', 1: 'CMYK'}.get(i)
    if i == 2:
      height, width = 300, 450
    jpeg = encoded(smooth(offset + i, height, width), mode=mode)
    label = -1 if split == 'test' else (7 * (offset + i)) % 1000
    examples.append(
      dict(image=jpeg, label=label, file_name=f'{split}_{i}.JPEG')
    )
  return examples


def cifar_examples(split):
  """Returns a list of dicts: 60 train, 20 test."""
  size, offset = {'train': (60, 0), 'test': (20, 100)}[split]
  return [
    dict(
      image=encoded(smooth(offset + i, 32, 32), 'PNG'),
      label=i % 10,
      id=f'{split}_{i}',
    )
    for i in range(size)
  ]


class _Imagenet(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  name = 'imagenet2012'
  VERSION = tfds.core.Version('5.1.0')
  code_path = None
  splits = ('train', 'validation', 'test')
  examples = staticmethod(imagenet_examples)
  features = {
    'image': tfds.features.Image(encoding_format='jpeg'),
    'label': tfds.features.ClassLabel(num_classes=1000),
    'file_name': tfds.features.Text(),
  }

  def _info(self):
    return tfds.core.DatasetInfo(
      builder=self, features=tfds.features.FeaturesDict(self.features)
    )

  def _split_generators(self, dl_manager):
    del dl_manager
    return {split: self._generate_examples(split) for split in self.splits}

  def _generate_examples(self, split):
    for i, example in enumerate(self.examples(split)):
      yield i, example | dict(image=io.BytesIO(example['image']))


class _Cifar10(_Imagenet, skip_registration=True):
  name = 'cifar10'
  VERSION = tfds.core.Version('3.0.2')
  splits = ('train', 'test')
  examples = staticmethod(cifar_examples)
  features = {
    'id': tfds.features.Text(),
    'image': tfds.features.Image(shape=(32, 32, 3)),
    'label': tfds.features.ClassLabel(num_classes=10),
  }


def imagenet2012(data_dir):
  """Prepares DATA_DIR/imagenet2012/5.1.0."""
  _prepare(_Imagenet, data_dir)


def cifar10(data_dir):
  """Prepares DATA_DIR/cifar10/3.0.2."""
  _prepare(_Cifar10, data_dir)


def _prepare(builder, data_dir):
  with contextlib.redirect_stdout(None):
    builder(data_dir=data_dir).download_and_prepare(file_format='array_record')
