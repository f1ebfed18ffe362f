"""Trees of decisions: what a model leaves open, found by tracing it.

Formats, numbers of channels and sizes of kernels are all decisions.

A policy or an architecture here is a dict {decision: [K] leaf}; the `arch`
collection that the model reads holds a leaf per layer. Where every decision
governs one layer the two are the same tree; `expand` is the step between.
"""

from collections.abc import Callable, Iterator, Mapping
import dataclasses
import fnmatch
import math
import types
from typing import Any

from flax import traverse_util
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fliqs_jax import cost_model
from fliqs_jax import formats
from fliqs_jax import quant_spec
from fliqs_jax import sizes as sizes_lib


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


def find(
  model: nn.Module,
  *args,
  spec: quant_spec.QuantSpec | None = None,
  **kwargs,
) -> SearchSpace:
  """Finds a model's decisions by tracing its `init`; allocates nothing.

  Args:
    model: built with this project's layers, or made searchable by `intercept`.
    *args: what the model is called with, arrays or `jax.ShapeDtypeStruct`. MACs
      are counted for exactly this input, so its batch size should be 1.
    spec: the spec that the layers were given; its patterns are checked and its
      groups tied. The model's own `spec`, if it has one, unless given.
    **kwargs: more of the call, static.

  Raises:
    ValueError: the model has no quantizable layer, or `spec` does not fit it.
  """
  if spec is None and isinstance(
    own := getattr(model, 'spec', None), quant_spec.QuantSpec
  ):
    spec = own
  calls: list[str] = []

  def note_order(call, call_args, call_kwargs, context):
    calls.append('/'.join(context.module.path))
    return call(*call_args, **call_kwargs)

  def init(*args):
    with nn.intercept_methods(note_order):
      return model.init(jax.random.key(0), *args, **kwargs)

  variables = jax.eval_shape(init, *args)
  cost = variables.get('cost', {})
  callers = {_caller(path, sown) for path, sown in _sown_ops(cost)}
  if not callers <= set(calls):
    # nn.jit has traced the first of several equal modules and repeated the
    # result for the others; see each of them.
    calls.clear()
    with jax.disable_jit():
      each = jax.eval_shape(init, *args)['cost']
    if each != cost:
      raise ValueError(
        'nn.jit takes modules for equal that a rule of the spec tells apart by '
        'their paths, and would give all of them the formats of the first'
      )
  ops = _ops(cost, calls)
  if not ops:
    raise ValueError(
      'the model has no layer that could be quantized; build it with '
      'QuantConv, QuantDense, QuantDenseGeneral or QuantEinsum, or make it '
      'searchable'
    )
  if spec is not None:
    spec.check(
      dict.fromkeys(op.layer for op in ops),
      dict.fromkeys(op.path for op in ops if op.stack),
    )
  params = sum(
    math.prod(p.shape) for p in jax.tree.leaves(variables.get('params', {}))
  )
  picked = _picked(variables.get('sizes', {}), calls)
  return SearchSpace(
    decisions=_decisions(ops, spec) + _size_decisions(picked),
    ops=ops,
    params=params,
    others=_others(cost),
    published={size.decision: size.published for size in picked.values()},
  )


def _flat(tree: Mapping) -> dict[str, Any]:
  return traverse_util.flatten_dict(tree, sep='/')


def _sown_ops(cost: Mapping) -> Iterator[tuple[str, tuple]]:
  """Yields the path of every op's layer, and the shapes of its calls."""
  for path, sown in _flat(cost).items():
    layer, _, name = path.rpartition('/')
    if name == 'ops':
      yield layer, sown


def _caller(path: str, sown: tuple) -> str:
  """Returns the path of the module whose call has sown an op's cost."""
  # The products of an attention are named after it.
  shape = getattr(sown[0], 'shape', sown[0])
  return path.rpartition('/')[0] if shape.kind == 'attend' else path


def _ops(cost: Mapping, calls: list[str]) -> tuple[cost_model.Op, ...]:
  order = {path: i for i, path in reversed(list(enumerate(calls)))}
  ops = []
  for path, sown in _sown_ops(cost):
    place = order[_caller(path, sown)]
    for shape in sown:  # A shared layer is counted once per call.
      if isinstance(shape, cost_model.Stacked):
        ops += [
          (
            place,
            cost_model.Op(f'{path}/@{i}', shape.shape, path, shape.shared),
          )
          for i in range(shape.length)
        ]
      else:
        ops.append((place, cost_model.Op(path, shape)))
  return tuple(op for _, op in sorted(ops, key=lambda placed: placed[0]))


def _decisions(
  ops: tuple[cost_model.Op, ...], spec: quant_spec.QuantSpec | None
) -> tuple[Decision, ...]:
  decisions: dict[str, Decision] = {}
  paths = [op.path for op in ops]
  for op in ops:
    names = op.shape.format_leaves()
    for leaf, menu in names.items():
      suffix = f'/{leaf}' if len(names) > 1 else ''
      name = (op.stack if op.shared else op.path) + suffix
      for group, pattern in spec.groups if spec else ():
        if any(fnmatch.fnmatchcase(p, pattern) for p in {op.path, op.layer}):
          name = group + suffix
          if group in paths:
            raise ValueError(
              f'quant.groups[{group}]: a layer has that path; rename the group'
            )
      known = decisions.get(name, Decision(name, menu, ()))
      if known.menu != menu:
        raise ValueError(
          f'quant.groups[{name}]: {op.path} may use '
          f'{", ".join(f.name for f in menu)}, but {known.leaves[0]} '
          f'{", ".join(f.name for f in known.menu)}; layers that share a '
          'decision need the same menu'
        )
      path = op.leaf(leaf)
      leaves = known.leaves + ((path,) if path not in known.leaves else ())
      decisions[name] = Decision(name, menu, leaves)
  return tuple(decisions.values())


def _others(cost: Mapping) -> dict[str, cost_model.PerChannel]:
  """Returns {path of a leaf: parameters that follow it}."""
  return {
    '/'.join((path.rpartition('/')[0], other.leaf)): other
    for path, (other, *_) in _flat(cost).items()
    if path.rpartition('/')[2] == 'others'
  }


def _picked(
  recorded: Mapping, calls: list[str]
) -> dict[str, sizes_lib.Channels | sizes_lib.Kernel]:
  """Returns {path of a leaf: what it picks from}, in order of calls."""
  order = {path: i for i, path in reversed(list(enumerate(calls)))}
  found = {path: first for path, (first, *_) in _flat(recorded).items()}
  return dict(
    sorted(found.items(), key=lambda item: order[item[0].rpartition('/')[0]])
  )


def _size_decisions(
  picked: Mapping[str, sizes_lib.Channels | sizes_lib.Kernel],
) -> tuple[Decision, ...]:
  decisions: dict[str, Decision] = {}
  for leaf, size in picked.items():
    has_branches = getattr(size, 'has_branches', False)
    new = Decision(size.decision, size.labels, (), has_branches)
    known = decisions.get(size.decision, new)
    if known.menu != size.labels:
      raise ValueError(
        f'{leaf} picks from {size.labels}, but shares the decision '
        f'{size.decision} with {known.leaves[0]}, which picks from {known.menu}'
      )
    decisions[size.decision] = dataclasses.replace(
      known, leaves=(*known.leaves, leaf)
    )
  return tuple(decisions.values())
