"""Tensors on a mesh of explicit axes, whose types say how they are sharded.

`jax.make_mesh` makes such axes. JAX reshapes and cuts few tensors there.
"""

import jax
import jax.numpy as jnp


def is_split(x: jax.Array) -> bool:
  """Returns whether the type of a tensor says how its axes are sharded."""
  return any(jax.typeof(x).sharding.spec)


def first(x: jax.Array) -> jax.Array:
  """Returns the first value of `x` [...], [].

  JAX cuts no single entry out of an axis that is split, so there the others are
  masked: x + 0 is x.
  """
  if not is_split(x):
    return x[(0,) * x.ndim]
  while x.ndim:
    is_first = jnp.arange(len(x)) == 0
    x = jnp.where(is_first.reshape(-1, *(1,) * (x.ndim - 1)), x, 0.0).sum(
      axis=0
    )
  return x


def whole(x: jax.Array) -> jax.Array:
  """Returns `x` [...], whole on each device.

  So it may be reshaped and sorted; for what happens now and then.
  """
  return jax.reshard(x, jax.sharding.PartitionSpec()) if is_split(x) else x
