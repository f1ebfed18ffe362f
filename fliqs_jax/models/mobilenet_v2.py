"""MobileNetV2: Sandler et al. 2018 (arXiv:1801.04381), Table 2.

This is the variant whose bit operations are the paper's (Figures 17 and 23):
every number of channels, also the stem's, is `make_divisible(c * width, 8)`,
and the last 1x1 convolution has at least 1280. It has 53 layers, 17 of them
depthwise.
"""

from collections.abc import Sequence
import functools
import math
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from fliqs_jax.layers import channel_masks
from fliqs_jax.space import sizes as sizes_lib

between = sizes_lib.between

# Each stage's expansion, channels and blocks.
_STAGES = (
  (1, 16, 1),
  (6, 24, 2),
  (6, 32, 3),
  (6, 64, 4),
  (6, 96, 3),
  (6, 160, 3),
  (6, 320, 1),
)


def make_divisible(channels: float, divisor: int = 8) -> int:
  """Returns `channels` rounded to a multiple, at most 10 % below it."""
  rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
  return rounded + divisor if rounded < 0.9 * channels else rounded


class MobileNetV2(nn.Module):
  """MobileNetV2: inverted bottlenecks with linear projections.

  Open sizes (section 6): the channels of each stage, which its residual blocks
  share, and the kernel of each depthwise convolution. Expanded channels follow
  the block's input.

  Attributes:
    num_classes: number of outputs.
    width: multiplier of all channels.
    depth: multiplier of the blocks of a stage, rounded up; only tests and smoke
      runs use another value than 1.
    strides: strides of the stem and of the first block of each stage; small
      images need others than published.
    dropout: probability of dropout before the classifier.
    sizes: the open sizes of the network, or the selected ones.
    conv: constructor of convolutions.
    dense: constructor of dense layers.
    dtype: type in which layers and norms compute; parameters stay float32.
  """

  input_shape: ClassVar[tuple[int, int, int]] = (224, 224, 3)

  num_classes: int
  width: float = 1.0
  depth: float = 1.0
  strides: Sequence[int] = (2, 1, 2, 2, 2, 1, 2, 1)
  dropout: float = 0.2
  sizes: sizes_lib.Sizes = sizes_lib.Sizes()
  conv: Any = nn.Conv
  dense: Any = nn.Dense
  dtype: Any = None

  def __post_init__(self):
    if self.width <= 0 or self.depth <= 0:
      raise ValueError(
        f'model.width={self.width} and model.depth={self.depth} must be '
        'positive'
      )
    if len(self.strides) != 1 + len(_STAGES) or min(self.strides) < 1:
      raise ValueError(
        f'model.strides={tuple(self.strides)} must be {1 + len(_STAGES)} '
        'positive numbers: one for the stem and one for each stage'
      )
    super().__post_init__()

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """Returns logits [N, num_classes] of images [N, H, W, 3]."""
    norm = functools.partial(
      channel_masks.BatchNorm,
      use_running_average=not train,
      momentum=0.99,
      epsilon=1e-3,
      dtype=self.dtype,
    )
    conv = functools.partial(
      self.conv,
      use_bias=False,
      dtype=self.dtype,
      kernel_init=nn.initializers.variance_scaling(2.0, 'fan_out', 'normal'),
    )
    channels = sizes_lib.constant(make_divisible(32 * self.width))
    x = jnp.asarray(x, self.dtype)
    x = conv(channels.size, (3, 3), self.strides[0], name='stem')(x)
    x = nn.relu6(norm(channels=channels, name='stem_norm')(x))
    for stage, (expansion, filters, blocks) in enumerate(_STAGES):
      outputs = self.sizes.channels(
        f'stage{stage}', make_divisible(filters * self.width), make_divisible
      )
      for block in range(math.ceil(blocks * self.depth)):
        name = f'stage{stage}_block{block}'
        x = _InvertedBottleneck(
          channels,
          outputs,
          self.sizes.kernel(name, 3),
          expansion,
          self.strides[1 + stage] if block == 0 else 1,
          conv,
          norm,
          name=name,
        )(x)
        channels = outputs
    top = sizes_lib.constant(make_divisible(1280 * max(1, self.width)))
    x = between(conv, channels, top)(kernel_size=(1, 1), name='top')(x)
    x = nn.relu6(norm(channels=top, name='top_norm')(x))
    x = x.mean(axis=(1, 2))
    x = nn.Dropout(self.dropout, deterministic=not train)(x)
    x = self.dense(self.num_classes, dtype=self.dtype, name='head')(x)
    return jnp.asarray(x, jnp.float32)


class _InvertedBottleneck(nn.Module):
  inputs: sizes_lib.Channels
  outputs: sizes_lib.Channels
  kernel: sizes_lib.Kernel
  expansion: int
  strides: int
  conv: Any
  norm: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    residual = x
    hidden = self.inputs.scaled(lambda count: self.expansion * count)
    if self.expansion > 1:
      expand = between(self.conv, self.inputs, hidden)
      x = expand(kernel_size=(1, 1), name='expand')(x)
      x = nn.relu6(self.norm(channels=hidden, name='expand_norm')(x))
    depthwise = between(self.conv, hidden, hidden, self.kernel)
    x = depthwise(
      strides=self.strides, feature_group_count=hidden.size, name='depthwise'
    )(x)
    x = nn.relu6(self.norm(channels=hidden, name='depthwise_norm')(x))
    project = between(self.conv, hidden, self.outputs)
    x = project(kernel_size=(1, 1), name='project')(x)
    x = self.norm(channels=self.outputs, name='project_norm')(x)
    # Two stages of equal width have no shortcut between them.
    same = residual.shape == x.shape and self.inputs == self.outputs
    return x + residual if same else x
