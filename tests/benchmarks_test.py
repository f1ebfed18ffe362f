"""The benchmarks run, at sizes at which their numbers say nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import layer_times
from benchmarks import serving


@pytest.fixture(scope='module', name='network')
def _network():
  """A ResNet-8 as {variant: function}, its ops, and its layers."""
  config = dict(name='resnet_cifar', depth=8, filters=4)
  functions, ops = serving.variants(config, 8)
  image = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
  plain, served = functions['float32'], functions['int8']
  return functions, ops, layer_times.rows(plain, served, ops, image)


def test_every_served_layer_is_in_the_table(network):
  _, ops, rows = network
  assert sum(row.count for row in rows) == len(ops)
  stem = rows[0]
  assert (stem.path, stem.inputs) == ('stem', (8, 8, 3))
  # At each place 27 x 4 products; 3 numbers come in and 4 go out.
  assert stem.macs_per_number == pytest.approx(27 * 4 / 7)
  lines = layer_times.table(rows, batch=2, at_once=1, rounds=1)[2:]
  assert sorted(line.split(' | ')[0] for line in lines) == sorted(
    f'| {row.path}' for row in rows
  )
  ratios = [float(line.split(' | ')[6]) for line in lines]
  assert ratios == sorted(ratios)


def test_a_layer_alone_is_the_one_of_the_network(network):
  functions, _, rows = network
  x = jax.random.normal(jax.random.key(0), (1, 8, 8, 3))
  for variant, (layer, variables) in (
    ('float32', rows[0].plain),
    ('int8', rows[0].served),
  ):
    whole = functions[variant]
    _, kept = whole.model.apply(
      whole.variables, x, train=False, capture_intermediates=True
    )
    result = kept['intermediates']['stem']['__call__'][-1]
    np.testing.assert_array_equal(layer.apply(variables, x), result)
