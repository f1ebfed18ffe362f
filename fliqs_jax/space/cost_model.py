"""Costs of an architecture: bit operations (Eq. 1), size, and those of chips.

Every cost is a function of the tree of decisions and linear in each of them, so
the expected cost of a policy is the cost at its probabilities, and its gradient
is exact. Where one decision scales both sides of a layer, its products are
summed, not multiplied from sums.
"""

from collections.abc import Callable, Iterator, Mapping
import dataclasses
import functools
from typing import Any, NamedTuple

import numpy as np

from fliqs_jax.numerics import entropy_coding
from fliqs_jax.numerics import formats
from fliqs_jax.space import ops as ops_lib
from fliqs_jax.space import sizes
from fliqs_jax.space.chips import chip as chip_lib
from fliqs_jax.space.chips import chip_file
from fliqs_jax.space.chips import prices

# {leaf's path: [K]} -> (expected) part of a cost [].
Term = Callable[[ops_lib.Leaves], Any]

# A scale, and each parameter outside of ops, is a float32.
_SCALE_BITS = 32
_OTHER_BITS = 32


def _bits(numeric_format: formats.NumericFormat) -> int:
  return numeric_format.bits


def _one(numeric_format: formats.NumericFormat) -> int:
  del numeric_format
  return 1


def _scale_bits(numeric_format: formats.NumericFormat) -> int:
  return _SCALE_BITS if numeric_format.scaled else 0


def op_macs(op: ops_lib.Op, leaves: ops_lib.Leaves) -> Any:
  """Returns the op's expected multiply-accumulates []."""
  return op.shape.macs * op.active_share(leaves, *sizes.LEAVES)


def op_weights(op: ops_lib.Op, leaves: ops_lib.Leaves) -> Any:
  """Returns the op's expected number of weights []."""
  return op.shape.weights * op.active_share(leaves, *sizes.LEAVES)


def op_gbops(op: ops_lib.Op, leaves: ops_lib.Leaves) -> Any:
  """Returns the op's cost b_w * b_a * MACs / 1e9 (Eq. 1) for one input."""
  return op.expected(leaves, _bits, _bits) * (op_macs(op, leaves) / 1e9)


def op_weight_bits(op: ops_lib.Op, leaves: ops_lib.Leaves) -> Any:
  """Returns the bits of the op's weights, without scales."""
  return op_weights(op, leaves) * op.expected(leaves, _bits, _one)


def op_mbit(op: ops_lib.Op, leaves: ops_lib.Leaves) -> Any:
  """Returns the megabits of the op's weights and of its scales.

  One float32 scale per output channel, and one for the activations, where the
  format is scaled.
  """
  channels = op.shape.channels * op.active_share(leaves, sizes.OUTPUT_CHANNELS)
  weight_scales = channels * op.expected(leaves, _scale_bits, _one)
  bits = op_weight_bits(op, leaves) + weight_scales
  return (bits + op.expected(leaves, _one, _scale_bits)) / 1e6


