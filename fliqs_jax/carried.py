"""Where an intercepted layer keeps its variables, also inside `nn.scan`.

A linen transform takes along the collections that the model's author named,
`params` above all, and leaves ours outside. So a layer that finds no `arch`
where it stands is *carried*: decision, statistics and costs travel in `params`,
under one reserved name, and are taken out again before anybody sees them.

Outside, the decision of step i of a scanned layer is `layer/@i/format`, and the
statistics lie in `quant_stats` under `layer/carried`, as the transform stacks
them.
"""

from collections.abc import Mapping
import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fliqs_jax import cost_model

_NAME = '_quant'
_OUTSIDE = 'carried'
_LAYOUT = 'layout'
_MARK = 'fliqs call '
# A transform may stack `params` along any of these first axes.
_PAD = (1, 1, 1, 1)
# Known sizes, to see which axis that was.
_TAIL = (2, 3)


class LayerState:
  """The variables of one layer, or of a part of it, as `layers` wants them.

  Attributes:
    module: the linen layer.
    path: the layer's, with the part's name after it.
  """

  def __init__(self, module: nn.Module, parts: tuple[str, ...] = ()):
    self.module = module
    self.parts = parts
    self.path = '/'.join((*module.path, *parts))

  def at(self, part: str) -> 'LayerState':
    """Returns the variables of a part."""
    return LayerState(self.module, (*self.parts, part))

  def is_mutable_collection(self, name: str) -> bool:
    """Returns whether the layer may change the collection."""
    module = self.module
    return module.is_mutable_collection(name) or (
      self._is_carried(name) and module.is_mutable_collection('params')
    )

  def has_variable(self, collection: str, name: str) -> bool:
    """Returns whether the variable exists."""
    return self._find(collection, name) is not None

  def get_variable(self, collection: str, name: str) -> Any:
    """Returns its value."""
    value = self._find(collection, name)
    return _unpad(value) if self._is_carried(collection) else value

  def put(self, collection: str, name: str, value: Any) -> None:
    """Sets its value."""
    *path, name = (*self.parts, name)
    if self._is_carried(collection):
      if collection != 'cost':
        value = jnp.reshape(value, (*_PAD, *jnp.shape(value)))
      path = [_NAME, collection, *path]
      collection = 'params'
    for key in reversed([*path[1:], name] if path else []):
      value = {key: value}
    self.module.put_variable(collection, path[0] if path else name, value)

  def variable(self, collection: str, name: str, init, *args) -> 'Reference':
    """Returns the variable, as linen's `variable` does.

    Raises:
      ValueError: it is not there, and this is no initialisation.
    """
    if not self.has_variable(collection, name):
      if not self.module.is_initializing():
        raise ValueError(
          f'{self.path or "the layer"}: no {collection}/{name} among the '
          "variables; pass all of the collections of the model's init, with "
          'arch=space.expand(choices)'
        )
      self.put(collection, name, init(*args))
      if self._is_carried(collection):
        layout = np.zeros((*_PAD, *_TAIL), np.float32)
        self.module.put_variable('params', _NAME, {_LAYOUT: layout})
    return Reference(self, collection, name)

  def sow(self, collection: str, name: str, value: Any) -> None:
    """Appends to the variable, if the collection may change."""
    if collection == 'act_inputs' and self.parts:
      return  # Not the inputs of a layer.
    if collection != 'cost' or self.module.is_mutable_collection('cost'):
      mutable = self.module.is_mutable_collection(collection)
    else:
      mutable = self.module.is_initializing()
    if mutable:
      known = self._find(collection, name) or ()
      self.put(collection, name, (*known, value))

  def mark(self, x: jax.Array) -> None:
    """Leaves a sign in the traced program that the layer was called.

    How often a transform calls a layer, and for how many slices, shows in the
    program alone; `calls` reads it there.
    """
    if self.module.is_initializing() and self._is_carried('cost'):

      def mark(x):
        return jnp.not_equal(x, x)  # JAX drops what only hands on.

      mark.__name__ = f'{_MARK}{x.size} {self.path}'
      jax.jit(mark)(x)

  def _is_carried(self, collection: str) -> bool:
    module = self.module
    if collection == 'act_inputs':
      return False
    if module.is_initializing():
      return not module.is_mutable_collection(collection)
    return module.has_variable('params', _NAME)

  def _find(self, collection, name):
    path = (*self.parts, name)
    if self._is_carried(collection):
      collection, path = 'params', (_NAME, collection, *path)
    value = self.module.get_variable(collection, path[0])
    for key in path[1:]:
      value = None if value is None else value.get(key)
    return value


