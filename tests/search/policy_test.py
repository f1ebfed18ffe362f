"""Policies: sampling has the promised law; log-probability and entropy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fliqs_jax.search import policy as policy_lib

# Two decisions, of three and two formats.
PROBABILITIES = {'a': [0.5, 0.3, 0.2], 'b': [0.9, 0.1]}
POLICY = {name: jnp.log(jnp.array(p)) for name, p in PROBABILITIES.items()}
_sample = jax.jit(policy_lib.sample, static_argnums=2)


def _one_hot(index, size):
  return jnp.eye(size)[index]


def _chi_square(counts, expected):
  return np.sum((counts - expected) ** 2 / expected)


def test_probabilities_are_the_softmax_of_the_logits():
  # Logits are free up to a constant: log p + 3 gives p again.
  shifted = jax.tree.map(lambda logits: logits + 3, POLICY)
  for policy in (POLICY, shifted):
    found = policy_lib.probabilities(policy)
    for name, expected in PROBABILITIES.items():
      np.testing.assert_allclose(found[name], expected, rtol=1e-6)


@pytest.mark.parametrize('sizes', [(3,), (3, 6, 16), (2,) * 53])
def test_entropy_of_a_uniform_policy_is_the_sum_of_log_k(sizes):
  policy = [jnp.full(k, 0.7) for k in sizes]
  expected = sum(math.log(k) for k in sizes)
  assert float(policy_lib.entropy(policy)) == pytest.approx(expected, rel=1e-6)


def test_entropy_is_minus_the_sum_of_p_log_p():
  expected = -sum(p * math.log(p) for ps in PROBABILITIES.values() for p in ps)
  assert float(policy_lib.entropy(POLICY)) == pytest.approx(expected, rel=1e-6)


def test_of_a_logit_that_is_nan_nothing_is_picked():
  logits = {'a': jnp.array([0.0, np.nan, 1.0]), 'b': jnp.array([-np.inf, 0.0])}
  picked = policy_lib.argmax(logits)
  assert np.isnan(picked['a']).all()
  np.testing.assert_array_equal(picked['b'], [0, 1])


def test_entropy_of_a_settled_policy_is_zero_and_has_a_finite_gradient():
  # exp(-200) is 0 in float32, and 0 log 0 must be 0.
  policy = {'a': jnp.array([200.0, 0.0, 0.0])}
  value, gradient = jax.value_and_grad(policy_lib.entropy)(policy)
  assert value == 0
  np.testing.assert_array_equal(gradient['a'], 0)


def test_log_prob_is_the_sum_of_the_log_probabilities_of_the_choices():
  arch = {'a': _one_hot(1, 3), 'b': _one_hot(0, 2)}
  expected = math.log(0.3) + math.log(0.9)
  assert float(policy_lib.log_prob(POLICY, arch)) == pytest.approx(expected)


def test_the_gradient_of_log_prob_is_the_choice_minus_the_probabilities():
  arch = {'a': _one_hot(1, 3), 'b': _one_hot(0, 2)}
  gradient = jax.grad(policy_lib.log_prob)(POLICY, arch)
  np.testing.assert_allclose(gradient['a'], [-0.5, 0.7, -0.2], rtol=1e-6)
  np.testing.assert_allclose(gradient['b'], [0.1, -0.1], rtol=1e-5)


def test_argmax_is_the_likeliest_format_of_every_decision():
  policy = {'a': jnp.array([0.0, 2.0, 1.0]), 'b': jnp.array([-1.0, -2.0])}
  found = policy_lib.argmax(policy)
  np.testing.assert_array_equal(found['a'], [0, 1, 0])
  np.testing.assert_array_equal(found['b'], [1, 0])


def test_samples_are_one_hot_in_the_tree_of_the_policy():
  policy = {'x': {'format': jnp.zeros(3)}, 'y': [jnp.zeros(1), jnp.zeros(16)]}
  archs = _sample(policy, jax.random.key(0), 5)
  assert jax.tree.structure(archs) == jax.tree.structure(policy)
  for arch, logits in zip(jax.tree.leaves(archs), jax.tree.leaves(policy)):
    assert arch.shape == (5, *logits.shape)
    np.testing.assert_array_equal(np.sort(arch, axis=-1)[:, :-1], 0)
    np.testing.assert_array_equal(arch.sum(axis=-1), 1)


def test_sample_frequencies_match_the_probabilities():
  n = 20_000
  archs = _sample(POLICY, jax.random.key(0), n)
  # 99.9 % points of chi-square with K - 1 degrees of freedom.
  for name, limit in (('a', 13.8), ('b', 10.8)):
    counts = np.sum(archs[name], axis=0)
    expected = n * np.array(PROBABILITIES[name])
    assert _chi_square(counts, expected) < limit


def test_decisions_and_samples_are_drawn_independently():
  n = 20_000
  uniform = {name: jnp.zeros(3) for name in 'abc'}
  archs = _sample(uniform, jax.random.key(1), n)
  pairs = (
    (archs['a'], archs['b']),
    (archs['b'], archs['c']),
    (archs['a'][:-1], archs['a'][1:]),  # One sample and the next.
  )
  for left, right in pairs:
    counts = left.T @ right  # [3, 3] of joint choices.
    # 99.9 % point with 9 - 1 degrees of freedom.
    assert _chi_square(counts, len(left) / 9) < 26.1


def test_a_format_of_probability_zero_is_never_drawn():
  policy = {'a': jnp.array([-jnp.inf, 0.0, -jnp.inf, 0.0, -jnp.inf])}
  archs = _sample(policy, jax.random.key(0), 1000)
  drawn = set(np.argmax(archs['a'], axis=-1).tolist())
  assert drawn == {1, 3}


def test_a_key_names_its_samples():
  one, same, other = (
    _sample(POLICY, jax.random.key(seed), 100) for seed in (3, 3, 4)
  )
  np.testing.assert_array_equal(one['a'], same['a'])
  assert np.any(one['a'] != other['a'])


def test_a_stacked_tree_has_an_array_for_each_number_of_options():
  tree = {'a': jnp.arange(3.0), 'b': [jnp.arange(2.0), jnp.ones(3)]}
  stacked = policy_lib.stack(tree)
  assert {k: array.tolist() for k, array in stacked.arrays.items()} == {
    3: [[0, 1, 2], [1, 1, 1]],
    2: [[0, 1]],
  }
  back = policy_lib.unstack(stacked)
  assert jax.tree.structure(back) == jax.tree.structure(tree)
  for ours, theirs in zip(jax.tree.leaves(back), jax.tree.leaves(tree)):
    np.testing.assert_array_equal(ours, theirs)


def test_a_stacked_policy_has_the_values_of_its_tree():
  arch = {'a': _one_hot(1, 3), 'b': _one_hot(0, 2)}
  policy, chosen = policy_lib.stack(POLICY), policy_lib.stack(arch)
  assert float(policy_lib.log_prob(policy, chosen)) == pytest.approx(
    math.log(0.3 * 0.9), rel=1e-6
  )
  assert float(policy_lib.entropy(policy)) == pytest.approx(
    float(policy_lib.entropy(POLICY)), rel=1e-6
  )
  for name, p in PROBABILITIES.items():
    found = policy_lib.unstack(policy_lib.probabilities(policy))[name]
    np.testing.assert_allclose(found, p, rtol=1e-6)
    found = policy_lib.unstack(policy_lib.argmax(policy))[name]
    np.testing.assert_array_equal(found, _one_hot(0, len(p)))
