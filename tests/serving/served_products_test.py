"""Served products and networks: the search's outputs, bit for bit.

All tests compare bits; one layer in every format, every kind of layer in INT8,
the largest sums, a network of convolutions and one in bfloat16 are compiled as
users do.
"""

from collections.abc import Mapping
import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fliqs_jax as fliqs
from fliqs_jax import models
from fliqs_jax.numerics import formats
from fliqs_jax.numerics import int8_ops
from fliqs_jax.program import contractions
from fliqs_jax.program import equations
from fliqs_jax.program import products as products_lib
from fliqs_jax.serving import served_products
from fliqs_jax.serving import served_program
from fliqs_jax.serving import stored_layers
from fliqs_jax.serving import stored_products
from tests import helpers
from tests.layers import cases

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
# 3x3 on 9x9, which int8 multiplies by windows, by rows of the kernel and by
# patches.
STRIDES = {
  f'conv_strides_{n}': cases.conv(
    (2, 9, 9, 5), features=7, strides=(n, n), padding='VALID'
  )
  for n in (1, 2, 3)
}


class Layers(nn.Module):
  """Layers that are independent of each other, in one program.

  Attributes:
    cases: (name, case) of each.
  """

  cases: tuple[tuple[str, cases.Case], ...]

  @nn.compact
  def __call__(self, inputs):
    return {
      name: case.plain(name=name)(inputs[name]) for name, case in self.cases
    }


@dataclasses.dataclass
class Searched:
  """A searched model with parameters and statistics, stored and served."""

  model: Any
  variables: Mapping[str, Any]
  assignment: Mapping[str, tuple[str, str]]
  inputs: Any
  call: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    apply = functools.partial(
      self.model.apply, mutable=['operands'], **self.call
    )
    # The outputs of the search, and what it multiplied, of one compilation.
    self.expected, noted = jax.device_get(
      jax.jit(apply)(self.variables, self.inputs)
    )
    names = 'arch', 'quant_stats'
    own = {k: v for k, v in self.variables.items() if k not in names}
    traced = self.model.trace(own, (self.inputs,), self.call, None, [])
    self.stored = stored_products.stored(
      tuple(self.model.replaced(traced.parts)),
      self.variables,
      self.assignment,
      noted['operands'],
    )
    self.served = served_program.make(
      self.model, own, self.call, self.stored, (self.inputs,), None
    )

  def outputs(self, unsigned: bool) -> Any:
    """Returns the outputs of the served program in one of its two forms."""
    unpack = jax.jit(self.served.unpack, static_argnums=1)
    operands = unpack(self.served.tensors, unsigned)
    run = jax.jit(self.served.run)
    return run(operands, *jax.tree.leaves(self.inputs))

  def check(self, forms=(False, True)) -> dict[str, stored_layers.Layer]:
    """Checks that the forms, unsigned or not, give the search's outputs."""
    names = products_lib.paths(self.expected)
    for unsigned in forms:
      for name, y, expected in zip(
        names, self.outputs(unsigned), jax.tree.leaves(self.expected)
      ):
        np.testing.assert_array_equal(y, expected, f'{name} {unsigned}')
    return self.stored.layers


def statistics(shapes, menu):
  """Returns `quant_stats` of which every layer has seen activations."""
  seen = cases.stats(menu=menu)
  return jax.tree_util.tree_map_with_path(
    lambda path, x: np.broadcast_to(seen[path[-1].key], x.shape), shapes
  )


def searched(named: Mapping[str, cases.Case], pairs, menu) -> Searched:
  """Returns layers whose formats are given.

  Args:
    named: {name: layer}.
    pairs: {name: (format of the weights, of the activations)}.
    menu: the formats of which they are selected.
  """
  spec = fliqs.QuantSpec(menu, mode='separate')
  model = dataclasses.replace(
    fliqs.searchable(Layers(tuple(named.items())), spec), fast_forms=True
  )
  inputs = {k: helpers.random(c.input_shape, 3) for k, c in named.items()}
  space = fliqs.find_decisions(model, inputs)
  choices = {}
  for decision in space.decisions:
    name, *_, side = decision.name.split('/')
    pair = dict(zip(('weights', 'activations'), pairs[name]))
    choices[decision.name] = decision.one_hot(pair[side])
  variables = jax.eval_shape(model.init, jax.random.key(0), inputs)
  variables = dict(
    params=jax.tree.map(
      lambda x: helpers.random(x.shape, 2), variables['params']
    ),
    arch=space.expand(choices),
    quant_stats=statistics(variables['quant_stats'], menu),
  )
  return Searched(model, variables, space.assignment(choices), inputs)


