"""ImageNet's crops are the known ones; its streams keep the pipeline's word."""

import io
import itertools
import json
import shutil

import ml_collections
import numpy as np
from PIL import Image
import pytest

from fliqs_jax import data
from fliqs_jax.data import random_bits
from fliqs_jax.data.sources import imagenet
from tests.data import prepared

_MEAN = np.array([0.485, 0.456, 0.406])
_STD = np.array([0.229, 0.224, 0.225])


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
  path = tmp_path_factory.mktemp('tfds')
  prepared.imagenet2012(path)
  return path


def _config(data_dir, **changes):
  config = ml_collections.ConfigDict(
    dict(
      name='imagenet2012',
      data_dir=str(data_dir),
      train_split='train[:80%]',
      valid_split='train[80%:]',
      test_split='validation',
      batch_size=8,
      valid_batch_size=4,
      test_batch_size=4,
      image_size=32,
      augment='crop_flip',
      random_erasing=0.0,
    )
  )
  config.update(changes)
  return config.lock()


def _take(batches, count):
  return list(itertools.islice(batches, count))


def _assert_equal(left, right):
  assert len(left) == len(right)
  for a, b in zip(left, right):
    assert a.keys() == b.keys()
    for key in a:
      np.testing.assert_array_equal(a[key], b[key])


def _labels(batches):
  return [label for b in batches for label in b['label'].tolist()]


def test_batches_have_the_promised_shapes_and_types(data_dir):
  streams = data.make_streams(_config(data_dir), seed=0)
  assert streams.num_classes == 1000
  assert streams.input_shape == (32, 32, 3)
  # 80 % of 40, and the rest.
  assert streams.num_examples == dict(train=32, valid=8, test=10)
  for batches, size in (
    (streams.train(0), 8),
    (streams.valid(0), 4),
    (streams.test(), 4),
  ):
    batch = next(batches)
    assert batch['image'].shape == (size, 32, 32, 3)
    assert batch['image'].dtype == np.float32
    assert batch['label'].dtype == np.int32


def test_streams_share_no_example_and_lose_none(data_dir):
  streams = data.make_streams(_config(data_dir), seed=0)
  # Labels name the examples: 7 i of the i-th, see tests/prepared.py.
  train = _labels(_take(streams.train(0), 4))
  valid = _labels(_take(streams.valid(0), 2))
  test = _labels(streams.test())[:10]
  assert sorted(train + valid) == sorted(7 * i for i in range(40))
  assert len(train) == 32
  assert sorted(test) == sorted(700 + 7 * i for i in range(10))


@pytest.mark.parametrize('augment', ['crop_flip', 'randaugment'])
def test_a_stream_from_a_step_is_the_rest_of_the_stream(data_dir, augment):
  config = _config(data_dir, augment=augment, random_erasing=0.5)
  whole = _take(data.make_streams(config, seed=1).train(0), 7)
  _assert_equal(whole[5:], _take(data.make_streams(config, seed=1).train(5), 2))


def test_processes_together_read_the_batch_of_one(data_dir):
  config = _config(data_dir, augment='randaugment', random_erasing=0.5)
  whole = data.make_streams(config, seed=0)
  shards = [
    data.make_streams(config, 0, process_index=i, process_count=2)
    for i in range(2)
  ]
  for stream in ('train', 'valid'):
    parts = [_take(getattr(shard, stream)(3), 2) for shard in shards]
    together = [
      {key: np.concatenate([b[key] for b in pair]) for key in pair[0]}
      for pair in zip(*parts)
    ]
    _assert_equal(_take(getattr(whole, stream)(3), 2), together)


def test_every_epoch_shows_other_crops(data_dir):
  streams = data.make_streams(_config(data_dir, batch_size=32), seed=0)
  first, second = (
    dict(zip(b['label'], b['image'])) for b in _take(streams.train(0), 2)
  )
  assert first.keys() == second.keys()
  assert all(np.any(first[label] != second[label]) for label in first)


def test_without_augmentation_training_images_are_the_evaluation_ones(
  data_dir,
):
  config = _config(data_dir, augment='none', batch_size=32)
  streams = data.make_streams(config, seed=0)
  train = next(streams.train(0))
  swapped = _config(
    data_dir,
    train_split='train[80%:]',
    valid_split='train[:80%]',
    valid_batch_size=32,
  )
  valid = next(data.make_streams(swapped, seed=0).valid(0))
  by_label = dict(zip(valid['label'], valid['image']))
  for label, image in zip(train['label'], train['image']):
    np.testing.assert_array_equal(image, by_label[label])


