"""Stored tensors of a program: packed weights, and the scales of its products.

The name of a tensor is `params/PATH/weights` for packed weights of a product,
`scales/PATH/weights` and `scales/PATH/activations` for their scales, and
`variables/PATH` for a variable that the served program reads as it is. Each
iteration of a scan is stored apart, such as `body/dense/@3`.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from fliqs_jax.numerics import formats
from fliqs_jax.numerics import int8_ops
from fliqs_jax.numerics import packing
from fliqs_jax.program import parts as parts_lib
from fliqs_jax.program import products as products_lib
from fliqs_jax.serving import served_products
from fliqs_jax.serving import stored_layers

Assignment = Mapping[str, tuple[str | None, str | None]]
Pair = tuple[formats.NumericFormat | None, formats.NumericFormat | None]

# Sums of int8 products in an int32 accumulator wrap around beyond this bound.
_LARGEST_SUM = 2**31 - 1
# Strategies whose thresholds need no search: none, and the largest magnitude.
_GIVEN = ('', 'max_abs')


@dataclasses.dataclass(frozen=True)
class Stored:
  """The stored products of a model.

  Attributes:
    layers: {path of an iteration: its description}.
    tensors: {name: tensor} of packed weights and scales.
    products: {path of a product: how it is read back}.
  """

  layers: dict[str, stored_layers.Layer]
  tensors: dict[str, np.ndarray]
  products: dict[str, 'Reading']

  def rule(
    self, kind: type[served_products.Served] = served_products.Served
  ) -> served_products.Served:
    """Returns the rule of the served program, of a class of rules."""
    return kind(
      {path: reading.menus for path, reading in self.products.items()},
      frozenset(
        path for path, reading in self.products.items() if reading.in_integers
      ),
    )

  def unpacked(
    self, tensors: Mapping[str, Any], unsigned: bool
  ) -> dict[str, dict[str, Any]]:
    """Returns what the rule gives to each product.

    Args:
      tensors: {name: tensor}, traced or not.
      unsigned: whether products run in the unsigned form of `int8_ops`.
    """
    return {
      path: reading.unpacked(tensors, unsigned)
      for path, reading in self.products.items()
    }


@dataclasses.dataclass(frozen=True)
class Reading:
  """How the operands of one product are read from the stored tensors.

  Attributes:
    stack: lengths of the product's iterations and slices.
    paths: path of each iteration in the names of tensors.
    formats: [iterations] formats of weights and activations.
    shape: shape of the weights of an iteration; None if they are not stored.
    summed: axes of the weights that the product sums over.
    in_integers: whether it runs in int8.
    has_shift: whether the unsigned form can run: weights are on the right.
    owners: path of each iteration of the product whose stored weights it reads:
      the first use of the same weights, or itself.
    transposed: whether it reads them with their axes reversed.
  """

  stack: tuple[int, ...]
  paths: tuple[str, ...]
  formats: tuple[Pair, ...]
  shape: tuple[int, ...] | None
  summed: tuple[int, ...]
  in_integers: bool
  has_shift: bool
  owners: tuple[str, ...]
  transposed: bool = False

  @property
  def menus(self) -> served_products.Menus:
    """The formats of each side, each once."""
    return {
      side: tuple(dict.fromkeys(pair[i] for pair in self.formats if pair[i]))
      for i, side in enumerate(('weights', 'activations'))
    }

  def unpacked(
    self, tensors: Mapping[str, Any], unsigned: bool
  ) -> dict[str, Any]:
    """Returns what the rule of the served program gives to the product."""
    given: dict[str, Any] = {}
    for i, (side, menu) in enumerate(self.menus.items()):
      if not menu:
        continue
      paths = self.owners if side == 'weights' else self.paths
      given[side] = [tensors[_name('scales', path, side)] for path in paths]
      if len(menu) > 1:
        rows = [[f == pair[i] for f in menu] for pair in self.formats]
        given[f'{side}_format'] = list(jnp.asarray(rows, jnp.float32))
    if self.shape is not None and self.menus['weights']:
      values = [
        packing.decode(tensors[_name('params', path, 'weights')], f, self.shape)
        for path, (f, _) in zip(self.owners, self.formats)
      ]
      if self.transposed:
        values = [value.T for value in values]
        given['weights'] = [scale.T for scale in given['weights']]
      if self.in_integers and self.has_shift and unsigned:
        given['shift'] = [int8_ops.offset(v, self.summed) for v in values]
      dtype = jnp.int8 if self.in_integers else jnp.bfloat16
      given['values'] = [jnp.asarray(v, dtype) for v in values]
    return {name: self._together(rows) for name, rows in given.items()}

  def _together(self, values: list[Any]) -> Any:
    if not self.stack:
      return values[0]
    stacked = jnp.stack(values)
    return stacked.reshape((*self.stack, *stacked.shape[1:]))


def stored(
  parts: tuple[parts_lib.Part, ...],
  variables: Mapping[str, Any],
  assignment: Assignment,
  noted: Mapping[str, Any],
) -> Stored:
  """Returns the stored products of a model at one architecture.

  Args:
    parts: the products of the model that are replaced.
    variables: its collections; `arch` holds the architecture.
    assignment: the same architecture as {layer: (weights, activations)}.
    noted: the collection `operands` of a call at that architecture.

  Raises:
    ValueError: activations have a format but were never quantized in training,
      strategies have found no threshold, or weights that have a format cannot
      be stored.
  """
  flat = products_lib.flattened(noted)
  stats = products_lib.flattened(variables.get('quant_stats', {}))
  layers, tensors, products = {}, {}, {}
  first_use: dict[str, tuple[Reading, Rows]] = {}
  for product, _, reason in parts:
    if reason:  # It has no formats.
      products[product.path] = _unstored(product)
      continue
    pairs = _formats(product, assignment)
    own = {
      name: flat[key]
      for name in ('values', 'weights', 'activations')
      if (key := products_lib.join(product.path, name)) in flat
    }
    reading, rows = _reading(product, pairs, own)
    if any(f and f.strategy not in _GIVEN for pair in pairs for f in pair):
      _check_found(product.path, stats)
    if any(pair[1] for pair in pairs):
      scales = _scales(product.path, rows['activations'], stats)
      rows = {**rows, 'activations': scales}
    owner, owned = first_use.setdefault(product.layer, (reading, rows))
    if (shared := _sharing(reading, rows, owner, owned)) is not None:
      reading = shared
    tensors |= _tensors(reading, rows)
    layers |= _layers(reading, rows)
    products[product.path] = reading
  return Stored(layers, tensors, products)


def _unstored(product: products_lib.Product) -> Reading:
  """Returns the reading of a product without formats: nothing is stored."""
  paths = (product.path,)
  return Reading(
    stack=product.stack,
    paths=paths,
    formats=((None, None),),
    shape=None,
    summed=(),
    in_integers=False,
    has_shift=False,
    owners=paths,
  )


def _formats(
  product: products_lib.Product, assignment: Assignment
) -> tuple[Pair, ...]:
  """Returns the formats (weights, activations) of each iteration."""
  pairs = [
    tuple(name and formats.parse(name) for name in assignment[path])
    for path in product.iterations()
  ]
  if product.kind == 'embed':  # Activations are those of the table's head.
    return tuple((weights, None) for weights, _ in pairs)
  return tuple(pairs)


Rows = Mapping[str, np.ndarray]  # {name of an operand: [iterations, ...]}


def _reading(
  product: products_lib.Product, pairs: tuple[Pair, ...], noted: Rows
) -> tuple[Reading, Rows]:
  """Returns how a product is read back, and its operands by iteration."""
  if not product.stack:
    paths = (product.path,)
  else:
    paths = tuple(
      products_lib.join(product.path, f'@{i}') for i in range(len(pairs))
    )
  depth = len(product.stack)
  rows = {
    name: np.reshape(x, (len(paths), *np.shape(x)[depth:]))
    for name, x in noted.items()
  }
  shape, summed = None, ()
  if 'values' in rows:
    shape = rows['values'].shape[1:]
    scale = rows['weights'].shape[1:]
    summed = tuple(i for i, n in enumerate(scale) if n < shape[i])
  reading = Reading(
    stack=product.stack,
    paths=paths,
    formats=pairs,
    shape=shape,
    summed=summed,
    in_integers=False,
    has_shift=product.side == 1,
    owners=paths,
  )
  if product.has_integer_form and shape is not None:
    integers = all(f and f.is_integer for pair in pairs for f in pair)
    largest = [_largest_sum(reading, rows, i) for i in range(len(paths))]
    # A sum that could wrap around stays in floats, as in the search.
    fits = integers and max(largest) <= _LARGEST_SUM
    reading = dataclasses.replace(reading, in_integers=fits)
  return reading, rows


def _largest_sum(reading: Reading, rows: Rows, i: int) -> int:
  """Returns the bound on the partial sums of an iteration, in grid steps."""
  sums = np.abs(rows['values'][i]).sum(reading.summed, dtype=np.float64)
  activations = reading.formats[i][1]
  return int(sums.max() * activations.max_value) if activations else 0


def _sharing(
  reading: Reading, rows: Rows, owner: Reading, owned: Rows
) -> Reading | None:
  """Returns a reading of another product's stored weights, if they are equal.

  A table whose rows are looked up, and which the head multiplies by, is stored
  once.
  """
  if reading is owner or owner.shape is None or reading.shape is None:
    return None
  for transposed in (False, True):
    same = all(
      np.array_equal(_turned(rows[name], transposed), owned[name])
      for name in ('values', 'weights')
    )
    if same:
      return dataclasses.replace(
        reading,
        owners=owner.owners,
        shape=owner.shape,
        transposed=transposed,
      )
  return None


def _turned(x: np.ndarray, transposed: bool) -> np.ndarray:
  """Returns x [iterations, ...], with all other axes reversed if asked to."""
  axes = range(x.ndim - 1, 0, -1)
  return x.transpose((0, *axes)) if transposed else x


def _tensors(reading: Reading, rows: Rows) -> dict[str, np.ndarray]:
  """Returns the tensors of a product that no other product stores."""
  tensors = {}
  for i, (path, (weights, activations)) in enumerate(
    zip(reading.paths, reading.formats)
  ):
    if activations and 'activations' in rows:
      tensors[_name('scales', path, 'activations')] = rows['activations'][i]
    if weights and reading.owners == reading.paths:
      tensors[_name('scales', path, 'weights')] = rows['weights'][i]
      if reading.shape is not None:
        values = packing.encode(rows['values'][i], weights)
        tensors[_name('params', path, 'weights')] = values
  return tensors


def _layers(reading: Reading, rows: Rows) -> dict[str, stored_layers.Layer]:
  """Returns {path of an iteration: its description}."""
  return {
    path: stored_layers.Layer(
      weights,
      activations,
      shape=reading.shape or (),
      largest_sum=_largest_sum(reading, rows, i)
      if reading.in_integers
      else None,
      tensor=_name('params', owner, 'weights')
      if reading.shape is not None and weights
      else '',
    )
    for i, (path, owner, (weights, activations)) in enumerate(
      zip(reading.paths, reading.owners, reading.formats)
    )
  }


def _name(collection: str, path: str, name: str) -> str:
  return products_lib.join(collection, path, name)


def _statistics(path: str, stats: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the statistics of a product, by their whole paths."""
  own = products_lib.join(path, '')
  return {
    name: value
    for name, value in stats.items()
    if not own or name.startswith(f'{own}/')
  }


