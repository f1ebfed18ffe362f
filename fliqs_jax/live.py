"""What a network applies to a tensor whose first channels alone are live.

Dead channels are zero behind these layers, so that sums over channels do not
see them; whoever takes a mean over channels asks for their number.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from fliqs_jax import cost_model
from fliqs_jax import sizes


def leaf(
  module: nn.Module, name: str, choice: sizes.Channels | sizes.Kernel
) -> jax.Array:
  """Returns a leaf [K] of `arch`, and records in `sizes` what it picks from.

  A model that nobody searches yet has the published size.
  """
  if not module.has_variable('arch', name):
    module.variable(
      'arch', name, jax.nn.one_hot, choice.published, len(choice.labels)
    )
  module.sow('sizes', name, choice)
  return module.get_variable('arch', name)


def number(one_hot: jax.Array, channels: sizes.Channels) -> jax.Array:
  """Returns how many channels are live, float32 []."""
  counts = jnp.asarray(channels.counts, jnp.float32)
  return jnp.sum(jnp.where(one_hot > 0.5, counts, 0.0))


def mask(one_hot: jax.Array, channels: sizes.Channels) -> jax.Array:
  """Returns which channels are live, bool [C]."""
  return jnp.arange(channels.size) < number(one_hot, channels)


class Mask(nn.Module):
  """Zeroes the channels that are not live.

  Attributes:
    channels: of the input [..., C].
  """

  channels: sizes.Channels

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Returns [..., C]."""
    if self.channels.decision is None:
      return x
    one_hot = leaf(self, 'channels', self.channels)
    if len(self.channels.labels) == 1:
      return x
    return jnp.where(mask(one_hot, self.channels), x, 0)


class BatchNorm(nn.BatchNorm):
  """`nn.BatchNorm`, behind which dead channels are zero.

  A dead channel keeps statistics of its own, so that it is normalised when it
  comes to life.

  Attributes:
    channels: of the input [..., C].
  """

  channels: sizes.Channels = sizes.constant(0)

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Returns [..., C]."""
    x = super().__call__(x)
    if self.channels.decision is not None:
      params = self.use_scale + self.use_bias
      follows = cost_model.PerChannel('channels', self.channels, params)
      self.sow('cost', 'others', follows)
    return Mask(self.channels, parent=self.scope)(x)
