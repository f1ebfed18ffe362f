"""Linen's own layers with a quantized op: they read `arch`, keep `quant_stats`.

Each layer is the linen layer of the same name (same parameters, same options)
in which the one multiplication is replaced: both operands are put on the grid
of a format that the `arch` collection chooses, the op runs on grid values with
a float32 accumulator, and the scales are applied to its result.

Collections, per layer:
  arch: `format` [K] one-hot, or `weights` and `activations` [K].
  quant_stats: `mean`, `mean_square` [], running moments of the input; `count`
    [], batches seen; `active` [], whether activations are quantized yet; `clip`
    [K], threshold of each format as a multiple of the standard deviation.
  cost: `ops`, a static `cost_model.OpShape` per call.
"""

from collections.abc import Callable
import functools
import math
from typing import Any

import flax.linen as nn
import jax
from jax import lax
import jax.numpy as jnp
import opt_einsum

from fliqs_jax import clipping
from fliqs_jax import cost_model
from fliqs_jax import linear
from fliqs_jax import quant_spec
from fliqs_jax import quantize

# Of the running moments. The first batches count in full: the weight of batch n
# is max(1/n, 1 - decay), so the moments need no debiasing.
_STATS_DECAY = 0.99


class QuantConv(nn.Conv):
  """`nn.Conv` (any stride, dilation, groups) with a searchable format.

  Attributes:
    spec: which formats the layer may use; matched against the layer's path.
  """

  spec: quant_spec.QuantSpec = quant_spec.QuantSpec()

  @nn.compact
  def __call__(self, inputs: jax.Array) -> jax.Array:
    """Applies the convolution: [..., H, W, C] to [..., H', W', features]."""
    return apply_conv(Operands(self, inputs), inputs)


class QuantDense(nn.Dense):
  """`nn.Dense` with a searchable format.

  Attributes:
    spec: which formats the layer may use; matched against the layer's path.
  """

  spec: quant_spec.QuantSpec = quant_spec.QuantSpec()

  @nn.compact
  def __call__(self, inputs: jax.Array) -> jax.Array:
    """Applies the layer: [..., C] to [..., features]."""
    return apply_dense(Operands(self, inputs), inputs)


class QuantDenseGeneral(nn.DenseGeneral):
  """`nn.DenseGeneral` with a searchable format.

  Attributes:
    spec: which formats the layer may use; matched against the layer's path.
  """

  spec: quant_spec.QuantSpec = quant_spec.QuantSpec()

  @nn.compact
  def __call__(self, inputs: jax.Array) -> jax.Array:
    """Applies the layer over `axis` of the inputs."""
    return apply_dense_general(Operands(self, inputs), inputs)


class QuantEinsum(nn.Einsum):
  """`nn.Einsum` with a searchable format.

  Attributes:
    spec: which formats the layer may use; matched against the layer's path.
  """

  spec: quant_spec.QuantSpec = quant_spec.QuantSpec()

  @nn.compact
  def __call__(
    self, inputs: jax.Array, einsum_str: str | None = None
  ) -> jax.Array:
    """Applies the contraction of the inputs with the kernel."""
    einsum_str = nn.merge_param('einsum_str', self.einsum_str, einsum_str)
    return apply_einsum(Operands(self, inputs), einsum_str, inputs)


def with_spec(
  layer: type[nn.Module], spec: quant_spec.QuantSpec
) -> Callable[..., nn.Module]:
  """Returns the layer's constructor with its `spec` given."""
  return functools.partial(layer, spec=spec)


def set_activation_quantization(quant_stats: Any, active: Any) -> Any:
  """Returns `quant_stats` with activation quantization switched on or off.

  Args:
    quant_stats: the collection.
    active: bool [], traced or not. Off is phase one (A.2): activations are
      profiled but not quantized.
  """

  def switch(path, leaf):
    if path[-1].key == 'active':
      return jnp.asarray(active, leaf.dtype)
    return leaf

  return jax.tree_util.tree_map_with_path(switch, quant_stats)


