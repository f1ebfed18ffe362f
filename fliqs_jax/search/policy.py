"""Softmax policies over trees of decisions (Eq. 2, 6).

A policy is a tree of [K] logits, an architecture the same tree of [K] one-hots.
The tree may be a dict of decisions or a model's `arch` collection. `stack`
makes one array of all decisions with K options, so that a program hardly grows
with their number; all functions but `sample` take a stacked tree, too.
"""

import dataclasses
import functools
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

from fliqs_jax.numerics import float_ops

# A logit so far above zeros that the others have e^-20 of its probability.
_CERTAIN = 20.0


@struct.dataclass
class Stacked:
  """A tree of decisions as a few arrays.

  Attributes:
    arrays: {K: [..., D, K]}, the leaves [..., K] of D decisions.
    places: {K: the numbers of these leaves in the tree}, as pairs.
    treedef: the structure of the tree.
  """

  arrays: dict[int, jax.Array]
  places: Any = struct.field(pytree_node=False)
  treedef: Any = struct.field(pytree_node=False)


def stack(tree: Any) -> Stacked:
  """Returns a tree of leaves [..., K] as one array for each K."""
  leaves, treedef = jax.tree.flatten(tree)
  places: dict[int, list[int]] = {}
  for i, leaf in enumerate(leaves):
    places.setdefault(jnp.shape(leaf)[-1], []).append(i)
  arrays = {
    k: jnp.stack([leaves[i] for i in numbers], axis=-2)
    for k, numbers in places.items()
  }
  fixed = tuple((k, tuple(numbers)) for k, numbers in places.items())
  return Stacked(arrays, fixed, treedef)


def unstack(stacked: Stacked) -> Any:
  """Returns the tree that `stack` got."""
  leaves: dict[int, jax.Array] = {}
  for k, numbers in stacked.places:
    # Otherwise XLA on CPU would compute the whole stack at each use of a row.
    array = float_ops.written_once(stacked.arrays[k])
    rows = jnp.split(array, len(numbers), axis=-2)
    leaves |= {i: row.squeeze(-2) for i, row in zip(numbers, rows)}
  return stacked.treedef.unflatten([leaves[i] for i in sorted(leaves)])


def probabilities(policy: Any) -> Any:
  """Returns pi = softmax(logits) of every decision (Eq. 2)."""
  return jax.tree.map(jax.nn.softmax, policy)


def sample(policy: Any, key: jax.Array, n: int) -> Any:
  """Returns n architectures drawn from the policy, leaves [n, K] one-hot."""
  stacked = stack(policy)
  # One draw for all decisions: a generator per leaf would make up most of the
  # compiled program.
  count = sum(len(numbers) for _, numbers in stacked.places)
  uniform = jax.random.uniform(key, (count, n, 1))
  drawn = {}
  for k, numbers in stacked.places:
    steps = jnp.cumsum(jax.nn.softmax(stacked.arrays[k]), axis=-1)
    u = uniform[np.array(numbers)].swapaxes(0, 1)  # [n, D, 1]
    drawn[k] = jax.nn.one_hot(jnp.sum(steps[None, :, :-1] <= u, axis=-1), k)
  # XLA compiles equal kernels once. Those of equal layers would differ in the
  # number of the row that they cut out of the stack.
  return jax.tree.map(
    float_ops.written_once,
    unstack(dataclasses.replace(stacked, arrays=drawn)),
  )


def argmax(policy: Any) -> Any:
  """Returns the architecture with the highest probability (Eq. 2).

  Args:
    policy: tree of [K] float logits, such as `state.search_state.policy`.

  Returns:
    The same tree of [K] float32 one-hot. Of equal logits the first one counts.
    Where a logit is NaN, all entries are: then nothing is picked.
  """

  def one_hot(logits: Any) -> jax.Array:
    best = jax.nn.one_hot(jnp.argmax(logits, axis=-1), logits.shape[-1])
    return jnp.where(jnp.isnan(logits).any(-1, keepdims=True), jnp.nan, best)

  return jax.tree.map(one_hot, policy)


def log_prob(policy: Any, arch: Any) -> jax.Array:
  """Returns log pi(arch) [], summed over decisions (Eq. 3)."""
  terms = jax.tree.map(
    lambda logits, a: jnp.sum(jax.nn.log_softmax(logits) * a), policy, arch
  )
  return functools.reduce(jnp.add, jax.tree.leaves(terms))


def entropy(policy: Any) -> jax.Array:
  """Returns H = -sum pi log pi [], in nats, summed over decisions (Eq. 6)."""
  terms = jax.tree.map(
    lambda logits: (
      -jnp.sum(jax.nn.softmax(logits) * jax.nn.log_softmax(logits))
    ),
    policy,
  )
  return functools.reduce(jnp.add, jax.tree.leaves(terms))


def settled(choices: Any) -> Any:
  """Returns logits [K] of which `choices`, one-hot [K], is all but certain."""
  return jax.tree.map(lambda one_hot: _CERTAIN * one_hot, choices)
