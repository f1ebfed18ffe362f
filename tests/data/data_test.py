"""Streams are deterministic, resumable, disjoint, and alike in any sharding."""

import dataclasses
import itertools
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import ml_collections
import numpy as np
import pytest
from sklearn import datasets as sklearn_datasets
import tensorflow_datasets as tfds

from fliqs_jax import data
from fliqs_jax.data import images
from fliqs_jax.data import pipeline
from fliqs_jax.data import splits
from fliqs_jax.data.sources import digits
from fliqs_jax.data.sources import synthetic


@pytest.fixture(scope='module')
def digits_dir(tmp_path_factory):
  data_dir = str(tmp_path_factory.mktemp('data'))
  digits.prepare(data_dir)
  return data_dir


def _config(**changes):
  """Returns `config.data`, with the keys of its own that the data set takes."""
  if changes.get('name') == 'synthetic':
    changes = dict(image_size=8, num_classes=4) | changes
  config = ml_collections.ConfigDict(
    dict(
      name='numbered',
      data_dir='',
      train_split='train[:80%]',
      valid_split='train[80%:]',
      test_split='test',
      batch_size=16,
      valid_batch_size=8,
      test_batch_size=8,
    )
  )
  config.update(changes)
  return config.lock()


class _Numbered:
  """Examples whose three pixels spell their number, from `first` on."""

  def __init__(self, first, size):
    self.first, self.size = first, size
    self.read = []

  def __len__(self):
    return self.size

  def __getitem__(self, numbers):
    self.read += numbers.tolist()
    named = self.first + numbers
    image = np.stack([named % 256, named // 256, 0 * named], axis=1)
    return dict(
      image=image.astype(np.uint8).reshape(-1, 1, 1, 3), label=named % 10
    )


def _float(columns):
  return dict(image=columns['image'].astype(np.float32))


def _numbered(**changes):
  """100 train and 20 test examples, numbered 0 .. 99 and 1000 .. 1019."""
  opened = dict(train=_Numbered(0, 100), test=_Numbered(1000, 20))
  return data.Dataset(
    name='numbered',
    num_classes=10,
    inputs={'image': data.Spec((1, 1, 3))},
    split_sizes=dict(train=100, test=20),
    open=opened.__getitem__,
    train_inputs=lambda columns, bits: _float(columns),
    eval_inputs=_float,
    **changes,
  )


def _own(columns):
  """A data set of the columns of fifty examples, in both splits."""

  def inputs(columns, bits=None):
    del bits
    return {k: x for k, x in columns.items() if k != 'label'}

  return dataclasses.replace(
    _numbered(),
    split_sizes=dict(train=50, test=50),
    open=lambda split: data.Arrays(**columns),
    train_inputs=inputs,
    eval_inputs=inputs,
  )


def _numbers(batches):
  """Returns the numbers of the examples in batches of `_numbered`."""
  pixels = np.concatenate([b['image'].reshape(-1, 3) for b in batches])
  return (pixels @ [1, 256, 0]).astype(int).tolist()


def _take(batches, count):
  return list(itertools.islice(batches, count))


def _columns(dataset, split):
  """Returns the examples of a split as opened, in order."""
  examples = dataset.open(split)
  return examples[np.arange(len(examples))]


def _contents(dataset):
  """Returns the set of all images as opened."""
  return {
    image.tobytes()
    for split in dataset.split_sizes
    for image in _columns(dataset, split)['image']
  }


def _assert_equal(left, right):
  assert len(left) == len(right)
  for a, b in zip(left, right):
    assert a.keys() == b.keys()
    for key in a:
      np.testing.assert_array_equal(a[key], b[key])


def test_digits_are_those_of_scikit_learn(digits_dir):
  original = sklearn_datasets.load_digits()
  dataset = digits.dataset(digits_dir)
  prepared = sorted(
    (image.tobytes(), label)
    for split in ('train', 'test')
    for image, label in zip(*_columns(dataset, split).values())
  )
  # 0 .. 16 became 0 .. 240: nothing lost.
  expected = sorted(
    ((image * 15).astype(np.uint8).tobytes(), label)
    for image, label in zip(original.images, original.target)
  )
  assert prepared == expected


@pytest.mark.parametrize(
  ('name', 'words'),
  [
    ('dataset_info.json', 'JSON'),
    ('features.json', 'line 1'),
    ('digits-train.array_record-00000-of-00001', 'hash mismatch'),
  ],
)
def test_a_damaged_file_is_noticed(digits_dir, tmp_path, name, words):
  shutil.copytree(digits_dir, tmp_path, dirs_exist_ok=True)
  path = tmp_path / 'digits' / '1.0.0' / name
  data = bytearray(path.read_bytes())
  data[min(40_000, len(data) // 2)] ^= 1
  data[0] ^= name.endswith('json')
  path.write_bytes(data)
  with pytest.raises(
    ValueError, match=f'1.0.0 cannot be read, .*{words}.*; delete it and prep'
  ):
    _columns(digits.dataset(str(tmp_path)), 'train')


def test_the_runs_of_a_process_decode_the_digits_once(
  digits_dir, tmp_path, monkeypatch
):
  shutil.copytree(digits_dir, tmp_path, dirs_exist_ok=True)
  directory = tmp_path / 'digits' / '1.0.0'
  decode_all = images.decode_all
  decoded = []

  def noted(encoded, shape, source):
    decoded.append(source.partition(' ')[0])
    return decode_all(encoded, shape, source)

  monkeypatch.setattr(images, 'decode_all', noted)
  dataset = digits.dataset(str(tmp_path))
  first = _columns(dataset, 'train')
  for split in ('test', 'train', 'test'):
    _columns(dataset, split)
  assert decoded == ['train', 'test']
  # Unless a file changes, if only its time, or the directory vanishes.
  os.utime(next(directory.glob('*-train.array_record-*')))
  _columns(dataset, 'train')
  assert decoded == ['train', 'test', 'train']
  shutil.rmtree(directory)
  again = _columns(dataset, 'train')
  assert decoded == ['train', 'test', 'train', 'train']
  for name, column in first.items():
    np.testing.assert_array_equal(again[name], column)


@pytest.mark.parametrize('data_dir', ['', '~/digits'])
def test_a_user_without_a_home_is_told(monkeypatch, data_dir):
  monkeypatch.delenv('XDG_CACHE_HOME', raising=False)
  # It returns the path as it is if neither HOME nor the system knows the user.
  monkeypatch.setattr(os.path, 'expanduser', lambda path: path)
  with pytest.raises(ValueError, match='home directory. Set config.data.data_'):
    digits.prepare(data_dir)


def test_a_disk_that_is_full_is_named(tmp_path, monkeypatch):
  def full(*_, **__):
    raise RuntimeError('write() failed: No space left on device')

  monkeypatch.setattr(digits.Digits, 'download_and_prepare', full)
  with pytest.raises(ValueError, match='No space left on device.*has space'):
    digits.prepare(str(tmp_path))


def test_a_fifth_of_every_digit_is_test(digits_dir):
  dataset = digits.dataset(digits_dir)
  train, test = (
    np.bincount(_columns(dataset, split)['label'])
    for split in ('train', 'test')
  )
  assert (train.sum(), test.sum()) == (1437, 360)
  # Every fifth of a list sorted by class: within one of a fifth of each.
  assert np.all(np.abs(test - (train + test) / 5) < 1)


def test_batches_have_the_promised_shapes_and_types(digits_dir):
  config = _config(name='digits', data_dir=digits_dir)
  streams = data.make_streams(config, seed=0)
  assert streams.num_classes == 10
  assert streams.input_shape == (8, 8, 1)
  # 80% of 1437 is 1149.6.
  assert streams.num_examples == dict(train=1150, valid=287, test=360)
  for batches, size in (
    (streams.train(0), 16),
    (streams.valid(0), 8),
    (streams.test(), 8),
  ):
    batch = next(batches)
    assert batch['image'].shape == (size, 8, 8, 1)
    assert batch['image'].dtype == np.float32
    assert batch['label'].shape == (size,)
    assert batch['label'].dtype == np.int32


def test_digits_are_normalised(digits_dir):
  config = _config(
    name='digits',
    data_dir=digits_dir,
    train_split='test[:50%]',
    test_split='test[50%:]',
    valid_split='train',
    valid_batch_size=1437,
  )
  image = next(data.make_streams(config, seed=0).valid(0))['image']
  # Mean and deviation of the set are written with three digits: 0.05 of 90.
  assert abs(image.mean()) < 6e-4
  assert abs(image.std() - 1) < 6e-4


def test_a_seed_names_a_stream(digits_dir):
  config = _config(name='digits', data_dir=digits_dir)
  one, same, other = (data.make_streams(config, seed) for seed in (3, 3, 4))
  _assert_equal(_take(one.train(0), 5), _take(same.train(0), 5))
  _assert_equal(_take(one.valid(0), 5), _take(same.valid(0), 5))
  left, right = next(one.train(0)), next(other.train(0))
  assert np.any(left['image'] != right['image'])


@pytest.mark.parametrize('step', [1, 7, 100])
def test_a_stream_from_a_step_is_the_rest_of_the_stream(digits_dir, step):
  config = _config(name='digits', data_dir=digits_dir)
  streams = data.make_streams(config, seed=0)
  for stream in (streams.train, streams.valid):
    _assert_equal(_take(stream(0), step + 3)[step:], _take(stream(step), 3))


def test_starting_late_reads_nothing_earlier():
  dataset = _numbered(threads=0)
  streams = data.make_streams(_config(), seed=0, dataset=dataset)
  next(streams.train(10**12))
  assert len(dataset.open('train').read) == 16  # One batch, of step 10**12.


@pytest.mark.parametrize('count', [1, 2, 4])
def test_processes_together_read_the_batch_of_one(digits_dir, count):
  config = _config(name='digits', data_dir=digits_dir, test_batch_size=28)
  whole = data.make_streams(config, seed=0)
  shards = [
    data.make_streams(config, 0, process_index=i, process_count=count)
    for i in range(count)
  ]

  def together(streams):
    return [
      {key: np.concatenate([b[key] for b in batches]) for key in batches[0]}
      for batches in zip(*streams, strict=True)
    ]

  for stream in ('train', 'valid'):
    # From the second epoch of valid on: 36 batches of 8 exceed its 287.
    _assert_equal(
      _take(getattr(whole, stream)(36), 3),
      together([_take(getattr(s, stream)(36), 3) for s in shards]),
    )
  # 360 in batches of 28: the last holds 24 examples and padding.
  _assert_equal(list(whole.test()), together([s.test() for s in shards]))


def test_every_example_appears_once_per_epoch():
  streams = data.make_streams(_config(), seed=0, dataset=_numbered())
  # 15 batches of 16 are 3 epochs of 80; 5 batches of 8 are 2 of 20.
  train = np.reshape(_numbers(_take(streams.train(0), 15)), (3, 80))
  valid = np.reshape(_numbers(_take(streams.valid(0), 5)), (2, 20))
  for epoch in train:
    assert sorted(epoch) == list(range(80))
  for epoch in valid:
    assert sorted(epoch) == list(range(80, 100))
  # Another order each time, and none that of the data set.
  orders = [list(range(80)), *train.tolist()]
  assert len({tuple(order) for order in orders}) == 4


def test_train_and_valid_are_shuffled_independently():
  config = _config(train_split='train[:50]', valid_split='train[50:]')
  streams = data.make_streams(config, seed=0, dataset=_numbered())
  train = _numbers(_take(streams.train(0), 25))  # 400 = 8 epochs of 50.
  valid = _numbers(_take(streams.valid(0), 50))
  # Chance agreement of two orders of 50 is one place per epoch, variance 1:
  # 8 places over 8 epochs, and 40 would be 11 deviations.
  agree = np.sum(np.array(train) == np.array(valid) - 50)
  assert agree < 40


def test_streams_share_no_example(digits_dir):
  seen = {}
  dataset = digits.dataset(digits_dir)
  dataset = dataclasses.replace(
    dataset, train_inputs=lambda columns, bits: dataset.eval_inputs(columns)
  )
  config = _config(name='digits', data_dir=digits_dir)
  streams = data.make_streams(config, seed=0, dataset=dataset)
  # An epoch each: 1150 / 16 and 287 / 8, rounded up.
  seen['train'] = _take(streams.train(0), 72)
  seen['valid'] = _take(streams.valid(0), 36)
  seen['test'] = list(streams.test())
  contents = {
    stream: {image.tobytes() for b in batches for image in b['image']}
    for stream, batches in seen.items()
  }
  # No two of the 1797 images are equal, so neither may be two streams'.
  assert {k: len(v) for k, v in contents.items()} == streams.num_examples
  assert len(set.union(*contents.values())) == 1797


def test_the_test_stream_is_one_masked_pass():
  streams = data.make_streams(_config(), seed=0, dataset=_numbered())
  for _ in range(2):  # Every time the same.
    batches = list(streams.test())
    # 20 examples in batches of 8: 8 + 8 + 4, and 4 of padding.
    assert [b['image'].shape for b in batches] == [(8, 1, 1, 3)] * 3
    mask = np.concatenate([b['example_mask'] for b in batches])
    assert mask.dtype == np.float32
    assert mask.tolist() == [1.0] * 20 + [0.0] * 4
    assert _numbers(batches)[:20] == list(range(1000, 1020))


def test_several_ranges_are_read_in_their_order():
  config = _config(
    test_split='test[15:]+train[:3]',
    train_split='train[10:90]',
    valid_split='test[:15]',
  )
  streams = data.make_streams(config, seed=0, dataset=_numbered())
  (batch,) = streams.test()
  assert _numbers([batch]) == [1015, 1016, 1017, 1018, 1019, 0, 1, 2]


def test_ranges_of_a_shuffled_stream_are_read_in_any_order():
  config = _config(
    train_split='train[90:]+test[:6]+train[:4]',
    valid_split='train[4:20]',
    test_split='test[6:]',
    batch_size=20,
  )
  streams = data.make_streams(config, seed=0, dataset=_numbered())
  expected = [*range(4), *range(90, 100), *range(1000, 1006)]
  for batch in _take(streams.train(0), 3):  # An epoch each.
    assert sorted(_numbers([batch])) == expected
    numbers = np.array(_numbers([batch]))
    np.testing.assert_array_equal(batch['label'], numbers % 10)


def test_rows_read_in_any_order_arrive_in_that_order():
  dataset = _numbered()
  ranges = splits.parse(
    'train_split', 'train[90:]+test[:6]+train[:4]', dataset.split_sizes
  )
  read = pipeline.reader(dataset, dataset.open, ranges)
  # Ten of 90 to 99, six of 1000 to 1005, four of 0 to 3.
  rows = read(np.array([17, 3, 12, 0, 19, 11, 9, 15]))
  expected = [1, 93, 1002, 90, 3, 1001, 99, 1005]
  assert _numbers([rows]) == expected
  assert rows['label'].tolist() == [n % 10 for n in expected]


def test_only_train_is_augmented(digits_dir):
  config = _config(name='digits', data_dir=digits_dir)
  dataset = digits.dataset(digits_dir)
  streams = data.make_streams(config, seed=0)
  originals = {
    image.tobytes()
    for split in ('train', 'test')
    for image in dataset.eval_inputs(_columns(dataset, split))['image']
  }

  def share_of_originals(batches):
    images = np.concatenate([b['image'] for b in batches])
    return np.mean([image.tobytes() in originals for image in images])

  assert share_of_originals(_take(streams.valid(0), 10)) == 1
  assert share_of_originals(streams.test()) == 1
  # One in nine shifts is none: 107 of 960 with deviation 10; half is far away.
  assert 0 < share_of_originals(_take(streams.train(0), 60)) < 0.5


@pytest.mark.parametrize(
  ('shape', 'num_classes'), [((32, 32, 3), 10), ((5, 7, 1), 3)]
)
def test_synthetic_classes_can_be_told_apart(shape, num_classes):
  dataset = synthetic.images(shape, num_classes, num_train=400, num_test=80)
  dataset = dataclasses.replace(dataset, name='numbered')
  config = _config(batch_size=320, valid_batch_size=80, test_batch_size=80)
  streams = data.make_streams(config, seed=0, dataset=dataset)
  assert streams.input_shape == shape
  train, (test,) = next(streams.train(0)), streams.test()
  assert abs(train['image'].std() - 1) < 0.2
  means = np.stack(
    [
      train['image'][train['label'] == label].mean(0)
      for label in range(num_classes)
    ]
  )
  distance = np.sum((test['image'][:, None] - means) ** 2, (2, 3, 4))
  # Chance is 1 / num_classes.
  assert np.mean(distance.argmin(1) == test['label']) > 0.95


def test_synthetic_images_are_all_different():
  dataset = synthetic.images((8, 8, 1), num_train=50, num_test=50)
  assert len(_contents(dataset)) == 100


def test_synthetic_data_writes_nothing(tmp_path):
  missing = tmp_path / 'missing'
  config = _config(name='synthetic', data_dir=str(missing))
  next(data.make_streams(config, seed=0).train(0))
  assert not missing.exists()


@pytest.mark.parametrize(
  'spec',
  [
    'train',
    'train[:80%]',
    'train[80%:]',
    'train[-20%:]',
    'train[33.3%:66.6%]',
    'train[0.5%:1.5%]',
    'train[10:1_000]',
    'train[-10:]',
    'train[:-1]',
    'test[:50%] + train[:1]',
  ],
)
def test_split_strings_mean_what_they_mean_to_tfds(spec):
  sizes = dict(train=1437, test=45)
  infos = {
    name: tfds.core.SplitInfo(name=name, shard_lengths=[size], num_bytes=0)
    for name, size in sizes.items()
  }
  theirs = tfds.core.ReadInstruction.from_spec(spec).to_absolute(infos)
  ours = splits.parse('key', spec, sizes)
  assert [(r.split, r.start, r.stop) for r in ours] == [
    (t.splitname, t.from_ or 0, t.to or sizes[t.splitname]) for t in theirs
  ]


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (dict(name='digit'), "name='digit' is no known .* digits, cifar10, "),
    (dict(train_split='train[:80%'), "train_split='train.:80%' is no split"),
    (dict(train_split='train[:%]'), 'train_split=.* is no split'),
    (dict(train_split=''), 'train_split=.* is no split'),
    (dict(train_split='train[:1.5]'), 'part of an example'),
    (dict(train_split='train[10:50%]'), 'mixes examples and percent'),
    (dict(train_split='train[:1025]'), 'beyond the 1024 examples'),
    (dict(train_split='train[:101%]'), 'beyond the 1024 examples'),
    (dict(valid_split='validation'), "unknown split 'validation'.*train, test"),
    (dict(test_split='test[50%:50%]'), 'test_split=.* selects none'),
    (dict(valid_split='train[79%:]'), 'train_split=.*valid_split=.*overlap'),
    (dict(test_split='train[:1]'), 'test_split=.*overlap'),
    (dict(valid_split='test[:9]'), 'valid_split=.*test_split=.*overlap'),
    (dict(train_split='train[:2]+train[1:3]'), 'train_split=.*overlap'),
    (dict(batch_size=0), 'config.data.batch_size=0 must be at least 1'),
    (dict(valid_batch_size=-4), 'valid_batch_size=-4 must be at least 1'),
    (dict(batch_size=820), 'batch_size=820 .* at most 819'),
    (dict(test_batch_size=257), 'test_batch_size=257 .* at most 256'),
    (dict(valid_batch_size=9), 'valid_batch_size=9 must be divisible by the 2'),
    (dict(batch_sise=8), r'unknown keys \(batch_sise\)'),
    (dict(image_size=0), 'all must be at least 1'),
  ],
)
def test_what_cannot_work_is_refused(changes, message):
  config = _config(name='synthetic').unlock()
  config.update(changes)
  with pytest.raises(ValueError, match=message):
    data.make_streams(config, seed=0, process_count=2)


def test_a_missing_key_is_refused():
  config = _config(name='synthetic').unlock()
  del config.test_split
  with pytest.raises(ValueError, match=r'lacks some \(test_split\)'):
    data.make_streams(config, seed=0)


@pytest.mark.parametrize('value', ['8', 8.0, True])
def test_a_value_of_another_type_is_refused(value):
  config = ml_collections.ConfigDict(
    _config(name='synthetic').to_dict() | dict(batch_size=value)
  )
  with pytest.raises(ValueError, match='batch_size=.* must be of type int'):
    data.make_streams(config, seed=0)


def test_arguments_that_cannot_work_are_refused():
  config = _config(name='synthetic')
  with pytest.raises(ValueError, match='seed=-1'):
    data.make_streams(config, seed=-1)
  with pytest.raises(ValueError, match='process_index=2'):
    data.make_streams(config, seed=0, process_index=2, process_count=2)
  with pytest.raises(ValueError, match='start_step=-1'):
    data.make_streams(_config(), seed=0, dataset=_numbered()).train(-1)
  with pytest.raises(ValueError, match="config.data.name='other'"):
    data.make_streams(_config(name='other'), seed=0, dataset=_numbered())
  with pytest.raises(ValueError, match='all must be at least 1'):
    synthetic.images(num_test=0)


def test_a_split_of_another_size_is_refused():
  dataset = _numbered()
  dataset = dataclasses.replace(
    dataset, split_sizes=dict(dataset.split_sizes, test=21)
  )
  with pytest.raises(ValueError, match="'test' of 'numbered' has 20 examples"):
    data.make_streams(_config(), seed=0, dataset=dataset)


def test_a_label_beyond_the_classes_is_refused():
  dataset = dataclasses.replace(_numbered(), num_classes=9)
  streams = data.make_streams(_config(batch_size=80), seed=0, dataset=dataset)
  with pytest.raises(ValueError, match="'numbered' has labels from 0 to 9"):
    next(streams.train(0))


@pytest.mark.parametrize(
  ('label', 'message'),
  [
    (np.full(50, 0.5), r'labels of float64\[5\] .* whole numbers of shape \[5'),
    (np.full(50, np.nan), r'labels of float64\[5\]'),
    (np.arange(50)[:, None] % 2, r'labels of int64\[5, 1\]'),
    (np.eye(2, dtype=int)[np.arange(50) % 2], r'labels of int64\[5, 2\]'),
    (np.array(['a', 'b'] * 25), r'labels of <U1\[5\]'),
    (None, r"no column called label, but \['image'\]"),
  ],
)
def test_labels_that_are_no_classes_are_refused(label, message):
  columns = dict(image=np.zeros((50, 1, 1, 3), np.float32))
  columns |= {} if label is None else dict(label=label)
  dataset = _own(columns)
  batches = data.make_streams(_config(batch_size=5), seed=0, dataset=dataset)
  with pytest.raises(ValueError, match=f"'numbered' has {message}"):
    next(batches.train(0))


@pytest.mark.parametrize(
  ('image', 'message'),
  [
    (
      np.zeros((50, 1, 1, 1)),
      r'image of float64\[5, 1, 1, 1\] .* \[5, 1, 1, 3\]',
    ),
    (np.full((50, 1, 1, 3), 'a'), r'image of <U1\[5, 1, 1, 3\]'),
  ],
)
def test_inputs_that_are_not_those_of_the_spec_are_refused(image, message):
  dataset = _own(dict(image=image, label=np.arange(50) % 2))
  streams = data.make_streams(_config(batch_size=5), seed=0, dataset=dataset)
  with pytest.raises(ValueError, match=f"'numbered' makes {message}"):
    next(streams.train(0))
  dataset = _own(dict(pixels=image, label=np.arange(50) % 2))
  streams = data.make_streams(_config(batch_size=5), seed=0, dataset=dataset)
  with pytest.raises(ValueError, match=r"called \['pixels'\] .* \['image'\]"):
    next(streams.train(0))


def test_columns_of_other_numbers_of_rows_are_refused():
  with pytest.raises(ValueError, match="'image': 3, 'label': 4"):
    data.Arrays(image=np.zeros((3, 2)), label=np.zeros(4))


def test_a_model_is_called_with_its_only_input_or_a_dict():
  batch = dict(image=1, label=2, example_mask=3)
  assert data.model_inputs(batch) == 1
  batch = dict(dense=1, ids=4, label=2)
  assert data.model_inputs(batch) == dict(dense=1, ids=4)
  # What masks attention, say, is an input like any other.
  batch = dict(ids=1, mask=2, example_mask=3, label=4)
  assert data.model_inputs(batch) == dict(ids=1, mask=2)
  # The same function says what shapes a model sees.
  streams = data.make_streams(_config(), seed=0, dataset=_numbered())
  spec = data.model_inputs(streams.inputs)
  assert jax.eval_shape(lambda x: x[..., :2], spec).shape == (1, 1, 2)


@pytest.mark.parametrize(
  ('batch', 'message'),
  [
    (dict(label=1), r"keys \['label'\] has no input of the model"),
    ((1, 2), 'a batch is a tuple; it must be a dict'),
  ],
)
def test_a_batch_without_inputs_is_refused(batch, message):
  with pytest.raises(ValueError, match=message):
    data.model_inputs(batch)


def test_a_data_dir_that_cannot_be_used_is_refused(tmp_path):
  # Below a file: not even root may create a directory there.
  (tmp_path / 'file').touch()
  (tmp_path / 'digits' / '1.0.0').mkdir(parents=True)
  for data_dir, message in (
    (f'{tmp_path}/file/data', 'cannot prepare .* can be written to'),
    (str(tmp_path), 'not a prepared TFDS data set; delete it'),
    ('gs://bucket/data', 'must be a local directory'),
  ):
    config = _config(name='digits', data_dir=data_dir)
    with pytest.raises(ValueError, match=f'config.data.data_dir=.*{message}'):
      data.make_streams(config, seed=0)


def test_an_empty_data_dir_means_the_cache(tmp_path, monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  directory = digits.prepare('')
  assert directory == tmp_path / 'fliqs_jax' / 'data' / 'digits' / '1.0.0'


def test_a_slower_process_uses_what_a_faster_one_prepared(
  tmp_path, monkeypatch
):
  prepare = digits.Digits.download_and_prepare
  rivals = []

  def overtaken(builder, **kwargs):
    prepare(builder, **kwargs)
    if not rivals:
      rivals.append(None)
      rivals[0] = digits.prepare(str(tmp_path))

  monkeypatch.setattr(digits.Digits, 'download_and_prepare', overtaken)
  assert digits.prepare(str(tmp_path)) == rivals[0]
  # The set and nothing else: neither scratch directory remains.
  assert [path.name for path in tmp_path.iterdir()] == ['digits']
  assert [path.name for path in (tmp_path / 'digits').iterdir()] == ['1.0.0']
  assert len(digits.dataset(str(tmp_path)).open('test')) == 360


_PREPARE = """
import os, sys
from fliqs_jax import data
for module in 'grain', 'sklearn', 'tensorflow_datasets', 'PIL':
  assert module not in sys.modules, module
from fliqs_jax.data.sources import digits
from fliqs_jax.data import images
if {kill}:
  os.rename = lambda *paths: os._exit(9)  # As a kill half-way through.
assert len(digits.dataset({data_dir!r}).open('test')) == 360
assert 'tensorflow' not in sys.modules
"""


@pytest.mark.slow
def test_preparing_survives_a_kill_and_needs_no_tensorflow(tmp_path):
  root = pathlib.Path(data.__file__).parents[2]
  for kill in (True, False):
    script = _PREPARE.format(kill=kill, data_dir=str(tmp_path))
    run = subprocess.run(
      [sys.executable, '-W', 'error', '-c', script],
      cwd=root,
      capture_output=True,
      text=True,
      check=False,
    )
    assert run.returncode == (9 if kill else 0), run.stderr
    assert (tmp_path / 'digits' / '1.0.0').exists() == (not kill)


@pytest.mark.parametrize(
  ('keys', 'classes', 'shapes'),
  [
    (dict(name='digits'), 10, {'image': (8, 8, 1)}),
    (dict(name='cifar10', augment='none'), 10, {'image': (32, 32, 3)}),
    (dict(name='fashion_mnist', augment='none'), 10, {'image': (28, 28, 1)}),
    (
      dict(
        name='imagenet2012', image_size=224, augment='none', random_erasing=0.0
      ),
      1000,
      {'image': (224, 224, 3)},
    ),
    (
      dict(name='criteo', buckets=7, max_bad_lines=0),
      2,
      {'dense': (13,), 'ids': (26,)},
    ),
    (
      dict(name='pictures', patch=48, scale=3, crop=48, crops=2),
      0,
      {'image': (16, 16, 3)},  # A third of the patch.
    ),
  ],
)
def test_data_that_are_elsewhere_have_their_shapes(keys, classes, shapes):
  config = _config(data_dir='/nowhere', **keys)
  streams = data.unread_streams(config)
  assert streams.num_classes == classes
  assert {k: spec.shape for k, spec in streams.inputs.items()} == shapes
  assert not list(streams.test())
  assert not pathlib.Path('/nowhere').exists()


def test_a_value_that_cannot_work_is_refused_without_the_data():
  config = _config(name='cifar10', data_dir='/nowhere', augment='mirror')
  with pytest.raises(ValueError, match="augment='mirror'"):
    data.unread_streams(config)
