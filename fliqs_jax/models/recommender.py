"""Recommender of the paper's A.13: a low-rank MLP over Criteo's features.

Embedded categories and continuous features are concatenated and pass four
hidden layers. Each layer is a factorised product as in DCN-V2 (Wang et al.
2020, arXiv:2008.13535): W = U V, without an activation between the two. Widths
and ranks are those that the paper's search multiplies. A.13 does not describe
the rest: the size and initialisation of the embedding, and ReLU, are those of
DLRM on the same data (Naumov et al. 2019, arXiv:1906.00091, and its code); the
number of buckets is our choice.
"""

from collections.abc import Mapping, Sequence
import functools
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from fliqs_jax.layers import channel_masks
from fliqs_jax.space import sizes as sizes_lib


class Recommender(nn.Module):
  """Recommender: the logit of a click from continuous and categorical features.

  Open sizes (A.13): rank and width of each hidden layer, which are the channels
  of V and of U.

  Attributes:
    buckets: number of hash buckets of each categorical feature.
    embedding_dim: size of the vector of a category.
    hidden: widths of the hidden layers.
    ranks: ranks of the hidden layers' products.
    sizes: the open sizes of the network, or the selected ones.
    dense: constructor of dense layers.
    dtype: type in which layers and norms compute; parameters stay float32.
  """

  # The inputs of one example.
  input_shape: ClassVar[Mapping[str, jax.ShapeDtypeStruct]] = {
    'dense': jax.ShapeDtypeStruct((13,), jnp.float32),
    'ids': jax.ShapeDtypeStruct((26,), jnp.int32),
  }

  buckets: int = 2**15
  embedding_dim: int = 16
  hidden: Sequence[int] = (512,) * 4
  ranks: Sequence[int] = (128,) * 4
  sizes: sizes_lib.Sizes = sizes_lib.Sizes()
  dense: Any = nn.Dense
  dtype: Any = None

  def __post_init__(self):
    if len(self.hidden) != len(self.ranks):
      raise ValueError(
        f'model.hidden={tuple(self.hidden)} and model.ranks='
        f'{tuple(self.ranks)} must each have one number per layer'
      )
    super().__post_init__()

  @nn.compact
  def __call__(self, x: Mapping[str, jax.Array], train: bool) -> jax.Array:
    """Returns logits [N]; their sigmoid is the probability of a click.

    Args:
      x: `dense`, float [N, 13] features; `ids`, int [N, 26] buckets, each in
        [0, buckets).
      train: has no effect.
    """
    del train
    ids = x['ids']
    features = ids.shape[1]
    # One table for all features, so that a batch is one gather.
    first = jnp.arange(features, dtype=ids.dtype) * self.buckets
    limit = self.buckets**-0.5
    embedded = nn.Embed(
      features * self.buckets,
      self.embedding_dim,
      embedding_init=lambda key, shape, dtype: jax.random.uniform(
        key, shape, dtype, -limit, limit
      ),
      dtype=self.dtype,
      name='embedding',
    )(ids + first[None])
    embedded = embedded.reshape((ids.shape[0], -1))
    continuous = x['dense'].astype(embedded.dtype)
    y = jnp.concatenate([continuous, embedded], axis=1)
    dense = functools.partial(self.dense, dtype=self.dtype)
    between = sizes_lib.between
    channels = sizes_lib.constant(y.shape[-1])
    for i, sizes in enumerate(zip(self.hidden, self.ranks)):
      v, u = f'hidden{i}_v', f'hidden{i}_u'
      width = self.sizes.channels(u, sizes[0])
      rank = self.sizes.channels(v, sizes[1])
      y = between(dense, channels, rank)(use_bias=False, name=v)(y)
      y = channel_masks.Mask(rank, name=f'{v}_mask')(y)
      y = nn.relu(between(dense, rank, width)(name=u)(y))
      y = channel_masks.Mask(width, name=f'{u}_mask')(y)
      channels = width
    head = between(dense, channels, sizes_lib.constant(1))
    return jnp.asarray(head(name='head')(y)[:, 0], jnp.float32)
