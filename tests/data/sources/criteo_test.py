"""Criteo's TSV becomes the rows it spells, and no line is lost silently."""

import itertools
import json
import logging
import math
import multiprocessing
import os
import random
import re

import ml_collections
import numpy as np
import pytest

from fliqs_jax import data
from fliqs_jax.data.sources import criteo
from fliqs_jax.data.sources import criteo_store
from fliqs_jax.data.sources import synthetic

_MISSING = criteo_store.MISSING


def _line(seed):
  """Returns a well-formed line as fields: text."""
  rng = random.Random(seed)
  integers = [
    rng.choice(['', '0', '1', '-1', '-2', str(rng.randrange(10**6))])
    for _ in range(13)
  ]
  categories = [
    rng.choice(['', f'{rng.getrandbits(32):08x}', f'{rng.getrandbits(8):08x}'])
    for _ in range(26)
  ]
  return [str(rng.randrange(2)), *integers, *categories]


def _text(lines):
  return ''.join('\t'.join(fields) + '\n' for fields in lines).encode()


def _changed(field, value):
  """Returns a line of which one field is another."""
  line = _line(0)
  line[field] = value
  return line


def _row(fields):
  """What a line means, slowly: label, integers, categories, missing bits."""
  integers = [int(f) if f else _MISSING for f in fields[1:14]]
  categories = [int(f, 16) if f else 0 for f in fields[14:]]
  missing = sum(1 << i for i, f in enumerate(fields[14:]) if not f)
  return int(fields[0]), integers, categories, missing


def _as_tuples(rows):
  return [
    (
      int(row['label']),
      row['integers'].tolist(),
      row['categories'].tolist(),
      int(row['missing']),
    )
    for row in rows
  ]


@pytest.fixture(scope='module')
def lines():
  return [_line(seed) for seed in range(100)]


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory, lines):
  path = tmp_path_factory.mktemp('criteo')
  (path / 'train.txt').write_bytes(_text(lines))
  return path


def _config(data_dir, **changes):
  config = ml_collections.ConfigDict(
    dict(
      name='criteo',
      data_dir=str(data_dir),
      train_split='train[:80]',
      valid_split='train[80:90]',
      test_split='train[90:]',
      batch_size=16,
      valid_batch_size=2,
      test_batch_size=4,
      buckets=1000,
      max_bad_lines=0,
    )
  )
  config.update(changes)
  return config.lock()


def _take(batches, count):
  return list(itertools.islice(batches, count))


# --- lines ---


def test_lines_become_the_rows_that_they_spell(lines):
  rows, malformed = criteo_store.parse(_text(lines))
  assert malformed == []
  assert _as_tuples(rows) == [_row(fields) for fields in lines]


@pytest.mark.parametrize(
  ('field', 'value', 'expected'),
  [
    (1, '2147483647', 2**31 - 1),
    (13, '-2147483647', 1 - 2**31),
    (5, '-3', -3),
    (5, '007', 7),
    (14, 'ffffffff', 2**32 - 1),
    (39, 'FFFFFFFF', 2**32 - 1),
    (20, '00000000', 0),
    (20, 'a', 10),
  ],
)
def test_extreme_values_are_kept(field, value, expected):
  (row,), malformed = criteo_store.parse(_text([_changed(field, value)]))
  assert not malformed
  named = [row['label'], *row['integers'], *row['categories']]
  assert named[field] == expected


