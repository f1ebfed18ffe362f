"""Quantized layers: linen's parameters, real low-bit arithmetic, gradients."""

from collections.abc import Callable
import functools

import flax.linen as nn
import jax
from jax import lax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from fliqs_jax.layers import operands as operands_lib
from fliqs_jax.layers import quant_layers
from fliqs_jax.numerics import clipping
from fliqs_jax.numerics import formats
from fliqs_jax.space import ops as ops_lib
from fliqs_jax.space import quant_spec
from tests import helpers
from tests.layers import cases


@functools.cache
def forward_and_backward(layer):
  """Returns a compiled (variables, x, cotangent) -> y, (dparams, dx)."""

  @jax.jit
  def compiled(variables, x, cotangent):
    def apply(params, x):
      return layer.apply(dict(variables, params=params), x)

    y, vjp = jax.vjp(apply, variables['params'], x)
    return y, vjp(cotangent)

  return compiled


def show_key(key, shape, dtype):
  """An initializer that shows which key it got, and compiles fast."""
  return jnp.full(shape, jax.random.key_data(key)[1], dtype)


def operands(case, params, x, weights, activations):
  """Returns values and scale of activations and of weights."""
  clip = clipping.multiples('laplacian', formats.menu([activations]))[0]
  peak = np.abs(params['kernel']).max(axis=case.summed, keepdims=True)
  return (
    *cases.on_grid(x, activations, np.float32(clip) * cases.ACT_STD),
    *cases.on_grid(params['kernel'], weights, peak),
  )


def integer_layer(case):
  """Returns the linen layer in int8 arithmetic, with int32 accumulators."""
  op = dict(preferred_element_type=jnp.int32)
  if case.linen is nn.Conv:
    op = dict(
      conv_general_dilated=functools.partial(lax.conv_general_dilated, **op)
    )
  elif case.linen is not nn.Einsum:
    op = dict(dot_general=functools.partial(lax.dot_general, **op))
  kwargs = dict(case.kwargs, use_bias=False)
  return case.linen(**kwargs, **op, promote_dtype=lambda *a, dtype: a)


@pytest.mark.slow
@cases.CASE
def test_parameters_are_those_of_the_linen_layer(case):
  kwargs = dict(kernel_init=show_key)
  if case.kwargs.get('use_bias', True):
    kwargs |= dict(bias_init=show_key)
  x = helpers.random(case.input_shape)
  actual, expected = (
    helpers.init(layer, x)['params']
    for layer in (case.quantized(**kwargs), case.plain(**kwargs))
  )
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_the_default_initializers_are_linens():
  case = cases.CASES['dense']
  x = helpers.random(case.input_shape)
  actual, expected = (
    helpers.init(layer, x)['params']
    for layer in (case.quantized(), case.plain())
  )
  jax.tree.map(np.testing.assert_array_equal, actual, expected)


@cases.CASE_OF_BITS
def test_an_excluded_layer_is_the_linen_layer(case):
  x = helpers.random(case.input_shape)
  params = cases.random_params(case, seed=1)
  actual, expected = (
    np.asarray(jax.jit(layer.apply)({'params': params}, x))
    for layer in (case.quantized(cases.EXCLUDED), case.plain())
  )
  if case in [cases.CASES[case_id] for case_id in cases.REORDERED]:
    # At most 36 products, each rounded to 2**-24.
    atol = 2e-6 * np.abs(expected).max()
    np.testing.assert_allclose(actual, expected, atol=atol)
  else:
    np.testing.assert_array_equal(actual, expected)


