"""Entropy coding: by hand, by sampling, and by a real compressor."""

import lzma

import numpy as np
import pytest

from fliqs_jax.numerics import entropy_coding
from fliqs_jax.numerics import formats
from fliqs_jax.numerics import quantize


def test_measured_bits_are_shannons():
  # Half of eight are one value, a quarter another: 4 x 1 + 2 x 2 + 2 x 3 bits.
  values = np.array([0, 0, 0, 0, 1, 1, 2, 3])
  assert entropy_coding.measured(values) == pytest.approx(14)
  assert entropy_coding.measured(np.zeros((3, 5))) == 0


@pytest.mark.parametrize('name', ['INT2', 'INT4', 'INT8', 'E2M1', 'E4M3'])
def test_expected_bits_are_those_of_gaussian_channels(name):
  fmt, count = formats.parse(name), 500
  x = np.random.default_rng(0).standard_normal((400, count)).astype(np.float32)
  thresholds = np.abs(x).max(axis=1, keepdims=True)
  grid = quantize.grid_of(fmt)
  codes = np.asarray(quantize.quantize(x, grid, thresholds).values)
  bits = entropy_coding.measured(codes) / x.size
  assert entropy_coding.expected(fmt, count) == pytest.approx(bits, abs=0.03)


def test_bfloat16_is_expected_at_its_own_entropy():
  # Sign and mantissa are nearly even, 8 bits, and exponents have 2.2 bits.
  bits = entropy_coding.expected(formats.BF16, 100)
  x = np.random.default_rng(0).standard_normal(2_000_000).astype(np.float32)
  codes = (x.view(np.uint32) + 0x8000) >> 16
  measured = entropy_coding.measured(codes) / x.size
  assert bits == pytest.approx(measured, abs=0.01)
  assert 10 < bits < 11


def test_a_compressor_reaches_the_measured_bits():
  x = np.random.default_rng(0).standard_normal(200_000)
  codes = np.clip(np.round(x * 20), -127, 127).astype(np.int8)
  packed = len(lzma.compress(codes.tobytes(), preset=9))
  bound = entropy_coding.measured(codes) / 8
  assert bound < packed < 1.1 * bound


def test_more_bits_cost_more_but_less_than_they_are():
  for count in (9, 1000):
    bits = [
      entropy_coding.expected(formats.parse(f'INT{b}'), count)
      for b in range(2, 9)
    ]
    assert bits == sorted(bits)
    assert all(found < b for b, found in zip(range(2, 9), bits))
  # More weights in a channel have a larger largest one.
  narrow, wide = (
    entropy_coding.expected(formats.parse('INT4'), n) for n in (9, 1000)
  )
  assert wide < narrow
