"""Trees of inputs and outputs, described in JSON and built again from it.

A tree is described by its nodes: a leaf, a dict, list, tuple or None, a named
tuple, or an object of another registered class. An object is built again as its
own class if that can be imported and its parts are all that it has; with other
static fields than the defaults, for one, it is a dict of its parts.
"""

from collections.abc import Mapping, Sequence
import importlib
import operator
from typing import Any

import jax

_LEAF = {'kind': 'leaf'}
_PLAIN = {dict: 'dict', list: 'list', tuple: 'tuple', type(None): 'none'}


def describe(tree: Any) -> dict[str, Any]:
  """Returns the description of a tree: plain JSON values.

  Raises:
    ValueError: a dict has a key that is neither a str nor an int, or two parts
      of a node have the same name.
  """
  children = _children(tree)
  if children is None:
    return _LEAF
  node = {
    'kind': _PLAIN.get(type(tree), 'dict'),
    'keys': [key for key, _ in children],
    'children': [describe(child) for _, child in children],
  }
  if len(set(_names(node))) < len(children):
    raise ValueError(
      f'two parts of a {type(tree).__name__} have the same name: its parts are '
      f'{", ".join(_names(node))}'
    )
  if type(tree) in _PLAIN:
    return node
  instance = node | {
    'kind': 'named tuple' if hasattr(tree, '_fields') else 'object',
    'class': f'{type(tree).__module__}:{type(tree).__qualname__}',
  }
  return instance if _is_built(instance, tree) else node


def build(description: Mapping[str, Any], leaves: Sequence[Any]) -> Any:
  """Returns a tree from its description and its leaves, in their order."""
  return _build(description, iter(leaves))


def shape(description: Mapping[str, Any]) -> Any:
  """Returns the names of the leaves, nested, without the classes of nodes."""
  if description['kind'] == 'leaf':
    return 'array'
  children = map(shape, description['children'])
  return dict(zip(_names(description), children))


def order(given: Mapping[str, Any], expected: Mapping[str, Any]) -> list[int]:
  """Returns the place among given leaves of each expected one, by name.

  JAX sorts the leaves of a dict, but not those of a class.

  Args:
    given: description of a tree.
    expected: that of a tree of the same `shape`.
  """
  places = {path: i for i, path in enumerate(_paths(given))}
  return [places[path] for path in _paths(expected)]


def _paths(node: Mapping[str, Any]) -> list[tuple[str, ...]]:
  """Returns the names on the way to each leaf, in the order of the leaves."""
  if node['kind'] == 'leaf':
    return [()]
  return [
    (name, *path)
    for name, child in zip(_names(node), node['children'])
    for path in _paths(child)
  ]


def _names(node: Mapping[str, Any]) -> list[str]:
  return [str(key) for key in node['keys']]


def _build(node: Mapping[str, Any], leaves: Any) -> Any:
  if node['kind'] == 'leaf':
    return next(leaves)
  return _node(node, [_build(child, leaves) for child in node['children']])


def _node(node: Mapping[str, Any], children: list[Any]) -> Any:
  """Returns a node from its description and its parts."""
  parts = dict(zip(node['keys'], children))
  match node['kind']:
    case 'none':
      return None
    case 'list':
      return children
    case 'tuple':
      return tuple(children)
    case 'dict':
      return parts
  owner = _class(node['class'])
  if owner is None:
    return parts
  try:
    if node['kind'] == 'named tuple':
      return owner(*children)
    return owner(**parts)
  except TypeError:  # It has other arguments.
    return parts


def _is_built(node: Mapping[str, Any], tree: Any) -> bool:
  """Returns whether a node's class makes it from its parts alone."""
  children = [
    build(child, jax.tree.leaves(part))
    for child, (_, part) in zip(node['children'], _children(tree) or [])
  ]
  try:
    parts, structure = _flat(_node(node, children))
    same = structure == _flat(tree)[1]
  except Exception:  # The class may raise any error.
    return False
  return same and all(map(operator.is_, parts, children))


def _flat(tree: Any) -> tuple[list[Any], Any]:
  """Returns the parts of a node, and its structure without theirs."""
  return jax.tree.flatten(tree, is_leaf=lambda x: x is not tree)


def _class(name: str) -> Any:
  module, _, path = name.partition(':')
  try:
    owner: Any = importlib.import_module(module)
    for part in path.split('.'):
      owner = getattr(owner, part)
  except (ImportError, AttributeError):
    return None
  return owner


def _children(tree: Any) -> list[tuple[Any, Any]] | None:
  """Returns the keys and parts of a node; None for a leaf."""
  parts = jax.tree_util.tree_leaves_with_path(
    tree, is_leaf=lambda x: x is not tree
  )
  if len(parts) == 1 and parts[0][1] is tree and not parts[0][0]:
    return None
  return [(_key(*path), part) for path, part in parts]


def _key(entry: Any) -> str | int:
  """Returns the key of a dict, or the name of another part."""
  if not isinstance(entry, jax.tree_util.DictKey):
    return jax.tree_util.keystr((entry,), simple=True)
  if not isinstance(entry.key, str | int):
    raise ValueError(
      f'a dict has the key {entry.key!r}, a {type(entry.key).__name__}: keys '
      'of inputs and outputs are str or int, which a manifest can hold'
    )
  return entry.key