@cases.CASE_OF_BITS
def test_integer_formats_are_integer_arithmetic_bit_for_bit(case):
  x = helpers.random(case.input_shape, seed=2)
  params = cases.random_params(case, seed=2)
  if 'bias' in params:
    params['bias'] *= 0
  layer = jax.jit(case.quantized().apply)
  integer = jax.jit(integer_layer(case).apply)
  pairs = [(name, name) for name in cases.INTEGERS]
  for weights, activations in [*pairs, ('INT4', 'INT8'), ('INT7', 'INT5')]:
    x_q, x_scale, w_q, w_scale = operands(case, params, x, weights, activations)
    accumulator = np.asarray(
      integer({'params': {'kernel': w_q.astype(np.int8)}}, x_q.astype(np.int8))
    )
    assert accumulator.dtype == np.int32
    # Two roundings, in this order.
    expected = accumulator.astype(np.float32) * x_scale
    expected = expected * case.scale_of_output(w_scale)
    y = layer(cases.with_formats(params, weights, activations), x)
    np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize(
  'case_id', ['conv', 'conv_depthwise', 'dense_general', 'einsum_permuted']
)
def test_float_formats_agree_with_float64(case_id):
  case = cases.CASES[case_id]
  x = helpers.random(case.input_shape, seed=3)
  params = cases.random_params(case, seed=4)
  compiled = forward_and_backward(case.quantized())
  for weights, activations in [
    *zip(cases.FLOATS, cases.FLOATS),
    ('E4M3', 'INT5'),
  ]:
    x_q, x_scale, w_q, w_scale = operands(case, params, x, weights, activations)
    with jax.enable_x64(True):
      dequantized = params | {'kernel': w_q.astype(np.float64) * w_scale}
      dequantized = jax.tree.map(np.float64, dequantized)
      expected = np.asarray(
        case.plain(param_dtype=np.float64).apply(
          {'params': dequantized}, x_q.astype(np.float64) * x_scale
        )
      )
    assert expected.dtype == np.float64
    y, _ = compiled(
      cases.with_formats(params, weights, activations),
      x,
      np.ones(expected.shape, np.float32),
    )
    # Sums of at most 72 products, each rounded to 2**-24, and no cancellation
    # beyond the size of the largest output.
    np.testing.assert_allclose(y, expected, atol=1e-6 * np.abs(expected).max())


@pytest.mark.slow
@cases.CASE
def test_gradients_are_those_of_the_straight_through_estimator(case):
  x = helpers.random(case.input_shape, seed=5)
  params = cases.random_params(case, seed=6)
  compiled = forward_and_backward(case.quantized())
  plain = case.plain()

  @jax.jit
  def reference(params, x, cotangent, threshold, x_dequantized, w_dequantized):
    def apply(params, x):
      # The clip differentiates as a clip, the rounding as the identity.
      x = jnp.where(jnp.abs(x) <= threshold, x, jnp.sign(x) * threshold)
      x += lax.stop_gradient(x_dequantized - x)
      w = params['kernel']
      w += lax.stop_gradient(w_dequantized - w)
      return plain.apply({'params': params | {'kernel': w}}, x)

    y, vjp = jax.vjp(apply, params, x)
    return y, vjp(cotangent)

  shape = jax.eval_shape(plain.apply, {'params': params}, x).shape
  cotangent = helpers.random(shape, seed=7)
  for weights, activations in [('INT4', 'INT4'), ('INT8', 'E2M1')]:
    x_q, x_scale, w_q, w_scale = operands(case, params, x, weights, activations)
    clip = clipping.multiples('laplacian', formats.menu([activations]))[0]
    threshold = np.float32(clip) * cases.ACT_STD
    expected = reference(
      params, x, cotangent, threshold, x_q * x_scale, w_q * w_scale
    )
    actual = compiled(
      cases.with_formats(params, weights, activations), x, cotangent
    )
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
      actual,
      expected,
    )
    dparams, dx = actual[1]
    # Every weight has its gradient, the largest of each channel included; an
    # input that is clipped has none. (A stride leaves some inputs unused.)
    assert np.all(dparams['kernel'])
    dx = np.asarray(dx)
    assert not np.any(dx[np.abs(x) > threshold])
    if 'strides' not in case.kwargs:
      assert np.all(dx[np.abs(x) <= threshold])


@pytest.mark.optimized
def test_int8_is_exact_up_to_1040_products_of_the_largest_values():
  # 1040 * 127 * 127 = 16,774,160 < 2**24 = 16,777,216: all partial sums are
  # integers that float32 holds.
  spec = quant_spec.QuantSpec('int8')
  layer = quant_layers.QuantDense(3, use_bias=False, spec=spec)
  x = np.ones((2, 1040), np.float32)
  x[1, ::2] = 126 / 127
  clip = np.ones(1, np.float32)
  variables = dict(
    params={'kernel': np.ones((1040, 3), np.float32)},
    arch={'format': np.ones(1, np.float32)},
    quant_stats=cases.stats(std=1.0, menu=formats.menu('int8'), clip=clip),
  )
  y = jax.jit(layer.apply)(variables, x)
  scale = np.float32(1 / 127)
  sums = [1040 * 127 * 127, 520 * 127 * 127 + 520 * 126 * 127]
  expected = np.float32(sums) * scale * scale
  np.testing.assert_array_equal(y, np.tile(expected[:, None], 3))


