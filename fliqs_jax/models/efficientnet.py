"""EfficientNet B0 to B4: Tan and Le 2019 (arXiv:1905.11946), Table 1.

It follows the code of its authors (tensorflow/tpu, models/official): swish,
squeeze-and-excitation in every block, `make_divisible(c * width)` channels,
also in stem and head, `ceil(n * depth)` blocks, and a rate of drop connect that
grows with the block.

Squeeze-and-excitation is neither quantized nor counted: its layers are Flax's
own, not of the given constructor. The costs then equal the paper's (Figures 19
and 25), which would be the same without these layers. 50, 70, 70, 79 and 97
layers are counted.
"""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fliqs_jax.layers import channel_masks
from fliqs_jax.models import mobilenet_v2
from fliqs_jax.space import sizes as sizes_lib

between = sizes_lib.between

# {variant: multiplier of width, of depth, image size in pixels, dropout rate}.
_VARIANTS = {
  'b0': (1.0, 1.0, 224, 0.2),
  'b1': (1.0, 1.1, 240, 0.2),
  'b2': (1.1, 1.2, 260, 0.3),
  'b3': (1.2, 1.4, 300, 0.3),
  'b4': (1.4, 1.8, 380, 0.4),
}
# Each stage's kernel, expansion, channels, blocks, stride of the first block.
_STAGES = (
  (3, 1, 16, 1, 1),
  (3, 6, 24, 2, 2),
  (5, 6, 40, 2, 2),
  (3, 6, 80, 3, 2),
  (5, 6, 112, 3, 1),
  (5, 6, 192, 4, 2),
  (3, 6, 320, 1, 1),
)
_SQUEEZE = 0.25
_FAN_OUT = nn.initializers.variance_scaling(2.0, 'fan_out', 'normal')
# The original computes a depthwise kernel's fan-out without its channels.
_DEPTHWISE = nn.initializers.variance_scaling(2.0, 'fan_in', 'normal')


class EfficientNet(nn.Module):
  """EfficientNet: inverted bottlenecks with squeeze-and-excitation.

  Open sizes: the channels of each stage, which its residual blocks share, and
  the kernel of each depthwise convolution. Expanded channels and those of
  squeeze-and-excitation follow the block's input.

  Attributes:
    num_classes: number of outputs.
    variant: name of the variant, `b0` to `b4`.
    width: multiplier of all channels, besides the variant's.
    depth: multiplier of the blocks of a stage, besides the variant's.
    drop_connect: probability with which the last block would be dropped; that
      of block i of n is i/n of it, and only a block with a shortcut can be
      dropped.
    sizes: the open sizes of the network, or the selected ones.
    conv: constructor of convolutions.
    dense: constructor of the classifier.
    dtype: type in which layers and norms compute; parameters stay float32.
  """

  num_classes: int
  variant: str = 'b0'
  width: float = 1.0
  depth: float = 1.0
  drop_connect: float = 0.2
  sizes: sizes_lib.Sizes = sizes_lib.Sizes()
  conv: Any = nn.Conv
  dense: Any = nn.Dense
  dtype: Any = None

  def __post_init__(self):
    if self.variant not in _VARIANTS:
      raise ValueError(
        f'model.variant={self.variant!r} is unknown; allowed: '
        f'{", ".join(_VARIANTS)}'
      )
    if self.width <= 0 or self.depth <= 0:
      raise ValueError(
        f'model.width={self.width} and model.depth={self.depth} must be '
        'positive'
      )
    super().__post_init__()

  @property
  def input_shape(self) -> tuple[int, int, int]:
    """The shape (H, W, C) of an image for the variant."""
    size = _VARIANTS[self.variant][2]
    return size, size, 3

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """Returns logits [N, num_classes] of images [N, H, W, 3]."""
    width, depth, _, dropout = _VARIANTS[self.variant]

    def scaled(channels):
      return mobilenet_v2.make_divisible(channels * width * self.width)

    norm = functools.partial(
      channel_masks.BatchNorm,
      use_running_average=not train,
      momentum=0.99,
      epsilon=1e-3,
      dtype=self.dtype,
    )
    conv = functools.partial(
      self.conv, use_bias=False, kernel_init=_FAN_OUT, dtype=self.dtype
    )
    inputs = sizes_lib.constant(scaled(32))
    x = jnp.asarray(x, self.dtype)
    x = conv(inputs.size, (3, 3), 2, name='stem')(x)
    x = nn.swish(norm(channels=inputs, name='stem_norm')(x))
    counts = [math.ceil(n * depth * self.depth) for *_, n, _ in _STAGES]
    index = 0
    for stage, (kernel, expansion, channels, _, stride) in enumerate(_STAGES):
      outputs = self.sizes.channels(
        f'stage{stage}', scaled(channels), mobilenet_v2.make_divisible
      )
      for block in range(counts[stage]):
        name = f'stage{stage}_block{block}'
        x = _MBConv(
          inputs,
          outputs,
          self.sizes.kernel(name, kernel),
          expansion,
          stride if block == 0 else 1,
          self.drop_connect * index / sum(counts),
          conv,
          norm,
          name=name,
        )(x, train)
        inputs = outputs
        index += 1
    top = sizes_lib.constant(scaled(1280))
    x = between(conv, inputs, top)(kernel_size=(1, 1), name='top')(x)
    x = nn.swish(norm(channels=top, name='top_norm')(x))
    x = x.mean(axis=(1, 2))
    x = nn.Dropout(dropout, deterministic=not train)(x)
    x = self.dense(
      self.num_classes,
      kernel_init=nn.initializers.variance_scaling(1 / 3, 'fan_out', 'uniform'),
      dtype=self.dtype,
      name='head',
    )(x)
    return jnp.asarray(x, jnp.float32)


