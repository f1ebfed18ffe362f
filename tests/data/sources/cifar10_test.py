"""CIFAR-10 goes through the common pipeline; its crops are He et al.'s."""

import itertools

import ml_collections
import numpy as np
import pytest

from fliqs_jax import data
from fliqs_jax.data import images
from tests.data import prepared

_MEAN = np.array([0.4914, 0.4822, 0.4465])
_STD = np.array([0.2470, 0.2435, 0.2616])


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
  path = tmp_path_factory.mktemp('tfds')
  prepared.cifar10(path)
  return path


def _config(data_dir, **changes):
  config = ml_collections.ConfigDict(
    dict(
      name='cifar10',
      data_dir=str(data_dir),
      train_split='train[:80%]',
      valid_split='train[80%:]',
      test_split='test',
      batch_size=16,
      valid_batch_size=4,
      test_batch_size=8,
      augment='crop_flip',
    )
  )
  config.update(changes)
  return config.lock()


def _take(batches, count):
  return list(itertools.islice(batches, count))


def _bytes(batches):
  """Returns the images of normalised batches as they were, uint8."""
  pixels = np.concatenate([b['image'] for b in batches])
  return np.round(255 * (pixels * _STD + _MEAN)).astype(np.uint8)


def _originals(split):
  return {
    images.decode(example['image']).tobytes()
    for example in prepared.cifar_examples(split)
  }


def test_batches_are_the_images_of_the_set(data_dir):
  streams = data.make_streams(_config(data_dir, augment='none'), seed=0)
  assert streams.num_classes == 10
  assert streams.input_shape == (32, 32, 3)
  assert streams.num_examples == dict(train=48, valid=12, test=20)
  train = _take(streams.train(0), 3)
  assert train[0]['image'].dtype == np.float32
  assert train[0]['label'].dtype == np.int32
  shown = [image.tobytes() for image in _bytes(train)]
  shown += [image.tobytes() for image in _bytes(_take(streams.valid(0), 3))]
  assert len(shown) == 60
  assert set(shown) == _originals('train')
  tested = {image.tobytes() for image in _bytes(list(streams.test()))}
  assert tested == _originals('test')


def test_training_images_are_moved_and_mirrored(data_dir):
  streams = data.make_streams(_config(data_dir), seed=0)
  originals = {o: np.frombuffer(o, np.uint8) for o in _originals('train')}
  shown = _bytes(_take(streams.train(0), 3))
  # 80 of 81 shifts move an image: 1.2 of 48 stay, half of them unmirrored.
  assert sum(image.tobytes() in originals for image in shown) < 8
  padded = [
    np.pad(o.reshape(32, 32, 3), ((4, 4), (4, 4), (0, 0)))
    for o in originals.values()
  ]
  crops = {
    side[y : y + 32, x : x + 32].tobytes()
    for whole in padded
    for side in (whole, whole[:, ::-1])
    for y in range(9)
    for x in range(9)
  }
  assert all(image.tobytes() in crops for image in shown)


def test_shift_moves_a_pixel_to_each_of_nine_places():
  # The bits 0 .. 8 are one of each of 3 x 3 shifts: a dot in the middle lands
  # once on every pixel, and what enters is zero.
  dot = np.zeros((3, 3, 1), np.uint8)
  dot[1, 1] = 255
  bits = np.arange(9, dtype=np.uint64)
  shifted = images.shift(np.stack([dot] * 9), bits, most=1)
  assert shifted.dtype == np.uint8
  np.testing.assert_array_equal(shifted.sum(0), np.full((3, 3, 1), 255))
  assert np.all(shifted.sum((1, 2, 3)) == 255)


def test_the_highest_bit_mirrors():
  ramp = np.arange(6, dtype=np.uint8).reshape(1, 3, 2, 1)
  bits = np.array([2**63 - 1, 2**63], np.uint64)
  plain, mirrored = images.flip(np.concatenate([ramp, ramp]), bits)
  np.testing.assert_array_equal(plain, ramp[0])
  np.testing.assert_array_equal(mirrored, ramp[0, :, ::-1])


@pytest.mark.parametrize('step', [1, 5])
def test_a_stream_from_a_step_is_the_rest_of_the_stream(data_dir, step):
  streams = data.make_streams(_config(data_dir), seed=0)
  whole, rest = _take(streams.train(0), step + 2), _take(streams.train(step), 2)
  np.testing.assert_array_equal(
    np.stack([b['image'] for b in whole[step:]]),
    np.stack([b['image'] for b in rest]),
  )


def test_processes_together_read_the_batch_of_one(data_dir):
  config = _config(data_dir)
  whole = next(data.make_streams(config, seed=0).train(4))
  parts = [
    next(
      data.make_streams(config, 0, process_index=i, process_count=2).train(4)
    )
    for i in range(2)
  ]
  for key in whole:
    together = np.concatenate([part[key] for part in parts])
    np.testing.assert_array_equal(together, whole[key])


def test_a_missing_directory_says_how_to_prepare_it(tmp_path):
  with pytest.raises(ValueError, match='is not prepared there') as caught:
    data.make_streams(_config(tmp_path), seed=0)
  assert f"tfds.builder('cifar10', data_dir='{tmp_path}')" in str(caught.value)


def test_other_augmentations_are_refused(data_dir):
  with pytest.raises(ValueError, match="augment='mixup'.*none, crop_flip"):
    data.make_streams(_config(data_dir, augment='mixup'), seed=0)
