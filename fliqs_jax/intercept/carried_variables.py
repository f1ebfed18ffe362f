"""Variables of an intercepted layer, also inside `nn.scan` and `nn.vmap`.

A linen transform passes on the collections that the model's author named,
`params` above all, and not ours. A layer to which `arch` is not passed on is
*carried*: its decision, statistics and costs travel in `params` under one
reserved name. `merge` puts them there before the model runs, and `split` takes
them out afterwards, so that no caller sees them.

For the caller, the decision of iteration i of a scanned layer is
`layer/@i/format`, and its statistics lie in `quant_stats` under
`layer/carried`, stacked by the transform. README.md beside this file shows
both trees.
"""

from collections.abc import Mapping, Sequence
import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

# The names under which our variables, and recorded operands, travel in
# `params`.
NAME = '_quant'
OPERANDS = '_operands'
LAYOUT = 'layout'
_OUTSIDE = 'carried'
# First words of the names of the markers that `LayerState.mark` leaves.
MARK = 'fliqs call '
# Leading axes of each carried variable: a transform may stack `params` along
# any of them.
PAD = (1, 1, 1, 1)
# Sentinel sizes of the last two axes. nn.scan and nn.vmap insert their length
# before them, so the shape shows at which axis.
TAIL = (2, 3)
_LAYOUT = np.zeros((*PAD, *TAIL), np.float32)


class LayerState:
  """Variables of one layer, or of a part of it, for the code in `layers`.

  Attributes:
    module: the bound linen layer.
    parts: names that lead from the layer to the part; empty for the layer.
    recording: whether values sown into `operands` are kept; see
      `scan_iterations.with_operands`.
    path: path of the layer, followed by `parts`, joined by slashes.
  """

  def __init__(
    self,
    module: nn.Module,
    parts: tuple[str, ...] = (),
    recording: bool = False,
  ):
    self.module = module
    self.parts = parts
    self.recording = recording
    self.path = '/'.join((*module.path, *parts))

  def at(self, part: str) -> 'LayerState':
    """Returns the variables of a part."""
    return LayerState(self.module, (*self.parts, part), self.recording)

  def is_mutable_collection(self, name: str) -> bool:
    """Returns whether the layer may change the collection."""
    module = self.module
    if module.is_mutable_collection(name):
      return True
    # While operands are recorded, `params` is mutable for that purpose only.
    is_learning = module.is_mutable_collection('params') and not self.recording
    return is_learning and self._is_carried(name)

  def has_variable(self, collection: str, name: str) -> bool:
    """Returns whether the variable exists."""
    return self._find(collection, name) is not None

  def get_variable(self, collection: str, name: str) -> Any:
    """Returns the value of a variable, None if it does not exist."""
    value = self._find(collection, name)
    return unpad(value) if self._is_carried(collection) else value

  def put(self, collection: str, name: str, value: Any) -> None:
    """Sets the value of a variable."""
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
      ValueError: the variable does not exist, outside of `init`.
    """
    if not self.has_variable(collection, name):
      if not self.module.is_initializing():
        raise ValueError(
          f'{self.path or "the layer"}: the variables lack {collection}/{name}'
          "; pass every collection of the model's init, with "
          'arch=space.expand(choices)'
        )
      self.put(collection, name, init(*args))
      if self._is_carried(collection):
        self.module.put_variable('params', NAME, {LAYOUT: _LAYOUT})
    return Reference(self, collection, name)

  def sow(self, collection: str, name: str, value: Any) -> None:
    """Appends to the variable, if the collection may change."""
    if collection == 'act_inputs' and self.parts:
      return  # The operands of a part are not inputs of the layer.
    if collection == 'operands':
      if self.recording:
        self._record(name, value)
      return
    if collection != 'cost' or self.module.is_mutable_collection('cost'):
      mutable = self.module.is_mutable_collection(collection)
    else:
      mutable = self.module.is_initializing()
    if mutable:
      known = self._find(collection, name) or ()
      self.put(collection, name, (*known, value))

  def mark(self, x: jax.Array) -> None:
    """Marks this call of the layer in the traced program.

    Only the program shows how often a transform calls a layer, and for how
    many slices of its inputs; `call_counts.calls` reads the marks.
    """
    if self.module.is_initializing() and self._is_carried('cost'):

      def mark(x):
        return jnp.not_equal(x, x)  # JAX would drop an identity function.

      mark.__name__ = f'{MARK}{x.size} {self.path}'
      jax.jit(mark)(x)

  def _record(self, name, value):
    """Keeps an operand; it is the same in every call of the layer."""
    operands = {name: padded(value), LAYOUT: _LAYOUT}
    for part in reversed(self.parts):
      operands = {part: operands}
    self.module.put_variable('params', OPERANDS, operands)

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
  """A variable of a `LayerState`, with `value` as in linen's `Variable`."""

  def __init__(self, state: LayerState, collection: str, name: str):
    self._key = (state, collection, name)

  @property
  def value(self) -> Any:
    """The current value; assignment replaces it."""
    state, collection, name = self._key
    return state.get_variable(collection, name)

  @value.setter
  def value(self, value):
    state, collection, name = self._key
    state.put(collection, name, value)


def padded(value: jax.Array) -> jax.Array:
  """Returns a value with the leading axes under which it travels."""
  return jnp.reshape(value, (*PAD, *jnp.shape(value)))


