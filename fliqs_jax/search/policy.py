"""Softmax policies over trees of decisions (Eq. 2, 6).

A policy is a tree of [K] logits, an architecture the same tree of [K] one-hots.
The tree may be a dict of decisions or a model's `arch` collection.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

# A logit so far above zeros that the others have e^-20 of its probability.
_CERTAIN = 20.0


def probabilities(policy: Any) -> Any:
  """Returns pi = softmax(logits) of every decision (Eq. 2)."""
  return jax.tree.map(jax.nn.softmax, policy)


def sample(policy: Any, key: jax.Array, n: int) -> Any:
  """Returns n architectures drawn from the policy, leaves [n, K] one-hot."""
  leaves, treedef = jax.tree.flatten(policy)
  # One draw for all decisions: a generator per leaf would make up most of the
  # compiled program.
  uniform = jax.random.uniform(key, (len(leaves), n, 1))

  def draw(logits: jax.Array, u: jax.Array) -> jax.Array:  # [K], [n, 1]
    below = jnp.cumsum(jax.nn.softmax(logits))[None, :-1] <= u
    return jax.nn.one_hot(jnp.sum(below, axis=-1), logits.shape[-1])

  return treedef.unflatten([draw(*pair) for pair in zip(leaves, uniform)])


def argmax(policy: Any) -> Any:
  """Returns the architecture with the highest probability (Eq. 2).

  Args:
    policy: tree of [K] float logits, such as `state.search_state.policy`.

  Returns:
    The same tree of [K] float32 one-hot. Of equal logits the first one counts.
  """
  return jax.tree.map(
    lambda logits: jax.nn.one_hot(jnp.argmax(logits), logits.shape[-1]), policy
  )


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
