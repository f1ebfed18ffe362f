"""Pictures are cut, shrunk and split as a function of config, seed and step."""

import itertools
import os

import ml_collections
import numpy as np
from PIL import Image
import pytest

from fliqs_jax import data
from fliqs_jax.data.sources import bicubic
from fliqs_jax.data.sources import picture_store
from fliqs_jax.data.sources import pictures

CUT = dict(patch=16, scale=2, crop=20, crops=2)


def _noise(seed, height=40, width=44):
  rng = np.random.default_rng(seed)
  return rng.integers(0, 256, (height, width, 3), np.uint8)


def _save(path, array):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(array).save(path)


@pytest.fixture(autouse=True, name='cache')
def _cache(monkeypatch, tmp_path_factory):
  cache = tmp_path_factory.mktemp('cache')
  monkeypatch.setenv('XDG_CACHE_HOME', str(cache))
  return cache


@pytest.fixture
def data_dir(tmp_path):
  """Ten PNGs, 0.png to 9.png."""
  for i in range(10):
    _save(tmp_path / f'{i}.png', _noise(i))
  return tmp_path


def _streams(data_dir, seed=0, **changes):
  config = ml_collections.ConfigDict(
    dict(
      name='pictures',
      data_dir=str(data_dir),
      train_split='pictures[:60%]',
      valid_split='pictures[60%:80%]',
      test_split='pictures[80%:]',
      batch_size=4,
      valid_batch_size=4,
      test_batch_size=3,
      **CUT,
    )
  )
  config.update(changes)
  return data.make_streams(config.lock(), seed)


def _take(batches, count):
  return list(itertools.islice(batches, count))


def _pieces(array, size):
  """Returns the bytes of all squares of a picture, in all symmetries."""
  found = set()
  for turned in (np.rot90(array, k) for k in range(4)):
    for one in (turned, turned[:, ::-1]):
      for top in range(one.shape[0] - size + 1):
        for left in range(one.shape[1] - size + 1):
          found.add(one[top : top + size, left : left + size].tobytes())
  return found


@pytest.mark.parametrize('scale', [2, 3, 4])
def test_shrinking_is_pillow_s_bicubic_inside_of_the_borders(scale):
  size = 12 * scale
  values = _noise(0, size, 2 * size)
  small = bicubic.shrink(values[None], scale)[0]
  for channel in range(3):
    floats = Image.fromarray(values[..., channel].astype(np.float32))
    expected = floats.resize((24, 12), Image.Resampling.BICUBIC)
    expected = np.round(np.clip(np.asarray(expected), 0, 255))
    # Pillow ignores what is outside, MATLAB mirrors: two pixels each side.
    np.testing.assert_array_equal(
      small[2:-2, 2:-2, channel], expected[2:-2, 2:-2]
    )


def test_weights_by_hand():
  # At 1/4, 3/4, 5/4 and 7/4 pixels of the small picture Keys' kernel is
  # 111, 29, -9 and -3, divided by 128; the sum of both sides is 2.
  keys = np.array([-3, -9, 29, 111, 111, 29, -9, -3]) / 256
  weights = bicubic.weights(16, 2)
  np.testing.assert_allclose(weights[3], [0, 0, 0, *keys, 0, 0, 0, 0, 0])
  np.testing.assert_allclose(weights.sum(1), 1)
  # Three pixels before the first are the mirror images of the first three.
  mirrored = keys[3:] + [*keys[:3][::-1], 0, 0]
  np.testing.assert_allclose(weights[0], [*mirrored, *[0] * 11])


def test_a_batch_is_small_pictures_and_large_labels(data_dir):
  streams = _streams(data_dir)
  batch = next(streams.train(0))
  assert batch['image'].shape == (4, 8, 8, 3)
  assert batch['image'].dtype == np.float32
  assert batch['label'].shape == (4, *streams.label.shape) == (4, 16, 16, 3)
  assert batch['label'].dtype == streams.label.dtype == np.uint8
  small = bicubic.shrink(batch['label'], 2)
  np.testing.assert_array_equal(batch['image'], small / np.float32(255))
  batch = next(streams.test())
  assert batch['image'].shape == (3, 10, 10, 3)
  assert batch['label'].shape == (3, 20, 20, 3)


