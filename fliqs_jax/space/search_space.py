"""Search space: the decisions that a model leaves open.

Formats, numbers of channels and sizes of kernels are decisions. A policy or an
architecture here is a dict {decision: [K]}; the `arch` collection that the
model reads holds a leaf per layer. Where every decision governs one layer the
two are the same tree; `SearchSpace.expand` turns the dict into the collection.
"""

from collections.abc import Callable, Iterable, Mapping
import dataclasses
import math
import types
from typing import Any

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from fliqs_jax.space import cost_model
from fliqs_jax.space import decisions as decisions_lib
from fliqs_jax.space import ops as ops_lib
from fliqs_jax.space import quant_spec
from fliqs_jax.space import sizes as sizes_lib


def _listed(names: Iterable[str]) -> str:
  return ', '.join(sorted(names)) or 'none'


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

  formats: tuple[decisions_lib.FormatDecision, ...]
  open_sizes: tuple[decisions_lib.SizeDecision, ...]
  ops: tuple[ops_lib.Op, ...]
  params: int
  others: Mapping[str, ops_lib.PerChannel] = dataclasses.field(
    default_factory=dict, hash=False
  )
  weight_params: int | None = None
  published: 'SearchSpace | None' = None

  @property
  def decisions(self) -> tuple[decisions_lib.Decision, ...]:
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
    return dict(choices) | {
      d.name: jnp.where(all_branches, 1 / len(d.labels), choices[d.name])
      for d in self.open_sizes
      if isinstance(d.size, sizes_lib.Kernel) and d.size.has_branches
    }

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
    return {d.name: d.largest(choices[d.name]) for d in self.decisions}

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
