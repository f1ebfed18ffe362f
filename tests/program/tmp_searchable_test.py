"""Models that were not written for the search: same layers, same parameters."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fliqs_jax.program import searchable as searchable_lib
from fliqs_jax.layers import quant_layers
from fliqs_jax.numerics import clipping
from fliqs_jax.numerics import formats
from fliqs_jax.space import discovery
from fliqs_jax.space import quant_spec
from tests import helpers
from tests.intercept import foreign_models
from tests.layers import cases

# One for each op and each of the ways in which it may be written.
SOME = (
  'conv_strided_grouped',
  'conv_depthwise',
  'conv_1x1_unbatched',
  'dense',
  'dense_general_batch',
  'einsum_permuted',
)


@pytest.mark.parametrize('case', [cases.CASES[i] for i in SOME], ids=SOME)
def test_an_intercepted_layer_is_the_quantized_layer_bit_for_bit(case):
  x = helpers.random(case.input_shape)
  params = cases.random_params(case, seed=1)
  variables = cases.with_formats(params, 'INT4', 'INT8')
  model = searchable_lib.searchable(case.plain(), cases.SEPARATE)
  helpers.same(
    helpers.step(model)(variables, x),
    helpers.step(case.quantized())(variables, x),
  )


@cases.CASE
def test_an_excluded_layer_is_the_plain_layer_bit_for_bit(case):
  x = helpers.random(case.input_shape)
  params = cases.random_params(case, seed=1)
  model = searchable_lib.searchable(case.plain(), cases.EXCLUDED)
  helpers.same(
    *(jax.jit(m.apply)({'params': params}, x) for m in (model, case.plain()))
  )


@cases.CASE
def test_an_intercepted_layer_declares_what_the_quantized_layer_does(case):
  x = jax.ShapeDtypeStruct(case.input_shape, jnp.float32)
  for spec in (cases.SEPARATE, cases.EXCLUDED):
    actual, expected = (
      jax.eval_shape(model.init, jax.random.key(0), x)
      for model in (
        searchable_lib.searchable(case.plain(), spec),
        case.quantized(spec),
      )
    )
    assert actual == expected


@pytest.mark.slow
@pytest.mark.parametrize('case_id', ['dense', 'conv', 'einsum_heads'])
def test_a_bfloat16_layer_is_the_quantized_layer_bit_for_bit(case_id):
  case = cases.CASES[case_id]
  x = helpers.random(case.input_shape)
  params = cases.random_params(case, seed=1)
  variables = cases.with_formats(params, 'INT4', 'E4M3')
  model = searchable_lib.searchable(
    case.plain(dtype=jnp.bfloat16), cases.SEPARATE
  )
  actual = helpers.step(model)(variables, x)
  assert actual[0][0].dtype == jnp.bfloat16
  helpers.same(
    actual, helpers.step(case.quantized(dtype=jnp.bfloat16))(variables, x)
  )


@pytest.mark.slow
@pytest.mark.parametrize(
  'layer',
  [
    nn.ConvTranspose(5, (3, 2), (2, 1)),
    nn.ConvTranspose(5, (3, 3), transpose_kernel=True, padding='CIRCULAR'),
    nn.ConvLocal(5, (3, 2), (2, 1)),
    nn.ConvLocal(5, (3, 2), use_bias=False),
  ],
  ids=['transpose', 'transposed_kernel', 'local', 'local_without_bias'],
)
@pytest.mark.parametrize('dtype', [None, jnp.bfloat16])
def test_layers_without_a_hook_multiply_what_is_on_the_grid(layer, dtype):
  # The linen layer of operands that were quantized and scaled back; E5M2 so
  # wide that nothing is clipped, so that the gradients agree as well.
  x = helpers.random((2, 6, 5, 4), seed=2)
  layer = layer.clone(dtype=dtype)
  model = searchable_lib.searchable(layer, cases.SEPARATE)
  params = helpers.init(layer, x)['params']
  params = {k: helpers.random(v.shape, 3) for k, v in params.items()}
  variables = cases.with_formats(params, 'INT4', 'E5M2')
  variables['quant_stats'] |= dict(clip=np.full(10, 100, np.float32))
  assert_(variables, model, layer, x, dtype)


def assert_(variables, model, layer, x, dtype):
  if isinstance(layer, nn.ConvLocal):
    summed = (2,)
  else:
    summed = (0, 1, 3 if layer.transpose_kernel else 2)
  kernel = variables['params']['kernel']
  peak = np.abs(kernel).max(axis=summed, keepdims=True)
  w_q, w_scale = cases.on_grid(kernel, 'INT4', peak)
  std = variables['quant_stats']['mean_square'] ** 0.5
  x_q, x_scale = cases.on_grid(x, 'E5M2', np.float32(100 * std))
  dequantized = variables['params'] | {'kernel': w_q * w_scale}
  plain = layer.clone(dtype=None)

  def run(apply, params, x):
    def loss(params, x):
      y = apply(params, x)
      return jnp.sum(jnp.sin(y.astype(jnp.float32))), y

    return jax.grad(loss, (0, 1), has_aux=True)(params, x)

  @jax.jit
  def actual(params, x):
    return run(
      lambda p, x: model.apply({**variables, 'params': p}, x), params, x
    )

  expected = jax.jit(
    functools.partial(run, lambda p, x: plain.apply({'params': p}, x))
  )(dequantized, x_q * x_scale)
  got = actual(variables['params'], x)
  assert got[1].dtype == (dtype or jnp.float32)
  helpers.close(
    jax.tree.map(lambda a: a.astype(jnp.float32), got),
    expected,
    1e-4 if dtype is None else 0.1,
  )


@pytest.mark.slow
@pytest.mark.parametrize('rows', [1, 7])
def test_an_embedding_is_looked_up_in_its_grid(rows):
  layer = nn.Embed(rows, 3)
  tokens = jnp.array([[0, 6, 2], [5, 5, 0]]) % rows
  query = helpers.random((2, 3))
  table = helpers.random((rows, 3), seed=4)
  model = searchable_lib.searchable(layer, cases.SEPARATE, embed=True)
  variables = dict(
    params={'embedding': table}, arch={'weights': cases.one_hot('INT4')}
  )
  values, scale = cases.on_grid(
    table, 'INT4', np.abs(table).max(axis=1, keepdims=True)
  )
  y = model.apply(variables, tokens)
  np.testing.assert_array_equal(y, (values * scale)[np.asarray(tokens)])
  y = model.apply(variables, query, method='attend')
  helpers.close(y, query @ (values * scale).T)
  gradient = jax.grad(
    lambda p: model.apply({**variables, 'params': p}, tokens).sum()
  )(variables['params'])['embedding']
  counts = np.bincount(np.ravel(tokens), minlength=rows)
  helpers.close(gradient, np.tile(counts[:, None].astype(np.float32), 3))


def test_an_embedding_is_quantized_by_choice():
  tokens = jnp.zeros((1, 5), jnp.int32)
  for embed, found in ((False, False), (True, True)):
    model = searchable_lib.searchable(nn.Embed(7, 3), embed=embed)
    variables = jax.eval_shape(model.init, jax.random.key(0), tokens)
    assert ('arch' in variables) == found
  (op,) = discovery.find(model, tokens).ops
  # Nothing is multiplied; 7 rows of 3 have a scale each.
  assert (op.shape.macs, op.shape.weights, op.shape.channels) == (0, 21, 7)
  excluded = searchable_lib.searchable(
    nn.Embed(7, 3), cases.EXCLUDED, embed=True
  )
  table = dict(params={'embedding': helpers.random((7, 3))})
  helpers.same(*(m.apply(table, tokens) for m in (excluded, nn.Embed(7, 3))))


@functools.cache
def zoo():
  """Returns the zoo, searchable, and initial variables."""
  model = searchable_lib.searchable(
    foreign_models.Zoo(), embed=True, attention=True
  )
  return model, helpers.init(model, foreign_models.TOKENS, train=False)


def test_parameters_are_those_of_the_model_as_its_author_wrote_it():
  _, variables = zoo()
  expected = helpers.init(
    foreign_models.Zoo(), foreign_models.TOKENS, train=False
  )
  helpers.same(variables['params'], expected['params'])
  helpers.same(variables['batch_stats'], expected['batch_stats'])
  assert sorted(variables) == [
    'arch',
    'batch_stats',
    'cost',
    'params',
    'quant_stats',
  ]


def test_all_layers_of_the_zoo_are_found():
  model, variables = zoo()
  space = discovery.find(model, foreign_models.TOKENS, train=False)
  assert sorted({op.path for op in space.ops}) == sorted(
    ['embed', 'conv', 'local', 'transpose', 'einsum', 'general']
    + ['mlp/layers_0', 'mlp/layers_2']
    + [
      f'attention/{name}'
      for name in ('query', 'key', 'value', 'out', 'qk', 'av')
    ]
  )
  arch = space.expand(space.uniform('INT8'))
  assert jax.tree.map(np.shape, arch) == jax.tree.map(
    np.shape, variables['arch']
  )


@pytest.mark.slow
def test_other_collections_change_as_they_do_without_us():
  model, variables = zoo()
  mutable = ['batch_stats', 'quant_stats', 'intermediates']
  y, changed = jax.jit(
    lambda v: model.apply(v, foreign_models.TOKENS, train=True, mutable=mutable)
  )(variables)
  assert y.shape == (2, 4, 11)
  assert sorted(changed) == sorted(mutable)
  stats = changed['quant_stats']
  assert stats['conv']['count'] == stats['attention']['out']['count'] == 1


def test_a_model_without_mutable_collections_returns_its_output_alone():
  model, variables = zoo()
  y = jax.eval_shape(
    lambda v: model.apply(v, foreign_models.TOKENS, train=False), variables
  )
  assert y.shape == (2, 4, 11)


def test_with_everything_excluded_the_zoo_is_as_it_was():
  _, variables = zoo()
  spec = quant_spec.QuantSpec(exclude=('*',))
  model = searchable_lib.searchable(
    foreign_models.Zoo(), spec, embed=True, attention=True
  )
  plain = {k: variables[k] for k in ('params', 'batch_stats')}
  actual, expected = (
    jax.jit(lambda v, m=m: m.apply(v, foreign_models.TOKENS, train=False))(
      plain
    )
    for m in (model, foreign_models.Zoo())
  )
  helpers.same(actual, expected)


@pytest.mark.slow
def test_the_products_of_attention_multiply_what_is_on_the_grid():
  layer = nn.MultiHeadDotProductAttention(2)
  x = helpers.random((1, 4, 6))
  spec = quant_spec.QuantSpec(
    ('int8', 'e5m2'), exclude=('query', 'key', 'value', 'out')
  )
  model = searchable_lib.searchable(layer, spec, attention=True)
  variables = helpers.init(model, x)
  assert sorted(variables['arch']) == ['av', 'qk']
  (op,) = variables['cost']['av']['ops']
  # Two heads: 4 weights of 4 values of 3 channels for each of 4 queries.
  assert op.macs == 2 * 4 * 4 * 3
  _, seen = layer.apply(
    {'params': variables['params']}, x, capture_intermediates=True
  )
  query, key, value = (
    np.asarray(seen['intermediates'][name]['__call__'][0])
    for name in ('query', 'key', 'value')
  )

  def quantized(x, threshold=None):
    threshold = threshold or clip * np.sqrt(np.mean(x**2) - np.mean(x) ** 2)
    values, scale = cases.on_grid(x, name, np.float32(threshold))
    return values * scale

  space = discovery.find(model, x)
  apply = jax.jit(lambda v, x: model.apply(v, x, mutable=['quant_stats']))
  for name in ('INT8', 'E5M2'):
    clip = clipping.multiples('laplacian', formats.menu(name))[0]
    # Three channels a head; the softmax's bound is 1.
    scores = np.einsum(
      'bqhd,bkhd->bhqk', quantized(query / np.sqrt(3)), quantized(key)
    )
    weights = quantized(np.asarray(jax.nn.softmax(scores)), 1.0)
    heads = np.einsum('bhqk,bkhd->bqhd', weights, quantized(value))
    out = variables['params']['out']
    expected = np.einsum('bqhd,hdf->bqf', heads, out['kernel'])
    arch = space.expand(space.uniform(name))
    y, changed = apply({**variables, 'arch': arch}, x)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
  # Query and key have statistics; attention weights are bounded by 1.
  assert sorted(changed['quant_stats']['qk']) == ['activations', 'weights']
  assert sorted(changed['quant_stats']['av']['activations']) == ['active']


@pytest.mark.slow
def test_an_attention_may_be_shared():
  class Shared(nn.Module):
    @nn.compact
    def __call__(self, x):
      attention = nn.MultiHeadDotProductAttention(
        2, kernel_init=helpers.by_key, name='attention'
      )
      return attention(attention(x))

  x = helpers.random((1, 4, 6))
  model = searchable_lib.searchable(Shared(), attention=True)
  variables = helpers.init(model, x)
  helpers.same(variables['params'], helpers.init(Shared(), x)['params'])
  space = discovery.find(model, x)
  assert len(space.decisions) == 6
  assert len(space.ops) == 12
  _, changed = jax.jit(lambda v: model.apply(v, x, mutable=['quant_stats']))(
    variables
  )
  stats = changed['quant_stats']['attention']
  assert stats['query']['count'] == stats['qk']['weights']['count'] == 2


@pytest.mark.parametrize(
  ('mode', 'leaves'),
  [
    ('tied', ['format']),
    ('separate', ['activations', 'weights']),
    ('activations', ['format']),
    ('weights', []),
  ],
)
def test_the_mode_decides_what_of_a_product_is_quantized(mode, leaves):
  layer = nn.MultiHeadDotProductAttention(2)
  spec = quant_spec.QuantSpec(mode=mode)
  model = searchable_lib.searchable(layer, spec, attention=True)
  x = jax.ShapeDtypeStruct((1, 4, 6), jnp.float32)
  arch = jax.eval_shape(model.init, jax.random.key(0), x)['arch']
  assert sorted(arch.get('qk', {})) == leaves


class Loud(nn.Dense):
  """A subclass that does more than its class."""

  gain: float = 3.0

  @nn.compact
  def __call__(self, inputs):
    return self.gain * super().__call__(inputs) + 1.0


class QuantLoud(quant_layers.QuantDense):
  gain: float = 3.0

  @nn.compact
  def __call__(self, inputs):
    return self.gain * super().__call__(inputs) + 1.0


def test_a_subclass_keeps_what_it_adds():
  x = helpers.random((2, 8))
  params = dict(kernel=helpers.random((8, 5)), bias=helpers.random((5,)))
  variables = cases.with_formats(params, 'INT4', 'INT5')
  helpers.same(
    helpers.step(searchable_lib.searchable(Loud(5), cases.SEPARATE))(
      variables, x
    ),
    helpers.step(QuantLoud(5, spec=cases.SEPARATE))(variables, x),
  )


QUANT_DENSE = quant_layers.with_spec(quant_layers.QuantDense, cases.SEPARATE)


@pytest.mark.slow
@pytest.mark.parametrize('transform', ['jit', 'remat'])
def test_transforms_and_shared_layers_are_those_of_quantized_layers(transform):
  x = helpers.random((4, 8))
  model = searchable_lib.searchable(
    foreign_models.Twins(transform), cases.SEPARATE
  )
  built = foreign_models.Twins(transform, QUANT_DENSE)
  space = discovery.find(model, x)
  assert space == discovery.find(built, x, spec=cases.SEPARATE)
  variables = helpers.init(built, x)
  helpers.same(helpers.init(model, x), variables)
  outputs = []
  for names in (['INT4', 'INT8'], ['INT8', 'INT4', 'E4M3']):
    at = {**variables, 'arch': helpers.chosen(space, names)}
    actual = helpers.step(model)(at, x)
    helpers.same(actual, helpers.step(built)(at, x))
    outputs.append(np.asarray(actual[0][0]).tobytes())
  assert len(set(outputs)) == 2


def test_a_program_that_jit_keeps_is_not_used_under_other_rules():
  x = helpers.random((4, 8))
  plain = foreign_models.Early().init(jax.random.key(0), x)
  outputs = [foreign_models.Early().apply(plain, x)]
  for formats_of_one in ('int4', 'int8', 'int4'):
    model = searchable_lib.searchable(
      foreign_models.Early(), quant_spec.QuantSpec(formats_of_one)
    )
    variables = model.init(jax.random.key(0), x)
    helpers.same(variables['params'], plain['params'])
    y, _ = model.apply(variables, x, mutable=['quant_stats'])
    outputs.append(y)
  outputs.append(foreign_models.Early().apply(plain, x))
  helpers.same(outputs[0], outputs[4])
  helpers.same(outputs[1], outputs[3])
  assert not np.array_equal(outputs[0], outputs[1])
  assert not np.array_equal(outputs[1], outputs[2])


def test_decisions_are_named_apart_by_path_patterns():
  spec = quant_spec.QuantSpec(
    mode='separate',
    exclude=('a/*',),
    menus=(('b/*', ('int5', 'int6')),),
    groups=(('ends', 'shared'),),
  )
  space = discovery.find(
    searchable_lib.searchable(foreign_models.Twins(), spec),
    helpers.random((4, 8)),
  )
  assert [d.name for d in space.decisions] == [
    'ends/weights',
    'ends/activations',
    'b/dense/weights',
    'b/dense/activations',
  ]
  assert [f.name for f in space.decisions[2].menu] == ['INT5', 'INT6']


def test_the_rules_of_the_model_are_checked_without_being_given_again():
  model = searchable_lib.searchable(
    foreign_models.Twins(), quant_spec.QuantSpec(exclude=('c/*',))
  )
  with pytest.raises(ValueError, match="'c/\\*' matches no layer; layers: sha"):
    discovery.find(model, helpers.random((4, 8)))


@pytest.mark.slow
def test_formats_change_nothing_in_the_program():
  model, variables = zoo()
  space = discovery.find(model, foreign_models.TOKENS, train=False)
  traces = []

  @jax.jit
  def apply(arch):
    traces.append(1)
    return model.apply(
      {**variables, 'arch': arch}, foreign_models.TOKENS, train=False
    )

  for name in formats.menu('int_s'):
    apply(space.expand(space.uniform(str(name))))
  assert len(traces) == 1