def test_splits_are_of_pictures(data_dir):
  streams = _streams(data_dir)
  assert streams.num_examples == dict(train=12, valid=4, test=4)
  pieces = [_pieces(_noise(i), 16) for i in range(10)]
  seen = set()
  for batch in _take(streams.train(0), 12):
    for label in batch['label']:
      (i,) = [i for i in range(10) if label.tobytes() in pieces[i]]
      seen.add(i)
  assert seen == set(range(6))
  valid = np.concatenate([b['label'] for b in _take(streams.valid(0), 2)])
  test = np.concatenate([b['label'] for b in streams.test()])
  for labels, numbers in ((valid, (6, 7)), (test, (8, 9))):
    large = [_pieces(_noise(i), 20) for i in numbers]
    assert all(any(x.tobytes() in p for p in large) for x in labels)


def test_a_batch_is_a_function_of_seed_and_step(data_dir):
  one = _take(_streams(data_dir).train(0), 5)
  again = _take(_streams(data_dir).train(3), 2)
  other = _take(_streams(data_dir, seed=1).train(0), 5)
  for a, b in zip(one[3:], again):
    np.testing.assert_array_equal(a['label'], b['label'])
  assert not np.array_equal(one[0]['label'], other[0]['label'])


def test_patches_are_turned_and_mirrored_in_all_ways(tmp_path):
  corner = np.zeros((16, 16, 3), np.uint8)
  corner[0, 1] = 255  # Eight symmetries move it to eight places.
  _save(tmp_path / 'a.png', corner)
  _save(tmp_path / 'b.png', corner)
  _save(tmp_path / 'c.png', corner)
  streams = _streams(
    tmp_path,
    train_split='pictures[:1]',
    valid_split='pictures[1:2]',
    test_split='pictures[2:]',
    crop=16,
    crops=1,
    batch_size=1,
    valid_batch_size=1,
    test_batch_size=1,
  )
  places = {
    tuple(np.argwhere(b['label'][0, ..., 0])[0].tolist())
    for b in _take(streams.train(0), 100)
  }
  ends = {(a, b) for a in (0, 15) for b in (1, 14)}
  assert places == ends | {(b, a) for a, b in ends}


def test_patches_are_those_with_most_texture_of_four_places(tmp_path):
  for i in range(10):
    picture = np.full((32, 64, 3), 90, np.uint8)
    picture[:, 32:] = _noise(i, 32, 32)
    _save(tmp_path / f'{i}.png', picture)
  streams = _streams(tmp_path, valid_batch_size=2, crop=16)
  labels = np.concatenate([b['label'] for b in _take(streams.train(0), 50)])
  smooth = np.mean([np.ptp(x) == 0 for x in labels])
  # Of 49 columns the first 17 are smooth: (17 / 49)^4 is 1.4 %.
  assert smooth < 0.06


