"""Where an intercepted layer keeps its variables, also inside `nn.scan`.

A linen transform takes along the collections that the model's author named,
`params` above all, and leaves ours outside. So a layer that finds no `arch`
where it stands is *carried*: decision, statistics and costs travel in `params`,
under one reserved name, and are taken out again before anybody sees them.

Outside, the decision of step i of a scanned layer is `layer/@i/format`, and the
statistics lie in `quant_stats` under `layer/carried`, as the transform stacks
them.
"""

from collections.abc import Mapping, Sequence
import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

# Under these names our variables, and what layers tell, travel in `params`.
NAME = '_quant'
TOLD = '_told'
LAYOUT = 'layout'
_OUTSIDE = 'carried'
# Begins the names of what `LayerState.mark` leaves in a program.
MARK = 'fliqs call '
# A transform may stack `params` along any of these first axes.
PAD = (1, 1, 1, 1)
# Known sizes, to see which axis that was.
TAIL = (2, 3)
_LAYOUT = np.zeros((*PAD, *TAIL), np.float32)


class LayerState:
  """The variables of one layer, or of a part of it, as `layers` wants them.

  Attributes:
    module: the linen layer.
    parts: names of the part within the layer.
    telling: whether what is sown into `operands` is kept; see `stacks.told`.
    path: the layer's, with the part's name after it.
  """

  def __init__(
    self,
    module: nn.Module,
    parts: tuple[str, ...] = (),
    telling: bool = False,
  ):
    self.module = module
    self.parts = parts
    self.telling = telling
    self.path = '/'.join((*module.path, *parts))

  def at(self, part: str) -> 'LayerState':
    """Returns the variables of a part."""
    return LayerState(self.module, (*self.parts, part), self.telling)

  def is_mutable_collection(self, name: str) -> bool:
    """Returns whether the layer may change the collection."""
    module = self.module
    if module.is_mutable_collection(name):
      return True
    # When layers tell, `params` may change for that alone.
    is_learning = module.is_mutable_collection('params') and not self.telling
    return is_learning and self._is_carried(name)

  def has_variable(self, collection: str, name: str) -> bool:
    """Returns whether the variable exists."""
    return self._find(collection, name) is not None

  def get_variable(self, collection: str, name: str) -> Any:
    """Returns its value."""
    value = self._find(collection, name)
    return unpad(value) if self._is_carried(collection) else value

  def put(self, collection: str, name: str, value: Any) -> None:
    """Sets its value."""
    *path, name = (*self.parts, name)
    if self._is_carried(collection):
      if collection != 'cost':
        value = padded(value)
      path = [NAME, collection, *path]
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
        self.module.put_variable('params', NAME, {LAYOUT: _LAYOUT})
    return Reference(self, collection, name)

  def sow(self, collection: str, name: str, value: Any) -> None:
    """Appends to the variable, if the collection may change."""
    if collection == 'act_inputs' and self.parts:
      return  # Not the inputs of a layer.
    if collection == 'operands':
      if self.telling:
        self._tell(name, value)
      return
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
    program alone; `repeats.calls` reads it there.
    """
    if self.module.is_initializing() and self._is_carried('cost'):

      def mark(x):
        return jnp.not_equal(x, x)  # JAX drops what only hands on.

      mark.__name__ = f'{MARK}{x.size} {self.path}'
      jax.jit(mark)(x)

  def _tell(self, name, value):
    """Keeps what the layer multiplies; in each of its calls it is the same."""
    told = {name: padded(value), LAYOUT: _LAYOUT}
    for part in reversed(self.parts):
      told = {part: told}
    self.module.put_variable('params', TOLD, told)

  def _is_carried(self, collection: str) -> bool:
    module = self.module
    if collection == 'act_inputs':
      return False
    if module.is_initializing():
      return not module.is_mutable_collection(collection)
    return module.has_variable('params', NAME)

  def _find(self, collection, name):
    path = (*self.parts, name)
    if self._is_carried(collection):
      collection, path = 'params', (NAME, collection, *path)
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


def padded(value: jax.Array) -> jax.Array:
  """Returns a value as it travels."""
  return jnp.reshape(value, (*PAD, *jnp.shape(value)))


def unpad(value: jax.Array) -> jax.Array:
  """Returns a value that has travelled, of no stack."""
  return jnp.reshape(value, jnp.shape(value)[len(PAD) :])


def merge(variables: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the variables as the intercepted model wants them.

  Args:
    variables: as outside: steps apart, `params` as the model's author has them.
  """
  variables = dict(variables)
  stats, carried = without(variables.get('quant_stats', {}), _OUTSIDE)
  arch = _stacked(variables.get('arch', {}), stats)
  params = variables.get('params', {})
  for path, state in carried.items():
    decisions = arch
    for key in path:
      decisions = decisions.get(key, {})
    shape = lead(path, state[LAYOUT])
    decisions = jax.tree.map(
      lambda leaf, shape=shape: jnp.reshape(leaf, (*shape, leaf.shape[-1])),
      decisions,
    )
    params = with_entry(params, path, NAME, {**state, 'arch': decisions})
  merged = dict(params=params, quant_stats=stats, arch=arch)
  return {**variables, **{k: v for k, v in merged.items() if v}}