@pytest.mark.parametrize(
  ('fields', 'problem'),
  [
    (_changed(0, '2'), "has label '2', not 0 or 1"),
    (_changed(0, ''), "has label '', not 0 or 1"),
    (_changed(0, '01'), "has label '01', not 0 or 1"),
    (_changed(1, 'x'), "has integer I1 = 'x', no number of 32 bits"),
    (_changed(2, '1.5'), "has integer I2 = '1.5', no"),
    (_changed(13, '-'), "has integer I13 = '-', no"),
    (_changed(13, '--1'), "has integer I13 = '--1', no"),
    (_changed(3, '2147483648'), "has integer I3 = '2147483648', no"),
    (_changed(3, '-2147483648'), "has integer I3 = '-2147483648', no"),
    (_changed(3, '00000000001'), "has integer I3 = '00000000001', no"),
    (_changed(3, ' 1'), "has integer I3 = ' 1', no"),
    (_changed(14, 'g'), "has category C1 = 'g', no 8 hexadecimal digits"),
    (_changed(39, '123456789'), "has category C26 = '123456789', no"),
    (_changed(39, '1\r'), r"has category C26 = '1\r', no"),
    (_changed(20, '-1'), "has category C7 = '-1', no"),
    (_changed(20, 'é' * 30), r"has category C7 = '\\xc3\\xa9"),
    (_line(0)[:-1], 'has 39 fields, not 40'),
    (_line(0) + ['1'], 'has 41 fields, not 40'),
    (['1,2,3'], 'has 1 field, not 40'),
    ([''], 'has 1 field, not 40'),
  ],
)
def test_a_malformed_line_is_named_and_its_neighbours_are_kept(
  lines, fields, problem
):
  text = _text([lines[0], fields, lines[1]])
  rows, malformed = criteo_store.parse(text, first_line=10)
  assert _as_tuples(rows) == [_row(lines[0]), _row(lines[1])]
  (bad,) = malformed
  assert bad.line == 11
  assert bad.problem.startswith(problem)


def test_random_damage_is_judged_as_by_a_slow_reader(lines):
  rng = random.Random(0)
  text = bytearray(_text(lines))
  for _ in range(150):
    text[rng.randrange(len(text))] = rng.choice(b'\t\n0a-g \x00\xff')
  text += b'\n'
  rows, malformed = criteo_store.parse(bytes(text))
  slow_rows, slow_bad = [], []
  pattern = rb'[01]' + rb'\t(?:-?\d{1,10})?' * 13 + rb'\t[\da-fA-F]{0,8}' * 26
  for number, line in enumerate(bytes(text).split(b'\n')[:-1], 1):
    if re.fullmatch(pattern, line):  # No integer is beyond 32 bits here.
      slow_rows.append(_row(line.decode().split('\t')))
    else:
      slow_bad.append(number)
  assert 20 < len(slow_bad) < 150
  assert len(slow_rows) > 20
  assert [bad.line for bad in malformed] == slow_bad
  assert _as_tuples(rows) == slow_rows


# --- the store ---


def _open(path, max_bad_lines=0):
  return criteo_store.open_rows(path / 'train.txt', path / 's', max_bad_lines)


@pytest.mark.parametrize('block_bytes', [512, 700, 10**6])
@pytest.mark.parametrize('end', [b'', b'\n'])
def test_blocks_lose_nothing(tmp_path, monkeypatch, lines, block_bytes, end):
  # A line has at most 1 + 13 * 7 + 26 * 9 = 326 bytes.
  monkeypatch.setattr(criteo_store, '_BLOCK_BYTES', block_bytes)
  (tmp_path / 'train.txt').write_bytes(_text(lines)[:-1] + end)
  assert _as_tuples(_open(tmp_path)) == [_row(fields) for fields in lines]
  # And again, from the store.
  (tmp_path / 'train.txt').unlink()
  assert _as_tuples(_open(tmp_path)) == [_row(fields) for fields in lines]


def _with_bad_lines(path, lines, count):
  """Writes 10 lines, every other of the first ones malformed."""
  written = list(lines[:10])
  for i in range(count):
    written[2 * i] = ['1', 'x'] if i else lines[0][:20]
  (path / 'train.txt').write_bytes(_text(written))


def test_a_malformed_line_fails_by_its_number(tmp_path, lines):
  _with_bad_lines(tmp_path, lines, 2)
  with pytest.raises(ValueError, match='max_bad_lines=0 is exceeded') as caught:
    _open(tmp_path)
  message = str(caught.value)
  assert f'2 malformed lines in {tmp_path}/train.txt' in message
  assert 'line 1 has 20 fields, not 40; line 3 has 2 fields' in message


def test_allowed_malformed_lines_are_counted_named_and_remembered(
  tmp_path, lines, caplog
):
  _with_bad_lines(tmp_path, lines, 2)
  kept = [_row(lines[i]) for i in (1, 3, 4, 5, 6, 7, 8, 9)]
  for _ in range(2):  # When it is converted, and when it is there.
    caplog.clear()
    with caplog.at_level(logging.WARNING):
      assert _as_tuples(_open(tmp_path, max_bad_lines=2)) == kept
    assert 'left out: 2 malformed lines' in caplog.text
    assert 'line 1 has 20 fields' in caplog.text
  info = json.loads((tmp_path / 's' / 'info.json').read_text())
  assert [bad['line'] for bad in info['malformed']] == [1, 3]
  # A store that left out two is none for who allows one.
  with pytest.raises(ValueError, match='max_bad_lines=1 is exceeded: 2 malf'):
    _open(tmp_path, max_bad_lines=1)


