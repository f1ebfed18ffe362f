"""Ops of a model: their shapes, the leaves they read, and expected values.

An op's numbers are known from shapes when the model is traced; `cost_model`
makes costs of them.
"""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any

import jax
import numpy as np

from fliqs_jax.numerics import formats

Leaves = Mapping[str, Any]  # {leaf's path: [K] one-hot or probability}
FormatValue = Callable[[formats.NumericFormat], float]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class OpShape:
  """The shape of one quantizable op; all fields are static.

  Attributes:
    kind: `pointwise` (a 1x1 convolution), `depthwise` (a convolution whose
      outputs each read one of several input channels), `conv` (any other),
      `dense`, `einsum`, `embed` or `attend` (a product of attention).
    macs: multiply-accumulates for the input that the model was traced with.
    weights: number of weights.
    channels: number of weight scales, one per output channel.
    inputs: number of activations that it reads, of both operands of `attend`.
    outputs: number of its results.
    weight_menu: formats of the weights; None if they are not quantized.
    act_menu: formats of the input activations; None if they are not quantized.
    tied: whether one decision sets the formats of both.
    decided: pairs of the name of a size leaf and the `sizes.Channels` or
      `sizes.Kernel` that it picks from. `macs`, `weights` and `channels` are
      those of the largest sizes.
    spare: number of weights of the kernel's branches other than the largest.
    window: height and width of a convolution's kernel in pixels; () otherwise.
    strides: strides of a convolution, along height and width; () otherwise.
  """

  kind: str
  macs: int
  weights: int
  channels: int
  inputs: int
  outputs: int
  weight_menu: tuple[formats.NumericFormat, ...] | None
  act_menu: tuple[formats.NumericFormat, ...] | None
  tied: bool
  decided: tuple[tuple[str, Any], ...] = ()
  spare: int = 0
  window: tuple[int, ...] = ()
  strides: tuple[int, ...] = ()

  def leaves(self) -> dict[str, tuple[Any, ...]]:
    """Returns {name of an arch leaf of this layer: what it picks from}."""
    picked = {name: size.labels for name, size in self.decided}
    return self.format_leaves() | picked

  def format_leaves(self) -> dict[str, tuple[formats.NumericFormat, ...]]:
    """Returns {name of an arch leaf of a format: its menu}."""
    if self.tied and self.weight_menu is not None:
      return {'format': self.weight_menu}
    menus = {'weights': self.weight_menu, 'activations': self.act_menu}
    return {name: menu for name, menu in menus.items() if menu is not None}


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class PerChannel:
  """Parameters outside of ops that follow channels: biases, batch norm.

  Attributes:
    leaf: name of the arch leaf that picks the channels.
    channels: `sizes.Channels` that the leaf picks from; its counts may also be
      numbers of parameters.
    params: number of parameters for each channel (for each count).
  """

  leaf: str
  channels: Any
  params: int

  @property
  def allocated(self) -> int:
    """The number of parameters of all allocated channels."""
    return self.params * self.channels.size


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Stacked:
  """The same op in all iterations of a scan, or slices of a vmap; all static.

  Attributes:
    shape: shape of the op in one iteration.
    length: number of iterations that have weights of their own.
    shared: whether one decision governs all of them.
  """

  shape: OpShape
  length: int
  shared: bool


@dataclasses.dataclass(frozen=True)
class Op:
  """One op of a model: its layer's path and its shape.

  Attributes:
    path: path of its layer; that of an iteration of a scan ends in `/@3`.
    shape: shape of the op.
    stack: path of the scanned layer without the iteration; empty if not
      scanned.
    shared: whether all iterations share one decision.
  """

  path: str
  shape: OpShape
  stack: str = ''
  shared: bool = False

  @property
  def layer(self) -> str:
    """The path that the rules of a spec see."""
    return self.stack or self.path

  def leaf(self, name: str) -> str:
    """Returns the path of one of the op's leaves in `arch`."""
    return f'{self.path}/{name}' if self.path else name

  def expected(
    self, leaves: Leaves, weight_value: FormatValue, act_value: FormatValue
  ) -> Any:
    """Returns E[weight_value(format) * act_value(format)] under `leaves`.

    One decision that sets both sides is summed over the products; two
    decisions are independent, so their expectations multiply.
    """
    shape = self.shape
    if shape.tied and shape.weight_menu is not None:
      return dot(
        leaves[self.leaf('format')],
        [weight_value(f) * act_value(f) for f in shape.weight_menu],
      )
    result = 1.0
    for name, menu, value in (
      ('weights', shape.weight_menu, weight_value),
      ('activations', shape.act_menu, act_value),
    ):
      if menu is None:
        result = result * value(formats.BF16)
      else:
        result = result * dot(leaves[self.leaf(name)], [value(f) for f in menu])
    return result

  def active_share(self, leaves: Leaves, *names: str) -> Any:
    """Returns the expected share [] of the allocated numbers that is active.

    Args:
      leaves: {leaf's path: [K] one-hot or probability}.
      names: names of the size leaves that count, of `sizes.LEAVES`.
    """
    factors: dict[str, np.ndarray] = {}
    leaf_of: dict[str, str] = {}
    for name, size in self.shape.decided:
      if name in names:
        shares = np.asarray(size.shares)
        factors[size.decision] = factors.get(size.decision, 1.0) * shares
        leaf_of[size.decision] = self.leaf(name)
    result: Any = 1.0
    for decision, shares in factors.items():
      result = result * dot(leaves[leaf_of[decision]], shares)
    return result


def dot(leaf: Any, values: Any) -> Any:
  """Returns the sum [] of a leaf [K] times values [K]."""
  # Not a matmul, whose default precision rounds to bf16 on TPU.
  return (leaf * np.asarray(values, np.float32)).sum(-1)
