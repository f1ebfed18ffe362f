"""Trees of decisions: what a model leaves open, found by tracing it.

A policy or an architecture here is a dict {decision: [K] leaf}; the `arch`
collection that the model reads holds a leaf per layer. Where every decision
governs one layer the two are the same tree; `expand` is the step between.
"""

from collections.abc import Callable, Mapping
import dataclasses
import fnmatch
import math
from typing import Any

from flax import traverse_util
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fliqs_jax import cost_model
from fliqs_jax import formats
from fliqs_jax import quant_spec


@dataclasses.dataclass(frozen=True)
class Decision:
  """One choice among K formats.

  Attributes:
    name: the layer's path, with `/weights` or `/activations` where the layer
      has two decisions, or the group's name.
    menu: the K formats.
    leaves: paths of the leaves of `arch` that follow this decision.
  """

  name: str
  menu: tuple[formats.NumericFormat, ...]
  leaves: tuple[str, ...]

  def one_hot(self, name: str) -> np.ndarray:
    """Returns [K] float32 with a one at the format called `name`."""
    names = [f.name for f in self.menu]
    if name not in names:
      raise ValueError(
        f'{name} is not on the menu of {self.name}: {", ".join(names)}'
      )
    return np.eye(len(names), dtype=np.float32)[names.index(name)]


@dataclasses.dataclass(frozen=True)
class SearchSpace:
  """What a model leaves open.

  Attributes:
    decisions: in the order in which the model calls its layers.
    ops: the model's ops, quantized or not, in that order.
    params: number of the model's parameters.
  """

  decisions: tuple[Decision, ...]
  ops: tuple[cost_model.Op, ...]
  params: int

  @property
  def size(self) -> float:
    """log10 of the number of architectures."""
    return sum(math.log10(len(d.menu)) for d in self.decisions)

  @property
  def is_fixed(self) -> bool:
    """Whether nothing is open: every menu has one format."""
    return all(len(d.menu) == 1 for d in self.decisions)

  def cost(self, kind: str) -> cost_model.Cost:
    """Returns the model's cost function: `bops`, `size` or `average_bits`."""
    return cost_model.make(kind, self.ops, self.params)

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

  def uniform(self, name: str) -> dict[str, np.ndarray]:
    """Returns the architecture with one format everywhere.

    Layers fixed to another format keep theirs.

    Raises:
      ValueError: an open decision does not have the format on its menu.
    """
    return {
      d.name: np.ones(1, np.float32) if len(d.menu) == 1 else d.one_hot(name)
      for d in self.decisions
    }

  def only(self) -> dict[str, np.ndarray]:
    """Returns the one architecture of a space with nothing open.

    Raises:
      ValueError: something is open.
    """
    if not self.is_fixed:
      raise ValueError('the space has open decisions')
    return {d.name: np.ones(1, np.float32) for d in self.decisions}

  def choices(
    self, assignment: Mapping[str, tuple[str | None, str | None]]
  ) -> dict[str, np.ndarray]:
    """Returns the architecture that an assignment in names describes.

    Args:
      assignment: {layer: (weights, activations)}, as `assignment` returns it.

    Raises:
      ValueError: layers are missing or surplus, a format is not on its menu, or
        layers that share a decision differ.
    """
    quant_spec.check_layers([op.path for op in self.ops], assignment)
    result: dict[str, np.ndarray] = {}
    for decision in self.decisions:
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
  if not {_caller(path, sown) for path, sown in _flat(cost).items()} <= set(
    calls
  ):
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
  return SearchSpace(_decisions(ops, spec), ops, params)


def _flat(tree: Mapping) -> dict[str, Any]:
  return traverse_util.flatten_dict(tree, sep='/')


def _caller(path: str, sown: tuple) -> str:
  """Returns the path of the module whose call has sown an op's cost."""
  path = path.removesuffix('ops').rstrip('/')
  # The products of an attention are named after it.
  shape = getattr(sown[0], 'shape', sown[0])
  return path.rpartition('/')[0] if shape.kind == 'attend' else path


def _ops(cost: Mapping, calls: list[str]) -> tuple[cost_model.Op, ...]:
  order = {path: i for i, path in reversed(list(enumerate(calls)))}
  ops = []
  for path, sown in _flat(cost).items():
    place = order[_caller(path, sown)]
    path = path.removesuffix('ops').rstrip('/')
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
    names = op.shape.leaves()
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
