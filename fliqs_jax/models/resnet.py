"""ResNet for ImageNet: He et al. 2015 (arXiv:1512.03385), Table 1.

This is the variant whose bit operations are the paper's (Figures 15, 16, 21,
22). It differs from He et al. in these points:
  * a width multiplier scales all channels, the stem's included;
  * every stage begins with a 1x1 projection, also the first one, whose shape
    does not change in ResNet-18 and -34;
  * the stride of a bottleneck is in its 3x3 convolution (v1.5, Gross and Wilber
    2016), not in its first 1x1;
  * the scale of the last batch norm of each block starts at zero, and the
    classifier at a standard deviation of 0.01: Goyal et al. 2017
    (arXiv:1706.02677), section 5.1.
"""

import functools
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from fliqs_jax.layers import channel_masks
from fliqs_jax.space import sizes as sizes_lib

between = sizes_lib.between

# {depth: blocks per stage, whether they are bottlenecks}. He et al. have no 10
# and 14, which are the smallest of either kind, for tests and smoke runs.
DEPTHS = {
  10: ((1, 1, 1, 1), False),
  14: ((1, 1, 1, 1), True),
  18: ((2, 2, 2, 2), False),
  34: ((3, 4, 6, 3), False),
  50: ((3, 4, 6, 3), True),
  101: ((3, 4, 23, 3), True),
  152: ((3, 8, 36, 3), True),
}


class ResNet(nn.Module):
  """ResNet for ImageNet: ResNet-18, ResNet-50 and others.

  Open sizes: the channels of each stage, which its blocks and shortcuts share,
  and the inner channels of each block, one number for both inner tensors of a
  bottleneck.

  Attributes:
    num_classes: number of outputs.
    depth: number of layers with parameters, without projections; a key of
      `DEPTHS`.
    width: multiplier of all channels.
    sizes: the open sizes of the network, or the selected ones.
    conv: constructor of convolutions.
    dense: constructor of dense layers.
    dtype: type in which layers and norms compute; parameters stay float32.
  """

  input_shape: ClassVar[tuple[int, int, int]] = (224, 224, 3)

  num_classes: int
  depth: int = 50
  width: float = 1.0
  sizes: sizes_lib.Sizes = sizes_lib.Sizes()
  conv: Any = nn.Conv
  dense: Any = nn.Dense
  dtype: Any = None

  def __post_init__(self):
    if self.depth not in DEPTHS:
      allowed = ', '.join(map(str, DEPTHS))
      raise ValueError(f'model.depth={self.depth} must be one of {allowed}')
    if 64 * self.width < 1:
      raise ValueError(
        f'model.width={self.width} leaves no channel; it must be at least 1/64'
      )
    super().__post_init__()

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """Returns logits [N, num_classes] of images [N, H, W, 3]."""
    norm = functools.partial(
      channel_masks.BatchNorm,
      use_running_average=not train,
      momentum=0.9,
      epsilon=1e-5,
      dtype=self.dtype,
    )
    conv = functools.partial(
      self.conv,
      use_bias=False,
      dtype=self.dtype,
      kernel_init=nn.initializers.variance_scaling(2.0, 'fan_out', 'normal'),
    )
    filters = int(64 * self.width)
    blocks, bottleneck = DEPTHS[self.depth]
    # Padding is symmetric, as in He et al.: SAME would shift strided windows.
    channels = sizes_lib.constant(filters)
    x = jnp.asarray(x, self.dtype)
    x = conv(filters, (7, 7), 2, padding=3, name='stem')(x)
    x = nn.relu(norm(channels=channels, name='stem_norm')(x))
    x = nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
    for stage, count in enumerate(blocks):
      inner = filters * 2**stage
      outputs = self.sizes.channels(
        f'stage{stage}', 4 * inner if bottleneck else inner
      )
      for block in range(count):
        name = f'stage{stage}_block{block}'
        x = _Block(
          channels,
          self.sizes.channels(name, inner),
          outputs,
          2 if stage > 0 and block == 0 else 1,
          bottleneck,
          block == 0,
          conv,
          norm,
          name=name,
        )(x)
        channels = outputs
    x = x.mean(axis=(1, 2))
    head = between(self.dense, channels, sizes_lib.constant(self.num_classes))
    x = head(
      kernel_init=nn.initializers.normal(0.01), dtype=self.dtype, name='head'
    )(x)
    return jnp.asarray(x, jnp.float32)


class _Block(nn.Module):
  inputs: sizes_lib.Channels
  inner: sizes_lib.Channels
  outputs: sizes_lib.Channels
  strides: int
  bottleneck: bool
  project: bool
  conv: Any
  norm: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    convs = [(self.inner, 3, self.strides), (self.outputs, 3, 1)]
    if self.bottleneck:
      convs = [
        (self.inner, 1, 1),
        (self.inner, 3, self.strides),
        (self.outputs, 1, 1),
      ]
    shortcut = x
    if self.project:
      shortcut = between(self.conv, self.inputs, self.outputs)(
        kernel_size=(1, 1), strides=self.strides, name='shortcut'
      )(x)
      norm = self.norm(channels=self.outputs, name='shortcut_norm')
      shortcut = norm(shortcut)
    inputs = self.inputs
    for i, (channels, size, strides) in enumerate(convs):
      is_last = i == len(convs) - 1
      x = between(self.conv, inputs, channels)(
        kernel_size=(size, size),
        strides=strides,
        padding=size // 2,
        name=f'conv{i}',
      )(x)
      x = self.norm(
        channels=channels,
        scale_init=nn.initializers.constant(0.0 if is_last else 1.0),
        name=f'norm{i}',
      )(x)
      x = nn.relu(x + shortcut if is_last else x)
      inputs = channels
    return x