def split(variables: Mapping[str, Any]) -> tuple[dict[str, Any], dict]:
  """Returns the variables as outside, but costs; and what was carried.

  Args:
    variables: all or some, as the intercepted model leaves them.
  """
  variables = dict(variables)
  params, carried = without(variables.get('params', {}), NAME)
  if 'params' in variables:
    variables['params'] = params
  if 'arch' in variables:
    variables['arch'] = _apart(variables['arch'])
  for path, state in carried.items():
    outside = {k: v for k, v in state.items() if k in ('quant_stats', LAYOUT)}
    if LAYOUT in state:
      variables['quant_stats'] = with_entry(
        variables.get('quant_stats', {}), path, _OUTSIDE, outside
      )
      decisions = jax.tree.map(
        functools.partial(_steps_first, state[LAYOUT], path),
        state.get('arch', {}),
      )
      for key, value in _apart(decisions).items():
        variables['arch'] = with_entry(
          variables.get('arch', {}), path, key, value
        )
  return variables, carried


def is_carrying(variables: Mapping[str, Any]) -> bool:
  """Returns whether statistics of a layer are carried."""
  return bool(without(variables.get('quant_stats', {}), _OUTSIDE)[1])


def length(state: Mapping[str, Any]) -> int | None:
  """Returns how many steps a carried layer has, None if nothing tells."""
  if LAYOUT not in state:
    return None
  return math.prod(state[LAYOUT].shape[: -len(TAIL)])


def is_stacked(state: Mapping[str, Any]) -> bool:
  """Returns whether the steps of a carried layer have weights of their own."""
  return LAYOUT in state and state[LAYOUT].ndim > len(PAD + TAIL)


def lead(path: tuple[str, ...], layout: jax.Array) -> tuple[int, ...]:
  """Returns the shape that transforms have made of `PAD`.

  Args:
    path: of the layer.
    layout: has travelled with its variables.

  Raises:
    ValueError: an axis shows in no shape.
  """
  shape = layout.shape[: -len(TAIL)]
  if layout.shape[-len(TAIL) :] != TAIL or len(shape) > 2 * len(PAD):
    raise ValueError(
      f'{"/".join(path)}: a transform stacks params along an axis that cannot '
      f'be followed; use one of the axes 0 to {len(PAD)}'
    )
  return shape


def _steps_first(layout, path, leaf):
  """Returns [steps, K], or [K] if there are none, of a carried decision."""
  stacked = len(lead(path, layout)) > len(PAD)
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


def _stacked(tree, stats):
  """The way back: leaves [steps, K] from `@0`, `@1`, ...

  Scans of scans, if they took `quant_stats` along, have left their shape there.
  """
  if not isinstance(tree, Mapping):
    return tree
  steps = [tree[f'@{i}'] for i in range(len(tree)) if f'@{i}' in tree]
  result = {
    k: _stacked(v, stats.get(k, {}) if isinstance(stats, Mapping) else {})
    for k, v in tree.items()
    if not k.startswith('@')
  }
  if steps:
    lead = (len(steps),)
    for path, leaf in jax.tree_util.tree_leaves_with_path(stats):
      if path[-1].key == 'active':
        lead = jnp.shape(leaf)
    result |= jax.tree.map(
      lambda *leaves: jnp.stack(leaves).reshape((*lead, -1)), *steps
    )
  return result


def without(
  tree: Mapping[str, Any], name: str, path: tuple[str, ...] = ()
) -> tuple[dict[str, Any], dict[tuple[str, ...], Any]]:
  """Returns the tree without the entries of a name, and those by path."""
  found, rest = {}, {}
  for key, value in tree.items():
    if key == name:
      found[path] = value
    elif isinstance(value, Mapping):
      rest[key], below = without(value, name, (*path, key))
      found |= below
      if not rest[key] and value:
        del rest[key]  # Nothing else was there.
    else:
      rest[key] = value
  return rest, found


def with_entry(
  tree: Mapping[str, Any], path: Sequence[str], name: str, value: Any
) -> dict[str, Any]:
  """Returns the tree with an entry more."""
  if not path:
    return {**tree, name: value}
  head, *rest = path
  return {**tree, head: with_entry(tree.get(head, {}), rest, name, value)}
