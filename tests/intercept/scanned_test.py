"""Interception under transforms that take only `params` along."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fliqs_jax as fliqs
from fliqs_jax.intercept import searchable as searchable_lib
from fliqs_jax.layers import operands as operands_lib
from fliqs_jax.layers import quant_layers
from fliqs_jax.space import discovery
from fliqs_jax.space import quant_spec
from tests.intercept.searchable_test import by_key
from tests.intercept.searchable_test import chosen
from tests.intercept.searchable_test import close
from tests.intercept.searchable_test import init
from tests.intercept.searchable_test import same
from tests.intercept.searchable_test import step
from tests.layers.quant_layers_test import random

LENGTH = 3
X = random((2, 8))
NAMES = ['INT4', 'BF16', 'INT8']


class Body(nn.Module):
  """A step of a stack, as authors write it."""

  dense: type[nn.Module] = nn.Dense

  @nn.compact
  def __call__(self, x, _=None):
    h = nn.gelu(
      self.dense(12, kernel_init=by_key, name='up')(nn.LayerNorm()(x))
    )
    return x + self.dense(8, kernel_init=by_key, name='down')(h), None


class Stack(nn.Module):
  """Scans over its steps; `params` alone are lifted."""

  axis: int = 0
  remat: bool = False
  transform: str = 'scan'

  @nn.compact
  def __call__(self, x):
    body = nn.remat(Body) if self.remat else Body
    kwargs = dict(
      variable_axes={'params': self.axis}, split_rngs={'params': True}
    )
    if self.transform == 'vmap':
      x = jnp.broadcast_to(x, (LENGTH, *x.shape))
      return nn.vmap(body, **kwargs)(name='body')(x)[0]
    return nn.scan(body, length=LENGTH, **kwargs)(name='body')(x, None)[0]


class Unrolled(nn.Module):
  """The same mathematics, step by step, of quantized layers."""

  spec: quant_spec.QuantSpec
  transform: str = 'scan'

  @nn.compact
  def __call__(self, x):
    outputs = []
    dense = quant_layers.with_spec(quant_layers.QuantDense, self.spec)
    for i in range(LENGTH):
      y, _ = Body(dense, name=f'step{i}')(x)
      outputs.append(y)
      if self.transform == 'scan':
        x = y
    return x if self.transform == 'scan' else jnp.stack(outputs)


@functools.cache
def reference(transform):
  """Returns it, its fresh statistics, and a compiled step."""
  built = Unrolled(quant_spec.QuantSpec(), transform)
  return built, init(built, X)['quant_stats'], step(built)


def unrolled(tree, axis):
  return {
    f'step{i}': jax.tree.map(lambda a, i=i: jnp.take(a, i, axis), tree['body'])
    for i in range(LENGTH)
  }


def statistics(quant_stats, layer):
  """Returns what a scanned layer has, [steps, ...]."""
  carried = quant_stats['body'][layer]['carried']['quant_stats']
  return jax.tree.map(lambda a: jnp.reshape(a, (LENGTH, -1)), carried)


@pytest.mark.parametrize(
  'stack',
  [
    Stack(),
    Stack(axis=1),
    Stack(remat=True),
    Stack(transform='vmap'),
  ],
  ids=['scan', 'scan_along_axis_1', 'scan_of_remat', 'vmap'],
)
def test_a_stack_is_its_steps_one_by_one(stack):
  model = searchable_lib.searchable(stack)
  variables = init(model, X)
  same(variables['params'], init(stack, X)['params'])
  space = discovery.find(model, X)
  assert [d.name for d in space.decisions] == [
    f'body/{layer}/@{i}' for layer in ('up', 'down') for i in range(LENGTH)
  ]
  arch = chosen(space, NAMES)
  (y, changed), (gradients, _) = step(model)({**variables, 'arch': arch}, X)

  built, stats, run = reference(stack.transform)
  at = dict(
    params=unrolled(variables['params'], stack.axis),
    quant_stats=stats,
    arch={
      f'step{i}': {
        layer: arch['body'][layer][f'@{i}'] for layer in ('up', 'down')
      }
      for i in range(LENGTH)
    },
  )
  (expected, stats), (expected_gradients, _) = run(at, X)
  close(y, expected)
  close(unrolled(gradients, stack.axis), expected_gradients, 1e-4)
  for layer in ('up', 'down'):
    for name, values in statistics(changed['quant_stats'], layer).items():
      for i in range(LENGTH):
        close(
          values[i], jnp.ravel(stats['quant_stats'][f'step{i}'][layer][name])
        )
  # Each step of a stack works and is stored once.
  steps = discovery.find(built, X, spec=built.spec)
  for kind in ('bops', 'size', 'average_bits'):
    costs = [fliqs.uniform_cost(s.cost(kind), 'INT4') for s in (space, steps)]
    assert costs[0] == pytest.approx(costs[1], rel=1e-6)


def test_statistics_of_a_stack_are_read_back():
  model = searchable_lib.searchable(Stack())
  variables = init(model, X)
  learning = jax.jit(functools.partial(model.apply, mutable=['quant_stats']))
  frozen = jax.jit(model.apply)
  # The first batch counts in full, so a frozen second look at it is the same.
  again, changed = learning(variables, X)
  y = frozen({**variables, **changed}, X)
  close(y, again)
  off = operands_lib.set_activation_quantization(changed['quant_stats'], False)
  assert not statistics(off, 'up')['active'].any()
  assert not np.allclose(y, frozen({**variables, 'quant_stats': off}, X))


def test_a_stack_may_share_a_decision():
  model = searchable_lib.searchable(Stack(), stacks='shared')
  space = discovery.find(model, X)
  assert [d.name for d in space.decisions] == ['body/up', 'body/down']
  assert space.decisions[0].leaves == tuple(
    f'body/up/@{i}/format' for i in range(LENGTH)
  )
  separate = discovery.find(searchable_lib.searchable(Stack()), X)
  for kind in ('bops', 'size'):
    costs = [float(s.cost(kind)(s.uniform('INT8'))) for s in (space, separate)]
    assert costs[0] == costs[1]


def test_steps_are_grouped_by_patterns_and_rules_see_the_layer():
  spec = quant_spec.QuantSpec(
    menus=(('*/up', ('int5', 'int6')),),
    groups=(('first', 'body/up/@0'), ('rest', 'body/up/@[12]')),
    exclude=('body/down',),
  )
  space = discovery.find(searchable_lib.searchable(Stack(), spec), X)
  assert {d.name: len(d.labels) for d in space.decisions} == {
    'first': 2,
    'rest': 2,
  }
  # Excluded steps cost what they cost: three of 12 x 8 weights.
  down = [op for op in space.ops if op.layer == 'body/down']
  assert [op.shape.macs for op in down] == [2 * 12 * 8] * LENGTH
  assert space.assignment(space.uniform('INT6')) == {
    f'body/up/@{i}': ('INT6', 'INT6') for i in range(LENGTH)
  } | {f'body/down/@{i}': (None, None) for i in range(LENGTH)}


def test_a_stack_goes_by_an_assignment_where_one_program_can():
  space = discovery.find(searchable_lib.searchable(Stack()), X)
  uniform = space.assignment(space.uniform('INT8'))
  spec = quant_spec.QuantSpec(assignment=uniform)
  fixed = discovery.find(searchable_lib.searchable(Stack(), spec), X)
  assert fixed.is_fixed
  assert fixed.assignment(fixed.only()) == uniform
  mixed = uniform | {'body/up/@1': ('INT4', 'INT4')}
  assert space.assignment(space.choices(mixed)) == mixed
  spec = quant_spec.QuantSpec(assignment=mixed)
  with pytest.raises(ValueError, match='steps of body/up.* different formats'):
    discovery.find(searchable_lib.searchable(Stack(), spec), X)


class Nested(nn.Module):
  """A scan of a scan, and one that takes every collection along."""

  @nn.compact
  def __call__(self, x):
    kwargs = dict(
      variable_axes={'params': 0}, split_rngs={'params': True}, length=2
    )
    inner = nn.scan(Body, **kwargs)
    x, _ = nn.scan(inner, **kwargs)(name='nested')(x, None)
    return nn.remat_scan(OneWay, lengths=(2, 2))(name='rematted')(x)


class OneWay(nn.Module):
  @nn.compact
  def __call__(self, x):
    return Body(name='body')(x)[0]


def test_scans_of_scans_and_of_every_collection_are_found():
  model = searchable_lib.searchable(
    Nested(), quant_spec.QuantSpec(exclude=('rematted/*/down',))
  )
  space = discovery.find(model, X)
  paths = [op.path for op in space.ops]
  assert len(paths) == len(set(paths)) == 2 * 4 + 2 * 4
  assert 'nested/up/@3' in paths
  assert 'rematted/body/down/@3' in paths
  variables = init(model, X)
  expected = init(Nested(), X)['params']
  same(variables['params'], expected)
  run = jax.jit(functools.partial(model.apply, mutable=['quant_stats']))
  outputs = []
  for names in (NAMES, NAMES[::-1]):
    at = {**variables, 'arch': chosen(space, names)}
    y, changed = run(at, X)
    outputs.append(np.asarray(y))
    at |= changed
    assert run(at, X)[0].shape == y.shape
  assert not np.array_equal(*outputs)


class Recurrent(nn.Module):
  """The same weights in every step."""

  cell: type[nn.Module] = nn.GRUCell

  @nn.compact
  def __call__(self, x):
    return nn.RNN(self.cell(8), name='rnn')(x)


def test_a_recurrent_layer_costs_each_of_its_steps():
  # 5 steps of 2 sequences.
  x = random((2, 5, 8))
  spec = quant_spec.QuantSpec(mode='weights')
  model = searchable_lib.searchable(Recurrent(), spec)
  space = discovery.find(model, x)
  assert {op.shape.macs for op in space.ops} == {2 * 5 * 8 * 8}
  assert len(space.ops) == 6  # Three gates, from the input and the state.
  variables = init(model, x)
  apply = jax.jit(model.apply)
  y = apply({**variables, 'arch': space.expand(space.uniform('BF16'))}, x)
  expected = jax.jit(Recurrent().apply)({'params': variables['params']}, x)
  np.testing.assert_allclose(y, expected, atol=0.02)
  low = apply({**variables, 'arch': space.expand(space.uniform('INT4'))}, x)
  assert not np.allclose(y, low, atol=0.02)


def test_statistics_that_a_transform_cannot_keep_are_an_error():
  with pytest.raises(ValueError, match='same weights in all 5 steps.*exclude'):
    discovery.find(searchable_lib.searchable(Recurrent()), random((2, 5, 8)))


def test_a_stack_along_a_last_axis_is_an_error():
  model = searchable_lib.searchable(Stack(axis=-1))
  with pytest.raises(ValueError, match='axis that cannot be followed'):
    discovery.find(model, X)


def test_clips_of_a_stack_cannot_be_profiled():
  model = searchable_lib.searchable(
    Stack(), quant_spec.QuantSpec(act_clip='profiled')
  )
  with pytest.raises(ValueError, match='profiled.*body/'):
    discovery.find(model, X)


class Twice(nn.Module):
  """Equal stacks under `nn.jit`, which traces the first alone."""

  @nn.compact
  def __call__(self, x):
    stack = nn.jit(Stack)
    return stack(name='b')(stack(name='a')(x))


def test_stacks_that_jit_hides_from_the_count_are_an_error():
  with pytest.raises(ValueError, match=r'nn\.jit takes modules for equal'):
    discovery.find(searchable_lib.searchable(Twice()), X)


def test_arch_must_be_given():
  model = searchable_lib.searchable(Stack())
  variables = dict(init(model, X))
  with pytest.raises(
    ValueError, match=r'body/up: no arch/format.*space.expand'
  ):
    model.apply({k: v for k, v in variables.items() if k != 'arch'}, X)


def test_a_transformer_of_scanned_blocks_is_covered():
  class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
      x = x + nn.MultiHeadDotProductAttention(2, name='attention')(x)
      return Body(name='mlp')(x)

  class Transformer(nn.Module):
    @nn.compact
    def __call__(self, x):
      stack = nn.scan(
        nn.remat(Layer),
        variable_axes={'params': 0},
        split_rngs={'params': True},
        length=2,
      )
      return nn.Dense(3, name='head')(stack(name='layers')(x, None)[0])

  x = random((2, 4, 8))
  model = searchable_lib.searchable(Transformer(), attention=True)
  space = discovery.find(model, x)
  assert sorted({op.layer for op in space.ops}) == sorted(
    ['head', 'layers/mlp/up', 'layers/mlp/down']
    + [
      f'layers/attention/{name}'
      for name in ('query', 'key', 'value', 'out', 'qk', 'av')
    ]
  )
  variables = init(model, x)
  run = jax.jit(functools.partial(model.apply, mutable=['quant_stats']))
  outputs = [
    np.asarray(run({**variables, 'arch': chosen(space, names)}, x)[0])
    for names in (['BF16'], ['BF16', 'INT8'], ['INT4'])
  ]
  plain = jax.jit(Transformer().apply)({'params': variables['params']}, x)
  errors = [np.abs(y - plain).max() for y in outputs]
  assert 0 < errors[0] < errors[1] < errors[2]
  assert errors[0] < 0.05 * np.abs(plain).max()
