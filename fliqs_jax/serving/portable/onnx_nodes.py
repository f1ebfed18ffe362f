"""Products of a served program as nodes of ONNX.

An operand of an integer format is quantized by QuantizeLinear and read back by
DequantizeLinear (QDQ); the product of two such operands is a MatMul or a Conv,
which a runtime that knows the pattern computes in integers. Other formats are
rounded by arithmetic on floats.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import math
from typing import Any

import jax
from jax import lax
from jax.extend import core
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from fliqs_jax.numerics import formats
from fliqs_jax.numerics import quantize
from fliqs_jax.program import contractions
from fliqs_jax.program import products as products_lib
from fliqs_jax.serving import served_products

_INT8 = 3  # The number of the type in ONNX.
ZERO = 128  # The code of zero among activations.

# A node of ONNX in a program of JAX, which only a converter reads.
node_p = core.Primitive('onnx_node')


@node_p.def_abstract_eval
def _result_type(*operands: Any, shape: Any, dtype: Any, **_: Any) -> Any:
  del operands
  return jax.core.ShapedArray(shape, dtype)


def node(
  op: str,
  *operands: Any,
  shape: Sequence[Any],
  dtype: Any = np.float32,
  name: str = '',
  **attributes: Any,
) -> jax.Array:
  """Returns the result of a node of ONNX, traced.

  Args:
    op: its name in ONNX.
    *operands: arrays.
    shape: shape of the result.
    dtype: type of the result.
    name: name of the result in the file; empty for any.
    **attributes: those of the node; numbers, or tuples of integers.
  """
  return node_p.bind(
    *operands,
    op=op,
    shape=tuple(shape),
    dtype=np.dtype(dtype),
    name=name,
    attributes=tuple(attributes.items()),
  )


class Nodes(served_products.Served):
  """The rule of a served program whose products are nodes of ONNX."""

  def _product(self, product, dtypes, contraction, pair, given) -> jax.Array:
    sides = product.sides()
    right = sides['weights']
    if product.slices or not isinstance(
      contraction, (contractions.Conv, contractions.Dot)
    ):
      x, w = (
        _in_floats(self._operand(product, side, pair[i], given))
        for side, i in sides.items()
      )
      return contraction.scaled(x, w, right)
    menu = self.menus[product.path].get('weights', ())
    if 'values' in given and _are_integers(menu):
      name = products_lib.join(product.path, 'weights')
      weights = _Weights(_stored(given['values'], menu), given['weights'], name)
    else:
      weights = _Weights(self._on_grid(product, 'weights', given, pair[right]))
    round_x = functools.partial(self._on_grid, product, 'activations', given)
    multiply = _conv if isinstance(contraction, contractions.Conv) else _dot
    return multiply(contraction, pair[1 - right], weights, round_x, right)

  def _on_grid(self, product, side, given, x) -> jax.Array:
    """Returns an operand on its grid, in its own units, float32."""
    menu = self.menus[product.path].get(side, ())
    if not menu:
      return jnp.asarray(x, jnp.float32)
    if not _are_integers(menu):
      q = _in_floats(self._operand(product, side, x, given))
      return q.values * q.scale
    largest = np.uint8(menu[0].max_value)
    if len(menu) > 1:
      grid = quantize.select(menu, given[f'{side}_format'])
      largest = grid.max_value.astype(jnp.uint8)
    return _in_uint8(x.astype(jnp.float32), given[side], largest)

  def shared(self, x: jax.Array) -> jax.Array:
    """Returns x: a node computes it once."""
    return x

  def _integers(self, x: jax.Array) -> jax.Array:
    return lax.round(x, lax.RoundingMethod.TO_NEAREST_EVEN)

  def _rounded(self, x: jax.Array, grid: quantize.Grid) -> jax.Array:
    """`quantize.round_to_grid` without the bits of a float, which ONNX lacks.

    A logarithm finds the exponent, or one beside it.
    """
    x = jnp.clip(x, -grid.max_value, grid.max_value)
    magnitude = jnp.maximum(jnp.abs(x), grid.least)
    power = _power_of_two(jnp.floor(jnp.log2(magnitude)))
    power = jnp.where(power > magnitude, power * 0.5, power)
    power = jnp.where(power * 2 <= magnitude, power * 2, power)
    step = power / grid.steps
    return lax.round(x / step, lax.RoundingMethod.TO_NEAREST_EVEN) * step


def _power_of_two(exponent: jax.Array) -> jax.Array:
  # jnp.exp2 is not exact.
  return node('Pow', np.float32(2), exponent, shape=exponent.shape)


@dataclasses.dataclass(frozen=True)
class _Weights:
  """The right operand of a product.

  Attributes:
    values: [...] integers, or floats in their own units.
    scale: that of integers, with the axes of `values`, 1 where summed; else
      None.
    name: name of the weights in the file.
  """

  values: Any
  scale: Any = None
  name: str = ''

  def ordered(self, axes: Sequence[int], shape: Sequence[int], channels: int):
    """Returns them in floats, transposed and reshaped.

    Args:
      axes: order of the axes.
      shape: shape after it.
      channels: axis of the channels.
    """
    values = self.values.transpose(axes).reshape(shape)
    if self.scale is None:
      return values
    codes = values
    if codes.dtype != np.int8:  # Runtimes multiply no int4, but read it.
      codes = node('Cast', codes, shape=shape, dtype=np.int8, to=_INT8)
    scale = self.scale.transpose(axes).reshape(-1)
    zero = np.zeros(scale.shape, np.int8)
    return node(
      'DequantizeLinear',
      codes,
      scale,
      zero,
      shape=shape,
      name=self.name,
      axis=channels,
    )


def convolution(eqn: core.JaxprEqn, x: Any, w: Any) -> Any:
  """Returns a convolution without formats by Conv; None: it has no node.

  Args:
    eqn: a `conv_general_dilated`.
    x: its input.
    w: its kernel.
  """
  if eqn.params['batch_group_count'] > 1:
    return None
  contraction = contractions.of(eqn)
  return _conv(contraction, x, _Weights(w), lambda x: x, 1)


def _are_integers(menu: Sequence[formats.NumericFormat]) -> bool:
  return bool(menu) and all(f.is_integer for f in menu)


def _in_floats(q: quantize.Quantized) -> quantize.Quantized:
  return quantize.Quantized(jnp.asarray(q.values, jnp.float32), q.scale)


def _stored(values: Any, menu: Sequence[formats.NumericFormat]) -> Any:
  """Returns integer weights in the type that the file has: int4 or int8."""
  if not isinstance(values, np.ndarray):  # A slice of those of a scan.
    return values
  is_narrow = max(f.bits for f in menu) <= 4
  return values.astype(ml_dtypes.int4 if is_narrow else np.int8)


def _in_uint8(x: jax.Array, scale: Any, largest: Any) -> jax.Array:
  """Returns x on a grid of integers, by way of uint8.

  ONNX Runtime multiplies uint8 by int8 fastest on x86. The clipping is one of
  integers, as one of floats would part the rounding from the product before it.

  Args:
    x: [...] float32.
    scale: [] float32, the step of the grid.
    largest: [] uint8, the largest integer.
  """
  zero = np.uint8(ZERO)
  codes = node('QuantizeLinear', x, scale, zero, shape=x.shape, dtype=np.uint8)
  codes = node(
    'Clip',
    codes,
    zero - largest,
    zero + largest,
    shape=x.shape,
    dtype=np.uint8,
  )
  return node('DequantizeLinear', codes, scale, zero, shape=x.shape)


def _conv(
  contraction: contractions.Conv,
  x: jax.Array,
  weights: _Weights,
  round_x: Callable[[jax.Array], jax.Array],
  right: int,
) -> jax.Array:
  """Returns a convolution by Conv, which has channels first."""
  del right  # A kernel is the right operand.
  options = contraction.options
  images, kernel, results = options['dimension_numbers']
  shape = [contraction.shapes[1][i] for i in kernel]
  # A runtime moves transpositions of floats, but not one behind the rounding.
  x, pads = _spread(
    x.transpose(images), options['lhs_dilation'], options['padding']
  )
  x = round_x(x)
  w = weights.ordered(kernel, shape, channels=0)
  same = dict(
    window_strides=options['window_strides'],
    padding=pads,
    rhs_dilation=options['rhs_dilation'],
    feature_group_count=options['feature_group_count'],
  )
  plain = functools.partial(lax.conv_general_dilated, **same)
  y = node(
    'Conv',
    x,
    w,
    shape=jax.eval_shape(plain, x, w).shape,
    strides=tuple(options['window_strides']),
    pads=tuple(pair[i] for i in (0, 1) for pair in pads),
    dilations=tuple(options['rhs_dilation']),
    group=options['feature_group_count'],
  )
  return y.transpose(np.argsort(results))


def _spread(
  x: jax.Array,
  dilation: Sequence[int],
  padding: Sequence[tuple[int, int]],
) -> tuple[jax.Array, list[tuple[int, int]]]:
  """Returns what Conv reads: it has no dilation of its input, and cuts nothing.

  Args:
    x: [N, C, ...] the input.
    dilation: steps between its elements, one for each spatial dimension.
    padding: (low, high), also negative, of each.

  Returns:
    The input with zeros between its elements, without those that negative
    padding cuts off, and the rest of the padding.
  """
  for axis, (step, (low, high)) in enumerate(zip(dilation, padding), 2):
    size = (x.shape[axis] - 1) * step + 1
    if step > 1:
      one = jnp.expand_dims(x, axis + 1)
      zeros = [jnp.zeros_like(one)] * (step - 1)
      together = jnp.concatenate([one, *zeros], axis + 1)
      before, after = x.shape[:axis], x.shape[axis + 1 :]
      x = together.reshape((*before, x.shape[axis] * step, *after))
    first, last = max(-low, 0), size - max(-high, 0)
    if (first, last) != (0, x.shape[axis]):
      x = lax.slice_in_dim(x, first, last, axis=axis)
  return x, [(max(low, 0), max(high, 0)) for low, high in padding]


def _dot(
  contraction: contractions.Dot,
  x: jax.Array,
  weights: _Weights,
  round_x: Callable[[jax.Array], jax.Array],
  right: int,
) -> jax.Array:
  """Returns a product by MatMul: of its axes, the summed ones become one."""
  x_shape, w_shape = (contraction.shapes[i] for i in (1 - right, right))
  (x_summed, summed), (x_batch, batch) = (
    pair if right else pair[::-1] for pair in contraction.numbers
  )
  x_free, free = (
    [i for i in range(len(shape)) if i not in (*one, *other)]
    for shape, one, other in (
      (x_shape, x_summed, x_batch),
      (w_shape, summed, batch),
    )
  )
  terms = math.prod(w_shape[i] for i in summed)
  together = tuple(w_shape[i] for i in batch)
  rows = tuple(x_shape[i] for i in x_free)
  features = tuple(w_shape[i] for i in free)
  # Without a batch, rows may have any number of axes.
  lines = (math.prod(rows),) if batch else rows
  columns = math.prod(features)
  x = x.transpose((*x_batch, *x_free, *x_summed))
  x = round_x(x.reshape((*together, *lines, terms)))
  w = weights.ordered(
    (*batch, *summed, *free), (*together, terms, columns), channels=1
  )
  y = node('MatMul', x, w, shape=(*together, *lines, columns))
  y = y.reshape((*together, *rows, *features))
  if right:
    return y
  first = len(together)
  own = range(first, first + len(rows))
  return jnp.moveaxis(y, own, [i + len(features) for i in own])
