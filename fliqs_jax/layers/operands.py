"""The two operands of a quantized op: activations and weights, on their grids.

Where a layer's variables are read and kept: which format (`arch`), what was
seen of the input (`quant_stats`), what the op costs (`cost`). `layers` says
what they hold.
"""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from fliqs_jax.layers import channel_masks
from fliqs_jax.numerics import clipping
from fliqs_jax.numerics import float_ops
from fliqs_jax.numerics import quantize
from fliqs_jax.space import cost_model
from fliqs_jax.space import quant_spec
from fliqs_jax.space import sizes

# Of the running moments. The first batches count in full: the weight of batch n
# is max(1/n, 1 - decay), so the moments need no debiasing.
_STATS_DECAY = 0.99


def set_activation_quantization(quant_stats: Any, active: Any) -> Any:
  """Returns `quant_stats` with activation quantization switched on or off.

  Args:
    quant_stats: the collection.
    active: bool [], traced or not. Off is phase one (A.2): activations are
      profiled but not quantized.
  """

  def switch(path, leaf):
    if path[-1].key == 'active':
      # A scanned layer has one for each step.
      return jnp.broadcast_to(jnp.asarray(active, leaf.dtype), jnp.shape(leaf))
    return leaf

  return jax.tree_util.tree_map_with_path(switch, quant_stats)


