"""Served layers and networks: the search's outputs, bit for bit."""

import dataclasses
import functools
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from fliqs_jax import models
from fliqs_jax.layers import quant_layers
from fliqs_jax.numerics import formats
from fliqs_jax.numerics import int8_ops
from fliqs_jax.search import train_step
from fliqs_jax.serving import loader
from fliqs_jax.serving import served_layers
from fliqs_jax.serving import stablehlo
from fliqs_jax.serving import stored_layers
from fliqs_jax.space import discovery
from fliqs_jax.space import quant_spec
from tests import helpers
from tests.layers import cases

pytestmark = pytest.mark.optimized

SERVED = {
  quant_layers.QuantConv: served_layers.ServedConv,
  quant_layers.QuantDense: served_layers.ServedDense,
  quant_layers.QuantDenseGeneral: served_layers.ServedDenseGeneral,
  quant_layers.QuantEinsum: served_layers.ServedEinsum,
}
# Every format of every named space, and the rest of the integers.
FORMATS = tuple(
  dict.fromkeys([*sum(formats.SPACES.values(), ()), 'INT2', 'INT3'])
)
MENU = formats.menu(FORMATS)
PAIRS = [
  *((name, name) for name in FORMATS),
  ('INT4', 'INT8'),
  ('INT5', 'E4M3'),
]


def one_hot(name):
  return np.float32([f.name == name for f in MENU])


@dataclasses.dataclass
class Searched:
  """A layer of the search, compiled once for all formats."""

  case: cases.Case

  def __post_init__(self):
    self.layer = self.case.quantized(
      quant_spec.QuantSpec(MENU, mode='separate')
    )
    self.apply = jax.jit(self.layer.apply)
    self.tell = stored_layers.operand_recorder(self.layer.apply)
    self.params = cases.random_params(self.case, seed=2)
    self.x = helpers.random(self.case.input_shape, seed=3)

  def check(self, weights: str, activations: str) -> stored_layers.Layer:
    """Checks that every way of serving gives the search's output."""
    variables = dict(
      params=self.params,
      arch=dict(weights=one_hot(weights), activations=one_hot(activations)),
      quant_stats=cases.stats(menu=MENU),
    )
    expected = self.apply(variables, self.x)
    assignment = {'': (weights, activations)}
    flat, kept = stored_layers.tensors(self.tell, variables, assignment, self.x)
    low_bit = stored_layers.variables(flat, kept)
    spec = quant_spec.QuantSpec(mode='separate', assignment=assignment)
    served = SERVED[type(self.layer)](**self.case.kwargs, spec=spec)
    # The signed form, and for integers the unsigned one.
    for shifts in dict.fromkeys((False, kept[''].arithmetic == 'int8')):
      more: dict[str, Any] = loader.with_shifts(low_bit, kept)
      y = jax.jit(served.apply)(low_bit | (more if shifts else {}), self.x)
      message = f'{weights} {activations} {shifts}'
      np.testing.assert_array_equal(y, expected, message)
    return kept['']


@pytest.mark.slow
@pytest.mark.parametrize(
  'case_id',
  ['conv', 'conv_depthwise', 'dense', 'einsum_heads'],
)
def test_every_format_is_served_as_the_search_evaluates_it(case_id):
  searched = Searched(cases.CASES[case_id])
  for weights, activations in PAIRS:
    searched.check(weights, activations)


@pytest.mark.slow
@cases.CASE
def test_every_shape_of_op_is_served_in_integers(case):
  kept = Searched(case).check('INT8', 'INT8')
  assert kept.arithmetic == 'int8'
  assert kept.exact


@pytest.mark.parametrize('strides', [(2, 2), (1, 1), (3, 3)])
def test_patches_strides_and_rows_of_a_kernel(strides):
  # 3x3 on 9x9: by rows of the kernel, by windows, by patches.
  case = cases.conv((2, 9, 9, 5), features=7, strides=strides, padding='VALID')
  Searched(case).check('INT8', 'INT8')


def test_integers_sum_exactly_where_float32_does_not():
  # Sums of 8192 products of 127 * 127 = 16129 end at 1.3e8; the last odd
  # product makes them odd, and float32 has no odd numbers above 2**24.
  size = 8192
  w = np.ones((size, 1), np.float32)
  x = np.ones((1, size), np.float32)
  x[0, -1] = 126 / 127
  exact = 127 * 127 * (size - 1) + 127 * 126
  assert exact % 2 == 1
  spec = quant_spec.QuantSpec('INT8')
  clip = np.ones(1, np.float32)
  menu = formats.menu('INT8')
  variables = dict(
    params=dict(kernel=w),
    arch=dict(format=clip),
    quant_stats=cases.stats(std=1.0, menu=menu, clip=clip),
  )
  layer = quant_layers.QuantDense(1, use_bias=False, spec=spec)
  flat, kept = stored_layers.tensors(
    stored_layers.operand_recorder(layer.apply),
    variables,
    {'': ('INT8', 'INT8')},
    x,
  )
  assert kept[''].largest_sum == 127 * 127 * size
  assert not kept[''].exact
  served = served_layers.ServedDense(
    1,
    use_bias=False,
    spec=quant_spec.QuantSpec(assignment={'': ('INT8', 'INT8')}),
  )
  y = jax.jit(served.apply)(stored_layers.variables(flat, kept), x)
  scale = np.float32(1 / 127)
  # Rounded once, when the sum becomes float32.
  assert y[0, 0] == np.float32(exact) * scale * scale
  # The search's sum, rounded as it grows, is within its own rounding errors.
  np.testing.assert_allclose(jax.jit(layer.apply)(variables, x), y, rtol=1e-5)


