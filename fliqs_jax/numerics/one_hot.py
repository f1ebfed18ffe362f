"""One-hot vectors: the number that one picks, and the check that it picks."""

import jax
import jax.numpy as jnp
import numpy as np


def check(
  name: str, one_hot: jax.Array | np.ndarray, size: int, is_mean: bool = False
) -> None:
  """Checks a leaf of `arch`; the values of a traced one are not known.

  Args:
    name: path of the leaf in `arch`, which begins with that of its layer.
    one_hot: [K] entries in [0, 1].
    size: K, the number of options.
    is_mean: whether the leaf may also weigh the options.

  Raises:
    ValueError: it has not one entry for each option, or not exactly one entry
      is above 0.5.
  """
  shape = np.shape(one_hot)
  if shape != (size,):
    raise ValueError(
      f'arch leaf {name} has the shape {list(shape)}, but the layer has {size} '
      f'options, so it must be [{size}]; it is of another model or of other '
      'formats: give space.expand(choices), where space is that of this model'
    )
  if is_mean or isinstance(one_hot, jax.core.Tracer):
    return
  values = np.asarray(one_hot)
  if np.sum(values > 0.5) != 1:
    raise ValueError(
      f'arch leaf {name} is {values.tolist()}, but a layer computes one '
      'choice: exactly one entry must be above 0.5. Give it a one-hot leaf, '
      'for instance that of the argmax'
    )


def pick(one_hot: jax.Array, values: jax.Array) -> jax.Array:
  """Returns those of K positive numbers or arrays at the entry above 0.5.

  A masked sum is exact; a matrix product would round to bfloat16 on TPU.

  Args:
    one_hot: [K] entries in [0, 1].
    values: [K, ...] positive numbers, infinity included.

  Returns:
    [...] float32; NaN if no entry is above 0.5, so that a traced vector that is
    not one-hot shows in every result instead of giving plausible numbers.
  """
  picks = (one_hot > 0.5).reshape(-1, *(1,) * (jnp.ndim(values) - 1))
  return or_nan(jnp.sum(jnp.where(picks, values, 0.0), axis=0))


def or_nan(picked: jax.Array) -> jax.Array:
  """Returns a masked sum of positive numbers, or NaN if it is zero."""
  return jnp.where(picked > 0, picked, jnp.nan)