@pytest.mark.optimized
@pytest.mark.parametrize('case_id', ['dense', 'conv', 'einsum_permuted'])
def test_a_bfloat16_layer_rounds_the_float32_result_once(case_id):
  case = cases.CASES[case_id]
  x = helpers.random(case.input_shape, seed=8)
  params = cases.random_params(case, seed=9)
  in_bf16 = jax.jit(case.quantized(dtype=jnp.bfloat16).apply)
  in_f32 = jax.jit(case.quantized().apply)
  # With these formats the float32 sums are exact, whatever their order.
  for name in ('INT4', 'INT8', 'E2M1'):
    variables = cases.with_formats(params, name, name)
    y = in_bf16(variables, x)
    assert y.dtype == jnp.bfloat16
    expected = np.asarray(in_f32(variables, x)).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(y, expected)


def equations(jaxpr):
  """Yields the equations of a jaxpr and of all within it."""
  for equation in jaxpr.eqns:
    yield equation
    for parameter in equation.params.values():
      if hasattr(parameter, 'jaxpr'):
        yield from equations(parameter.jaxpr)


@cases.CASE
def test_a_bfloat16_layer_accumulates_in_float32(case):
  # XLA on a CPU keeps the excess precision whatever the type says, hence the
  # look at the program.
  layer = case.quantized(dtype=jnp.bfloat16)
  variables = cases.with_formats(
    cases.random_params(case, seed=0), 'INT4', 'INT4'
  )
  program = jax.make_jaxpr(layer.apply)(
    variables, helpers.random(case.input_shape)
  )
  products = [
    equation
    for equation in equations(program.jaxpr)
    if equation.primitive.name in ('dot_general', 'conv_general_dilated')
  ]
  if case is cases.CASES['conv_depthwise']:
    # On a CPU: taps, by a product with 1, and shifted sums, in float32.
    operands = [o.aval.dtype for p in products for o in p.invars]
    assert set(operands) <= {jnp.dtype(jnp.float32)}
  else:
    (product,) = products
    operand_types = {operand.aval.dtype for operand in product.invars}
    assert operand_types == {jnp.dtype(jnp.bfloat16)}
    assert product.outvars[0].aval.dtype == jnp.float32


@pytest.mark.slow
@cases.CASE
def test_the_output_has_the_dtype_of_the_linen_layer(case):
  for spec in (cases.SEPARATE, cases.EXCLUDED):
    for dtype, param_dtype, input_dtype in [
      (None, jnp.float32, jnp.bfloat16),
      (jnp.bfloat16, jnp.float32, jnp.float32),
      (None, jnp.bfloat16, jnp.bfloat16),
      (jnp.float32, jnp.bfloat16, jnp.bfloat16),
    ]:
      kwargs = dict(dtype=dtype, param_dtype=param_dtype)
      x = jax.ShapeDtypeStruct(case.input_shape, input_dtype)
      actual, expected = (
        jax.eval_shape(layer.init_with_output, jax.random.key(0), x)[0]
        for layer in (case.quantized(spec, **kwargs), case.plain(**kwargs))
      )
      assert actual == expected


@pytest.mark.parametrize(
  ('layer', 'field'),
  [
    (quant_layers.QuantConv(4, (3, 3), conv_general_dilated=jnp.dot), ''),
    (
      quant_layers.QuantConv(4, (3, 3), conv_general_dilated_cls=jnp.dot),
      '_cls',
    ),
    (quant_layers.QuantDense(4, dot_general=jnp.dot), ''),
    (quant_layers.QuantDense(4, dot_general_cls=jnp.dot), '_cls'),
    (quant_layers.QuantDenseGeneral(4, dot_general=jnp.dot), ''),
    (quant_layers.QuantDenseGeneral(4, dot_general_cls=jnp.dot), '_cls'),
  ],
)
def test_an_op_of_the_users_own_is_refused(layer, field):
  op = (
    'conv_general_dilated' if hasattr(layer, 'kernel_size') else 'dot_general'
  )
  with pytest.raises(ValueError, match=f'{op}{field}'):
    jax.eval_shape(layer.init, jax.random.key(0), jnp.ones((1, 4, 4, 4)))


