"""Quantized ops of linen layers whose op cannot be replaced.

These are ConvTranspose, ConvLocal, Embed and the products of attention, which
only intercepted models have. If linen itself multiplies, `promote_dtype` puts
the operands on the grid before, and the scales and the bias are applied to the
result.
"""

from collections.abc import Callable
import dataclasses
import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fliqs_jax.layers import operands as operands_lib
from fliqs_jax.layers import quant_layers
from fliqs_jax.numerics import float_ops
from fliqs_jax.numerics import quantize
from fliqs_jax.space import quant_spec

# {linen's field of a product of attention: the product's name below its path}.
PRODUCTS = {
  'qk_attn_weights_einsum_cls': 'qk',
  'attn_weights_value_einsum_cls': 'av',
}


def conv_transpose(
  operands: operands_lib.Operands, inputs: jax.Array
) -> jax.Array:
  """Applies `nn.ConvTranspose` to quantized operands.

  Args:
    operands: the operands of the layer, with a scale per output channel.
    inputs: [..., H, W, C] the layer's input.

  Returns:
    [..., H', W', features] of the layer's dtype.
  """
  operands.has_integer_op = False
  module = operands.module
  after = []

  def quantized(x, w, bias, dtype):
    del dtype
    channel = w.ndim - (2 if module.transpose_kernel else 1)
    summed = tuple(i for i in range(w.ndim) if i != channel)
    x_q, w_q = operands(x, w, summed)
    # Each input is multiplied by each tap, for any strides.
    macs = x.size * math.prod(w.shape[:-2]) * module.features
    operands.record('conv', macs, w.size, module.features)
    after.extend((x_q.scale, _flat(w_q.scale), bias))
    return x_q.values, w_q.values, _nothing(bias)

  y = quant_layers.twin(
    module,
    nn.ConvTranspose,
    promote_dtype=quantized,
    preferred_element_type=jnp.float32,
  )(inputs)
  return _finish(operands, y, *after)


def conv_local(operands: operands_lib.Operands, inputs: jax.Array) -> jax.Array:
  """Applies `nn.ConvLocal` to quantized operands.

  Args:
    operands: the operands of the layer, with a scale per output and position.
    inputs: [..., H, W, C] the layer's input.

  Returns:
    [..., H', W', features] of the layer's dtype.
  """
  operands.has_integer_op = False
  module = operands.module
  after = []

  def quantized(x, w, bias, dtype):
    del dtype
    x_q, w_q = operands(x, w, (w.ndim - 2,))
    channels = w.size // w.shape[-2]
    operands.record('conv', x.shape[0] * w.size, w.size, channels)
    w_scale = w_q.scale
    if w_scale.ndim:
      w_scale = jnp.squeeze(w_scale, -2)
    after.extend((x_q.scale, w_scale, bias))
    # Linen's op accumulates in the type of its operands.
    x, w = (q.values.astype(jnp.float32) for q in (x_q, w_q))
    return x, w, _nothing(bias)

  hook = 'conv_general_dilated'
  y = quant_layers.twin(
    module,
    nn.ConvLocal,
    promote_dtype=quantized,
    **{hook: None, f'{hook}_cls': None},
  )(inputs)
  return _finish(operands, y, *after)


def _nothing(bias):
  # Linen must add zeros: the bias is added after the scales.
  return None if bias is None else jnp.zeros_like(bias)


def _finish(operands, y, x_scale, w_scale, bias):
  """Scales the result of linen's op, adds the bias and rounds once."""
  # Weights that are not quantized have one scale, 1.
  w_scale = _below(w_scale, y) if w_scale.ndim else w_scale
  y = quantize.rescale(y, x_scale, w_scale)
  y = float_ops.computed_once(y, w_scale)
  if bias is not None:
    y += _below(bias.astype(jnp.float32), y)
  return y.astype(operands.dtype)


def _flat(scale):
  return scale.reshape(-1) if scale.ndim else scale


def _below(small, y):
  return small.reshape((1,) * (y.ndim - small.ndim) + small.shape)


def embed(
  operands: operands_lib.Operands, inputs: jax.Array, method: str
) -> jax.Array:
  """Applies `nn.Embed` with a quantized table, whose rows each have a scale.

  Args:
    operands: the operands of the layer; its activations are not quantized.
    inputs: for `__call__` int [...], rows to look up; for `attend` float
      [..., features], queries.
    method: the method that is called, `__call__` or `attend`.

  Returns:
    For `__call__` [..., features] rows, for `attend` [..., num_embeddings]
    products with all rows; both of the layer's dtype.
  """
  operands.has_integer_op = False
  choices = operands.choices
  operands.choices = dataclasses.replace(choices, activations=None, tied=False)
  table = operands.module.embedding.astype(jnp.float32)
  rows, features = table.shape
  x = jnp.zeros(()) if method == '__call__' else inputs
  x, w = operands(x, table, (1,))
  if method == '__call__':
    operands.record('embed', 0, table.size, rows)
    w_scale = jnp.broadcast_to(w.scale, (rows, 1))
    y = w.values.astype(jnp.float32) * w_scale
    if rows == 1:  # As in linen, the only row for every index.
      y = jnp.broadcast_to(y, (*inputs.shape, features))
    else:
      y = jnp.take(y, inputs, axis=0)
    return y.astype(operands.dtype)
  operands.record('embed', inputs.size * rows, table.size, rows)
  y = jnp.dot(x.values, w.values.T, preferred_element_type=jnp.float32)
  return _finish(operands, y, x.scale, _flat(w.scale), None)