def test_the_largest_possible_sum_of_a_convolution_is_known_and_exact():
  # 3 x 3 x 512 = 4608 products of at most 127 x 127: 74 322 432. The weights of
  # one feature are -127, those of the other in turn 127 and -127: its sum is
  # zero here, but as large for other inputs.
  w = np.stack([-np.ones(512), np.tile([1, -1], 256)], axis=-1)
  w = np.broadcast_to(w, (3, 3, 512, 2)).astype(np.float32)
  x = np.ones((1, 3, 3, 512), np.float32)
  clip = np.ones(1, np.float32)
  variables = dict(
    params=dict(kernel=w),
    arch=dict(format=clip),
    quant_stats=cases.stats(std=1.0, menu=formats.menu('INT8'), clip=clip),
  )
  how = dict(features=2, kernel_size=(3, 3), padding='VALID', use_bias=False)
  layer = quant_layers.QuantConv(**how, spec=quant_spec.QuantSpec('INT8'))
  assigned = {'': ('INT8', 'INT8')}
  flat, kept = stored_layers.tensors(
    stored_layers.operand_recorder(layer.apply), variables, assigned, x
  )
  assert kept[''].largest_sum == 127 * 127 * 4608 == 74_322_432
  assert not kept[''].exact  # Above 2**24 = 16 777 216.
  served = served_layers.ServedConv(
    **how, spec=quant_spec.QuantSpec(assignment=assigned)
  )
  low_bit = stored_layers.variables(flat, kept)
  scale = np.float32(1 / 127)
  expected = np.float32(127 * 127 * 4608) * scale * scale
  for shifts in ({}, loader.with_shifts(low_bit, kept)):
    y = jax.jit(served.apply)(low_bit | shifts, x)
    np.testing.assert_array_equal(y.ravel(), [-expected, 0.0])


@pytest.mark.parametrize('axes', [(1, None), (None, 2), (2, 0)])
def test_the_unsigned_product_is_batched(axes):
  rng = np.random.default_rng(0)

  def draw(shape, axis):
    shape = shape if axis is None else np.insert(shape, axis, 3)
    return rng.integers(-127, 128, shape).astype(np.int8)

  x, w = draw((4, 5), axes[0]), draw((5, 6), axes[1])
  numbers = (((1,), (0,)), ((), ()))

  def product(x, w, shifted):
    shift = int8_ops.offset(w, (0,)) if shifted else None
    return int8_ops.dot_general(x, w, numbers, shift)

  np.testing.assert_array_equal(
    *(
      jax.vmap(functools.partial(product, shifted=s), axes)(x, w)
      for s in (True, False)
    )
  )


NETWORKS = {
  'resnet_cifar': dict(name='resnet_cifar', depth=8, filters=4),
  'deit': models.published('deit_ti16')
  | dict(width=0.125, depth=1, patch=4, drop_path=0.0),
}


@pytest.mark.slow
@pytest.mark.parametrize('name', NETWORKS)
def test_a_network_of_mixed_formats_is_served_bit_for_bit(name):
  spec = quant_spec.QuantSpec(('INT8', 'INT4', 'E4M3', 'BF16'))
  model = models.build(NETWORKS[name], 10, spec)
  x = jnp.asarray(helpers.random((4, 8, 8, 3), seed=1))
  space = discovery.find(model, x[:1], spec=spec, train=False)
  variables = dict(helpers.init(model, x[:1], train=False))
  params = variables.pop('params')
  state = {k: v for k, v in variables.items() if k not in ('arch', 'cost')}
  # The formats take turns over the layers.
  choices = {
    d.name: np.eye(4, dtype=np.float32)[i % 4]
    for i, d in enumerate(space.decisions)
  }
  arch = space.expand(choices)
  settle = jax.jit(train_step.settle_step(model.apply))
  state = settle(params, state, arch, dict(image=x), jax.random.key(1))
  variables = dict(params=params, arch=arch, **state)
  tell = stored_layers.operand_recorder(model.apply, train=False)
  flat, kept = stored_layers.tensors(
    tell, variables, space.assignment(choices), x
  )
  low_bit = models.construct(NETWORKS[name], 10, **loader.constructors(kept))
  call = dict(train=False)
  served = loader.Served(
    low_bit, loader.variables(low_bit, flat, kept), dict(call=call)
  )
  expected = jax.jit(lambda v, x: model.apply(v, x, train=False))(variables, x)
  np.testing.assert_array_equal(served(x), expected)
  # And as a program for other machines, of any batch size.
  program = loader.program(low_bit, kept, call)
  data, is_open = stablehlo.serialize(program, flat, (x[:2],))
  assert is_open
  y = stablehlo.deserialize(data).call(flat, x)
  # Sums of floats, in another program: perhaps in another order.
  np.testing.assert_allclose(y, expected, atol=1e-5)


def test_the_iterations_of_a_module_are_in_their_order():
  # As strings, @10 and @11 come before @2.
  layers = {
    f'body/up/@{i}': stored_layers.Layer(None, None, (i,)) for i in range(12)
  }
  layers = dict(sorted(layers.items()))
  assert list(layers)[2] == 'body/up/@10'
  (iterations,) = stored_layers.by_module(layers).values()
  assert [one.shape for one in iterations] == [(i,) for i in range(12)]
