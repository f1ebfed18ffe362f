"""Optimizers of the weights, as the networks' own recipes mean them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

# (learning rate, momentum, weight decay) -> optimizer.
Maker = Callable[[optax.Schedule, float, float], optax.GradientTransformation]


def _sgd(
  learning_rate: optax.Schedule, momentum: float, weight_decay: float
) -> optax.GradientTransformation:
  return _decayed(weight_decay, optax.sgd(learning_rate, momentum=momentum))


def _rmsprop(
  learning_rate: optax.Schedule, momentum: float, weight_decay: float
) -> optax.GradientTransformation:
  descent = optax.rmsprop(
    learning_rate, decay=0.9, eps=1e-3, initial_scale=1.0, momentum=momentum
  )
  return _decayed(weight_decay, descent)


def _adamw(
  learning_rate: optax.Schedule, momentum: float, weight_decay: float
) -> optax.GradientTransformation:
  return optax.adamw(
    learning_rate, b1=momentum, weight_decay=weight_decay, mask=_kernels
  )


def _decayed(
  weight_decay: float, descent: optax.GradientTransformation
) -> optax.GradientTransformation:
  decay = optax.add_decayed_weights(weight_decay, mask=_kernels)
  return optax.chain(decay, descent)


# The names of `optimizer.name`. Another optimizer is another row.
OPTIMIZERS: dict[str, Maker] = {
  'sgd': _sgd,
  'rmsprop': _rmsprop,
  'adamw': _adamw,
}


def make(
  name: str, learning_rate: optax.Schedule, momentum: float, weight_decay: float
) -> optax.GradientTransformation:
  """Returns an optimizer; only kernels decay, biases and norms do not.

  Args:
    name: `sgd`, with heavy-ball momentum; `rmsprop`, TensorFlow's, as
      EfficientNet's code calls it: decay 0.9, the mean of squares starts at 1,
      epsilon 1e-3 inside the root, momentum of the scaled steps; `adamw`, b2
      0.999, whose weight decay is apart from the gradient; or another key of
      `OPTIMIZERS`.
    learning_rate: step -> learning rate.
    momentum: momentum; of `adamw` b1.
    weight_decay: weight decay; `sgd` and `rmsprop` add it to the gradient.

  Raises:
    ValueError: unknown name.
  """
  if name not in OPTIMIZERS:
    raise ValueError(
      f'optimizer.name={name!r} is unknown; allowed: {", ".join(OPTIMIZERS)}'
    )
  return OPTIMIZERS[name](learning_rate, momentum, weight_decay)


def averaged(average: Any, params: Any, decay: float, step: Any) -> Any:
  """Returns the running mean of the weights with those of one step in it.

  Args:
    average: tree of the mean so far; at the start the parameters themselves.
    params: tree of the parameters after the step.
    decay: decay of the mean in the long run, in [0, 1).
    step: [] steps before this one; early on the mean forgets faster, with
      (1 + step) / (10 + step), as TensorFlow's moving average with its number
      of updates does.
  """
  warmed = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
  return optax.incremental_update(params, average, 1 - warmed)


def _kernels(params: Any) -> Any:
  return jax.tree.map(lambda p: p.ndim > 1, params)