@pytest.mark.slow
@pytest.mark.parametrize(
  'case_id',
  [
    pytest.param('conv', marks=pytest.mark.optimized),
    'conv_depthwise',
    'dense',
    'einsum_heads',
  ],
)
def test_every_format_is_stored_in_its_bits_and_served(case_id):
  pairs = {'_'.join(pair): pair for pair in PAIRS}
  run = searched(dict.fromkeys(pairs, cases.CASES[case_id]), pairs, MENU)
  layers = run.check()
  for name, (weights, activations) in pairs.items():
    integers = all(formats.parse(f).is_integer for f in (weights, activations))
    assert (layers[name].arithmetic == 'int8') == integers
    bits = formats.parse(weights).bits * int(np.prod(layers[name].shape))
    stored = run.stored.tensors[f'params/{name}/weights']
    assert stored.nbytes == -(-bits // 8)


@pytest.mark.slow
@pytest.mark.optimized
def test_every_shape_of_op_is_served_in_integers():
  named = cases.CASES | STRIDES
  menu = formats.menu(('INT4', 'INT8'))
  run = searched(named, dict.fromkeys(named, ('INT8', 'INT8')), menu)
  layers = run.check()
  assert {path.split('/')[0] for path in layers} == set(named)
  assert all(layer.exact for layer in layers.values())
  for unsigned in (False, True):
    operands = jax.eval_shape(
      functools.partial(run.served.unpack, unsigned=unsigned),
      run.served.tensors,
    )
    program = jax.make_jaxpr(run.served.run)(
      operands, *jax.tree.leaves(run.inputs)
    )
    found = list(results_of_products(program.jaxpr))
    assert found
    assert set(found) == {'int32'}


def results_of_products(jaxpr):
  """Yields the dtype of the result of every product of a program."""
  for eqn in jaxpr.eqns:
    if contractions.of(eqn):
      yield eqn.outvars[0].aval.dtype.name
    for body in equations.inside(eqn):
      yield from results_of_products(body.jaxpr)


def extreme(model, params, x):
  """Returns a layer at INT8 whose threshold for activations is 1."""
  spec = fliqs.QuantSpec('INT8')
  clip = np.ones(1, np.float32)
  menu = formats.menu('INT8')
  variables = dict(
    params=params,
    arch=dict(format=clip),
    quant_stats=cases.stats(std=1.0, menu=menu, clip=clip),
  )
  model = fliqs.searchable(model, spec)
  return Searched(model, variables, {'': ('INT8', 'INT8')}, x)


@pytest.mark.optimized
def test_integers_sum_exactly_where_float32_does_not():
  # Sums of 8192 products of 127 * 127 = 16129 end at 1.3e8; the last odd
  # product makes them odd, and float32 has no odd numbers above 2**24.
  size = 8192
  w = np.ones((size, 1), np.float32)
  x = np.ones((1, size), np.float32)
  x[0, -1] = 126 / 127
  exact = 127 * 127 * (size - 1) + 127 * 126
  assert exact % 2 == 1
  run = extreme(nn.Dense(1, use_bias=False), dict(kernel=w), x)
  layer = run.stored.layers['']
  assert layer.largest_sum == 127 * 127 * size
  assert not layer.exact
  (y,) = run.outputs(unsigned=False)
  scale = np.float32(1 / 127)
  # Rounded once, when the sum becomes float32.
  assert y[0, 0] == np.float32(exact) * scale * scale
  # The search's sum, rounded as it grows, is within its own rounding errors.
  np.testing.assert_allclose(run.expected, y, rtol=1e-5)


@pytest.mark.optimized
def test_the_largest_possible_sum_of_a_convolution_is_known_and_exact():
  # 3 x 3 x 512 = 4608 products of at most 127 x 127: 74 322 432. The weights of
  # one feature are -127, those of the other in turn 127 and -127: its sum is
  # zero here, but as large for other inputs.
  w = np.stack([-np.ones(512), np.tile([1, -1], 256)], axis=-1)
  w = np.broadcast_to(w, (3, 3, 512, 2)).astype(np.float32)
  x = np.ones((1, 3, 3, 512), np.float32)
  conv = nn.Conv(2, (3, 3), padding='VALID', use_bias=False)
  run = extreme(conv, dict(kernel=w), x)
  layer = run.stored.layers['']
  assert layer.largest_sum == 127 * 127 * 4608 == 74_322_432
  assert not layer.exact  # Above 2**24 = 16 777 216.
  scale = np.float32(1 / 127)
  expected = np.float32(127 * 127 * 4608) * scale * scale
  for unsigned in (False, True):
    (y,) = run.outputs(unsigned)
    np.testing.assert_array_equal(y.ravel(), [-expected, 0.0])


def test_a_sum_that_an_accumulator_cannot_hold_stays_in_floats():
  # 140 000 products of 127 * 127 = 16129 are 2 258 060 000, and an int32 ends
  # at 2 147 483 647: the sum would wrap around and be negative.
  size = 140_000
  assert 127 * 127 * size > 2**31 - 1
  x, w = np.ones((1, size), np.float32), np.ones((size, 1), np.float32)
  run = extreme(nn.Dense(1, use_bias=False), dict(kernel=w), x)
  layer = run.stored.layers['']
  assert (layer.arithmetic, layer.largest_sum) == ('float32', None)
  assert run.stored.tensors['params/weights'].dtype == np.int8
  for unsigned in (False, True):
    (y,) = run.outputs(unsigned)
    np.testing.assert_allclose(y, [[size]], rtol=1e-4)
    np.testing.assert_array_equal(y, run.expected)


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
@pytest.mark.parametrize(
  ('name', 'dtype'),
  [
    pytest.param('resnet_cifar', None, marks=pytest.mark.optimized),
    ('deit', None),
    pytest.param('deit', 'bfloat16', marks=pytest.mark.optimized),
  ],
)
def test_a_network_of_mixed_formats_is_served_bit_for_bit(name, dtype):
  # The search's network has layers of `quant_layers`; the program has stock
  # ones, with the same variables.
  names = 'INT8', 'INT4', 'E4M3', 'BF16'
  spec = fliqs.QuantSpec(names)
  own = models.build(NETWORKS[name], 10, spec, dtype=dtype)
  x = jnp.asarray(helpers.random((4, 8, 8, 3), seed=1))
  call = dict(train=False)
  space = fliqs.find_decisions(own, x[:1], spec=spec, **call)
  # The formats take turns over the layers.
  choices = {
    d.name: np.eye(4, dtype=np.float32)[i % 4]
    for i, d in enumerate(space.decisions)
  }
  shapes = jax.eval_shape(
    functools.partial(own.init, **call), jax.random.key(0), x
  )
  variables = {
    collection: jax.tree.map(
      lambda leaf: 0.3 + 0.2 * np.abs(helpers.random(leaf.shape)), tree
    )
    for collection, tree in shapes.items()
    if collection != 'cost'
  }
  variables |= dict(
    params=jax.tree.map(
      lambda leaf: 0.3 * helpers.random(leaf.shape), shapes['params']
    ),
    arch=space.expand(choices),
    quant_stats=statistics(shapes['quant_stats'], formats.menu(names)),
  )
  expected = jax.jit(functools.partial(own.apply, **call))(variables, x)
  stock = models.construct(
    NETWORKS[name], 10, dtype=dtype, conv=nn.Conv, dense=nn.Dense
  )
  program = dataclasses.replace(fliqs.searchable(stock, spec), fast_forms=True)
  run = Searched(program, variables, space.assignment(choices), x, call)
  np.testing.assert_array_equal(run.expected, expected)
  layers = run.check(forms=[int8_ops.prefers_unsigned()])
  assert {layer.arithmetic for layer in layers.values()} == {'int8', 'float32'}


class _Shared(nn.Module):
  """A residual block: the sum reads what the second layer reads."""

  @nn.compact
  def __call__(self, x):
    x = nn.relu(nn.Dense(4, name='first')(x))
    y = nn.Dense(4, name='second')(x)
    return x + nn.Dense(4, name='third')(nn.relu(y))


def test_only_what_a_product_and_another_equation_read_is_shared():
  spec = fliqs.QuantSpec('INT8')
  model = fliqs.searchable(_Shared(), spec)
  x = jnp.asarray(helpers.random((2, 3)))
  variables = helpers.init(model, x)
  variables = dict(
    variables,
    quant_stats=statistics(variables['quant_stats'], formats.menu(('INT8',))),
  )
  layers = dict.fromkeys(('first', 'second', 'third'), ('INT8', 'INT8'))
  run = Searched(model, variables, layers, x)
  shared = []

  class Noting(served_products.Served):
    def shared(self, x):
      shared.append(x.shape)
      return super().shared(x)

  operands = run.served.unpack(run.served.tensors, False)
  (y,) = run.served.run(operands, x, kind=Noting)
  np.testing.assert_array_equal(y, run.expected)
  assert shared == [(2, 4)]


def test_the_iterations_of_a_product_are_in_their_order():
  # As strings, @10 and @11 come before @2.
  layers = {
    f'body/up/@{i}': stored_layers.Layer(None, None, (i,)) for i in range(12)
  }
  layers = dict(sorted(layers.items()))
  assert list(layers)[2] == 'body/up/@10'
  (iterations,) = stored_layers.by_product(layers).values()
  assert [one.shape for one in iterations] == [(i,) for i in range(12)]
