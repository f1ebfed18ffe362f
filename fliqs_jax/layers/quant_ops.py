"""The ops of linen's layers, on quantized operands.

Each layer of `quant_layers` is the linen layer of the same parameters, in which
one of these replaces the multiplication: both operands are put on the grid of
the format that `arch` selects, the op runs on grid values with a float32
accumulator, and the scales are applied to its result.
"""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
from jax import lax
import jax.numpy as jnp
import opt_einsum

from fliqs_jax.layers import operands as operands_lib
from fliqs_jax.numerics import float_ops
from fliqs_jax.numerics import quantize


def apply(
  module: nn.Module, linen_class: type[nn.Module], inputs: jax.Array
) -> jax.Array:
  """Applies a linen layer, with the module's fields, to quantized operands.

  Operands stay float32 until they are on the grid, and the bias is added to the
  float32 result, which is rounded once to the layer's dtype.

  Args:
    module: the quantized layer.
    linen_class: `nn.Conv`, `nn.Dense` or `nn.DenseGeneral`.
    inputs: [...] the input of the linen layer.

  Raises:
    ValueError: the module has an op of its own in the field that quantization
      replaces.
  """
  operands = operands_lib.Operands(module, inputs)
  field, op = _HOOKS[linen_class]
  for given in (field, f'{field}_cls'):
    if getattr(module, given) is not None:
      raise ValueError(
        f'{type(module).__name__} has {given}, a field that quantization '
        'replaces; leave it at its default'
      )
  hooks = {field: functools.partial(op, operands)}
  layer = _twin(module, linen_class, promote_dtype=operands.keep, **hooks)
  return layer(inputs).astype(operands.dtype)


def apply_einsum(
  module: nn.Module, einsum_str: str, inputs: jax.Array
) -> jax.Array:
  """Applies `nn.Einsum`, with the module's fields, to quantized operands.

  Args:
    module: the quantized layer.
    einsum_str: the contraction of the input and the kernel.
    inputs: [...] the layer's input.

  Returns:
    [...] of the layer's dtype: the scaled result plus the bias.
  """
  operands, after = operands_lib.Operands(module, inputs), []

  def quantized(x, w, bias, dtype):
    del dtype
    labels, result, _ = opt_einsum.parser.parse_einsum_input((einsum_str, x, w))
    x_labels, w_labels = labels.split(',')
    sizes = dict(zip(x_labels + w_labels, (*x.shape, *w.shape)))
    contracted = tuple(i for i, c in enumerate(w_labels) if c not in result)
    channels = [c for c in w_labels if c in result]
    broadcast = [sizes[c] if c in channels else 1 for c in result]
    in_order = sorted(
      range(len(channels)), key=lambda i: result.index(channels[i])
    )

    def spread(scale):
      if not scale.ndim:
        return scale
      scale = jnp.squeeze(scale, contracted).transpose(in_order)
      return scale.reshape(broadcast)

    def op(x, w):
      y = jnp.einsum(einsum_str, x.values, w.values, precision=module.precision)
      return quantize.rescale(y, x.scale, spread(w.scale))

    apart = x_labels[0] in result and x_labels[0] not in w_labels
    operands.calibrate(op, x, w, contracted, has_examples=apart and x.ndim > 2)
    x_q, w_q = operands(x, w, contracted)
    summed = math.prod(w.shape[i] for i in contracted)
    operands.record(
      'einsum',
      macs=math.prod(sizes.values()),
      weights=w.size,
      channels=w.size // summed,
      inputs=x.size,
      outputs=math.prod(sizes[label] for label in result),
    )
    if bias is not None:
      bias = bias.reshape(broadcast)
    after.extend((x_q.scale, spread(w_q.scale), bias))
    return x_q.values, w_q.values, None

  y = _twin(
    module,
    nn.Einsum,
    einsum_str=None,  # An argument of the call.
    promote_dtype=quantized,
    preferred_element_type=jnp.float32,
  )(inputs, einsum_str).astype(jnp.float32)
  x_scale, w_scale, bias = after
  y = quantize.rescale(y, x_scale, w_scale)
  return (y if bias is None else y + bias).astype(operands.dtype)


