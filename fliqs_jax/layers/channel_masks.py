"""What a network applies to a tensor whose first channels alone are live.

Dead channels are zero behind these layers, so that sums over channels do not
see them; whoever takes a mean over channels asks for their number.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from fliqs_jax.space import cost_model
from fliqs_jax.space import sizes


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
    """Returns [..., C].

    Raises:
      ValueError: the input has another number of channels.
    """
    if not self.channels.has_leaf:
      return x
    if self.channels.size != x.shape[-1]:
      raise ValueError(
        f'{"/".join(self.path)}: {self.channels.decision} is of a tensor of '
        f'{self.channels.size} channels, but the input has {x.shape[-1]}'
      )
    one_hot = leaf(self, 'channels', self.channels)
    if len(self.channels.labels) == 1:
      return x
    return jnp.where(mask(one_hot, self.channels), x, 0)


class BatchNorm(nn.BatchNorm):
  """`nn.BatchNorm`, behind which dead channels are zero.

  A dead channel keeps the running statistics of when it last lived, so that it
  is normalised when it comes to life: behind a depthwise convolution it is
  zero, and its variance would fade.

  Attributes:
    channels: of the input [..., C].
  """

  channels: sizes.Channels = sizes.constant(0)

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Returns [..., C]."""
    if not self.channels.has_leaf:
      return super().__call__(x)
    before = dict(self.variables.get('batch_stats', {}))
    x = super().__call__(x)
    params = self.use_scale + self.use_bias
    follows = cost_model.PerChannel('channels', self.channels, params)
    self.sow('cost', 'others', follows)
    x = Mask(self.channels, parent=self.scope)(x)
    if len(self.channels.labels) > 1 and not self.is_initializing():
      self._keep_dead(before)
    return x

  def _keep_dead(self, before: dict[str, jax.Array]) -> None:
    if not self.is_mutable_collection('batch_stats'):
      return
    alive = mask(self.get_variable('arch', 'channels'), self.channels)
    for name, old in before.items():
      new = self.get_variable('batch_stats', name)
      self.put_variable('batch_stats', name, jnp.where(alive, new, old))


class Dense(nn.Dense):
  """`nn.Dense`, not quantized, behind which dead channels are zero.

  It counts as parameters, not as an op. Both its sides follow one decision.

  Attributes:
    input_channels: which of the input's channels are live; None: all, and all
      of the output's.
    output_channels: which of the output's channels will be.
  """

  input_channels: sizes.Channels | None = None
  output_channels: sizes.Channels | None = None

  @nn.compact
  def __call__(self, inputs: jax.Array) -> jax.Array:
    """Applies the layer: [..., C] to [..., features].

    Raises:
      ValueError: the two sides follow different decisions.
    """
    y = super().__call__(inputs)
    sides = self.input_channels, self.output_channels
    decisions = [side and side.decision for side in sides]
    if decisions[0] != decisions[1]:
      raise ValueError(
        f'{"/".join(self.path)}: both sides must follow one decision, but they '
        f'follow {decisions[0]} and {decisions[1]}'
      )
    if not any(side and side.has_leaf for side in sides):
      return y
    counts = tuple(
      (rows + self.use_bias) * columns
      for rows, columns in zip(*(side.counts for side in sides))
    )
    params = dataclasses.replace(sides[1], counts=counts)
    self.sow('cost', 'others', cost_model.PerChannel('channels', params, 1))
    return Mask(self.output_channels, parent=self.scope)(y)
