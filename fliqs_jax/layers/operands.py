"""Operands of a quantized op: activations and weights, on their grids.

All variables of quantization are read and written here: the format (`arch`),
the moments of the input (`quant_stats`) and the cost of the op (`cost`).
`quant_layers` lists them with their shapes.
"""

from collections.abc import Callable, Mapping
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fliqs_jax.layers import channel_masks
from fliqs_jax.layers import grids
from fliqs_jax.layers import ratios
from fliqs_jax.numerics import formats
from fliqs_jax.numerics import mixture
from fliqs_jax.numerics import one_hot as one_hot_lib
from fliqs_jax.numerics import quantize
from fliqs_jax.space import ops as ops_lib
from fliqs_jax.space import quant_spec
from fliqs_jax.space import sizes

Menu = grids.Menu


def set_activation_quantization(quant_stats: Any, active: Any) -> Any:
  """Returns `quant_stats` with activation quantization switched on or off.

  Args:
    quant_stats: the collection of that name, a pytree of arrays.
    active: bool [], traced or not. False is phase one (A.2): activations are
      profiled but not quantized.

  Returns:
    The same pytree in which each leaf `active` has this value.
  """

  def switch(path, leaf):
    if path[-1].key == 'active':
      # A scanned layer has one for each iteration.
      return jnp.broadcast_to(jnp.asarray(active, leaf.dtype), jnp.shape(leaf))
    return leaf

  return jax.tree_util.tree_map_with_path(switch, quant_stats)


