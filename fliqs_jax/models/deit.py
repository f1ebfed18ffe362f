"""DeiT: Touvron et al. 2020 (arXiv:2012.12877), without distillation.

It is a ViT (Dosovitskiy et al. 2020, arXiv:2010.11929): patch embedding, class
token, learned position embedding, pre-norm blocks, and a classifier that reads
the class token. The products of attention, QK^T and AV, are neither quantized
nor counted, and the classifier stays at 16 bits. Its costs then equal the
paper's (Figures 20 and 26), except at 0.25x, where this network is 15 % cheaper
than printed. Query, key and value are separate layers: 73 quantized layers.

It differs from Touvron et al. in these points:
  * a width multiplier scales the hidden size while the number of heads stays
    (the paper is silent about heads; costs do not depend on them);
  * the patch embedding is initialised like every other layer; PyTorch's default
    has the same standard deviation, 0.021, but is uniform.
"""

import functools
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

# A normal distribution: timm's truncation, at 2, is a hundred standard
# deviations away.
_INIT = nn.initializers.normal(0.02)


class DeiT(nn.Module):
  """DeiT; the defaults are DeiT-B.

  DeiT-Ti has a hidden size of 192 and 3 heads, DeiT-S 384 and 6 heads.

  Attributes:
    num_classes: number of outputs.
    hidden: number of channels of a token.
    heads: number of heads of attention.
    width: multiplier of the number of channels of a token.
    depth: number of blocks.
    patch: height and width of a patch, in pixels.
    drop_path: probability with which either half of the last block is dropped;
      it grows linearly from 0 at the first block.
    conv: constructor of the patch embedding.
    dense: constructor of dense layers.
    dtype: type in which layers and norms compute; parameters stay float32.
  """

  input_shape: ClassVar[tuple[int, int, int]] = (224, 224, 3)
  # Layers that published costs leave at 16 bits, as `QuantSpec.exclude`.
  unquantized: ClassVar[tuple[str, ...]] = ('head',)

  num_classes: int
  hidden: int = 768
  heads: int = 12
  width: float = 1.0
  depth: int = 12
  patch: int = 16
  drop_path: float = 0.1
  conv: Any = nn.Conv
  dense: Any = nn.Dense
  dtype: Any = None

  def __post_init__(self):
    if min(self.heads, self.depth, self.patch) < 1:
      raise ValueError(
        f'model.heads={self.heads}, model.depth={self.depth} and model.patch='
        f'{self.patch} must be at least 1'
      )
    hidden = int(self.hidden * self.width)
    if hidden < 1 or hidden % self.heads:
      raise ValueError(
        f'model.width={self.width}: {hidden} channels must be a positive '
        f'multiple of model.heads={self.heads}'
      )
    super().__post_init__()

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """Returns logits [N, num_classes] of images [N, H, W, 3].

    Raises:
      ValueError: height or width is not a multiple of the patch.
    """
    height, width = x.shape[1:3]
    if height % self.patch or width % self.patch or not height * width:
      raise ValueError(
        f'images of {height}x{width} pixels cannot be cut into patches of '
        f'{self.patch}x{self.patch}: height and width must be multiples of '
        f'{self.patch}, at least {self.patch}'
      )
    hidden = int(self.hidden * self.width)
    dense = functools.partial(self.dense, kernel_init=_INIT, dtype=self.dtype)
    x = self.conv(
      hidden,
      (self.patch, self.patch),
      self.patch,
      padding='VALID',
      kernel_init=_INIT,
      dtype=self.dtype,
      name='patch_embedding',
    )(jnp.asarray(x, self.dtype))
    x = x.reshape((x.shape[0], -1, hidden))
    token = self.param('class_token', _INIT, (1, 1, hidden))
    x = jnp.concatenate(
      [jnp.broadcast_to(token, (x.shape[0], 1, hidden)).astype(x.dtype), x],
      axis=1,
    )
    position = self.param('position', _INIT, (1, x.shape[1], hidden))
    x = x + position.astype(x.dtype)
    rates = np.linspace(0, self.drop_path, self.depth)
    for i, rate in enumerate(rates.tolist()):
      x = _Block(self.heads, rate, dense, name=f'block{i}')(x, train)
    # The classifier reads the class token only.
    x = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name='norm')(x[:, 0])
    x = dense(self.num_classes, name='head')(x)
    return jnp.asarray(x, jnp.float32)


class _Block(nn.Module):
  heads: int
  drop_path: float
  dense: Any

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    def drop_path(y):
      return nn.Dropout(
        self.drop_path, broadcast_dims=(1, 2), deterministic=not train
      )(y)

    batch, tokens, hidden = x.shape
    norm = functools.partial(nn.LayerNorm, epsilon=1e-6, dtype=x.dtype)
    y = norm(name='norm0')(x)
    q, k, v = (
      self.dense(hidden, name=name)(y).reshape((batch, tokens, self.heads, -1))
      for name in ('query', 'key', 'value')
    )
    y = jax.nn.dot_product_attention(q, k, v)
    y = self.dense(hidden, name='out')(y.reshape((batch, tokens, hidden)))
    x = x + drop_path(y)
    y = self.dense(4 * hidden, name='mlp0')(norm(name='norm1')(x))
    y = self.dense(hidden, name='mlp1')(nn.gelu(y, approximate=False))
    return x + drop_path(y)
