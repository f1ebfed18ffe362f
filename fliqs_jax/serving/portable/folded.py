"""Convolutions that take in what follows them: scales, biases and a ReLU.

A runtime computes a convolution in integers if its result is rounded next. Of
batch norm, the factors become part of the weights' scales, so that the codes
stay, and the rest is a bias. A ReLU becomes the lower bound of the integers.
A convolution in integers rounds its bias to the step of its sums, so that a
bias stays outside where this step is not far below that of the result.
"""

from collections.abc import Sequence
import dataclasses
import functools
from typing import Any

import jax
from jax.extend import core
import numpy as np

from fliqs_jax.program import equations
from fliqs_jax.serving.portable import onnx_nodes


@dataclasses.dataclass(frozen=True)
class Read:
  """Weights that are read back from integers.

  Attributes:
    eqn: their DequantizeLinear.
    cast: the Cast of int4 before it, or None.
    codes: [C, ...] int4 or int8.
    others: scale [C], float32, and zero.
  """

  eqn: core.JaxprEqn
  cast: core.JaxprEqn | None
  codes: np.ndarray
  others: tuple[Any, Any]

  @functools.cached_property
  def traced(self) -> jax.Array:
    """The weights in floats."""
    codes = self.codes if self.cast is None else _bind(self.cast, [self.codes])
    return _bind(self.eqn, (codes, *self.others))

  def times(self, factor: np.ndarray) -> 'Read':
    """Returns the weights of each channel times a number other than zero."""
    scale, zero = self.others
    signs = np.sign(factor).reshape((-1, *[1] * (self.codes.ndim - 1)))
    return dataclasses.replace(
      self,
      # A scale is positive.
      codes=(self.codes.astype(np.int8) * signs).astype(self.codes.dtype),
      others=((scale * np.abs(factor)).astype(np.float32), zero),
    )


# Largest step of the sums, of that of the result: a bias that is rounded to it
# moves one value in a thousand to the other grid point.
_FINE = 1 / 256


@dataclasses.dataclass(frozen=True)
class OnGrid:
  """Activations in floats, on the grid of integers times a scale []."""

  traced: jax.Array
  scale: np.ndarray


@dataclasses.dataclass(frozen=True)
class Narrow:
  """Integers that are stored in int4."""

  eqn: core.JaxprEqn
  codes: np.ndarray

  @functools.cached_property
  def traced(self) -> jax.Array:
    """The same in int8."""
    return _bind(self.eqn, [self.codes])


@dataclasses.dataclass(frozen=True)
class Sums:
  """A convolution with known weights, and what follows it.

  Attributes:
    eqn: the convolution, whose second axis are channels.
    x: its input.
    weights: its weights, or an array of those that are floats.
    factor: [C] by which the sums are multiplied, then
    bias: [C] added.
    order: how the axes are transposed in the end.
    is_relu: whether negative results become zero.
  """

  eqn: core.JaxprEqn
  x: Any
  weights: Read | np.ndarray
  factor: np.ndarray
  bias: np.ndarray
  order: tuple[int, ...]
  is_relu: bool = False

  @functools.cached_property
  def linear(self) -> jax.Array:
    """The results before a ReLU."""
    return self._computed(self.bias)

  def before_rounding(self, step: np.ndarray) -> jax.Array:
    """Returns the results before a ReLU, for integers of a step behind them."""
    if isinstance(self.x, OnGrid) and isinstance(self.weights, Read):
      scale = self.weights.times(self.factor).others[0]
      if (self.x.scale * scale).max() > _FINE * step and self.bias.any():
        shape = [1] * len(self.order)
        shape[self.order.index(1)] = -1
        bias = self.bias.astype(np.float32).reshape(shape)
        return self._computed(np.zeros_like(self.bias)) + bias
    return self.linear

  def _computed(self, bias: np.ndarray) -> jax.Array:
    if isinstance(self.weights, Read):
      w = self.weights.times(self.factor).traced
    else:
      factor = self.factor.reshape((-1, *[1] * (self.weights.ndim - 1)))
      w = (self.weights * factor).astype(np.float32)
    operands = (getattr(self.x, 'traced', self.x), w)
    if bias.any():
      operands = (*operands, bias.astype(np.float32))
    y = _bind(self.eqn, operands)
    is_same = self.order == tuple(range(y.ndim))
    return y if is_same else y.transpose(self.order)

  @functools.cached_property
  def traced(self) -> jax.Array:
    """The results."""
    return jax.numpy.maximum(self.linear, 0) if self.is_relu else self.linear

  def channels(self, x: Any) -> np.ndarray | None:
    """Returns a constant as [C] numbers; None if it varies along others."""
    if not isinstance(x, np.ndarray) or x.ndim not in (0, len(self.order)):
      return None
    axis = self.order.index(1)
    if any(n > 1 for i, n in enumerate(x.shape) if i != axis):
      return None
    return np.broadcast_to(x.reshape(-1).astype(np.float64), self.bias.shape)


