"""Layers for tensors of which only the first channels are active.

The other channels, the inactive ones, are zero behind these layers. So sums
over channels need no care; a mean over channels divides by `active_count`.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from fliqs_jax.numerics import one_hot as one_hot_lib
from fliqs_jax.space import ops as ops_lib
from fliqs_jax.space import sizes


def size_leaf(
  module: nn.Module, name: str, choice: sizes.Channels | sizes.Kernel
) -> jax.Array:
  """Returns the leaf of `arch` that picks a size, and records its options.

  A model without a value for the leaf has the published size.

  Args:
    module: the layer that the leaf belongs to.
    name: the name of the leaf: `channels`, `input_channels`,
      `output_channels` or `kernel`.
    choice: the K sizes that the leaf picks from.

  Returns:
    [K] one-hot; for a kernel of branches it may also be their weights.

  Raises:
    ValueError: the leaf is known and picks no size.
  """
  if not module.has_variable('arch', name):
    module.variable(
      'arch', name, jax.nn.one_hot, choice.published, len(choice.labels)
    )
  module.sow('sizes', name, choice)
  one_hot = module.get_variable('arch', name)
  is_mean = isinstance(choice, sizes.Kernel) and choice.has_branches
  path = '/'.join((*module.path, name))
  one_hot_lib.check(path, one_hot, len(choice.labels), is_mean)
  return one_hot


def active_count(one_hot: jax.Array, channels: sizes.Channels) -> jax.Array:
  """Returns how many channels are active, float32 []; NaN if none is picked."""
  return one_hot_lib.pick(one_hot, jnp.asarray(channels.counts, jnp.float32))


def is_active(one_hot: jax.Array, channels: sizes.Channels) -> jax.Array:
  """Returns for each channel whether it is active, bool [C]."""
  return jnp.arange(channels.size) < active_count(one_hot, channels)


class Mask(nn.Module):
  """Zeroes the inactive channels.

  Attributes:
    channels: the possible numbers of channels of the input [..., C].
  """

  channels: sizes.Channels

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Returns x [..., C] with zeros in its inactive channels.

    Raises:
      ValueError: the input has another number of channels, or the leaf picks
        none.
    """
    if not self.channels.has_leaf:
      return x
    if self.channels.size != x.shape[-1]:
      raise ValueError(
        f'{"/".join(self.path)}: {self.channels.decision} is the decision of a '
        f'tensor of {self.channels.size} channels, but the input has '
        f'{x.shape[-1]}; give the layer the `Channels` of its input'
      )
    one_hot = size_leaf(self, 'channels', self.channels)
    if len(self.channels.labels) == 1:
      return x
    # Zero, but NaN if the count is NaN: a leaf that picks nothing must show.
    zero = (0.0 * active_count(one_hot, self.channels)).astype(x.dtype)
    return jnp.where(is_active(one_hot, self.channels), x, zero)


class BatchNorm(nn.BatchNorm):
  """`nn.BatchNorm`, behind which inactive channels are zero.

  An inactive channel keeps its running statistics, so that they are right when
  it becomes active again: behind a depthwise convolution it is zero, and its
  variance would decay to zero.

  Attributes:
    channels: the possible numbers of channels of the input [..., C].
  """

  channels: sizes.Channels = sizes.constant(0)

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Returns x [..., C] normalised, zero in its inactive channels."""
    if not self.channels.has_leaf:
      return super().__call__(x)
    before = dict(self.variables.get('batch_stats', {}))
    y = super().__call__(x)
    params = self.use_scale + self.use_bias
    follows = ops_lib.PerChannel('channels', self.channels, params)
    self.sow('cost', 'others', follows)
    y = Mask(self.channels, parent=self.scope)(y)
    if len(self.channels.labels) > 1 and not self.is_initializing():
      self._restore_inactive(before)
    return y

  def _restore_inactive(self, before: dict[str, jax.Array]) -> None:
    """Gives inactive channels back their running statistics [C] of `before`."""
    if not self.is_mutable_collection('batch_stats'):
      return
    active = is_active(self.get_variable('arch', 'channels'), self.channels)
    for name, old in before.items():
      new = self.get_variable('batch_stats', name)
      self.put_variable('batch_stats', name, jnp.where(active, new, old))


class Dense(nn.Dense):
  """`nn.Dense`, not quantized, behind which inactive channels are zero.

  The cost model counts its parameters, but no op. Its input and its output
  follow the same decision.

  Attributes:
    input_channels: the possible numbers of the input's channels; None if all
      channels of both sides are always active.
    output_channels: the possible numbers of the output's channels.
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
        f'{"/".join(self.path)}: the channels of input and output must follow '
        f'one decision, but they follow {decisions[0]} and {decisions[1]}'
      )
    if not any(side and side.has_leaf for side in sides):
      return y
    counts = tuple(
      (rows + self.use_bias) * columns
      for rows, columns in zip(*(side.counts for side in sides))
    )
    params = dataclasses.replace(sides[1], counts=counts)
    self.sow('cost', 'others', ops_lib.PerChannel('channels', params, 1))
    return Mask(self.output_channels, parent=self.scope)(y)
