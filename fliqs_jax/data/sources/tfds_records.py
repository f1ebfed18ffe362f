"""Data sets that a user prepared with TFDS, as ArrayRecord; no downloads.

TFDS keeps a data set as DATA_DIR/NAME/VERSION/: dataset_info.json,
features.json and the shards of each split. A directory in a bucket (gs://,
needs gcsfs) is read by the same code; tests cover local ones only.
"""

from collections.abc import Iterator, Mapping
import contextlib
import dataclasses
import json
import os

from etils import epath
import numpy as np

from fliqs_jax.data import dataset as dataset_lib

INFO = 'dataset_info.json'


@dataclasses.dataclass(frozen=True)
class Prepared:
  """A data set that TFDS has prepared.

  Attributes:
    directory: the directory of its dataset_info.json.
    split_sizes: {split: number of examples}.
  """

  directory: os.PathLike[str]
  split_sizes: Mapping[str, int]

  def open(self, split: str) -> dataset_lib.Examples:
    """Returns the examples of a split; images stay encoded."""
    return _Records(self.directory, split)


# Of a data set of which only the shapes matter.
UNREAD = Prepared(epath.Path(), {})


def find(name: str, data_dir: str, how_to_prepare: str) -> Prepared:
  """Finds the newest version of a prepared data set.

  Args:
    name: name of the data set in TFDS.
    data_dir: directory of data sets; '' for TFDS's own.
    how_to_prepare: a shell command that prepares the data set, for the error
      message; {data_dir} is replaced by the directory.

  Raises:
    ValueError: the data set is not prepared, or in a format without random
      access; the message says what to do.
  """
  place = data_dir or os.environ.get('TFDS_DATA_DIR') or '~/tensorflow_datasets'
  key = f'config.data.data_dir={data_dir!r}'
  try:
    local = '://' not in place
    root = epath.Path(dataset_lib.local_path(place) if local else place)
    versions = {}
    if (root / name).is_dir():
      for path in (root / name).iterdir():
        # TFDS names an unfinished directory 'incomplete...'.
        if _version(path.name) and (path / INFO).exists():
          versions[_version(path.name)] = path
    if not versions:
      raise ValueError(
        f'{key}: {name!r} is not prepared there; {root / name}/VERSION/{INFO} '
        'does not exist. Nothing is downloaded for you; prepare it once with '
        f"TensorFlow (pip install 'fliqs_jax[tensorflow]'): "
        f'{how_to_prepare.format(data_dir=root)}'
      )
    directory = versions[max(versions)]
    info = json.loads((directory / INFO).read_text('utf-8'))
    sizes = {
      split['name']: sum(map(int, split.get('shardLengths', ())))
      for split in info['splits']
    }
  except (
    OSError,
    ImportError,
    KeyError,
    json.JSONDecodeError,
    UnicodeDecodeError,
  ) as error:
    # A missing library of buckets raises an ImportError; an unknown kind of
    # bucket, or a description without splits, a KeyError.
    raise ValueError(
      f'{key} cannot be read: {error!r}; name a directory of TFDS data sets'
    ) from error
  _check_format(key, name, directory, file_format(info))
  return Prepared(directory, sizes)


def file_format(info: Mapping[str, object]) -> str:
  """Returns the format of the shards, from the content of dataset_info.json."""
  # Old versions of TFDS had one format only and did not store its name.
  return str(info['fileFormat']) if 'fileFormat' in info else 'tfrecord'


def _version(text: str) -> tuple[int, ...] | None:
  numbers = text.split('.')
  if len(numbers) != 3 or not all(n.isdecimal() for n in numbers):
    return None
  return tuple(map(int, numbers))


def _check_format(
  key: str, name: str, directory: os.PathLike[str], found: str
) -> None:
  if found == 'array_record':
    return
  if found == 'tfrecord':
    remedy = (
      'convert it once with: python -m fliqs_jax.data.convert '
      f'{directory} NEW_DATA_DIR/{name}/{directory.name} and set '
      'config.data.data_dir to NEW_DATA_DIR'
    )
  else:
    # TFDS's reader of parquet returns wrong examples for a part of a split.
    remedy = "prepare it again with file_format='array_record'"
  raise ValueError(
    f'{key}: {directory} is prepared as {found}, which has no random access; '
    f'{remedy}'
  )


@contextlib.contextmanager
def _damage(directory: os.PathLike[str]) -> Iterator[None]:
  """Names the data set of which a file is damaged.

  TFDS and ArrayRecord have no common class of their errors.
  """
  try:
    yield
  except Exception as error:
    raise ValueError(
      f'{directory} cannot be read, so a file of it is damaged or missing: '
      f'{" ".join(str(error).split())[:300]}; delete it and prepare the data '
      'set again'
    ) from error


class _Records:
  """The examples of one split: a column per feature, encoded as stored."""

  def __init__(self, directory: os.PathLike[str], split: str):
    import tensorflow_datasets as tfds  # The import takes a second.

    self._directory = directory
    with _damage(directory):
      builder = tfds.builder_from_directory(directory)
      images = [
        name
        for name, feature in builder.info.features.items()
        if isinstance(feature, tfds.features.Image)
      ]
      self._records = builder.as_data_source(
        split=split,
        # TFDS decodes with OpenCV or PIL, whichever is there, and warns of PIL.
        decoders=dict.fromkeys(images, tfds.decode.SkipDecoding()),
      )

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, numbers: np.ndarray) -> dataset_lib.Columns:
    with _damage(self._directory):
      records = self._records.__getitems__(numbers.tolist())
    columns = {}
    for name in records[0]:
      column = np.empty(len(records), object)
      column[:] = [record[name] for record in records]
      columns[name] = column
    columns['label'] = columns['label'].astype(np.int64)
    return columns