def _check_found(path: str, stats: Mapping[str, Any]) -> None:
  for name, ratios in _statistics(path, stats).items():
    if name.endswith('ratio') and not np.any(ratios):
      raise ValueError(
        f'the strategies of {path or "the model"} have found no thresholds: in '
        'a loop of your own, call `search.calibration.strategy_step`, and once '
        'more for the found network'
      )


def _scales(
  path: str, scales: np.ndarray, stats: Mapping[str, Any]
) -> np.ndarray:
  """Returns the scales [iterations, ...] of a product's activations.

  That of an iteration which no batch ran is NaN: it is of a branch that the
  iteration never takes. Should it take it one day, the result is NaN, too.

  Raises:
    ValueError: no iteration has a scale yet.
  """
  marks = [
    np.asarray(value, bool)
    for name, value in _statistics(path, stats).items()
    if name.endswith(('active', 'count'))
  ]
  seen = np.logical_and.reduce(marks)
  if not seen.any():
    raise ValueError(
      f'the activations of {path or "the model"} were never quantized in this '
      'run, so they have no scale to export; train beyond quant.act_start, '
      'with inputs that reach it if it is in a branch, or exclude it'
    )
  is_seen = seen.reshape((len(scales), *[1] * (scales.ndim - 1)))
  return np.where(is_seen, scales, np.float32(np.nan))