class Operands:
  """Quantizes the two operands of one layer's op and records its shape.

  Attributes:
    module: the layer.
    spec: its rules; the layer's own, unless given.
    state: what holds the layer's variables: the layer itself, or what has its
      methods `variable`, `has_variable`, `get_variable`, `sow` and
      `is_mutable_collection`.
    choices: the formats it may use.
    dtype: of its result.
    accumulator: type of the op's sums.
    has_integer_op: whether the op could run on integers.
  """

  accumulator = jnp.float32
  has_integer_op = True

  def __init__(
    self,
    module: nn.Module,
    inputs: jax.Array,
    spec: quant_spec.QuantSpec | None = None,
    state: Any = None,
  ):
    self.module = module
    self.spec = spec or module.spec
    self.state = state or module
    self.choices = self.spec.choices('/'.join(module.path))
    # As in linen: what inputs and parameters promote to, unless given.
    self.dtype = module.dtype or jnp.result_type(inputs, module.param_dtype)
    self.sizes = {
      name: size
      for name in ('input_channels', 'output_channels', 'kernel')
      if (size := getattr(module, name, None)) is not None
    }
    self.leaves = {
      name: channel_masks.leaf(module, name, size)
      for name, size in self.sizes.items()
    }

  @property
  def is_quantized(self) -> bool:
    """Whether a format is chosen for either operand."""
    choices = self.choices
    return choices.weights is not None or choices.activations is not None

  def __call__(
    self, x: jax.Array, w: jax.Array, contracted: tuple[int, ...]
  ) -> tuple[quantize.Quantized, quantize.Quantized]:
    """Returns activations and weights on their grids; see the two below."""
    x, w = self.activations(x), self.weights(w, contracted)
    if not self.module.is_initializing():  # For `export`; else nothing.
      self.state.sow('operands', 'values', w.values)
      self.state.sow('operands', 'weights', w.scale)
      self.state.sow('operands', 'activations', x.scale)
      self.state.sow('operands', 'integer_op', np.bool_(self.has_integer_op))
    return x, w

  def conv(self, x, w, window_strides, padding, **kwargs) -> jax.Array:
    """Returns the float32 sums of a convolution of grid values."""
    return float_ops.conv_general_dilated(
      x.values, w.values, window_strides, padding, **kwargs
    )

  def dot_general(self, x, w, dimension_numbers, precision) -> jax.Array:
    """Returns the float32 sums of a product of grid values."""
    return float_ops.dot_general(
      x.values, w.values, dimension_numbers, precision
    )

  def keep(self, *arrays, dtype):
    """Stands in for linen's `promote_dtype`: float32 until on the grid."""
    del dtype  # The op itself casts, after quantization.
    return tuple(a if a is None else a.astype(jnp.float32) for a in arrays)

  def weights(
    self, w: jax.Array, contracted: tuple[int, ...]
  ) -> quantize.Quantized:
    """Returns weights on their grid, zero where they are dead.

    Args:
      w: [...] weights, float32.
      contracted: axes of `w` that the op sums over; the others are channels.
    """
    w = w.astype(jnp.float32)
    alive = self._alive(w.shape)
    if alive is not None:
      w = jnp.where(alive, w, 0.0)
    w = quantize.unquantized(w)
    if (menu := self.choices.weights) is not None:
      one_hot = self._decision('weights')
      # Initialisation wants variables, not values: this halves its program.
      if not self.module.is_initializing():
        w = self._weights(w.values, alive, contracted, menu, one_hot)
    return self._compute_dtype(w)

  def activations(self, x: jax.Array) -> quantize.Quantized:
    """Returns activations [...] on their grid, float32 or the layer's dtype."""
    x = quantize.unquantized(x.astype(jnp.float32))
    if (menu := self.choices.activations) is not None:
      one_hot, stats = self._decision('activations'), self._statistics(menu)
      if not self.module.is_initializing():
        x = self._activations(x.values, menu, one_hot, stats)
    return self._compute_dtype(x)

  def record(
    self,
    kind: str,
    macs: int,
    weights: int,
    channels: int,
    spare: int = 0,
  ) -> None:
    """Sows what the op costs; `spare` weights are those of other branches."""
    # Each group sees its own inputs: a depthwise op grows with its channels
    # once.
    grouped = getattr(self.module, 'feature_group_count', 1) > 1
    scaling = {
      name: size
      for name, size in self.sizes.items()
      if not (grouped and name == 'input_channels')
    }
    shape = cost_model.OpShape(
      kind=kind,
      macs=macs,
      weights=weights,
      channels=channels,
      weight_menu=self.choices.weights,
      act_menu=self.choices.activations,
      tied=self.choices.tied,
      decided=tuple(scaling.items()),
      spare=spare,
    )
    self.state.sow('cost', 'ops', shape)
    outputs = self.sizes.get('output_channels')
    if outputs is not None and self.module.use_bias:
      bias = cost_model.PerChannel('output_channels', outputs, 1)
      self.state.sow('cost', 'others', bias)

  def _decision(self, side: str) -> jax.Array:
    leaf = 'format' if self.choices.tied else side
    if not self.state.has_variable('arch', leaf):
      # A model that nobody searches yet runs at its first format.
      size = len(getattr(self.choices, side))
      self.state.variable('arch', leaf, jax.nn.one_hot, 0, size)
    return self.state.get_variable('arch', leaf)

  def _several(self, name: str) -> sizes.Channels | sizes.Kernel | None:
    """Returns a size of the layer if there is more than one to pick."""
    size = self.sizes.get(name)
    return size if size is not None and len(size.labels) > 1 else None

  def _alive(self, shape: tuple[int, ...]) -> jax.Array | None:
    """Returns which weights are live, to broadcast; None: all."""
    alive = None
    # A depthwise kernel has no axis of input channels.
    if (channels := self._several('input_channels')) and shape[-2] > 1:
      if channels.size != shape[-2]:
        raise ValueError(
          f'{"/".join(self.module.path)}: {channels.decision} is of a tensor '
          f'of {channels.size} channels, but the kernel takes {shape[-2]}'
        )
      alive = channel_masks.mask(self.leaves['input_channels'], channels)
      alive = alive.reshape((1,) * (len(shape) - 2) + (-1, 1))
    kernel = self._several('kernel')
    if kernel and kernel.is_masked:
      size = _pick(self.leaves['kernel'], jnp.asarray(kernel.labels))
      near = jnp.abs(jnp.arange(kernel.size) - kernel.size // 2) <= size // 2
      near = (near[:, None] & near[None, :])[:, :, None, None]
      alive = near if alive is None else alive & near
    return alive

  def _weights(self, w, alive, contracted, menu, one_hot):
    peak = jnp.max(jnp.abs(w), axis=contracted, keepdims=True)
    multiples = clipping.multiples(self.spec.weight_clip, menu)
    if any(math.isfinite(m) for m in multiples):
      multiple = _pick(one_hot, jnp.asarray(multiples))
      where = None if alive is None else jnp.broadcast_to(alive, w.shape)
      std = jnp.std(w, axis=contracted, keepdims=True, where=where)
      peak = jnp.minimum(peak, multiple * std)
    return quantize.quantize(w, quantize.select(menu, one_hot), peak)

  def _statistics(self, menu) -> dict[str, nn.Variable]:
    variable = functools.partial(self.state.variable, 'quant_stats')
    multiples = clipping.multiples(self.spec.first_act_clip, menu)
    return dict(
      mean=variable('mean', jnp.zeros, ()),
      mean_square=variable('mean_square', jnp.zeros, ()),
      count=variable('count', jnp.zeros, (), jnp.int32),
      active=variable('active', jnp.ones, (), jnp.bool_),
      clip=variable('clip', jnp.asarray, multiples, jnp.float32),
    )

  def _activations(self, x, menu, one_hot, stats):
    self.state.sow('act_inputs', 'x', x)  # For `profile`; else nothing.
    mean, square, count = stats['mean'], stats['mean_square'], stats['count']
    if self.state.is_mutable_collection('quant_stats'):
      count.value += 1
      weight = jnp.maximum(1.0 / count.value, 1.0 - _STATS_DECAY)
      seen = lax.stop_gradient(x)
      first, second = jnp.mean(seen), jnp.mean(seen * seen)
      if channels := self._several('input_channels'):
        # Dead channels are zero: they count in the means' denominator alone.
        number = channel_masks.number(self.leaves['input_channels'], channels)
        dense = x.shape[-1] / number
        first, second = first * dense, second * dense
      mean.value += weight * (first - mean.value)
      square.value += weight * (second - square.value)
    std = jnp.sqrt(jnp.maximum(square.value - mean.value**2, 0.0))
    threshold = _pick(one_hot, stats['clip'].value) * std
    quantized = quantize.quantize(x, quantize.select(menu, one_hot), threshold)
    # Without statistics there is no threshold, so there is nothing to quantize.
    on = stats['active'].value & (count.value > 0)
    return quantize.Quantized(
      jnp.where(on, quantized.values, x),
      jnp.where(on, quantized.scale, 1.0),
    )

  def _compute_dtype(self, q: quantize.Quantized) -> quantize.Quantized:
    # Grid values are exact in bfloat16, so only unquantized ones are rounded.
    return quantize.Quantized(q.values.astype(self.dtype), q.scale)


def _pick(one_hot: jax.Array, values: jax.Array) -> jax.Array:
  return jnp.sum(jnp.where(one_hot > 0.5, values, 0.0))