class Operands:
  """Quantizes the two operands of one layer's op and records its shape.

  Attributes:
    module: the layer.
    dtype: of the layer's result.
    accumulator: type of the op's sums.
  """

  accumulator = jnp.float32

  def __init__(self, module: nn.Module, inputs: jax.Array):
    self.module = module
    self.spec = module.spec
    self.choices = module.spec.choices('/'.join(module.path))
    # As in linen: what inputs and parameters promote to, unless given.
    self.dtype = module.dtype or jnp.result_type(inputs, module.param_dtype)

  def __call__(
    self, x: jax.Array, w: jax.Array, contracted: tuple[int, ...]
  ) -> tuple[quantize.Quantized, quantize.Quantized]:
    """Returns activations and weights on their grids.

    Args:
      x: [...] activations, float32.
      w: [...] weights, float32.
      contracted: axes of `w` that the op sums over; the others are channels.
    """
    x = quantize.unquantized(x.astype(jnp.float32))
    w = quantize.unquantized(w.astype(jnp.float32))
    if (menu := self.choices.weights) is not None:
      one_hot = self._decision('weights')
      # Initialisation wants variables, not values: this halves its program.
      if not self.module.is_initializing():
        w = self._weights(w.values, contracted, menu, one_hot)
    if (menu := self.choices.activations) is not None:
      one_hot, stats = self._decision('activations'), self._statistics(menu)
      if not self.module.is_initializing():
        x = self._activations(x.values, menu, one_hot, stats)
    if not self.module.is_initializing():  # For `export`; else nothing.
      self.module.sow('operands', 'weights', w)
      self.module.sow('operands', 'activations', x.scale)
    return self._compute_dtype(x), self._compute_dtype(w)

  def conv(self, x, w, window_strides, padding, **kwargs) -> jax.Array:
    """Returns the float32 sums of a convolution of grid values."""
    return linear.conv_general_dilated(
      x.values, w.values, window_strides, padding, **kwargs
    )

  def dot_general(self, x, w, dimension_numbers, precision) -> jax.Array:
    """Returns the float32 sums of a product of grid values."""
    return lax.dot_general(
      x.values,
      w.values,
      dimension_numbers,
      precision=precision,
      preferred_element_type=jnp.float32,
    )

  def keep(self, *arrays, dtype):
    """Stands in for linen's `promote_dtype`: float32 until on the grid."""
    del dtype  # The op itself casts, after quantization.
    return tuple(a if a is None else a.astype(jnp.float32) for a in arrays)

  def record(self, kind: str, macs: int, weights: int, channels: int) -> None:
    """Sows what the op costs."""
    shape = cost_model.OpShape(
      kind=kind,
      macs=macs,
      weights=weights,
      channels=channels,
      weight_menu=self.choices.weights,
      act_menu=self.choices.activations,
      tied=self.choices.tied,
    )
    self.module.sow('cost', 'ops', shape)

  def _decision(self, side: str) -> jax.Array:
    leaf = 'format' if self.choices.tied else side
    if not self.module.has_variable('arch', leaf):
      # A model that nobody searches yet runs at its first format.
      size = len(getattr(self.choices, side))
      self.module.variable('arch', leaf, jax.nn.one_hot, 0, size)
    return self.module.get_variable('arch', leaf)

  def _weights(self, w, contracted, menu, one_hot):
    peak = jnp.max(jnp.abs(w), axis=contracted, keepdims=True)
    multiples = clipping.multiples(self.spec.weight_clip, menu)
    if any(math.isfinite(m) for m in multiples):
      multiple = _pick(one_hot, jnp.asarray(multiples))
      peak = jnp.minimum(
        peak, multiple * jnp.std(w, axis=contracted, keepdims=True)
      )
    return quantize.quantize(w, quantize.select(menu, one_hot), peak)

  def _statistics(self, menu) -> dict[str, nn.Variable]:
    variable = functools.partial(self.module.variable, 'quant_stats')
    multiples = clipping.multiples(self.spec.first_act_clip, menu)
    return dict(
      mean=variable('mean', jnp.zeros, ()),
      mean_square=variable('mean_square', jnp.zeros, ()),
      count=variable('count', jnp.zeros, (), jnp.int32),
      active=variable('active', jnp.ones, (), jnp.bool_),
      clip=variable('clip', jnp.asarray, multiples, jnp.float32),
    )

  def _activations(self, x, menu, one_hot, stats):
    self.module.sow('act_inputs', 'x', x)  # For `profile`; else nothing.
    mean, square, count = stats['mean'], stats['mean_square'], stats['count']
    if self.module.is_mutable_collection('quant_stats'):
      count.value += 1
      weight = jnp.maximum(1.0 / count.value, 1.0 - _STATS_DECAY)
      seen = lax.stop_gradient(x)
      mean.value += weight * (jnp.mean(seen) - mean.value)
      square.value += weight * (jnp.mean(seen * seen) - square.value)
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


def _twin(module: nn.Module, linen_class: type[nn.Module], **replaced: Any):
  """Returns a linen layer in the module's own scope, with fields replaced."""
  fields = {
    name: getattr(module, name)
    for name in linen_class.__dataclass_fields__
    if name not in ('parent', 'name')
  }
  return linen_class(**{**fields, 'parent': module.scope, **replaced})


def apply_conv(operands: Operands, inputs: jax.Array) -> jax.Array:
  """Applies `nn.Conv` with the module's fields to quantized operands."""
  return _with_op(operands, nn.Conv, 'conv_general_dilated', _conv, inputs)