def test_grey_and_cmyk_images_become_rgb(data_dir):
  # The order of a prepared split is TFDS's; labels 0 and 7 are grey and CMYK.
  config = _config(
    data_dir,
    test_split='train',
    train_split='validation[:5]',
    valid_split='validation[5:]',
    test_batch_size=40,
    batch_size=5,
  )
  batch = next(data.make_streams(config, seed=0).test())
  images = dict(zip(batch['label'], batch['image'] * _STD + _MEAN))
  grey, cmyk = images[0], images[7]
  np.testing.assert_allclose(grey, grey[..., :1] + np.zeros(3), atol=1e-6)
  # CMYK loses nothing by itself: white minus ink. JPEG does, a little.
  height, width = np.random.default_rng(1).integers(40, 120, 2)
  original = Image.fromarray(prepared.smooth(1, height, width))
  expected = np.asarray(imagenet.eval_crop(original, 32)) / 255
  assert np.abs(cmyk - expected).mean() < 0.02


def test_a_colour_is_normalised_by_the_standard_numbers(data_dir):
  crops = imagenet._Crops(4, 'none', 0.0)
  png = prepared.encoded(np.full((9, 9, 3), (0, 51, 255), np.uint8), 'PNG')
  columns = dict(image=np.array([png], object), file_name=[b'x'])
  image = crops.eval_inputs(columns)['image']
  # 0, 51 and 255 are 0, 0.2 and 1.
  expected = (np.array([0.0, 0.2, 1.0]) - _MEAN) / _STD
  np.testing.assert_allclose(
    image, np.broadcast_to(expected, (1, 4, 4, 3)), rtol=1e-5
  )


def test_evaluation_shows_the_centre_of_the_resized_image():
  # 28 / 0.875 = 32, so a 96 x 64 image is resized to 48 x 32, by half, and the
  # crop starts 10 from the left and 2 from above. The centre of its pixel j is
  # at 2 (10 + j + 1/2) - 1/2 = 2 j + 20.5 of the image, where an antialiasing
  # filter leaves a gradient as it is; likewise 2 i + 4.5 downwards.
  x, y = np.meshgrid(np.arange(96), np.arange(64))
  gradient = np.stack([2 * x, 2 * y, 0 * x], axis=-1).astype(np.uint8)
  crop = np.asarray(imagenet.eval_crop(Image.fromarray(gradient), 28))
  j, i = np.meshgrid(np.arange(28), np.arange(28))
  expected = np.stack([4 * j + 41, 4 * i + 9, 0 * j], axis=-1)
  np.testing.assert_array_equal(crop, expected)


@pytest.mark.parametrize(
  ('size', 'resized', 'corner'),
  [
    # 256 * 500 / 375 = 341.3 wide; (341 - 224) / 2 = 58.5 and 16.
    ((500, 375), (341, 256), (58, 16)),
    ((375, 500), (256, 341), (16, 58)),
    ((256, 256), (256, 256), (16, 16)),
    # 64 becomes 256, and 96 becomes 384.
    ((64, 96), (256, 384), (16, 80)),
  ],
)
def test_evaluation_equals_resizing_all_and_cropping(size, resized, corner):
  image = Image.fromarray(prepared.smooth(0, size[1], size[0]))
  whole = image.resize(resized, Image.Resampling.BICUBIC)
  left, upper = corner
  expected = whole.crop((left, upper, left + 224, upper + 224))
  crop = imagenet.eval_crop(image, 224)
  difference = np.asarray(crop, int) - np.asarray(expected, int)
  assert np.abs(difference).max() <= 1  # Filter weights round differently.
  assert np.abs(difference).mean() < 0.01


def test_crops_have_the_promised_area_aspect_and_place():
  width, height = 400, 300
  boxes = np.array(
    [
      imagenet.random_crop_box(width, height, random_bits.Draws(seed))
      for seed in random_bits.words(0, 0, 2000)
    ]
  )
  left, upper, right, lower = boxes.T
  assert left.min() >= 0
  assert upper.min() >= 0
  assert right.max() <= width
  assert lower.max() <= height
  w, h = right - left, lower - upper
  # Rounding each side by 1/2 changes an area of 9600 by half its perimeter.
  area = w * h / (width * height)
  assert area.min() > 0.08 - 200 / (width * height)
  assert np.all(w / h < 4 / 3 * (1 + 1 / h + 1 / w))
  assert np.all(w / h > 3 / 4 * (1 - 1 / h - 1 / w))
  # Large areas of unsuitable aspect are drawn again, so the mean is below that
  # of uniform ones, 0.54, but not by much.
  assert 0.4 < area.mean() < 0.54
  # Centres are uniform over what a crop leaves, with deviations below
  # 400 / sqrt(12) = 115; that of the mean of 2000 is below 2.6.
  assert abs((left + right).mean() / 2 - width / 2) < 5 * 2.6
  assert abs((upper + lower).mean() / 2 - height / 2) < 5 * 2.6


