"""Architectures without a search: what they hold, and what they cost."""

import flax.linen as nn
import jax
import numpy as np
import pytest

import fliqs_jax as fliqs
from fliqs_jax.space import baselines


class _Net(nn.Module):
  spec: fliqs.QuantSpec
  widths: tuple[int, ...] = (24, 16, 16, 12, 8, 10)

  @nn.compact
  def __call__(self, x, train=False):
    for i, width in enumerate(self.widths):
      x = fliqs.QuantDense(width, spec=self.spec, name=f'l{i}')(x)
    return x


def _space(**fields):
  spec = fliqs.QuantSpec(**fields)
  example = jax.ShapeDtypeStruct((1, 8), np.float32)
  return fliqs.find_decisions(_Net(spec), example, spec=spec)


def _names(space, choices):
  return [pair[0] for pair in space.assignment(choices).values()]


@pytest.mark.parametrize(
  ('formats', 'end', 'rest'),
  [
    ('int_s', 'INT8', 'INT4'),
    (('INT2', 'INT3', 'INT5', 'INT6'), 'INT6', 'INT5'),
    (('INT2', 'INT3'), 'INT3', 'INT3'),
    (('BF16', 'INT3'), 'INT3', 'BF16'),
    # Of 8 bits the format with the longest mantissa.
    ('fp_l', 'E2M5', 'E2M1'),
  ],
)
def test_ends_have_up_to_8_bits_and_the_rest_from_4_bits(formats, end, rest):
  space = _space(formats=formats)
  names = _names(space, baselines.manual(space))
  assert names == [end, rest, rest, rest, rest, end]


def test_an_excluded_layer_is_not_the_first():
  space = _space(formats='int_s', exclude=('l0',))
  names = _names(space, baselines.manual(space))
  assert names == [None, 'INT8', 'INT4', 'INT4', 'INT4', 'INT8']


def test_both_sides_of_the_ends_are_precise():
  space = _space(formats='int_s', mode='separate')
  pairs = list(space.assignment(baselines.manual(space)).values())
  assert pairs[0] == pairs[-1] == ('INT8', 'INT8')
  assert set(pairs[1:-1]) == {('INT4', 'INT4')}


def test_a_network_without_quantized_layers_has_no_manual_assignment():
  with pytest.raises(ValueError, match='no layer is quantized'):
    baselines.manual(_space(exclude=('*',)))


@pytest.mark.parametrize('mode', ['tied', 'separate'])
@pytest.mark.parametrize('relative', [0.6, 1.15, 3.0])
def test_the_expected_cost_is_the_target(mode, relative):
  space = _space(formats=('INT2', 'INT4', 'INT8'), mode=mode)
  cost = space.cost('bops')
  target = relative * fliqs.uniform_cost(cost, 'INT4')
  probabilities = baselines.probabilities_at_cost(space, cost, target)
  np.testing.assert_allclose(float(cost(probabilities)), target, rtol=1e-5)


def test_probabilities_are_exponential_in_the_cost():
  space = _space(formats=('INT2', 'INT4', 'INT8'))
  cost = space.cost('bops')
  target = fliqs.uniform_cost(cost, 'INT4')
  p = baselines.probabilities_at_cost(space, cost, target)['l0']
  # Costs are 4, 16 and 64 times the MACs: log-probabilities have the same
  # distances, 12 to 48.
  falls = -np.diff(np.log(p))
  np.testing.assert_allclose(falls[1] / falls[0], 4, rtol=1e-4)


@pytest.mark.parametrize('seed', range(4))
@pytest.mark.parametrize('relative', [0.6, 1.15, 1.5])
def test_a_random_architecture_costs_at_most_its_target(seed, relative):
  space = _space(formats=('INT2', 'INT3', 'INT4', 'INT8'))
  cost = space.cost('bops')
  target = relative * fliqs.uniform_cost(cost, 'INT4')
  choices = baselines.random_at_cost(
    space, cost, target, np.random.default_rng(seed)
  )
  assert 0.99 * target <= float(cost(choices)) <= target * (1 + 1e-6)


def test_what_no_architecture_costs_is_undercut():
  # MACs are 192, 384, 256, 192, 96 and 80, 1200 in all. INT4 in place of INT2
  # costs 12 for each: at least 960, a fifth of the cheapest network's 4800.
  space = _space(formats=('INT2', 'INT4'))
  cost = space.cost('bops')
  cheapest = fliqs.uniform_cost(cost, 'INT2')
  choices = baselines.random_at_cost(
    space, cost, 1.19 * cheapest, np.random.default_rng(0)
  )
  assert _names(space, choices) == ['INT2'] * 6


def test_the_dearest_within_the_target_is_kept():
  # As above: with 21 % more, the cheapest layer alone may have INT4.
  space = _space(formats=('INT2', 'INT4'))
  cost = space.cost('bops')
  cheapest = fliqs.uniform_cost(cost, 'INT2')
  choices = baselines.random_at_cost(
    space, cost, 1.21 * cheapest, np.random.default_rng(0)
  )
  assert _names(space, choices) == ['INT2'] * 5 + ['INT4']


def test_seeds_differ_and_repeat():
  space = _space(formats=('INT2', 'INT3', 'INT4', 'INT8'))
  cost = space.cost('bops')
  target = fliqs.uniform_cost(cost, 'INT4')

  def drawn(seed):
    rng = np.random.default_rng(seed)
    return _names(space, baselines.random_at_cost(space, cost, target, rng))

  assert drawn(0) == drawn(0)
  assert len({tuple(drawn(seed)) for seed in range(8)}) > 4


def test_a_target_below_the_cheapest_is_refused():
  space = _space(formats=('INT4', 'INT8'))
  cost = space.cost('bops')
  target = 0.9 * fliqs.uniform_cost(cost, 'INT4')
  with pytest.raises(ValueError, match='the cheapest costs'):
    baselines.random_at_cost(space, cost, target, np.random.default_rng(0))
