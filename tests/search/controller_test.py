"""The controllers: each update by hand, and what a search must do."""

import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fliqs_jax.search import controller as controller_lib
from fliqs_jax.search import policy as policy_lib
from fliqs_jax.search import presets
from fliqs_jax.search import schedules

PRESETS = ('paper', 'default')

# A space of two decisions; C / C_T is linear, 1.1 under the uniform policy.
COSTS = {'a': np.array([0.2, 0.5, 0.8]), 'b': np.array([0.4, 0.8])}
SIZES = {'a': 3, 'b': 2}
LOGITS = {'a': np.array([0.3, 0.0, -0.2]), 'b': np.array([0.0, 0.5])}
GAMMA, RATE = -0.3, 0.02
PHASES = schedules.Phases(steps=8, act_start=0, search_start=2, freeze=7)


def _relative_cost(choices):
  return sum(jnp.sum(choices[k] * jnp.float32(c)) for k, c in COSTS.items())


def _make(preset, phases=PHASES, relative_cost=_relative_cost, **overrides):
  return presets.make(preset, relative_cost, phases, **overrides)


@functools.cache  # One compilation for most tests.
def _jitted(preset):
  controller = _make(preset, gamma=GAMMA, learning_rate=RATE)
  return controller._replace(
    propose=jax.jit(controller.propose), update=jax.jit(controller.update)
  )


def _policy(logits=None):
  logits = LOGITS if logits is None else logits
  return {name: jnp.float32(values) for name, values in logits.items()}


def _archs(**choices):
  return {k: jnp.eye(SIZES[k])[jnp.array(c)] for k, c in choices.items()}


def _assert_equal(left, right):
  jax.tree.map(np.testing.assert_array_equal, left, right)


# What is sampled.


@functools.partial(jax.jit, static_argnums=0)
def _propose_many(preset, policy, step):
  controller = _make(preset)
  keys = jax.random.split(jax.random.key(0), 4000)
  propose = functools.partial(
    controller.propose, controller.init(policy), step=step
  )
  return jax.vmap(propose)(keys)


SHARP = {'a': [9.0, 0.0, 0.0], 'b': [0.0, 9.0]}


@pytest.mark.parametrize('preset', PRESETS)
def test_before_the_search_samples_are_uniform_whatever_the_logits(preset):
  for step in (0, PHASES.search_start - 1):
    archs = _propose_many(preset, _policy(SHARP), jnp.int32(step))
    for name, size in SIZES.items():
      counts = np.asarray(archs[name]).sum(axis=(0, 1))
      expected = counts.sum() / size
      # 99.9 % points of chi-square with 2 and 1 degrees of freedom.
      limit = {3: 13.8, 2: 10.8}[size]
      assert np.sum((counts - expected) ** 2 / expected) < limit


@pytest.mark.parametrize('preset', PRESETS)
def test_in_the_search_samples_follow_the_policy(preset):
  step = jnp.int32(PHASES.search_start)
  archs = _propose_many(preset, _policy(), step)
  for name, logits in LOGITS.items():
    counts = np.asarray(archs[name]).sum(axis=(0, 1))
    expected = counts.sum() * np.exp(logits) / np.exp(logits).sum()
    assert np.sum((counts - expected) ** 2 / expected) < 10.8


@pytest.mark.parametrize('preset', PRESETS)
def test_after_the_freeze_every_sample_is_the_argmax(preset):
  archs = _propose_many(preset, _policy(), jnp.int32(PHASES.freeze))
  for name, best in (('a', [1, 0, 0]), ('b', [0, 1])):
    shape = (4000, _make(preset).samples, SIZES[name])
    _assert_equal(np.asarray(archs[name]), np.broadcast_to(best, shape))


def test_paper_judges_one_architecture_a_step_and_default_four():
  assert [_make(preset).samples for preset in PRESETS] == [1, 4]


# The reward and the expected cost error.


def test_the_reward_is_quality_less_the_weighted_cost_error():
  # Eq. 1: 0.7 - 0.1 |1.2 - 1| = 0.68, and the same 0.2 below the target.
  costs = jnp.array([1.2, 0.8])
  errors = controller_lib.absolute_error(costs)
  rewards = controller_lib.reward(jnp.full(2, 0.7), errors, -0.1)
  np.testing.assert_allclose(rewards, 0.68, rtol=1e-6)