def unpad(value: jax.Array) -> jax.Array:
  """Returns a value that traveled outside of any scan, without these axes."""
  return jnp.reshape(value, jnp.shape(value)[len(PAD) :])


def merge(variables: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the variables in the form that the intercepted model reads.

  Args:
    variables: collections in the caller's form: iterations apart, `params`
      with the model's own parameters only.
  """
  variables = dict(variables)
  stats, carried = without(variables.get('quant_stats', {}), _OUTSIDE)
  arch = _stacked(variables.get('arch', {}), stats)
  params = variables.get('params', {})
  for path, state in carried.items():
    decisions = arch
    for key in path:
      decisions = decisions.get(key, {})
    shape = leading_shape(path, state[LAYOUT])
    decisions = jax.tree.map(
      lambda leaf, shape=shape: jnp.reshape(leaf, (*shape, leaf.shape[-1])),
      decisions,
    )
    params = with_entry(params, path, NAME, {**state, 'arch': decisions})
  merged = dict(params=params, quant_stats=stats, arch=arch)
  return {**variables, **{k: v for k, v in merged.items() if v}}


def split(variables: Mapping[str, Any]) -> tuple[dict[str, Any], dict]:
  """Returns the variables in the caller's form, and what was carried.

  Carried costs are in the second result only: {layer path: the collections
  that traveled in `params`}.

  Args:
    variables: all or some collections, in the intercepted model's form.
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
        functools.partial(_iterations_first, state[LAYOUT], path),
        state.get('arch', {}),
      )
      for key, value in _apart(decisions).items():
        variables['arch'] = with_entry(
          variables.get('arch', {}), path, key, value
        )
  return variables, carried


def has_carried(variables: Mapping[str, Any]) -> bool:
  """Returns whether the statistics of any layer are carried."""
  return bool(without(variables.get('quant_stats', {}), _OUTSIDE)[1])


def length(state: Mapping[str, Any]) -> int | None:
  """Returns the number of iterations of a carried layer, None if unknown."""
  if LAYOUT not in state:
    return None
  return math.prod(state[LAYOUT].shape[: -len(TAIL)])


def is_stacked(state: Mapping[str, Any]) -> bool:
  """Returns whether each iteration of a carried layer has its own weights."""
  return LAYOUT in state and state[LAYOUT].ndim > len(PAD + TAIL)


def leading_shape(path: tuple[str, ...], layout: jax.Array) -> tuple[int, ...]:
  """Returns the leading shape of a layer's carried variables.

  That is `PAD`, with the length of each transform at the axis where the
  transform stacks.

  Args:
    path: names that lead to the layer.
    layout: the variable `LAYOUT` that traveled with the layer's variables.

  Raises:
    ValueError: a transform stacks behind the axes of `PAD`.
  """
  shape = layout.shape[: -len(TAIL)]
  if layout.shape[-len(TAIL) :] != TAIL or len(shape) > 2 * len(PAD):
    raise ValueError(
      f'{"/".join(path)}: a transform stacks params along an axis behind axis '
      f'{len(PAD)}, which is not supported; use one of the axes 0 to {len(PAD)}'
    )
  return shape


def _iterations_first(layout, path, leaf):
  """Returns a carried decision as [iterations, K]; as [K] if not scanned."""
  stacked = len(leading_shape(path, layout)) > len(PAD)
  return jnp.reshape(leaf, (-1, leaf.shape[-1]) if stacked else (-1,))


def _apart(tree):
  """Splits leaves [iterations, K] into `@0`, `@1`, ..."""
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
  """Stacks `@0`, `@1`, ... to leaves [iterations, K]; inverts `_apart`.

  Nested scans that pass on `quant_stats` give leaves [..., K] of the shape of
  the variable `active` there.
  """
  if not isinstance(tree, Mapping):
    return tree
  iterations = [tree[f'@{i}'] for i in range(len(tree)) if f'@{i}' in tree]
  result = {
    k: _stacked(v, stats.get(k, {}) if isinstance(stats, Mapping) else {})
    for k, v in tree.items()
    if not k.startswith('@')
  }
  if iterations:
    shape = (len(iterations),)
    for path, leaf in jax.tree_util.tree_leaves_with_path(stats):
      if path[-1].key == 'active':
        shape = jnp.shape(leaf)
    result |= jax.tree.map(
      lambda *leaves: jnp.stack(leaves).reshape((*shape, -1)), *iterations
    )
  return result


def without(
  tree: Mapping[str, Any], name: str, path: tuple[str, ...] = ()
) -> tuple[dict[str, Any], dict[tuple[str, ...], Any]]:
  """Returns the tree without the entries of a name, and {path: such entry}."""
  found, rest = {}, {}
  for key, value in tree.items():
    if key == name:
      found[path] = value
    elif isinstance(value, Mapping):
      rest[key], below = without(value, name, (*path, key))
      found |= below
      if not rest[key] and value:
        del rest[key]  # It held nothing else.
    else:
      rest[key] = value
  return rest, found


def with_entry(
  tree: Mapping[str, Any], path: Sequence[str], name: str, value: Any
) -> dict[str, Any]:
  """Returns the tree with `value` as entry `name` of the subtree at `path`."""
  if not path:
    return {**tree, name: value}
  head, *rest = path
  return {**tree, head: with_entry(tree.get(head, {}), rest, name, value)}
