"""Optimizers of the weights, as the networks' own recipes mean them."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

NAMES = ('sgd', 'rmsprop', 'adamw')


def make(
  name: str, learning_rate: optax.Schedule, momentum: float, weight_decay: float
) -> optax.GradientTransformation:
  """Returns an optimizer; kernels alone decay, no biases and no norms.

  Args:
    name: `sgd`, with heavy-ball momentum; `rmsprop`, TensorFlow's as
      EfficientNet's code calls it: decay 0.9, the square's mean starts at 1,
      epsilon 1e-3 inside the root, momentum of the scaled steps; or `adamw`,
      b2 0.999, whose weight decay is apart from the gradient.
    learning_rate: as a function of the step.
    momentum: of `adamw`, b1.
    weight_decay: of `sgd` and `rmsprop` it is added to the gradient.

  Raises:
    ValueError: for another name.
  """
  if name == 'adamw':
    return optax.adamw(
      learning_rate, b1=momentum, weight_decay=weight_decay, mask=_kernels
    )
  if name == 'sgd':
    descent = optax.sgd(learning_rate, momentum=momentum)
  elif name == 'rmsprop':
    descent = optax.rmsprop(
      learning_rate, decay=0.9, eps=1e-3, initial_scale=1.0, momentum=momentum
    )
  else:
    raise ValueError(
      f'optimizer.name={name!r} is unknown; allowed: {", ".join(NAMES)}'
    )
  return optax.chain(
    optax.add_decayed_weights(weight_decay, mask=_kernels), descent
  )


def averaged(average: Any, params: Any, decay: float, step: Any) -> Any:
  """Returns the running mean of the weights with those of one step in it.

  Args:
    average: tree of the mean so far; the parameters, at the start.
    params: the parameters after the step.
    decay: of the mean in the long run.
    step: [] steps before this one; early on the mean forgets faster, with
      (1 + step) / (10 + step), as TensorFlow's moving average with its number
      of updates does.
  """
  decay = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
  return optax.incremental_update(params, average, 1 - decay)


def _kernels(params):
  return jax.tree.map(lambda p: p.ndim > 1, params)
