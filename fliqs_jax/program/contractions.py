"""Kinds of products: how each is computed on other operands, and its shape.

Another kind is another row of `KINDS`.
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

from fliqs_jax.numerics import float_ops
from fliqs_jax.numerics import int8_ops
from fliqs_jax.numerics import quantize
from fliqs_jax.program import equations

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Contraction:
  """A product of two operands: linear in each.

  Attributes:
    shapes: shapes of the operands.
    results: number of elements of the result.
  """

  shapes: tuple[Shape, Shape]
  results: int

  has_integer_form = True

  @property
  def kind(self) -> str:
    """The kind of the op, `ops.OpShape.kind`."""
    raise NotImplementedError

  @property
  def macs(self) -> int:
    """The number of multiply-accumulates."""
    raise NotImplementedError

  @property
  def window(self) -> tuple[int, ...]:
    """The height and width of a kernel in pixels; () if there is none."""
    return ()

  @property
  def strides(self) -> tuple[int, ...]:
    """The strides of a convolution; () of another product."""
    return ()

  def refusal(self, side: int | None) -> str:
    """Returns why the product cannot be quantized, or nothing.

    Args:
      side: which operand is weights, 0 or 1; None if neither.
    """
    del side
    return ''

  def summed(self, side: int) -> tuple[int, ...]:
    """Returns the axes of an operand that share a scale as weights."""
    raise NotImplementedError

  def has_examples(self, side: int) -> bool:
    """Returns whether the first axis of an operand may be examples.

    Args:
      side: which operand is the activations.
    """
    del side
    return False

  def slices(self) -> tuple[int, ...]:
    """Returns the lengths of axes of which each entry is a product apart."""
    return ()

  def slice(self) -> tuple['Contraction', tuple[int, int]]:
    """Returns the product of one slice, and the sliced axes of the operands."""
    raise NotImplementedError

  def floats(self, lhs: Any, rhs: Any) -> Any:
    """Returns the float32 result of operands [...] on their grids."""
    raise NotImplementedError

  def integers(self, lhs: Any, rhs: Any, shift: Any) -> Any:
    """Returns the int32 result of int8 operands.

    Args:
      lhs: int8 [...].
      rhs: int8 [...].
      shift: `int8_ops.offset` of the weights, or None.
    """
    raise NotImplementedError

  def spread(self, scale: Any, side: int) -> Any:
    """Returns the scale of an operand in the axes of the result.

    Args:
      scale: [], or with the operand's axes, of length 1 where summed.
      side: which operand it is of.
    """
    raise NotImplementedError

  def scaled(
    self, x: quantize.Quantized, w: quantize.Quantized, right: int
  ) -> Any:
    """Returns the float32 product of two operands on their grids.

    Args:
      x: the activations; of two, the first operand.
      w: the weights; of two activations, the second operand.
      right: which operand `w` is, 0 or 1.
    """
    operands = (x, w) if right else (w, x)
    y = self.floats(*(q.values for q in operands))
    return self.rescaled(y, x, w, right)

  def rescaled(
    self, y: Any, x: quantize.Quantized, w: quantize.Quantized, right: int
  ) -> Any:
    """Returns sums times both scales, float32; arguments as in `scaled`."""
    x_scale, w_scale = (
      self.spread(x.scale, 1 - right),
      self.spread(w.scale, right),
    )
    return quantize.rescale(y.astype(jnp.float32), x_scale, w_scale)


@dataclasses.dataclass(frozen=True)
class Dot(Contraction):
  """A `dot_general`.

  Attributes:
    numbers: contracted axes and batch axes of both operands, as in `lax`.
    precision: precision of the products.
    sharding: sharding of the result, if the program names it.
  """

  numbers: Any
  precision: Any
  sharding: Any

  @property
  def kind(self) -> str:
    """`dense`."""
    return 'dense'

  @property
  def macs(self) -> int:
    """Products of each element of the result."""
    return self.results * math.prod(
      self.shapes[0][i] for i in self.numbers[0][0]
    )

  def summed(self, side: int) -> tuple[int, ...]:
    """The contracted axes."""
    return tuple(self.numbers[0][side])

  def has_examples(self, side: int) -> bool:
    """If it is neither summed nor a batch axis, and not the only other one."""
    own = (*self.numbers[0][side], *self.numbers[1][side])
    return 0 not in own and len(self.shapes[side]) > 2

  def slices(self) -> tuple[int, ...]:
    """The lengths of the batch axes."""
    return tuple(self.shapes[0][i] for i in self.numbers[1][0])

  def slice(self) -> tuple[Contraction, tuple[int, int]]:
    """The product without its first batch axis."""
    contracted, batch = self.numbers
    first = tuple(axes[0] for axes in batch)

    def without(axes: Sequence[int], side: int) -> tuple[int, ...]:
      return tuple(i - (i > first[side]) for i in axes if i != first[side])

    numbers = tuple(
      tuple(without(axes, side) for side, axes in enumerate(pair))
      for pair in (contracted, batch)
    )
    shapes = tuple(
      tuple(n for i, n in enumerate(shape) if i != axis)
      for shape, axis in zip(self.shapes, first)
    )
    results = self.results // self.shapes[0][first[0]]
    sharding = self.sharding
    if sharding is not None:  # Batch axes are the result's first ones.
      sharding = sharding.update(spec=sharding.spec[1:])
    return Dot(shapes, results, numbers, self.precision, sharding), first

  def floats(self, lhs: Any, rhs: Any) -> Any:
    """The product of floats."""
    return float_ops.dot_general(
      lhs, rhs, self.numbers, self.precision, self.sharding
    )

  def integers(self, lhs: Any, rhs: Any, shift: Any) -> Any:
    """The product of integers."""
    return int8_ops.dot_general(lhs, rhs, self.numbers, shift)

  def spread(self, scale: Any, side: int) -> Any:
    """The result has batch axes, then those of the left, then of the right."""
    if not scale.ndim:
      return scale
    contracted, batch = (axes[side] for axes in self.numbers)
    free = [
      [i for i in range(len(shape)) if i not in (*summed, *batched)]
      for shape, summed, batched in zip(self.shapes, *self.numbers)
    ]
    scale = jnp.transpose(scale, (*batch, *contracted, *free[side]))
    own = scale.shape[len(batch) + len(contracted) :]
    others = (1,) * len(free[1 - side])
    after = (*others, *own) if side else (*own, *others)
    return scale.reshape((*scale.shape[: len(batch)], *after))


@dataclasses.dataclass(frozen=True)
class Conv(Contraction):
  """A `conv_general_dilated`, of which the right operand is the kernel.

  Attributes:
    options: arguments of `float_ops.conv_general_dilated` but operands and
      precision.
    precision: precision of the products.
    batch_groups: `batch_group_count`.
  """

  options: dict[str, Any]
  precision: Any
  batch_groups: int

  @property
  def _kernel(self) -> Any:
    return self.options['dimension_numbers'].rhs_spec

  @property
  def kind(self) -> str:
    """`depthwise`, `pointwise` or `conv`."""
    _, inputs, *taps = self._kernel
    shape = self.shapes[1]
    if self.options['feature_group_count'] > 1 and shape[inputs] == 1:
      return 'depthwise'
    return 'pointwise' if max(shape[i] for i in taps) == 1 else 'conv'

  @property
  def macs(self) -> int:
    """A product for each tap and input channel of each result.

    Where the input is spread out by zeros, each input meets each tap.
    """
    if max(self.options['lhs_dilation'], default=1) > 1:
      outputs, _, *taps = (self.shapes[1][i] for i in self._kernel)
      groups = self.options['feature_group_count']
      return math.prod(self.shapes[0]) * math.prod(taps) * outputs // groups
    return self.results * math.prod(self.shapes[1][i] for i in self._kernel[1:])

  @property
  def window(self) -> tuple[int, ...]:
    """The height and width of the kernel in pixels."""
    return tuple(self.shapes[1][i] for i in self._kernel[2:])

  @property
  def strides(self) -> tuple[int, ...]:
    """The strides along height and width."""
    return tuple(self.options['window_strides'])

  def refusal(self, side: int | None) -> str:
    """Convolutions of gradients have another form."""
    if side == 0 or self.batch_groups > 1:
      return 'it is a convolution as gradients have it'
    return ''

  def summed(self, side: int) -> tuple[int, ...]:
    """All axes but the output channels."""
    assert side == 1
    return tuple(i for i in range(len(self.shapes[1])) if i != self._kernel[0])

  def has_examples(self, side: int) -> bool:
    """The first axis of images is their number."""
    del side
    return self.options['dimension_numbers'].lhs_spec[0] == 0

  def floats(self, lhs: Any, rhs: Any) -> Any:
    """The convolution of floats."""
    return float_ops.conv_general_dilated(
      lhs, rhs, **self.options, precision=self.precision
    )

  def integers(self, lhs: Any, rhs: Any, shift: Any) -> Any:
    """The convolution of integers."""
    return int8_ops.conv_general_dilated(lhs, rhs, **self.options, shift=shift)

  def spread(self, scale: Any, side: int) -> Any:
    """The scale of the kernel lies along the output channels."""
    if not scale.ndim:
      return scale
    assert side == 1
    channels = self.options['dimension_numbers'].out_spec[1]
    shape = [1] * scale.ndim
    shape[channels] = -1
    return scale.reshape(shape)


@dataclasses.dataclass(frozen=True)
class Ragged(Contraction):
  """A `ragged_dot`: groups of rows, each times a matrix of its own.

  Attributes:
    bind: (lhs, rhs) -> float32 result; the sizes of the groups are inside.
  """

  bind: Callable[[Any, Any], Any]

  has_integer_form = False

  @property
  def kind(self) -> str:
    """`dense`."""
    return 'dense'

  @property
  def macs(self) -> int:
    """Each row meets one matrix."""
    return self.results * self.shapes[0][-1]

  def refusal(self, side: int | None) -> str:
    """Only the plain form [M, K] x [G, K, N] is known."""
    if side != 1 or [len(shape) for shape in self.shapes] != [2, 3]:
      return 'a ragged_dot is quantized as [M, K] x [G, K, N] weights only'
    return ''

  def summed(self, side: int) -> tuple[int, ...]:
    """The rows of each matrix: each group has scales of its own."""
    assert side == 1
    return (1,)

  def scaled(
    self, x: quantize.Quantized, w: quantize.Quantized, right: int
  ) -> Any:
    """The weights are scaled before: each row has the scales of its group."""
    assert right == 1
    values = w.values.astype(jnp.float32) * w.scale
    return self.bind(x.values.astype(jnp.float32), values) * x.scale


def of(
  eqn: core.JaxprEqn, operands: Sequence[Any] | None = None
) -> Contraction | None:
  """Returns the product of an equation; None if it is none.

  Args:
    eqn: any equation.
    operands: values of its operands; only `ragged_dot` reads those behind the
      first two.
  """
  make = KINDS.get(eqn.primitive.name)
  if make is None:
    return None
  shapes = tuple(v.aval.shape for v in eqn.invars[:2])
  return make(eqn, shapes, eqn.outvars[0].aval.size, operands)


def each_slice(
  contraction: Contraction, depth: int, one: Callable[..., Any]
) -> Callable[..., Any]:
  """Returns `(operands, *others) -> results` of each slice of a product.

  Args:
    contraction: the product.
    depth: number of its leading slices that are apart.
    one: (product of a slice, its operands, *others of the slice) -> results.
  """
  if not depth:
    return functools.partial(one, contraction)
  inner, axes = contraction.slice()
  each = each_slice(inner, depth - 1, one)

  def mapped(operands: Any, *others: Any) -> Any:
    in_axes = (list(axes), *(0 for _ in others))
    return jax.vmap(each, in_axes)(operands, *others)

  return mapped


def dtypes(eqn: core.JaxprEqn) -> list[Any]:
  """Returns the dtypes in which a product multiplies grid values.

  They are those of the program, of which a value at hand may be wider. Grid
  values are exact in bfloat16, but those of wide formats overflow float16, and
  float64 would be wider than the sums.
  """
  own = [v.aval.dtype for v in eqn.invars[:2]]
  others = (jnp.float16, jnp.float64)
  return [jnp.float32 if dtype in others else dtype for dtype in own]


def looked_up(
  eqn: core.JaxprEqn, table: quantize.Quantized, others: Sequence[Any]
) -> jax.Array:
  """Returns rows of a table [N, features] on its grid, float32.

  Args:
    eqn: the look-up.
    table: the table, of which each row has a scale.
    others: the other operands of the look-up.
  """
  rows = table.values.astype(jnp.float32) * table.scale
  (y,) = equations.bind(eqn, [rows, *others])
  return float_ops.computed_once(y, table.scale)


def _dot(eqn, shapes, results, operands) -> Dot:
  del operands
  numbers = tuple(
    tuple(tuple(axes) for axes in pair)
    for pair in eqn.params['dimension_numbers']
  )
  precision, sharding = eqn.params['precision'], eqn.params['out_sharding']
  return Dot(shapes, results, numbers, precision, sharding)


_CONV_OPTIONS = (
  'window_strides',
  'padding',
  'lhs_dilation',
  'rhs_dilation',
  'dimension_numbers',
  'feature_group_count',
)


def _conv(eqn, shapes, results, operands) -> Conv:
  del operands
  options = {name: eqn.params[name] for name in _CONV_OPTIONS}
  groups = eqn.params['batch_group_count']
  return Conv(shapes, results, options, eqn.params['precision'], groups)


def _ragged(eqn, shapes, results, operands) -> Ragged:
  def bind(lhs: Any, rhs: Any) -> Any:
    params = {**eqn.params, 'preferred_element_type': jnp.dtype('float32')}
    return eqn.primitive.bind(lhs, rhs, *operands[2:], **params)

  return Ragged(shapes, results, bind)


# {primitive: (equation, shapes, size of the result, operands) -> product}.
KINDS: dict[str, Callable[..., Contraction]] = {
  lax.dot_general_p.name: _dot,
  lax.conv_general_dilated_p.name: _conv,
  'ragged_dot_general': _ragged,
}
