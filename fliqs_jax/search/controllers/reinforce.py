"""REINFORCE over a policy tree, in two forms (Eq. 1, 2, 3, 8).

`paper` is the published controller: one architecture in each step, the cost
inside the reward. `default` judges four architectures on the same images and
takes the gradient of the expected cost in closed form; WORKSPACE.md has the
effect of each part.

A quality that is not finite is dropped: it has the advantage 0, changes no
running mean, and is counted in the metric `dropped`.

Signs: the paper writes ascent with r_bar - r; here a loss is descended,
`-(r - baseline) log pi(arch) + beta_H H`, and gamma in Eq. 1 is negative.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fliqs_jax.runtime import replicas as replicas_lib
from fliqs_jax.search import controller as controller_lib
from fliqs_jax.search import policy as policy_lib
from fliqs_jax.search import schedules

# Decay of the running mean of rewards: A.4's "momentum of .95", as in TuNAS.
_BASELINE_DECAY = 0.95
# The constants of `default` come from simulation (WORKSPACE.md): the decay of
# the running mean of squared advantages; the architectures in each step; the
# factor by which the learning rate grows over the search (the weight of the
# cost grows by its root); the least scale of advantages, relative to the
# largest one and absolute.
_SQUARES_DECAY = 0.99
_SAMPLES = 4
_RAMP = 10
_LEAST_SCALE, _LEAST_POSITIVE = 0.1, 1e-8

# The state after an update, and metrics.
_Updated = tuple[controller_lib.SearchState, dict[str, jax.Array]]


def paper(
  relative_cost: controller_lib.RelativeCost,
  phases: schedules.Phases,
  *,
  gamma: float,
  learning_rate: float,
  entropy_weight: Callable[[jax.Array], jax.Array],
  caps: Sequence[controller_lib.RelativeCost] = (),
  replicas: replicas_lib.Replicas = replicas_lib.ONE,
  leave_one_out: bool = False,
) -> controller_lib.Controller:
  """Returns the published controller (Eq. 1, 3, 8; A.4).

  Each step has one architecture. The running baseline is zero-debiased and
  updated before the advantage is formed. Adam has no momentum. The entropy term
  is a plain gradient update outside Adam: Adam's normalisation would let it
  freeze the policy at random.

  Args:
    relative_cost: tree of [K] -> C / C_T [].
    phases: the steps at which the search starts and ends.
    gamma: weight of the cost, negative, in units of the quality.
    learning_rate: learning rate of Adam: 4.6e-3 for 30,200 steps (A.4), scaled
      by sqrt(30200 / steps) for others.
    entropy_weight: progress of training -> beta_H [] (Eq. 9).
    caps: tree of [K] -> C / limit [] of other costs; what is above 1 is added
      to the error of the cost.
    replicas: the copies of the step, each with an architecture of its own; the
      policy learns from all of them.
    leave_one_out: whether the baseline is the mean reward of the other replicas
      at this step.
  """
  controller_lib.check_gamma(gamma)
  adam = optax.adam(learning_rate, b1=0.0, b2=0.999, eps=1e-8)
  cost_of, *caps_of = map(_of_stacked, (relative_cost, *caps))

  def update(
    state: controller_lib.SearchState,
    archs: Any,
    qualities: jax.Array,
    step: jax.Array,
  ) -> _Updated:
    arch = jax.tree.map(lambda a: a[0], archs)
    cost = cost_of(arch)
    reward = controller_lib.reward(
      qualities[0], _error(arch, cost, caps_of), gamma
    )
    reward = jnp.where(jnp.isfinite(reward), reward, _baseline(state))
    average, count, baseline = _running_mean(
      state, replicas.mean(reward), _BASELINE_DECAY
    )
    if leave_one_out:
      baseline = replicas.others(reward)
    gradient = replicas.mean(
      jax.grad(
        lambda policy: -(reward - baseline) * policy_lib.log_prob(policy, arch)
      )(state.policy)
    )
    updates, opt_state = adam.update(gradient, state.opt_state)
    beta = entropy_weight(phases.progress(step))
    entropy_gradient = jax.grad(policy_lib.entropy)(state.policy)
    learnt = jax.tree.map(
      lambda theta, u, h: theta + u - learning_rate * beta * h,
      state.policy,
      updates,
      entropy_gradient,
    )
    updated = _learn_if(
      phases.searching(step),
      state,
      dataclasses.replace(state, policy=learnt, opt_state=opt_state),
    )
    updated = dataclasses.replace(updated, average=average, count=count)
    return updated, dict(reward=reward, sampled_cost=cost)

  return _controller(adam, update, cost_of, phases, samples=1)


def default(
  relative_cost: controller_lib.RelativeCost,
  phases: schedules.Phases,
  *,
  gamma: float,
  learning_rate: float,
  entropy_weight: Callable[[jax.Array], jax.Array],
  caps: Sequence[controller_lib.RelativeCost] = (),
  replicas: replicas_lib.Replicas = replicas_lib.ONE,
) -> controller_lib.Controller:
  """Returns the better controller: paired samples, cost in closed form.

  Until the search starts, the weights train at the most precise formats.

  Each step judges four architectures on the same validation images, each
  relative to the mean of the others. The expected cost error is differentiated
  exactly. Over the search its weight grows by sqrt(10) and the learning rate by
  10. Advantages and cost are in units of the running scale of the advantages.

  Args:
    relative_cost: tree of [K] -> C / C_T [].
    phases: the steps at which the search starts and ends.
    gamma: weight of the cost, negative, in units of the quality: -0.1 for
      accuracy as a fraction, about -0.3 for cross-entropy in nats.
    learning_rate: learning rate at the start of the search, usually
      1 / sqrt(search steps).
    entropy_weight: progress of the search -> beta_H [] (Eq. 9).
    caps: tree of [K] -> C / limit [] of other costs; what is above 1 is added
      to the error of the cost.
    replicas: the copies of the step, each with architectures and images of its
      own; the policy learns from all of them.
  """
  controller_lib.check_gamma(gamma)
  adam = optax.scale_by_adam(b1=0.9, b2=0.999)
  cost_of, *caps_of = map(_of_stacked, (relative_cost, *caps))

  def update(
    state: controller_lib.SearchState,
    archs: Any,
    qualities: jax.Array,
    step: jax.Array,
  ) -> _Updated:
    p = phases.search_progress(step)
    searching = phases.searching(step)
    qualities = jnp.where(
      jnp.isfinite(qualities), qualities, _mean_of_finite(qualities)
    )
    advantages = (qualities - qualities.mean()) * _SAMPLES / (_SAMPLES - 1)
    average, count, square = _running_mean(
      state, replicas.mean(jnp.mean(advantages**2)), _SQUARES_DECAY
    )
    scale = jnp.sqrt(square)
    peak = jnp.where(searching, jnp.maximum(state.peak, scale), 0.0)
    # If all qualities are equal to the last bit, the scale is zero.
    scale = jnp.maximum(
      jnp.maximum(scale, _LEAST_SCALE * peak), _LEAST_POSITIVE
    )

    def loss(policy: Any) -> jax.Array:
      log_probs = jax.vmap(functools.partial(policy_lib.log_prob, policy))(
        archs
      )
      pi = policy_lib.probabilities(policy)
      weight = 0.5 * (1 - jnp.cos(jnp.pi * p))
      error = controller_lib.expected_absolute_error(cost_of, pi, weight)
      for cap in caps_of:
        error += controller_lib.expected_excess(cap, pi, weight)
      # The gradient of the expected reward: of the qualities by REINFORCE, of
      # the cost in closed form; both in units of the advantages' scale.
      expected_reward = controller_lib.reward(
        jnp.mean(advantages / scale * log_probs),
        error,
        gamma * _RAMP ** (p / 2) / scale,
      )
      return entropy_weight(p) * policy_lib.entropy(policy) - expected_reward

    updates, opt_state = adam.update(
      replicas.mean(jax.grad(loss)(state.policy)), state.opt_state
    )
    rate = learning_rate * _RAMP**p
    learnt = jax.tree.map(lambda t, u: t - rate * u, state.policy, updates)
    updated = _learn_if(
      searching,
      state,
      dataclasses.replace(state, policy=learnt, opt_state=opt_state),
    )
    updated = dataclasses.replace(
      updated, average=average, count=count, peak=peak
    )
    cost = jax.vmap(cost_of)(archs)
    # Without the ramp, so that rewards of different steps can be compared.
    rewards = controller_lib.reward(
      qualities,
      jax.vmap(lambda arch, cost: _error(arch, cost, caps_of))(archs, cost),
      gamma,
    )
    return updated, dict(reward=rewards.mean(), sampled_cost=cost.mean())

  controller = _controller(adam, update, cost_of, phases, samples=_SAMPLES)
  return controller._replace(warm_up='dearest_formats')


def _controller(
  adam: optax.GradientTransformation,
  update: Callable[..., _Updated],
  cost_of: controller_lib.RelativeCost,
  phases: schedules.Phases,
  samples: int,
) -> controller_lib.Controller:
  def init(logits: Any) -> controller_lib.SearchState:
    stacked: Any = policy_lib.stack(logits)
    return controller_lib.SearchState(
      policy=logits,
      opt_state=adam.init(stacked),
      average=jnp.zeros(()),
      peak=jnp.zeros(()),
      count=jnp.zeros((), jnp.int32),
    )

  def propose(
    state: controller_lib.SearchState, key: jax.Array, step: jax.Array
  ) -> Any:
    # Uniform before the search: the softmax of zeros.
    searched = (step >= phases.search_start).astype(jnp.float32)
    logits = jax.tree.map(lambda theta: theta * searched, state.policy)
    return jax.tree.map(
      lambda drawn, best: jnp.where(step >= phases.freeze, best, drawn),
      policy_lib.sample(logits, key, samples),
      policy_lib.argmax(state.policy),
    )

  def update_and_measure(
    state: controller_lib.SearchState,
    archs: Any,
    qualities: jax.Array,
    step: jax.Array,
  ) -> _Updated:
    stacked = dataclasses.replace(state, policy=policy_lib.stack(state.policy))
    archs = policy_lib.stack(archs)
    updated, metrics = update(stacked, archs, qualities, step)
    pi = policy_lib.probabilities(updated.policy)
    metrics |= dict(
      quality=_mean_of_finite(qualities),
      dropped=jnp.sum(~jnp.isfinite(qualities)).astype(jnp.float32),
      cost=cost_of(pi),
      entropy=policy_lib.entropy(updated.policy),
    )
    learnt = policy_lib.unstack(updated.policy)
    return dataclasses.replace(updated, policy=learnt), metrics

  return controller_lib.Controller(init, propose, update_and_measure, samples)


def _of_stacked(
  relative_cost: controller_lib.RelativeCost,
) -> controller_lib.RelativeCost:
  return lambda choices: relative_cost(policy_lib.unstack(choices))


def _error(
  arch: Any, cost: jax.Array, caps: Sequence[controller_lib.RelativeCost]
) -> jax.Array:
  """Returns |C / C_T - 1|, and what an architecture is above each cap."""
  error = controller_lib.absolute_error(cost)
  return sum((controller_lib.excess(cap(arch)) for cap in caps), error)


def _running_mean(
  state: controller_lib.SearchState, value: jax.Array, decay: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns the running mean with `value`, its count, and the unbiased mean."""
  average = decay * state.average + (1 - decay) * value
  count = state.count + 1
  return average, count, _unbiased(average, count, decay)


def _unbiased(average: jax.Array, count: jax.Array, decay: float) -> jax.Array:
  return average / (1 - decay ** count.astype(jnp.float32))


def _baseline(state: controller_lib.SearchState) -> jax.Array:
  """Returns the unbiased mean of the rewards so far; 0 before the first."""
  mean = _unbiased(state.average, state.count, _BASELINE_DECAY)
  return jnp.where(state.count > 0, mean, 0.0)


def _mean_of_finite(qualities: jax.Array) -> jax.Array:
  """Returns the mean of those qualities [M] that are finite; 0 if none is."""
  finite = jnp.isfinite(qualities)
  return jnp.where(finite.any(), jnp.mean(qualities, where=finite), 0.0)


def _learn_if(
  searching: jax.Array,
  old: controller_lib.SearchState,
  new: controller_lib.SearchState,
) -> controller_lib.SearchState:
  return jax.tree.map(lambda o, n: jnp.where(searching, n, o), old, new)
