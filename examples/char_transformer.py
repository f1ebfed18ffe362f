"""Small causal transformer in plain linen, without any code for the search."""

import flax.linen as nn
import jax
import jax.numpy as jnp


class Block(nn.Module):
  """One block of the scanned stack: attention, then two dense layers."""

  heads: int
  deterministic: bool

  @nn.compact
  def __call__(self, x: jax.Array, mask: jax.Array):
    h = nn.LayerNorm()(x)
    h = nn.MultiHeadDotProductAttention(
      self.heads, deterministic=self.deterministic, name='attention'
    )(h, mask=mask)
    x = x + nn.Dropout(0.1, deterministic=self.deterministic)(h)
    h = nn.LayerNorm()(x)
    h = nn.gelu(nn.Dense(4 * x.shape[-1], name='up')(h))
    return x + nn.Dense(x.shape[-1], name='down')(h), None


class CharTransformer(nn.Module):
  """Predicts the next character: [N, T] int to [N, T, vocabulary] logits."""

  vocabulary: int = 128
  width: int = 32
  heads: int = 2
  depth: int = 3
  length: int = 32

  @nn.compact
  def __call__(self, tokens: jax.Array, *, deterministic: bool) -> jax.Array:
    positions = self.param(
      'positions', nn.initializers.normal(0.02), (self.length, self.width)
    )
    x = nn.Embed(self.vocabulary, self.width, name='embed')(tokens)
    x = x + jnp.expand_dims(positions[: tokens.shape[1]], 0)
    mask = nn.make_causal_mask(tokens)
    stack = nn.scan(
      nn.remat(Block, prevent_cse=False),
      variable_axes={'params': 0},
      split_rngs={'params': True, 'dropout': True},
      in_axes=nn.broadcast,
      length=self.depth,
    )
    x, _ = stack(self.heads, deterministic, name='blocks')(x, mask)
    return nn.Dense(self.vocabulary, name='head')(nn.LayerNorm()(x))