@pytest.mark.parametrize(
  ('size', 'box'),
  [
    # No crop of an allowed aspect fits: the widest, 4/3 of 10, in the middle.
    ((1000, 10), (493, 0, 506, 10)),
    # The narrowest, 3/4: 10 wide and 13 high.
    ((10, 1000), (0, 493, 10, 506)),
    ((1, 1), (0, 0, 1, 1)),
  ],
)
def test_images_too_narrow_for_a_crop_are_cropped_in_the_middle(size, box):
  for seed in range(20):
    assert imagenet.random_crop_box(*size, random_bits.Draws(seed)) == box


class _Scripted:
  """Draws that are given: shares of the range, and the last of the places."""

  def __init__(self, *shares):
    self._shares = iter(shares)

  def uniform(self, low, high):
    return low + next(self._shares) * (high - low)

  def below(self, stop):
    return stop - 1


# As torchvision's RandomResizedCrop: the area is a share from 0.08 to 1 of the
# image's, the logarithm of the aspect is uniform from log 3/4 to log 4/3.
_HALF = (0.5 - 0.08) / 0.92  # Of 400 x 300: 60 000.
_QUARTER = (0.25 - 0.08) / 0.92  # Of 300 x 100: 7 500.


@pytest.mark.parametrize(
  ('aspect', 'w', 'h'),
  [
    (0.0, 212, 283),  # 3/4: sqrt(45 000), sqrt(80 000).
    (0.5, 245, 245),  # 1: sqrt(60 000) = 244.9.
    (0.75, 263, 228),  # sqrt(4/3) = 1.155: sqrt(69 282), sqrt(51 962).
    (1.0, 283, 212),  # 4/3.
  ],
)
def test_a_crop_has_torchvision_s_sides(aspect, w, h):
  box = imagenet.random_crop_box(400, 300, _Scripted(_HALF, aspect))
  # In the last place, which touches the corner.
  assert box == (400 - w, 300 - h, 400, 300)


def test_a_crop_that_does_not_fit_is_drawn_ten_times():
  # The whole area of 300 x 100 at aspect 1 is 173 x 173; a quarter 87 x 87.
  too_high, fits = (1.0, 0.5), (_QUARTER, 0.5)
  box = imagenet.random_crop_box(300, 100, _Scripted(*9 * too_high, *fits))
  assert box == (213, 13, 300, 100)
  # Then the largest of aspect 4/3 in the middle: 133 x 100, from 167 // 2.
  box = imagenet.random_crop_box(300, 100, _Scripted(*10 * too_high, *fits))
  assert box == (83, 0, 216, 100)


def test_half_of_the_crops_are_mirrored():
  # Brighter to the right; mirrored, to the left.
  ramp = np.broadcast_to(np.arange(250, dtype=np.uint8)[:, None], (200, 250, 3))
  image = Image.fromarray(np.ascontiguousarray(ramp))
  mirrored = 0
  for seed in range(400):
    crop = imagenet.train_crop(image, 8, random_bits.Draws(seed))
    pixels = np.asarray(crop, int)
    mirrored += bool(pixels[0, 0, 0] > pixels[0, -1, 0])
  # 200 with a deviation of 10.
  assert abs(mirrored - 200) < 50


def test_large_photographs_are_decoded_small():
  jpeg = prepared.encoded(prepared.smooth(0, 600, 800))

  def crop(kind):
    image = Image.open(io.BytesIO(jpeg))
    if kind == 'whole':
      image = Image.fromarray(np.asarray(image))
    return imagenet.train_crop(image, 32, random_bits.Draws(3)), image.size

  small, small_size = crop('file')
  whole, whole_size = crop('whole')
  assert whole_size == (800, 600)
  assert small_size < (800, 600)
  difference = np.asarray(small, int) - np.asarray(whole, int)
  assert np.abs(difference).mean() < 2  # Of 255.


def test_erasing_changes_a_rectangle_and_nothing_else(data_dir):
  plain, erased = (
    next(
      data.make_streams(
        _config(data_dir, random_erasing=share, batch_size=32), seed=0
      ).train(0)
    )['image']
    for share in (0.0, 1.0)
  )
  changed = np.any(plain != erased, axis=-1)
  assert np.all(changed.any((1, 2)))
  for mask in changed:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    # Noise of three channels hits a pixel's own colour once in thousands.
    assert box.mean() > 0.95
    assert mask.sum() <= (1 / 3 + 0.05) * 32 * 32


