"""Small image classifier in plain linen, without any code for the search."""

import flax.linen as nn
import jax


class DigitsCNN(nn.Module):
  """Two convolutions and two dense layers; [N, 8, 8, 1] to [N, classes]."""

  classes: int = 10

  @nn.compact
  def __call__(self, images: jax.Array, train: bool) -> jax.Array:
    x = images
    for features, strides in ((8, 1), (16, 2)):
      x = nn.Conv(features, (3, 3), strides, use_bias=False)(x)
      x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
    x = nn.relu(nn.Dense(32)(x.reshape((x.shape[0], -1))))
    return nn.Dense(self.classes)(x)
