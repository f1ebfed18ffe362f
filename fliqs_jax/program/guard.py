"""Comparison of the products at BF16 with those of the original program.

Both compute the same function, up to rounding. A larger difference is a fault
of the transformation, or a product that means something else; it is an error
that names the first product with it, before anything is searched or served.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fliqs_jax.numerics import formats
from fliqs_jax.program import equations
from fliqs_jax.program import products as products_lib
from fliqs_jax.program import quantized
from fliqs_jax.program import rewrite
from fliqs_jax.program import searchable as searchable_lib
from fliqs_jax.runtime import devices
from fliqs_jax.space import quant_spec

# Largest norm of a difference, relative to that of the result. BF16 rounds each
# operand by 2**-9; a product that means something else differs by about its own
# size.
_TOLERANCE = 0.1


def check(
  model: searchable_lib.Searchable,
  variables: Mapping[str, Any],
  *args: Any,
  rngs: Any = None,
  **kwargs: Any,
) -> dict[str, float]:
  """Compares each quantized product at BF16 with the original.

  Each one is computed twice, on the operands of the original program.

  Args:
    model: a model that `searchable` made.
    variables: `params` and the model's other collections.
    *args: example inputs.
    rngs: {name: typed PRNG key []} of a model that draws random numbers.
    **kwargs: keyword arguments of the model's call, static.

  Returns:
    {path of a product: norm of the difference / norm of the result}, in the
    order of the program. Where the terms of a result cancel, its norm is that
    of as many terms of random signs.

  Raises:
    ValueError: a product differs by more than rounding, or is not finite; the
      first is named.
  """
  own = {k: v for k, v in variables.items() if k not in searchable_lib.OWN}
  traced = model.trace(own, args, kwargs, rngs, [])
  products = [part.product for part in traced.parts if not part.reason]

  def compared(operands: list[Any]) -> Any:
    rule, given, statistics = _at_bf16(products)
    run = rewrite.Rewriter(products, rule, every_branch=True)
    return run(traced.program, operands, given, statistics)[2]

  apart = jax.device_get(devices.jit_once(compared)(traced.operands))
  result = {
    product.path: float(np.max(apart[product.path]))
    for product in products
    if product.path in apart
  }
  for path, difference in result.items():
    if np.isnan(difference):
      raise ValueError(
        f'{path or "the model"}: its result is not finite with these variables '
        'and inputs; find the number that is NaN or infinite'
      )
    if difference > _TOLERANCE:
      raise ValueError(
        f'{path or "the model"}: at BF16 its result differs from that of the '
        f'original model by {difference:.2g} of its size, which is more than '
        'rounding; the search would optimise another function. Exclude the '
        'product by quant.exclude, and report the model'
      )
  return result


def _at_bf16(products: list[products_lib.Product]) -> Any:
  """Returns a rule that notes what BF16 changes, its formats and statistics."""
  menu = (formats.BF16,)
  choices = {
    product.path: quant_spec.Choices(menu, menu, tied=True)
    for product in products
  }
  plain = quant_spec.QuantSpec(formats=menu, act_clip=4.0)
  rule = quantized.Quantized(plain, choices)

  def noting(
    eqn: Any,
    product: products_lib.Product,
    operands: list[Any],
    *rest: Any,
  ) -> Any:
    rounded, statistics, _ = rule(eqn, product, operands, *rest)
    same = [
      jnp.asarray(x).astype(v.aval.dtype) for x, v in zip(operands, eqn.invars)
    ]
    (y,) = equations.bind(eqn, same)
    spread = y
    if product.kind != 'embed':  # That one has rows, not sums.
      (squares,) = equations.bind(eqn, [x * x for x in same])
      spread = jnp.sqrt(squares.astype(jnp.float32))
    return y, statistics, _apart(rounded, y, spread)

  given = {
    product.path: dict.fromkeys(
      ('format', 'weights'), jnp.ones((*product.stack, 1))
    )
    for product in products
  }
  statistics = {
    product.path: jax.tree_util.tree_map_with_path(
      # As after the first batch; otherwise nothing is rounded.
      lambda path, x: np.ones_like(x) if path[-1].key == 'count' else x,
      rule.first_statistics(product),
    )
    for product in products
  }
  return noting, given, {k: v for k, v in statistics.items() if v}


def _apart(actual: Any, expected: Any, spread: Any) -> jax.Array:
  norm, difference, noise = (
    jnp.sqrt(jnp.sum(jnp.square(jnp.asarray(x, jnp.float32))))
    for x in (expected, actual - expected.astype(jnp.float32), spread)
  )
  return difference / jnp.maximum(jnp.maximum(norm, noise), 1e-30)
