"""Layers of open sizes: each choice is the plain layer of that size."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fliqs_jax.layers import channel_masks
from fliqs_jax.layers import quant_layers
from fliqs_jax.space import quant_spec
from fliqs_jax.space import sizes

INPUTS = sizes.Channels('a/channels', (2, 4, 6), (2, 4, 6))
OUTPUTS = sizes.Channels('b/channels', (3, 5, 8), (3, 5, 8))
BRANCHES = sizes.Kernel('c/kernel', (3, 5), sizes.BRANCHES)
MASKED = sizes.Kernel('c/kernel', (3, 5), sizes.MASKED)


@dataclasses.dataclass(frozen=True)
class Case:
  """A layer of open sizes.

  Attributes:
    kind: `dense`, `conv` or `depthwise`.
    kernel: of a convolution.
    strides: of a convolution.
    size: height of its map; the width is one more, so that one of them is even.
    mode: of the spec; `excluded`: not quantized.
    clip: of its weights.
  """

  kind: str
  kernel: sizes.Kernel | None = None
  strides: int = 1
  size: int = 5
  mode: str = 'tied'
  clip: str | float = 'absmax'

  def __str__(self):
    kernel = self.kernel.weights if self.kernel else ''
    return (
      f'{self.kind}{self.strides}{kernel}-{self.size}-{self.mode}-{self.clip}'
    )

  @property
  def spec(self):
    is_excluded = self.mode == 'excluded'
    return quant_spec.QuantSpec(
      ('INT4', 'INT8'),
      mode='tied' if is_excluded else self.mode,
      exclude=('*',) if is_excluded else (),
      weight_clip=self.clip,
    )

  @property
  def outputs(self):
    return INPUTS if self.kind == 'depthwise' else OUTPUTS

  @property
  def is_exact(self):
    """Whether every sum is one of integers.

    Else it is in another order than the plain layer's, for there are zeros
    between; of a standard deviation too, which moves the scale.
    """
    return self.mode in ('tied', 'separate') and self.clip == 'absmax'

  def layer(self, inputs=INPUTS, outputs=None, kernel=None):
    """Returns the open layer; the plain one for constants."""
    outputs, kernel = outputs or self.outputs, kernel or self.kernel
    if self.kind == 'dense':
      dense = functools.partial(quant_layers.QuantDense, spec=self.spec)
      return sizes.between(dense, inputs, outputs)()
    groups = inputs.size if self.kind == 'depthwise' else 1
    conv = functools.partial(quant_layers.QuantConv, spec=self.spec)
    return sizes.between(conv, inputs, outputs, kernel)(
      strides=self.strides, feature_group_count=groups
    )

  def images(self, rng):
    shape = (2, self.size, self.size + 1, INPUTS.size)
    shape = (7, INPUTS.size) if self.kind == 'dense' else shape
    return rng.normal(size=shape).astype(np.float32) + np.float32(0.5)

  def choices(self, *indices):
    """Returns the layer's leaves of sizes."""
    picked = dict(
      input_channels=INPUTS, output_channels=self.outputs, kernel=self.kernel
    )
    return {
      name: np.eye(len(size.labels), dtype=np.float32)[index]
      for (name, size), index in zip(picked.items(), indices)
      if size is not None
    }


def formats(mode, index):
  names = dict(
    tied=('format',),
    separate=('weights', 'activations'),
    weights=('weights',),
    activations=('activations',),
    excluded=(),
  )[mode]
  one_hot = np.eye(2, dtype=np.float32)
  # Different ones, where there are two.
  return {name: one_hot[(index + i) % 2] for i, name in enumerate(names)}


def statistics(mode):
  if mode in ('weights', 'excluded'):
    return {}
  return dict(
    quant_stats=dict(
      mean=np.float32(0.4),
      variance=np.float32(0.74),
      largest=np.float32(1e3),
      count=np.int32(3),
      active=np.bool_(True),
      clip=np.asarray([2, 3], np.float32),  # Some values are clipped.
    )
  )


