"""The controller that follows scores: it keeps to what was allocated last.

Nothing is learnt in a step. Before a few steps the options are scored
(`sensitivity`), the budget is solved (`space.allocation`), and the solution is
put into the state.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp

from fliqs_jax.runtime import replicas as replicas_lib
from fliqs_jax.search import controller as controller_lib
from fliqs_jax.search import policy as policy_lib
from fliqs_jax.search import schedules
from fliqs_jax.search import sensitivity
from fliqs_jax.search import train_state
from fliqs_jax.space import allocation
from fliqs_jax.space import search_space


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


def score_and_solve(
  state: train_state.TrainState,
  score: Callable[[Mapping[str, Any], Iterable[Any]], sensitivity.Scores],
  space: search_space.SearchSpace,
  batches: Iterable[Any],
  budgets: Sequence[allocation.Budget],
) -> train_state.TrainState:
  """Returns the state in which the weights train on at the best architecture.

  For a loop of your own with the preset `sensitivity`: call it before each step
  of `phases.scorings(n)`.

  Args:
    state: training state with the controller of `sensitivity`.
    score: the function that `sensitivity.scorer` returns.
    space: the decisions of the model.
    batches: validation batches, dicts of inputs and `label`; some eight.
    budgets: limits of costs.

  Raises:
    ValueError: a score is not finite (the decision is named), or no
      architecture is within the budgets.
  """
  raw = score({'params': state.params, **state.model_state}, batches)
  scores, _ = sensitivity.regular(space, raw)
  choices = allocation.solve(space, scores, budgets)
  return dataclasses.replace(state, search_state=allocated(choices, scores))


def controller(
  relative_cost: controller_lib.RelativeCost,
  phases: schedules.Phases,
  *,
  replicas: replicas_lib.Replicas = replicas_lib.ONE,
  **unused: Any,
) -> controller_lib.Controller:
  """Returns the controller.

  Before the search starts, weights train at the most precise formats and the
  largest sizes; then on the architecture in the state. If none was put there,
  no option of a menu of several is picked and every result is NaN.

  Args:
    relative_cost: tree of [K] -> C / C_T [].
    phases: unused: the step trains on no proposal before the search starts.
    replicas: unused: all copies train on the same architecture.
    **unused: keys of the other presets.
  """
  del phases, replicas, unused

  def init(logits: Any) -> ScoredState:
    return ScoredState(logits, jax.tree.map(jnp.zeros_like, logits))

  def propose(state: ScoredState, key: jax.Array, step: jax.Array) -> Any:
    del key, step

    # Decisions stay apart, not stacked, so that equal layers share kernels.
    def option(logits: jax.Array) -> jax.Array:
      if len(logits) == 1:
        return jnp.ones((1, 1))
      return jnp.float32(logits > 0)[None]

    return jax.tree.map(option, state.policy)

  def update(
    state: ScoredState, archs: Any, qualities: None, step: jax.Array
  ) -> tuple[ScoredState, dict[str, jax.Array]]:
    del archs, qualities, step
    return state, dict(
      cost=relative_cost(policy_lib.probabilities(state.policy)),
      entropy=policy_lib.entropy(policy_lib.stack(state.policy)),
    )

  return controller_lib.Controller(
    init, propose, update, samples=1, judges=False, warm_up='dearest'
  )