@pytest.mark.parametrize('gamma', [0.0, 0.1, -1e308, -math.inf, math.nan])
@pytest.mark.parametrize('preset', PRESETS)
def test_a_gamma_that_would_reward_cost_is_refused(preset, gamma):
  message = f'search.gamma={gamma} must be negative'
  with pytest.raises(ValueError, match=re.escape(message)):
    _make(preset, gamma=gamma)


def test_an_unknown_preset_is_an_error_that_says_what_is_allowed():
  with pytest.raises(ValueError, match='allowed: paper, default'):
    _make('tunas')


# 40 decisions among 3 formats whose costs vary, as in a real network.
_RNG = np.random.default_rng(0)
MANY_COSTS = _RNG.lognormal(size=(40, 1)) * np.array([1.0, 4.0, 16.0])
MANY = _RNG.dirichlet([1.0, 1.0, 1.0], size=40)


def _costs(mean):
  """Returns costs [40, 3], in units of the target, with that E[C] / C_T."""
  return MANY_COSTS * mean / np.sum(MANY * MANY_COSTS)


def _sd(costs):
  return math.sqrt(
    np.sum(MANY * costs**2) - np.sum(np.sum(MANY * costs, 1) ** 2)
  )


@jax.jit
def _error(probabilities, costs, weight):
  def relative_cost(leaves):
    return sum(jnp.sum(p * c) for p, c in zip(leaves, costs))

  return controller_lib.expected_absolute_error(
    relative_cost, list(probabilities), weight
  )


_error_gradient = jax.jit(jax.grad(_error))


@pytest.mark.parametrize('mean', [0.7, 0.95, 1.0, 1.2])
def test_the_expected_absolute_error_is_that_of_samples(mean):
  costs = _costs(mean)
  rng = np.random.default_rng(1)
  drawn = [rng.choice(c, size=50_000, p=p) for c, p in zip(costs, MANY)]
  expected = np.mean(np.abs(np.sum(drawn, axis=0) - 1))
  # C is near normal, not normal.
  np.testing.assert_allclose(_error(MANY, costs, 1.0), expected, rtol=0.04)


def test_the_error_of_the_expected_cost_is_blind_to_the_variance():
  # At E[C] = C_T it is zero, while the mean absolute value of a normal
  # variable about its mean is sd sqrt(2 / pi).
  costs = _costs(1.0)
  expected = _sd(costs) * math.sqrt(2 / math.pi)
  np.testing.assert_allclose(_error(MANY, costs, 1.0), expected, rtol=1e-5)
  assert expected > 0.1


@pytest.mark.parametrize('mean', [0.7, 1.0, 1.3])
def test_no_policy_errs_less_than_its_expected_cost(mean):
  # Jensen: E|X| >= |E X|; more so the closer the mean is to the target.
  assert _error(MANY, _costs(mean), 1.0) > abs(mean - 1)


@pytest.mark.parametrize('mean', [0.9, 1.0, 1.1])
def test_the_gradient_of_the_expected_error_equals_finite_differences(mean):
  costs = _costs(mean)
  gradient = np.float64(_error_gradient(MANY, costs, 1.0))
  # Along the gradient itself the derivative is its norm.
  norm = np.linalg.norm(gradient)
  step = 0.02 * gradient / norm
  above, below = (_error(MANY + s, costs, 1.0) for s in (step, -step))
  np.testing.assert_allclose((above - below) / 0.04, norm, rtol=2e-3)


def test_at_weight_zero_only_the_mean_is_differentiated():
  # d E|x| / d mu = erf(mu / (sd sqrt 2)): how much oftener C is above C_T.
  costs = _costs(1.1)
  expected = math.erf(0.1 / (_sd(costs) * math.sqrt(2))) * costs
  found = _error_gradient(MANY, costs, 0.0)
  np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_a_settled_policy_has_the_error_of_its_cost_and_finite_gradients():
  # One-hot: no variance, |0.8 + 0.4 - 1| = 0.2.
  pi = {'a': jnp.array([0.0, 0.0, 1.0]), 'b': jnp.array([1.0, 0.0])}
  error = functools.partial(
    controller_lib.expected_absolute_error, _relative_cost, weight=1.0
  )
  value, gradient = jax.jit(jax.value_and_grad(error))(pi)
  np.testing.assert_allclose(value, 0.2, rtol=1e-5)
  assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(gradient))


