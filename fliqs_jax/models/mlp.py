"""MLP: a multi-layer perceptron, the smallest network with decisions.

With the defaults it has three matrix products, enough for a whole run in a
test.
"""

from collections.abc import Sequence
import functools
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from fliqs_jax.layers import channel_masks
from fliqs_jax.space import sizes as sizes_lib


class MLP(nn.Module):
  """Dense layers with ReLU over the flattened input.

  Open sizes: the width of each hidden layer.

  Attributes:
    num_classes: number of outputs.
    hidden: widths of the hidden layers.
    sizes: the open sizes of the network, or the selected ones.
    dense: constructor of dense layers.
    dtype: type in which layers and norms compute; parameters stay float32.
  """

  input_shape: ClassVar[tuple[int, int, int]] = (8, 8, 1)

  num_classes: int
  hidden: Sequence[int] = (32, 32)
  sizes: sizes_lib.Sizes = sizes_lib.Sizes()
  dense: Any = nn.Dense
  dtype: Any = None

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """Returns logits [N, num_classes] of images [N, ...]."""
    del train
    dense = functools.partial(self.dense, dtype=self.dtype)
    x = jnp.asarray(x, self.dtype).reshape((x.shape[0], -1))
    channels = sizes_lib.constant(x.shape[-1])
    for i, features in enumerate(self.hidden):
      width = self.sizes.channels(f'hidden{i}', features)
      layer = sizes_lib.between(dense, channels, width)
      x = nn.relu(layer(name=f'hidden{i}')(x))
      x = channel_masks.Mask(width, name=f'hidden{i}_mask')(x)
      channels = width
    classes = sizes_lib.constant(self.num_classes)
    head = sizes_lib.between(dense, channels, classes)
    return jnp.asarray(head(name='head')(x), jnp.float32)
