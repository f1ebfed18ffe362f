"""Linen models that were not written for the search."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from fliqs_jax.layers import quant_layers
from fliqs_jax.numerics import clipping
from fliqs_jax.numerics import formats
from fliqs_jax.program import searchable as searchable_lib
from fliqs_jax.space import discovery
from fliqs_jax.space import quant_spec
from tests import helpers
from tests.layers import cases
from tests.program import foreign_models

# One for each op and each of the ways in which it may be written.
SAME = ('conv_strided_grouped', 'conv_depthwise', 'conv_1x1_unbatched', 'dense')
# Their weights have batch axes: each slice of them is a layer of its own.
BATCHED = ('dense_general_batch', 'einsum_batch_label')
SINGLE = [case_id for case_id in cases.CASES if case_id not in BATCHED]


def with_formats(model, params, x, weights, activations, **statistics):
  """Returns variables with the same formats and statistics in each layer."""
  shapes = jax.eval_shape(model.init, jax.random.key(0), x)
  names = dict(weights=weights, activations=activations)
  learnt = cases.stats(**statistics)

  def leaf(path, x):
    name = path[-1].key
    if name in names:
      return cases.one_hot(names[name])
    return np.broadcast_to(learnt[name], x.shape)

  return {'params': params} | {
    name: jax.tree_util.tree_map_with_path(leaf, shapes[name])
    for name in ('arch', 'quant_stats')
  }


@pytest.mark.optimized
@pytest.mark.parametrize('case_id', SAME)
def test_a_layer_is_the_quantized_layer_bit_for_bit(case_id):
  case = cases.CASES[case_id]
  x = helpers.random(case.input_shape)
  params = cases.random_params(case, seed=1)
  variables = cases.with_formats(params, 'INT4', 'INT8')
  model = searchable_lib.searchable(case.plain(), cases.SEPARATE)
  helpers.same(
    helpers.step(model)(variables, x),
    helpers.step(case.quantized())(variables, x),
  )


@pytest.mark.slow
def test_an_einsum_is_the_quantized_einsum():
  case = cases.CASES['einsum_permuted']
  x = helpers.random(case.input_shape)
  params = cases.random_params(case, seed=1)
  variables = cases.with_formats(params, 'INT4', 'INT8')
  model = searchable_lib.searchable(case.plain(), cases.SEPARATE)
  helpers.close(
    helpers.step(model)(variables, x),
    helpers.step(case.quantized())(variables, x),
    1e-6,
  )


@cases.CASE_OF_BITS
def test_an_excluded_layer_is_the_plain_layer_bit_for_bit(case):
  x = helpers.random(case.input_shape)
  params = cases.random_params(case, seed=1)
  model = searchable_lib.searchable(case.plain(), cases.EXCLUDED)
  helpers.same(
    *(jax.jit(m.apply)({'params': params}, x) for m in (model, case.plain()))
  )


@pytest.mark.parametrize('case_id', SINGLE)
def test_a_layer_declares_what_the_quantized_layer_does(case_id):
  case = cases.CASES[case_id]
  x = jax.ShapeDtypeStruct(case.input_shape, jnp.float32)
  model = searchable_lib.searchable(case.plain(), cases.SEPARATE)
  actual, expected = (
    jax.eval_shape(m.init, jax.random.key(0), x)
    for m in (model, case.quantized())
  )
  del expected['cost']
  assert actual == expected
  (op,) = discovery.find(model, x).ops
  (same,) = discovery.find(case.quantized(), x, spec=cases.SEPARATE).ops
  sizes = op.shape.weights, op.shape.channels, op.shape.weight_menu
  assert sizes == (
    same.shape.weights,
    same.shape.channels,
    same.shape.weight_menu,
  )
  if case_id != 'conv_input_dilated':  # Zeros between inputs do not count.
    assert op.shape.macs == same.shape.macs


@pytest.mark.parametrize('case_id', BATCHED)
def test_slices_of_weights_are_layers_of_their_own(case_id):
  case = cases.CASES[case_id]
  x = jax.ShapeDtypeStruct(case.input_shape, jnp.float32)
  model = searchable_lib.searchable(case.plain(), cases.SEPARATE)
  ops = discovery.find(model, x).ops
  (whole,) = discovery.find(case.quantized(), x, spec=cases.SEPARATE).ops
  assert [op.path for op in ops] == ['@0', '@1', '@2']
  for name in ('macs', 'weights', 'channels'):
    parts = sum(getattr(op.shape, name) for op in ops)
    assert parts == getattr(whole.shape, name)


def in_bfloat16(x):
  """Returns float32 values that a cast to bfloat16 does not change."""
  return x.astype(ml_dtypes.bfloat16).astype(np.float32)


@pytest.mark.slow
@pytest.mark.parametrize(
  'case_id',
  ['dense', pytest.param('conv', marks=pytest.mark.optimized), 'einsum_heads'],
)
def test_a_bfloat16_layer_is_the_quantized_layer_bit_for_bit(case_id):
  case = cases.CASES[case_id]
  x = in_bfloat16(helpers.random(case.input_shape))
  params = cases.random_params(case, seed=1)
  variables = cases.with_formats(params, 'INT4', 'E4M3')
  model = searchable_lib.searchable(
    case.plain(dtype=jnp.bfloat16), cases.SEPARATE
  )
  outputs, (dparams, dx) = helpers.step(model)(variables, x)
  assert outputs[0].dtype == jnp.bfloat16
  expected, (same_dparams, same_dx) = helpers.step(
    case.quantized(dtype=jnp.bfloat16)
  )(variables, x)
  helpers.same((outputs, dparams), (expected, same_dparams))
  # Linen casts the input before it multiplies, and so rounds its gradient.
  np.testing.assert_array_equal(dx, in_bfloat16(np.asarray(same_dx)))


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
def test_other_layers_multiply_what_is_on_the_grid(layer, dtype):
  # The linen layer of operands that were quantized and scaled back; E5M2 so
  # wide that nothing is clipped, so that the gradients agree as well.
  x = in_bfloat16(helpers.random((2, 6, 5, 4), seed=2))
  layer = layer.clone(dtype=dtype)
  model = searchable_lib.searchable(layer, cases.SEPARATE)
  params = helpers.init(layer, x)['params']
  params = {k: helpers.random(v.shape, 3) for k, v in params.items()}
  clip = np.full(10, 100, np.float32)
  variables = with_formats(model, params, x, 'INT4', 'E5M2', clip=clip)
  if isinstance(layer, nn.ConvLocal):
    summed = (2,)
  else:
    summed = (0, 1, 3 if layer.transpose_kernel else 2)
  kernel = params['kernel']
  peak = np.abs(kernel).max(axis=summed, keepdims=True)
  w_q, w_scale = cases.on_grid(kernel, 'INT4', peak)
  x_q, x_scale = cases.on_grid(x, 'E5M2', np.float32(100 * cases.ACT_STD))
  dequantized = params | {'kernel': w_q * w_scale}
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
  got = actual(params, x)
  assert got[1].dtype == (dtype or jnp.float32)
  tolerance = 1e-4 if dtype is None else 0.03
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected)):
    bound = tolerance * max(1.0, np.abs(b).max())
    np.testing.assert_allclose(np.float32(a), b, rtol=tolerance, atol=bound)


@pytest.mark.optimized
def test_an_embedding_is_looked_up_in_its_grid():
  layer = nn.Embed(7, 3)
  tokens = jnp.array([[0, 6, 2], [5, 5, 0]])
  table = helpers.random((7, 3), seed=4)
  model = searchable_lib.searchable(layer, cases.SEPARATE, embed=True)
  variables = dict(
    params={'embedding': table}, arch={'weights': cases.one_hot('INT4')}
  )
  values, scale = cases.on_grid(
    table, 'INT4', np.abs(table).max(axis=1, keepdims=True)
  )

  def looked_up(params):
    y = model.apply({**variables, 'params': params}, tokens)
    return y.sum(), y

  gradient, y = jax.jit(jax.grad(looked_up, has_aux=True))(variables['params'])
  np.testing.assert_array_equal(y, (values * scale)[np.asarray(tokens)])
  counts = np.bincount(np.ravel(tokens), minlength=7)
  helpers.close(
    gradient['embedding'], np.tile(counts[:, None].astype(np.float32), 3)
  )


def test_an_embedding_is_quantized_by_choice():
  tokens = jnp.zeros((1, 5), jnp.int32)
  for embed in (False, True):
    model = searchable_lib.searchable(nn.Embed(7, 3), embed=embed)
    variables = jax.eval_shape(model.init, jax.random.key(0), tokens)
    assert ('arch' in variables) == embed
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
  assert sorted(variables) == ['arch', 'batch_stats', 'params', 'quant_stats']


def test_all_layers_of_the_zoo_are_found():
  model, variables = zoo()
  space = discovery.find(model, foreign_models.TOKENS, train=False)
  layers = {op.stack or op.path for op in space.ops if op.shape.weight_menu}
  assert sorted(layers) == sorted(
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
  assert stats['local']['count'].tolist() == [1] * 4
  (weights,) = changed['intermediates']['attention']['attention_weights']
  assert weights.shape == (2, 2, 4, 4)


def test_a_model_without_mutable_collections_returns_its_output_alone():
  model, variables = zoo()
  y = jax.eval_shape(
    lambda v: model.apply(v, foreign_models.TOKENS, train=False), variables
  )
  assert y.shape == (2, 4, 11)


@pytest.mark.optimized
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
  space = discovery.find(model, x)
  (op,) = [op for op in space.ops if op.path == 'av']
  # Two heads: 4 weights of 4 values of 3 channels for each of 4 queries.
  assert op.shape.macs == 2 * 4 * 4 * 3
  _, seen = layer.apply(
    {'params': variables['params']}, x, capture_intermediates=True
  )
  query, key, value = (
    np.asarray(seen['intermediates'][name]['__call__'][0])
    for name in ('query', 'key', 'value')
  )

  def quantized(x, is_softmax=False):
    largest = np.abs(x).max()
    reach = np.inf if is_softmax else abs(x.mean()) + clip * x.std()
    threshold = min(reach, largest)
    values, scale = cases.on_grid(x, name, np.float32(threshold))
    return values * scale

  apply = jax.jit(lambda v, x: model.apply(v, x, mutable=['quant_stats']))
  for name in ('INT8', 'E5M2'):
    clip = clipping.multiples('laplacian', formats.menu(name))[0]
    # Three channels a head.
    scores = np.einsum(
      'bqhd,bkhd->bhqk', quantized(query / np.sqrt(3)), quantized(key)
    )
    weights = quantized(np.asarray(jax.nn.softmax(scores)), is_softmax=True)
    heads = np.einsum('bhqk,bkhd->bqhd', weights, quantized(value))
    out = variables['params']['out']
    expected = np.einsum('bqhd,hdf->bqf', heads, out['kernel'])
    arch = space.expand(space.uniform(name))
    y, changed = apply({**variables, 'arch': arch}, x)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
  for product in ('qk', 'av'):
    stats = changed['quant_stats'][product]
    assert sorted(stats) == ['activations', 'weights']


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
  # Weights have one decision for both uses, products of activations have two.
  assert len(space.decisions) == 4 + 2 * 2
  assert len(space.ops) == 12
  _, changed = jax.jit(lambda v: model.apply(v, x, mutable=['quant_stats']))(
    variables
  )
  stats = changed['quant_stats']['attention']
  assert sorted(stats) == sorted(
    name + use
    for name in ('query', 'key', 'value', 'out', 'qk', 'av')
    for use in ('', '#2')
  )
  assert stats['query#2']['count'] == stats['qk#2']['weights']['count'] == 1


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
  same = discovery.find(built, x, spec=cases.SEPARATE)
  assert space.decisions == same.decisions
  assert sorted(op.path for op in space.ops) == sorted(
    op.path for op in same.ops
  )
  variables = helpers.init(built, x)
  initial = helpers.init(model, x)
  helpers.same(initial['params'], variables['params'])
  helpers.same(initial['arch'], variables['arch'])
  # One use of the shared layer learns without the other. The statistics of all
  # are given, so that both models have the same.
  stats = [
    jax.tree_util.tree_map_with_path(
      lambda path, _: cases.stats()[path[-1].key], v['quant_stats']
    )
    for v in (initial, variables)
  ]
  assert sorted(stats[0]) == ['a', 'b', 'shared', 'shared#2']
  applied = [
    jax.jit(
      jax.value_and_grad(
        lambda params, v, m=m: jnp.sum(
          jnp.sin(m.apply({**v, 'params': params}, x))
        )
      )
    )
    for m in (model, built)
  ]
  outputs = []
  for names in (['INT4', 'INT8'], ['INT8', 'INT4', 'E4M3']):
    arch = helpers.chosen(space, names)
    actual, expected = (
      run(variables['params'], dict(arch=arch, quant_stats=own))
      for run, own in zip(applied, stats)
    )
    helpers.close(actual, expected, 1e-6)
    outputs.append(float(actual[0]))
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
    y, _ = jax.jit(lambda v, m=model: m.apply(v, x, mutable=['quant_stats']))(
      variables
    )
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


@pytest.mark.slow
@pytest.mark.parametrize('mix', ['composite', 'branched'])
@pytest.mark.parametrize(
  'case_id',
  [pytest.param('dense', marks=pytest.mark.optimized), 'conv_depthwise'],
)
def test_a_relaxed_layer_is_the_relaxed_quantized_layer(mix, case_id):
  case = cases.CASES[case_id]
  spec = quant_spec.QuantSpec(('int4', 'e4m3', 'bf16'), mix=mix)
  x = helpers.random(case.input_shape)
  variables = dict(
    params=cases.random_params(case, seed=1),
    arch=dict(format=np.float32([0.5, 0.2, 0.3])),
    quant_stats=cases.stats(menu=spec.formats),
  )
  helpers.same(
    helpers.step(searchable_lib.searchable(case.plain(), spec))(variables, x),
    helpers.step(case.quantized(spec))(variables, x),
  )


def test_arch_must_be_given_and_select_a_format():
  model = searchable_lib.searchable(foreign_models.Twins())
  x = helpers.random((4, 8))
  variables = helpers.init(model, x)
  arch = variables.pop('arch')
  with pytest.raises(
    ValueError, match=r'lack arch/shared/format.*space.expand'
  ):
    model.apply(variables, x)
  arch['a']['dense']['format'] = np.float32([0.5, 0.2, 0.3])
  with pytest.raises(ValueError, match='a/dense/format'):
    model.apply({**variables, 'arch': arch}, x)


def test_statistics_of_another_model_are_refused():
  model = searchable_lib.searchable(foreign_models.Twins())
  x = helpers.random((4, 8))
  variables = helpers.init(model, x)
  del variables['quant_stats']['shared#2']
  with pytest.raises(ValueError, match='lack quant_stats/shared#2/'):
    model.apply(variables, x)


@pytest.mark.parametrize('mix', ['sampled', 'composite', 'branched'])
def test_axes_that_are_sharded_explicitly_stay_so(mix):
  # The kind of axes that `jax.make_mesh` gives.
  mesh = jax.make_mesh((2, 2), ('data', 'model'))
  on = jax.sharding.PartitionSpec

  def model(is_split, params, x):
    def of(*spec):
      return dict(out_sharding=on(*spec)) if is_split else {}

    h = jnp.tanh(x @ params['up'])
    each = (((2,), (1,)), ((0,), (0,)))  # A product for each of two experts.
    h = jax.lax.dot_general(
      jnp.stack([h, h]), params['experts'], each, **of(None, 'data', None)
    )
    return jnp.einsum('ebh,ho->bo', h, params['down'], **of('data', None))

  params = dict(
    up=helpers.random((8, 4), 1),
    experts=helpers.random((2, 4, 4), 2),
    down=helpers.random((4, 2), 3),
  )
  x = helpers.random((4, 8))
  spec = quant_spec.QuantSpec('int_s', mix=mix)

  def stepped(params, x, is_split):
    own = searchable_lib.searchable(
      functools.partial(model, is_split), spec, params=params
    )
    space = discovery.find(own, x)
    chosen = space.expand(space.uniform('INT8'))
    variables = own.prepare({'params': params}, x) | {'arch': chosen}

    def value(params):
      y, changed = own.apply(
        {**variables, 'params': params}, x, mutable=['quant_stats']
      )
      return jnp.sum(jnp.sin(y)), changed

    return jax.jit(jax.value_and_grad(value, has_aux=True))(params)

  plain = stepped(params, x, False)
  with jax.set_mesh(mesh):
    places = dict(
      up=on(None, 'model'), experts=on(None, 'model', None), down=on('model')
    )
    split = {k: jax.device_put(v, places[k]) for k, v in params.items()}
    (value, changed), gradients = stepped(
      split, jax.device_put(x, on('data')), True
    )
  assert jax.typeof(gradients['up']).sharding.spec == on(None, 'model')
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
    jax.device_get(((value, changed), gradients)),
    plain,
  )
