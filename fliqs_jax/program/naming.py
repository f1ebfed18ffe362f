"""Names of products: that of their variable, or of their place."""

import collections
from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import math
import re

from fliqs_jax.program import products as products_lib

# Last parts of a variable's path that say nothing about the layer.
_USUAL = ('kernel', 'embedding', 'weight', 'w')
# What transforms and calls add to the name of a place.
_TRANSFORMS = re.compile(r'\w+\(([^()]*)\)')
# What the collections `arch` and `quant_stats` hold of a layer.
_OF_LAYER = (
  'format',
  'weights',
  'activations',
  'mean',
  'variance',
  'largest',
  'count',
  'active',
  'clip',
  'ratio',
  'weight_ratio',
)
_NAMELESS = ('checkpoint', 'remat', 'while', 'body', 'cond', 'scan')


@dataclasses.dataclass(frozen=True)
class Found:
  """A product before it has its name.

  Attributes:
    product: the product; `path` and `layer` are empty.
    leaf: path of the variable that its weights are made of; empty: of none.
    scope: name of its place.
  """

  product: products_lib.Product
  leaf: str
  scope: str


def check(paths: Sequence[str]) -> None:
  """Checks that the paths of a model's variables can name its products.

  Raises:
    ValueError: two variables have one path, as with a slash in a key, or a key
      ends like the name of a layer's second use.
  """
  for path, uses in collections.Counter(paths).items():
    if uses > 1:
      raise ValueError(
        f'{uses} variables have the path {path}, because a key has a slash; '
        'rename the key'
      )
    if re.search(r'#\d+(/|$)', path):
      raise ValueError(
        f'the variable {path}: a key must not end in # and a number, as the '
        'later uses of a layer do; rename the key'
      )


def _short(leaf: str) -> str:
  """Returns the path of the layer that a variable belongs to.

  It is empty for a linen layer that is the whole model.
  """
  parts = leaf.split('/')
  if len(parts) > 1 and parts[0] == 'params':
    del parts[0]
  if len(parts) > 1 and parts[-1] == 'value':
    del parts[-1]  # Of a linen variable in a box.
  if parts[-1] in (_USUAL if len(parts) > 1 else _USUAL[:2]):
    del parts[-1]
  return '/'.join(parts)


def scope(names: str, root: str) -> str:
  """Returns the name of a place, without the names of transforms."""
  while (plain := _TRANSFORMS.sub(r'\1', names)) != names:
    names = plain
  parts = [part for part in names.split('/') if part]
  if parts[:1] == [root]:
    del parts[0]
  return '/'.join(
    part for part in parts if part not in _NAMELESS and '->' not in part
  )


def named(
  found: Sequence[Found], sizes: Mapping[str, int]
) -> Iterator[products_lib.Product]:
  """Yields the products with their names.

  Products of two activations are named after their place: the two of attention
  `qk` and `av`. Uses of the same weights are one layer.
  """
  short: dict[str, str] = {}
  leaves = list(dict.fromkeys(one.leaf for one in found if one.leaf))
  taken = {
    parent
    for parent, _, last in (_short(leaf).rpartition('/') for leaf in leaves)
    if last in _OF_LAYER
  }
  for leaf in leaves:
    name = _short(leaf)
    # Two variables of one module: both keep the whole path. So does one beside
    # another whose name is that of an entry of a layer in `arch` or statistics.
    is_taken = name in short.values() or name in taken
    short[leaf] = leaf if is_taken else name
  scopes = [one.scope for one in found if one.product.side is None]
  seen: dict[str, int] = {}
  placed: dict[str, int] = {}
  for one in found:
    product = one.product
    if one.leaf:
      name = layer = short[one.leaf]
      number = seen[name] = seen.get(name, 0) + 1
      if number > 1:
        name = f'{layer}#{number}'
        whole = product.weights * math.prod(product.stack) == sizes[one.leaf]
        layer = layer if whole else name
    else:
      index = placed[one.scope] = placed.get(one.scope, -1) + 1
      pairs = product.side is None and scopes.count(one.scope) % 2 == 0
      name = layer = _of_place(one.scope, index, pairs)
    yield dataclasses.replace(product, path=name, layer=layer)


def _of_place(place: str, index: int, pairs: bool) -> str:
  """Returns the name of the product number `index` of a place."""
  if pairs:
    name, number = ('qk', 'av')[index % 2], index // 2 + 1
  else:
    name, number = 'product', index + 1
  suffix = f'#{number}' if number > 1 else ''
  return f'{place}/{name}{suffix}'.lstrip('/')