class _MBConv(nn.Module):
  inputs: sizes_lib.Channels
  outputs: sizes_lib.Channels
  kernel: sizes_lib.Kernel
  expansion: int
  strides: int
  drop: float
  conv: Any
  norm: Any

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    residual = x
    expanded = self.inputs.scaled(lambda count: self.expansion * count)
    if self.expansion > 1:
      expand = between(self.conv, self.inputs, expanded)
      x = expand(kernel_size=(1, 1), name='expand')(x)
      x = nn.swish(self.norm(channels=expanded, name='expand_norm')(x))
    x = between(self.conv, expanded, expanded, self.kernel)(
      strides=self.strides,
      feature_group_count=expanded.size,
      kernel_init=_DEPTHWISE,
      name='depthwise',
    )(x)
    x = nn.swish(self.norm(channels=expanded, name='depthwise_norm')(x))
    # Squeezed to a share of the block's input, not of the expanded tensor.
    squeezed = self.inputs.scaled(lambda count: max(1, int(count * _SQUEEZE)))
    gate = x.mean(axis=(1, 2), keepdims=True)
    dense = functools.partial(channel_masks.Dense, dtype=x.dtype)
    squeeze = between(dense, expanded, squeezed)
    gate = nn.swish(squeeze(kernel_init=_FAN_OUT, name='squeeze')(gate))
    excite = between(dense, squeezed, expanded)
    gate = excite(kernel_init=_FAN_OUT, name='excite')(gate)
    x = x * nn.sigmoid(gate)
    project = between(self.conv, expanded, self.outputs)
    x = project(kernel_size=(1, 1), name='project')(x)
    x = self.norm(channels=self.outputs, name='project_norm')(x)
    # Two stages of equal width have no shortcut between them.
    if residual.shape != x.shape or self.inputs != self.outputs:
      return x
    x = nn.Dropout(
      self.drop, broadcast_dims=(1, 2, 3), deterministic=not train
    )(x)
    return x + residual
