"""Numbers of quantized products, beside NumPy."""

import jax
from jax import lax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import fliqs_jax as fliqs
from fliqs_jax.numerics import clipping
from fliqs_jax.program import searchable as searchable_lib
from tests import helpers
from tests.layers import cases

SPEC = fliqs.QuantSpec(('int4', 'e4m3'))


def run(f, params, *inputs, name='INT4', **kwargs):
  """Returns result, statistics and gradients of the first batch at a format."""
  model = searchable_lib.searchable(f, SPEC, params=params, **kwargs)
  space = fliqs.find_decisions(model, *inputs)
  variables = model.init(jax.random.key(0), *inputs)
  variables['arch'] = space.expand(space.uniform(name))

  @jax.jit
  def step(params, inputs):
    def loss(params):
      y, changed = model.apply(
        {**variables, 'params': params}, *inputs, mutable=['quant_stats']
      )
      return jnp.sum(jnp.sin(y.astype(jnp.float32))), (y, changed)

    return jax.grad(loss, has_aux=True)(params)

  gradients, (y, changed) = step(variables['params'], inputs)
  assert y.dtype == jax.eval_shape(f, params, *inputs).dtype
  for gradient in jax.tree.leaves(gradients):
    assert np.isfinite(np.float32(gradient)).all()
    assert np.any(gradient)
  return y, changed['quant_stats'], gradients


def activations(x, name='INT4'):
  """Returns activations as their first batch quantizes them."""
  (multiple,) = clipping.multiples('laplacian', fliqs.QuantSpec(name).formats)
  x = np.float32(x)
  threshold = min(abs(x.mean()) + multiple * x.std(), np.abs(x).max())
  values, scale = cases.on_grid(x, name, np.float32(threshold))
  return values * scale


def weights(w, summed, name='INT4'):
  peak = np.abs(w).max(axis=summed, keepdims=True)
  values, scale = cases.on_grid(w, name, peak)
  return values * scale


@pytest.mark.parametrize('name', ['INT4', 'E4M3'])
def test_weights_have_a_scale_for_each_output_on_either_side(name):
  x, w = helpers.random((4, 8)), dict(w=helpers.random((8, 6), 1))
  y, _, _ = run(lambda v, x: x @ v['w'], w, x, name=name)
  expected = activations(x, name) @ weights(w['w'], (0,), name)
  helpers.close(y, expected)
  y, _, _ = run(lambda v, x: v['w'].T @ x.T, w, x, name=name)
  helpers.close(y, expected.T)


def test_each_slice_has_statistics_of_its_own():
  # The second slice of the activations is ten times larger.
  x = helpers.random((4, 2, 8)) * np.float32([1, 10])[None, :, None]
  w = helpers.random((2, 8, 6), 1)
  y, stats, _ = run(
    lambda v, x: jnp.einsum('bhd,hdk->hbk', x, v['w']), dict(w=w), x
  )
  expected = [activations(x[:, i]) @ weights(w[i], (0,)) for i in range(len(w))]
  helpers.close(y, np.stack(expected), 1e-4)
  helpers.close(stats['w']['mean'], x.mean(axis=(0, 2)))
  helpers.close(stats['w']['variance'], x.var(axis=(0, 2)), 1e-4)
  np.testing.assert_array_equal(stats['w']['count'], [1, 1])


def test_decisions_of_slices_are_those_of_their_numbers():
  x, w = helpers.random((2, 4, 8)), dict(w=helpers.random((2, 8, 6), 1))
  model = searchable_lib.searchable(
    lambda v, x: jax.vmap(lambda x, w: x @ w)(x, v['w']), SPEC, params=w
  )
  space = fliqs.find_decisions(model, x)
  assert [d.name for d in space.decisions] == ['w/@0', 'w/@1']
  variables = model.init(jax.random.key(0), x)
  variables['arch'] = helpers.chosen(space, ['E4M3', 'INT4'])
  y, _ = jax.jit(lambda v: model.apply(v, x, mutable=['quant_stats']))(
    variables
  )
  for i, name in enumerate(('E4M3', 'INT4')):
    expected = activations(x[i], name) @ weights(w['w'][i], (0,), name)
    helpers.close(y[i], expected, 1e-4)