def test_line_numbers_count_through_blocks(tmp_path, monkeypatch, lines):
  monkeypatch.setattr(criteo_store, '_BLOCK_BYTES', 700)
  text = _text(lines) + b'0\tx\n' + _text(lines)
  (tmp_path / 'train.txt').write_bytes(text)
  with pytest.raises(ValueError, match='line 101 has 2 fields'):
    _open(tmp_path)


def test_only_the_first_malformed_lines_are_named(tmp_path, lines):
  (tmp_path / 'train.txt').write_bytes(b'a,b\n' * 50 + _text(lines))
  with pytest.raises(ValueError, match='50 malformed lines') as caught:
    _open(tmp_path)
  assert str(caught.value).count('has 1 field') == 5


@pytest.mark.parametrize('size', [0, 100_000])
def test_what_is_no_tsv_is_refused(tmp_path, monkeypatch, size):
  monkeypatch.setattr(criteo_store, '_BLOCK_BYTES', 1000)
  (tmp_path / 'train.txt').write_bytes(b'x' * size)
  message = 'line 1 does not end' if size else 'holds no line of 40 fields'
  with pytest.raises(ValueError, match=message):
    _open(tmp_path)


def test_another_file_under_the_same_name_is_refused(tmp_path, lines):
  (tmp_path / 'train.txt').write_bytes(_text(lines))
  _open(tmp_path)
  (tmp_path / 'train.txt').write_bytes(_text(lines[:50]))
  with pytest.raises(ValueError, match='was not made from this train.txt'):
    _open(tmp_path)


def test_a_file_that_changed_in_place_is_refused(tmp_path, lines):
  """Of the same size, with the same lines in another order."""
  source = tmp_path / 'train.txt'
  source.write_bytes(_text(lines))
  _open(tmp_path)
  source.write_bytes(_text(lines[::-1]))
  _later(source)
  with pytest.raises(ValueError, match='was not made from this train.txt'):
    _open(tmp_path)


def test_a_copy_of_the_same_file_and_none_are_as_good(tmp_path, lines):
  source = tmp_path / 'train.txt'
  source.write_bytes(_text(lines))
  rows = _open(tmp_path)
  _later(source)
  np.testing.assert_array_equal(_open(tmp_path), rows)
  source.unlink()
  np.testing.assert_array_equal(_open(tmp_path), rows)


def _later(path):
  """Lets a clock that is too coarse for tests see that a file was written."""
  status = path.stat()
  os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))


@pytest.mark.parametrize('content', ['', '{"version": 2, "ro', '[]', '{}'])
def test_a_damaged_description_of_a_store_is_named(tmp_path, lines, content):
  (tmp_path / 'train.txt').write_bytes(_text(lines))
  _open(tmp_path)
  (tmp_path / 's' / 'info.json').write_text(content)
  with pytest.raises(ValueError, match='info.json is damaged; delete'):
    _open(tmp_path)


def test_a_truncated_store_is_refused(tmp_path, lines):
  (tmp_path / 'train.txt').write_bytes(_text(lines))
  _open(tmp_path)
  rows = tmp_path / 's' / 'rows.bin'
  rows.write_bytes(rows.read_bytes()[:-1])
  with pytest.raises(ValueError, match='is damaged; delete it'):
    _open(tmp_path)


def test_a_killed_conversion_leaves_no_store_and_is_begun_again(
  tmp_path, monkeypatch, lines
):
  (tmp_path / 'train.txt').write_bytes(_text(lines))

  def killed(block, first_line):
    raise KeyboardInterrupt

  with monkeypatch.context() as patched:
    patched.setattr(criteo_store, 'parse', killed)
    with pytest.raises(KeyboardInterrupt):
      _open(tmp_path)
  assert not (tmp_path / 's').exists()
  assert len(_open(tmp_path)) == 100
  assert not (tmp_path / 's.incomplete').exists()


def _open_in_another_process(path, queue):
  queue.put(len(_open(path)))