def test_a_product_of_decisions_has_its_exact_mean_and_first_order_variance():
  # C = x y with x in {1, 2}, y in {1, 3}, each evenly: E[C] = 1.5 * 2 = 3. In
  # units of C_T = 3 the slopes are E[y] (1, 2) / 3 and E[x] (1, 3) / 3, whose
  # variances are 4 * 0.25 / 9 and 2.25 * 1 / 9.
  x, y = jnp.array([1.0, 2.0]), jnp.array([1.0, 3.0])
  error = functools.partial(
    controller_lib.expected_absolute_error,
    lambda p: jnp.sum(p['x'] * x) * jnp.sum(p['y'] * y) / 3,
    weight=1.0,
  )
  even = {'x': jnp.full(2, 0.5), 'y': jnp.full(2, 0.5)}
  found, gradient = jax.jit(jax.value_and_grad(error))(even)
  sd = math.sqrt(3.25 / 9)
  np.testing.assert_allclose(found, math.sqrt(2 / math.pi) * sd, rtol=1e-5)
  # The slopes h = (2, 4) / 3 of x are constants: d Var / dp = h**2 - 2 E[h] h
  # with E[h] = 1, which is -8 / 9 for both.
  expected = math.sqrt(2 / math.pi) * (-8 / 9) / (2 * sd)
  np.testing.assert_allclose(gradient['x'], [expected] * 2, rtol=1e-5)


# One update, by hand, in float64 and without jax.


def _softmax(logits):
  return {k: np.exp(v) / np.exp(v).sum() for k, v in logits.items()}


def _entropy(pi):
  return -sum(np.sum(p * np.log(p)) for p in pi.values())


class _Adam:
  """Kingma and Ba, Algorithm 1; returns the step without its rate."""

  def __init__(self, b1, b2):
    self.b1, self.b2, self.t = b1, b2, 0
    self.m = dict.fromkeys(LOGITS, 0.0)
    self.v = dict.fromkeys(LOGITS, 0.0)

  def __call__(self, gradient):
    self.t += 1
    step = {}
    for k, g in gradient.items():
      self.m[k] = self.b1 * self.m[k] + (1 - self.b1) * g
      self.v[k] = self.b2 * self.v[k] + (1 - self.b2) * g**2
      m = self.m[k] / (1 - self.b1**self.t)
      v = self.v[k] / (1 - self.b2**self.t)
      step[k] = m / (np.sqrt(v) + 1e-8)
    return step


def _run(controller, archs_of_steps, qualities_of_steps):
  """Returns the policy after steps 0, 1, ... of PHASES."""
  state = controller.init(_policy())
  for step, (archs, qualities) in enumerate(
    zip(archs_of_steps, qualities_of_steps)
  ):
    state, _ = controller.update(
      state, archs, jnp.float32(qualities), jnp.int32(step)
    )
  return state.policy


def test_updates_of_the_paper_preset_by_hand():
  choices = [(0, 1), (2, 0), (1, 1), (0, 0), (2, 1)]  # Of a and b.
  qualities = [0.50, 0.55, 0.62, 0.57, 0.66]
  theta, adam, average = dict(LOGITS), _Adam(b1=0.0, b2=0.999), 0.0
  for step, ((a, b), quality) in enumerate(zip(choices, qualities)):
    cost = COSTS['a'][a] + COSTS['b'][b]
    reward = quality + GAMMA * abs(cost - 1)
    # Updated in warm-up too, zero-debiased, before the advantage is formed.
    average = 0.95 * average + 0.05 * reward
    baseline = average / (1 - 0.95 ** (step + 1))
    if step < PHASES.search_start:
      continue
    pi = _softmax(theta)
    one_hot = {'a': np.eye(3)[a], 'b': np.eye(2)[b]}
    # grad log pi = one-hot - pi; the loss is descended.
    gradient = {k: -(reward - baseline) * (one_hot[k] - pi[k]) for k in pi}
    adam_step = adam(gradient)
    # dH / dtheta_k = -pi_k (log pi_k + H), with a rate of its own: Eq. 9 over
    # the progress of training, outside Adam.
    beta = 0.5 * 0.5 * (1 - math.cos(math.pi * step / PHASES.steps))
    for k, p in pi.items():
      own_entropy = -np.sum(p * np.log(p))
      entropy_gradient = -p * (np.log(p) + own_entropy)
      theta[k] = theta[k] - RATE * (adam_step[k] + beta * entropy_gradient)
  found = _run(
    _jitted('paper'),
    [_archs(a=[a], b=[b]) for a, b in choices],
    [[quality] for quality in qualities],
  )
  for k, expected in theta.items():
    np.testing.assert_allclose(found[k], expected, atol=2e-6)


