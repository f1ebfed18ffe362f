"""REINFORCE over a policy tree: `init`, `propose`, `update` (Eq. 1, 2, 3, 8).

Two presets. `paper` is the published controller: one architecture a step, the
cost inside the reward. `default` judges four architectures on the same images
and takes the gradient of the expected cost in closed form; WORKSPACE.md tells
what each part is worth.

Signs: the paper writes ascent with r_bar - r; here a loss is descended,
`-(r - baseline) log pi(arch) + beta_H H`, and gamma in Eq. 1 is negative.
"""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import optax

from fliqs_jax.runtime import replicas as replicas_lib
from fliqs_jax.search import policy as policy_lib
from fliqs_jax.search import presets
from fliqs_jax.search import schedules

_BASELINE_DECAY = 0.95  # A.4 ("momentum of .95"), in TuNAS's reading.
_SQUARES_DECAY = 0.99
_SAMPLES = 4


class Controller(NamedTuple):
  """A search method over a tree of decisions.

  Attributes:
    init: tree of [K] logits -> state, which has a field `policy`.
    propose: (state, key, step) -> `samples` architectures, leaves [M, K].
    update: (state, architectures, qualities [M], step) -> (state, metrics).
    samples: M, architectures a step.
  """

  init: Callable
  propose: Callable
  update: Callable
  samples: int


@flax.struct.dataclass
class SearchState:
  """What the controller remembers.

  Attributes:
    policy: tree of [K] logits.
    opt_state: Adam's moments.
    average: [] running mean, of the reward (`paper`) or of the squared
      advantage (`default`), biased to zero.
    peak: [] largest advantage scale of the search so far (`default`).
    count: [] int32 updates of the average, which unbias it.
  """

  policy: Any
  opt_state: Any
  average: jax.Array
  peak: jax.Array
  count: jax.Array


def absolute_reward(
  quality: jax.Array, relative_cost: jax.Array, gamma: float
) -> jax.Array:
  """Returns r = Q + gamma |C / C_T - 1| (Eq. 1); gamma is negative."""
  return quality + gamma * jnp.abs(relative_cost - 1.0)


def expected_absolute_error(
  relative_cost: Callable, probabilities: Any, weight: jax.Array
) -> jax.Array:
  """Returns E|C / C_T - 1| [] under a factorised policy, differentiable.

  C / C_T is near normal, so its absolute error is a folded normal with the
  exact mean and, to first order in the decisions, the exact variance. The plain
  |E[C] / C_T - 1| is blind to the variance; its argmax ends up to 3 % below the
  target.

  Args:
    relative_cost: C / C_T of a tree of [K] leaves.
    probabilities: tree of [K].
    weight: [] in [0, 1], of the gradient through the variance.
  """
  mean, slopes = jax.value_and_grad(relative_cost)(probabilities)
  slopes = jax.lax.stop_gradient(slopes)

  def variance(p, h):
    return jnp.sum(p * h**2) - jnp.sum(p * h) ** 2

  terms = jax.tree.map(variance, probabilities, slopes)
  sd = jnp.sqrt(jnp.maximum(sum(jax.tree.leaves(terms)), 1e-12))
  sd = weight * sd + (1 - weight) * jax.lax.stop_gradient(sd)
  mu = mean - 1.0
  return mu * jax.lax.erf(mu / (sd * jnp.sqrt(2.0))) + sd * jnp.sqrt(
    2 / jnp.pi
  ) * jnp.exp(-(mu**2) / (2 * sd**2))


def paper(
  relative_cost: Callable,
  phases: schedules.Phases,
  *,
  gamma: float,
  learning_rate: float,
  entropy_weight: Callable,
  replicas: replicas_lib.Replicas = replicas_lib.ONE,
  leave_one_out: bool = False,
) -> Controller:
  """Returns the published controller (Eq. 1, 3, 8; A.4).

  One architecture a step; zero-debiased running baseline, updated before the
  advantage is formed; Adam without momentum; the entropy term as a plain
  gradient step outside Adam, whose normalisation would let it freeze the policy
  at random.

  Args:
    relative_cost: C / C_T of a tree of [K] leaves.
    phases: when the search starts and ends.
    gamma: weight of the cost, negative, in units of the quality.
    learning_rate: 4.6e-3 at 30,200 steps; scale by sqrt(30200 / steps).
    entropy_weight: beta_H as a function of the progress of training.
    replicas: of the step; each has an architecture, the policy learns from all.
    leave_one_out: whether the baseline is the mean reward of the other replicas
      at this step.
  """
  _check_gamma(gamma)
  adam = optax.adam(learning_rate, b1=0.0, b2=0.999, eps=1e-8)

  def update(state, archs, qualities, step):
    arch = jax.tree.map(lambda a: a[0], archs)
    cost = relative_cost(arch)
    reward = absolute_reward(qualities[0], cost, gamma)
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
    state = _learn_if(
      phases.searching(step),
      state,
      state.replace(policy=learnt, opt_state=opt_state),
    ).replace(average=average, count=count)
    return state, dict(reward=reward, sampled_cost=cost)

  return _controller(adam, update, relative_cost, phases, samples=1)


