"""ResNet for small images: He et al. 2015 (arXiv:1512.03385), section 4.2.

A 3x3 stem and three stages of n blocks of two 3x3 convolutions, depth 6n + 2.
Departs from it in one point: where a stage changes the shape, the shortcut is a
1x1 projection (their option B) instead of padding with zeros.
"""

import functools
from typing import Any, ClassVar

import flax.linen as nn
import jax

_STAGES = 3


class ResNetCifar(nn.Module):
  """ResNet-8, -14, -20, ... for images of 8 to 32 pixels.

  Attributes:
    num_classes: size of the output.
    depth: 6n + 2 layers with parameters.
    filters: channels of the first stage; they double at each stage.
    conv: constructor of convolutions.
    dense: constructor of dense layers.
  """

  input_shape: ClassVar[tuple[int, int, int]] = (32, 32, 3)

  num_classes: int
  depth: int = 20
  filters: int = 16
  conv: Any = nn.Conv
  dense: Any = nn.Dense

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
      nn.BatchNorm, use_running_average=not train, momentum=0.9
    )
    conv = functools.partial(
      self.conv,
      use_bias=False,
      kernel_init=nn.initializers.variance_scaling(2.0, 'fan_out', 'normal'),
    )
    x = conv(self.filters, (3, 3), name='stem')(x)
    x = nn.relu(norm(name='stem_norm')(x))
    for stage in range(_STAGES):
      for block in range((self.depth - 2) // 6):
        strides = 2 if stage > 0 and block == 0 else 1
        x = _Block(
          self.filters * 2**stage,
          strides,
          conv,
          norm,
          name=f'stage{stage}_block{block}',
        )(x)
    x = x.mean(axis=(1, 2))
    return self.dense(self.num_classes, name='head')(x)


class _Block(nn.Module):
  filters: int
  strides: int
  conv: Any
  norm: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    shortcut = x
    x = self.conv(self.filters, (3, 3), self.strides, name='conv0')(x)
    x = nn.relu(self.norm(name='norm0')(x))
    x = self.conv(self.filters, (3, 3), name='conv1')(x)
    x = self.norm(name='norm1')(x)
    if shortcut.shape != x.shape:
      shortcut = self.conv(self.filters, (1, 1), self.strides, name='shortcut')(
        shortcut
      )
      shortcut = self.norm(name='shortcut_norm')(shortcut)
    return nn.relu(x + shortcut)
