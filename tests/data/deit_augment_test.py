"""RandAugment's operations are timm's, at timm's strengths and frequencies."""

import numpy as np
from PIL import Image
import pytest

from fliqs_jax.data import deit_augment
from fliqs_jax.data import random_bits

_FILL = (10, 20, 30)
# Every level in every channel, in another order each.
_LEVELS = np.stack(
  [np.roll(np.arange(256).reshape(16, 16), i * 37) for i in range(3)], axis=-1
).astype(np.uint8)


def _apply(name, strength, sign=1, pixels=_LEVELS):
  image = Image.fromarray(pixels)
  result = deit_augment.OPERATIONS[name](image, strength, sign, _FILL)
  assert result.size == image.size
  assert result.mode == 'RGB'
  np.testing.assert_array_equal(np.asarray(image), pixels)  # Left as it is.
  return np.asarray(result)


def test_there_are_the_fifteen_of_timm():
  assert len(deit_augment.OPERATIONS) == 15


@pytest.mark.parametrize('name', deit_augment.OPERATIONS)
@pytest.mark.parametrize('strength', [0.0, 0.9, 1.0])
@pytest.mark.parametrize('sign', [-1, 1])
def test_every_operation_works_at_every_strength(name, strength, sign):
  _apply(name, strength, sign)


@pytest.mark.parametrize(
  'name',
  ['rotate', 'shear_x', 'shear_y', 'translate_x', 'translate_y', 'solarize_add']
  + ['color', 'contrast', 'brightness', 'sharpness'],
)
def test_no_strength_changes_nothing(name):
  np.testing.assert_array_equal(_apply(name, 0.0), _LEVELS)


def test_invert_is_the_negative():
  np.testing.assert_array_equal(_apply('invert', 0.5), 255 - _LEVELS)


def test_solarize_inverts_what_is_above_its_threshold():
  # 256 - 256 / 4 = 192.
  expected = np.where(_LEVELS < 192, _LEVELS, 255 - _LEVELS)
  np.testing.assert_array_equal(_apply('solarize', 0.25), expected)


def test_solarize_add_brightens_the_dark_half():
  # 110 * 0.9 = 99; 127 + 99 is below 255.
  expected = np.where(_LEVELS < 128, _LEVELS + 99.0, _LEVELS)
  np.testing.assert_array_equal(_apply('solarize_add', 0.9), expected)


@pytest.mark.parametrize(('strength', 'bits'), [(0.5, 2), (0.9, 1), (1.0, 1)])
def test_posterize_keeps_fewer_bits_the_stronger(strength, bits):
  # 4 - int(4 * 0.5) = 2, 4 - int(3.6) = 1, and never none.
  expected = _LEVELS >> (8 - bits) << (8 - bits)
  np.testing.assert_array_equal(_apply('posterize', strength), expected)


@pytest.mark.parametrize('sign', [-1, 1])
def test_brightness_scales_the_image(sign):
  # 1 + 0.9 * 0.5 = 1.45, or 0.55.
  expected = np.clip((1 + sign * 0.45) * _LEVELS.astype(float), 0, 255)
  assert np.abs(_apply('brightness', 0.5, sign) - expected).max() <= 1


@pytest.mark.parametrize('sign', [-1, 1])
def test_translate_moves_by_up_to_45_percent(sign):
  # 0.45 * 20 = 9 columns, and 5 at strength 5 / 9.
  pixels = np.random.default_rng(0).integers(0, 256, (4, 20, 3), np.uint8)
  moved = _apply('translate_x', 5 / 9, sign, pixels)
  entered = np.broadcast_to(np.array(_FILL, np.uint8), (4, 5, 3))
  if sign == 1:
    expected = np.concatenate([pixels[:, 5:], entered], axis=1)
  else:
    expected = np.concatenate([entered, pixels[:, :-5]], axis=1)
  np.testing.assert_array_equal(moved, expected)


def test_operations_come_as_often_and_as_strong_as_in_timm(monkeypatch):
  seen = []

  def spy(name):
    def operation(image, strength, sign, fill):
      assert fill == _FILL
      seen.append((name, strength, sign))
      return image

    return operation

  monkeypatch.setattr(
    deit_augment, 'OPERATIONS', {name: spy(name) for name in 'abcde'}
  )
  image = Image.new('RGB', (1, 1))
  for bits in random_bits.words(1, 0, 2000):
    deit_augment.randaugment(image, random_bits.Draws(bits), _FILL)
  # Two of an image, each with probability 1/2: 2000, deviation sqrt(1000).
  assert abs(len(seen) - 2000) < 5 * 32
  names, strengths, signs = zip(*seen)
  counts = [names.count(name) for name in 'abcde']
  # A fifth of them each: 400, deviation 18.
  assert all(abs(count - 400) < 5 * 18 for count in counts)
  assert abs(np.mean(signs)) < 5 / np.sqrt(2000)
  # Normal of mean 0.9 and deviation 0.05, cut at 1, two deviations above:
  # that takes E[(z - 2)+] = 0.0085 deviations off the mean.
  assert abs(np.mean(strengths) - 0.9) < 5 * 0.05 / np.sqrt(2000)
  assert max(strengths) == 1
  assert abs(np.std(strengths) - 0.05) < 0.005


def test_erased_rectangles_have_the_promised_area_and_noise():
  areas, values = [], []
  for bits in random_bits.words(2, 0, 300):
    pixels = np.zeros((40, 40, 3), np.uint8)
    # Far from black, so that no noise is taken for what was there.
    deit_augment.erase(
      pixels, random_bits.Draws(bits), (128.0,) * 3, (20.0,) * 3
    )
    erased = pixels.all(-1)
    rows, columns = np.flatnonzero(erased.any(1)), np.flatnonzero(erased.any(0))
    assert erased.sum() == len(rows) * len(columns)  # A rectangle.
    areas.append(erased.mean())
    values.append(pixels[erased])
  # Rounding the sides of a 2 % area of 1600, 32 pixels, changes it by a fifth.
  assert min(areas) > 0.02 * 0.8
  assert max(areas) < 1 / 3 * 1.05
  noise = np.concatenate(values)
  # About 70,000 pixels; 256 levels lose 1 % of the deviation of 20.
  assert abs(noise.mean() - 128) < 0.5
  assert abs(noise.std() - 20) < 0.5


def test_noise_is_clipped_at_black_and_white():
  pixels = np.full((40, 40, 3), 128, np.uint8)
  deit_augment.erase(pixels, random_bits.Draws(5), (128.0,) * 3, (1000.0,) * 3)
  # Within 127 of 1000 deviations lie 10 %: the rest is black or white.
  erased = pixels[np.any(pixels != 128, axis=-1)]
  assert np.mean((erased == 0) | (erased == 255)) > 0.8


def test_an_image_without_room_is_left_alone():
  pixels = np.full((1, 1, 3), 7, np.uint8)
  deit_augment.erase(pixels, random_bits.Draws(1), (0.0,) * 3, (1.0,) * 3)
  assert np.all(pixels == 7)
