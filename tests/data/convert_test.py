"""TFRecord becomes ArrayRecord, record by record, or nothing at all."""

import json
import os
import struct
import sys
import types

from array_record.python import array_record_module
import numpy as np
import pytest

from fliqs_jax.data import convert
from fliqs_jax.data.sources import tfds_records
from fliqs_jax.runtime import files
from tests.data import prepared


def _crc32c(data):
  """Castagnoli's checksum, masked as TFRecord has it."""
  crc = 0xFFFFFFFF
  for byte in data:
    crc ^= byte
    for _ in range(8):
      crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
  crc ^= 0xFFFFFFFF
  return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _write_tfrecord(path, records):
  with path.open('wb') as file:
    for record in records:
      length = struct.pack('<Q', len(record))
      file.write(length + struct.pack('<I', _crc32c(length)))
      file.write(record + struct.pack('<I', _crc32c(record)))


class _DataLossError(Exception):
  message = 'corrupted record'


def _read_tfrecord(path):
  with open(path, 'rb') as file:
    while head := file.read(12):
      length, _ = struct.unpack('<QI', head)
      record = file.read(length)
      if struct.unpack('<I', file.read(4))[0] != _crc32c(record):
        raise _DataLossError
      yield record


@pytest.fixture(params=['imitation', 'real'])
def tensorflow(request, monkeypatch):
  """TensorFlow, where it is installed; and what we use of it, everywhere."""
  if request.param == 'real':
    return pytest.importorskip('tensorflow')
  reader = types.SimpleNamespace(
    TFRecordDataset=lambda path: types.SimpleNamespace(
      as_numpy_iterator=lambda: _read_tfrecord(path)
    )
  )
  errors = types.SimpleNamespace(DataLossError=_DataLossError)
  imitation = types.SimpleNamespace(data=reader, errors=errors)
  monkeypatch.setattr(convert, '_import_tensorflow', lambda: imitation)
  return imitation


_VERSION = 'imagenet2012/5.1.0'


@pytest.fixture(scope='module')
def array_record_dir(tmp_path_factory):
  path = tmp_path_factory.mktemp('tfds')
  prepared.imagenet2012(path)
  return path


@pytest.fixture
def source(array_record_dir, tmp_path):
  """The same set as TFRecord, as TFDS would have written it; 3 train shards."""
  old, new = array_record_dir / _VERSION, tmp_path / 'old' / _VERSION
  new.mkdir(parents=True)
  info = json.loads((old / 'dataset_info.json').read_text())
  info['fileFormat'] = 'tfrecord'
  for split in info['splits']:
    name = f'{old}/imagenet2012-{split["name"]}.array_record-00000-of-00001'
    records = array_record_module.ArrayRecordReader(name).read_all()
    lengths = [7, 13, 20] if split['name'] == 'train' else [len(records)]
    split['shardLengths'] = [str(length) for length in lengths]
    for i, length in enumerate(lengths):
      shard = f'imagenet2012-{split["name"]}.tfrecord-{i:05d}-of-'
      _write_tfrecord(new / f'{shard}{len(lengths):05d}', records[:length])
      records = records[length:]
  (new / 'dataset_info.json').write_text(json.dumps(info))
  features = (old / 'features.json').read_text()
  (new / 'features.json').write_text(features)
  return new


def _everything(data_dir):
  found = tfds_records.find('imagenet2012', str(data_dir), '')
  columns = {
    split: found.open(split)[np.arange(size)]
    for split, size in found.split_sizes.items()
  }
  return {
    split: list(zip(*(column[name].tolist() for name in sorted(column))))
    for split, column in columns.items()
  }


def test_the_converted_set_is_the_same_set(
  tensorflow, source, tmp_path, array_record_dir, capsys
):
  target = tmp_path / 'new' / _VERSION
  assert convert.main([str(source), str(target)]) == 0
  assert f'converted to {target}' in capsys.readouterr().out
  converted = _everything(tmp_path / 'new')
  assert converted == _everything(array_record_dir)
  assert {k: len(v) for k, v in converted.items()} == dict(
    train=40, validation=10, test=3
  )
  assert not (tmp_path / 'new' / f'{_VERSION}.incomplete').exists()