def test_test_crops_are_those_with_most_texture(tmp_path):
  for i in range(10):
    picture = np.full((60, 60, 3), 90, np.uint8)
    picture[20:40, 40:] = _noise(i, 20, 20)  # The tile of row 1, column 2.
    picture[40:, :20] = _noise(i, 20, 20) // 2
    _save(tmp_path / f'{i}.png', picture)
  labels = np.concatenate([b['label'] for b in _streams(tmp_path).test()])
  np.testing.assert_array_equal(labels[0], _noise(8, 20, 20))
  np.testing.assert_array_equal(labels[1], _noise(8, 20, 20) // 2)
  np.testing.assert_array_equal(labels[2], _noise(9, 20, 20))


def test_a_folder_is_one_picture_of_which_the_largest_version_is_used(tmp_path):
  for i, name in enumerate(('Leaf', 'lake', 'Sky')):
    folder = tmp_path / name / 'contents'
    _save(folder / 'images' / 'small.png', _noise(100 + i, 24, 24))
    _save(folder / 'images' / 'large.png', _noise(i, 60, 60))
    _save(folder / 'images_dark' / 'large.png', _noise(200 + i, 60, 60))
    (folder / 'metadata.json').write_text('{}')
  streams = _streams(
    tmp_path,
    train_split='pictures[:1]',
    valid_split='pictures[1:2]',
    test_split='pictures[2:]',
    batch_size=2,
    valid_batch_size=2,
    test_batch_size=2,
  )
  large = [_pieces(_noise(i, 60, 60), 16) for i in range(3)]
  # Leaf, Sky, lake: capitals come first.
  labels = np.concatenate([b['label'] for b in _take(streams.train(0), 4)])
  assert all(x.tobytes() in large[0] for x in labels)
  label = next(streams.test())['label'][0, :16, :16]
  assert label.tobytes() in large[1]


def test_a_jpeg_is_shrunk_by_two_and_grey_becomes_rgb(tmp_path):
  halves = np.zeros((81, 80), np.uint8)
  halves[:, 40:] = 200
  Image.fromarray(halves).save(tmp_path / 'a.jpg', quality=100)
  file = picture_store.look(tmp_path / 'a.jpg')
  assert (file.height, file.width) == (40, 40)
  (pixels,) = picture_store.pixels([file])
  assert pixels.shape == (40, 40, 3)
  assert abs(pixels[5, 10].astype(int)).max() <= 2
  assert abs(pixels[5, 30].astype(int) - 200).max() <= 2


def test_pictures_are_decoded_once_and_again_if_one_changes(
  data_dir, monkeypatch
):
  decoded = []
  original = picture_store._decoded

  def counting(file):
    decoded.append(file.path.name)
    return original(file)

  monkeypatch.setattr(picture_store, '_decoded', counting)
  _streams(data_dir)
  _streams(data_dir, crop=16)
  assert decoded == [f'{i}.png' for i in range(10)]
  _save(data_dir / '9.png', _noise(77))
  os.utime(data_dir / '9.png', ns=(1, 1))
  streams = _streams(data_dir)
  assert len(decoded) == 20
  labels = np.concatenate([b['label'] for b in streams.test()])
  assert labels[2].tobytes() in _pieces(_noise(77), 20)


def test_a_damaged_cache_is_refused(data_dir, cache):
  _streams(data_dir)
  (store,) = (cache / 'fliqs_jax' / 'data' / 'pictures').glob('[0-9a-f]*')
  (store / '3.npy').write_bytes(b'damaged')
  with pytest.raises(ValueError, match='is damaged: .*delete it'):
    _streams(data_dir)


@pytest.mark.parametrize(
  ('changes', 'words'),
  [
    (dict(patch=17), 'patch=17 must be a multiple of config.data.scale=2'),
    (dict(crop=21), 'crop=21 must be a multiple'),
    (dict(patch=14), 'patch=14 .* at least 15'),
    (dict(scale=1), 'scale=1 must be at least 2'),
    (dict(crops=0), 'crops=0 at least 1'),
    (dict(patch=42), r'0.png has 44 x 40 pixels, too few for .*patch=42'),
    (dict(crops=5), r'0.png .* hold 4 crops of 20, fewer than .*crops=5'),
    (dict(test_split='pictures[60%:]'), 'overlap'),
  ],
)
def test_a_config_that_cannot_work_is_refused(data_dir, changes, words):
  with pytest.raises(ValueError, match=words):
    _streams(data_dir, **changes)


def test_a_directory_without_pictures_is_refused(tmp_path):
  with pytest.raises(ValueError, match="data_dir='' must be a local dir"):
    _streams('')
  (tmp_path / 'notes.txt').write_text('none')
  with pytest.raises(ValueError, match='holds no picture .*name a directory'):
    _streams(tmp_path)


@pytest.mark.parametrize('keep', [10, 400], ids=['header', 'pixels'])
def test_a_damaged_picture_is_named(data_dir, keep):
  path = data_dir / '4.png'
  path.write_bytes(path.read_bytes()[:keep])
  with pytest.raises(ValueError, match=r'4\.png cannot be decoded: .*remove'):
    _streams(data_dir)


def test_synthetic_pictures_need_no_files():
  streams = _streams('', name='synthetic_pictures', crops=3)
  labels = next(streams.train(0))['label']
  assert labels.shape == (4, 16, 16, 3)
  assert labels.std() > 10
  assert pictures.SPLIT == 'pictures'
  with pytest.raises(ValueError, match='patch=17'):
    _streams('', name='synthetic_pictures', patch=17)
