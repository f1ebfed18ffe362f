"""Tests for the table of intercepted linen classes."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from fliqs_jax.intercept import coverage
from fliqs_jax.intercept import layer_calls
from fliqs_jax.intercept import searchable

# For each intercepted class with weights: a layer and the shape of its input.
EXAMPLES = {
  nn.Conv: (nn.Conv(3, (2,)), (1, 4, 2)),
  nn.ConvLocal: (nn.ConvLocal(3, (2,)), (1, 4, 2)),
  nn.ConvTranspose: (nn.ConvTranspose(3, (2,)), (1, 4, 2)),
  nn.Dense: (nn.Dense(3), (1, 2)),
  nn.DenseGeneral: (nn.DenseGeneral((3, 2)), (1, 2)),
  nn.Einsum: (nn.Einsum((2, 3), 'ni,io->no'), (1, 2)),
  nn.Embed: (nn.Embed(5, 3), (1, 4)),
}


def test_every_intercepted_class_has_an_example():
  assert set(EXAMPLES) == set(layer_calls.LAYERS)


@pytest.mark.parametrize('linen_class', layer_calls.LAYERS)
def test_a_layer_of_each_class_is_searched_and_its_weights_are_found(
  linen_class,
):
  layer, shape = EXAMPLES[linen_class]
  dtype = jnp.int32 if linen_class is nn.Embed else jnp.float32
  inputs = jax.ShapeDtypeStruct(shape, dtype)
  model = searchable.searchable(layer, embed=True)
  variables = jax.eval_shape(model.init, jax.random.key(0), inputs)
  weights = variables['params'][layer_calls.LAYERS[linen_class].weights]
  (searched,) = coverage.coverage(model, inputs).layers
  assert searched.kind == linen_class.__name__
  assert searched.weights == weights.size
  assert searched.formats