@pytest.mark.parametrize(
  ('mode', 'leaves', 'quantizes_activations'),
  [
    ('tied', ['format'], True),
    ('weights', ['weights'], False),
    ('activations', ['activations'], True),
    ('separate', ['activations', 'weights'], True),
  ],
)
def test_the_mode_decides_which_leaves_there_are(
  mode, leaves, quantizes_activations
):
  spec = quant_spec.QuantSpec('int_s', mode=mode)
  x = jnp.ones((1, 5, 5, 4))
  for layer in (
    quant_layers.QuantConv(4, (3, 3), spec=spec),
    quant_layers.QuantDense(4, spec=spec),
    quant_layers.QuantDenseGeneral(4, spec=spec),
    quant_layers.QuantEinsum((4, 4), '...c,cd->...d', spec=spec),
  ):
    variables = jax.eval_shape(layer.init, jax.random.key(0), x)
    assert sorted(variables['arch']) == leaves
    for leaf in variables['arch'].values():
      assert leaf.shape == (3,)
    assert ('quant_stats' in variables) == quantizes_activations


def test_an_excluded_layer_has_no_variables_but_its_parameters():
  layer = quant_layers.QuantDense(4, spec=cases.EXCLUDED)
  variables = jax.eval_shape(layer.init, jax.random.key(0), jnp.ones((1, 4)))
  assert sorted(variables) == ['cost', 'params']


def test_a_fresh_model_runs_at_its_first_format():
  layer = cases.CASES['dense'].quantized()
  x = helpers.random(cases.CASES['dense'].input_shape)
  arch = helpers.init(layer, x)['arch']
  np.testing.assert_array_equal(arch['weights'], cases.one_hot('INT4'))
  np.testing.assert_array_equal(arch['activations'], cases.one_hot('INT4'))


def _averages(values):
  """Returns the running average: of all for 100 batches, then 1 % of each."""
  average = np.mean(values[:100])
  for value in values[100:]:
    average = 0.99 * average + 0.01 * value
  return average


def test_running_moments_are_those_of_the_batches():
  layer = cases.CASES['dense'].quantized()
  rng = np.random.default_rng(0)
  batches = rng.normal(
    rng.normal(size=(130, 1, 1, 1)), 2.0, (130, 2, 3, 8)
  ).astype(np.float32)
  variables = helpers.init(layer, batches[0])
  update = jax.jit(functools.partial(layer.apply, mutable=['quant_stats']))
  assert variables['quant_stats']['count'] == 0  # `init` is no batch.
  for n, batch in enumerate(batches, start=1):
    _, mutated = update(variables, batch)
    variables = variables | mutated
    if n in (1, 2, 5, 100, 101, 130):
      moments = variables['quant_stats']
      assert moments['count'] == n
      seen = batches[:n].astype(np.float64).reshape(n, -1)
      np.testing.assert_allclose(
        moments['mean'], _averages(seen.mean(axis=1)), rtol=1e-4, atol=1e-5
      )
      np.testing.assert_allclose(
        moments['variance'],
        _averages((seen**2).mean(axis=1)) - _averages(seen.mean(axis=1)) ** 2,
        rtol=1e-5,
      )
      np.testing.assert_allclose(
        moments['largest'], _averages(np.abs(seen).max(axis=1)), rtol=1e-5
      )


