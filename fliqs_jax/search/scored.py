"""The controller that follows scores: it keeps to what was allocated last.

Nothing is learnt in a step. At a few steps the options are scored
(`sensitivity`), the budget is solved (`space.allocation`), and `allocated` puts
the solution into the state.
"""

from typing import Any

from flax import struct
import jax
import jax.numpy as jnp

from fliqs_jax.runtime import replicas as replicas_lib
from fliqs_jax.search import controller as controller_lib
from fliqs_jax.search import policy as policy_lib
from fliqs_jax.search import schedules


@struct.dataclass
class ScoredState:
  """What the controller remembers.

  Attributes:
    policy: {decision: [K]} logits, zero before the first scoring, then those of
      one architecture.
    scores: {decision: [K]} the scores that led to it.
  """

  policy: Any
  scores: Any


def allocated(choices: Any, scores: Any) -> Any:
  """Returns the state that keeps to an architecture.

  Args:
    choices: {decision: [K] one-hot}.
    scores: {decision: [K]} the scores that led to it.
  """
  return jax.tree.map(
    jnp.float32, ScoredState(policy_lib.settled(choices), scores)
  )


def controller(
  relative_cost: controller_lib.RelativeCost,
  phases: schedules.Phases,
  *,
  replicas: replicas_lib.Replicas = replicas_lib.ONE,
  **unused: Any,
) -> controller_lib.Controller:
  """Returns the controller.

  Before the search starts, weights train at the most precise formats and, where
  sizes are open, at random ones; then on the architecture in the state.

  Args:
    relative_cost: tree of [K] -> C / C_T [].
    phases: when the search starts.
    replicas: the copies of the step; all train on the same architecture once
      the search has started.
    **unused: keys of the other presets.
  """
  del replicas, unused

  def init(logits: Any) -> ScoredState:
    return ScoredState(logits, jax.tree.map(jnp.zeros_like, logits))

  def propose(state: ScoredState, key: jax.Array, step: jax.Array) -> Any:
    return jax.tree.map(
      lambda drawn, best: jnp.where(step < phases.search_start, drawn, best),
      policy_lib.sample(jax.tree.map(jnp.zeros_like, state.policy), key, 1),
      policy_lib.argmax(state.policy),
    )

  def update(
    state: ScoredState, archs: Any, qualities: None, step: jax.Array
  ) -> tuple[ScoredState, dict[str, jax.Array]]:
    del archs, qualities, step
    pi = policy_lib.probabilities(state.policy)
    return state, dict(
      cost=relative_cost(pi), entropy=policy_lib.entropy(state.policy)
    )

  return controller_lib.Controller(
    init, propose, update, samples=1, judges=False, warms_up_dearest=True
  )
