"""MobileNetV2: Sandler et al. 2018 (arXiv:1801.04381), Table 2.

The variant whose bit operations are the paper's (Figures 17 and 23): every
channel count, the stem's included, is `make_divisible(c * width, 8)`, and the
last 1x1 convolution never shrinks below 1280. 53 layers, 17 of them depthwise.
"""

import functools
import math
from typing import Any, ClassVar

import flax.linen as nn
import jax

# Expansion, channels, blocks, stride of the first block.
_STAGES = (
  (1, 16, 1, 1),
  (6, 24, 2, 2),
  (6, 32, 3, 2),
  (6, 64, 4, 2),
  (6, 96, 3, 1),
  (6, 160, 3, 2),
  (6, 320, 1, 1),
)


def make_divisible(channels: float, divisor: int = 8) -> int:
  """Returns `channels` rounded to a multiple, at most a tenth below it."""
  rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
  return rounded + divisor if rounded < 0.9 * channels else rounded


class MobileNetV2(nn.Module):
  """Inverted bottlenecks with linear projections.

  Attributes:
    num_classes: size of the output.
    width: multiplier of all channels.
    depth: multiplier of the blocks of a stage, rounded up; not 1 only in tests
      and smoke runs.
    dropout: rate before the classifier.
    conv: constructor of convolutions.
    dense: constructor of dense layers.
  """

  input_shape: ClassVar[tuple[int, int, int]] = (224, 224, 3)

  num_classes: int
  width: float = 1.0
  depth: float = 1.0
  dropout: float = 0.2
  conv: Any = nn.Conv
  dense: Any = nn.Dense

  def __post_init__(self):
    if self.width <= 0 or self.depth <= 0:
      raise ValueError(
        f'model.width={self.width} and model.depth={self.depth} must be '
        'positive'
      )
    super().__post_init__()

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """Returns logits [N, num_classes] of images [N, H, W, 3]."""
    norm = functools.partial(
      nn.BatchNorm,
      use_running_average=not train,
      momentum=0.99,
      epsilon=1e-3,
    )
    conv = functools.partial(
      self.conv,
      use_bias=False,
      kernel_init=nn.initializers.variance_scaling(2.0, 'fan_out', 'normal'),
    )
    x = conv(make_divisible(32 * self.width), (3, 3), 2, name='stem')(x)
    x = nn.relu6(norm(name='stem_norm')(x))
    for stage, (expansion, channels, blocks, stride) in enumerate(_STAGES):
      for block in range(math.ceil(blocks * self.depth)):
        x = _InvertedBottleneck(
          make_divisible(channels * self.width),
          expansion,
          stride if block == 0 else 1,
          conv,
          norm,
          name=f'stage{stage}_block{block}',
        )(x)
    x = conv(make_divisible(1280 * max(1, self.width)), (1, 1), name='top')(x)
    x = nn.relu6(norm(name='top_norm')(x))
    x = x.mean(axis=(1, 2))
    x = nn.Dropout(self.dropout, deterministic=not train)(x)
    return self.dense(self.num_classes, name='head')(x)


class _InvertedBottleneck(nn.Module):
  channels: int
  expansion: int
  strides: int
  conv: Any
  norm: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    residual = x
    expanded = self.expansion * x.shape[-1]
    if self.expansion > 1:
      x = self.conv(expanded, (1, 1), name='expand')(x)
      x = nn.relu6(self.norm(name='expand_norm')(x))
    x = self.conv(
      expanded,
      (3, 3),
      self.strides,
      feature_group_count=expanded,
      name='depthwise',
    )(x)
    x = nn.relu6(self.norm(name='depthwise_norm')(x))
    x = self.conv(self.channels, (1, 1), name='project')(x)
    x = self.norm(name='project_norm')(x)
    return x + residual if residual.shape == x.shape else x
