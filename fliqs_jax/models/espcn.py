"""ESPCN: Shi et al. 2016 (arXiv:1609.05158), super-resolution in real time.

Three convolutions of the small picture, of which the last makes all pixels of
the large one. It differs from the paper in that it enlarges RGB, not the luma
alone.
"""

import functools
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from fliqs_jax.models import edsr


class ESPCN(nn.Module):
  """ESPCN for pictures in [0, 1]: kernels 5, 3, 3, channels 64, 32.

  Its activations are tanh, as in the paper, which finds them better than ReLU
  for super-resolution (section 3.2).

  Attributes:
    scale: factor of enlargement, at least 2.
    conv: constructor of convolutions.
    dtype: type in which layers compute; parameters stay float32.
  """

  input_shape: ClassVar[tuple[int, int, int]] = (48, 48, 3)

  scale: int = 3
  conv: Any = nn.Conv
  dtype: Any = None

  def __post_init__(self):
    if self.scale < 2:
      raise ValueError(f'model.scale={self.scale} must be at least 2')
    super().__post_init__()

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """Returns pictures [N, scale H, scale W, 3] of pictures [N, H, W, 3]."""
    del train  # Nothing is random, and there are no norms.
    conv = functools.partial(self.conv, dtype=self.dtype)
    x = jnp.asarray(x, self.dtype)
    x = nn.tanh(conv(64, (5, 5), name='conv0')(x))
    x = nn.tanh(conv(32, (3, 3), name='conv1')(x))
    x = conv(3 * self.scale**2, (3, 3), name='conv2')(x)
    return jnp.asarray(edsr.shuffled(x, self.scale), jnp.float32)