def branched_conv(module: nn.Module, inputs: jax.Array) -> jax.Array:
  """Applies a convolution that has a kernel for each size, and uses one.

  If the leaf is not one-hot, the result is the mean of all branches, weighted
  by the leaf (the warm-up of TuNAS).

  Args:
    module: the quantized convolution; its `kernel` has branches.
    inputs: [..., H, W, C].

  Returns:
    [..., H', W', features] of the layer's dtype.
  """
  operands = operands_lib.Operands(module, inputs)
  leaf, labels = operands.leaves['kernel'], module.kernel.labels
  groups = module.feature_group_count
  shape = (inputs.shape[-1] // groups, module.features)
  kernels = [
    module.param(
      f'kernel{k}', module.kernel_init, (k, k, *shape), module.param_dtype
    )
    for k in labels
  ]
  x = operands.activations(inputs)
  strides = module.strides or 1
  window = (strides, strides) if isinstance(strides, int) else tuple(strides)

  def branch(kernel):
    w = operands.weights(kernel, (0, 1, 2))
    return _convolved(
      module,
      x,
      w,
      window,
      module.padding,
      lhs_dilation=(1, 1),
      rhs_dilation=(1, 1),
      dimension_numbers=float_ops.IMAGES,
      feature_group_count=groups,
      precision=module.precision,
    )

  if module.is_initializing():
    largest = kernels[labels.index(module.kernel.size)]
    y = branch(largest)
    operands.record(
      _conv_kind(largest.shape, groups),
      macs=y.size * (largest.size // module.features),
      weights=largest.size,
      channels=module.features,
      inputs=inputs.size,
      outputs=y.size,
      spare=sum(kernel.size for kernel in kernels) - largest.size,
      window=largest.shape[:-2],
      strides=window,
    )
  else:

    def add(weight, kernel, total):
      return total + weight * branch(kernel)

    *batch, height, width, _ = inputs.shape
    size = (-(-height // window[0]), -(-width // window[1]), module.features)
    # Not one switch, whose case for the mean would have each branch again.
    y = jnp.zeros((*batch, *size))
    for weight, kernel in zip(leaf, kernels):
      with_branch = functools.partial(add, weight, kernel)
      y = lax.cond(weight != 0, with_branch, lambda total: total, y)
  if module.use_bias:
    bias = module.param(
      'bias', module.bias_init, (module.features,), module.param_dtype
    )
    y += bias.reshape((1,) * (y.ndim - 1) + (-1,))
  return y.astype(operands.dtype)


def _conv(
  operands: operands_lib.Operands, lhs, rhs, window_strides, padding, **kwargs
) -> jax.Array:
  """`lax.conv_general_dilated` with quantized operands; channels last."""

  def op(x, w):
    return _convolved(operands.module, x, w, window_strides, padding, **kwargs)

  y = operands.apply(op, lhs, rhs, tuple(range(rhs.ndim - 1)))
  kind = _conv_kind(rhs.shape, kwargs['feature_group_count'])
  operands.record(
    kind,
    macs=y.size * (rhs.size // rhs.shape[-1]),
    weights=rhs.size,
    channels=rhs.shape[-1],
    inputs=lhs.size,
    outputs=y.size,
    window=rhs.shape[:-2],
    strides=tuple(window_strides),
  )
  return y


def _conv_kind(kernel: tuple[int, ...], groups: int) -> str:
  """Returns the kind of a convolution, `ops.OpShape.kind`."""
  *taps, inputs, _ = kernel
  # One input to an output is not enough: an image may have a single channel.
  if groups > 1 and inputs == 1:
    return 'depthwise'
  return 'pointwise' if max(taps) == 1 else 'conv'


def _convolved(module, x, w, window_strides, padding, **kwargs) -> jax.Array:
  if module.is_initializing():  # Only the shape of the result is needed.
    return lax.conv_general_dilated(
      x.values, w.values, window_strides, padding, **kwargs
    )
  y = float_ops.conv_general_dilated(
    x.values, w.values, window_strides, padding, **kwargs
  )
  y = quantize.rescale(y, x.scale, w.scale)
  return float_ops.computed_once(y, w.scale)


def _dot_general(
  operands: operands_lib.Operands, lhs, rhs, dimension_numbers, precision
) -> jax.Array:
  """`lax.dot_general` with quantized operands."""
  (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = dimension_numbers
  lhs_free = lhs.ndim - len(lhs_contract) - len(lhs_batch)
  rhs_free = [
    i for i in range(rhs.ndim) if i not in (*rhs_contract, *rhs_batch)
  ]
  # The result's axes: batch, then the activations' own, then the weights'.
  scale_shape = [rhs.shape[i] for i in rhs_batch]
  scale_shape += [1] * lhs_free + [rhs.shape[i] for i in rhs_free]

  def op(x, w):
    y = float_ops.dot_general(x.values, w.values, dimension_numbers, precision)
    w_scale = w.scale
    if w_scale.ndim:
      w_scale = jnp.transpose(w_scale, (*rhs_batch, *rhs_contract, *rhs_free))
      w_scale = w_scale.reshape(scale_shape)
    y = quantize.rescale(y, x.scale, w_scale)
    return float_ops.computed_once(y, w_scale)

  y = operands.apply(op, lhs, rhs, tuple(rhs_contract))
  summed = math.prod(rhs.shape[i] for i in rhs_contract)
  operands.record(
    'dense',
    macs=y.size * summed,
    weights=rhs.size,
    channels=rhs.size // summed,
    inputs=lhs.size,
    outputs=y.size,
  )
  return y


def _twin(module: nn.Module, linen_class: type[nn.Module], **replaced: Any):
  """Returns a linen layer in the module's own scope, with fields replaced."""
  fields = {
    name: getattr(module, name)
    for name in linen_class.__dataclass_fields__
    if name not in ('parent', 'name')
  }
  return linen_class(**{**fields, 'parent': module.scope, **replaced})


# {linen class: (the field for its op, the quantized op)}.
_HOOKS = {
  nn.Conv: ('conv_general_dilated', _conv),
  nn.Dense: ('dot_general', _dot_general),
  nn.DenseGeneral: ('dot_general', _dot_general),
}
