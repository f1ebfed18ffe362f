"""Thresholds of activations, and the statistics that they are made of."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fliqs_jax.layers import grids
from fliqs_jax.numerics import formats
from tests import helpers

CLIPS = [4.0, 'gaussian', 'laplacian', 'absmax']


def quantized(x, name='INT8', clip=4.0, batches=1):
  """Returns a batch as its format quantizes it, and d sum / dx."""
  menu = formats.menu(name)
  statistics = grids.first_statistics(menu, clip)

  def total(x):
    seen = statistics
    for _ in range(batches):
      seen = grids.observed(seen, x)
    on_grid = grids.activations(x, menu, seen, 'magnitude')
    q = on_grid(jnp.ones(1))
    y = q.values * q.scale
    return y.sum(), y

  gradient, y = jax.jit(jax.grad(total, has_aux=True))(jnp.asarray(x))
  return np.asarray(y), np.asarray(gradient)


def error(x, name='INT8', clip=4.0):
  y, _ = quantized(x, name, clip)
  return np.linalg.norm(y - x) / np.linalg.norm(x)


@pytest.mark.parametrize('clip', CLIPS)
@pytest.mark.parametrize('constant', [1 / 197, -3.0, 290.0])
def test_a_constant_is_on_the_grid_and_learns(constant, clip):
  x = np.full((4, 8), constant, np.float32)
  y, gradient = quantized(x, clip=clip, batches=3)
  np.testing.assert_allclose(y, x, rtol=1 / 254)
  np.testing.assert_allclose(gradient, 1, rtol=1e-6)


@pytest.mark.parametrize(
  ('mean', 'std', 'bound'),
  # Half a step of 1/127 of the largest magnitude, uniform: / sqrt(12).
  [(0.5, 0.05, 0.005), (290, 5, 0.004), (5, 1, 0.006), (2, 1, 0.006)],
)
def test_values_far_from_zero_are_not_clipped_away(mean, std, bound):
  x = mean + std * helpers.random((64, 64))
  assert error(x) < bound
  assert error(x) < 2 * error(x, clip='absmax')


@pytest.mark.parametrize(
  ('clip', 'name', 'bound'),
  # The deviation alone has .065 at INT8 and .115 at INT4 with 4; the largest
  # magnitude has .009 and .163.
  [(4.0, 'INT8', 0.03), ('laplacian', 'INT8', 0.01), (4.0, 'INT4', 0.12)],
)
def test_behind_a_relu_values_are_near(clip, name, bound):
  x = np.maximum(helpers.random((64, 256)), 0)
  assert error(x, name, clip) < bound


def test_about_zero_the_threshold_is_the_papers():
  x = np.concatenate([helpers.random((8, 8)), -helpers.random((8, 8))])
  menu = formats.menu('INT4')
  statistics = grids.observed(grids.first_statistics(menu, 2.0), x)
  scales = [
    grids.activations(x, menu, statistics, rule)(np.ones(1)).scale
    for rule in ('magnitude', 'deviation')
  ]
  np.testing.assert_allclose(*scales, rtol=1e-6)
  np.testing.assert_allclose(scales[0], 2.0 * x.std() / 7, rtol=1e-6)


def test_moments_keep_a_small_spread_about_a_large_offset():
  menu = formats.menu('INT8')
  statistics = grids.first_statistics(menu, 4.0)
  batches = 1e4 + 0.1 * helpers.random((20, 500)).astype(np.float64)
  for batch in batches.astype(np.float32):
    statistics = grids.observed(statistics, batch)
  np.testing.assert_allclose(statistics['mean'], 1e4, rtol=1e-6)
  seen = batches.astype(np.float32).astype(np.float64)
  np.testing.assert_allclose(statistics['variance'], seen.var(), rtol=0.01)


@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf, 1e20, None])
@pytest.mark.parametrize('first', [True, False])
def test_a_batch_that_is_not_finite_changes_nothing(value, first):
  statistics = grids.first_statistics(formats.menu('INT8'), 4.0)
  if not first:
    statistics = grids.observed(statistics, helpers.random((4, 3)))
  batch = np.zeros((0, 3), np.float32)
  if value is not None:
    batch = helpers.random((4, 3))
    batch[2, 1] = value
  helpers.same(
    jax.tree.map(np.asarray, grids.observed(statistics, batch)),
    jax.tree.map(np.asarray, statistics),
  )


def test_inactive_channels_do_not_count():
  x = 3 + helpers.random((16, 4))
  active = np.array([True, True, False, False])
  statistics = grids.first_statistics(formats.menu('INT8'), 4.0)
  masked = grids.observed(statistics, x * active, active)
  alone = grids.observed(statistics, x[:, :2])
  helpers.close(masked, alone)


def test_weights_of_a_channel_that_are_equal_are_kept():
  w = np.full((8, 2), 0.3, np.float32) * np.float32([1, -2])
  on_grid = grids.weights(w, formats.menu('INT4'), 'gaussian', (0,))
  q = on_grid(np.ones(1))
  np.testing.assert_allclose(q.values * q.scale, w, rtol=1e-6)