@functools.cache
def compiled(layer, case):
  """Returns (params, arch, stats, x, g) -> output, gradients, statistics."""

  def run(params, arch, stats, x, g):
    def output(params, x):
      y = layer.apply({'params': params, 'arch': arch, **stats}, x)
      return jnp.sum(y * g), y

    gradients, y = jax.grad(output, (0, 1), has_aux=True)(params, x)
    after = {}
    if case.mode in ('separate', 'activations'):
      variables = {'params': params, 'arch': arch, **stats}
      _, after = layer.apply(variables, x, mutable='quant_stats')
    return y, gradients, after

  return jax.jit(run)


def cut(params, case, inputs, outputs, kernel):
  """Returns the plain layer's parameters; or where they are, as slices."""
  if case.kind == 'dense':
    return {'bias': params['bias'][:outputs]} | {
      'kernel': params['kernel'][:inputs, :outputs]
    }
  name = 'kernel' if case.kernel.is_masked else f'kernel{kernel}'
  weights = params[name]
  first = (len(weights) - kernel) // 2
  taps = slice(first, first + kernel)
  inputs = 1 if case.kind == 'depthwise' else inputs
  return {
    'bias': params['bias'][:outputs],
    'kernel': weights[taps, taps, :inputs, :outputs],
  }


def near(actual, expected, err_msg=''):
  # Float32 sums of up to 200 products in another order.
  scale = max(np.abs(expected).max(initial=0), 1e-3)
  np.testing.assert_allclose(
    actual, expected, rtol=1e-5, atol=1e-5 * scale, err_msg=err_msg
  )


CASES = (
  Case('dense'),
  Case('dense', mode='separate', clip=2.0),
  Case('dense', mode='weights'),
  Case('dense', mode='activations'),
  Case('dense', mode='excluded'),
  Case('conv', MASKED),
  Case('conv', MASKED, 2, 6, 'separate', 2.0),
  Case('conv', BRANCHES, 2, 5, 'weights'),
  Case('depthwise', BRANCHES, 1, 6),
  Case('depthwise', BRANCHES, 2, 5, 'separate', 2.0),
  Case('depthwise', MASKED, 1, 5, 'activations'),
  Case('depthwise', MASKED, 2, 5, 'tied', 2.0),
  Case('depthwise', MASKED, 2, 6, 'separate'),
)


@pytest.mark.slow
@pytest.mark.parametrize('case', CASES, ids=str)
def test_a_choice_is_the_plain_layer_of_its_sizes(case):
  rng = np.random.default_rng(0)
  layer, x = case.layer(), case.images(rng)
  shapes = jax.eval_shape(layer.init, jax.random.key(0), x)
  params = jax.tree.map(
    lambda s: rng.normal(size=s.shape).astype(s.dtype), shapes['params']
  )
  picks = ((0, 2, 0), (1, 1, 1), (2, 0, 0))[: 3 if case.kind == 'dense' else 2]
  for index, (i, o, k) in enumerate(picks):
    o = i if case.kind == 'depthwise' else o
    inputs, outputs = INPUTS.labels[i], case.outputs.labels[o]
    kernel = case.kernel and case.kernel.labels[k]
    arch = formats(case.mode, index)
    stats = statistics(case.mode)
    x_live = np.where(np.arange(INPUTS.size) < inputs, x, np.float32(0))
    y_shape = jax.eval_shape(layer.init_with_output, jax.random.key(0), x)[0]
    # The loss sees live channels only: what follows is masked.
    g = rng.normal(size=y_shape.shape).astype(np.float32)
    g *= np.arange(case.outputs.size) < outputs
    y, (dparams, dx), after = compiled(layer, case)(
      params, arch | case.choices(i, o, k), stats, x_live, g
    )

    plain = case.layer(
      sizes.constant(inputs),
      sizes.constant(outputs),
      kernel and sizes.Kernel(None, (kernel,), has_leaf=False),
    )
    small = cut(params, case, inputs, outputs, kernel)
    small_x = x_live[..., :inputs]
    expected, (dsmall, dsmall_x), small_after = compiled(plain, case)(
      small, arch, stats, small_x, g[..., :outputs]
    )

    if case.is_exact:
      np.testing.assert_array_equal(y[..., :outputs], expected)
    else:
      near(y[..., :outputs], expected)
    near(dx[..., :inputs], dsmall_x)
    assert not dx[..., inputs:].any()
    for name, gradient in cut(dparams, case, inputs, outputs, kernel).items():
      near(gradient, dsmall[name], name)
      assert np.abs(gradient).max() > 1e-3
    # All of the gradient is there: elsewhere it is zero.
    count = sum(np.count_nonzero(d) for d in jax.tree.leaves(dparams))
    assert count == sum(np.count_nonzero(d) for d in jax.tree.leaves(dsmall))
    for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(small_after)):
      np.testing.assert_allclose(a, b, rtol=1e-6)


