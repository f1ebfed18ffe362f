"""Models that were not written for the search: same layers, same parameters."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fliqs_jax.intercept import searchable as searchable_lib
from fliqs_jax.layers import quant_layers
from fliqs_jax.numerics import clipping
from fliqs_jax.numerics import formats
from fliqs_jax.space import discovery
from fliqs_jax.space import quant_spec
from tests.layers import quant_layers_test as layers_test

CASE = layers_test.CASE
CASES = layers_test.CASES
SEPARATE = layers_test.SEPARATE
EXCLUDED = layers_test.EXCLUDED
random = layers_test.random


def same(actual, expected):
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  jax.tree.map(np.testing.assert_array_equal, actual, expected)


def close(actual, expected, tolerance=1e-5):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(
      a, b, rtol=tolerance, atol=tolerance
    ),
    actual,
    expected,
  )


def init(model, *args, **kwargs):
  """Returns initial variables; compiles only what leads to them."""
  return jax.jit(lambda key: model.init(key, *args, **kwargs))(
    jax.random.key(0)
  )


def step(model):
  """Returns a compiled (variables, x) -> (y, changed), (dparams, dx)."""

  @jax.jit
  def compiled(variables, x):
    def apply(params, x):
      y, changed = model.apply(
        {**variables, 'params': params}, x, mutable=['quant_stats']
      )
      return jnp.sum(jnp.sin(y.astype(jnp.float32))), (y, changed)

    gradients, out = jax.grad(apply, (0, 1), has_aux=True)(
      variables['params'], x
    )
    return out, gradients

  return compiled


def chosen(space, names):
  """Returns the `arch` in which decision i has the i-th name, in turn."""
  return space.expand(
    {
      d.name: d.one_hot(names[i % len(names)])
      for i, d in enumerate(space.decisions)
    }
  )


# One for each op and each of the ways in which it may be written.
SOME = (
  'conv_strided_grouped',
  'conv_depthwise',
  'conv_1x1_unbatched',
  'dense',
  'dense_general_batch',
  'einsum_permuted',
)


@pytest.mark.parametrize('case', [CASES[i] for i in SOME], ids=SOME)
def test_an_intercepted_layer_is_the_quantized_layer_bit_for_bit(case):
  x = random(case.input_shape)
  params = layers_test.random_params(case, seed=1)
  variables = layers_test.with_formats(params, 'INT4', 'INT8')
  model = searchable_lib.searchable(case.plain(), SEPARATE)
  same(step(model)(variables, x), step(case.quantized())(variables, x))


@CASE
def test_an_excluded_layer_is_the_plain_layer_bit_for_bit(case):
  x = random(case.input_shape)
  params = layers_test.random_params(case, seed=1)
  model = searchable_lib.searchable(case.plain(), EXCLUDED)
  same(
    *(jax.jit(m.apply)({'params': params}, x) for m in (model, case.plain()))
  )


@CASE
def test_an_intercepted_layer_declares_what_the_quantized_layer_does(case):
  x = jax.ShapeDtypeStruct(case.input_shape, jnp.float32)
  for spec in (SEPARATE, EXCLUDED):
    actual, expected = (
      jax.eval_shape(model.init, jax.random.key(0), x)
      for model in (
        searchable_lib.searchable(case.plain(), spec),
        case.quantized(spec),
      )
    )
    assert actual == expected


@pytest.mark.parametrize('case_id', ['dense', 'conv', 'einsum_heads'])
def test_a_bfloat16_layer_is_the_quantized_layer_bit_for_bit(case_id):
  case = CASES[case_id]
  x = random(case.input_shape)
  params = layers_test.random_params(case, seed=1)
  variables = layers_test.with_formats(params, 'INT4', 'E4M3')
  model = searchable_lib.searchable(case.plain(dtype=jnp.bfloat16), SEPARATE)
  actual = step(model)(variables, x)
  assert actual[0][0].dtype == jnp.bfloat16
  same(actual, step(case.quantized(dtype=jnp.bfloat16))(variables, x))


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
  x = random((2, 6, 5, 4), seed=2)
  layer = layer.clone(dtype=dtype)
  model = searchable_lib.searchable(layer, SEPARATE)
  params = init(layer, x)['params']
  params = {k: random(v.shape, 3) for k, v in params.items()}
  variables = layers_test.with_formats(params, 'INT4', 'E5M2')
  variables['quant_stats'] |= dict(clip=np.full(10, 100, np.float32))
  assert_(variables, model, layer, x, dtype)


def assert_(variables, model, layer, x, dtype):
  if isinstance(layer, nn.ConvLocal):
    summed = (2,)
  else:
    summed = (0, 1, 3 if layer.transpose_kernel else 2)
  kernel = variables['params']['kernel']
  peak = np.abs(kernel).max(axis=summed, keepdims=True)
  w_q, w_scale = layers_test.on_grid(kernel, 'INT4', peak)
  std = variables['quant_stats']['mean_square'] ** 0.5
  x_q, x_scale = layers_test.on_grid(x, 'E5M2', np.float32(100 * std))
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
  close(
    jax.tree.map(lambda a: a.astype(jnp.float32), got),
    expected,
    1e-4 if dtype is None else 0.1,
  )


@pytest.mark.parametrize('rows', [1, 7])
def test_an_embedding_is_looked_up_in_its_grid(rows):
  layer = nn.Embed(rows, 3)
  tokens = jnp.array([[0, 6, 2], [5, 5, 0]]) % rows
  query = random((2, 3))
  table = random((rows, 3), seed=4)
  model = searchable_lib.searchable(layer, SEPARATE, embed=True)
  variables = dict(
    params={'embedding': table}, arch={'weights': layers_test.one_hot('INT4')}
  )
  values, scale = layers_test.on_grid(
    table, 'INT4', np.abs(table).max(axis=1, keepdims=True)
  )
  y = model.apply(variables, tokens)
  np.testing.assert_array_equal(y, (values * scale)[np.asarray(tokens)])
  y = model.apply(variables, query, method='attend')
  close(y, query @ (values * scale).T)
  gradient = jax.grad(
    lambda p: model.apply({**variables, 'params': p}, tokens).sum()
  )(variables['params'])['embedding']
  counts = np.bincount(np.ravel(tokens), minlength=rows)
  close(gradient, np.tile(counts[:, None].astype(np.float32), 3))


def test_an_embedding_is_quantized_by_choice():
  tokens = jnp.zeros((1, 5), jnp.int32)
  for embed, found in ((False, False), (True, True)):
    model = searchable_lib.searchable(nn.Embed(7, 3), embed=embed)
    variables = jax.eval_shape(model.init, jax.random.key(0), tokens)
    assert ('arch' in variables) == found
  (op,) = discovery.find(model, tokens).ops
  # Nothing is multiplied; 7 rows of 3 have a scale each.
  assert (op.shape.macs, op.shape.weights, op.shape.channels) == (0, 21, 7)
  excluded = searchable_lib.searchable(nn.Embed(7, 3), EXCLUDED, embed=True)
  table = dict(params={'embedding': random((7, 3))})
  same(*(m.apply(table, tokens) for m in (excluded, nn.Embed(7, 3))))


def by_key(key, shape, dtype=jnp.float32):
  """An initializer that tells keys apart and compiles fast."""
  key = jax.random.key_data(key)[1] % 1000 / 1000 - 0.5
  ramp = jnp.cos(jnp.arange(np.prod(shape)))
  return (key + ramp).reshape(shape).astype(dtype)


class Zoo(nn.Module):
  """Most of linen, the way models are written."""

  def setup(self):
    how = dict(kernel_init=by_key)
    self.embed = nn.Embed(11, 8, embedding_init=by_key)
    self.conv = nn.Conv(8, (3,), **how)
    self.attention = nn.MultiHeadDotProductAttention(2, **how)
    self.local = nn.ConvLocal(8, (3,), use_bias=False, **how)
    self.transpose = nn.ConvTranspose(8, (3,), **how)
    self.mlp = nn.Sequential([nn.Dense(12, **how), nn.gelu, nn.Dense(8, **how)])
    self.einsum = nn.Einsum((8, 2, 4), 'btd,dhk->bthk', **how)
    self.general = nn.DenseGeneral(8, axis=(-2, -1), **how)
    self.norm = nn.BatchNorm()

  def __call__(self, tokens, train):
    x = self.conv(self.embed(tokens))
    x = x + self.attention(x, sow_weights=True)
    x = self.norm(self.local(x), use_running_average=not train)
    x = self.transpose(self.mlp(x))
    return self.embed.attend(self.general(self.einsum(x)))


TOKENS = jnp.asarray([[1, 2, 3, 10], [0, 5, 5, 7]])


@functools.cache
def zoo():
  """Returns the zoo, searchable, and initial variables."""
  model = searchable_lib.searchable(Zoo(), embed=True, attention=True)
  return model, init(model, TOKENS, train=False)


def test_parameters_are_those_of_the_model_as_its_author_wrote_it():
  _, variables = zoo()
  expected = init(Zoo(), TOKENS, train=False)
  same(variables['params'], expected['params'])
  same(variables['batch_stats'], expected['batch_stats'])
  assert sorted(variables) == [
    'arch',
    'batch_stats',
    'cost',
    'params',
    'quant_stats',
  ]


def test_all_layers_of_the_zoo_are_found():
  model, variables = zoo()
  space = discovery.find(model, TOKENS, train=False)
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


def test_other_collections_change_as_they_do_without_us():
  model, variables = zoo()
  mutable = ['batch_stats', 'quant_stats', 'intermediates']
  y, changed = jax.jit(
    lambda v: model.apply(v, TOKENS, train=True, mutable=mutable)
  )(variables)
  assert y.shape == (2, 4, 11)
  assert sorted(changed) == sorted(mutable)
  stats = changed['quant_stats']
  assert stats['conv']['count'] == stats['attention']['out']['count'] == 1


def test_a_model_without_mutable_collections_returns_its_output_alone():
  model, variables = zoo()
  y = jax.eval_shape(lambda v: model.apply(v, TOKENS, train=False), variables)
  assert y.shape == (2, 4, 11)


def test_with_everything_excluded_the_zoo_is_as_it_was():
  _, variables = zoo()
  spec = quant_spec.QuantSpec(exclude=('*',))
  model = searchable_lib.searchable(Zoo(), spec, embed=True, attention=True)
  plain = {k: variables[k] for k in ('params', 'batch_stats')}
  actual, expected = (
    jax.jit(lambda v, m=m: m.apply(v, TOKENS, train=False))(plain)
    for m in (model, Zoo())
  )
  same(actual, expected)


def test_the_products_of_attention_multiply_what_is_on_the_grid():
  layer = nn.MultiHeadDotProductAttention(2)
  x = random((1, 4, 6))
  spec = quant_spec.QuantSpec(
    ('int8', 'e5m2'), exclude=('query', 'key', 'value', 'out')
  )
  model = searchable_lib.searchable(layer, spec, attention=True)
  variables = init(model, x)
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
    values, scale = layers_test.on_grid(x, name, np.float32(threshold))
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


def test_an_attention_may_be_shared():
  class Shared(nn.Module):
    @nn.compact
    def __call__(self, x):
      attention = nn.MultiHeadDotProductAttention(
        2, kernel_init=by_key, name='attention'
      )
      return attention(attention(x))

  x = random((1, 4, 6))
  model = searchable_lib.searchable(Shared(), attention=True)
  variables = init(model, x)
  same(variables['params'], init(Shared(), x)['params'])
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
  x = random((2, 8))
  params = dict(kernel=random((8, 5)), bias=random((5,)))
  variables = layers_test.with_formats(params, 'INT4', 'INT5')
  same(
    step(searchable_lib.searchable(Loud(5), SEPARATE))(variables, x),
    step(QuantLoud(5, spec=SEPARATE))(variables, x),
  )


class Twins(nn.Module):
  """Two blocks alike and one layer that is called twice."""

  transform: str = ''
  dense: type[nn.Module] = nn.Dense

  @nn.compact
  def __call__(self, x):
    block = Block
    if self.transform:
      block = getattr(nn, self.transform)(Block)
    shared = self.dense(8, kernel_init=by_key, name='shared')
    x = block(self.dense, name='b')(block(self.dense, name='a')(shared(x)))
    return shared(x)


class Block(nn.Module):
  dense: type[nn.Module]

  @nn.compact
  def __call__(self, x):
    return nn.tanh(self.dense(8, kernel_init=by_key, name='dense')(x))


QUANT_DENSE = quant_layers.with_spec(quant_layers.QuantDense, SEPARATE)


@pytest.mark.parametrize('transform', ['jit', 'remat'])
def test_transforms_and_shared_layers_are_those_of_quantized_layers(transform):
  x = random((4, 8))
  model = searchable_lib.searchable(Twins(transform), SEPARATE)
  built = Twins(transform, QUANT_DENSE)
  space = discovery.find(model, x)
  assert space == discovery.find(built, x, spec=SEPARATE)
  variables = init(built, x)
  same(init(model, x), variables)
  outputs = []
  for names in (['INT4', 'INT8'], ['INT8', 'INT4', 'E4M3']):
    at = {**variables, 'arch': chosen(space, names)}
    actual = step(model)(at, x)
    same(actual, step(built)(at, x))
    outputs.append(np.asarray(actual[0][0]).tobytes())
  assert len(set(outputs)) == 2


class Early(nn.Module):
  """Its class is jitted once and for all."""

  @nn.compact
  def __call__(self, x):
    return JitBlock(nn.Dense, name='block')(x)


JitBlock = nn.jit(Block)


def test_a_program_that_jit_keeps_is_not_used_under_other_rules():
  x = random((4, 8))
  plain = Early().init(jax.random.key(0), x)
  outputs = [Early().apply(plain, x)]
  for formats_of_one in ('int4', 'int8', 'int4'):
    model = searchable_lib.searchable(
      Early(), quant_spec.QuantSpec(formats_of_one)
    )
    variables = model.init(jax.random.key(0), x)
    same(variables['params'], plain['params'])
    y, _ = model.apply(variables, x, mutable=['quant_stats'])
    outputs.append(y)
  outputs.append(Early().apply(plain, x))
  same(outputs[0], outputs[4])
  same(outputs[1], outputs[3])
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
    searchable_lib.searchable(Twins(), spec), random((4, 8))
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
    Twins(), quant_spec.QuantSpec(exclude=('c/*',))
  )
  with pytest.raises(ValueError, match="'c/\\*' matches no layer; layers: sha"):
    discovery.find(model, random((4, 8)))


def test_formats_change_nothing_in_the_program():
  model, variables = zoo()
  space = discovery.find(model, TOKENS, train=False)
  traces = []

  @jax.jit
  def apply(arch):
    traces.append(1)
    return model.apply({**variables, 'arch': arch}, TOKENS, train=False)

  for name in formats.menu('int_s'):
    apply(space.expand(space.uniform(str(name))))
  assert len(traces) == 1
