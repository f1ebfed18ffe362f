"""Encoded images of any depth and mode, and what cannot be decoded."""

import io

import numpy as np
from PIL import Image
import pytest

from fliqs_jax.data import images


def _png(pixels, mode=None):
  buffer = io.BytesIO()
  image = Image.fromarray(pixels)
  (image.convert(mode) if mode else image).save(buffer, format='PNG')
  return buffer.getvalue()


def test_an_image_of_16_bits_has_the_brightness_of_its_8_bits():
  ramp = np.arange(256, dtype=np.uint16).reshape(16, 16)
  np.testing.assert_array_equal(images.decode(_png(257 * ramp))[..., 0], ramp)
  # 100.4 and 100.6 of 255.
  near = np.array([[25803, 25854]], np.uint16)
  np.testing.assert_array_equal(images.decode(_png(near))[..., 0], [[100, 101]])


@pytest.mark.parametrize(
  ('mode', 'channels'),
  [('L', 1), ('1', 1), ('LA', 1), ('P', 3), ('RGBA', 3), ('RGB', 3)],
)
def test_an_image_of_any_mode_shows_its_colours(mode, channels):
  # Black and white, which every mode has.
  pixels = np.zeros((4, 4, 3), np.uint8)
  pixels[1:3] = 255
  shown = images.decode(_png(pixels, mode))
  np.testing.assert_array_equal(shown, pixels[..., :channels])


@pytest.mark.parametrize(
  ('encoded', 'message'),
  [
    (
      b'\x89PNG no image',
      'image 1 of train in D cannot be decoded: it is neither',
    ),
    (
      _png(np.zeros((8, 8, 3), np.uint8))[:45],
      'image 1 of train in D cannot be ',
    ),
    (_png(np.zeros((2, 8, 3), np.uint8)), r'image 1 .* shape \(2, 8, 3\), not'),
    (_png(np.zeros((8, 8), np.uint8)), r'image 1 .* shape \(8, 8, 1\), not'),
  ],
)
def test_an_image_that_does_not_fit_is_named(encoded, message):
  good = _png(np.zeros((8, 8, 3), np.uint8))
  with pytest.raises(ValueError, match=message):
    images.decode_all([good, encoded], (8, 8, 3), 'train in D')


def test_more_pixels_than_can_be_trusted_are_named(monkeypatch):
  monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 10)
  with pytest.raises(ValueError, match='image 0 of train cannot be decoded'):
    images.decode_all([_png(np.zeros((8, 8), np.uint8))], (8, 8, 1), 'train')
