"""Stacks of layers: a decision and statistics for each iteration."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fliqs_jax as fliqs
from fliqs_jax.layers import operands as operands_lib
from fliqs_jax.layers import quant_layers
from fliqs_jax.program import searchable as searchable_lib
from fliqs_jax.space import discovery
from fliqs_jax.space import quant_spec
from tests import helpers
from tests.program import foreign_models

X = helpers.random((2, 8))
NAMES = ['INT4', 'BF16', 'INT8']


class Unrolled(nn.Module):
  """The same mathematics, one by one, of quantized layers."""

  spec: quant_spec.QuantSpec
  transform: str = 'scan'

  @nn.compact
  def __call__(self, x):
    outputs = []
    dense = quant_layers.with_spec(quant_layers.QuantDense, self.spec)
    for i in range(foreign_models.LENGTH):
      y, _ = foreign_models.Body(dense, name=f'step{i}')(x)
      outputs.append(y)
      if self.transform == 'scan':
        x = y
    return x if self.transform == 'scan' else jnp.stack(outputs)


@functools.cache
def reference(transform):
  """Returns a model, its first statistics, and a compiled step."""
  built = Unrolled(quant_spec.QuantSpec(), transform)
  return built, helpers.init(built, X)['quant_stats'], helpers.step(built)


def unrolled(tree, axis):
  return {
    f'step{i}': jax.tree.map(lambda a, i=i: jnp.take(a, i, axis), tree['body'])
    for i in range(foreign_models.LENGTH)
  }


@pytest.mark.slow
@pytest.mark.parametrize(
  'stack',
  [
    foreign_models.Stack(),
    foreign_models.Stack(axis=-1),
    foreign_models.Stack(remat=True),
    foreign_models.Stack(transform='vmap'),
  ],
  ids=['scan', 'scan_along_last_axis', 'scan_of_remat', 'vmap'],
)
def test_a_stack_is_its_iterations_one_by_one(stack):
  model = searchable_lib.searchable(stack)
  variables = helpers.init(model, X)
  helpers.same(variables['params'], helpers.init(stack, X)['params'])
  space = discovery.find(model, X)
  assert [d.name for d in space.decisions] == [
    f'body/{layer}/@{i}'
    for layer in ('up', 'down')
    for i in range(foreign_models.LENGTH)
  ]
  arch = helpers.chosen(space, NAMES)
  (y, changed), (gradients, _) = helpers.step(model)(
    {**variables, 'arch': arch}, X
  )

  built, stats, run = reference(stack.transform)
  at = dict(
    params=unrolled(variables['params'], stack.axis),
    quant_stats=stats,
    arch={
      f'step{i}': {
        layer: arch['body'][layer][f'@{i}'] for layer in ('up', 'down')
      }
      for i in range(foreign_models.LENGTH)
    },
  )
  (expected, stats), (expected_gradients, _) = run(at, X)
  helpers.close(y, expected)
  helpers.close(unrolled(gradients, stack.axis), expected_gradients, 1e-4)
  for layer in ('up', 'down'):
    for name, values in changed['quant_stats']['body'][layer].items():
      for i in range(foreign_models.LENGTH):
        helpers.close(values[i], stats['quant_stats'][f'step{i}'][layer][name])
  # Each iteration of a stack works and is stored once.
  steps = discovery.find(built, X, spec=built.spec)
  for kind in ('bops', 'size', 'average_bits'):
    costs = [fliqs.uniform_cost(s.cost(kind), 'INT4') for s in (space, steps)]
    assert costs[0] == pytest.approx(costs[1], rel=1e-6)


_SCALES = np.array([1.0, 2.0, -3.0], np.float32)


@pytest.mark.parametrize(
  ('shape', 'each', 'weights_of'),
  [
    ((3, 8, 8), np.arange(3), lambda w, i: w[i]),
    ((8, 8), _SCALES, lambda w, scale: w * scale),
  ],
  ids=['index', 'scale'],
)
def test_constants_of_iterations_make_weights_of_their_own(
  shape, each, weights_of, tmp_path
):
  # The loop is over numbers, by which it takes or scales weights: each of the
  # three iterations multiplies other ones.
  w, x = helpers.random(shape), helpers.random((4, 8), seed=1)

  def looped(params, x):
    def body(x, one):
      return jnp.tanh(x @ weights_of(params['w'], one)), None

    return jax.lax.scan(body, x, jnp.asarray(each))[0]

  def unrolled(params, x):
    for weights in params['w']:
      x = jnp.tanh(x @ weights)
    return x

  def searched(f, params):
    model = searchable_lib.searchable(
      f, quant_spec.QuantSpec('int_s'), params=params
    )
    space, variables = discovery.find(model, x), model.init(None, x)
    choices = {d.name: d.one_hot(n) for d, n in zip(space.decisions, NAMES)}
    arch = space.expand(choices)
    y, changed = model.apply(
      {**variables, 'arch': arch}, x, mutable=['quant_stats']
    )
    return model, space, choices, variables | changed, y

  model, space, choices, variables, y = searched(looped, dict(w=w))
  assert [d.name for d in space.decisions] == ['w/@0', 'w/@1', 'w/@2']
  assert [op.shape.weights for op in space.ops] == [64, 64, 64]
  *_, expected = searched(unrolled, dict(w=[weights_of(w, i) for i in each]))
  helpers.close(y, expected)
  # The export compares what is served with what was searched.
  fliqs.export_model(model, variables, choices, x, out=tmp_path / 'served')


def test_statistics_of_a_stack_are_read_back():
  model = searchable_lib.searchable(foreign_models.Stack())
  variables = helpers.init(model, X)
  learning = jax.jit(functools.partial(model.apply, mutable=['quant_stats']))
  frozen = jax.jit(model.apply)
  # The first batch counts in full, so a frozen second look at it is the same.
  again, changed = learning(variables, X)
  y = frozen({**variables, **changed}, X)
  helpers.close(y, again)
  off = operands_lib.set_activation_quantization(changed['quant_stats'], False)
  assert not off['body']['up']['active'].any()
  assert not np.allclose(y, frozen({**variables, 'quant_stats': off}, X))


def test_a_stack_may_share_a_decision():
  model = searchable_lib.searchable(foreign_models.Stack(), stacks='shared')
  space = discovery.find(model, X)
  assert [d.name for d in space.decisions] == ['body/up', 'body/down']
  assert space.decisions[0].leaves == tuple(
    f'body/up/@{i}/format' for i in range(foreign_models.LENGTH)
  )
  separate = discovery.find(
    searchable_lib.searchable(foreign_models.Stack()), X
  )
  for kind in ('bops', 'size'):
    costs = [float(s.cost(kind)(s.uniform('INT8'))) for s in (space, separate)]
    assert costs[0] == costs[1]


def test_iterations_are_grouped_by_patterns_and_rules_see_the_layer():
  spec = quant_spec.QuantSpec(
    menus=(('*/up', ('int5', 'int6')),),
    groups=(('first', 'body/up/@0'), ('rest', 'body/up/@[12]')),
    exclude=('body/down',),
  )
  space = discovery.find(
    searchable_lib.searchable(foreign_models.Stack(), spec), X
  )
  assert {d.name: len(d.labels) for d in space.decisions} == {
    'first': 2,
    'rest': 2,
  }
  # Excluded iterations cost what they cost: three of 12 x 8 weights.
  down = [op for op in space.ops if op.layer == 'body/down']
  assert [op.shape.macs for op in down] == [2 * 12 * 8] * foreign_models.LENGTH
  assert space.assignment(space.uniform('INT6')) == {
    f'body/up/@{i}': ('INT6', 'INT6') for i in range(foreign_models.LENGTH)
  } | {f'body/down/@{i}': (None, None) for i in range(foreign_models.LENGTH)}


def test_a_stack_goes_by_an_assignment_where_one_program_can():
  space = discovery.find(searchable_lib.searchable(foreign_models.Stack()), X)
  uniform = space.assignment(space.uniform('INT8'))
  spec = quant_spec.QuantSpec(assignment=uniform)
  fixed = discovery.find(
    searchable_lib.searchable(foreign_models.Stack(), spec), X
  )
  assert fixed.is_fixed
  assert fixed.assignment(fixed.only()) == uniform
  mixed = uniform | {'body/up/@1': ('INT4', 'INT4')}
  assert space.assignment(space.choices(mixed)) == mixed
  spec = quant_spec.QuantSpec(assignment=mixed)
  with pytest.raises(ValueError, match='iterations of body/up.* different'):
    discovery.find(searchable_lib.searchable(foreign_models.Stack(), spec), X)


@pytest.mark.slow
def test_scans_of_scans_and_of_every_collection_are_found():
  model = searchable_lib.searchable(
    foreign_models.Nested(), quant_spec.QuantSpec(exclude=('rematted/*/down',))
  )
  space = discovery.find(model, X)
  paths = [op.path for op in space.ops]
  assert len(paths) == len(set(paths)) == 2 * 4 + 2 * 4
  assert 'nested/up/@3' in paths
  assert 'rematted/body/down/@3' in paths
  variables = helpers.init(model, X)
  expected = helpers.init(foreign_models.Nested(), X)['params']
  helpers.same(variables['params'], expected)
  run = jax.jit(functools.partial(model.apply, mutable=['quant_stats']))
  outputs = []
  for names in (NAMES, NAMES[::-1]):
    at = {**variables, 'arch': helpers.chosen(space, names)}
    y, changed = run(at, X)
    outputs.append(np.asarray(y))
    at |= changed
    assert run(at, X)[0].shape == y.shape
  assert not np.array_equal(*outputs)


@pytest.mark.slow
def test_a_recurrent_layer_costs_and_learns_from_each_iteration():
  # 5 iterations of 2 sequences.
  x = helpers.random((2, 5, 8))
  model = searchable_lib.searchable(foreign_models.Recurrent())
  space = discovery.find(model, x)
  assert {op.shape.macs for op in space.ops} == {2 * 5 * 8 * 8}
  # Three gates, from the input and the state.
  assert sorted(op.path for op in space.ops) == [
    f'GRUCell_0/{name}' for name in ('hn', 'hr', 'hz', 'in', 'ir', 'iz')
  ]
  variables = helpers.init(model, x)
  learning = jax.jit(functools.partial(model.apply, mutable=['quant_stats']))
  outputs = []
  for name in ('BF16', 'INT4'):
    at = {**variables, 'arch': space.expand(space.uniform(name))}
    y, changed = learning(at, x)
    outputs.append(y)
    stats = changed['quant_stats']['GRUCell_0']
    assert {int(own['count']) for own in stats.values()} == {5}
    # The input of a gate is one of five examples in each iteration.
    helpers.close(stats['ir']['mean'], x.mean())
  expected = jax.jit(foreign_models.Recurrent().apply)(
    {'params': variables['params']}, x
  )
  np.testing.assert_allclose(outputs[0], expected, atol=0.02)
  assert not np.allclose(*outputs, atol=0.02)


class Twice(nn.Module):
  """Equal stacks under `nn.jit`, which traces the first alone."""

  @nn.compact
  def __call__(self, x):
    stack = nn.jit(foreign_models.Stack)
    return stack(name='b')(stack(name='a')(x))


def test_stacks_that_jit_takes_for_one_are_two():
  space = discovery.find(searchable_lib.searchable(Twice()), X)
  assert list(dict.fromkeys(op.layer for op in space.ops)) == [
    f'{stack}/body/{layer}' for stack in 'ab' for layer in ('up', 'down')
  ]


class Twelve(nn.Module):
  """A stack of twelve; as strings, @10 and @11 come before @2."""

  @nn.compact
  def __call__(self, x):
    class Layer(nn.Module):
      @nn.compact
      def __call__(self, x, _):
        return nn.Dense(8, use_bias=False, name='dense')(x), None

    stack = nn.scan(
      Layer, variable_axes={'params': 0}, split_rngs={'params': True}, length=12
    )
    return stack(name='stack')(x, None)[0]


def test_twelve_iterations_keep_their_order():
  spec = quant_spec.QuantSpec(('int2', 'int8'), mode='weights')
  model = searchable_lib.searchable(Twelve(), spec)
  variables = helpers.init(model, X)
  space = discovery.find(model, X)
  assert [d.name for d in space.decisions] == [
    f'stack/dense/@{i}' for i in range(12)
  ]
  # Only iterations 2 and 10 have INT2, whose largest value is 1.
  chosen = {
    d.name: d.one_hot('INT2' if d.name.endswith(('@2', '@10')) else 'INT8')
    for d in space.decisions
  }
  # A tree map sorts the keys of a dict as strings.
  arch = jax.tree.map(lambda leaf: leaf, space.expand(chosen))
  _, noted = jax.jit(lambda v: model.apply(v, X, mutable=['operands']))(
    {**variables, 'arch': arch}
  )
  values = noted['operands']['stack']['dense']['values']
  assert np.abs(values).max(axis=(1, 2)).tolist() == [
    1.0 if i in (2, 10) else 127.0 for i in range(12)
  ]


def test_arch_must_be_given():
  model = searchable_lib.searchable(foreign_models.Stack())
  variables = dict(helpers.init(model, X))
  with pytest.raises(
    ValueError, match=r'lack arch/body/up/@0/format.*space.expand'
  ):
    model.apply({k: v for k, v in variables.items() if k != 'arch'}, X)


@pytest.mark.slow
def test_a_transformer_of_scanned_blocks_is_covered():
  class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
      x = x + nn.MultiHeadDotProductAttention(2, name='attention')(x)
      return foreign_models.Body(name='mlp')(x)

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

  x = helpers.random((2, 4, 8))
  model = searchable_lib.searchable(Transformer(), attention=True)
  space = discovery.find(model, x)
  assert sorted({op.layer for op in space.ops}) == sorted(
    ['head', 'layers/mlp/up', 'layers/mlp/down']
    + [
      f'layers/attention/{name}'
      for name in ('query', 'key', 'value', 'out', 'qk', 'av')
    ]
  )
  variables = helpers.init(model, x)
  run = jax.jit(functools.partial(model.apply, mutable=['quant_stats']))
  outputs = [
    np.asarray(run({**variables, 'arch': helpers.chosen(space, names)}, x)[0])
    for names in (['BF16'], ['BF16', 'INT8'], ['INT4'])
  ]
  plain = jax.jit(Transformer().apply)({'params': variables['params']}, x)
  errors = [np.abs(y - plain).max() for y in outputs]
  assert 0 < errors[0] < errors[1] < errors[2]
  assert errors[0] < 0.05 * np.abs(plain).max()
