"""InceptionV3: Szegedy et al. 2015 (arXiv:1512.00567), Table 1, on 224 pixels.

The paper does not say which InceptionV3 it uses. With this stem every published
cost (Figures 18 and 24) is met to 0.11 %; it was selected among thousands of
stems, because the usual one (TF-Slim's, the code of the authors) is 5.5 % too
cheap at 224 pixels. The network has 96 layers.

It differs from TF-Slim's network in these points:
  * the stem is that of Table 1 (3x3 convolutions to 288 channels, no second
    pool), with paddings that fit the costs: SAME, SAME, VALID, VALID, VALID,
    VALID, SAME; so all three modules of the first size take 288 channels;
  * channels are `int(c * width)`, without a least number;
  * there is no auxiliary classifier;
  * batch norm's momentum, see the attribute.
"""

from collections.abc import Sequence
import functools
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

_SMALLEST_IMAGE = 73  # Leaves one pixel after the last reduction.

# The branches of each module: TF-Slim's Mixed_5c, _6a, _7a, _7b and, for a
# given number of channels, _6b to _6e. Each element of a branch is a
# convolution: channels, kernel, stride; stride 2 pads VALID. _FORK is a 1x3 and
# a 3x1 convolution of the same input. Pools are 3x3.
_AVG_POOL = 'average pool'
_MAX_POOL = 'max pool, stride 2'
_FORK = (1, 3), (3, 1)

_MIXED_5 = (
  ((64, (1, 1), 1),),
  ((48, (1, 1), 1), (64, (5, 5), 1)),
  ((64, (1, 1), 1), (96, (3, 3), 1), (96, (3, 3), 1)),
  (_AVG_POOL, (64, (1, 1), 1)),
)
_MIXED_6A = (
  ((384, (3, 3), 2),),
  ((64, (1, 1), 1), (96, (3, 3), 1), (96, (3, 3), 2)),
  (_MAX_POOL,),
)
_MIXED_7A = (
  ((192, (1, 1), 1), (320, (3, 3), 2)),
  (
    (192, (1, 1), 1),
    (192, (1, 7), 1),
    (192, (7, 1), 1),
    (192, (3, 3), 2),
  ),
  (_MAX_POOL,),
)
_MIXED_7 = (
  ((320, (1, 1), 1),),
  ((384, (1, 1), 1), (384, _FORK, 1)),
  ((448, (1, 1), 1), (384, (3, 3), 1), (384, _FORK, 1)),
  (_AVG_POOL, (192, (1, 1), 1)),
)
_MIXED_6_CHANNELS = (128, 160, 160, 192)


def _mixed_6(channels: int):
  return (
    ((192, (1, 1), 1),),
    ((channels, (1, 1), 1), (channels, (1, 7), 1), (192, (7, 1), 1)),
    (
      (channels, (1, 1), 1),
      (channels, (7, 1), 1),
      (channels, (1, 7), 1),
      (channels, (7, 1), 1),
      (192, (1, 7), 1),
    ),
    (_AVG_POOL, (192, (1, 1), 1)),
  )