def _default_loss(theta, theta_0, archs, advantages, sigma, p):
  """controller.md's loss at `theta`; what is constant is taken at `theta_0`."""
  pi, pi_0 = _softmax(theta), _softmax(theta_0)

  def standard_deviation(pi):
    variances = [pi[k] @ COSTS[k] ** 2 - (pi[k] @ COSTS[k]) ** 2 for k in pi]
    return math.sqrt(sum(variances))

  w = (1 - math.cos(math.pi * p)) / 2
  sd = w * standard_deviation(pi) + (1 - w) * standard_deviation(pi_0)
  mu = sum(pi[k] @ COSTS[k] for k in pi) - 1
  penalty = mu * math.erf(mu / (sd * math.sqrt(2)))
  penalty += sd * math.sqrt(2 / math.pi) * math.exp(-(mu**2) / (2 * sd**2))
  log_probs = sum(np.log(pi[k])[archs[k]] for k in pi)
  return (
    -np.mean(advantages / sigma * log_probs)
    - GAMMA * 10 ** (p / 2) / sigma * penalty
    + 0.1 * w * _entropy(pi)
  )


def _central_differences(loss, theta, step=1e-5):
  gradient = {k: np.zeros(len(v)) for k, v in theta.items()}
  for k, size in SIZES.items():
    for i, shift in enumerate(step * np.eye(size)):
      above, below = (loss(theta | {k: theta[k] + d}) for d in (shift, -shift))
      gradient[k][i] = (above - below) / (2 * step)
  return gradient


def test_updates_of_the_default_preset_by_hand():
  rng = np.random.default_rng(0)
  steps = 6
  choices = [
    {k: rng.integers(size, size=4) for k, size in SIZES.items()}
    for _ in range(steps)
  ]
  qualities = rng.normal(-2.0, 0.1, (steps, 4))
  theta, adam = dict(LOGITS), _Adam(b1=0.9, b2=0.999)
  average = peak = 0.0
  for step, (archs, q) in enumerate(zip(choices, qualities)):
    # q_m less the mean of the other three is 4/3 of q_m less the mean of all.
    advantages = np.array([q[m] - np.delete(q, m).mean() for m in range(4)])
    average = 0.99 * average + 0.01 * np.mean(advantages**2)
    sigma = math.sqrt(average / (1 - 0.99 ** (step + 1)))
    if step < PHASES.search_start:
      continue
    peak = max(peak, sigma)
    # To the end of training: 8 - 2 steps.
    p = (step - 2) / 6
    loss = functools.partial(
      _default_loss,
      theta_0=theta,
      archs=archs,
      advantages=advantages,
      sigma=max(sigma, 0.1 * peak),
      p=p,
    )
    adam_step = adam(_central_differences(loss, theta))
    theta = {k: theta[k] - RATE * 10**p * adam_step[k] for k in theta}
  found = _run(
    _jitted('default'),
    [_archs(**archs) for archs in choices],
    qualities,
  )
  for k, expected in theta.items():
    np.testing.assert_allclose(found[k], expected, atol=1e-5)


def test_the_advantage_scale_does_not_fall_below_a_tenth_of_its_peak():
  controller = _jitted('default')
  archs = _archs(a=[0, 1, 2, 0], b=[0, 1, 0, 1])
  qualities = jnp.array([1e-4, 2e-4, 3e-4, 4e-4])
  moments = {}
  for scale in (0.3, 0.1, 1e-3):
    # After many updates the average is unbiased, and one more hardly moves it.
    state = controller.init(_policy()).replace(
      average=jnp.float32(scale**2 / 0.99),
      peak=jnp.float32(1.0),
      count=jnp.int32(10_000),
    )
    after, _ = controller.update(state, archs, qualities, jnp.int32(2))
    assert after.peak == 1
    moments[scale] = policy_lib.unstack(after.opt_state.mu)['a']
  # At p = 0 the entropy has no weight, so the gradient goes with 1 / scale.
  np.testing.assert_allclose(moments[0.1], 3 * moments[0.3], rtol=1e-4)
  np.testing.assert_allclose(moments[1e-3], moments[0.1], rtol=1e-4)


