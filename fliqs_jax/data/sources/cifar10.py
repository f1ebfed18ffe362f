"""CIFAR-10, as a user prepared it with TFDS."""

import numpy as np

from fliqs_jax.data import dataset as dataset_lib
from fliqs_jax.data import images
from fliqs_jax.data.sources import tfds_records

NAME = 'cifar10'
_SHAPE = (32, 32, 3)

# Mean and standard deviation of each channel of the training images.
_MEAN = tuple(255 * mean for mean in (0.4914, 0.4822, 0.4465))
_STD = tuple(255 * std for std in (0.2470, 0.2435, 0.2616))

_HOW_TO_PREPARE = (
  'python -c "import tensorflow_datasets as tfds; '
  "tfds.builder('cifar10', data_dir='{data_dir}')"
  ".download_and_prepare(file_format='array_record')\""
)


def _open(prepared: tfds_records.Prepared, split: str) -> dataset_lib.Arrays:
  """Decodes a split once: 150 MB for all, and PNGs cost more than a gather."""
  records = prepared.open(split)
  columns = records[np.arange(len(records))]
  return dataset_lib.Arrays(
    image=images.decode_all(
      columns['image'], _SHAPE, f'{split} in {prepared.directory}'
    ),
    label=columns['label'],
  )


def dataset(
  data_dir: str, augment: str = 'crop_flip', read: bool = True
) -> dataset_lib.Dataset:
  """Returns CIFAR-10's splits 'train' and 'test'.

  Args:
    data_dir: directory in which TFDS prepared the data set as ArrayRecord,
      local or in a bucket (gs://, needs gcsfs; not tested); '' for TFDS's own.
    augment: augmentation of training images, a name that
      `images.augmentation` knows.
    read: whether the files are looked for; if not, the data set has its shapes
      and no examples.

  Raises:
    ValueError: the augmentation is unknown, or the data set is not prepared;
      nothing is downloaded.
  """
  augmented = images.augmentation(augment)
  prepared = (
    tfds_records.find(NAME, data_dir, _HOW_TO_PREPARE)
    if read
    else tfds_records.UNREAD
  )
  normalise = images.normaliser(_MEAN, _STD)
  return dataset_lib.Dataset(
    name=NAME,
    num_classes=10,
    inputs={'image': dataset_lib.Spec(_SHAPE)},
    split_sizes=prepared.split_sizes,
    open=lambda split: _open(prepared, split),
    train_inputs=lambda columns, bits: dict(
      image=normalise(augmented(columns['image'], bits))
    ),
    eval_inputs=lambda columns: dict(image=normalise(columns['image'])),
  )
