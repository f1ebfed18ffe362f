"""Iterations of scanned layers: taken apart to be stored, stacked to be run.

A scanned layer records its operands in `params`, and reads its stored tensors
there, because every transform passes `params` on; see `carried_variables`.
"""

from collections.abc import Iterator, Mapping, Sequence
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fliqs_jax.intercept import carried_variables


def with_operands(variables: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the variables with the collection `operands`, out of `params`.

  There each layer has tuples of one array, as `sow` makes them. A stacked layer
  has them for each iteration, `@0`, `@1`, ..., and `leading_shape`: zeros of
  the shape that `carried_variables.leading_shape` returns.

  Args:
    variables: collections in the intercepted model's form, with `params`.

  Raises:
    ValueError: a transform stacks behind the axes of `carried_variables.PAD`.
  """
  params, recorded = carried_variables.without(
    variables['params'], carried_variables.OPERANDS
  )
  operands: dict[str, Any] = {}
  for owner, tree in recorded.items():
    for parts, layer in _layers(tree):
      path = (*owner, *parts)
      shape = carried_variables.leading_shape(
        path, layer.pop(carried_variables.LAYOUT)
      )
      for name, values in _iterations(layer, shape).items():
        for key, value in values.items():
          operands = carried_variables.with_entry(
            operands, (*path, *name), key, value
          )
  return {**variables, 'params': params, 'operands': operands}


def _iterations(layer, leading_shape) -> dict[tuple[str, ...], dict[str, Any]]:
  """Returns {('@i',): operands of iteration i}; {(): ...} if not stacked."""
  if leading_shape == carried_variables.PAD:
    return {(): {k: (carried_variables.unpad(x),) for k, x in layer.items()}}
  rows = {
    k: jnp.reshape(x, (-1, *x.shape[len(leading_shape) :]))
    for k, x in layer.items()
  }
  iterations: dict[tuple[str, ...], dict[str, Any]] = {
    (f'@{i}',): {k: (x[i],) for k, x in rows.items()}
    for i in range(math.prod(leading_shape))
  }
  iterations[()] = dict(leading_shape=(jnp.zeros(leading_shape),))
  return iterations


def _layers(tree, parts=()) -> Iterator[tuple[tuple[str, ...], dict]]:
  if carried_variables.LAYOUT in tree:
    yield parts, dict(tree)
  else:
    for key, value in tree.items():
      yield from _layers(value, (*parts, key))


def together(
  iterations: Sequence[jax.Array], leading_shape: Sequence[int]
) -> jax.Array:
  """Returns a carried variable of all iterations, [*leading_shape, ...]."""
  shape = jnp.shape(iterations[0])
  return jnp.reshape(jnp.stack(iterations), (*leading_shape, *shape))


def parameter(
  iterations: Sequence[jax.Array],
  leading_shape: Sequence[int],
  shape: Sequence[int],
) -> jax.Array:
  """Returns a parameter of the model itself, stacked from its iterations.

  Args:
    iterations: the parameter in each iteration, arrays of one shape.
    leading_shape: leading shape of the layer's carried variables, which shows
      along which axes the transform stacks.
    shape: shape of the stacked parameter.
  """
  single = jnp.shape(iterations[0])
  axes = [i for i, n in enumerate(leading_shape) if n > 1]
  # A stack of one iteration shows in `shape` only.
  ones = [i for i, n in enumerate(shape) if n == 1]
  number = len(shape) - len(single) - len(axes)
  axes += next(
    chosen
    for chosen in itertools.combinations(ones, number)
    if single == tuple(np.delete(shape, (*axes, *chosen)))
  )
  stacked = jnp.reshape(
    jnp.stack(iterations), (*(shape[i] for i in axes), *single)
  )
  return jnp.moveaxis(stacked, range(len(axes)), axes)
