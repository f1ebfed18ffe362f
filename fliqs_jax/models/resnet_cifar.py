"""ResNet for small images: He et al. 2015 (arXiv:1512.03385), section 4.2.

It has a 3x3 stem and three stages of n blocks of two 3x3 convolutions: depth
6n + 2. It differs from He et al. in one point: if a stage changes the shape,
the shortcut is a 1x1 projection (their option B) instead of padding with zeros.
"""

import functools
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from fliqs_jax.layers import channel_masks
from fliqs_jax.space import sizes as sizes_lib

between = sizes_lib.between

_STAGES = 3


class ResNetCifar(nn.Module):
  """ResNet-8, -14, -20, ... for images of 8 to 32 pixels.

  Open sizes: the channels of each stage, which its blocks and shortcuts share
  (the first with the stem, whose output is its shortcut), and the inner
  channels of each block.

  Attributes:
    num_classes: number of outputs.
    depth: number of layers with parameters, 6n + 2.
    filters: number of channels of the first stage; each stage doubles it.
    sizes: the open sizes of the network, or the selected ones.
    conv: constructor of convolutions.
    dense: constructor of dense layers.
    dtype: type in which layers and norms compute; parameters stay float32.
  """

  input_shape: ClassVar[tuple[int, int, int]] = (32, 32, 3)

  num_classes: int
  depth: int = 20
  filters: int = 16
  sizes: sizes_lib.Sizes = sizes_lib.Sizes()
  conv: Any = nn.Conv
  dense: Any = nn.Dense
  dtype: Any = None

  def __post_init__(self):
    if self.depth < 8 or (self.depth - 2) % 6:
      raise ValueError(
        f'model.depth={self.depth} must be 6n + 2: 8, 14, 20, ...'
      )
    if self.filters < 1:
      raise ValueError(f'model.filters={self.filters} must be at least 1')
    super().__post_init__()

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """Returns logits [N, num_classes] of images [N, H, W, C]."""
    norm = functools.partial(
      channel_masks.BatchNorm,
      use_running_average=not train,
      momentum=0.9,
      dtype=self.dtype,
    )
    conv = functools.partial(
      self.conv,
      use_bias=False,
      dtype=self.dtype,
      kernel_init=nn.initializers.variance_scaling(2.0, 'fan_out', 'normal'),
    )
    x = jnp.asarray(x, self.dtype)
    channels = self.sizes.channels('stage0', self.filters)
    image = sizes_lib.constant(x.shape[-1])
    x = between(conv, image, channels)(kernel_size=(3, 3), name='stem')(x)
    x = nn.relu(norm(channels=channels, name='stem_norm')(x))
    for stage in range(_STAGES):
      filters = self.filters * 2**stage
      outputs = self.sizes.channels(f'stage{stage}', filters)
      for block in range((self.depth - 2) // 6):
        name = f'stage{stage}_block{block}'
        x = _Block(
          channels,
          self.sizes.channels(name, filters),
          outputs,
          stage > 0 and block == 0,
          conv,
          norm,
          name=name,
        )(x)
        channels = outputs
    x = x.mean(axis=(1, 2))
    classes = sizes_lib.constant(self.num_classes)
    head = between(self.dense, channels, classes)
    x = head(dtype=self.dtype, name='head')(x)
    return jnp.asarray(x, jnp.float32)


class _Block(nn.Module):
  inputs: sizes_lib.Channels
  inner: sizes_lib.Channels
  outputs: sizes_lib.Channels
  shrinks: bool
  conv: Any
  norm: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    shortcut, strides = x, 2 if self.shrinks else 1
    conv0 = between(self.conv, self.inputs, self.inner)
    x = conv0(kernel_size=(3, 3), strides=strides, name='conv0')(x)
    x = nn.relu(self.norm(channels=self.inner, name='norm0')(x))
    conv1 = between(self.conv, self.inner, self.outputs)
    x = conv1(kernel_size=(3, 3), name='conv1')(x)
    x = self.norm(channels=self.outputs, name='norm1')(x)
    if self.shrinks:
      project = between(self.conv, self.inputs, self.outputs)
      shortcut = project(kernel_size=(1, 1), strides=2, name='shortcut')(
        shortcut
      )
      norm = self.norm(channels=self.outputs, name='shortcut_norm')
      shortcut = norm(shortcut)
    return nn.relu(x + shortcut)
