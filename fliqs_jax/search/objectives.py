"""Objectives of a step: the loss of the weights, the quality of the policy.

Both are functions of the task or of the user; what they return is checked when
a step is traced.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Batch = Mapping[str, jax.Array]
Metrics = dict[str, jax.Array]
Loss = Callable[[Any, Batch], tuple[jax.Array, Metrics]]
Quality = Callable[[Any, Batch], jax.Array]


def loss_of(
  loss: Loss, outputs: Any, batch: Batch
) -> tuple[jax.Array, Metrics]:
  """Returns the loss [] of a model's outputs, and metrics {name: array}.

  Raises:
    ValueError: the function returns something else.
  """
  result = loss(outputs, batch)
  match result:
    case (value, Mapping() as metrics):
      return _scalar('loss', value), dict(metrics)
  raise ValueError(
    'loss(outputs, batch) must return the loss and a dict of metrics, such as '
    f'(loss, dict(loss=loss)) or (loss, {{}}); it returned {_type(result)}'
  )


def quality_of(quality: Quality, outputs: Any, batch: Batch) -> jax.Array:
  """Returns the quality [] of a model's outputs.

  Raises:
    ValueError: the function returns something else.
  """
  return _scalar('quality', quality(outputs, batch))


def _scalar(name: str, value: Any) -> jax.Array:
  is_array = isinstance(value, (jax.Array, np.ndarray, np.number, float, int))
  if not is_array or np.shape(value):
    raise ValueError(
      f'{name}(outputs, batch) must be one number, the mean over the examples; '
      f'it is {_type(value)}'
    )
  return jnp.asarray(value)


def _type(value: Any) -> str:
  """Describes a value: an array by its type and shape."""
  if isinstance(value, jax.Array):
    return str(jax.typeof(value))
  if isinstance(value, tuple):
    return f'({", ".join(map(_type, value))})'
  return type(value).__name__
