"""Trees of decisions: what a model leaves open.

Formats, numbers of channels and sizes of kernels are all decisions. A policy or
an architecture here is a dict {decision: [K] leaf}; the `arch` collection that
the model reads holds a leaf per layer. Where every decision governs one layer
the two are the same tree; `expand` is the step between.
"""

from collections.abc import Callable, Mapping
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
from fliqs_jax.space import quant_spec


@dataclasses.dataclass(frozen=True)
class Decision:
  """One choice among K formats, numbers of channels or sizes of a kernel.

  Attributes:
    name: of a format the layer's path, with `/weights` or `/activations` where
      the layer has two, or the group's name; of a size what the network calls
      it, with `/channels` or `/kernel`.
    menu: what it picks from: formats or whole numbers.
    leaves: paths of the leaves of `arch` that follow this decision.
    has_branches: whether weights of its own belong to each entry of the menu,
      to be warmed up together.
  """

  name: str
  menu: tuple[formats.NumericFormat | int, ...]
  leaves: tuple[str, ...]
  has_branches: bool = False

  @property
  def kind(self) -> str:
    """`format`, `channels` or `kernel`."""
    if isinstance(self.menu[0], formats.NumericFormat):
      return 'format'
    return self.name.rpartition('/')[2]

  @property
  def labels(self) -> tuple[str | int, ...]:
    """The menu as an arch.json has it: names of formats, numbers."""
    return tuple(getattr(entry, 'name', entry) for entry in self.menu)

  def one_hot(self, label: str | int) -> np.ndarray:
    """Returns [K] float32 with a one at the entry called `label`."""
    if label not in self.labels:
      raise ValueError(
        f'{label} is not on the menu of {self.name}: '
        f'{", ".join(map(str, self.labels))}'
      )
    index = self.labels.index(label)
    return np.eye(len(self.menu), dtype=np.float32)[index]


@dataclasses.dataclass(frozen=True)
class SearchSpace:
  """What a model leaves open.

  Attributes:
    decisions: formats, in the order in which the model calls its layers, then
      sizes.
    ops: the model's ops, quantized or not, in that order.
    params: number of the model's parameters.
    others: {path of a leaf: parameters outside of ops that follow it}.
    published: {decision: index of its menu's entry that was published}, of
      sizes.
  """

  decisions: tuple[Decision, ...]
  ops: tuple[cost_model.Op, ...]
  params: int
  others: Mapping[str, cost_model.PerChannel] = dataclasses.field(
    default_factory=dict
  )
  published: Mapping[str, int] = dataclasses.field(default_factory=dict)

  @property
  def size(self) -> float:
    """log10 of the number of architectures."""
    return sum(math.log10(len(d.menu)) for d in self.decisions)

  @property
  def is_fixed(self) -> bool:
    """Whether nothing is open: every menu has one entry."""
    return all(len(d.menu) == 1 for d in self.decisions)

  def cost(self, kind: str) -> cost_model.Cost:
    """Returns the model's cost function: `bops`, `size` or `average_bits`."""
    return cost_model.make(kind, self.ops, self.params, self.others)

  def relative_cost(self, cost: cost_model.Cost, target: float) -> Callable:
    """Returns {decision: [K]} -> (expected) cost / target."""
    return lambda choices: cost(self.leaves(choices)) / target

  def zeros(self) -> dict[str, jax.Array]:
    """Returns the logits of the uniform policy."""
    return {d.name: jnp.zeros(len(d.menu)) for d in self.decisions}

  def leaves(self, choices: Mapping[str, Any]) -> dict[str, Any]:
    """Returns {arch leaf's path: [K]} for {decision: [K]}."""
    return {leaf: choices[d.name] for d in self.decisions for leaf in d.leaves}

  def expand(self, choices: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the `arch` collection for {decision: [K] one-hot}."""
    return traverse_util.unflatten_dict(self.leaves(choices), sep='/')

  def together(
    self, choices: Mapping[str, Any], together: jax.Array
  ) -> dict[str, Any]:
    """Returns `choices`, or if `together` the same with all branches in use.

    Args:
      choices: {decision: [K] one-hot}.
      together: bool []. Then leaves of branches are 1 / K, which a layer reads
        as a mean over its branches.
    """
    return {
      d.name: jnp.where(together, 1 / len(d.menu), choices[d.name])
      if d.has_branches
      else choices[d.name]
      for d in self.decisions
    }

  def uniform(self, name: str) -> dict[str, np.ndarray]:
    """Returns the architecture with one format everywhere, of published size.

    Layers fixed to another format keep theirs.

    Raises:
      ValueError: an open decision does not have the format on its menu.
    """

    def choice(decision):
      if len(decision.menu) == 1:
        return np.ones(1, np.float32)
      if decision.kind == 'format':
        return decision.one_hot(name)
      published = self.published[decision.name]
      return decision.one_hot(decision.menu[published])

    return {d.name: choice(d) for d in self.decisions}

  def only(self) -> dict[str, np.ndarray]:
    """Returns the one architecture of a space with nothing open.

    Raises:
      ValueError: something is open.
    """
    if not self.is_fixed:
      raise ValueError('the space has open decisions')
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
    result: dict[str, np.ndarray] = {}
    for decision in self.decisions:
      if decision.kind != 'format':
        result[decision.name] = decision.one_hot(sizes[decision.name])
        continue
      for leaf in decision.leaves:
        path, _, side = leaf.rpartition('/')
        name = assignment[path][side == 'activations']
        chosen = decision.one_hot(name)
        if (result.setdefault(decision.name, chosen) != chosen).any():
          raise ValueError(
            f'{path} has {name}, but shares the decision {decision.name} with '
            'layers that have another format'
          )
    found = self.assignment(result)
    for path, sides in assignment.items():
      if tuple(sides) != found[path]:
        raise ValueError(
          f'{path} has (weights, activations) = {tuple(sides)}, but can only '
          f'have {found[path]} here'
        )
    return result

  def assignment(
    self, choices: Mapping[str, Any]
  ) -> dict[str, tuple[str | None, str | None]]:
    """Returns {layer: (weights, activations)} in names; None: unquantized.

    Args:
      choices: {decision: [K]}; of each leaf the largest entry counts.
    """
    chosen = {}
    for decision in self.decisions:
      if decision.kind != 'format':
        continue
      name = decision.menu[int(np.argmax(choices[decision.name]))].name
      chosen |= dict.fromkeys(decision.leaves, name)
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
    """
    return {
      d.name: d.menu[int(np.argmax(choices[d.name]))]
      for d in self.decisions
      if d.kind != 'format'
    }

  def check_sizes(self, sizes: Mapping[str, int]) -> None:
    """Checks that sizes are for just the decisions that there are.

    Raises:
      ValueError: naming those that are missing and those that are surplus.
    """
    own = {d.name for d in self.decisions if d.kind != 'format'}
    if own != set(sizes):
      raise ValueError(
        'the sizes of arch.json do not fit the model: it misses '
        f'{", ".join(sorted(own - set(sizes))) or "none"} and names '
        f'{", ".join(sorted(set(sizes) - own)) or "none"} that the model lacks'
      )