def default(
  relative_cost: Callable,
  phases: schedules.Phases,
  *,
  gamma: float,
  learning_rate: float,
  entropy_weight: Callable,
  replicas: replicas_lib.Replicas = replicas_lib.ONE,
) -> Controller:
  """Returns the better controller: paired samples, cost in closed form.

  Four architectures a step on the same validation images, each judged against
  the mean of the others; the expected cost error differentiated exactly, its
  weight growing by sqrt(10) and the learning rate by 10 over the search;
  advantages and cost in units of the advantages' running scale.

  Args:
    relative_cost: C / C_T of a tree of [K] leaves.
    phases: when the search starts and ends.
    gamma: weight of the cost, negative, in units of the quality: -0.1 for
      accuracy as a fraction, about -0.3 for cross-entropy in nats.
    learning_rate: at the start of the search: 1 / sqrt(search steps).
    entropy_weight: beta_H as a function of the progress of the search.
    replicas: of the step; each has architectures and images of its own, the
      policy learns from all.
  """
  _check_gamma(gamma)
  adam = optax.scale_by_adam(b1=0.9, b2=0.999)

  def update(state, archs, qualities, step):
    p = phases.search_progress(step)
    searching = phases.searching(step)
    advantages = (qualities - qualities.mean()) * _SAMPLES / (_SAMPLES - 1)
    average, count, square = _running_mean(
      state, replicas.mean(jnp.mean(advantages**2)), _SQUARES_DECAY
    )
    scale = jnp.sqrt(square)
    peak = jnp.where(searching, jnp.maximum(state.peak, scale), 0.0)
    # Where all qualities agree to the last bit there is nothing to scale by.
    scale = jnp.maximum(jnp.maximum(scale, 0.1 * peak), 1e-8)

    def loss(policy):
      log_probs = jax.vmap(functools.partial(policy_lib.log_prob, policy))(
        archs
      )
      error = expected_absolute_error(
        relative_cost,
        policy_lib.probabilities(policy),
        0.5 * (1 - jnp.cos(jnp.pi * p)),
      )
      return (
        -jnp.mean(advantages / scale * log_probs)
        - gamma * 10 ** (p / 2) / scale * error
        + entropy_weight(p) * policy_lib.entropy(policy)
      )

    updates, opt_state = adam.update(
      replicas.mean(jax.grad(loss)(state.policy)), state.opt_state
    )
    rate = learning_rate * 10**p
    learnt = jax.tree.map(lambda t, u: t - rate * u, state.policy, updates)
    state = _learn_if(
      searching, state, state.replace(policy=learnt, opt_state=opt_state)
    ).replace(average=average, count=count, peak=peak)
    cost = jax.vmap(relative_cost)(archs)
    rewards = absolute_reward(qualities, cost, gamma)
    return state, dict(reward=rewards.mean(), sampled_cost=cost.mean())

  return _controller(adam, update, relative_cost, phases, samples=_SAMPLES)


PRESETS = {'paper': paper, 'default': default}


def make(
  preset: str,
  relative_cost: Callable,
  phases: schedules.Phases,
  *,
  replicas: replicas_lib.Replicas = replicas_lib.ONE,
  leave_one_out: bool = False,
  **overrides: Any,
) -> Controller:
  """Returns the controller of a preset.

  Args:
    preset: `paper` or `default`.
    relative_cost: C / C_T of a tree of [K] leaves.
    phases: when the search starts and ends.
    replicas: of the step in which it works.
    leave_one_out: of `paper`, as there.
    **overrides: `gamma`, `learning_rate`, `entropy_schedule`, `entropy_beta`
      in place of the preset's own, `config_lib.search_keys`.

  Raises:
    ValueError: unknown preset, or values that cannot work.
  """
  allowed = ('gamma', 'learning_rate', 'entropy_schedule', 'entropy_beta')
  if unknown := sorted(set(overrides) - set(allowed)):
    raise ValueError(
      f'unknown search keys {", ".join(unknown)}; allowed: {", ".join(allowed)}'
    )
  keys = presets.search_keys(preset, phases.steps) | overrides
  baseline = {}
  if leave_one_out:
    if preset != 'paper':
      raise ValueError(
        'parallel.leave_one_out=True is a baseline in place of the running one '
        f"of search.preset='paper'; the samples of {preset!r} are judged "
        'against each other already'
      )
    baseline = dict(leave_one_out=True)
  return PRESETS[preset](
    relative_cost,
    phases,
    replicas=replicas,
    **baseline,
    gamma=keys['gamma'],
    learning_rate=keys['learning_rate'],
    entropy_weight=schedules.entropy_weight(
      keys['entropy_schedule'], keys['entropy_beta']
    ),
  )


def _controller(adam, update, relative_cost, phases, samples) -> Controller:
  def init(logits):
    return SearchState(
      policy=logits,
      opt_state=adam.init(logits),
      average=jnp.zeros(()),
      peak=jnp.zeros(()),
      count=jnp.zeros((), jnp.int32),
    )

  def propose(state, key, step):
    # Uniform before the search: the softmax of zeros.
    searched = (step >= phases.search_start).astype(jnp.float32)
    logits = jax.tree.map(lambda theta: theta * searched, state.policy)
    return jax.tree.map(
      lambda drawn, best: jnp.where(step >= phases.freeze, best, drawn),
      policy_lib.sample(logits, key, samples),
      policy_lib.argmax(state.policy),
    )

  def update_and_measure(state, archs, qualities, step):
    state, metrics = update(state, archs, qualities, step)
    pi = policy_lib.probabilities(state.policy)
    return state, metrics | dict(
      quality=jnp.mean(qualities),
      cost=relative_cost(pi),
      entropy=policy_lib.entropy(state.policy),
    )

  return Controller(init, propose, update_and_measure, samples)


def _running_mean(state, value, decay):
  """Returns the running mean with `value` in it, its count, and it unbiased."""
  average = decay * state.average + (1 - decay) * value
  count = state.count + 1
  return average, count, average / (1 - decay ** count.astype(jnp.float32))


def _learn_if(searching, old, new):
  return jax.tree.map(lambda o, n: jnp.where(searching, n, o), old, new)


def _check_gamma(gamma):
  if gamma >= 0:
    raise ValueError(
      f'search.gamma={gamma} must be negative: Eq. 1 adds it to the quality, '
      'so a positive weight would reward cost'
    )