def test_two_processes_convert_once(tmp_path, monkeypatch, lines):
  (tmp_path / 'train.txt').write_bytes(_text(lines))
  context = multiprocessing.get_context('spawn')
  queue = context.Queue()
  other = context.Process(
    target=_open_in_another_process, args=(tmp_path, queue)
  )
  parse = criteo_store.parse

  def slow(block, first_line):
    other.start()
    other.join(0.5)
    assert other.is_alive()  # It waits for this one, or still starts.
    return parse(block, first_line)

  monkeypatch.setattr(criteo_store, 'parse', slow)
  assert len(_open(tmp_path)) == 100
  assert queue.get() == 100
  other.join()
  assert other.exitcode == 0


# --- what a model sees ---


def test_integers_become_logarithms():
  integers = np.array([0, 1, 7, 2**31 - 1, -1, -3, _MISSING], np.int32)
  # log(x + 1); what is negative or missing is 0.
  expected = [0, math.log(2), math.log(8), 31 * math.log(2), 0, 0, 0]
  result = criteo.log_transform(integers)
  assert result.dtype == np.float32
  np.testing.assert_array_equal(result, np.array(expected, np.float32))


def _slow_mix(state):
  """SplitMix64, as published, in whole numbers."""
  z = (state + 0x9E3779B97F4A7C15) % 2**64
  z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
  z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
  return z ^ z >> 31


@pytest.mark.parametrize('category', [0, 1, 0x05DB9164, 2**32 - 1])
@pytest.mark.parametrize('buckets', [2, 1000, 2**31 - 1])
def test_categories_are_in_the_buckets_that_are_written_down(category, buckets):
  ids = criteo.bucket_ids(
    np.full((1, 26), category, np.uint32), np.zeros(1, np.uint32), buckets
  )
  assert ids.dtype == np.int32
  assert ids[0].tolist() == [
    1 + _slow_mix(column * 2**32 + category) % (buckets - 1)
    for column in range(26)
  ]


def test_buckets_do_not_change_between_versions():
  # A trained embedding must find its categories again.
  ids = criteo.bucket_ids(
    np.full((1, 26), 0x05DB9164, np.uint32), np.zeros(1, np.uint32), 2**20
  )
  assert ids[0, [0, 1, 25]].tolist() == [934553, 475107, 307656]


def test_missing_categories_are_in_bucket_zero_and_others_never():
  categories = np.arange(26 * 1000, dtype=np.uint32).reshape(1000, 26)
  missing = np.full(1000, 1 << 3 | 1 << 25, np.uint32)
  ids = criteo.bucket_ids(categories, missing, 10)
  assert np.all(ids[:, [3, 25]] == 0)
  present = np.delete(ids, [3, 25], axis=1)
  # 1 .. 9, a ninth of 24000 each: 2667 with a deviation of 49.
  counts = np.bincount(present.ravel(), minlength=10)
  assert len(counts) == 10
  assert counts[0] == 0
  assert np.all(np.abs(counts[1:] - 24000 / 9) < 5 * 49)


def test_the_same_category_of_two_columns_is_in_two_buckets():
  categories = np.full((1, 26), 12345, np.uint32)
  ids = criteo.bucket_ids(categories, np.zeros(1, np.uint32), 2**30)
  assert len(set(ids[0].tolist())) == 26


# --- streams ---


def test_batches_have_the_promised_shapes_and_types(data_dir):
  streams = data.make_streams(_config(data_dir), seed=0)
  assert streams.num_classes == 2
  assert streams.num_examples == dict(train=80, valid=10, test=10)
  assert {k: (s.shape, s.dtype) for k, s in streams.inputs.items()} == {
    'dense': ((13,), np.float32),
    'ids': ((26,), np.int32),
  }
  for batches, size in (
    (streams.train(0), 16),
    (streams.valid(0), 2),
    (streams.test(), 4),
  ):
    batch = next(batches)
    inputs = data.model_inputs(batch)
    assert set(inputs) == {'dense', 'ids'}
    for name, spec in streams.inputs.items():
      assert inputs[name].shape == (size, *spec.shape)
      assert inputs[name].dtype == spec.dtype
    assert batch['label'].shape == (size,)
    assert batch['label'].dtype == np.int32