def test_a_killed_conversion_goes_on(
  tensorflow, source, tmp_path, monkeypatch, array_record_dir
):
  target = tmp_path / 'new' / _VERSION
  read, converted = convert._records, []

  def killed_at_the_third(path):
    converted.append(path.name)
    for i, record in enumerate(read(path)):
      if len(converted) == 3 and i == 5:
        raise KeyboardInterrupt
      yield record

  monkeypatch.setattr(convert, '_records', killed_at_the_third)
  with pytest.raises(KeyboardInterrupt):
    convert.convert(source, target)
  assert not target.exists()
  convert.convert(source, target)
  # Five shards; only the one that was cut short is read twice.
  assert len(converted) == 6
  assert converted.count(converted[2]) == 2
  assert _everything(tmp_path / 'new') == _everything(array_record_dir)
  assert not list(target.glob('.*'))


def test_a_shard_that_changed_after_a_kill_is_read_again(
  tensorflow, source, tmp_path, monkeypatch, array_record_dir
):
  target = tmp_path / 'new' / _VERSION

  def killed(*_):
    raise KeyboardInterrupt

  with monkeypatch.context() as patched:
    patched.setattr(files, 'write_json', killed)  # After the last shard.
    with pytest.raises(KeyboardInterrupt):
      convert.convert(source, target)
  (shard,) = (tmp_path / 'new').rglob('*validation*')
  shard.write_bytes(b'made of an older file')
  os.utime(shard, (0, 0))
  convert.convert(source, target)
  assert _everything(tmp_path / 'new') == _everything(array_record_dir)


def test_a_shard_of_another_length_is_refused(tensorflow, source, tmp_path):
  info = json.loads((source / 'dataset_info.json').read_text())
  info['splits'][0]['shardLengths'][0] = '6'
  (source / 'dataset_info.json').write_text(json.dumps(info))
  target = tmp_path / 'new'
  with pytest.raises(ValueError, match='holds 7 records .* says 6'):
    convert.convert(source, target)
  assert not target.exists()


def test_a_damaged_record_is_refused(tensorflow, source, tmp_path):
  path = source / 'imagenet2012-validation.tfrecord-00000-of-00001'
  content = bytearray(path.read_bytes())
  content[1000] ^= 1
  path.write_bytes(content)
  with pytest.raises(ValueError, match=f'{path.name} is damaged'):
    convert.convert(source, tmp_path / 'new')
  assert not (tmp_path / 'new').exists()


def test_a_missing_shard_is_named(tensorflow, source, tmp_path):
  name = 'imagenet2012-train.tfrecord-00001-of-00003'
  (source / name).unlink()
  with pytest.raises(ValueError, match=f'lacks 1 of its 5 shards: {name}'):
    convert.convert(source, tmp_path / 'new')


def test_what_cannot_be_converted_is_refused_in_a_line(
  source, array_record_dir, tmp_path, capsys
):
  target = str(tmp_path / 'new')
  for place, message in (
    (tmp_path, 'is no prepared TFDS data set'),
    ('gs://bucket/imagenet2012/5.1.0', 'must be a local directory; copy it'),
    (array_record_dir / _VERSION, 'prepared as array_record, not as tfrecord'),
  ):
    assert convert.main([str(place), target]) == 2
    assert message in capsys.readouterr().err
  info = json.loads((source / 'dataset_info.json').read_text())
  info['splits'][0]['filepathTemplate'] = '{SPLIT}.{FILEFORMAT}'
  (source / 'dataset_info.json').write_text(json.dumps(info))
  assert convert.main([str(source), target]) == 2
  assert "'{SPLIT}.{FILEFORMAT}'; only" in capsys.readouterr().err
  (source / 'dataset_info.json').write_bytes(b'{"name": "\xff"}')
  assert convert.main([str(source), target]) == 2
  assert 'dataset_info.json is damaged: ' in capsys.readouterr().err


def test_an_existing_target_is_left_alone(tensorflow, source, tmp_path):
  (tmp_path / 'new').mkdir()
  with pytest.raises(ValueError, match='new exists; name a directory'):
    convert.convert(source, tmp_path / 'new')
  assert list((tmp_path / 'new').iterdir()) == []


def test_without_tensorflow_the_extra_is_named(
  source, tmp_path, monkeypatch, capsys
):
  monkeypatch.setitem(sys.modules, 'tensorflow', None)
  assert convert.main([str(source), str(tmp_path / 'new')]) == 2
  error = capsys.readouterr().err
  assert "pip install 'fliqs_jax[tensorflow]'" in error
  assert not (tmp_path / 'new').exists()
