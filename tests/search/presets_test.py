"""Presets: their numbers, and what a config may put in their place."""

import pytest

from fliqs_jax.search import presets
from fliqs_jax.search import schedules


def test_the_paper_s_numbers_are_those_of_a_4():
  # A.4: 4.6e-3 at 30 200 steps, here at a quarter of them: by sqrt(4) more.
  assert presets.search_keys('paper', 7550) == dict(
    preset='paper',
    start=0.25,
    freeze=1.0,
    gamma=-0.1,
    quality='accuracy',
    learning_rate=pytest.approx(9.2e-3),
    entropy_schedule='cosine',
    entropy_beta=0.5,
    scores='',
    scorings=0,
  )


def test_the_default_s_learning_rate_follows_the_steps_of_the_search():
  # Three quarters of 1200 steps are 900: 1 / sqrt(900).
  assert presets.search_keys('default', 1200) == dict(
    preset='default',
    start=0.25,
    freeze=0.95,
    gamma=-0.3,
    quality='cross_entropy',
    learning_rate=pytest.approx(1 / 30),
    entropy_schedule='cosine',
    entropy_beta=0.1,
    scores='',
    scorings=0,
  )


@pytest.mark.parametrize(
  ('preset', 'start', 'freeze', 'scorings'),
  [
    # What docs/results.md was measured with.
    ('sensitivity', 0.3, 0.5, 1),  # Step 300.
    ('edmips', 0.25, 0.75, 0),
    ('dnas', 0.25, 0.75, 0),
    ('dqss', 0.25, 0.75, 0),
  ],
)
def test_searches_without_a_policy_gradient_start_and_end_as_measured(
  preset, start, freeze, scorings
):
  keys = presets.search_keys(preset, 1000)
  assert (keys['start'], keys['freeze']) == (start, freeze)
  assert keys['scorings'] == scorings


def test_options_are_scored_between_a_fifth_and_three_eighths_of_training():
  starts = [
    presets.search_keys('sensitivity', steps)['start']
    for steps in (0, 1, 350, 800, 1200, 1500, 100_000)
  ]
  assert starts == [0.375, 0.375, 0.375, 0.375, 0.25, 0.2, 0.2]
  assert presets.search_keys('sensitivity', 800, sizes=True)['start'] == 0.2


@pytest.mark.parametrize('preset', ['paper', 'default'])
def test_a_weight_of_the_cost_takes_the_place_of_the_preset_s(preset):
  own = presets.search_keys(preset, 100)
  assert presets.search_keys(preset, 100, gamma=-2.0) == own | dict(gamma=-2.0)


@pytest.mark.parametrize('preset', ['sensitivity', 'edmips', 'dnas'])
def test_a_weight_that_nothing_reads_is_refused(preset):
  with pytest.raises(ValueError, match='search.gamma=-2.0 would change nothi'):
    presets.search_keys(preset, 100, gamma=-2.0)


def test_what_a_preset_cannot_have_is_refused():
  phases = schedules.phases(100, 0.1, 0.25, 0.95)
  with pytest.raises(ValueError, match="'ours' is unknown; allowed: paper, de"):
    presets.search_keys('ours', 100)
  with pytest.raises(ValueError, match='search keys beta, kind; allowed: gam'):
    presets.make('paper', sum, phases, kind='x', beta=1.0)
  with pytest.raises(ValueError, match="'default' has none"):
    presets.make('default', sum, phases, leave_one_out=True)


def test_sizes_are_scored_earlier_and_by_scores_alone():
  for preset, start in (('sensitivity', 0.2), ('default', 0.25)):
    own = presets.search_keys(preset, 1000)
    with_sizes = presets.search_keys(preset, 1000, sizes=True)
    assert with_sizes == own | dict(start=start)