# What a search must and must not do.


@pytest.mark.parametrize('preset', PRESETS)
@pytest.mark.parametrize('step', [0, PHASES.search_start - 1, PHASES.freeze])
def test_outside_the_search_nothing_is_learnt(preset, step):
  controller = _jitted(preset)
  before = controller.init(_policy())
  archs = controller.propose(before, jax.random.key(0), jnp.int32(step))
  qualities = jnp.linspace(0.1, 0.7, controller.samples)
  after, _ = controller.update(before, archs, qualities, jnp.int32(step))
  _assert_equal(after.policy, before.policy)
  _assert_equal(after.opt_state, before.opt_state)
  # But the baseline, or the scale, is measured.
  assert after.count == 1
  assert after.average != 0


@pytest.mark.parametrize('preset', PRESETS)
@pytest.mark.parametrize('bad', [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize('seen', [0, 3])
def test_a_quality_that_is_not_finite_teaches_nothing(preset, bad, seen):
  controller = _jitted(preset)
  archs = _archs(a=[0, 1, 2, 0][: controller.samples], b=[0, 1, 1, 0])
  archs = {k: v[: controller.samples] for k, v in archs.items()}
  qualities = jnp.linspace(-1.0, -0.4, controller.samples)
  state, step = controller.init(_policy()), jnp.int32(3)
  for _ in range(seen):
    state, _ = controller.update(state, archs, qualities, step)
  all_bad, metrics = controller.update(state, archs, 0 * qualities + bad, step)
  assert metrics['dropped'] == controller.samples
  if preset == 'paper' and seen:
    # The mean of the rewards stays where it was.
    unbiased = (s.average / (1 - 0.95**s.count) for s in (state, all_bad))
    np.testing.assert_allclose(*unbiased, rtol=1e-5)
  one_bad, metrics = controller.update(
    all_bad, archs, qualities.at[0].set(bad), step
  )
  assert metrics['dropped'] == 1
  for leaf in jax.tree.leaves((one_bad, metrics)):
    assert np.isfinite(leaf).all()
  # Of four, the others still teach.
  same = np.array_equal(one_bad.policy['b'], all_bad.policy['b'])
  assert preset == 'paper' or not same


@pytest.mark.parametrize('preset', PRESETS)
def test_at_the_first_search_step_something_is_learnt(preset):
  controller = _jitted(preset)
  before = controller.init(_policy())
  qualities = jnp.linspace(0.1, 0.7, controller.samples)
  step = jnp.int32(PHASES.search_start)
  archs = controller.propose(before, jax.random.key(0), step)
  # A baseline of one reward is that reward; the second one differs.
  state, _ = controller.update(before, archs, qualities, step - 1)
  after, _ = controller.update(state, archs, qualities + 0.1, step)
  for k in LOGITS:
    assert np.all(after.policy[k] != before.policy[k])


LONG = schedules.Phases(steps=400, act_start=0, search_start=20, freeze=390)


def _search(controller, quality, logits, key, phases=LONG):
  """Runs all steps in one scan; returns the last state and the entropies."""

  def one_step(state, step):
    archs = controller.propose(state, jax.random.fold_in(key, step), step)
    qualities = jax.vmap(quality)(archs)
    state, metrics = controller.update(state, archs, qualities, step)
    return state, metrics['entropy']

  steps = jnp.arange(phases.steps)
  return jax.lax.scan(one_step, controller.init(logits), steps)


@functools.partial(jax.jit, static_argnums=0)
def _search_at_constant_cost(preset, gain):
  """Searches where only the second format of `a` has a gain, if any."""
  controller = _make(preset, LONG, lambda choices: jnp.float32(1.0))

  def quality(arch):
    return gain * arch['a'][1]

  return _search(controller, quality, _policy(), jax.random.key(0))


@pytest.mark.parametrize('preset', PRESETS)
def test_a_constant_reward_makes_entropy_fall(preset):
  # Only the entropy term acts, and its sign shows.
  _, entropy = _search_at_constant_cost(preset, 0.0)
  searched = entropy[LONG.search_start : LONG.freeze]
  assert np.all(np.diff(searched) <= 1e-6)
  assert searched[-1] < 0.75 * searched[0]


@pytest.mark.parametrize('preset', PRESETS)
def test_a_better_format_gains_probability(preset):
  # The first format starts ahead, and is found where nothing is gained.
  probabilities = {}
  for gain in (0.0, 0.1):
    state, _ = _search_at_constant_cost(preset, gain)
    probabilities[gain] = policy_lib.probabilities(state.policy)['a']
  assert np.argmax(probabilities[0.0]) == 0
  assert probabilities[0.1][1] > 0.9


# Three decisions that the target couples: each alone would take its dearest
# format, and together those cost 1.8 C_T.
QUALITY = np.array([[0.0, 0.10, 0.14], [0.0, 0.02, 0.03], [0.0, 0.05, 0.16]])
COST = np.array([[0.1, 0.4, 0.7], [0.1, 0.3, 0.5], [0.1, 0.3, 0.6]])
TINY_GAMMA = -0.4


def _tiny_optimum():
  """Returns the best of the 27 rewards' architectures, and the margin."""
  rewards = {}
  for arch in itertools.product(range(3), repeat=3):
    quality = sum(QUALITY[i, k] for i, k in enumerate(arch))
    cost = sum(COST[i, k] for i, k in enumerate(arch))
    rewards[arch] = quality - abs(TINY_GAMMA) * abs(cost - 1)
  best, second = sorted(rewards.values())[:-3:-1]
  return max(rewards, key=rewards.get), best - second


@pytest.mark.parametrize(
  ('preset', 'steps'), [('paper', 3000), ('default', 500)]
)
def test_a_search_finds_the_optimum_of_a_tiny_problem(preset, steps):
  phases = schedules.phases(steps, 0.0, 0.25, 0.95)

  def total(table, choices):
    return sum(
      jnp.sum(choices[str(i)] * jnp.float32(row)) for i, row in enumerate(table)
    )

  controller = _make(
    preset, phases, functools.partial(total, COST), gamma=TINY_GAMMA
  )
  logits = {str(i): jnp.zeros(3) for i in range(3)}
  run = jax.vmap(
    lambda key: (
      _search(
        controller, functools.partial(total, QUALITY), logits, key, phases
      )[0].policy
    )
  )
  policies = jax.jit(run)(jax.random.split(jax.random.key(0), 8))
  found = np.stack([np.argmax(policies[str(i)], -1) for i in range(3)], -1)
  best, margin = _tiny_optimum()
  assert margin > 0.03
  np.testing.assert_array_equal(found, np.tile(best, (8, 1)))


@pytest.mark.parametrize('preset', PRESETS)
def test_the_update_compiles_once(preset):
  controller = _make(preset)
  traces = []

  @jax.jit
  def one_step(state, step):
    traces.append(step)
    archs = controller.propose(state, jax.random.key(0), step)
    qualities = jnp.arange(controller.samples) * 0.1
    return controller.update(state, archs, qualities, step)

  state = controller.init(_policy())
  for step in range(PHASES.steps):  # Warm-up, search and freeze.
    state, _ = one_step(state, jnp.int32(step))
  assert len(traces) == 1


@pytest.mark.parametrize('preset', PRESETS)
def test_metrics_are_those_of_the_samples_and_of_the_new_policy(preset):
  controller = _jitted(preset)
  m = controller.samples
  # Costs 0.6 and, for the others of `default`, 1.6.
  archs = _archs(a=[0] + [2] * (m - 1), b=[0] + [1] * (m - 1))
  qualities = jnp.full(m, 0.25)
  state = controller.init(_policy())
  state, metrics = controller.update(state, archs, qualities, jnp.int32(3))
  costs = np.array([0.6] + [1.6] * (m - 1))
  pi = policy_lib.probabilities(state.policy)
  expected = dict(
    quality=0.25,
    sampled_cost=costs.mean(),
    reward=0.25 + GAMMA * np.abs(costs - 1).mean(),
    cost=_relative_cost(pi),
    entropy=policy_lib.entropy(state.policy),
    dropped=0.0,
  )
  assert metrics.keys() == expected.keys()
  for name, value in expected.items():
    np.testing.assert_allclose(metrics[name], value, rtol=1e-5)
