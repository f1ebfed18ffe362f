"""Converts a data set that TFDS prepared as TFRecord to ArrayRecord, once.

python -m fliqs_jax.data.convert DATA_DIR/imagenet2012/5.1.0 \
    NEW_DATA_DIR/imagenet2012/5.1.0

The records are not changed. The command needs TensorFlow, which checks the
records that it reads: pip install 'fliqs_jax[tensorflow]'. Directories must be
local. A killed conversion continues with the next shard; the target exists only
when it is complete.
"""

import argparse
from collections.abc import Iterator, Sequence
import logging
import pathlib
import shutil

from array_record.python import array_record_module

from fliqs_jax.data import build_once
from fliqs_jax.data.sources import tfds_records
from fliqs_jax.runtime import commands
from fliqs_jax.runtime import files

_LOG = logging.getLogger(__name__)

_TEMPLATE = '{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}'
# The option of TFDS: a record can be read without its neighbours.
_OPTIONS = 'group_size:1'


def convert(source: pathlib.Path, target: pathlib.Path) -> None:
  """Makes `target` from `source`, unless it exists.

  Args:
    source: a directory with the dataset_info.json of a TFRecord data set.
    target: the directory to make.

  Raises:
    ValueError: `source` is no such directory or differs from its
      dataset_info.json, `target` is in use, or TensorFlow is missing.
  """
  info = _read_info(source)
  shards = _shards(info)
  missing = [old for old, _, _ in shards if not (source / old).exists()]
  if missing:
    raise ValueError(
      f'{source} lacks {len(missing)} of its {len(shards)} shards: '
      f'{", ".join(missing[:3])}{", ..." if len(missing) > 3 else ""}; prepare '
      'the data set again'
    )
  _import_tensorflow()
  with build_once.directory(target) as unfinished:
    if unfinished is None:
      raise ValueError(f'{target} exists; name a directory that does not exist')
    for path in source.iterdir():
      if '.tfrecord' not in path.name and path.is_file():
        shutil.copyfile(path, unfinished / path.name)
    for done, (old, new, length) in enumerate(shards):
      _LOG.info('shard %d of %d', done + 1, len(shards))
      _convert_shard(source / old, unfinished / new, length)
    info.pop('alternativeFileFormats', None)
    files.write_json(
      unfinished / tfds_records.INFO, info | dict(fileFormat='array_record')
    )


def _read_info(source: pathlib.Path) -> dict:
  path = source / tfds_records.INFO
  try:
    info = files.read_json(path)
  except OSError as error:
    raise ValueError(
      f'{source} is no prepared TFDS data set: {path.name} cannot be read '
      f'({error.strerror}); name the directory of a version, such as '
      'DATA_DIR/imagenet2012/5.1.0'
    ) from error
  found = tfds_records.file_format(info)
  if found != 'tfrecord':
    raise ValueError(
      f'{source} is prepared as {found}, not as tfrecord; name the directory '
      'of a TFRecord data set'
    )
  return info


def _shards(info: dict) -> list[tuple[str, str, int]]:
  """Returns (old file name, new file name, number of records) of each shard."""
  shards = []
  for split in info['splits']:
    template = split.get('filepathTemplate') or _TEMPLATE
    if template != _TEMPLATE:
      raise ValueError(
        f'shards of split {split["name"]!r} are named {template!r}; only '
        f'{_TEMPLATE!r} can be converted'
      )
    lengths = [int(length) for length in split.get('shardLengths', ())]
    for i, length in enumerate(lengths):
      old, new = (
        f'{info["name"]}-{split["name"]}.{suffix}-{i:05d}-of-{len(lengths):05d}'
        for suffix in ('tfrecord', 'array_record')
      )
      shards.append((old, new, length))
  return shards


def _convert_shard(old: pathlib.Path, new: pathlib.Path, length: int) -> None:
  # An earlier start may have completed this shard, perhaps of an older file.
  if new.exists() and new.stat().st_mtime >= old.stat().st_mtime:
    return
  scratch = new.with_name(f'.{new.name}.tmp')
  writer = array_record_module.ArrayRecordWriter(str(scratch), _OPTIONS)
  count = 0
  for record in _records(old):
    writer.write(record)
    count += 1
  writer.close()
  written = array_record_module.ArrayRecordReader(str(scratch)).num_records()
  if not count == written == length:
    raise ValueError(
      f'{old} holds {count} records and {written} were written, where '
      f'{tfds_records.INFO} says {length}; prepare the data set again'
    )
  scratch.rename(new)


def _import_tensorflow():
  try:
    import tensorflow
  except ImportError as error:
    raise ValueError(
      'the conversion needs TensorFlow: '
      f"pip install 'fliqs_jax[tensorflow]' ({error})"
    ) from error
  return tensorflow


def _records(path: pathlib.Path) -> Iterator[bytes]:
  """Yields the records of a TFRecord file after checking their checksums."""
  tensorflow = _import_tensorflow()
  try:
    yield from tensorflow.data.TFRecordDataset(str(path)).as_numpy_iterator()
  except tensorflow.errors.DataLossError as error:
    raise ValueError(
      f'{path} is damaged: {error.message}; prepare the data set again'
    ) from error


@commands.reported
def main(argv: Sequence[str]) -> int:
  """Converts; a user's mistake gives one line and status 2."""
  parser = argparse.ArgumentParser(prog='python -m fliqs_jax.data.convert')
  parser.add_argument('source', metavar='SOURCE_DIR')
  parser.add_argument('target', metavar='TARGET_DIR')
  args = parser.parse_args(argv)
  logging.basicConfig(level=logging.INFO, format='%(message)s')
  for place in args.source, args.target:
    if '://' in place:
      raise ValueError(f'{place} must be a local directory; copy it')
  convert(pathlib.Path(args.source), pathlib.Path(args.target))
  print(f'converted to {args.target}')
  return 0


if __name__ == '__main__':
  commands.run(main)
