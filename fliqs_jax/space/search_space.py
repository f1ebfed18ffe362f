"""Search space: the decisions that a model leaves open.

Formats, numbers of channels and sizes of kernels are decisions. A policy or an
architecture here is a dict {decision: [K]}; the `arch` collection that the
model reads holds a leaf per layer. Where every decision governs one layer the
two are the same tree; `SearchSpace.expand` turns the dict into the collection.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
import math
import types
from typing import Any

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from fliqs_jax.numerics import formats
from fliqs_jax.space import cost_model
from fliqs_jax.space import ops as ops_lib
from fliqs_jax.space import quant_spec
from fliqs_jax.space import sizes as sizes_lib


@dataclasses.dataclass(frozen=True)
class Decision:
  """One choice among K options; `FormatDecision` or `SizeDecision`.

  Attributes:
    name: name in a policy and in result.json.
    leaves: paths of the leaves of `arch` that follow this decision.
  """

  name: str
  leaves: tuple[str, ...]

  @property
  def kind(self) -> str:
    """The kind in result.json: `format`, `channels` or `kernel`."""
    raise NotImplementedError

  @property
  def labels(self) -> Sequence[str | int]:
    """[K] options, as an arch.json has them."""
    raise NotImplementedError

  @property
  def precision(self) -> Sequence[int]:
    """[K] bits, channels or kernel sizes: more cost more, and are no worse."""
    raise NotImplementedError

  @property
  def dearest(self) -> int:
    """Index of the most precise format, or of the largest size."""
    raise NotImplementedError

  def one_hot(self, label: str | int | None) -> np.ndarray:
    """Returns [K] float32 with a one at the option called `label`.

    Raises:
      ValueError: there is no such option.
    """
    if label not in self.labels:
      raise ValueError(
        f'{label} is not on the menu of {self.name}: '
        f'{", ".join(map(str, self.labels))}'
      )
    matches = [option == label for option in self.labels]
    return np.asarray(matches, np.float32)


@dataclasses.dataclass(frozen=True)
class FormatDecision(Decision):
  """One choice among K formats.

  Its name is the layer's path, with `/weights` or `/activations` where the
  layer has two decisions, or the name of the group.

  Attributes:
    menu: [K] formats.
  """

  menu: tuple[formats.NumericFormat, ...]

  @property
  def kind(self) -> str:
    """The kind in result.json: `format`."""
    return 'format'

  @property
  def labels(self) -> tuple[str, ...]:
    """[K] names of the formats."""
    return tuple(numeric_format.name for numeric_format in self.menu)

  @property
  def precision(self) -> tuple[int, ...]:
    """[K] bits of the formats."""
    return tuple(f.bits for f in self.menu)

  @property
  def dearest(self) -> int:
    """Index of the format with the most bits, of these the most mantissa."""
    precisions = [(f.bits, f.mantissa_bits) for f in self.menu]
    return precisions.index(max(precisions))


@dataclasses.dataclass(frozen=True)
class SizeDecision(Decision):
  """One choice among K numbers of channels or K sizes of a kernel.

  Its name is what the network calls it, `NAME/channels` or `NAME/kernel`.

  Attributes:
    size: the options, and how they change a tensor.
  """

  size: sizes_lib.Channels | sizes_lib.Kernel

  @property
  def kind(self) -> str:
    """The kind in result.json: `channels` or `kernel`."""
    return self.size.kind

  @property
  def labels(self) -> tuple[int, ...]:
    """[K] numbers of channels or sizes of the kernel."""
    return self.size.labels

  @property
  def precision(self) -> tuple[int, ...]:
    """[K] numbers of channels or sizes of the kernel."""
    return self.labels

  @property
  def dearest(self) -> int:
    """Index of the largest size."""
    return self.labels.index(max(self.labels))


def _listed(names: Iterable[str]) -> str:
  return ', '.join(sorted(names)) or 'none'


def _largest(decision: Decision, given: Any) -> int:
  """Returns the index of the largest of [K] numbers, one for each option."""
  values, count = np.asarray(given), len(decision.labels)
  is_number = values.dtype.kind in 'biuf' or values.dtype.name == 'bfloat16'
  if values.shape == (count,) and is_number:
    numbers = values.astype(np.float64)
    if np.isfinite(numbers).all() and np.sum(numbers == numbers.max()) == 1:
      return int(numbers.argmax())
  raise ValueError(
    f'choices: {decision.name} is {given!r}; it must be {count} finite '
    f'numbers, one for each of {", ".join(map(str, decision.labels))}, and one '
    'of them the largest, as `argmax`, `likeliest` and `space.choices` return'
  )


# The side of an assignment, 0 or 1, that a format leaf of `arch` sets; that of
# a tied decision may be read from either.
_SIDES = {'format': 0, 'weights': 0, 'activations': 1}


@dataclasses.dataclass(frozen=True)
class SearchSpace:
  """The decisions of a model, and the ops of which its cost is made.

  `choices` in the methods is an architecture {decision: [K] float32 one-hot},
  or a policy's probabilities where a method returns an expectation.

  Attributes:
    formats: decisions about formats, in the order in which the model calls its
      layers.
    open_sizes: decisions about channels and kernels.
    ops: the model's ops, quantized or not, in the order of calls.
    params: number of the model's parameters.
    others: {path of a leaf of `arch`: the parameters outside of ops whose
      number the leaf picks}.
    weight_params: number of the parameters that the ops' weights are made of;
      None: each weight is one.
    published: the space of the network of published sizes, if the model is
      fixed to others; None: the model has them, at least as options.
  """

  formats: tuple[FormatDecision, ...]
  open_sizes: tuple[SizeDecision, ...]
  ops: tuple[ops_lib.Op, ...]
  params: int
  others: Mapping[str, ops_lib.PerChannel] = dataclasses.field(
    default_factory=dict, hash=False
  )
  weight_params: int | None = None
  published: 'SearchSpace | None' = None

  @property
  def decisions(self) -> tuple[Decision, ...]:
    """All decisions, formats first."""
    return (*self.formats, *self.open_sizes)

  @property
  def decision_of(self) -> dict[str, str]:
    """{path of a leaf of `arch`: name of the decision that it follows}."""
    return {leaf: d.name for d in self.decisions for leaf in d.leaves}

  @property
  def size(self) -> float:
    """log10 of the number of architectures."""
    return sum(math.log10(len(d.labels)) for d in self.decisions)

  @property
  def is_fixed(self) -> bool:
    """Whether nothing is open: every menu has one entry."""
    return all(len(d.labels) == 1 for d in self.decisions)

  def cost(self, kind: str) -> cost_model.Cost:
    """Returns a cost of the model, a function of {decision: [K]}.

    Args:
      kind: `bops`, `size`, `average_bits`, or another of `cost_model.KINDS`.

    Raises:
      ValueError: unknown kind.
    """
    cost = cost_model.make(
      kind,
      self.ops,
      self.params,
      self.others,
      self.decision_of,
      self.weight_params,
    )
    if self.published is None:
      return cost
    return dataclasses.replace(cost, published=self.published.cost(kind))

  def relative_cost(
    self, cost: cost_model.Cost, target: float
  ) -> Callable[[Mapping[str, Any]], Any]:
    """Returns the function from {decision: [K]} to cost / target, float32 [].

    Args:
      cost: a cost of the model.
      target: the cost that the search aims at, in the unit of `cost`.

    Raises:
      ValueError: the target is known and not a positive number.
    """
    if not isinstance(target, jax.Array) and not 0 < target < math.inf:
      raise ValueError(f'the target of a cost is {target}; it must be above 0')
    return lambda choices: cost(choices) / target

  def zeros(self) -> dict[str, jax.Array]:
    """Returns {decision: [K] float32 zeros}, the logits of a uniform policy."""
    return {d.name: jnp.zeros(len(d.labels)) for d in self.decisions}

  def leaves(self, choices: Mapping[str, Any]) -> dict[str, Any]:
    """Returns {arch leaf's path: [K]} for {decision: [K]}."""
    return {leaf: choices[name] for leaf, name in self.decision_of.items()}

  def expand(self, choices: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the `arch` collection for {decision: [K] one-hot}."""
    return traverse_util.unflatten_dict(self.leaves(choices), sep='/')

  def with_branches(
    self, choices: Mapping[str, Any], all_branches: jax.Array
  ) -> dict[str, Any]:
    """Returns `choices`, or the same with all branches of kernels in use.

    Args:
      choices: {decision: [K] one-hot}.
      all_branches: bool []. If true, the leaves of branched kernels are 1 / K,
        which a layer reads as a mean over its branches.
    """

    def choice(decision: Decision) -> Any:
      chosen = choices[decision.name]
      match decision:
        case SizeDecision(size=sizes_lib.Kernel(has_branches=True)):
          return jnp.where(all_branches, 1 / len(decision.labels), chosen)
        case _:
          return chosen

    return {d.name: choice(d) for d in self.decisions}

  def at(self, chosen: Mapping[str, int]) -> dict[str, np.ndarray]:
    """Returns the architecture of {decision: index of its option}."""
    return {
      d.name: np.eye(len(d.labels), dtype=np.float32)[chosen[d.name]]
      for d in self.decisions
    }

  def indices(self, choices: Mapping[str, Any]) -> dict[str, int]:
    """Returns {decision: index of its option}, the inverse of `at`.

    Args:
      choices: {decision: [K]}; of each the largest entry counts.

    Raises:
      ValueError: decisions are missing or surplus, or one has not K finite
        numbers of which one is the largest.
    """
    known = {d.name for d in self.decisions}
    if known != set(choices):
      raise ValueError(
        f'choices: missing are {_listed(known - set(choices))}; surplus are '
        f'{_listed(set(choices) - known)}'
      )
    return {d.name: _largest(d, choices[d.name]) for d in self.decisions}

  def dearest(self) -> dict[str, np.ndarray]:
    """Returns the architecture of the most precise formats, largest sizes."""
    return self.at({d.name: d.dearest for d in self.decisions})

  def uniform(self, name: str) -> dict[str, np.ndarray]:
    """Returns the architecture with one format everywhere, of published size.

    Layers fixed to another format keep theirs.

    Raises:
      ValueError: an open decision does not have the format on its menu.
    """
    chosen = {
      d.name: np.ones(1, np.float32) if len(d.menu) == 1 else d.one_hot(name)
      for d in self.formats
    }
    return chosen | {
      d.name: d.one_hot(d.labels[d.size.published]) for d in self.open_sizes
    }

  def only(self) -> dict[str, np.ndarray]:
    """Returns the one architecture of a space with nothing open.

    Raises:
      ValueError: something is open.
    """
    if not self.is_fixed:
      raise ValueError(
        'the space has open decisions; select an architecture by `uniform`, '
        '`choices` or the argmax of a policy'
      )
    return {d.name: np.ones(1, np.float32) for d in self.decisions}

  def choices(
    self,
    assignment: Mapping[str, tuple[str | None, str | None]],
    sizes: Mapping[str, int] = types.MappingProxyType({}),
  ) -> dict[str, np.ndarray]:
    """Returns the architecture that an assignment in names describes.

    Args:
      assignment: {layer: (weights, activations)}, as `assignment` returns it.
      sizes: {decision: number}, as `sizes` returns it.

    Raises:
      ValueError: layers or sizes are missing or surplus, a format or a number
        is not on its menu, or layers that share a decision differ.
    """
    quant_spec.check_layers([op.path for op in self.ops], assignment)
    self.check_sizes(sizes)
    wanted = {
      op.leaf(name): assignment[op.path][side]
      for op in self.ops
      for name, side in _SIDES.items()
    }
    result = {d.name: d.one_hot(sizes[d.name]) for d in self.open_sizes}
    for decision in self.formats:
      first = wanted[decision.leaves[0]]
      for leaf in decision.leaves:
        if wanted[leaf] != first:
          raise ValueError(
            f'{leaf.rpartition("/")[0]} has {wanted[leaf]}, but shares the '
            f'decision {decision.name} with layers that have another format; '
            'give all of them the same'
          )
      result[decision.name] = decision.one_hot(first)
    possible = self.assignment(result)
    for path, pair in assignment.items():
      if tuple(pair) != possible[path]:
        raise ValueError(
          f'{path} has (weights, activations) = {tuple(pair)}, but in this '
          f'space it must have {possible[path]}'
        )
    return result

  def assignment(
    self, choices: Mapping[str, Any]
  ) -> dict[str, tuple[str | None, str | None]]:
    """Returns {layer: (weights, activations)} in names; None: unquantized.

    Args:
      choices: {decision: [K]}; of each the largest entry counts.

    Raises:
      ValueError: as in `indices`.
    """
    index_of = self.indices(choices)
    chosen: dict[str, str] = {}
    for decision in self.formats:
      label = decision.labels[index_of[decision.name]]
      chosen |= dict.fromkeys(decision.leaves, label)
    result = {}
    for op in self.ops:
      tied = chosen.get(op.leaf('format'))
      result[op.path] = (
        chosen.get(op.leaf('weights'), tied),
        chosen.get(op.leaf('activations'), tied),
      )
    return result

  def sizes(self, choices: Mapping[str, Any]) -> dict[str, int]:
    """Returns {decision: number} of channels and kernels.

    Args:
      choices: {decision: [K]}; of each the largest entry counts.

    Raises:
      ValueError: as in `indices`.
    """
    index_of = self.indices(choices)
    return {d.name: d.labels[index_of[d.name]] for d in self.open_sizes}

  def check_sizes(self, sizes: Mapping[str, int]) -> None:
    """Checks that sizes name exactly the decisions about sizes.

    Args:
      sizes: {decision: number}, the `sizes` of an arch.json.

    Raises:
      ValueError: decisions are missing or surplus; the message names them.
    """
    own = {d.name for d in self.open_sizes}
    if own != set(sizes):
      raise ValueError(
        'the sizes of arch.json do not fit the model: it misses '
        f'{_listed(own - set(sizes))} and names {_listed(set(sizes) - own)} '
        'that the model lacks'
      )