def op_compressed_bytes(op: ops_lib.Op, leaves: ops_lib.Leaves) -> Any:
  """Returns the expected bytes of the op's weights after entropy coding.

  The weights are taken to be Gaussian (`entropy_coding.expected`), and scales
  are as in `op_mbit`.
  """
  count = max(op.shape.weights // max(op.shape.channels, 1), 1)
  coded = functools.partial(entropy_coding.expected, count=count)
  scales = op_mbit(op, leaves) * 1e6 - op_weight_bits(op, leaves)
  return (
    op_weights(op, leaves) * op.expected(leaves, coded, _one) + scales
  ) / 8


class Kind(NamedTuple):
  """A kind of cost, a row of `KINDS` or a section of a chip.

  The cost of an op must be linear in each leaf, so that the expected cost is
  the cost of the probabilities.

  Attributes:
    unit: unit of the cost, as it is printed.
    of_op: (op, {leaf's path: [K]}) -> (expected) cost [] of the op.
    sides: sides of a layer, `weights` or `activations`, to whose bits the cost
      of an op is proportional; () if it is not.
    counts_calls: whether a layer that is called several times counts at each
      call, as work does, not once, as storage does.
    of_parameters: number of parameters outside of ops -> their cost; None if
      they cost nothing.
    is_per_weight: whether the cost is a mean over the model's weights. Such a
      cost says nothing about sizes.
    chip: the chip whose prices it takes; None: it is of no chip.
  """

  unit: str
  of_op: Callable[[ops_lib.Op, ops_lib.Leaves], Any]
  sides: tuple[str, ...] = ()
  counts_calls: bool = False
  of_parameters: Callable[[int], float] | None = None
  is_per_weight: bool = False
  chip: chip_lib.Chip | None = None


def _mbit_of_parameters(count: int) -> float:
  return _OTHER_BITS * count / 1e6


def _bytes_of_parameters(count: int) -> float:
  return _OTHER_BITS * count / 8


# The names of `cost.kind` beside those of chips. Another kind is another row.
KINDS: dict[str, Kind] = {
  'bops': Kind(
    'GBOPs', op_gbops, sides=('weights', 'activations'), counts_calls=True
  ),
  'size': Kind(
    'Mbit',
    op_mbit,
    sides=('weights',),
    of_parameters=_mbit_of_parameters,
  ),
  'compressed_bytes': Kind(
    'bytes',
    op_compressed_bytes,
    of_parameters=_bytes_of_parameters,
  ),
  'average_bits': Kind(
    'bits', op_weight_bits, sides=('weights',), is_per_weight=True
  ),
}


def kind_of(name: str) -> Kind:
  """Returns the kind of cost that `cost.kind` names.

  Args:
    name: a key of `KINDS`, or the section of a chip, such as `latency:t4`.

  Raises:
    ValueError: there is none, or the chip's file is wrong.
  """
  if chip_file.is_chip(name):
    chip = chip_file.read(name)
    of_op = functools.partial(prices.of_op, chip)
    return Kind(chip.unit, of_op, counts_calls=True, chip=chip)
  if name not in KINDS:
    raise ValueError(
      f'cost.kind={name!r} is unknown; allowed: {", ".join(KINDS)}, or the '
      f'cost of a chip: {", ".join(chip_lib.SECTIONS)}, a colon and one of '
      f'{", ".join(chip_file.names())} or a file'
    )
  return KINDS[name]


@dataclasses.dataclass(frozen=True)
class Cost:
  """A cost of a whole model, as a function of its decisions.

  Attributes:
    kind: name of the kind, as `kind_of` takes it.
    rules: the kind.
    ops: the model's ops; of a shared layer one per call or one, as the kind
      counts.
    others: {path of a leaf: parameters that follow it}.
    constant: the part that no decision changes, in the unit.
    decision_of: {path of a leaf: name of the decision that it follows}.
    published: the cost of the network of published sizes, if the model is fixed
      to others; None: the model has the published sizes, at least as options.
  """

  kind: str
  rules: Kind
  ops: tuple[ops_lib.Op, ...]
  others: Mapping[str, ops_lib.PerChannel]
  constant: float
  decision_of: Mapping[str, str]
  published: 'Cost | None' = None

  @property
  def unit(self) -> str:
    """The unit of the cost, as it is printed."""
    return self.rules.unit

  def of_op(self, op: ops_lib.Op, leaves: ops_lib.Leaves) -> Any:
    """Returns the part of the cost [] that one op causes, in the unit."""
    cost = self.rules.of_op(op, leaves)
    if self.rules.is_per_weight:
      cost = cost / sum(op_weights(o, leaves) for o in self.ops)
    return cost

  def of_leaves(self, leaves: ops_lib.Leaves) -> Any:
    """Returns the (expected) cost [] of {path of a leaf: [K]}."""
    cost = self.constant + sum(self.of_op(op, leaves) for op in self.ops)
    for leaf in self.others:
      cost = cost + self._of_other(leaf, leaves)
    return cost

  def terms(self) -> Iterator[tuple[tuple[str, ...], Term]]:
    """Yields the terms that the cost is the sum of, but the constant.

    Yields:
      Paths of the leaves that a term depends on, and the term.

    Raises:
      ValueError: the cost is a mean over weights, whose number is open.
    """
    if self.rules.is_per_weight and any(op.shape.decided for op in self.ops):
      raise ValueError(
        f'the cost {self.kind!r} is a mean over weights, so with open sizes it '
        "is no sum over layers; use 'bops' or 'size'"
      )
    for op in self.ops:
      paths = tuple(op.leaf(name) for name in op.shape.leaves())
      yield paths, functools.partial(self.of_op, op)
    for leaf in self.others:
      yield (leaf,), functools.partial(self._of_other, leaf)

  def _of_other(self, leaf: str, leaves: ops_lib.Leaves) -> Any:
    """Returns the cost [] of the parameters outside of ops that follow a leaf.

    Only a kind with a price for them has any.
    """
    other, price = self.others[leaf], self.rules.of_parameters
    assert price is not None
    return ops_lib.dot(leaves[leaf], other.channels.counts) * price(
      other.params
    )

  def __call__(self, choices: Mapping[str, Any]) -> Any:
    """Returns the (expected) cost [], in the unit.

    Args:
      choices: {decision: [K] one-hot or probability}.

    Raises:
      ValueError: a decision of the model is missing.
    """
    missing = sorted(set(self.decision_of.values()) - set(choices))
    if missing:
      raise ValueError(
        f'the cost {self.kind!r} needs a [K] array for every decision; '
        f'missing: {", ".join(missing)}; given: {", ".join(choices)}'
      )
    return self.of_leaves(
      {leaf: choices[name] for leaf, name in self.decision_of.items()}
    )


def make(
  kind: str,
  ops: tuple[ops_lib.Op, ...],
  params: int,
  others: Mapping[str, ops_lib.PerChannel],
  decision_of: Mapping[str, str],
  weight_params: int | None = None,
) -> Cost:
  """Returns a cost function.

  Args:
    kind: `bops` (billions, Eq. 1), `size` (megabits of weights, scales and, at
      32 bits, every other parameter), `compressed_bytes` (the same after
      entropy coding, expected), `average_bits` (per weight), or a cost of a
      chip, such as `latency:t4`.
    ops: the model's ops, one per call.
    params: number of all parameters, those outside the ops included.
    others: {path of a leaf: parameters that follow it}.
    decision_of: {path of a leaf: name of the decision that it follows}.
    weight_params: number of the parameters that the ops' weights are made of,
      more than there are weights where matrices are added, less where they are
      multiplied; None: as many.

  Raises:
    ValueError: unknown kind, or the chip's file is wrong.
  """
  rules = kind_of(kind)
  if rules.counts_calls:
    counted = ops
  else:
    counted = tuple({op.path: op for op in ops}.values())
  if rules.of_parameters is None:
    return Cost(kind, rules, counted, {}, 0.0, decision_of)
  if weight_params is None:
    weight_params = sum(op.shape.weights + op.shape.spare for op in counted)
  rest = params - weight_params
  rest -= sum(other.allocated for other in others.values())
  constant = rules.of_parameters(rest)
  return Cost(kind, rules, counted, others, constant, decision_of)


def uniform(cost: Cost, numeric_format: str) -> float:
  """Returns the cost of a model whose layers all have one format.

  Every quantized side of every layer has the format, and sizes are the
  published ones. The format need not be on any menu: targets are multiples of
  this cost.

  Args:
    cost: a cost of the model, the result of `SearchSpace.cost`.
    numeric_format: name of the format, such as `INT4`, `E4M3` or `BF16`.

  Returns:
    The cost in the unit of `cost`; for `bops` b_w * b_a * MACs / 1e9 (Eq. 1).

  Raises:
    ValueError: the format is unknown.
  """
  choice = (formats.parse(numeric_format),)
  cost = cost.published or cost
  leaves = {
    leaf: _one_hot(other.channels.published, len(other.channels.counts))
    for leaf, other in cost.others.items()
  }
  ops = []
  for op in cost.ops:
    shape = dataclasses.replace(
      op.shape,
      weight_menu=op.shape.weight_menu and choice,
      act_menu=op.shape.act_menu and choice,
    )
    ops.append(dataclasses.replace(op, shape=shape))
    leaves |= {op.leaf(name): np.ones(1) for name in shape.format_leaves()}
    leaves |= {
      op.leaf(name): _one_hot(size.published, len(size.labels))
      for name, size in shape.decided
    }
  return float(dataclasses.replace(cost, ops=tuple(ops)).of_leaves(leaves))


def _one_hot(index: int, size: int) -> np.ndarray:
  return np.eye(size, dtype=np.float32)[index]
