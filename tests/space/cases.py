"""Networks that tests of costs share: one of formats, one of sizes, too."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from fliqs_jax.layers import channel_masks
from fliqs_jax.layers import quant_layers
from fliqs_jax.space import discovery
from fliqs_jax.space import quant_spec
from fliqs_jax.space import sizes

INPUT = jax.ShapeDtypeStruct((1, 8, 8, 4), jnp.float32)


class Net(nn.Module):
  """Three layers of three kinds."""

  spec: quant_spec.QuantSpec

  @nn.compact
  def __call__(self, x):
    conv = functools.partial(quant_layers.QuantConv, spec=self.spec)
    x = conv(6, (3, 3), strides=2, name='conv')(x)
    x = conv(6, (3, 3), feature_group_count=6, name='depthwise')(x)
    x = x.mean(axis=(1, 2))
    return quant_layers.QuantDense(5, spec=self.spec, name='head')(x)


between = sizes.between
IMAGE = jax.ShapeDtypeStruct((1, 5, 5, 3), jnp.float32)
SPEC = quant_spec.QuantSpec(
  ('INT4', 'BF16'),
  menus=(('depthwise', 'INT8'), ('head', 'INT4')),
  groups=(('outer', 'stem'), ('outer', 'project')),
)


class SizedNet(nn.Module):
  """Each kind of layer once, of few enough decisions to enumerate.

  An inverted bottleneck whose hidden channels are six times the first, with
  squeeze-and-excitation, and dense layers. The `first` channels scale both
  sides of `expand`, the `last` both of `square`.
  """

  sizes: sizes.Sizes

  @nn.compact
  def __call__(self, x):
    conv = functools.partial(quant_layers.QuantConv, spec=SPEC, use_bias=False)
    dense = functools.partial(quant_layers.QuantDense, spec=SPEC)
    norm = functools.partial(channel_masks.BatchNorm, use_running_average=True)
    image, classes = sizes.constant(3), sizes.constant(3)
    first = self.sizes.channels('first', 4)
    hidden = first.scaled(lambda count: 6 * count)
    squeezed = first.scaled(lambda count: count // 2)
    last = self.sizes.channels('last', 4, lambda count: 2 * int(count) - 2)
    kernel = self.sizes.kernel('middle', 3)

    def layer(make, inputs, outputs, name, kernel=None, **fields):
      make = between(make, inputs, outputs, kernel)
      return make(name=name, **fields)

    x = layer(conv, image, first, 'stem', kernel_size=(3, 3), strides=2)(x)
    x = norm(channels=first, name='stem_norm')(x)
    x = layer(conv, first, hidden, 'expand', kernel_size=(1, 1))(x)
    x = norm(channels=hidden, name='expand_norm')(x)
    x = layer(
      functools.partial(conv, use_bias=True),
      hidden,
      hidden,
      'depthwise',
      kernel,
      feature_group_count=hidden.size,
    )(x)
    gate = layer(channel_masks.Dense, hidden, squeezed, 'squeeze')(x)
    x = x * layer(channel_masks.Dense, squeezed, hidden, 'excite')(gate)
    x = layer(conv, hidden, last, 'project', kernel_size=(1, 1))(x)
    x = norm(channels=last, use_scale=False, name='project_norm')(x)
    x = x.mean(axis=(1, 2))
    x = layer(dense, last, last, 'square')(x)
    x = channel_masks.Mask(last, name='square_mask')(x)
    return layer(dense, last, classes, 'head')(x)


def find(open_sizes):
  return discovery.find(SizedNet(open_sizes), IMAGE, spec=SPEC)


def opened(kernel_weights):
  return find(sizes.Sizes((0.5, 1.0), (3, 5), kernel_weights))