class Reference:
  """A variable with a `value`, as linen's."""

  def __init__(self, state: LayerState, collection: str, name: str):
    self._of = (state, collection, name)

  @property
  def value(self):
    state, collection, name = self._of
    return state.get_variable(collection, name)

  @value.setter
  def value(self, value):
    state, collection, name = self._of
    state.put(collection, name, value)


def _unpad(value):
  return jnp.reshape(value, jnp.shape(value)[len(_PAD) :])


def merge(variables: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the variables as the intercepted model wants them.

  Args:
    variables: as outside: steps apart, `params` as the model's author has them.
  """
  variables = dict(variables)
  stats, carried = _without(variables.get('quant_stats', {}), _OUTSIDE)
  arch = _stacked(variables.get('arch', {}))
  params = variables.get('params', {})
  for path, state in carried.items():
    decisions = arch
    for key in path:
      decisions = decisions.get(key, {})
    lead = state[_LAYOUT].shape[: -len(_TAIL)]
    decisions = jax.tree.map(
      lambda leaf, lead=lead: jnp.reshape(leaf, (*lead, leaf.shape[-1])),
      decisions,
    )
    params = _with(params, path, _NAME, {**state, 'arch': decisions})
  merged = dict(params=params, quant_stats=stats, arch=arch)
  return {**variables, **{k: v for k, v in merged.items() if v}}


def split(variables: Mapping[str, Any]) -> tuple[dict[str, Any], dict]:
  """Returns the variables as outside, but costs; and what was carried.

  Args:
    variables: all or some, as the intercepted model leaves them.
  """
  variables = dict(variables)
  params, carried = _without(variables.get('params', {}), _NAME)
  if 'params' in variables:
    variables['params'] = params
  if 'arch' in variables:
    variables['arch'] = _apart(variables['arch'])
  for path, state in carried.items():
    outside = {k: v for k, v in state.items() if k in ('quant_stats', _LAYOUT)}
    if _LAYOUT in state:
      variables['quant_stats'] = _with(
        variables.get('quant_stats', {}), path, _OUTSIDE, outside
      )
      decisions = jax.tree.map(
        functools.partial(_steps_first, state[_LAYOUT], path),
        state.get('arch', {}),
      )
      for key, value in _apart(decisions).items():
        variables['arch'] = _with(variables.get('arch', {}), path, key, value)
  return variables, carried


def is_carrying(variables: Mapping[str, Any]) -> bool:
  """Returns whether statistics of a layer are carried."""
  return bool(_without(variables.get('quant_stats', {}), _OUTSIDE)[1])


def length(state: Mapping[str, Any]) -> int | None:
  """Returns how many steps a carried layer has, None if nothing tells."""
  if _LAYOUT not in state:
    return None
  return math.prod(state[_LAYOUT].shape[: -len(_TAIL)])


def is_stacked(state: Mapping[str, Any]) -> bool:
  """Returns whether the steps of a carried layer have weights of their own."""
  return _LAYOUT in state and state[_LAYOUT].ndim > len(_PAD + _TAIL)


def _steps_first(layout, path, leaf):
  """Returns [steps, K], or [K] if there are none, of a carried decision."""
  lead = layout.shape[: -len(_TAIL)]
  if layout.shape[-len(_TAIL) :] != _TAIL or len(lead) > 2 * len(_PAD):
    raise ValueError(
      f'{"/".join(path)}: a transform stacks params along an axis that cannot '
      f'be followed; use one of the axes 0 to {len(_PAD)}'
    )
  stacked = len(lead) > len(_PAD)
  return jnp.reshape(leaf, (-1, leaf.shape[-1]) if stacked else (-1,))


def _apart(tree):
  """Splits leaves [steps, K] into `@0`, `@1`, ..."""
  if not isinstance(tree, Mapping):
    return tree
  stacked = {
    k: v for k, v in tree.items() if not isinstance(v, Mapping) and v.ndim > 1
  }
  result = {k: _apart(v) for k, v in tree.items() if k not in stacked}
  for name, leaf in stacked.items():
    leaf = jnp.reshape(leaf, (-1, leaf.shape[-1]))
    for i in range(len(leaf)):
      result.setdefault(f'@{i}', {})[name] = leaf[i]
  return result


def _stacked(tree):
  """The way back: leaves [steps, K] from `@0`, `@1`, ..."""
  if not isinstance(tree, Mapping):
    return tree
  steps = [tree[f'@{i}'] for i in range(len(tree)) if f'@{i}' in tree]
  result = {k: _stacked(v) for k, v in tree.items() if not k.startswith('@')}
  if steps:
    result |= jax.tree.map(lambda *leaves: jnp.stack(leaves), *steps)
  return result


def _without(tree, name, path=()):
  """Returns the tree without the entries of a name, and those by path."""
  found, rest = {}, {}
  for key, value in tree.items():
    if key == name:
      found[path] = value
    elif isinstance(value, Mapping):
      rest[key], below = _without(value, name, (*path, key))
      found |= below
      if not rest[key] and value:
        del rest[key]  # Nothing else was there.
    else:
      rest[key] = value
  return rest, found


def _with(tree, path, name, value):
  """Returns the tree with an entry more."""
  if not path:
    return {**tree, name: value}
  head, *rest = path
  return {**tree, head: _with(tree.get(head, {}), rest, name, value)}


def calls(program) -> dict[str, list[float]]:
  """Returns {layer: [times, ...]}: one entry for each place of a call.

  Args:
    program: jaxpr of the model's initialisation.
  """
  found: dict[str, list[float]] = {}

  def walk(jaxpr, times):
    for equation in jaxpr.eqns:
      name = str(equation.params.get('name', ''))
      if name.startswith(_MARK):
        if not equation.invars:
          continue  # What nn.scan's look for constants leaves behind.
        size, _, path = name.removeprefix(_MARK).partition(' ')
        slices = equation.invars[0].aval.size / max(int(size), 1)
        found.setdefault(path, []).append(times * slices)
        continue
      if equation.primitive.name == 'scan':
        inside = times * equation.params['length']
      else:
        inside = times
      for value in jax.tree.leaves(
        list(equation.params.values()), is_leaf=_is_program
      ):
        if _is_program(value):
          walk(getattr(value, 'jaxpr', value), inside)

  walk(program.jaxpr, 1)
  return found


def _is_program(value):
  return hasattr(value, 'eqns') or hasattr(value, 'jaxpr')


def costs(
  variables: Mapping[str, Any],
  carried: Mapping[tuple[str, ...], Any],
  called: Mapping[str, list[float]],
  shared: bool,
) -> dict[str, Any]:
  """Returns the `cost` collection with what transforms repeat.

  Args:
    variables: as `split` returns them.
    carried: what was carried.
    called: as `calls` returns it.
    shared: whether all steps of a stack share a decision.

  Raises:
    ValueError: the repetitions of a layer cannot be known or not be quantized.
  """
  cost = variables.get('cost', {})
  cost = _stacked_natively(cost, variables, shared)
  for path, state in carried.items():
    for parts, shapes in _records(state.get('cost', {})):
      layer = '/'.join((*path, *parts))
      steps = length(state)
      if steps is None:  # Nothing is quantized.
        steps = _ratio(variables['params'], path, shapes[0])
      stacked = steps > 1 or is_stacked(state)
      times = called.get(layer, [])
      if len(times) != len(shapes):
        raise ValueError(
          f'{layer}: {len(shapes)} calls, of which {len(times)} show in the '
          'traced program: nn.jit takes modules for equal and traces the first '
          'alone; give them different fields, or leave nn.jit to the caller'
        )
      repeated = [_repeat(layer, s, t / steps) for s, t in zip(shapes, times)]
      if stacked:
        repeated = [cost_model.Stacked(s, steps, shared) for s in repeated]
      cost = _with(cost, (*path, *parts), 'ops', tuple(repeated))
  return cost


def _repeat(layer, shape, times):
  if times > 1 and shape.act_menu is not None:
    raise ValueError(
      f'{layer} has the same weights in all {times:g} steps of a transform, '
      'which therefore cannot keep statistics of its inputs: exclude it, use '
      "mode='weights', or carry the collections arch and quant_stats through "
      'the transform (variable_broadcast and variable_carry of nn.scan)'
    )
  return shape.replace(macs=round(shape.macs * times))


def _records(tree, parts=()):
  for key, value in tree.items():
    if key == 'ops':
      yield parts, value
    else:
      yield from _records(value, (*parts, key))


def _ratio(params, path, shape):
  """Returns how often the weights of one step fit into a parameter."""
  for key in path:
    params = params.get(key, {})
  sizes = [
    jnp.size(nn.meta.unbox(params[name]))
    for name in ('kernel', 'embedding')
    if name in params
  ]
  return sizes[0] // shape.weights if sizes and shape.weights else 1


def _stacked_natively(cost, variables, shared):
  """Marks what a transform that takes all collections along has stacked."""
  for parts, shapes in _records(cost):
    arch = variables.get('arch', {})
    for key in parts:
      arch = arch.get(key, {})
    steps = sum(key.startswith('@') for key in arch)
    steps = steps or _ratio(variables.get('params', {}), parts, shapes[0])
    if steps > 1:
      stacked = tuple(cost_model.Stacked(s, steps, shared) for s in shapes)
      cost = _with(cost, parts, 'ops', stacked)
  return cost