@pytest.mark.parametrize(
  ('rule', 'largest', 'threshold'),
  [
    # 3 and 2.5 deviations of 2; no more than the largest magnitude.
    ('magnitude', 20, 3 + 2.5 * 2),
    ('magnitude', 7, 7),
    ('deviation', 20, 2.5 * 2),
    ('deviation', 4, 2.5 * 2),
  ],
)
def test_the_threshold_follows_its_rule(rule, largest, threshold):
  spec = quant_spec.QuantSpec('int4', act_clip=2.5, act_threshold=rule)
  layer = quant_layers.QuantDense(8, use_bias=False, spec=spec)
  menu = formats.menu('int4')
  variables = dict(
    params={'kernel': 7 * np.eye(8, dtype=np.float32)},
    arch={'format': np.ones(1, np.float32)},
    quant_stats=cases.stats(
      std=2.0,
      menu=menu,
      mean=np.float32(-3),
      largest=np.float32(largest),
      clip=np.float32([2.5]),
    ),
  )
  y = jax.jit(layer.apply)(variables, np.full((1, 8), 1e3, np.float32))
  # A weight of 7 is exact in INT4; the input saturates at the threshold.
  np.testing.assert_allclose(y, np.full((1, 8), 7 * threshold), rtol=1e-6)


@pytest.mark.parametrize('weight_clip', ['absmax', 'gaussian', 0.5])
def test_activations_ignore_the_clip_of_weights(weight_clip):
  spec = quant_spec.QuantSpec(
    'int4', mode='activations', weight_clip=weight_clip, act_clip=3.0
  )
  layer = quant_layers.QuantDense(8, use_bias=False, spec=spec)
  x = np.full((1, 8), 1e3, np.float32)
  variables = helpers.init(layer, x)
  variables['quant_stats'] |= cases.stats(std=2.0, clip=np.float32([3.0]))
  variables['params'] = {'kernel': np.eye(8, dtype=np.float32)}
  # The input saturates at 3 deviations.
  np.testing.assert_allclose(
    jax.jit(layer.apply)(variables, x), np.full((1, 8), 6.0), rtol=1e-6
  )


def test_statistics_stand_still_unless_they_are_mutable():
  layer = cases.CASES['dense'].quantized()
  x = helpers.random((2, 3, 8))
  params = cases.random_params(cases.CASES['dense'], seed=0)
  variables = cases.with_formats(params, 'INT4', 'INT4')
  frozen = jax.jit(functools.partial(layer.apply, mutable=['cost']))
  y, mutated = frozen(variables, x)
  assert list(mutated) == ['cost']
  # Nor does the batch itself count: a row's result is its own.
  louder = np.concatenate([x[:1], 100 * x[1:]])
  np.testing.assert_array_equal(frozen(variables, louder)[0][0], y[0])
  learning = jax.jit(functools.partial(layer.apply, mutable=['quant_stats']))
  assert learning(variables, x)[1]['quant_stats']['count'] == 2


@pytest.mark.optimized
def test_activations_wait_for_their_phase_and_for_statistics():
  case = cases.CASES['dense']
  x, params = (
    helpers.random(case.input_shape),
    cases.random_params(case, seed=0),
  )
  both = jax.jit(
    functools.partial(case.quantized().apply, mutable=['quant_stats'])
  )
  frozen = jax.jit(case.quantized().apply)
  weights_only = case.quantized(
    quant_spec.QuantSpec(cases.MENU, mode='weights')
  )
  expected = jax.jit(weights_only.apply)(
    dict(params=params, arch=dict(weights=cases.one_hot('INT4'))), x
  )
  variables = cases.with_formats(params, 'INT4', 'INT4')
  profiled = variables['quant_stats']

  inactive = operands_lib.set_activation_quantization(profiled, False)
  assert inactive == profiled | {'active': False}
  y, mutated = both(variables | dict(quant_stats=inactive), x)
  np.testing.assert_array_equal(y, expected)
  # It is the phase in which they are profiled.
  assert mutated['quant_stats']['count'] == 2

  never_seen = variables | dict(quant_stats=profiled | dict(count=np.int32(0)))
  np.testing.assert_array_equal(frozen(never_seen, x), expected)
  # The first batch brings its own statistics.
  assert not np.array_equal(both(never_seen, x)[0], expected)

  active = operands_lib.set_activation_quantization(inactive, jnp.asarray(True))
  y, _ = both(variables | dict(quant_stats=active), x)
  assert not np.array_equal(y, expected)


def test_the_switch_reaches_every_layer_and_may_be_traced():
  nested = {'a': cases.stats(), 'b': {'c': cases.stats()}}
  switch = jax.jit(operands_lib.set_activation_quantization)
  for active in (False, True):
    switched = switch(nested, active)
    assert switched['a']['active'] == switched['b']['c']['active'] == active
    unchanged = jax.tree.map(np.array_equal, switched, nested)
    assert sum(jax.tree.leaves(unchanged)) == 10 + 2 * active


