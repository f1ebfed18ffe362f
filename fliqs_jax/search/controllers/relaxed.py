"""The differentiable controller of EdMIPS and DNAS: formats are probabilities.

The weights train on a mean over each menu, `QuantSpec.mix` of the model, and
the logits on the gradient of the same loss: CE + lambda C / C_T. The price
lambda of the cost is raised while the expected cost is above the target and
lowered while it is below, so it needs no tuning.
"""

from collections.abc import Sequence
import dataclasses
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
import optax

from fliqs_jax.runtime import replicas as replicas_lib
from fliqs_jax.search import controller as controller_lib
from fliqs_jax.search import policy as policy_lib
from fliqs_jax.search import schedules

# By simulation (10 layers, 3 formats, noisy gradients): in a search whose cost
# is twice the target throughout, the price grows by this, in units of the loss
# for each C_T. Much faster, it overshoots while the cost is still falling, and
# formats that have lost their probability do not come back.
_PRICE_RATE = 0.5
# Of Adam's squares. They forget the large gradients of the first steps, in
# which the cost is far from the target.
_SQUARES_DECAY = 0.99


@struct.dataclass
class RelaxedState:
  """What the controller remembers.

  Attributes:
    policy: tree of [K] logits.
    opt_state: Adam's moments.
    price: weight lambda of the cost [], or of it and each cap [1 + caps], in
      units of the loss.
    soft: [] quality of the mixture just before the freeze; NaN until then.
    hard: [] quality of the selected architecture at that time.
  """

  policy: Any
  opt_state: Any
  price: jax.Array
  soft: jax.Array
  hard: jax.Array


def controller(
  relative_cost: controller_lib.RelativeCost,
  phases: schedules.Phases,
  *,
  learning_rate: float,
  caps: Sequence[controller_lib.RelativeCost] = (),
  replicas: replicas_lib.Replicas = replicas_lib.ONE,
  **unused: Any,
) -> controller_lib.Controller:
  """Returns the controller; the model of the step must be a relaxed one.

  It proposes softmax(logits), uniform until the search starts, and their argmax
  after the freeze.

  Args:
    relative_cost: tree of [K] -> C / C_T [].
    phases: when the search starts and ends.
    learning_rate: of Adam on the logits.
    caps: tree of [K] -> C / limit [] of other costs; each has a price of its
      own.
    replicas: the copies of the step; all train on the same mixture.
    **unused: keys of the other presets.
  """
  del replicas, unused  # The step has averaged the gradients.
  adam = optax.adam(learning_rate, b2=_SQUARES_DECAY)

  def init(logits: Any) -> RelaxedState:
    unknown = jnp.full((), jnp.nan)
    price = jnp.zeros(1 + len(caps) if caps else ())
    return RelaxedState(
      logits, adam.init(logits), price, unknown, unknown.copy()
    )

  def propose(state: RelaxedState, key: jax.Array, step: jax.Array) -> Any:
    del key
    return jax.tree.map(
      lambda p, best: jnp.where(step < phases.freeze, p, best)[None],
      policy_lib.probabilities(state.policy),
      policy_lib.argmax(state.policy),
    )

  def update(
    state: RelaxedState, mixtures: Any, gradient: Any, step: jax.Array
  ) -> tuple[RelaxedState, dict[str, jax.Array]]:
    del mixtures

    def loss(policy: Any) -> tuple[jax.Array, jax.Array]:
      p = policy_lib.probabilities(policy)
      # The training loss, linear about the mixture.
      terms = jax.tree.map(lambda g, p: jnp.sum(g * p), gradient, p)
      costs = relative_cost(p)
      if caps:
        costs = jnp.stack([costs, *(cap(p) for cap in caps)])
      priced = jnp.sum(state.price * costs)
      return sum(jax.tree.leaves(terms)) + priced, costs

    slope, costs = jax.grad(loss, has_aux=True)(state.policy)
    updates, opt_state = adam.update(slope, state.opt_state)
    rate = _PRICE_RATE / phases.search_steps
    learnt = dataclasses.replace(
      state,
      policy=optax.apply_updates(state.policy, updates),
      opt_state=opt_state,
      price=jnp.maximum(0.0, state.price + rate * (costs - 1.0)),
    )
    state = jax.tree.map(
      lambda new, old: jnp.where(phases.searching(step), new, old),
      learnt,
      state,
    )
    return state, dict(
      cost=costs.ravel()[0],
      entropy=policy_lib.entropy(state.policy),
      price=state.price.ravel()[0],
    )

  return controller_lib.Controller(
    init, propose, update, samples=1, judges=False, differentiates=True
  )