def test_equal_leaves_of_branches_give_their_mean():
  case = Case('depthwise', BRANCHES, strides=2)
  rng = np.random.default_rng(0)
  layer, x = case.layer(), case.images(rng)
  shapes = jax.eval_shape(layer.init, jax.random.key(0), x)
  params = jax.tree.map(
    lambda s: rng.normal(size=s.shape).astype(s.dtype), shapes['params']
  )
  arch = formats('tied', 0) | case.choices(2, 2, 0)

  def run(leaf):
    y, (gradients, _), _ = compiled(layer, case)(
      params, arch | dict(kernel=leaf), statistics('tied'), x, np.ones_like(y0)
    )
    return y, gradients

  y0 = jax.eval_shape(layer.init_with_output, jax.random.key(0), x)[0]
  y0 = np.zeros(y0.shape, np.float32)
  mean, gradients = run(np.full(2, 0.5, np.float32))
  each = [run(one_hot) for one_hot in np.eye(2, dtype=np.float32)]
  near(mean, (each[0][0] + each[1][0]) / 2)
  for k, (_, alone) in zip(BRANCHES.labels, each):
    near(gradients[f'kernel{k}'], alone[f'kernel{k}'] / 2)
    other = next(j for j in BRANCHES.labels if j != k)
    assert not alone[f'kernel{other}'].any()


def test_a_dead_channel_keeps_its_statistics_and_is_zero():
  rng = np.random.default_rng(0)
  x = rng.normal(2.0, size=(16, 6)).astype(np.float32)
  norm = channel_masks.BatchNorm(use_running_average=False, channels=INPUTS)
  plain = nn.BatchNorm(use_running_average=False)
  params = dict(
    scale=rng.normal(size=6).astype(np.float32),
    bias=rng.normal(size=6).astype(np.float32),
  )
  stats = dict(mean=np.full(6, 0.5, np.float32), var=np.full(6, 3, np.float32))
  arch = dict(channels=np.eye(3, dtype=np.float32)[1])

  def run(layer, count, **arch):
    def loss(params):
      variables = dict(
        params=params,
        batch_stats={k: v[:count] for k, v in stats.items()},
        **arch,
      )
      y, state = layer.apply(variables, x[:, :count], mutable='batch_stats')
      return jnp.sum(y**3), (y, state['batch_stats'])

    own = {k: v[:count] for k, v in params.items()}
    return jax.grad(loss, has_aux=True)(own)

  gradients, (y, after) = run(norm, 6, arch=arch)
  small_gradients, (small_y, small_after) = run(plain, 4)
  # A channel by itself: the same arithmetic.
  np.testing.assert_array_equal(y[:, :4], small_y)
  assert not y[:, 4:].any()
  for name in ('mean', 'var'):
    np.testing.assert_array_equal(after[name][:4], small_after[name])
    np.testing.assert_array_equal(after[name][4:], stats[name][4:])
  for name in ('scale', 'bias'):
    near(gradients[name][:4], small_gradients[name])
    assert not gradients[name][4:].any()