@dataclasses.dataclass(frozen=True)
class Rounded:
  """Integers whose negative ones become zero when they are clipped."""

  traced: jax.Array


def folded(eqn: core.JaxprEqn, operands: Sequence[Any]) -> Any:
  """Returns a value of this module for an equation's result, or None.

  Args:
    eqn: an equation.
    operands: its operands, of which some may be values of this module.
  """
  name = equations.name(eqn)
  if name == onnx_nodes.node_p.name:
    return _node(eqn, operands)
  for i, y in enumerate(operands[:2]):
    if isinstance(y, Sums):
      return _followed(name, eqn, y, operands[1 - i :][:1], is_first=not i)
  return None


def _node(eqn: core.JaxprEqn, operands: Sequence[Any]) -> Any:
  first, *others = operands
  match eqn.params['op']:
    case 'Cast' if isinstance(first, np.ndarray):
      return Narrow(eqn, first)
    case 'DequantizeLinear' if isinstance(first, Narrow):
      return Read(eqn, first.eqn, first.codes, tuple(others))
    case 'DequantizeLinear' if isinstance(first, np.ndarray):
      return Read(eqn, None, first, tuple(others))
    case 'Conv' if (
      isinstance(others[0], Read | np.ndarray) and len(others) == 1
    ):
      channels = eqn.params['shape'][1]
      return Sums(
        eqn,
        first,
        others[0],
        np.ones(channels),
        np.zeros(channels),
        tuple(range(len(eqn.params['shape']))),
      )
    case 'DequantizeLinear' if isinstance(others[0], np.ndarray):
      codes = getattr(first, 'traced', first)
      return OnGrid(_bind(eqn, (codes, *others)), others[0])
    case 'QuantizeLinear' if isinstance(first, Sums):
      codes = _bind(eqn, (first.before_rounding(others[0]), *others))
      return Rounded(codes) if first.is_relu else codes
    case 'Clip' if isinstance(first, Rounded):
      zero = np.uint8(onnx_nodes.ZERO)
      return _bind(eqn, (first.traced, zero, others[1]))
  return None


def _followed(
  name: str, eqn: core.JaxprEqn, y: Sums, others: Sequence[Any], is_first: bool
) -> Sums | None:
  """Returns a convolution with one more operation behind it."""
  if name == 'transpose':
    order = tuple(y.order[i] for i in eqn.params['permutation'])
    return dataclasses.replace(y, order=order)
  number = y.channels(others[0]) if others else None
  if number is None or y.is_relu:
    return None
  match name:
    case 'max' if not number.any():
      return dataclasses.replace(y, is_relu=True)
    case 'add':
      return dataclasses.replace(y, bias=y.bias + number)
    case 'sub' if is_first:
      return dataclasses.replace(y, bias=y.bias - number)
    case 'mul' if number.all():
      return dataclasses.replace(
        y, factor=y.factor * number, bias=y.bias * number
      )
  return None


def _bind(eqn: core.JaxprEqn, operands: Sequence[Any]) -> Any:
  (y,) = equations.bind(eqn, operands)
  return y