def apply_dense(operands: Operands, inputs: jax.Array) -> jax.Array:
  """Applies `nn.Dense` with the module's fields to quantized operands."""
  return _with_op(operands, nn.Dense, 'dot_general', _dot_general, inputs)


def apply_dense_general(operands: Operands, inputs: jax.Array) -> jax.Array:
  """Applies `nn.DenseGeneral` with the module's fields likewise."""
  op = _dot_general
  return _with_op(operands, nn.DenseGeneral, 'dot_general', op, inputs)


def _with_op(operands, linen_class, field: str, op: Callable, inputs):
  """Applies the linen layer with its op replaced by a quantized one.

  Operands stay float32 until they are on the grid, and the bias is added to the
  float32 result, which is rounded once to the layer's dtype.
  """
  module = operands.module
  for given in (field, f'{field}_cls'):
    if getattr(module, given) is not None:
      raise ValueError(
        f'{type(module).__name__} was given {given}, which is what '
        'quantization replaces'
      )
  op = functools.partial(op, operands)
  twin = _twin(module, linen_class, promote_dtype=operands.keep, **{field: op})
  return twin(inputs).astype(operands.dtype)


def _conv(
  operands: Operands, lhs, rhs, window_strides, padding, **kwargs
) -> jax.Array:
  """`lax.conv_general_dilated` with quantized operands; channels last."""
  x, w = operands(lhs, rhs, tuple(range(rhs.ndim - 1)))
  y = operands.conv(x, w, window_strides, padding, **kwargs)
  operands.record('conv', y.size * rhs[..., 0].size, rhs.size, rhs.shape[-1])
  y = quantize.rescale(y, x.scale, w.scale)
  return linear.computed_once(y, w.scale)


def _dot_general(
  operands: Operands, lhs, rhs, dimension_numbers, precision
) -> jax.Array:
  """`lax.dot_general` with quantized operands."""
  (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = dimension_numbers
  x, w = operands(lhs, rhs, tuple(rhs_contract))
  y = operands.dot_general(x, w, dimension_numbers, precision)
  lhs_free = lhs.ndim - len(lhs_contract) - len(lhs_batch)
  rhs_free = [
    i for i in range(rhs.ndim) if i not in (*rhs_contract, *rhs_batch)
  ]
  # The result's axes: batch, then the activations' own, then the weights'.
  scale_shape = [rhs.shape[i] for i in rhs_batch]
  scale_shape += [1] * lhs_free + [rhs.shape[i] for i in rhs_free]
  summed = math.prod(rhs.shape[i] for i in rhs_contract)
  operands.record('dense', y.size * summed, rhs.size, rhs.size // summed)
  w_scale = w.scale
  if w_scale.ndim:
    w_scale = jnp.transpose(w_scale, (*rhs_batch, *rhs_contract, *rhs_free))
    w_scale = w_scale.reshape(scale_shape)
  y = quantize.rescale(y, x.scale, w_scale)
  return linear.computed_once(y, w_scale)


def apply_einsum(
  operands: Operands, einsum_str: str, inputs: jax.Array
) -> jax.Array:
  """`nn.Einsum` with quantized operands; scales and bias follow its result."""
  after = []

  def quantized(x, w, bias, dtype):
    del dtype
    labels, result, _ = opt_einsum.parser.parse_einsum_input((einsum_str, x, w))
    x_labels, w_labels = labels.split(',')
    sizes = dict(zip(x_labels + w_labels, (*x.shape, *w.shape)))
    contracted = tuple(i for i, c in enumerate(w_labels) if c not in result)
    x_q, w_q = operands(x, w, contracted)
    summed = math.prod(w.shape[i] for i in contracted)
    macs = math.prod(sizes.values())
    operands.record('einsum', macs, w.size, w.size // summed)

    channels = [c for c in w_labels if c in result]
    broadcast = [sizes[c] if c in channels else 1 for c in result]
    in_order = sorted(
      range(len(channels)), key=lambda i: result.index(channels[i])
    )
    w_scale = w_q.scale
    if w_scale.ndim:
      w_scale = jnp.squeeze(w_scale, contracted).transpose(in_order)
      w_scale = w_scale.reshape(broadcast)
    if bias is not None:
      bias = bias.reshape(broadcast)
    after.extend((x_q.scale, w_scale, bias))
    return x_q.values, w_q.values, None

  module = operands.module
  y = _twin(
    module,
    nn.Einsum,
    einsum_str=None,  # Given with the call.
    promote_dtype=quantized,
    preferred_element_type=operands.accumulator,
  )(inputs, einsum_str).astype(jnp.float32)
  x_scale, w_scale, bias = after
  y = quantize.rescale(y, x_scale, w_scale)
  return (y if bias is None else y + bias).astype(operands.dtype)
