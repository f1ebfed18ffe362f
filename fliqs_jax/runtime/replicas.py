"""Replicas: the copies of one step that run side by side.

In a `pmap` run every device computes the step on its own part of the batches,
with its own architecture (TuNAS); gradients and metrics are averaged over all.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp


class Replicas(NamedTuple):
  """The three functions of a step that depend on its replicas.

  Attributes:
    key: takes a PRNG key and returns one that no other replica has.
    mean: takes a pytree and averages its inexact leaves over all replicas; the
      other leaves are equal in all of them.
    others: takes an array and returns its mean over the other replicas.
  """

  key: Callable[[jax.Array], jax.Array]
  mean: Callable[[Any], Any]
  others: Callable[[jax.Array], jax.Array]


def _no_others(x: jax.Array) -> jax.Array:
  del x
  raise ValueError(
    'leave_one_out needs at least two replicas; this step has one'
  )


# A step without other replicas: on one device, or one program for many.
ONE = Replicas(key=lambda key: key, mean=lambda tree: tree, others=_no_others)


def along(axis: str) -> Replicas:
  """Returns the replicas along an axis of the mesh, inside `jax.shard_map`.

  Args:
    axis: name of the axis.
  """

  def own_key(key: jax.Array) -> jax.Array:
    return jax.random.fold_in(key, lax.axis_index(axis))

  def mean(tree: Any) -> Any:
    def of(x: jax.Array) -> jax.Array:
      inexact = jnp.issubdtype(x.dtype, jnp.inexact)
      return lax.pmean(x, axis) if inexact else x

    return jax.tree.map(of, tree)

  def others(x: jax.Array) -> jax.Array:
    return (lax.psum(x, axis) - x) / (lax.axis_size(axis) - 1)

  return Replicas(own_key, mean, others)