def test_constant_activations_give_no_nan():
  # Their variance is 0, and BF16 has an infinite multiple of it.
  layer = cases.CASES['dense'].quantized()
  x = np.zeros((2, 3, 8), np.float32)
  params = cases.random_params(cases.CASES['dense'], seed=0)
  for name in ('INT4', 'BF16'):
    variables = cases.with_formats(params, name, name)
    variables['quant_stats'] |= dict(variance=np.float32(0))
    variables['quant_stats'] |= dict(largest=np.float32(0))
    y, (dparams, dx) = forward_and_backward(layer)(
      variables, x, np.ones((2, 3, 5), np.float32)
    )
    bias = variables['params']['bias']
    np.testing.assert_array_equal(y, np.broadcast_to(bias, y.shape))
    for gradient in (dparams['kernel'], dx):
      assert np.isfinite(gradient).all()


def test_a_channel_of_zero_weights_still_learns():
  layer = cases.CASES['dense'].quantized()
  x = helpers.random((2, 3, 8))
  params = dict(cases.random_params(cases.CASES['dense'], seed=0))
  params['kernel'] = params['kernel'] * np.float32([1, 0, 1, 1, 1])
  _, (dparams, _) = forward_and_backward(layer)(
    cases.with_formats(params, 'INT4', 'INT8'),
    x,
    np.ones((2, 3, 5), np.float32),
  )
  # With a constant cotangent every channel has the same gradient.
  np.testing.assert_allclose(
    dparams['kernel'], np.tile(dparams['kernel'][:, :1], 5), rtol=1e-5
  )
  assert np.all(dparams['kernel'])


def test_a_gaussian_weight_clip_clips_and_masks_the_gradient():
  spec = quant_spec.QuantSpec(
    cases.MENU, mode='weights', weight_clip='gaussian'
  )
  layer = quant_layers.QuantDense(4, use_bias=False, spec=spec)
  rng = np.random.default_rng(10)
  kernel = rng.uniform(-1, 1, (64, 4)).astype(np.float32)
  kernel[0] = [20, -20, 0.1, -20]  # Column 2 has no outlier.
  x = np.eye(64, dtype=np.float32)
  for name in ('INT4', 'E2M1', 'INT8', 'BF16'):
    variables = dict(
      params={'kernel': kernel}, arch={'weights': cases.one_hot(name)}
    )
    y, (dparams, _) = forward_and_backward(layer)(
      variables, x, np.ones((64, 4), np.float32)
    )
    multiple = clipping.multiples('gaussian', formats.menu([name]))[0]
    # The product with the identity shows the quantized weights.
    moments = kernel.astype(np.float64)
    reach = np.abs(moments.mean(axis=0)) + multiple * moments.std(axis=0)
    threshold = np.minimum(reach, np.abs(kernel).max(axis=0))
    np.testing.assert_allclose(
      np.abs(y).max(axis=0), threshold, rtol=1e-2 if name == 'BF16' else 1e-5
    )
    clipped = np.abs(kernel) > threshold * (1 + 1e-6)
    # A channel with an outlier has a deviation of about sqrt(20**2 / 64 + 1/3)
    # = 2.6: 2.7 of them (INT4) are 7.0, 5.1 (E2M1) 13, 11.7 (INT8) 30.
    assert clipped.sum() == (3 if name in ('INT4', 'E2M1') else 0)
    np.testing.assert_array_equal(dparams['kernel'] == 0, clipped)


class Twins(nn.Module):
  """Two blocks alike, the way a transform makes them."""

  transform: Callable = staticmethod(lambda module_class: module_class)

  @nn.compact
  def __call__(self, x):
    block = self.transform(Block)
    return block(name='b')(block(name='a')(x))


