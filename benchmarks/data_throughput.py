r"""Measures the speed of `data`: examples per second, and CPU time of each.

python -m benchmarks.data_throughput [--images=1000] [--lines=200000]

The benchmark makes JPEGs of 500x375 and 1600x1200 pixels and lines of Criteo's
format, prepares them in a temporary directory as a user would, and reads both
by `data.make_streams`, one stream after the other. Compare the CPU time, which
is that of all threads; examples per second depend on the load of the machine.
"""

import argparse
import contextlib
import io
import itertools
import pathlib
import tempfile
import time

import ml_collections
import numpy as np
from PIL import Image
import tensorflow_datasets as tfds

from fliqs_jax import data
from fliqs_jax.data.sources import criteo_store

_SIZES = {'500x375': (500, 375), '1600x1200': (1600, 1200)}
_DISTINCT = 50  # Number of different JPEGs, which are repeated.
_BATCH = 64
_ROWS = 4096


def _jpeg(seed: int, width: int, height: int) -> bytes:
  """Returns a photograph-like image: detail at every scale, and some noise."""
  rng = np.random.default_rng(seed)
  pixels = np.zeros((height, width, 3))
  for cells in (4, 8, 16, 32, 64, 128):
    shape = (cells * height // width + 1, cells, 3)
    coarse = Image.fromarray(rng.integers(0, 256, shape, np.uint8))
    fine = coarse.resize((width, height), Image.Resampling.BICUBIC)
    pixels += np.asarray(fine, float) / cells**0.6
  pixels = 255 * (pixels - pixels.min()) / np.ptp(pixels)
  pixels = np.clip(pixels + 5 * rng.standard_normal(pixels.shape), 0, 255)
  file = io.BytesIO()
  Image.fromarray(pixels.astype(np.uint8)).save(file, 'JPEG', quality=92)
  return file.getvalue()


class _Imagenet(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """A data set in the layout of ImageNet, which repeats `jpegs`."""

  name = 'imagenet2012'
  VERSION = tfds.core.Version('5.1.0')
  code_path = None

  def __init__(self, jpegs: list[bytes], count: int, **kwargs):
    self._jpegs, self._count = jpegs, count
    super().__init__(**kwargs)

  def _info(self):
    features = dict(
      image=tfds.features.Image(encoding_format='jpeg'),
      label=tfds.features.ClassLabel(num_classes=1000),
      file_name=tfds.features.Text(),
    )
    return tfds.core.DatasetInfo(
      builder=self, features=tfds.features.FeaturesDict(features)
    )

  def _split_generators(self, dl_manager):
    del dl_manager
    return {s: self._generate_examples() for s in ('train', 'validation')}

  def _generate_examples(self):
    for i in range(self._count):
      jpeg = io.BytesIO(self._jpegs[i % len(self._jpegs)])
      yield i, dict(image=jpeg, label=i % 1000, file_name=f'{i}.JPEG')


class _Clock:
  """Wall and CPU time since its construction."""

  def __init__(self):
    self._wall, self._cpu = time.perf_counter(), time.process_time()

  def print_row(self, what: str, examples: int) -> None:
    wall = time.perf_counter() - self._wall
    cpu = time.process_time() - self._cpu
    rates = f'{examples / wall:,.0f} | {1e6 * cpu / examples:,.1f}'
    print(f'| {what} | {rates} |', flush=True)


def _measure(what: str, batches, count: int) -> None:
  for _ in range(3):  # Threads start, files open.
    next(batches)
  clock = _Clock()
  labels = [batch['label'] for batch in itertools.islice(batches, count)]
  clock.print_row(what, sum(map(len, labels)))


def _images(count: int) -> None:
  for name, (width, height) in _SIZES.items():
    jpegs = [_jpeg(seed, width, height) for seed in range(_DISTINCT)]
    kilobytes = np.mean([len(jpeg) for jpeg in jpegs]) / 1000
    with tempfile.TemporaryDirectory() as data_dir:
      with contextlib.redirect_stdout(None):
        _Imagenet(jpegs, count, data_dir=data_dir).download_and_prepare(
          file_format='array_record'
        )
      config = ml_collections.ConfigDict(
        dict(
          name='imagenet2012',
          data_dir=data_dir,
          train_split='train[:80%]',
          valid_split='train[80%:]',
          test_split='validation',
          batch_size=_BATCH,
          valid_batch_size=_BATCH,
          test_batch_size=_BATCH,
          image_size=224,
          augment='crop_flip',
          random_erasing=0.0,
        )
      )
      rows = f'JPEG {name}, {kilobytes:.0f} KB'
      steps = max(1, count // _BATCH)
      for changes in (
        dict(augment='crop_flip'),
        dict(augment='randaugment', random_erasing=0.25),
      ):
        config.update(changes)
        streams = data.make_streams(config, seed=0)
        _measure(f'{rows}, train, {config.augment}', streams.train(0), steps)
      _measure(f'{rows}, evaluation', streams.valid(0), steps)


def _clicks(count: int) -> None:
  rng = np.random.default_rng(0)
  integers = rng.integers(0, 10**4, (count, 13)).astype(str)
  categories = rng.integers(0, 2**32, (count, 26))
  with tempfile.TemporaryDirectory() as data_dir:
    path = pathlib.Path(data_dir, 'train.txt')
    with path.open('w') as file:
      for ints, cats in zip(integers, categories.tolist()):
        ids = '\t'.join(f'{c:08x}' for c in cats)
        file.write(f'{cats[0] % 2}\t{chr(9).join(ints)}\t{ids}\n')
    clock = _Clock()
    criteo_store.open_rows(path, pathlib.Path(data_dir, 'criteo_store'), 0)
    clock.print_row('Criteo, conversion', count)
    config = ml_collections.ConfigDict(
      dict(
        name='criteo',
        data_dir=data_dir,
        train_split='train[:80%]',
        valid_split='train[80%:90%]',
        test_split='train[90%:]',
        batch_size=_ROWS,
        valid_batch_size=_ROWS,
        test_batch_size=_ROWS,
        buckets=2**15,
        max_bad_lines=0,
      )
    )
    streams = data.make_streams(config, seed=0)
    steps = 5 * count // _ROWS
    _measure(f'Criteo, train, {_ROWS} a batch', streams.train(0), steps)


def main() -> None:
  """Runs everything and prints one table."""
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--images', type=int, default=1000)
  parser.add_argument('--lines', type=int, default=200_000)
  args = parser.parse_args()
  print('| data | examples / s | CPU us / example |')
  print('|---|---|---|')
  _images(args.images)
  _clicks(args.lines)


if __name__ == '__main__':
  main()
