"""SplitMix64: many random numbers from 64 bits, and a hash of integers.

They are written here because the next version of a library may draw other
numbers, while a resumed run must draw the same and an id must keep its bucket.
"""

from collections.abc import Iterator
import itertools

import numpy as np

_STEP = np.uint64(0x9E3779B97F4A7C15)
_FACTORS = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_BLOCK = 32  # Words at once: a call of NumPy costs as much as a hundred words.


def mix(words: np.ndarray) -> np.ndarray:
  """Returns uint64 [...], a bijection of `words` that mixes all their bits.

  It is one iteration of SplitMix64 (Steele, Lea and Flood 2014) with each word
  as the state.

  Args:
    words: uint64 [...], not a scalar: NumPy warns if a scalar overflows.
  """
  words = words + _STEP
  words = (words ^ (words >> np.uint64(30))) * _FACTORS[0]
  words = (words ^ (words >> np.uint64(27))) * _FACTORS[1]
  return words ^ (words >> np.uint64(31))


def words(bits: int, start: int, count: int) -> np.ndarray:
  """Returns uint64 [count], words start, start + 1, ... of sequence `bits`."""
  counter = np.arange(start, start + count, dtype=np.uint64)
  return mix(np.full(count, bits, np.uint64) + counter * _STEP)


class Draws:
  """Random numbers, one after the other, from 64 random bits."""

  def __init__(self, bits: int):
    self._words = self._generate(int(bits))

  def _generate(self, bits: int) -> Iterator[int]:
    for start in itertools.count(0, _BLOCK):
      yield from words(bits, start, _BLOCK).tolist()

  def bits(self) -> int:
    """Returns 64 random bits."""
    return next(self._words)

  def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
    """Returns a number from [low, high)."""
    return low + (high - low) * (self.bits() >> 11) * 2.0**-53

  def below(self, stop: int) -> int:
    """Returns a whole number from 0 to stop - 1."""
    return int(self.uniform() * stop)
