"""Phases, entropy weights and learning rates at their marked points."""

import jax.numpy as jnp
import numpy as np
import pytest

from fliqs_jax.search import schedules


def test_phases_turn_fractions_into_steps_once():
  phases = schedules.phases(1000, 0.15, 0.25, 0.95)
  assert phases == schedules.Phases(1000, 150, 250, 950)
  assert phases.search_steps == 750
  # One step is enough for a run.
  assert schedules.phases(1, 0, 0, 1) == schedules.Phases(1, 0, 0, 1)


def test_progress_of_training_and_of_the_search():
  phases = schedules.Phases(1000, act_start=0, search_start=200, freeze=900)
  steps = jnp.array([0, 100, 200, 600, 900, 1000])
  np.testing.assert_allclose(
    phases.progress(steps), [0, 0.1, 0.2, 0.6, 0.9, 1], rtol=1e-6
  )
  # (step - 200) / (1000 - 200): to the end of training, not to the freeze.
  np.testing.assert_allclose(
    phases.search_progress(steps), [0, 0, 0, 0.5, 0.875, 1], rtol=1e-6
  )


def test_the_policy_learns_from_the_start_of_the_search_up_to_the_freeze():
  phases = schedules.Phases(100, act_start=0, search_start=25, freeze=95)
  steps = jnp.array([0, 24, 25, 94, 95, 99])
  expected = [False, False, True, True, False, False]
  np.testing.assert_array_equal(phases.searching(steps), expected)


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ((0, 0.1, 0.25, 0.95), 'train.steps=0 must be at least 1'),
    ((100, -0.1, 0.25, 0.95), 'quant.act_start=-0.1 must be a fraction'),
    ((100, 0.1, 1.25, 0.95), 'search.start=1.25 must be a fraction'),
    ((100, 0.1, 0.25, 25), 'search.freeze=25 must be a fraction'),
    ((100, 0.3, 0.25, 0.95), 'search.start=0.25 comes before quant.act_start'),
    ((100, 0.1, 0.5, 0.5), 'leave no search step among train.steps=100'),
    ((100, 0.1, 0.9, 0.4), 'leave no search step among train.steps=100'),
    # Both round to step 1 of 2.
    ((2, 0.1, 0.4, 0.6), 'leave no search step among train.steps=2'),
  ],
)
def test_phases_that_cannot_work_are_errors_that_name_the_key(
  arguments, message
):
  with pytest.raises(ValueError, match=message):
    schedules.phases(*arguments)


@pytest.mark.parametrize(
  ('kind', 'expected'),
  [
    # At progress 0, 1/4, 1/2 and 1, times beta. Eq. 9 is (1 - cos(pi s)) / 2;
    # at 1/4 that is (1 - sqrt(1/2)) / 2.
    ('cosine', [0, (1 - 0.5**0.5) / 2, 0.5, 1]),
    ('linear', [0, 0.25, 0.5, 1]),
    ('constant', [1, 1, 1, 1]),
    ('off', [0, 0, 0, 0]),
  ],
)
def test_entropy_weights_at_marked_points(kind, expected):
  weight = schedules.entropy_weight(kind, 0.5)
  found = [weight(p) for p in (0, 0.25, 0.5, 1.0)]
  np.testing.assert_allclose(found, 0.5 * np.array(expected), atol=1e-7)


def test_every_entropy_schedule_is_tested_above():
  assert schedules.ENTROPY == ('cosine', 'linear', 'constant', 'off')


def test_an_unknown_entropy_schedule_is_an_error_that_says_what_is_allowed():
  with pytest.raises(ValueError, match='allowed: cosine, linear, constant'):
    schedules.entropy_weight('exponential', 0.5)


def test_a_negative_entropy_weight_is_an_error():
  # The sign flipped leaves the policy unsettled.
  with pytest.raises(ValueError, match='search.entropy_beta=-0.5 must not be'):
    schedules.entropy_weight('cosine', -0.5)


@pytest.mark.parametrize(
  ('kind', 'expected'),
  [
    # Warm-up over 20 of 100 steps; cosine is half-way down at step 60.
    ('cosine', [0, 0.05, 0.1, 0.05, 0]),
    ('constant', [0, 0.05, 0.1, 0.1, 0.1]),
    # From step 66 on, two thirds.
    ('halved', [0, 0.05, 0.1, 0.1, 0.05]),
  ],
)
def test_learning_rates_at_marked_points(kind, expected):
  rate = schedules.learning_rate(kind, 0.1, 100, 20)
  found = [rate(step) for step in (0, 10, 20, 60, 100)]
  np.testing.assert_allclose(found, expected, atol=1e-7)


@pytest.mark.parametrize(
  ('kind', 'last'), [('cosine', 0), ('halved', 0.05), ('constant', 0.1)]
)
def test_without_warm_up_the_learning_rate_starts_at_its_full_height(
  kind, last
):
  rate = schedules.learning_rate(kind, 0.1, 100, 0)
  found = [rate(step) for step in (0, 100)]
  np.testing.assert_allclose(found, [0.1, last], atol=1e-7)


def test_an_unknown_learning_rate_schedule_is_an_error():
  with pytest.raises(ValueError, match='allowed: cosine, exponential'):
    schedules.learning_rate('linear', 0.1, 100, 0)


def test_branches_learn_together_ever_less_until_the_search_starts():
  phases = schedules.phases(100, 0.1, 0.2, 0.95)
  # A.4: from 1 at the beginning linearly to 0 at the end of the warm-up.
  found = [float(phases.branch_probability(s)) for s in (0, 5, 20, 90)]
  assert found == pytest.approx([1.0, 0.75, 0.0, 0.0])
  # A warm-up of one step is over after it.
  phases = schedules.Phases(100, act_start=0, search_start=1, freeze=95)
  found = [float(phases.branch_probability(s)) for s in (0, 1)]
  assert found == [1.0, 0.0]