class Block(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.tanh(
      quant_layers.QuantDense(8, spec=cases.SEPARATE, name='dense')(x)
    )


@pytest.mark.parametrize('transform', [nn.jit, nn.remat])
def test_twins_under_a_transform_have_formats_and_gradients_of_their_own(
  transform,
):
  x = helpers.random((4, 8), seed=11)
  params = {
    name: {
      'dense': dict(
        kernel=helpers.random((8, 8), seed), bias=helpers.random((8,), seed)
      )
    }
    for name, seed in (('a', 12), ('b', 13))
  }
  outputs = []
  for a, b in [('INT4', 'INT8'), ('INT8', 'INT4'), ('INT4', 'INT4')]:
    arch = {
      name: {
        'dense': dict(
          weights=cases.one_hot(fmt), activations=cases.one_hot(fmt)
        )
      }
      for name, fmt in (('a', a), ('b', b))
    }
    at = dict(
      params=params,
      arch=arch,
      quant_stats={name: {'dense': cases.stats()} for name in 'ab'},
    )
    cotangent = np.ones((4, 8), np.float32)
    expected = forward_and_backward(Twins())(at, x, cotangent)
    actual = forward_and_backward(Twins(transform))(at, x, cotangent)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6),
      actual,
      expected,
    )
    outputs.append(np.asarray(actual[0]).tobytes())
  assert len(set(outputs)) == 3


class Shared(nn.Module):
  """One layer, called twice."""

  @nn.compact
  def __call__(self, x):
    dense = quant_layers.QuantDense(8, spec=cases.SEPARATE, name='dense')
    return dense(nn.tanh(dense(x)))


def test_a_shared_layer_costs_twice_and_has_one_decision():
  x = helpers.random((4, 8), seed=12)
  variables = helpers.init(Shared(), x)
  assert jax.tree.map(np.shape, variables['arch']) == {
    'dense': dict(weights=(10,), activations=(10,))
  }
  ops = variables['cost']['dense']['ops']
  # 4 rows by 8 x 8 weights, each time.
  assert [op.macs for op in ops] == [4 * 8 * 8] * 2
  learning = jax.jit(functools.partial(Shared().apply, mutable=['quant_stats']))
  _, mutated = learning(variables, x)
  moments = mutated['quant_stats']['dense']
  assert moments['count'] == 2
  dense = variables['params']['dense']
  hidden = np.tanh(x @ np.asarray(dense['kernel']) + np.asarray(dense['bias']))
  # Quantized to 4 bits before the tanh, hence not closer than that.
  np.testing.assert_allclose(moments['variance'], np.var([x, hidden]), rtol=0.1)


@cases.CASE
def test_a_layer_records_its_macs_its_weights_and_its_channels(case):
  layer = case.quantized()
  x = jax.ShapeDtypeStruct(case.input_shape, jnp.float32)
  y, variables = jax.eval_shape(layer.init_with_output, jax.random.key(0), x)
  (op,) = variables['cost']['ops']
  kernel = variables['params']['kernel'].shape
  summed = np.prod([kernel[axis] for axis in case.summed])
  # Every output is a sum over the summed axes of the kernel.
  window = kernel[:-2] if case.linen is nn.Conv else ()
  strides = np.broadcast_to(case.kwargs.get('strides', 1), len(window))
  assert op == ops_lib.OpShape(
    kind=case.kind,
    macs=y.size * summed,
    weights=np.prod(kernel),
    channels=np.prod(kernel) // summed,
    inputs=op.inputs,
    outputs=y.size,
    weight_menu=cases.MENU,
    act_menu=cases.MENU,
    tied=False,
    window=window,
    strides=tuple(strides),
  )
  if case.kwargs.get('padding') in ('CIRCULAR', 'CAUSAL'):
    assert op.inputs > np.prod(case.input_shape)  # Linen pads them before.
  else:
    assert op.inputs == np.prod(case.input_shape)


def test_inputs_are_there_to_profile_on_request():
  case = cases.CASES['dense']
  x = helpers.random(case.input_shape)
  variables = cases.with_formats(
    cases.random_params(case, seed=0), 'INT4', 'INT4'
  )
  apply = functools.partial(case.quantized().apply, mutable=['act_inputs'])
  _, mutated = jax.jit(apply)(variables, x)
  (seen,) = mutated['act_inputs']['x']
  np.testing.assert_array_equal(seen, x)
  variables = helpers.init(case.quantized(), x)
  assert 'act_inputs' not in variables


def test_the_spec_is_given_by_with_spec():
  dense = quant_layers.with_spec(quant_layers.QuantDense, cases.EXCLUDED)
  assert dense(5).spec == cases.EXCLUDED
