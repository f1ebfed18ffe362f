"""The steps of scanned layers apart, as they are stored, and together again.

A layer tells what it multiplies, and finds what is stored of it, in `params`,
which every transform takes along; see `carried`.
"""

from collections.abc import Iterator, Mapping, Sequence
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fliqs_jax.intercept import carried_variables


def told(variables: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the variables with what the layers told in `operands`.

  There each layer has tuples of one, as `sow` makes them; a stacked one has
  them for each step, `@0`, `@1`, ..., and `lead`, an array of which only the
  shape counts: `carried.PAD`, with the steps where the transform stacks them.

  Args:
    variables: as the intercepted model leaves them, `params` among them.

  Raises:
    ValueError: a transform stacks along an axis that cannot be followed.
  """
  params, found = carried_variables.without(
    variables['params'], carried_variables.TOLD
  )
  operands: dict[str, Any] = {}
  for owner, tree in found.items():
    for parts, layer in _layers(tree):
      path = (*owner, *parts)
      lead = carried_variables.lead(path, layer.pop(carried_variables.LAYOUT))
      if lead == carried_variables.PAD:
        steps = {
          (): {k: (carried_variables.unpad(x),) for k, x in layer.items()}
        }
      else:
        rows = {
          k: jnp.reshape(x, (-1, *x.shape[len(lead) :]))
          for k, x in layer.items()
        }
        steps = {
          (f'@{i}',): {k: (x[i],) for k, x in rows.items()}
          for i in range(math.prod(lead))
        }
        steps[()] = dict(lead=(jnp.zeros(lead),))
      for step, values in steps.items():
        for key, value in values.items():
          operands = carried_variables.with_entry(
            operands, (*path, *step), key, value
          )
  return {**variables, 'params': params, 'operands': operands}


def _layers(tree, parts=()) -> Iterator[tuple[tuple[str, ...], dict]]:
  if carried_variables.LAYOUT in tree:
    yield parts, dict(tree)
  else:
    for key, value in tree.items():
      yield from _layers(value, (*parts, key))


def together(steps: Sequence[jax.Array], lead: Sequence[int]) -> jax.Array:
  """Returns one variable of all steps, as it travels in `params`."""
  return jnp.reshape(jnp.stack(steps), (*lead, *jnp.shape(steps[0])))


def parameter(
  steps: Sequence[jax.Array], lead: Sequence[int], shape: Sequence[int]
) -> jax.Array:
  """Returns a parameter of the model's author, of all steps.

  Args:
    steps: each in the shape of one step.
    lead: where the transform stacks them.
    shape: of the parameter.
  """
  step = jnp.shape(steps[0])
  axes = [i for i, n in enumerate(lead) if n > 1]
  # Stacks of one step do not show in `lead`, but in the shape.
  ones = [i for i, n in enumerate(shape) if n == 1]
  number = len(shape) - len(step) - len(axes)
  axes += next(
    found
    for found in itertools.combinations(ones, number)
    if step == tuple(np.delete(shape, (*axes, *found)))
  )
  stacked = jnp.reshape(jnp.stack(steps), (*(shape[i] for i in axes), *step))
  return jnp.moveaxis(stacked, range(len(axes)), axes)