def convolved(x, w):
  """Returns the sums of a 3 x 3 convolution, NCHW and OIHW, padded by 1."""
  x = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
  rows, columns = x.shape[2] - 2, x.shape[3] - 2
  return sum(
    np.einsum(
      'nchw,oc->nohw', x[:, :, i : i + rows, j : j + columns], w[:, :, i, j]
    )
    for i in range(3)
    for j in range(3)
  )


def test_a_convolution_of_channels_first():
  x, w = helpers.random((2, 4, 5, 5)), helpers.random((6, 2, 3, 3), 1)
  y, _, _ = run(
    lambda v, x: lax.conv_general_dilated(
      x, v['w'], (1, 1), 'SAME', feature_group_count=2
    ),
    dict(w=w),
    x,
  )
  x, w = activations(x), weights(w, (1, 2, 3))
  # Each half of the channels makes half of the outputs.
  expected = [convolved(x[:, :2], w[:3]), convolved(x[:, 2:], w[3:])]
  helpers.close(y, np.concatenate(expected, axis=1), 1e-4)


def test_each_group_of_a_ragged_product_has_its_scales():
  x = helpers.random((5, 8))
  # The second matrix is a hundred times larger.
  w = helpers.random((2, 8, 6), 1) * np.float32([1, 100])[:, None, None]
  y, _, _ = run(
    lambda v, x: lax.ragged_dot(x, v['w'], jnp.array([2, 3])), dict(w=w), x
  )
  x, w = activations(x), weights(w, (1,))
  helpers.close(y, np.concatenate([x[:2] @ w[0], x[2:] @ w[1]]), 1e-4)


def test_the_products_of_attention_have_a_scale_for_each_operand():
  x, w = helpers.random((4, 8)), dict(q=helpers.random((8, 6), 1))
  y, stats, _ = run(
    lambda v, x: (x @ v['q']) @ x[:, :6].T, w, x, attention=True
  )
  q = activations(x) @ weights(w['q'], (0,))
  helpers.close(y, activations(q) @ activations(x[:, :6]).T, 1e-4)
  assert sorted(stats['product']) == ['activations', 'weights']


def test_rows_of_a_table_have_scales_for_both_of_its_uses():
  table, indices = helpers.random((7, 8)), np.array([3, 0, 3])
  y, _, _ = run(
    lambda v, i: v['e'][i] @ v['e'].T, dict(e=table), indices, embed=True
  )
  rows = weights(table, (1,))
  helpers.close(y, activations(rows[indices]) @ rows.T, 1e-4)


def bfloat16(x):
  return np.float32(np.asarray(x).astype(ml_dtypes.bfloat16))


def in_bfloat16(v, x):
  w, c = (v[name].astype(jnp.bfloat16) for name in ('w', 'c'))
  return x.astype(jnp.bfloat16) @ w + c[None]


@pytest.mark.optimized
def test_weights_of_bfloat16_are_quantized_from_before_their_cast():
  x = helpers.random((4, 8))
  # In bfloat16 the weights 1.003 are 1, so that their scale would differ.
  w = helpers.random((8, 6), 1).clip(-1, 1)
  w[0] = 1.003
  v = dict(w=w, c=helpers.random((6,), 2))
  y, _, _ = run(in_bfloat16, v, x)
  # The bias, too, is added as it was, before the sum is rounded.
  expected = activations(bfloat16(x)) @ weights(w, (0,)) + v['c']
  np.testing.assert_array_equal(np.float32(y), bfloat16(expected))


def joined(v):
  return jnp.concatenate([p.astype(jnp.bfloat16) for p in v['w']], axis=1)


def selected(v):
  w = jnp.concatenate([jnp.ones((8, 1)), *v['w']], axis=1)
  return lax.dynamic_slice(w.astype(jnp.bfloat16), (0, 1), (8, 6))