def _expected(fields):
  """Returns (label, dense, ids) of a line as a model sees them."""
  label, integers, categories, missing = _row(fields)
  columns = dict(
    integers=np.array([integers], np.int32),
    categories=np.array([categories], np.uint32),
    missing=np.array([missing], np.uint32),
  )
  inputs = criteo.inputs(columns, 1000)
  return label, inputs['dense'].tobytes(), inputs['ids'].tobytes()


def _seen(batches):
  return [
    (int(label), dense.tobytes(), ids.tobytes())
    for b in batches
    for label, dense, ids in zip(b['label'], b['dense'], b['ids'])
  ]


def test_streams_show_their_lines_and_no_others(data_dir, lines):
  streams = data.make_streams(_config(data_dir), seed=0)
  rows = [_expected(fields) for fields in lines]
  assert sorted(_seen(_take(streams.train(0), 5))) == sorted(rows[:80])
  assert sorted(_seen(_take(streams.valid(0), 5))) == sorted(rows[80:90])
  assert _seen(streams.test())[:10] == rows[90:]
  # Shuffled: two epochs in two orders.
  first, second = (
    _seen(_take(streams.train(0), 5)),
    _seen(_take(streams.train(5), 5)),
  )
  assert first != rows[:80]
  assert first != second
  assert sorted(first) == sorted(second)


def test_a_stream_from_a_step_is_the_rest_of_the_stream(data_dir):
  streams = data.make_streams(_config(data_dir), seed=0)
  assert _seen(_take(streams.train(0), 12))[9 * 16 :] == _seen(
    _take(streams.train(9), 3)
  )


def test_processes_together_read_the_batch_of_one(data_dir):
  config = _config(data_dir)
  whole = _seen(_take(data.make_streams(config, seed=0).train(4), 1))
  parts = [
    _seen(
      _take(
        data.make_streams(config, 0, process_index=i, process_count=2).train(4),
        1,
      )
    )
    for i in range(2)
  ]
  assert whole == parts[0] + parts[1]


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (dict(test_split='test'), "unknown split 'test'; this data set has: train"),
    (dict(buckets=1), 'buckets=1 must be from 2 to'),
    (dict(buckets=2**31), 'must be from 2 to 2147483647'),
    (dict(max_bad_lines=-1), 'max_bad_lines=-1 must not be negative'),
    (dict(data_dir=''), "data_dir='' must be a local directory"),
    (dict(data_dir='gs://bucket'), 'must be a local directory'),
  ],
)
def test_what_cannot_work_is_refused(data_dir, changes, message):
  changes = dict(data_dir=data_dir) | changes
  with pytest.raises(ValueError, match=message):
    data.make_streams(_config(**changes), seed=0)


def test_a_directory_without_the_file_is_refused(tmp_path):
  with pytest.raises(ValueError, match='train.txt does not exist: it must be'):
    data.make_streams(_config(tmp_path), seed=0)


def test_a_directory_that_cannot_be_written_is_refused(tmp_path, lines):
  # A file where the store would be: not even root can make it.
  (tmp_path / 'train.txt').write_bytes(_text(lines))
  (tmp_path / '.criteo_store.lock').mkdir()
  with pytest.raises(ValueError, match='config.data.data_dir=.*cannot be used'):
    data.make_streams(_config(tmp_path), seed=0)


# --- the synthetic set in its place ---


def test_synthetic_clicks_are_like_criteo_and_can_be_learned():
  dataset = synthetic.clicks(buckets=500)
  columns = dataset.open('train')[np.arange(8192)]
  inputs = dataset.eval_inputs(columns)
  labels = columns['label']
  assert inputs['dense'].shape == (8192, 13)
  assert inputs['ids'].max() < 500
  # A tenth of everything is missing: of 26 * 8192 with a deviation of 139.
  assert abs(np.sum(inputs['ids'] == 0) - 21299) < 5 * 139
  assert 0.2 < labels.mean() < 0.8
  # One feature alone already tells clicks from others.
  clicked, other = (inputs['dense'][labels == i, 0].mean() for i in (1, 0))
  assert clicked > other + 0.1
  # Both splits follow one rule, and are not the same.
  test = dataset.open('test')[np.arange(2048)]
  assert abs(test['label'].mean() - labels.mean()) < 5 * 0.5 / np.sqrt(2048)
  assert np.any(test['categories'] != columns['categories'][:2048])
