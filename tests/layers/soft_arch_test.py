"""A leaf of `arch` that picks nothing never gives a plausible number."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fliqs_jax.layers import channel_masks
from fliqs_jax.layers import quant_layers
from fliqs_jax.space import quant_spec
from fliqs_jax.space import sizes

CHANNELS = sizes.Channels('a/channels', (1, 2), (1, 2))
SPEC = quant_spec.QuantSpec(('INT4', 'INT8'))
EXCLUDED = quant_spec.QuantSpec(('INT4', 'INT8'), exclude=('*',))
SOFT = np.asarray([0.5, 0.5], np.float32)


def conv(weights, spec=EXCLUDED):
  kernel = sizes.Kernel('c/kernel', (1, 3), weights)
  return quant_layers.QuantConv(
    1, (3, 3), use_bias=False, spec=spec, kernel=kernel
  )


# A layer, the shape of its input, the leaf that is soft.
CASES = {
  'format': (quant_layers.QuantDense(2, spec=SPEC), (1, 2), 'format'),
  'input channels': (
    quant_layers.QuantDense(2, spec=EXCLUDED, input_channels=CHANNELS),
    (1, 2),
    'input_channels',
  ),
  'masked kernel': (conv(sizes.MASKED), (1, 3, 3, 1), 'kernel'),
  'mask': (channel_masks.Mask(CHANNELS), (1, 2), 'channels'),
  'batch norm': (
    channel_masks.BatchNorm(use_running_average=True, channels=CHANNELS),
    (1, 2),
    'channels',
  ),
}


class Named(nn.Module):
  """A model with one layer, `only`."""

  layer: nn.Module

  @nn.compact
  def __call__(self, x):
    return self.layer.copy(name='only')(x)


@pytest.mark.parametrize('name', CASES)
def test_a_known_soft_leaf_is_refused_by_the_name_of_its_layer(name):
  layer, shape, leaf = CASES[name]
  model, x = Named(layer), jnp.ones(shape)
  variables = model.init(jax.random.key(0), x)
  variables = {**variables, 'arch': {'only': {leaf: SOFT}}}
  with pytest.raises(ValueError, match=f'arch leaf only/{leaf} is'):
    model.apply(variables, x)


@pytest.mark.parametrize('name', CASES)
def test_a_traced_soft_leaf_gives_nan(name):
  layer, shape, leaf = CASES[name]
  x = jnp.ones(shape)
  variables = layer.init(jax.random.key(0), x)

  @jax.jit
  def apply(one_hot):
    return layer.apply({**variables, 'arch': {leaf: one_hot}}, x)

  assert np.isfinite(apply(np.asarray([0, 1], np.float32))).all()
  assert np.isnan(apply(SOFT)).all()


@pytest.mark.parametrize('transform', [lambda f: f, jax.jit])
def test_a_soft_leaf_of_branches_is_their_mean(transform):
  # The warm-up of TuNAS. At the centre of a map of ones the kernel of 1 gives
  # its only tap, 2, and that of 3 the sum of its nine taps of 1: 9. The map is
  # 3x3, so there nothing is padding. The mean is (2 + 9) / 2.
  layer, x = conv(sizes.BRANCHES), jnp.ones((1, 3, 3, 1))
  params = dict(
    kernel1=jnp.full((1, 1, 1, 1), 2.0), kernel3=jnp.ones((3, 3, 1, 1))
  )

  @transform
  def apply(one_hot):
    return layer.apply({'params': params, 'arch': {'kernel': one_hot}}, x)

  assert apply(SOFT)[0, 1, 1, 0] == 5.5