@pytest.mark.optimized
@pytest.mark.parametrize('arranged', [joined, selected])
def test_weights_may_be_arranged_after_their_cast(arranged):
  x = helpers.random((4, 8))
  w = helpers.random((8, 6), 1).clip(-1, 1)
  w[0] = 1.003  # In bfloat16 it is 1, and the scale another one.
  y, _, _ = run(
    lambda v, x: x.astype(jnp.bfloat16) @ arranged(v),
    dict(w=[w[:, :2], w[:, 2:]]),
    x,
  )
  expected = activations(bfloat16(x)) @ weights(w, (0,))
  np.testing.assert_array_equal(np.float32(y), bfloat16(expected))


def scanned(f):
  def run(x, w):
    return lax.scan(lambda c, w: (c, f(x, w)), 0, w[None])[1][0]

  return run


def branched(f):
  def run(x, w):
    return lax.cond(x[0, 0] < 9, f, lambda x, w: x[:, :6], x, w)

  return run


@pytest.mark.optimized
@pytest.mark.parametrize('call', [jax.jit, jax.checkpoint, scanned, branched])
def test_a_call_may_lie_between_the_cast_and_the_product(call):
  def f(v, x):
    x, w = x.astype(jnp.bfloat16), v['w'].astype(jnp.bfloat16)
    return call(lambda x, w: x @ w)(x, w)

  x = helpers.random((4, 8))
  w = helpers.random((8, 6), 1).clip(-1, 1)
  w[0] = 1.003
  y, _, _ = run(f, dict(w=w), x)
  expected = activations(bfloat16(x)) @ weights(w, (0,))
  np.testing.assert_array_equal(np.float32(y), bfloat16(expected))


def test_gradients_of_bfloat16_are_of_the_type_of_the_parameters():
  x = helpers.random((4, 8))
  v = dict(w=helpers.random((8, 6), 1), c=helpers.random((6,), 2))
  _, _, gradients = run(in_bfloat16, v, x)
  assert {g.dtype for g in gradients.values()} == {np.dtype(np.float32)}


def test_convolutions_multiply_bfloat16():
  x, w = helpers.random((2, 4, 5, 5)), helpers.random((6, 4, 3, 3), 1)
  y, _, _ = run(
    lambda v, x: lax.conv_general_dilated(
      x.astype(jnp.bfloat16), v['w'].astype(jnp.bfloat16), (1, 1), 'SAME'
    ),
    dict(w=w),
    x,
  )
  expected = convolved(activations(bfloat16(x)), weights(w, (1, 2, 3)))
  np.testing.assert_allclose(np.float32(y), expected, rtol=0.01, atol=0.01)


def test_float16_does_not_overflow():
  # Values of E4M3 are up to 480: a product of eight pairs exceeds 65504.
  x = np.full((4, 8), 3.0, np.float32)
  x[0] = helpers.random((8,))
  w = helpers.random((8, 6), 1)
  y, _, _ = run(
    lambda v, x: x.astype(jnp.float16) @ v['w'].astype(jnp.float16),
    dict(w=w),
    x,
    name='E4M3',
  )
  x = np.float32(np.float16(x))
  expected = activations(x, 'E4M3') @ weights(w, (0,), 'E4M3')
  np.testing.assert_allclose(np.float32(y), expected, rtol=2e-3, atol=2e-3)


def test_convolutions_and_products_of_float64_have_float32_sums():
  x, w = helpers.random((2, 5, 5, 3)), helpers.random((3, 3, 3, 4), 1)

  def computed(dtype):
    def f(v, x):
      x, v = jax.tree.map(lambda a: a.astype(dtype), (x, v))
      y = lax.conv_general_dilated(
        x, v['w'], (1, 1), 'VALID', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
      )
      return y.reshape(2, -1)[:, :8] @ v['head']

    y, *_ = run(f, dict(w=w, head=np.eye(8, dtype=np.float32)), x)
    return y

  expected = computed(jnp.float32)
  with jax.enable_x64(True):
    y = computed(jnp.float64)
  assert y.dtype == np.float64
  np.testing.assert_array_equal(y, expected)


