"""EDSR: Lim et al. 2017 (arXiv:1707.02921), super-resolution by residuals.

Residual blocks without norms work on the small picture, and sub-pixel
convolutions enlarge it. A picture is not added to an enlarged input.
"""

import functools
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

# Mean red, green and blue of DIV2K, which the paper subtracts.
_MEAN = np.array([0.4488, 0.4371, 0.4040], np.float32)
# The paper scales residuals of wide networks, which are unstable otherwise.
_WIDE, _RESIDUAL = 256, 0.1
# PyTorch's initial weights, as in the authors' code. Linen's have three times
# their variance, and the residuals of a new network are mostly noise: a small
# one is 1.3 dB worse (RGB) after 600 steps.
_INITIAL = nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')
# The factors of enlargement, one after the other, by scale.
_STAGES = {2: (2,), 3: (3,), 4: (2, 2)}


class EDSR(nn.Module):
  """EDSR for pictures in [0, 1]; 16 blocks of 64 channels are its baseline.

  The large network of the paper has 32 blocks of 256 channels.

  Attributes:
    scale: factor of enlargement, 2, 3 or 4.
    blocks: number of residual blocks.
    channels: number of channels.
    conv: constructor of convolutions.
    dtype: type in which layers compute; parameters stay float32.
  """

  input_shape: ClassVar[tuple[int, int, int]] = (48, 48, 3)

  scale: int = 2
  blocks: int = 16
  channels: int = 64
  conv: Any = nn.Conv
  dtype: Any = None

  def __post_init__(self):
    if self.scale not in _STAGES:
      raise ValueError(
        f'model.scale={self.scale} is no scale of EDSR; allowed: '
        f'{", ".join(map(str, _STAGES))}'
      )
    super().__post_init__()

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """Returns pictures [N, scale H, scale W, 3] of pictures [N, H, W, 3]."""
    del train  # Nothing is random, and there are no norms.
    conv = functools.partial(
      self.conv, kernel_size=(3, 3), dtype=self.dtype, kernel_init=_INITIAL
    )
    factor = _RESIDUAL if self.channels >= _WIDE else 1.0
    mean = _MEAN.reshape(1, 1, 1, 3)
    x = jnp.asarray(x - mean, self.dtype)
    x = shortcut = conv(self.channels, name='head')(x)
    for i in range(self.blocks):
      y = nn.relu(conv(self.channels, name=f'block{i}_conv0')(x))
      y = conv(self.channels, name=f'block{i}_conv1')(y)
      x = x + factor * y
    x = conv(self.channels, name='body')(x) + shortcut
    for i, enlarged in enumerate(_STAGES[self.scale]):
      x = conv(self.channels * enlarged**2, name=f'enlarge{i}')(x)
      x = shuffled(x, enlarged)
    x = conv(3, name='tail')(x)
    return jnp.asarray(x, jnp.float32) + mean


def shuffled(x: jax.Array, factor: int) -> jax.Array:
  """Returns [N, f H, f W, C] of [N, H, W, f f C] (Shi et al. 2016, Eq. 4).

  Channel (i f + j) C + c becomes channel c of row i and column j of a block of
  f x f pixels.

  Args:
    x: [N, H, W, factor^2 C].
    factor: f, height and width of a block.
  """
  count, height, width, channels = x.shape
  depth = channels // factor**2
  x = x.reshape(count, height, width, factor, factor, depth)
  x = x.transpose(0, 1, 3, 2, 4, 5)
  return x.reshape(count, factor * height, factor * width, depth)
