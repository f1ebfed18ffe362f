"""Products of a program, and the paths by which they and trees are named."""

from collections.abc import Mapping
import dataclasses
import math
import re
from typing import Any

from flax import traverse_util
import jax
from jax import ad_checkpoint

# Place of an equation: indices of equations and branches, outermost first.
Place = tuple[int, ...]

# The name that marks a value as weights, for `jax.ad_checkpoint`.
WEIGHTS = 'fliqs weights'


@dataclasses.dataclass(frozen=True)
class Product:
  """One product of a program, or one look-up of rows of a table.

  Attributes:
    place: place of its equation.
    path: its unique name; `layer`, and `layer#2` for its second use.
    layer: path that decides about its formats.
    kind: `ops.OpShape.kind`.
    side: which operand is the weights, 0 or 1; None if neither is.
    leaves: paths of the variables that its weights are made of.
    is_stored: whether its weights come from the variables alone, so that an
      export can store them.
    macs: multiply-accumulates of one call, of one iteration and slice.
    weights: number of its weights, of one iteration and slice.
    channels: number of scales of its weights, of one iteration and slice.
    inputs: number of activations that one call reads, of one iteration and
      slice; of two activations, those of both operands.
    outputs: number of results of one call, of one iteration and slice.
    window: height and width of its kernel in pixels; () if it has none.
    strides: strides of a convolution; () of another product.
    scans: (place, length) of the scans of which each iteration has weights of
      its own; of two activations, those with any weights of an iteration.
    slices: lengths of the batch axes of the weights.
    softmax: numbers of those operands that are results of a softmax.
    calls: number of calls of each iteration.
    has_integer_form: whether it could run on integers.
    reason: why it cannot be quantized; empty if it can.
  """

  place: Place
  path: str
  layer: str
  kind: str
  side: int | None
  leaves: frozenset[str]
  is_stored: bool
  macs: int
  weights: int
  channels: int
  inputs: int
  outputs: int
  window: tuple[int, ...]
  strides: tuple[int, ...]
  scans: tuple[tuple[Place, int], ...]
  slices: tuple[int, ...]
  softmax: frozenset[int]
  calls: int
  has_integer_form: bool
  reason: str

  @property
  def stack(self) -> tuple[int, ...]:
    """Lengths of the axes along which weights are stacked, scans first."""
    return (*(length for _, length in self.scans), *self.slices)

  @property
  def all_macs(self) -> int:
    """Multiply-accumulates of all iterations, slices and calls."""
    return self.macs * self.calls * math.prod(self.stack)

  def sides(self) -> dict[str, int]:
    """Returns {side, `activations` or `weights`: number of the operand}."""
    if self.kind == 'embed':
      return dict(weights=0)
    right = 1 if self.side is None else self.side
    return dict(activations=1 - right, weights=right)

  def iterations(self) -> list[str]:
    """Returns the path in `arch` of each iteration and slice."""
    if not self.stack:
      return [self.layer]
    numbers = range(math.prod(self.stack))
    return [join(self.layer, f'@{i}') for i in numbers]


def as_weights(x: jax.Array) -> jax.Array:
  """Marks an array [...] as weights; returns it unchanged.

  Products take for weights what is made of parameters alone. Weights that are
  mixed with inputs or random numbers (DropConnect, a hypernetwork) are taken
  for activations, with one scale for the tensor, unless they are marked.
  """
  return ad_checkpoint.checkpoint_name(x, WEIGHTS)


def paths(tree: Any) -> list[str]:
  """Returns the path of each leaf of a tree."""
  return [
    jax.tree_util.keystr(path, simple=True, separator='/')
    for path, _ in jax.tree_util.tree_leaves_with_path(tree)
  ]


def named(tree: Any) -> dict[str, Any]:
  """Returns {path: leaf} of a tree, in the order of its leaves."""
  return dict(zip(paths(tree), jax.tree.leaves(tree)))


def first_use(path: str) -> str:
  """Returns the path of the first use of the same weights: without `#2`."""
  return re.sub(r'#\d+$', '', path)


def join(*parts: str) -> str:
  """Returns the parts of a path joined by slashes; empty ones are left out."""
  return '/'.join(part for part in parts if part)


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
  """Returns {path: array, or tree of dicts} as one tree of dicts."""
  leaves = {
    join(path, name): leaf
    for path, tree in flat.items()
    for name, leaf in flattened({'': tree}).items()
  }
  return traverse_util.unflatten_dict(leaves, sep='/')


def flattened(tree: Mapping[str, Any]) -> dict[str, Any]:
  """Returns {path: leaf} of a tree of dicts."""
  flat = traverse_util.flatten_dict(tree)
  return {join(*path): leaf for path, leaf in flat.items()}
