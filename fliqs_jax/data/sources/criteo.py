"""Criteo's display advertising data: 13 integers and 26 categories to a click.

The user puts the file train.txt of the Kaggle challenge into `data_dir`. Its
lines, and so the rows, are in the order of seven days: the examples of
'train[90%:]' come after those of 'train[:90%]'.
"""

import functools

import numpy as np

from fliqs_jax.data import dataset as dataset_lib
from fliqs_jax.data import random_bits
from fliqs_jax.data.sources import criteo_store

NAME = 'criteo'
_SOURCE, _STORE = 'train.txt', 'criteo_store'


class Rows:
  """Examples that are rows of type `criteo_store.ROW`."""

  def __init__(self, rows: np.ndarray):
    self._rows = rows

  def __len__(self) -> int:
    return len(self._rows)

  def __getitem__(self, numbers: np.ndarray) -> dataset_lib.Columns:
    rows = np.asarray(self._rows[numbers])
    columns = {name: rows[name] for name in rows.dtype.names}
    return columns | dict(label=rows['label'].astype(np.int64))


def log_transform(integers: np.ndarray) -> np.ndarray:
  """Returns log(x + 1) in float32, and 0 for x < 0 and where x is missing.

  Most columns are counts with long tails; the few negative values are -1 to -3.

  Args:
    integers: int32 [...]; a missing one is `criteo_store.MISSING`.
  """
  # In float64: float32 cannot express 2**31 - 1, and the last bit of a float32
  # logarithm differs between machines.
  return np.log1p(np.maximum(integers, 0).astype(np.float64)).astype(np.float32)


def bucket_ids(
  categories: np.ndarray, missing: np.ndarray, buckets: int
) -> np.ndarray:
  """Returns int32 [N, 26], the bucket of each category in its own column.

  Bucket 0 is for missing categories. Category c of column i = 0 .. 25 is in
  bucket 1 + mix(i * 2**32 + c) % (buckets - 1), with `random_bits.mix`.

  Args:
    categories: uint32 [N, 26] categories.
    missing: uint32 [N]; bit i is set if the category of column i is missing.
    buckets: number of buckets of a column, at least 2.
  """
  columns = np.arange(categories.shape[1], dtype=np.uint64)
  keys = (columns << np.uint64(32)) | categories.astype(np.uint64)
  ids = 1 + random_bits.mix(keys) % np.uint64(buckets - 1)
  absent = (missing[:, None] >> columns.astype(np.uint32)) & 1
  return np.where(absent, 0, ids).astype(np.int32)


def inputs(columns: dataset_lib.Columns, buckets: int) -> dataset_lib.Columns:
  """Returns the inputs of a model: 'dense' [N, 13] and 'ids' [N, 26]."""
  return dict(
    dense=log_transform(columns['integers']),
    ids=bucket_ids(columns['categories'], columns['missing'], buckets),
  )


def table(
  name: str, splits: dict[str, np.ndarray], buckets: int
) -> dataset_lib.Dataset:
  """Returns the data set whose splits are rows of type `criteo_store.ROW`.

  Args:
    name: name of the data set.
    splits: {name of a split: its rows}.
    buckets: number of buckets that the categories of a column share.
  """
  from_rows = functools.partial(inputs, buckets=buckets)
  ids = dataset_lib.Spec((criteo_store.NUM_CATEGORIES,), np.dtype(np.int32))
  return dataset_lib.Dataset(
    name=name,
    num_classes=2,
    inputs={
      'dense': dataset_lib.Spec((criteo_store.NUM_INTEGERS,)),
      'ids': ids,
    },
    split_sizes={split: len(rows) for split, rows in splits.items()},
    open=lambda split: Rows(splits[split]),
    train_inputs=lambda columns, bits: from_rows(columns),
    eval_inputs=from_rows,
  )


def check_buckets(buckets: int) -> None:
  """Checks the value of the config key `data.buckets`.

  Raises:
    ValueError: it is below 2, or too large for an int32.
  """
  if not 2 <= buckets < 2**31:
    raise ValueError(
      f'config.data.buckets={buckets} must be from 2 to {2**31 - 1}: one '
      'bucket is for missing categories'
    )


def dataset(
  data_dir: str, buckets: int, max_bad_lines: int = 0, read: bool = True
) -> dataset_lib.Dataset:
  """Returns Criteo's only labelled split, 'train'; converts it on first use.

  Args:
    data_dir: a local directory with train.txt; the directory criteo_store,
      which is made beside the file, needs 7.5 GB for all its lines.
    buckets: number of buckets that the categories of a column share.
    max_bad_lines: largest number of malformed lines that may be left out. Each
      is written to criteo_store/info.json, and each start logs the first ones.
    read: whether the files are looked for; if not, the data set has its shapes
      and no examples.

  Raises:
    ValueError: a value is not allowed, the file is missing, or more lines are
      malformed; the message names them.
  """
  check_buckets(buckets)
  if max_bad_lines < 0:
    raise ValueError(
      f'config.data.max_bad_lines={max_bad_lines} must not be negative'
    )
  if not read:
    return table(NAME, {}, buckets)
  if not data_dir or '://' in data_dir:
    raise ValueError(
      f'config.data.data_dir={data_dir!r} must be a local directory with '
      f"Criteo's {_SOURCE}"
    )
  root = dataset_lib.local_path(data_dir)
  try:
    rows = criteo_store.open_rows(root / _SOURCE, root / _STORE, max_bad_lines)
  except OSError as error:
    raise ValueError(
      f'config.data.data_dir={data_dir!r} cannot be used: {error}; name a '
      'local directory that can be written'
    ) from error
  return table(NAME, dict(train=rows), buckets)
