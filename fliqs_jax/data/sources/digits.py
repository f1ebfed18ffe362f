"""Digits of scikit-learn: 1797 real handwritten ones, 8x8 grey.

They need no download, and a search on them takes minutes on a laptop. TFDS
prepares them once as ArrayRecord, as it does larger data sets.
"""

import contextlib
import functools
import io
import os
import pathlib
import tempfile

import numpy as np
from PIL import Image
import tensorflow_datasets as tfds

from fliqs_jax.data import dataset as dataset_lib
from fliqs_jax.data import images
from fliqs_jax.data.sources import tfds_records
from fliqs_jax.runtime import files

_SPLIT_SIZES = {'train': 1437, 'test': 360}
# scikit-learn's pixels are 0 .. 16; 16 * 15 = 240 fits a byte, exactly.
_PIXEL_SCALE = 15


class Digits(tfds.core.GeneratorBasedBuilder):
  """TFDS builder of scikit-learn's digits: every fifth of a class is test."""

  VERSION = tfds.core.Version('1.0.0')
  # There are no checksums beside this file. To look for them, TFDS would import
  # importlib_resources, which it does not declare (tensorflow/datasets#11212).
  code_path = None

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description='8x8 grey handwritten digits of sklearn.load_digits().',
      homepage='https://archive.ics.uci.edu/dataset/80',
      features=tfds.features.FeaturesDict(
        {
          'image': tfds.features.Image(shape=(8, 8, 1), encoding_format='png'),
          'label': tfds.features.ClassLabel(num_classes=10),
        }
      ),
      supervised_keys=('image', 'label'),
    )

  def _split_generators(self, dl_manager):
    del dl_manager  # Nothing to download.
    return {split: self._generate_examples(split) for split in _SPLIT_SIZES}

  def _generate_examples(self, split: str):
    # The import takes a second and is needed once per data_dir.
    from sklearn import datasets

    digits = datasets.load_digits()
    by_class = np.argsort(digits.target, kind='stable')
    for rank, index in enumerate(by_class):
      if (split == 'test') == (rank % 5 == 0):
        pixels = (digits.images[index] * _PIXEL_SCALE).astype(np.uint8)
        # To encode an array, TFDS would use TensorFlow.
        png = io.BytesIO()
        Image.fromarray(pixels).save(png, format='PNG')
        png.seek(0)
        yield int(index), dict(image=png, label=int(digits.target[index]))


def prepare(data_dir: str) -> pathlib.Path:
  """Prepares the digits below `data_dir` unless they exist; returns their path.

  All files are written to a directory of their own, which is renamed when it is
  complete. So neither a kill nor a second process can leave an incomplete data
  set under the final name. (TFDS renames, too, but names its directory with
  Python's global random numbers, which two runs may have seeded equally, and
  fails if another process was faster.) A kill may leave a directory
  `incomplete.*`, which nothing reads.

  Args:
    data_dir: directory of data sets; '' for the user's cache.

  Raises:
    ValueError: `data_dir` is not a local directory that can be written, or
      something else has the path of the data set.
  """
  if '://' in data_dir:
    raise ValueError(
      f'config.data.data_dir={data_dir!r} must be a local directory for '
      "'digits'; name one, or '' for the user's cache"
    )
  root = dataset_lib.local_path(data_dir or str(files.user_cache() / 'data'))
  directory = root / Digits.name / str(Digits.VERSION)
  try:
    if directory.exists():
      if (directory / 'dataset_info.json').exists():
        return directory
      raise ValueError(
        f'config.data.data_dir={data_dir!r}: {directory} is not a prepared '
        'TFDS data set; delete it, and the next start prepares it again'
      )
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix='incomplete.', dir=root) as scratch:
      builder = Digits(data_dir=scratch)
      # TFDS prints that it downloads, and the name of a scratch directory.
      with contextlib.redirect_stdout(None):
        builder.download_and_prepare(file_format='array_record')
      try:
        os.rename(builder.data_dir, directory)
      except OSError:
        if not directory.exists():  # Otherwise another process was faster.
          raise
  except (OSError, RuntimeError) as error:  # The second is ArrayRecord's.
    raise ValueError(
      f'config.data.data_dir={data_dir!r}: cannot prepare the data set in '
      f'{root} ({error}); name a directory that can be written to and has space'
    ) from error
  return directory


def _open(data_dir: str, split: str) -> dataset_lib.Arrays:
  """Returns a split as it is on the disk now."""
  directory = prepare(data_dir)
  state = ((path.name, path.stat()) for path in sorted(directory.iterdir()))
  return _decoded(
    directory,
    split,
    tuple((name, s.st_ino, s.st_size, s.st_mtime_ns) for name, s in state),
  )


# The runs of a process share both splits: to read them takes a tenth of a run
# of a few steps.
@functools.lru_cache(maxsize=2)
def _decoded(
  directory: pathlib.Path, split: str, state: tuple[tuple[object, ...], ...]
) -> dataset_lib.Arrays:
  """Decodes a split once: 128 PNGs cost as much as a training step.

  Args:
    directory: of the prepared data set.
    split: 'train' or 'test'.
    state: name, inode, size and time of each file; others are decoded anew.
  """
  del state
  records = tfds_records.Prepared(directory, _SPLIT_SIZES).open(split)
  columns = records[np.arange(len(records))]
  return dataset_lib.Arrays(
    image=images.decode_all(
      columns['image'], (8, 8, 1), f'{split} in {directory}'
    ),
    label=columns['label'],
  )


def dataset(data_dir: str) -> dataset_lib.Dataset:
  """Returns the digits; `open` prepares them below `data_dir` if necessary.

  Training images are moved by up to one pixel in each direction.

  Args:
    data_dir: directory of data sets; '' for the user's cache.
  """
  normalise = images.normaliser(mean=(73.4,), std=(90.3,))  # Of 'train'.
  return dataset_lib.Dataset(
    name='digits',
    num_classes=10,
    inputs={'image': dataset_lib.Spec((8, 8, 1))},
    split_sizes=_SPLIT_SIZES,
    open=lambda split: _open(data_dir, split),
    train_inputs=lambda columns, bits: dict(
      image=normalise(images.shift(columns['image'], bits, most=1))
    ),
    eval_inputs=lambda columns: dict(image=normalise(columns['image'])),
  )
