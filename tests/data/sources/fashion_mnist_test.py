"""Fashion-MNIST is read from its IDX files, and only if they are whole."""

import gzip
import itertools

import ml_collections
import numpy as np
import pytest

from fliqs_jax import data
from fliqs_jax.data.sources import fashion_mnist

SIZES = {'train': 10, 'test': 4}
PREFIXES = {'train': 'train', 'test': 't10k'}
TRAIN_IMAGES = 'train-images-idx3-ubyte'
TRAIN_LABELS = 'train-labels-idx1-ubyte'
TEST_IMAGES = 't10k-images-idx3-ubyte'
TEST_LABELS = 't10k-labels-idx1-ubyte'

# Zero, zero, 8 for bytes, the number of axes; then each length in four bytes.
# 28 is 1c.
HEADERS = {
  TRAIN_IMAGES: bytes.fromhex('00000803 0000000a 0000001c 0000001c'),
  TRAIN_LABELS: bytes.fromhex('00000801 0000000a'),
  TEST_IMAGES: bytes.fromhex('00000803 00000004 0000001c 0000001c'),
  TEST_LABELS: bytes.fromhex('00000801 00000004'),
}


@pytest.fixture(autouse=True)
def _few_examples(monkeypatch):
  monkeypatch.setattr(fashion_mnist, 'SPLIT_SIZES', SIZES)


def _pixels(split):
  """Returns uint8 [N, 28, 28]; no two images are alike."""
  seed = list(SIZES).index(split)
  rng = np.random.default_rng(seed)
  return rng.integers(0, 256, (SIZES[split], 28, 28), np.uint8)


def _labels(split):
  """Returns uint8 [N]: 9, 8, 7, ..."""
  return np.arange(9, 9 - SIZES[split], -1, np.uint8)


@pytest.fixture
def data_dir(tmp_path):
  """A directory of four files; those of the images are packed."""
  for split, prefix in PREFIXES.items():
    name = f'{prefix}-images-idx3-ubyte'
    packed = gzip.compress(HEADERS[name] + _pixels(split).tobytes())
    (tmp_path / f'{name}.gz').write_bytes(packed)
    name = f'{prefix}-labels-idx1-ubyte'
    (tmp_path / name).write_bytes(HEADERS[name] + _labels(split).tobytes())
  return tmp_path


def _streams(data_dir, **changes):
  config = ml_collections.ConfigDict(
    dict(
      name='fashion_mnist',
      data_dir=str(data_dir),
      train_split='train[:80%]',
      valid_split='train[80%:]',
      test_split='test',
      batch_size=8,
      valid_batch_size=2,
      test_batch_size=4,
      augment='none',
    )
  )
  config.update(changes)
  return data.make_streams(config.lock(), seed=0)


def _examples(batch):
  """Returns the examples of a batch as {bytes of the image: label}."""
  # Mean and deviation of the real training pixels.
  pixels = np.round(batch['image'] * 90.02 + 72.94).astype(np.uint8)
  return {p.tobytes(): label for p, label in zip(pixels, batch['label'])}


def _originals(split, part=slice(None)):
  images, labels = _pixels(split)[part], _labels(split)[part]
  return {image.tobytes(): label for image, label in zip(images, labels)}


def test_batches_are_the_images_and_labels_of_the_files(data_dir):
  streams = _streams(data_dir)
  assert streams.num_classes == 10
  assert streams.input_shape == (28, 28, 1)
  assert streams.num_examples == dict(train=8, valid=2, test=4)
  train, valid = next(streams.train(0)), next(streams.valid(0))
  assert train['image'].dtype == np.float32
  assert train['label'].dtype == np.int32
  assert _examples(train) == _originals('train', slice(8))
  assert _examples(valid) == _originals('train', slice(8, None))
  (test,) = streams.test()
  assert _examples(test) == _originals('test')
  # Test examples keep the order of the file.
  np.testing.assert_array_equal(test['label'], [9, 8, 7, 6])


def test_training_images_are_cropped_and_mirrored(data_dir):
  streams = _streams(data_dir, augment='crop_flip')
  crops = {}
  for image, label in _originals('train', slice(8)).items():
    whole = np.pad(np.frombuffer(image, np.uint8).reshape(28, 28), 4)
    for side in (whole, whole[:, ::-1]):
      for y, x in itertools.product(range(9), range(9)):
        crops[side[y : y + 28, x : x + 28].tobytes()] = label
  shown = {}
  for batch in itertools.islice(streams.train(0), 3):
    shown |= _examples(batch)
  # 24 draws of one in 8 images and 162 ways: hardly two are alike.
  assert len(shown) > 20
  assert shown.items() <= crops.items()


@pytest.mark.parametrize('data_dir', ['', '/nowhere', 'gs://bucket/fashion'])
def test_without_a_directory_the_package_is_named(data_dir):
  with pytest.raises(ValueError, match='Nothing is downloaded') as caught:
    _streams(data_dir)
  assert f'config.data.data_dir={data_dir!r} must be' in str(caught.value)
  assert 'dataset-fashion-mnist' in str(caught.value)


def test_a_missing_file_is_named(data_dir):
  (data_dir / TRAIN_LABELS).unlink()
  with pytest.raises(ValueError, match='dataset-fashion-mnist') as caught:
    _streams(data_dir)
  assert f'neither {TRAIN_LABELS}.gz nor {TRAIN_LABELS}' in str(caught.value)


def test_swapped_files_are_refused(data_dir):
  labels = (data_dir / TRAIN_LABELS).read_bytes()
  (data_dir / f'{TRAIN_IMAGES}.gz').write_bytes(gzip.compress(labels))
  with pytest.raises(ValueError, match=r'shape \(10, 28, 28\)') as caught:
    _streams(data_dir)
  assert TRAIN_IMAGES in str(caught.value)
  assert 'begins with the bytes 000008010000000a' in str(caught.value)


def test_the_labels_of_the_other_split_are_refused(data_dir):
  labels = (data_dir / TEST_LABELS).read_bytes()
  (data_dir / TRAIN_LABELS).write_bytes(labels)
  with pytest.raises(
    ValueError, match='0000080100000004, not with 000008010000000a'
  ):
    _streams(data_dir)


@pytest.mark.parametrize(('change', 'size'), [(-1, 7839), (1, 7841)])
def test_a_file_of_another_length_is_refused(data_dir, change, size):
  # 10 x 28 x 28 = 7840.
  path = data_dir / f'{TRAIN_IMAGES}.gz'
  content = (gzip.decompress(path.read_bytes()) + b'\0')[: 16 + 7840 + change]
  path.write_bytes(gzip.compress(content))
  with pytest.raises(
    ValueError, match=f'{size} bytes .* not the 7840'
  ) as error:
    _streams(data_dir)
  assert TRAIN_IMAGES in str(error.value)


def test_a_truncated_packed_file_is_refused(data_dir):
  path = data_dir / f'{TRAIN_IMAGES}.gz'
  path.write_bytes(path.read_bytes()[:-100])
  with pytest.raises(ValueError, match=f'{TRAIN_IMAGES}.gz cannot be read'):
    _streams(data_dir)


def test_a_label_beyond_the_ten_classes_is_refused(data_dir):
  path = data_dir / TRAIN_LABELS
  path.write_bytes(path.read_bytes()[:-1] + b'\x0a')
  with pytest.raises(ValueError, match=f'{TRAIN_LABELS} holds the label 10'):
    _streams(data_dir)


def test_other_augmentations_are_refused(data_dir):
  with pytest.raises(ValueError, match="augment='mixup'.*none, crop_flip"):
    _streams(data_dir, augment='mixup')