class Operands:
  """Quantizes the two operands of one layer's op and records its shape.

  Attributes:
    module: the layer.
    spec: the rules that say which formats the layer may use.
    choices: the formats that each operand may use.
    dtype: the dtype of the layer's result.
    sizes: the possible sizes of the layer by name: `input_channels`,
      `output_channels`, `kernel`.
    leaves: the leaf [K] of `arch` for each of these sizes.
  """

  def __init__(self, module: nn.Module, inputs: jax.Array):
    """Reads which formats and sizes the layer may use.

    Args:
      module: the layer.
      inputs: [...] the layer's input; only its dtype is read.
    """
    self.module = module
    self._declared: dict[str, nn.Variable] = {}
    self.spec: quant_spec.QuantSpec = module.spec
    self.choices = self.spec.choices('/'.join(module.path))
    # As in linen: the given type, or that to which inputs and weights promote.
    self.dtype = module.dtype or jnp.result_type(inputs, module.param_dtype)
    self.sizes = {
      name: size
      for name in sizes.LEAVES
      if (size := getattr(module, name, None)) is not None
    }
    self.leaves = {
      name: channel_masks.size_leaf(module, name, size)
      for name, size in self.sizes.items()
    }

  def __call__(
    self, x: jax.Array, w: jax.Array, contracted: tuple[int, ...]
  ) -> tuple[quantize.Quantized, quantize.Quantized]:
    """Returns activations and weights on their grids.

    Args:
      x: [...] activations.
      w: [...] weights.
      contracted: the axes of `w` that the op sums over.
    """
    x_q, w_q = self.activations(x), self.weights(w, contracted)
    self._note('operands', lambda: dict(values=w_q.values, weights=w_q.scale))
    self._note(
      'errors',
      lambda: dict(activations=_squares(x, x_q), weights=_squares(w, w_q)),
    )
    return x_q, w_q

  def _note(
    self, collection: str, noted: Callable[[], Mapping[str, jax.Array]]
  ) -> None:
    """Stores values, the last call's, if the collection is asked for."""
    module = self.module
    if module.is_initializing() or not module.is_mutable_collection(collection):
      return
    for name, value in noted().items():
      module.sow(
        collection,
        name,
        value,
        reduce_fn=lambda _, last: last,
        init_fn=lambda: None,
      )

  def keep(self, *arrays: jax.Array | None, dtype: Any) -> tuple:
    """Replaces linen's `promote_dtype`: operands are float32 until rounded."""
    del dtype  # The op itself casts, after quantization.
    return tuple(a if a is None else a.astype(jnp.float32) for a in arrays)

  def apply(
    self,
    op: Callable[[quantize.Quantized, quantize.Quantized], jax.Array],
    x: jax.Array,
    w: jax.Array,
    contracted: tuple[int, ...],
  ) -> jax.Array:
    """Applies an op to both operands, on their grids.

    A relaxed layer applies it to the means of the operands over the menu. A
    branched one applies it at each format and returns the mean of the results,
    if one decision sets both operands. For two decisions, and for one operand,
    that is the same: the op is linear in each.

    Args:
      op: (activations, weights) -> result, rescaled; linear in each.
      x: [...] activations.
      w: [...] weights.
      contracted: the axes of `w` that the op sums over.
    """
    # The outputs of one row of a matrix have no direction of their own.
    self.calibrate(op, x, w, contracted, has_examples=x.ndim > 2)
    menu = self.choices.weights
    is_branched = self.spec.mix == 'branched' and self.choices.tied
    if menu is None or not (is_branched and self._is_relaxed(menu)):
      return op(*self(x, w, contracted))
    on_grids = (
      self._activations_on_grid(x),
      self._weights_on_grid(w, contracted),
    )

    def at(one_hot: jax.Array) -> jax.Array:
      return op(*(self._compute_dtype(of(one_hot)) for of in on_grids))

    return mixture.branched(at, self._decision('weights', menu))

  def calibrate(
    self,
    op: Callable[[quantize.Quantized, quantize.Quantized], jax.Array],
    x: jax.Array,
    w: jax.Array,
    contracted: tuple[int, ...],
    has_examples: bool,
  ) -> None:
    """Finds the thresholds of strategies, in a call that calibrates.

    Args:
      op: as in `apply`.
      x: [...] activations.
      w: [...] weights.
      contracted: the axes of `w` that the op sums over.
      has_examples: whether the first axis of x and of the result are examples.
    """
    if not self._is_calibrating:
      return
    operands = dict(activations=x, weights=w)
    values = {side: v.astype(jnp.float32) for side, v in operands.items()}
    menus = {side: getattr(self.choices, side) for side in operands}
    if menus['activations'] is not None:
      self._observe(values['activations'], menus['activations'])
    axes = dict(activations=tuple(range(x.ndim)), weights=contracted)
    found = ratios.found(op, values, menus, axes, has_examples)
    for side, new in found.items():
      if side == 'weights':
        self._weight_ratios(*new.shape).value = new
      else:
        stats = self._statistics(menus[side])
        stats['ratio'].value = ratios.of_activations(
          new, values[side], stats['largest'].value
        )

  def weights(
    self, w: jax.Array, contracted: tuple[int, ...]
  ) -> quantize.Quantized:
    """Returns weights on their grid, zero where they are inactive.

    Args:
      w: [...] weights, float32.
      contracted: axes of `w` that the op sums over; the others are channels.
    """
    on_grid = self._weights_on_grid(w, contracted)
    return self._chosen('weights', self.choices.weights, on_grid)

  def activations(self, x: jax.Array) -> quantize.Quantized:
    """Returns activations [...] on their grid, float32 or the layer's dtype."""
    on_grid = self._activations_on_grid(x)
    return self._chosen('activations', self.choices.activations, on_grid)

  def record(
    self,
    kind: str,
    macs: int,
    weights: int,
    channels: int,
    inputs: int,
    outputs: int,
    **options: Any,
  ) -> None:
    """Sows the shape of the op, from which the cost model computes costs.

    Args:
      kind: the kind of the op, one of `ops.OpShape`.
      macs: multiply-accumulates of one call, all examples of the batch.
      weights: the number of weights that the op reads.
      channels: the number of scales of the weights.
      inputs: the number of activations of one call, all examples of the batch.
      outputs: the number of results of one call, all examples of the batch.
      **options: `spare`, `window` and `strides` of `ops.OpShape`.
    """
    # Each group reads its own inputs, so the cost of a depthwise op grows with
    # its channels once, not twice.
    grouped = getattr(self.module, 'feature_group_count', 1) > 1
    scaling = {
      name: size
      for name, size in self.sizes.items()
      if not (grouped and name == sizes.INPUT_CHANNELS)
    }
    shape = ops_lib.OpShape(
      kind=kind,
      macs=macs,
      weights=weights,
      channels=channels,
      inputs=inputs,
      outputs=outputs,
      weight_menu=self.choices.weights,
      act_menu=self.choices.activations,
      tied=self.choices.tied,
      decided=tuple(scaling.items()),
      **options,
    )
    self.module.sow('cost', 'ops', shape)
    outputs = self.sizes.get(sizes.OUTPUT_CHANNELS)
    if outputs is not None and self.module.use_bias:
      bias = ops_lib.PerChannel(sizes.OUTPUT_CHANNELS, outputs, 1)
      self.module.sow('cost', 'others', bias)

  def _decision(self, side: str, menu: Menu) -> jax.Array:
    """Returns the leaf [K] of `arch` that picks the format of an operand.

    Raises:
      ValueError: the leaf is known and picks no format.
    """
    leaf = 'format' if self.choices.tied else side
    if not self.module.has_variable('arch', leaf):
      # A model without a value for the leaf runs at its first format.
      self.module.variable('arch', leaf, jax.nn.one_hot, 0, len(menu))
    one_hot = self.module.get_variable('arch', leaf)
    path = '/'.join((*self.module.path, leaf))
    one_hot_lib.check(path, one_hot, len(menu), self._is_relaxed(menu))
    return one_hot

  def _is_relaxed(self, menu: Menu) -> bool:
    """Returns whether the layer computes a mean over the menu."""
    is_open = len(menu) > 1 and not self.module.is_initializing()
    return is_open and self.spec.mix != 'sampled'

  def _chosen(
    self, side: str, menu: Menu | None, on_grid: mixture.OnGrid
  ) -> quantize.Quantized:
    """Returns an operand at the format of its leaf, or the mean over them."""
    leaf = np.ones(1) if menu is None else self._decision(side, menu)
    if menu is None or not self._is_relaxed(menu):
      return self._compute_dtype(on_grid(leaf))
    return self._compute_dtype(mixture.mixed(on_grid, leaf))

  def _several(self, name: str) -> sizes.Channels | sizes.Kernel | None:
    """Returns a size of the layer if there is more than one to pick."""
    size = self.sizes.get(name)
    return size if size is not None and len(size.labels) > 1 else None

  def _active_weights(
    self, shape: tuple[int, ...]
  ) -> tuple[jax.Array | None, jax.Array]:
    """Returns which weights are active, and the value of the others.

    Args:
      shape: the shape of the weights; input channels are the axis before last.

    Returns:
      A bool array that broadcasts to the weights, None if all are active; and
      0, which is NaN if a leaf picks no size, so that this shows.
    """
    active, zero = None, jnp.zeros(())
    # A depthwise kernel has no axis of input channels.
    if (channels := self._several(sizes.INPUT_CHANNELS)) and shape[-2] > 1:
      if channels.size != shape[-2]:
        raise ValueError(
          f'{"/".join(self.module.path)}: {channels.decision} is of a tensor '
          f'of {channels.size} channels, but the kernel takes {shape[-2]}; '
          'give the layer the `Channels` of its input'
        )
      leaf = self.leaves[sizes.INPUT_CHANNELS]
      zero += 0.0 * channel_masks.active_count(leaf, channels)
      active = channel_masks.is_active(leaf, channels)
      active = active.reshape((1,) * (len(shape) - 2) + (-1, 1))
    kernel = self._several(sizes.KERNEL)
    if kernel and kernel.is_masked:
      size = one_hot_lib.pick(
        self.leaves[sizes.KERNEL], jnp.asarray(kernel.labels)
      )
      zero += 0.0 * size
      near = jnp.abs(jnp.arange(kernel.size) - kernel.size // 2) <= size // 2
      near = (near[:, None] & near[None, :])[:, :, None, None]
      active = near if active is None else active & near
    return active, zero

  def _weights_on_grid(
    self, w: jax.Array, contracted: tuple[int, ...]
  ) -> mixture.OnGrid:
    """Returns weights as a function of their format."""
    values = w.astype(jnp.float32)
    active, zero = self._active_weights(values.shape)
    if active is not None:
      values = jnp.where(active, values, zero)
    menu, found = self.choices.weights, None
    if menu is not None and formats.has_strategies(menu):
      channels = math.prod(
        n for i, n in enumerate(values.shape) if i not in contracted
      )
      found = self._weight_ratios(len(menu), channels).value
    # Initialisation needs variables, not values: this halves its program.
    if menu is None or self.module.is_initializing():
      return lambda one_hot: quantize.unquantized(values)
    return grids.weights(
      values, menu, self.spec.weight_clip, contracted, active, found
    )

  def _weight_ratios(self, options: int, channels: int) -> nn.Variable:
    """Returns the variable [K, channels] of the weights' ratios."""
    first = np.zeros((options, channels), np.float32)
    return self._variable('weight_ratio', first)

  @property
  def _is_calibrating(self) -> bool:
    """Whether this call finds the thresholds of strategies."""
    module, choices = self.module, self.choices
    menus = (*(choices.weights or ()), *(choices.activations or ()))
    return (
      formats.has_strategies(menus)
      and module.scope.mutable is not True  # It names no collection.
      and module.is_mutable_collection(ratios.COLLECTION)
      and not module.is_initializing()
    )

  def _activations_on_grid(self, x: jax.Array) -> mixture.OnGrid:
    """Returns activations as a function of their format."""
    values, menu = x.astype(jnp.float32), self.choices.activations
    if menu is None:
      return lambda one_hot: quantize.unquantized(values)
    return self.profiled(values, menu)

  def _statistics(self, menu: Menu) -> dict[str, nn.Variable]:
    first = grids.first_statistics(menu, self.spec.first_act_clip)
    return {name: self._variable(name, value) for name, value in first.items()}

  def _variable(self, name: str, first: Any) -> nn.Variable:
    """Returns a variable of `quant_stats`; linen declares each only once."""
    if name not in self._declared:
      variable = self.module.variable('quant_stats', name, jnp.asarray, first)
      found, right = np.shape(variable.value), np.shape(first)
      if found != right:
        raise ValueError(
          f'quant_stats of {"/".join(self.module.path)}: {name} has the shape '
          f'{list(found)}, but must be {list(right)}: it is of other formats; '
          'use those of `init`'
        )
      self._declared[name] = variable
    return self._declared[name]

  def profiled(self, x: jax.Array, menu: Menu) -> mixture.OnGrid:
    """Updates the moments of the input; returns it by its format.

    Args:
      x: [...] float32 activations.
      menu: [K] formats.
    """
    if self.module.is_initializing():
      self._statistics(menu)
      return lambda one_hot: quantize.unquantized(x)
    self.module.sow('act_inputs', 'x', x)  # Stored only while calibrating.
    if not self._is_calibrating:  # Otherwise they were observed before.
      self._observe(x, menu)
    stats = self._statistics(menu)
    statistics = {name: variable.value for name, variable in stats.items()}
    return grids.activations(x, menu, statistics, self.spec.act_threshold)

  def _observe(self, x: jax.Array, menu: Menu) -> None:
    """Updates the moments of the input, if they may change."""
    stats = self._statistics(menu)
    statistics = {name: variable.value for name, variable in stats.items()}
    if self.module.is_mutable_collection('quant_stats'):
      active = None
      if channels := self._several(sizes.INPUT_CHANNELS):
        leaf = self.leaves[sizes.INPUT_CHANNELS]
        active = channel_masks.is_active(leaf, channels)
      statistics = grids.observed(statistics, x, active)
      for name, value in statistics.items():
        stats[name].value = value

  def _compute_dtype(self, q: quantize.Quantized) -> quantize.Quantized:
    # Grid values are exact in bfloat16, so this rounds only unquantized values.
    return quantize.Quantized(q.values.astype(self.dtype), q.scale)


def _squares(x: jax.Array, on_grid: quantize.Quantized) -> jax.Array:
  """Returns the sums of squares of the error and of x [...], [2] float32."""
  exact = x.astype(jnp.float32)
  rounded = on_grid.values.astype(jnp.float32) * on_grid.scale
  return jnp.stack([jnp.sum((exact - rounded) ** 2), jnp.sum(exact**2)])