class InceptionV3(nn.Module):
  """InceptionV3: modules of three sizes, with a reduction between two sizes.

  Attributes:
    num_classes: number of outputs.
    width: multiplier of all channels.
    modules: number of inception modules of each size, without the reductions.
      Tests and smoke runs use fewer than published.
    norm_momentum: momentum of the running averages of batch norm. TF-Slim's
      0.9997 is for many more and smaller batches; in the 30,200 steps of the
      paper's runs its averages would lag behind the weights.
    dropout: probability of dropout before the classifier.
    conv: constructor of convolutions.
    dense: constructor of dense layers.
    dtype: type in which layers and norms compute; parameters stay float32.
  """

  input_shape: ClassVar[tuple[int, int, int]] = (224, 224, 3)

  num_classes: int
  width: float = 1.0
  modules: Sequence[int] = (3, 4, 2)
  norm_momentum: float = 0.99
  dropout: float = 0.2
  conv: Any = nn.Conv
  dense: Any = nn.Dense
  dtype: Any = None

  def __post_init__(self):
    if 32 * self.width < 1:
      raise ValueError(
        f'model.width={self.width} leaves no channel; it must be at least 1/32'
      )
    most = (3, len(_MIXED_6_CHANNELS), 2)
    if len(self.modules) != 3 or not all(
      1 <= n <= limit for n, limit in zip(self.modules, most)
    ):
      raise ValueError(
        f'model.modules={tuple(self.modules)} must be three numbers, from '
        f'(1, 1, 1) to {most}'
      )
    super().__post_init__()

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """Returns logits [N, num_classes] of images [N, H, W, 3].

    Raises:
      ValueError: height or width is below 73 pixels.
    """
    if min(x.shape[1:3]) < _SMALLEST_IMAGE:
      raise ValueError(
        f'images of {x.shape[1]}x{x.shape[2]} pixels are too small for '
        f'InceptionV3: they must have at least '
        f'{_SMALLEST_IMAGE}x{_SMALLEST_IMAGE}'
      )
    init = nn.initializers.variance_scaling(2.0, 'fan_in', 'truncated_normal')
    unit = functools.partial(
      _ConvNorm,
      functools.partial(
        self.conv, use_bias=False, kernel_init=init, dtype=self.dtype
      ),
      functools.partial(
        nn.BatchNorm,
        use_running_average=not train,
        momentum=self.norm_momentum,
        epsilon=1e-3,
        use_scale=False,
        dtype=self.dtype,
      ),
      self.width,
    )
    x = jnp.asarray(x, self.dtype)
    x = unit(32, (3, 3), 2, 'SAME', name='stem0')(x)
    x = unit(32, (3, 3), name='stem1')(x)
    x = unit(64, (3, 3), padding='VALID', name='stem2')(x)
    x = nn.max_pool(x, (3, 3), (2, 2))
    x = unit(80, (3, 3), padding='VALID', name='stem3')(x)
    x = unit(192, (3, 3), 2, 'VALID', name='stem4')(x)
    x = unit(288, (3, 3), name='stem5')(x)
    for i in range(self.modules[0]):
      x = _Mixed(_MIXED_5, unit, name=f'mixed5_{i}')(x)
    x = _Mixed(_MIXED_6A, unit, name='reduction5')(x)
    for i in range(self.modules[1]):
      branches = _mixed_6(_MIXED_6_CHANNELS[i])
      x = _Mixed(branches, unit, name=f'mixed6_{i}')(x)
    x = _Mixed(_MIXED_7A, unit, name='reduction6')(x)
    for i in range(self.modules[2]):
      x = _Mixed(_MIXED_7, unit, name=f'mixed7_{i}')(x)
    x = x.mean(axis=(1, 2))
    x = nn.Dropout(self.dropout, deterministic=not train)(x)
    head = self.dense(
      self.num_classes, kernel_init=init, dtype=self.dtype, name='head'
    )
    return jnp.asarray(head(x), jnp.float32)


class _ConvNorm(nn.Module):
  conv: Any
  norm: Any
  width: float
  channels: int
  kernel: tuple[int, int]
  strides: int = 1
  padding: str = 'SAME'

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    x = self.conv(
      int(self.channels * self.width),
      self.kernel,
      self.strides,
      padding=self.padding,
      name='conv',
    )(x)
    return nn.relu(self.norm(name='norm')(x))


class _Mixed(nn.Module):
  branches: tuple
  unit: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    outputs = []
    for b, branch in enumerate(self.branches):
      heads = [x]
      for s, step in enumerate(branch):
        heads = self._step(heads, step, f'branch{b}_{s}')
      outputs += heads
    return jnp.concatenate(outputs, axis=-1)

  def _step(self, heads: list, step: Any, name: str) -> list:
    (x,) = heads  # A fork is the last element of its branch.
    if step == _AVG_POOL:
      return [nn.avg_pool(x, (3, 3), padding='SAME', count_include_pad=False)]
    if step == _MAX_POOL:
      return [nn.max_pool(x, (3, 3), (2, 2))]
    channels, kernel, strides = step
    if kernel == _FORK:
      return [
        self.unit(channels, k, name=f'{name}_{k[0]}x{k[1]}')(x) for k in _FORK
      ]
    padding = 'SAME' if strides == 1 else 'VALID'
    return [self.unit(channels, kernel, strides, padding, name=name)(x)]