def test_a_branch_of_a_cond_learns_only_when_it_is_taken():
  v = dict(a=helpers.random((8, 6), 1), b=helpers.random((8, 6), 2))

  def f(v, x):
    return lax.cond(x[0, 0] > 0, lambda x: x @ v['a'], lambda x: x @ v['b'], x)

  model = searchable_lib.searchable(f, SPEC, params=v)
  x = np.abs(helpers.random((4, 8)))
  space = fliqs.find_decisions(model, x)
  variables = model.init(jax.random.key(0), x)
  variables['arch'] = helpers.chosen(space, ['INT4', 'E4M3'])
  apply = jax.jit(lambda v, x: model.apply(v, x, mutable=['quant_stats']))
  first = {'b': 'INT4', 'a': 'E4M3'}
  for sign, taken, other in ((1, 'a', 'b'), (-1, 'b', 'a')):
    y, changed = apply(variables, sign * x)
    name = first[taken]
    expected = activations(sign * x, name) @ weights(v[taken], (0,), name)
    helpers.close(y, expected, 1e-4)
    counts = {k: s['count'] for k, s in changed['quant_stats'].items()}
    assert counts == {taken: 1, other: 0}


def test_a_shared_layer_learns_statistics_for_each_use():
  x, w = helpers.random((4, 8)), dict(w=helpers.random((8, 8), 1))
  y, stats, _ = run(lambda v, x: jnp.tanh(x @ v['w']) @ v['w'], w, x)
  hidden = np.tanh(activations(x) @ weights(w['w'], (0,)))
  helpers.close(y, activations(hidden) @ weights(w['w'], (0,)), 1e-4)
  assert sorted(stats) == ['w', 'w#2']
  helpers.close(stats['w']['mean'], x.mean())
  helpers.close(stats['w#2']['mean'], hidden.mean())


def test_a_layer_in_a_loop_learns_from_each_iteration():
  x, w = helpers.random((3, 4, 8)), dict(w=helpers.random((8, 6), 1))
  y, stats, _ = run(
    lambda v, x: lax.scan(lambda c, x: (c, x @ v['w']), 0, x)[1], w, x
  )
  assert y.shape == (3, 4, 6)
  # The first hundred batches have equal weights.
  helpers.close(stats['w']['mean'], x.mean())
  assert stats['w']['count'] == 3


@pytest.mark.parametrize(('name', 'tokens'), [('INT8', 197), ('INT4', 16)])
@pytest.mark.parametrize('sharpness', [0.0, 100.0])
@pytest.mark.parametrize('mask', [False, True])
def test_flat_and_sharp_attention_keep_their_weights(
  name, tokens, sharpness, mask
):
  # Every token attends to all, or to the one of its own direction.
  own = np.eye(tokens, dtype=np.float32)[None]
  values = helpers.random((1, tokens, 4))

  def f(params, x):
    attention = jax.nn.softmax(params['sharpness'] * x @ x.swapaxes(1, 2))
    if mask:  # As dropout does: a part is zero, the rest grows.
      attention = jnp.where(jnp.arange(tokens) % 2 == 0, attention, 0.0) / 0.5
    return attention.astype(jnp.bfloat16).astype(jnp.float32) @ (
      x @ params['values']
    )

  spec = fliqs.QuantSpec(
    name, menus=(('*qk*', 'bf16'), ('values', 'bf16')), mode='tied'
  )
  params = dict(sharpness=np.float32(sharpness), values=values[0])
  model = searchable_lib.searchable(f, spec, params=params, attention=True)
  variables = model.init(jax.random.key(0), own)
  space = fliqs.find_decisions(model, own)
  variables['arch'] = space.expand(space.uniform(name))
  y, _ = jax.jit(lambda v: model.apply(v, own, mutable=['quant_stats']))(
    variables
  )
  expected = f(params, own)
  # Values have errors of their own; INT4 has 7 steps, INT8 127.
  error = np.linalg.norm(y - expected) / np.linalg.norm(expected)
  assert error < (0.02 if name == 'INT8' else 0.25)
