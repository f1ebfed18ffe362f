"""Thresholds that strategies find in the operands of a product.

They are stored among the statistics, as ratios of the largest magnitudes, and
found by calls in which the collection `calibration` may change: then each
layer, in the order of the program, finds its own in the call's input, which the
layers before have quantized with theirs.
"""

from collections.abc import Mapping, Sequence
import functools
import math
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from fliqs_jax.numerics import explicit_axes
from fliqs_jax.numerics import formats
from fliqs_jax.numerics import quantize
from fliqs_jax.numerics import strategies

# Of the keyword `mutable` of `apply`; it never holds anything.
COLLECTION = 'calibration'

Menu = Sequence[formats.NumericFormat]


def of_activations(found: jax.Array, x: jax.Array, largest: Any) -> jax.Array:
  """Returns ratios [K] of a running largest magnitude.

  Args:
    found: [K, 1] ratios of the largest magnitude of x.
    x: [...] the activations in which they were found.
    largest: [] running mean of the largest magnitudes.
  """
  peak = jnp.max(jnp.abs(x))
  known = (peak > 0) & (largest > 0)
  return found[:, 0] * jnp.where(known, peak / largest, 1.0)


def found(
  product: strategies.Product,
  operands: Mapping[str, jax.Array],
  menus: Mapping[str, Menu | None],
  axes: Mapping[str, tuple[int, ...]],
  has_examples: bool,
) -> dict[str, jax.Array]:
  """Returns the ratios of those menus that have strategies.

  Args:
    product: (activations, weights) -> scaled output; linear in each.
    operands: {`activations` and `weights`: [...]}; unquantized, or quantized by
      the layers before.
    menus: {side: [K] formats, or None if it is not quantized}.
    axes: {side: axes that share a scale}. If all do, the scale is [].
    has_examples: whether the first axis of activations and output are examples.

  Returns:
    {side: [K, number of scales] ratios of the largest magnitudes}, 1 for
    formats without a strategy.
  """
  sides = {
    side: _Side(side, explicit_axes.whole(x), axes[side])
    for side, x in operands.items()
  }
  directions = _directions(product, sides, menus, has_examples)

  def all_ratios(side: _Side, menu: Menu) -> jax.Array:
    fitted = side.admm([o for o in menu if o.strategy == 'admm'])

    def ratio(option: formats.NumericFormat) -> jax.Array:
      match option.strategy:
        case 'kl':
          found = side.kl(option.grid_format)
        case 'admm':
          found = fitted[option]
        case 'eq':
          found = directions[option.grid_format][side.name]
        case _:
          found = jnp.ones_like(side.peak)
      return found.reshape(-1)

    return lax.stop_gradient(jnp.stack([ratio(option) for option in menu]))

  return {
    side.name: all_ratios(side, menu)
    for side in sides.values()
    if formats.has_strategies(menu := menus[side.name] or ())
  }


def _directions(
  product: strategies.Product,
  sides: Mapping[str, '_Side'],
  menus: Mapping[str, Menu | None],
  has_examples: bool,
) -> dict[formats.NumericFormat, dict[str, jax.Array]]:
  """Returns {format: {side: ratios}} of `eq`, of each format that has it."""
  grid_formats = list(
    dict.fromkeys(
      option.grid_format
      for menu in menus.values()
      for option in menu or ()
      if option.strategy == 'eq'
    )
  )
  if not grid_formats:
    return {}
  x, w = sides['activations'], sides['weights']

  def of_grid(given: tuple[quantize.Grid, jax.Array]) -> Any:
    grid, start = given
    on_grids = tuple(
      side.on_grid(grid if menus[side.name] else None) for side in (x, w)
    )
    starts = (start, jnp.ones_like(w.peak))
    return strategies.eq(
      product, x.values, w.values, on_grids, starts, has_examples
    )

  starts = jnp.stack([x.start(f) for f in grid_formats])
  # A loop, so that the product is compiled once for all formats.
  found = lax.map(of_grid, (quantize.grids_of(grid_formats), starts))
  return {
    grid_format: dict(
      zip(('activations', 'weights'), (ratios[i] for ratios in found))
    )
    for i, grid_format in enumerate(grid_formats)
  }


class _Side:
  """One operand of a product.

  Attributes:
    name: `activations` or `weights`.
    values: [...] its values.
    axes: the axes that share a scale.
    peak: largest magnitude of each scale, of the shape of the scale.
  """

  def __init__(self, name: str, values: jax.Array, axes: tuple[int, ...]):
    self.name, self.values, self.axes = name, values, axes
    is_one = len(axes) == values.ndim
    self.peak = jnp.max(jnp.abs(values), axis=axes, keepdims=not is_one)
    self._kl: dict[formats.NumericFormat, jax.Array] = {}  # `eq` starts there.

  def on_grid(self, grid: quantize.Grid | None) -> strategies.OnGrid:
    """Returns the operand as a function of its ratios; None: unquantized."""
    if grid is None:
      unscaled = quantize.Quantized(self.values, jnp.ones_like(self.peak))
      return lambda ratios: unscaled
    return lambda ratios: quantize.quantize(
      self.values, grid, ratios * self.peak
    )

  def start(self, grid_format: formats.NumericFormat) -> jax.Array:
    """Returns the ratio from which `eq` starts (MNN, ncnn: that of `kl`)."""
    if not grid_format.is_integer:
      return jnp.ones_like(self.peak)
    return self.kl(grid_format)

  def kl(self, grid_format: formats.NumericFormat) -> jax.Array:
    """Returns the ratio of `kl` of each scale."""
    if grid_format not in self._kl:
      others = [i for i in range(self.values.ndim) if i not in self.axes]
      size = math.prod(self.values.shape[i] for i in self.axes)
      rows = jnp.transpose(self.values, (*others, *self.axes))
      of_row = functools.partial(strategies.kl, numeric_format=grid_format)
      found = (
        jnp.ones_like(self.peak)
        if size < strategies.LEAST_VALUES
        else lax.map(of_row, rows.reshape(-1, size), batch_size=8)
      )
      self._kl[grid_format] = found.reshape(self.peak.shape)
    return self._kl[grid_format]

  def admm(self, menu: Menu) -> dict[formats.NumericFormat, jax.Array]:
    """Returns the ratios of `admm` of each scale, for each format."""
    if not menu:
      return {}
    start = (
      strategies.WEIGHTS_START
      if self.name == 'weights'
      else strategies.ACTIVATIONS_START
    )
    fitted = lax.map(
      lambda grid: strategies.admm(self.values, grid, self.axes, start),
      quantize.grids_of(menu),
    )
    return {
      option: ratios.reshape(self.peak.shape)
      for option, ratios in zip(menu, fitted)
    }
