"""Products of a served program: stored weights and rounded activations.

If weights and activations are both integers, a product runs in int8 with int32
accumulators; otherwise it runs on grid values in float32, as in the search.
"""

from collections.abc import Mapping, Sequence
import functools
from typing import Any

import jax
import jax.numpy as jnp

from fliqs_jax.numerics import float_ops
from fliqs_jax.numerics import formats
from fliqs_jax.numerics import int8_ops
from fliqs_jax.numerics import quantize
from fliqs_jax.program import contractions
from fliqs_jax.program import products as products_lib

# {side: formats of the iterations, each once}; empty if it is not quantized.
Menus = Mapping[str, Sequence[formats.NumericFormat]]


class Served:
  """The rule of a served program.

  Each product is given, with the axes of its stack in front: `values` [...] of
  its weights, int8 or bfloat16, if they are stored; `weights` and
  `activations`, the scales of quantized sides; `weights_format` and
  `activations_format`, one-hot vectors, where iterations have different
  formats; and `shift`, what the unsigned form of `int8_ops` subtracts.

  Attributes:
    menus: {path of a product: its formats}.
    in_integers: paths of the products that run in int8.
  """

  def __init__(self, menus: Mapping[str, Menus], in_integers: frozenset[str]):
    self.menus = menus
    self.in_integers = in_integers

  def __call__(
    self,
    eqn: Any,
    product: products_lib.Product,
    operands: list[Any],
    given: Mapping[str, Any],
    statistics: Any,
  ) -> tuple[jax.Array, None, None]:
    """Returns the float32 product; nothing is learnt or noted."""
    del statistics
    if product.kind == 'embed':
      table, *others = operands
      q = self._operand(product, 'weights', table, given)
      return contractions.looked_up(eqn, q, others), None, None
    contraction = contractions.of(eqn, operands)
    assert contraction is not None
    one = functools.partial(self._product, product, contractions.dtypes(eqn))
    each = contractions.each_slice(contraction, len(product.slices), one)
    return each(operands[:2], given), None, None

  def _product(self, product, dtypes, contraction, pair, given) -> jax.Array:
    sides = product.sides()
    right = sides['weights']
    x, w = (
      self._operand(product, side, pair[i], given) for side, i in sides.items()
    )
    if product.path in self.in_integers:
      operands = [x.values, w.values]
      if not right:
        operands.reverse()
      y = contraction.integers(*operands, given.get('shift'))
      y = contraction.rescaled(y, x, w, right)
    else:
      x, w = (
        quantize.Quantized(q.values.astype(dtypes[i]), q.scale)
        for q, i in zip((x, w), sides.values())
      )
      y = contraction.scaled(x, w, right)
    if product.side is None:
      return y
    return float_ops.computed_once(y, w.scale)

  def _operand(self, product, side, x, given) -> quantize.Quantized:
    """Returns an operand on its grid."""
    menu = self.menus[product.path].get(side, ())
    if side == 'weights' and 'values' in given:
      scale = given.get('weights', jnp.ones((), jnp.float32))
      return quantize.Quantized(given['values'], scale)
    x = x.astype(jnp.float32)
    if not menu:
      return quantize.unquantized(x)
    scale = given[side]
    if len(menu) == 1:
      grid = quantize.grid_of(menu[0])
    else:
      grid = quantize.select(menu, given[f'{side}_format'])
    x = x * (1.0 / scale)
    if product.path in self.in_integers:
      # Equals `round_to_grid`, since all steps of the grid are 1.
      x = self._integers(jnp.clip(x, -grid.max_value, grid.max_value))
    else:
      x = self._rounded(x, grid)
    return quantize.Quantized(x, scale)

  def shared(self, x: jax.Array) -> jax.Array:
    """Returns a value that a product and another equation read."""
    return float_ops.written_once(x)

  def _integers(self, x: jax.Array) -> jax.Array:
    """Returns clipped x on a grid of integers."""
    return int8_ops.rounded(x)

  def _rounded(self, x: jax.Array, grid: quantize.Grid) -> jax.Array:
    """Returns x on a grid of floats."""
    return quantize.round_to_grid(x, grid)
