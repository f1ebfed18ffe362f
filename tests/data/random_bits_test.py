"""SplitMix64 is the published one, alike one by one and many at a time."""

import numpy as np
import pytest

from fliqs_jax.data import random_bits

# The first outputs of java.util.SplittableRandom(0) and of Vigna's
# splitmix64.c from state 0.
_FROM_ZERO = (0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F)


def test_words_are_those_of_the_published_generator():
  assert tuple(random_bits.words(0, 0, 3).tolist()) == _FROM_ZERO
  assert tuple(random_bits.words(0, 1, 2).tolist()) == _FROM_ZERO[1:]


def test_mix_is_one_step_from_each_word():
  states = np.array([0, 0x9E3779B97F4A7C15], np.uint64)
  assert tuple(random_bits.mix(states).tolist()) == _FROM_ZERO[:2]


def test_mix_is_one_to_one_and_moves_half_of_all_bits():
  words = np.arange(4096, dtype=np.uint64)
  mixed = random_bits.mix(words)
  assert len(set(mixed.tolist())) == 4096
  # Of 64 fair bits 32 differ, with a deviation of 4; that of the mean of 4096
  # is 4 / 64, so 1 is 16 deviations.
  for bit in (0, 31, 63):
    flipped = random_bits.mix(words ^ np.uint64(1 << bit))
    changed = np.bitwise_count(mixed ^ flipped)
    assert abs(changed.mean() - 32) < 1


def test_draws_go_through_the_words_one_by_one():
  draws = random_bits.Draws(2**64 - 1)
  drawn = [draws.bits() for _ in range(100)]
  assert drawn == random_bits.words(2**64 - 1, 0, 100).tolist()


@pytest.mark.parametrize(('low', 'high'), [(0.0, 1.0), (-3.0, 5.0)])
def test_uniform_numbers_fill_their_range(low, high):
  draws = random_bits.Draws(7)
  numbers = np.array([draws.uniform(low, high) for _ in range(4000)])
  assert low <= numbers.min()
  assert numbers.max() < high
  # The standard deviation of a uniform number is (high - low) / sqrt(12).
  deviation = (high - low) / np.sqrt(12 * 4000)
  assert abs(numbers.mean() - (low + high) / 2) < 5 * deviation


def test_whole_numbers_are_equally_frequent():
  draws = random_bits.Draws(8)
  counts = np.bincount([draws.below(5) for _ in range(5000)], minlength=5)
  # 1000 each, with a deviation of sqrt(5000 * 0.2 * 0.8) = 28.
  assert len(counts) == 5
  assert np.all(np.abs(counts - 1000) < 5 * 28)