def attention(
  module: nn.MultiHeadDotProductAttention,
  operands: Callable[[str, jax.Array], operands_lib.Operands],
) -> nn.Module:
  """Returns an attention layer whose two products are quantized.

  The products are named `qk` (queries and keys) and `av` (attention weights and
  values) below the layer's path. Keys and values have the format `weights`.

  Args:
    module: the attention layer.
    operands: (name of a product, its first operand) -> its `Product`.
  """
  products = {}
  for field, name in PRODUCTS.items():
    product = functools.partial(_product, operands, name)
    products[field] = functools.partial(lambda einsum: einsum, product)
  return quant_layers.twin(module, nn.MultiHeadDotProductAttention, **products)


def product_choices(
  spec: quant_spec.QuantSpec, path: str
) -> quant_spec.Choices:
  """Returns the formats that a product of two activations may use.

  Args:
    spec: the rules of the model.
    path: path of the product, such as `block0/attention/qk`.
  """
  choices = spec.choices(path)
  if spec.mode == 'weights':
    return quant_spec.Choices(None, None, False)
  if spec.mode == 'activations':
    menu = choices.activations
    return quant_spec.Choices(menu, menu, menu is not None)
  return choices


class Product(operands_lib.Operands):
  """The operands of a product of two activations, both quantized per tensor.

  It differs from `operands.Operands` in two points: a call takes both operands,
  and `state` holds the variables of a part of the layer, `qk` or `av`.
  """

  def __init__(
    self,
    module: nn.Module,
    inputs: jax.Array,
    spec: quant_spec.QuantSpec,
    state: Any,
  ):
    super().__init__(module, inputs, spec, state)
    self.dtype = inputs.dtype
    self.choices = product_choices(spec, state.path)

  def __call__(
    self, lhs: jax.Array, rhs: jax.Array, contracted: tuple[int, ...] = ()
  ) -> tuple[quantize.Quantized, quantize.Quantized]:
    """Returns both operands [...] on their grids."""
    x, w = self.activations(lhs), self.weights(rhs, contracted)
    if not self.module.is_initializing():
      self.state.sow('operands', 'activations', x.scale)
      self.state.sow('operands', 'weights', w.scale)
    return x, w

  def _activations_on_grid(self, x):
    """Returns the first operand as a function of its format.

    The threshold of the attention weights is the bound of the softmax, 1: their
    distribution is far from a Laplacian one.
    """
    menu = self.choices.activations
    if menu is None or self.state.parts[-1] != 'av':
      return self._profiled('activations', x)
    values = x.astype(jnp.float32)
    own = self._own('activations', x)
    active = own.state.variable(
      'quant_stats', 'active', jnp.ones, (), jnp.bool_
    ).value

    def on_grid(one_hot):
      q = quantize.quantize(
        values, quantize.select(menu, one_hot), jnp.ones(())
      )
      return quantize.Quantized(
        jnp.where(active, q.values, values), jnp.where(active, q.scale, 1.0)
      )

    return on_grid

  def _weights_on_grid(self, w, contracted):
    """Returns the second operand as a function of its format."""
    del contracted  # One scale for the tensor.
    return self._profiled('weights', w)

  def _profiled(self, side, x):
    menu, values = getattr(self.choices, side), x.astype(jnp.float32)
    if menu is None:
      return lambda one_hot: quantize.unquantized(values)
    return self._own(side, x).profiled(values, menu)

  def _own(self, side, x):
    """Returns the operands that hold the moments of a side."""
    return operands_lib.Operands(self.module, x, self.spec, self.state.at(side))


def _product(operands_of, name, einsum_str, lhs, rhs) -> jax.Array:
  """Returns `jnp.einsum` of two activations that are put on their grids."""
  operands = operands_of(name, lhs)
  if not operands.module.is_initializing() and not operands.is_quantized:
    return jnp.einsum(einsum_str, lhs, rhs)

  def op(x, w):
    y = jnp.einsum(
      einsum_str, x.values, w.values, preferred_element_type=jnp.float32
    )
    return quantize.rescale(y, x.scale, w.scale)

  y = operands.apply(op, lhs, rhs, ())
  operands.state.mark(lhs)
  operands.record('attend', y.size * lhs.shape[-1], 0, 1)
  return y.astype(operands.dtype)
