"""Optimizers of the weights, as the networks' own recipes define them."""

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
    name: `sgd`, with heavy-ball momentum; `rmsprop`, TensorFlow's as in
      EfficientNet's code (decay 0.9, a mean of squares that starts at 1,
      epsilon 1e-3 inside the root, momentum of the scaled updates); `adamw`,
      with b2 0.999 and a weight decay that is not part of the gradient; or
      another key of `OPTIMIZERS`.
    learning_rate: step -> learning rate.
    momentum: momentum, in [0, 1); for `adamw` it is b1.
    weight_decay: weight decay; `sgd` and `rmsprop` add it to the gradient.

  Raises:
    ValueError: the name is unknown.
  """
  if name not in OPTIMIZERS:
    raise ValueError(
      f'optimizer.name={name!r} is unknown; allowed: {", ".join(OPTIMIZERS)}'
    )
  return OPTIMIZERS[name](learning_rate, momentum, weight_decay)


def updated(
  optimizer: optax.GradientTransformation,
  gradients: Any,
  opt_state: optax.OptState,
  params: Any,
  value: jax.Array,
) -> tuple[Any, optax.OptState]:
  """Returns the parameters and the optimizer's state after a step.

  Args:
    optimizer: any optimizer that needs no more than these.
    gradients: tree of gradients.
    opt_state: the optimizer's state.
    params: tree of parameters.
    value: [] the training loss, for those that adapt to it.

  Raises:
    ValueError: the optimizer needs more, as line searches do.
  """
  update = optax.with_extra_args_support(optimizer).update
  try:
    updates, opt_state = update(gradients, opt_state, params, value=value)
  except TypeError as error:
    if 'required keyword-only argument' not in str(error):
      raise
    raise ValueError(
      'the optimizer needs more than gradients, parameters and the loss, which '
      f'are all that a step gives it: {error}; use one without a line search'
    ) from error
  return optax.apply_updates(params, updates), opt_state


def averaged(average: Any, params: Any, decay: float, step: Any) -> Any:
  """Returns the running mean of the weights after one more step.

  The decay of early steps is (1 + step) / (10 + step), as in TensorFlow's
  moving average with a number of updates.

  Args:
    average: tree of the mean before the step; at first, of the parameters.
    params: tree of the parameters after the step.
    decay: largest decay of the mean, in [0, 1).
    step: [] number of steps before this one.
  """
  warmed = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
  new = jax.tree.map(lambda p, mean: p.astype(mean.dtype), params, average)
  return optax.incremental_update(new, average, 1 - warmed)


def _kernels(params: Any) -> Any:
  return jax.tree.map(lambda p: p.ndim > 1, params)
