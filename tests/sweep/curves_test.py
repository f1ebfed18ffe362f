"""Curves and their differences, against numbers by hand."""

import math

import pytest

from fliqs_jax.sweep import curves

# Figure 15 of the paper: ResNet-18 of published width.
_UNIFORM = [(29.23, 67.32), (116.9, 70.60), (467.7, 71.17)]


def test_the_papers_resnet_18_is_2_18_points_above_uniform():
  # log(33.54 / 29.23) / log(116.9 / 29.23) = .0992 of the 3.28 points from
  # INT4 to INT8: 67.32 + .325.
  line = curves.curve(_UNIFORM)
  assert curves.at(line, 33.54) == pytest.approx(67.65, abs=0.005)
  found = curves.curve([(33.54, 69.83)])
  assert curves.mean_difference(found, line) == pytest.approx(2.18, abs=0.005)
  assert curves.mean_difference(line, found) == pytest.approx(-2.18, abs=0.005)


def test_beyond_its_ends_a_curve_is_not_known():
  line = curves.curve(_UNIFORM)
  assert curves.at(line, 29.22) is None
  assert curves.at(line, 468) is None
  assert curves.at(line, 29.23) == pytest.approx(67.32)
  assert curves.mean_difference([(20.0, 60.0)], line) is None
  assert curves.mean_difference([(1.0, 0.0), (2.0, 1.0)], line) is None


def test_of_equal_costs_the_better_point_counts():
  line = curves.curve([(4.0, 2.0), (2.0, 1.0), (4.0 * (1 + 1e-8), 3.0)])
  assert line == [(2.0, 1.0), (4.0, 3.0)]


def test_the_mean_is_over_the_logarithm_of_the_common_costs():
  # On costs 1, 4, 16 one curve is 0, 2, 4 and the other 0 at 2, 3 at 8: the
  # common logs (base 2) are 1 to 3. There a is 1 to 3 and b 0 to 3, both
  # straight: the mean difference is (1 + 0) / 2.
  a = [(1.0, 0.0), (4.0, 2.0), (16.0, 4.0)]
  b = [(2.0, 0.0), (8.0, 3.0)]
  assert curves.mean_difference(a, b) == pytest.approx(0.5)
  # With a point between: b is 0, 0, 3 at logs 1, 2, 3. The differences 1, 2, 0
  # have trapezoids 1.5 and 1 over two units.
  b = [(2.0, 0.0), (4.0, 0.0), (8.0, 3.0)]
  assert curves.mean_difference(a, b) == pytest.approx(1.25)


def test_a_difference_has_the_spread_of_its_seeds():
  # Both have the same noise for a seed, which cancels: 1 everywhere.
  noise = {0: 0.0, 1: 5.0, 2: -3.0}
  a = {
    t: {s: (c, 1 + n) for s, n in noise.items()} for t, c in ((1, 1), (2, 4))
  }
  b = {
    t: {s: (c, 0 + n) for s, n in noise.items()} for t, c in ((1, 1), (2, 4))
  }
  apart = curves.difference(a, b)
  assert apart.value == pytest.approx(1)
  assert apart.error == pytest.approx(0, abs=1e-12)
  # Noise of a alone: means of n draws of a two-valued noise of 0 and 2 have the
  # standard deviation 1 / sqrt(n).
  a = {1: {seed: (2.0, 2.0 * (seed % 2)) for seed in range(16)}}
  b = {1: dict.fromkeys(range(16), (2.0, 0.0))}
  apart = curves.difference(a, b)
  assert apart.value == pytest.approx(1)
  assert apart.error == pytest.approx(1 / math.sqrt(16), rel=0.1)
  assert apart.low < 1 < apart.high
  assert apart.high - apart.low == pytest.approx(4 * apart.error, rel=0.15)


def test_the_error_is_that_of_paired_differences():
  # At one cost the differences are 1, 2 and 6: their mean is 3, its standard
  # error sqrt(((2 ** 2 + 1 + 3 ** 2) / 2) / 3) = sqrt(7 / 3).
  a = {'a': {seed: (2.0, 10.0 + d) for seed, d in enumerate((1.0, 2.0, 6.0))}}
  b = {'b': dict.fromkeys(range(3), (2.0, 10.0))}
  apart = curves.difference(a, b, samples=20_000)
  assert apart.value == pytest.approx(3)
  assert apart.error == pytest.approx(math.sqrt(7 / 3), rel=0.02)


def test_the_reversed_difference_is_the_other_curve_s():
  a = {'a': {seed: (2.0, 10.0 + d) for seed, d in enumerate((1.0, 2.0, 6.0))}}
  b = {'b': dict.fromkeys(range(3), (2.0, 10.0))}
  assert curves.difference(a, b).reversed() == pytest.approx(
    curves.difference(b, a)
  )
  assert curves.Difference(1.0).reversed() == curves.Difference(-1.0)


def test_one_seed_has_no_spread_and_no_runs_no_difference():
  one = {1: {0: (2.0, 3.0)}}
  assert curves.difference(one, one) == curves.Difference(0.0)
  assert curves.difference(one, {}) is None
  # Different seeds: means are compared, a spread over seeds is not known.
  assert curves.difference(one, {1: {1: (2.0, 1.0)}}).error is None
