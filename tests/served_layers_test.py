"""Served layers: the search's outputs, bit for bit, in every format."""

import jax
import numpy as np
import pytest

from fliqs_jax import formats
from fliqs_jax import layers
from fliqs_jax import quant_spec
from fliqs_jax import served_layers
from fliqs_jax import serving
from fliqs_jax import stored
from tests import layers_test

SERVED = {
  layers.QuantConv: served_layers.ServedConv,
  layers.QuantDense: served_layers.ServedDense,
  layers.QuantDenseGeneral: served_layers.ServedDenseGeneral,
  layers.QuantEinsum: served_layers.ServedEinsum,
}
# Every format of every named space, and the rest of the integers.
FORMATS = tuple(
  dict.fromkeys([*sum(formats.SPACES.values(), ()), 'INT2', 'INT3'])
)
INTEGERS = [name for name in FORMATS if name.startswith('INT')]
PAIRS = [
  *((name, name) for name in FORMATS),
  ('INT4', 'INT8'),
  ('INT5', 'E4M3'),
]


def search_and_served(case, weights, activations, x, seed=2):
  """Returns the search's output, the served ones, and what is stored."""
  menu = formats.menu(FORMATS)
  spec = quant_spec.QuantSpec(menu, mode='separate')
  quantized = case.quantized(spec)
  one_hot = {
    'weights': np.float32([f.name == weights for f in menu]),
    'activations': np.float32([f.name == activations for f in menu]),
  }
  variables = dict(
    params=layers_test.random_params(case, seed),
    arch=one_hot,
    quant_stats=layers_test.stats(menu=menu),
  )
  flat, kept = stored.tensors(
    quantized.apply, variables, {'': (weights, activations)}, x
  )
  expected = search(quantized)(variables, x)
  low_bit = stored.variables(flat, kept)
  layer = SERVED[type(quantized)](
    **case.kwargs,
    spec=quant_spec.QuantSpec(
      mode='separate', assignment={'': (weights, activations)}
    ),
  )
  signed = jax.jit(layer.apply)(low_bit, x)
  shifts = serving.with_shifts(low_bit, kept)
  unsigned = jax.jit(layer.apply)(low_bit | shifts, x)
  return expected, (signed, unsigned), kept['']


_COMPILED = {}


def search(layer):
  """Returns the jitted layer; the traced formats share one compilation."""
  return _COMPILED.setdefault(layer, jax.jit(layer.apply))


@pytest.mark.parametrize(
  'case_id',
  ['conv', 'conv_depthwise', 'dense', 'dense_general', 'einsum_heads'],
)
def test_every_format_is_served_as_the_search_evaluates_it(case_id):
  case = layers_test.CASES[case_id]
  x = layers_test.random(case.input_shape, seed=3)
  for weights, activations in PAIRS:
    expected, served, _ = search_and_served(case, weights, activations, x)
    for y in served:
      np.testing.assert_array_equal(y, expected, f'{weights} {activations}')


@layers_test.CASE
def test_every_shape_of_op_is_served_in_integers(case):
  x = layers_test.random(case.input_shape, seed=4)
  expected, served, kept = search_and_served(case, 'INT8', 'INT8', x)
  for y in served:
    np.testing.assert_array_equal(y, expected)
  assert kept.arithmetic == 'int8'
  assert kept.exact
