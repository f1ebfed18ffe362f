"""Quantized products: what the search puts in the place of a program's own.

Operands are put on the grids that one-hot vectors select, the product runs on
grid values with float32 sums, and the scales are applied to its result (Eq. 10,
11): the formulas of `layers.quant_layers`.
"""

from collections.abc import Mapping
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fliqs_jax.layers import grids
from fliqs_jax.layers import ratios
from fliqs_jax.numerics import float_ops
from fliqs_jax.numerics import formats
from fliqs_jax.numerics import mixture
from fliqs_jax.numerics import quantize
from fliqs_jax.program import contractions
from fliqs_jax.program import products as products_lib
from fliqs_jax.space import quant_spec

Choices = Mapping[str, quant_spec.Choices]  # {path of a product: its formats}


class Quantized:
  """The rule of the search.

  Each product is given `format` [K], or `weights` and `activations` [K]. Its
  statistics are those of its activations; a product of two activations has
  `activations` and `weights`, statistics of its first and second operand.

  Attributes:
    spec: the rules for thresholds and mixtures.
    choices: the formats of each product.
    learns: whether statistics learn from the operands.
    calibrates: whether strategies find their thresholds in the operands.
    notes: what is noted of each product: `operands`, `inputs` or nothing.
  """

  def __init__(
    self,
    spec: quant_spec.QuantSpec,
    choices: Choices,
    learns: bool = False,
    notes: str = '',
    calibrates: bool = False,
  ):
    self.spec = spec
    self.choices = choices
    self.learns = learns
    self.calibrates = calibrates
    self.notes = notes

  def first_statistics(self, product: products_lib.Product) -> dict[str, Any]:
    """Returns the statistics of a product before the first batch.

    Each array has the axes of the product's stack in front.
    """
    menus = self._menus(product)
    first = {
      side: grids.first_statistics(menu, self._clip(product, side))
      for side, menu in menus.items()
      if menu is not None and _is_activation(product, side)
    }
    if product.side is not None:
      first = first.get('activations', {})
      if product.kind != 'embed' and formats.has_strategies(
        weights := menus['weights'] or ()
      ):
        unknown = np.zeros((len(weights), product.channels), np.float32)
        first = {**first, 'weight_ratio': unknown}
    return jax.tree.map(
      lambda x: np.broadcast_to(x, product.stack + x.shape), first
    )

  def statistics(
    self, product: products_lib.Product, known: Mapping[str, Any]
  ) -> dict[str, Any]:
    """Returns the statistics of a product.

    Args:
      product: the product.
      known: {path in `quant_stats`: array} of all products.

    Raises:
      ValueError: an array is lacking, or has another shape.
    """
    own = {}
    for name, first in products_lib.flattened(
      self.first_statistics(product)
    ).items():
      key = products_lib.join(product.path, name)
      if key not in known:
        raise ValueError(
          f'the variables lack quant_stats/{key}: they are those of another '
          'model or of another call; use those of `init`'
        )
      given, right = np.shape(known[key]), np.shape(first)
      if given != right:
        raise ValueError(
          f'quant_stats/{key} has the shape {list(given)}, but must be '
          f'{list(right)}: it is of other formats; use those of `init`'
        )
      own[name] = known[key]
    return products_lib.nested(own)

  def _clip(self, product: products_lib.Product, side: str) -> str | float:
    """Returns the rule of a threshold: a softmax is never clipped.

    Its few large entries are what matters, and its deviation says nothing about
    them: it is 0 where all are equal, and 0.07 where one of 197 is 1.
    """
    is_softmax = product.sides()[side] in product.softmax
    return 'absmax' if is_softmax else self.spec.first_act_clip

  def __call__(
    self,
    eqn: Any,
    product: products_lib.Product,
    operands: list[Any],
    given: Mapping[str, Any],
    statistics: Mapping[str, Any] | None,
  ) -> tuple[jax.Array, Any, Any]:
    """Returns the float32 product, its statistics, and what is noted of it."""
    if product.kind == 'embed':
      return self._lookup(eqn, product, operands, given)
    contraction = contractions.of(eqn, operands)
    assert contraction is not None
    one = functools.partial(self._product, product, contractions.dtypes(eqn))
    each = contractions.each_slice(contraction, len(product.slices), one)
    return each(operands[:2], given, statistics or {})

  def _product(
    self, product, dtypes, contraction, pair, given, statistics
  ) -> Any:
    sides, menus = product.sides(), self._menus(product)
    x, w = (pair[i].astype(jnp.float32) for i in sides.values())
    values = dict(activations=x, weights=w)
    if self.learns:
      statistics = self._observed(product, values, statistics)
    right = sides['weights']

    def op(x: quantize.Quantized, w: quantize.Quantized) -> jax.Array:
      y = contraction.scaled(
        _cast(x, dtypes[1 - right]), _cast(w, dtypes[right]), right
      )
      if product.side is None:
        return y
      return float_ops.computed_once(y, w.scale)

    if self.calibrates:
      statistics = self._calibrated(
        product, contraction, op, values, statistics
      )
    on_grids = {
      side: self._on_grid(product, contraction, side, value, statistics)
      for side, value in values.items()
    }
    tied = self.choices[product.path].tied
    if (
      self.spec.mix == 'branched'
      and tied
      and self._is_relaxed(menus['weights'])
    ):

      def at(one_hot: jax.Array) -> jax.Array:
        return op(*(on_grid(one_hot) for on_grid in on_grids.values()))

      return mixture.branched(at, given['format']), statistics, None
    chosen = {
      side: self._chosen(
        menus[side], on_grid, given.get('format', given.get(side))
      )
      for side, on_grid in on_grids.items()
    }
    y = op(chosen['activations'], chosen['weights'])
    return y, statistics, self._noted(product, chosen, values)

  def _lookup(self, eqn, product, operands, given) -> Any:
    """Takes rows of a table, of which each row has a scale."""
    table, *others = operands
    w = table.astype(jnp.float32)
    menu = self._menus(product)['weights']
    on_grid = grids.weights(w, menu, self.spec.weight_clip, (1,))
    q = self._chosen(menu, on_grid, given['weights'])
    y = contractions.looked_up(eqn, q, others)
    return y, None, self._noted(product, dict(weights=q), dict(weights=w))

  def _menus(self, product) -> dict[str, quant_spec.Menu | None]:
    choices = self.choices[product.path]
    menus = dict(activations=choices.activations, weights=choices.weights)
    return {side: menus[side] for side in product.sides()}

  def _observed(self, product, values, statistics) -> Any:
    if product.side is not None:
      if 'count' not in statistics:  # Activations are not quantized.
        return statistics
      return grids.observed(statistics, values['activations'])
    return {
      side: grids.observed(own, values[side])
      for side, own in statistics.items()
    }

  def _calibrated(self, product, contraction, op, values, statistics) -> Any:
    """Returns the statistics with the ratios that strategies find."""
    summed = {
      side: tuple(range(x.ndim))
      if _is_activation(product, side)
      else contraction.summed(product.side)
      for side, x in values.items()
    }
    found = ratios.found(
      op,
      values,
      self._menus(product),
      summed,
      contraction.has_examples(1 - product.sides()['weights']),
    )
    statistics = dict(statistics)
    for side, new in found.items():
      if not _is_activation(product, side):
        statistics['weight_ratio'] = new
        continue
      own = statistics if product.side is not None else statistics[side]
      ratio = ratios.of_activations(new, values[side], own['largest'])
      changed = {**own, 'ratio': ratio}
      if product.side is not None:
        statistics = {**statistics, **changed}
      else:
        statistics[side] = changed
    return statistics

  def _on_grid(self, product, contraction, side, x, statistics) -> Any:
    """Returns an operand as a function of its format."""
    menu = self._menus(product)[side]
    if menu is None:
      return lambda one_hot: quantize.unquantized(x)
    if not _is_activation(product, side):
      summed = contraction.summed(product.side)
      return grids.weights(
        x,
        menu,
        self.spec.weight_clip,
        summed,
        ratios=(statistics or {}).get('weight_ratio'),
      )
    own = statistics if product.side is not None else statistics[side]
    return grids.activations(x, menu, own, self.spec.act_threshold)

  def _is_relaxed(self, menu) -> bool:
    return menu is not None and len(menu) > 1 and self.spec.mix != 'sampled'

  def _chosen(self, menu, on_grid, leaf) -> quantize.Quantized:
    if menu is None:
      return on_grid(np.ones(1))
    if self._is_relaxed(menu):
      return mixture.mixed(on_grid, leaf)
    return on_grid(leaf)

  def _noted(self, product, chosen, values) -> Any:
    match self.notes:
      case 'operands':
        noted = {side: q.scale for side, q in chosen.items()}
        if product.side is not None and product.is_stored:
          noted['values'] = chosen['weights'].values
        return noted
      case 'inputs' if 'activations' in values:
        return dict(x=values['activations'])
    return None


def _is_activation(product: products_lib.Product, side: str) -> bool:
  return side == 'activations' or product.side is None


def _cast(q: quantize.Quantized, dtype: Any) -> quantize.Quantized:
  return quantize.Quantized(q.values.astype(dtype), q.scale)
