"""A multi-layer perceptron: the smallest network there is something to search.

Three matrix products with the defaults: enough for a whole run in a test.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax


class MLP(nn.Module):
  """Dense layers with ReLU over the flattened input.

  Attributes:
    num_classes: size of the output.
    hidden: widths of the hidden layers.
    dense: constructor of dense layers.
  """

  input_shape: ClassVar[tuple[int, int, int]] = (8, 8, 1)

  num_classes: int
  hidden: Sequence[int] = (32, 32)
  dense: Any = nn.Dense

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """Returns logits [N, num_classes] of images [N, ...]."""
    del train
    x = x.reshape((x.shape[0], -1))
    for i, features in enumerate(self.hidden):
      x = nn.relu(self.dense(features, name=f'hidden{i}')(x))
    return self.dense(self.num_classes, name='head')(x)
