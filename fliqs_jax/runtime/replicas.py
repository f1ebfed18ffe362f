"""Replicas: the copies of one step that run side by side.

In a `pmap` run every device takes the step on its own part of the batches, with
an architecture of its own (TuNAS); what is learnt is the mean over all of them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp


class Replicas(NamedTuple):
  """What a step asks about its copies.

  Attributes:
    key: PRNG key -> one that no other replica has.
    mean: pytree -> the same with inexact leaves averaged over all replicas;
      the others are the same in all of them.
    others: array -> its mean over the other replicas.
  """

  key: Callable
  mean: Callable
  others: Callable


def _nobody(x):
  raise ValueError(
    'leave_one_out needs at least two replicas; this step has one'
  )


# A step that stands for itself, on one device or as one program over many.
ONE = Replicas(key=lambda key: key, mean=lambda tree: tree, others=_nobody)


def along(axis: str) -> Replicas:
  """Returns the replicas along an axis of the mesh, inside `jax.shard_map`."""

  def key(key):
    return jax.random.fold_in(key, lax.axis_index(axis))

  def mean(tree: Any) -> Any:
    def of(x):
      inexact = jnp.issubdtype(x.dtype, jnp.inexact)
      return lax.pmean(x, axis) if inexact else x

    return jax.tree.map(of, tree)

  def others(x: jax.Array) -> jax.Array:
    return (lax.psum(x, axis) - x) / (lax.axis_size(axis) - 1)

  return Replicas(key, mean, others)
