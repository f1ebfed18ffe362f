"""Comparison of the program with all products at BF16 with the original.

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

# Largest norm of a difference, relative to that of the result. BF16 rounds by
# 2**-9, and the errors of many layers add up; a product that means something
# else differs by about its own size.
_TOLERANCE = 0.1


def check(
  model: searchable_lib.Searchable,
  variables: Mapping[str, Any],
  *args: Any,
  rngs: Any = None,
  **kwargs: Any,
) -> dict[str, float]:
  """Compares the program with all products at BF16 with the original.

  Args:
    model: a model that `searchable` made.
    variables: `params` and the model's other collections.
    *args: example inputs.
    rngs: {name: typed PRNG key []} of a model that draws random numbers.
    **kwargs: keyword arguments of the model's call, static.

  Returns:
    {path of a product: norm of the difference / norm of the result}, in the
    order of the program.

  Raises:
    ValueError: a product differs by more than rounding; the first is named.
  """
  own = {k: v for k, v in variables.items() if k not in searchable_lib.OWN}
  traced = model.trace(own, args, kwargs, rngs, [])
  parts = [part for part in traced.parts if not part.product.reason]
  products = [part.product for part in parts]

  def both(operands: list[Any]) -> Any:
    run = rewrite.Rewriter(products, _original, every_branch=True)
    nothing = {product.path: {} for product in products}
    expected = run(traced.program, operands, nothing, {})[2]
    rule, given, statistics = _at_bf16(products)
    run = rewrite.Rewriter(products, rule, every_branch=True)
    actual = run(traced.program, operands, given, statistics)[2]
    return {path: _apart(actual[path], expected[path]) for path in expected}

  apart = jax.device_get(devices.jit_once(both)(traced.operands))
  result = {
    product.path: float(np.max(apart[product.path]))
    for product in products
    if product.path in apart
  }
  for path, difference in result.items():
    if not difference <= _TOLERANCE:
      raise ValueError(
        f'{path or "the model"}: with every product at BF16 its result differs '
        f'from that of the original model by {difference:.2g} of its size, '
        'which is more than rounding; the search would optimise another '
        'function. Exclude the product by quant.exclude, and report the model'
      )
  return result


def _original(
  eqn: Any,
  product: products_lib.Product,
  operands: list[Any],
  given: Any,
  statistics: Any,
) -> tuple[Any, None, Any]:
  """The rule that changes nothing, and notes the result."""
  del product, given, statistics
  same = [
    jnp.asarray(x).astype(v.aval.dtype) for x, v in zip(operands, eqn.invars)
  ]
  (y,) = equations.bind(eqn, same)
  return y, None, y


def _at_bf16(products: list[products_lib.Product]) -> Any:
  """Returns a rule with every product at BF16, its formats and statistics."""
  menu = (formats.BF16,)
  choices = {
    product.path: quant_spec.Choices(menu, menu, tied=True)
    for product in products
  }
  plain = quant_spec.QuantSpec(formats=menu, act_clip=4.0)
  rule = quantized.Quantized(plain, choices)

  def noting(eqn: Any, product: products_lib.Product, *rest: Any) -> Any:
    y, statistics, _ = rule(eqn, product, *rest)
    return y, statistics, y

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


def _apart(actual: Any, expected: Any) -> jax.Array:
  actual, expected = (jnp.asarray(x, jnp.float32) for x in (actual, expected))
  size = jnp.linalg.norm(expected.reshape(-1))
  return jnp.linalg.norm((actual - expected).reshape(-1)) / jnp.maximum(
    size, 1e-30
  )