def test_an_undecodable_image_is_named(data_dir):
  crops = imagenet._Crops(8, 'none', 0.0)
  columns = dict(
    image=np.array([b'\xff\xd8 no JPEG'], object),
    file_name=np.array([b'n01440764_1.JPEG'], object),
  )
  with pytest.raises(ValueError, match='n01440764_1.JPEG .* cannot be decoded'):
    crops.eval_inputs(columns)


def test_a_missing_directory_says_how_to_prepare_it(tmp_path):
  with pytest.raises(ValueError, match='is not prepared there') as caught:
    data.make_streams(_config(tmp_path), seed=0)
  message = str(caught.value)
  for part in (
    f"config.data.data_dir='{tmp_path}'",
    f'{tmp_path}/imagenet2012/VERSION/dataset_info.json',
    'Nothing is downloaded',
    "pip install 'fliqs_jax[tensorflow]'",
    f"tfds.builder('imagenet2012', data_dir='{tmp_path}')",
    "download_and_prepare(file_format='array_record'",
    'ILSVRC2012_img_train.tar',
  ):
    assert part in message


def test_without_a_data_dir_the_place_is_that_of_tfds(data_dir, monkeypatch):
  monkeypatch.setenv('TFDS_DATA_DIR', str(data_dir))
  streams = data.make_streams(_config(''), seed=0)
  assert streams.num_examples['test'] == 10


def _copy(data_dir, tmp_path, **changes):
  """Copies the set with another content of dataset_info.json."""
  target = tmp_path / 'imagenet2012' / '5.1.0'
  shutil.copytree(data_dir / 'imagenet2012' / '5.1.0', target)
  path = target / 'dataset_info.json'
  info = json.loads(path.read_text()) | changes
  info = {key: value for key, value in info.items() if value is not None}
  path.write_text(json.dumps(info))
  return target


@pytest.mark.parametrize('recorded', ['tfrecord', None])
def test_tfrecord_is_recognised_and_the_conversion_named(
  data_dir, tmp_path, recorded
):
  # Old versions of TFDS did not write the format down.
  directory = _copy(data_dir, tmp_path, fileFormat=recorded)
  with pytest.raises(ValueError, match='prepared as tfrecord') as caught:
    data.make_streams(_config(tmp_path), seed=0)
  command = (
    f'python -m fliqs_jax.data.convert {directory} '
    'NEW_DATA_DIR/imagenet2012/5.1.0'
  )
  assert command in str(caught.value)


def test_other_formats_are_refused(data_dir, tmp_path):
  _copy(data_dir, tmp_path, fileFormat='parquet')
  with pytest.raises(ValueError, match="parquet.*file_format='array_record'"):
    data.make_streams(_config(tmp_path), seed=0)


def test_the_newest_complete_version_is_read(data_dir, tmp_path):
  directory = _copy(data_dir, tmp_path)
  root = directory.parent
  shutil.copytree(directory, root / '5.0.0')
  shutil.copytree(directory, root / 'incomplete.X_9.0.0')
  (root / '10.0.0').mkdir()
  info = root / '5.0.0' / 'dataset_info.json'
  info.write_text(info.read_text().replace('array_record"', 'tfrecord"'))
  assert data.make_streams(_config(tmp_path), seed=0)


@pytest.mark.parametrize('content', [b'{"name":', b'{"name": "\xff"}'])
def test_a_damaged_description_is_named(data_dir, tmp_path, content):
  (_copy(data_dir, tmp_path) / 'dataset_info.json').write_bytes(content)
  with pytest.raises(ValueError, match='config.data.data_dir=.*cannot be read'):
    data.make_streams(_config(tmp_path), seed=0)


def test_a_bucket_of_an_unknown_kind_is_refused():
  with pytest.raises(ValueError, match="data_dir='moon://bucket' cannot be re"):
    data.make_streams(_config('moon://bucket'), seed=0)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    # Its labels are -1.
    (dict(test_split='test'), "unknown split 'test'.*train, validation"),
    (dict(test_split='val'), "unknown split 'val'.*train, validation"),
    (dict(image_size=0), 'image_size=0 must be at least 1'),
    (dict(image_size=32.0), 'image_size=32.0 must be of type int'),
    (dict(augment='autoaugment'), 'allowed: none, crop_flip, randaugment'),
    (dict(random_erasing=1.5), 'random_erasing=1.5 must be from 0 to 1'),
    (dict(buckets=3), r'unknown keys \(buckets\)'),
  ],
)
def test_what_cannot_work_is_refused(data_dir, changes, message):
  config = ml_collections.ConfigDict(_config(data_dir).to_dict() | changes)
  with pytest.raises(ValueError, match=message):
    data.make_streams(config, seed=0)
