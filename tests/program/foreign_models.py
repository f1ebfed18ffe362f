"""Models that were not written for the search, as authors write them."""

import flax.linen as nn
import jax.numpy as jnp

from tests import helpers

TOKENS = jnp.asarray([[1, 2, 3, 10], [0, 5, 5, 7]])
# Iterations of `Stack`.
LENGTH = 3


class Zoo(nn.Module):
  """Most of linen, the way models are written."""

  def setup(self):
    how = dict(kernel_init=helpers.by_key)
    self.embed = nn.Embed(11, 8, embedding_init=helpers.by_key)
    self.conv = nn.Conv(8, (3,), **how)
    self.attention = nn.MultiHeadDotProductAttention(2, **how)
    self.local = nn.ConvLocal(8, (3,), use_bias=False, **how)
    self.transpose = nn.ConvTranspose(8, (3,), **how)
    self.mlp = nn.Sequential([nn.Dense(12, **how), nn.gelu, nn.Dense(8, **how)])
    self.einsum = nn.Einsum((8, 2, 4), 'btd,dhk->bthk', **how)
    self.general = nn.DenseGeneral(8, axis=(-2, -1), **how)
    self.norm = nn.BatchNorm()

  def __call__(self, tokens, train):
    x = self.conv(self.embed(tokens))
    x = x + self.attention(x, sow_weights=True)
    x = self.norm(self.local(x), use_running_average=not train)
    x = self.transpose(self.mlp(x))
    return self.embed.attend(self.general(self.einsum(x)))


class Block(nn.Module):
  dense: type[nn.Module]

  @nn.compact
  def __call__(self, x):
    return nn.tanh(self.dense(8, kernel_init=helpers.by_key, name='dense')(x))


class Twins(nn.Module):
  """Two blocks alike and one layer that is called twice."""

  transform: str = ''
  dense: type[nn.Module] = nn.Dense

  @nn.compact
  def __call__(self, x):
    block = Block
    if self.transform:
      block = getattr(nn, self.transform)(Block)
    shared = self.dense(8, kernel_init=helpers.by_key, name='shared')
    x = block(self.dense, name='b')(block(self.dense, name='a')(shared(x)))
    return shared(x)


JitBlock = nn.jit(Block)


class Early(nn.Module):
  """Its class is jitted once and for all."""

  @nn.compact
  def __call__(self, x):
    return JitBlock(nn.Dense, name='block')(x)


class Body(nn.Module):
  """An iteration of a stack, as authors write it."""

  dense: type[nn.Module] = nn.Dense

  @nn.compact
  def __call__(self, x, _=None):
    h = nn.gelu(
      self.dense(12, kernel_init=helpers.by_key, name='up')(nn.LayerNorm()(x))
    )
    return x + self.dense(8, kernel_init=helpers.by_key, name='down')(h), None


class Stack(nn.Module):
  """Scans over its iterations; `params` alone are lifted."""

  axis: int = 0
  remat: bool = False
  transform: str = 'scan'

  @nn.compact
  def __call__(self, x):
    body = nn.remat(Body) if self.remat else Body
    kwargs = dict(
      variable_axes={'params': self.axis}, split_rngs={'params': True}
    )
    if self.transform == 'vmap':
      x = jnp.broadcast_to(x, (LENGTH, *x.shape))
      return nn.vmap(body, **kwargs)(name='body')(x)[0]
    return nn.scan(body, length=LENGTH, **kwargs)(name='body')(x, None)[0]


class OneWay(nn.Module):
  @nn.compact
  def __call__(self, x):
    return Body(name='body')(x)[0]


class Nested(nn.Module):
  """A scan of a scan, and one that takes every collection along."""

  @nn.compact
  def __call__(self, x):
    kwargs = dict(
      variable_axes={'params': 0}, split_rngs={'params': True}, length=2
    )
    inner = nn.scan(Body, **kwargs)
    x, _ = nn.scan(inner, **kwargs)(name='nested')(x, None)
    return nn.remat_scan(OneWay, lengths=(2, 2))(name='rematted')(x)


class Recurrent(nn.Module):
  """The same weights in every iteration."""

  cell: type[nn.Module] = nn.GRUCell

  @nn.compact
  def __call__(self, x):
    return nn.RNN(self.cell(8), name='rnn')(x)
