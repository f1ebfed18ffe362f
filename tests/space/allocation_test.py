"""The exact solver against brute force, and the budgets that cannot be met."""

import itertools

import flax.linen as nn
import jax
import numpy as np
import pytest

import fliqs_jax as fliqs
from fliqs_jax.models import mobilenet_v2
from fliqs_jax.space import allocation
from fliqs_jax.space import sizes as sizes_lib

_INTEGERS = ('INT2', 'INT3', 'INT4', 'INT8')


class _Net(nn.Module):
  """Dense layers of the given widths."""

  spec: fliqs.QuantSpec
  widths: tuple[int, ...]

  @nn.compact
  def __call__(self, x, train=False):
    for width in self.widths:
      x = fliqs.QuantDense(width, spec=self.spec)(x)
    return x


def _space(*widths, **fields):
  spec = fliqs.QuantSpec(**fields)
  example = jax.ShapeDtypeStruct((1, 8), np.float32)
  return fliqs.find_decisions(_Net(spec, widths), example, spec=spec)


def _scores(space, seed=0):
  rng = np.random.default_rng(seed)
  return {
    d.name: np.sort(rng.exponential(size=len(d.labels)))[::-1]
    for d in space.decisions
  }


def _total(scores, choices):
  return sum(float(scores[name] @ choices[name]) for name in scores)


def _brute_force(space, scores, budgets):
  """The least sum of scores over all architectures within the budgets."""
  totals = []
  for index in itertools.product(
    *(range(len(d.labels)) for d in space.decisions)
  ):
    choices = space.at(dict(zip((d.name for d in space.decisions), index)))
    if all(budget.admits(choices) for budget in budgets):
      totals.append(_total(scores, choices))
  return min(totals)


@pytest.mark.parametrize('relative', [0.6, 1.0, 1.7])
def test_six_layers_of_four_formats_equal_brute_force(relative):
  space = _space(24, 16, 16, 12, 8, 10, formats=_INTEGERS)
  cost = space.cost('bops')
  budget = allocation.Budget(cost, relative * fliqs.uniform_cost(cost, 'INT4'))
  scores = _scores(space)
  choices = allocation.solve(space, scores, [budget])
  assert budget.admits(choices)
  np.testing.assert_allclose(
    _total(scores, choices), _brute_force(space, scores, [budget]), rtol=1e-9
  )
  greedy = allocation.greedy(space, scores, [budget])
  assert budget.admits(greedy)
  assert _total(scores, greedy) >= _total(scores, choices) - 1e-9


@pytest.mark.parametrize('relative', [0.6, 1.7, 3.0, 3.6])
def test_scores_of_very_different_sizes_equal_brute_force(relative):
  # From 1 to 1e-12: the solver's own tolerance is 1e-6 of the largest.
  space = _space(24, 16, 16, 12, 8, 10, formats=_INTEGERS)
  cost = space.cost('bops')
  budget = allocation.Budget(cost, relative * fliqs.uniform_cost(cost, 'INT4'))
  rng = np.random.default_rng(3)
  scores = {
    d.name: 10.0 ** (-3.0 * np.arange(4) - 3.0 * rng.random(4))
    for d in space.decisions
  }
  choices = allocation.solve(space, scores, [budget])
  np.testing.assert_allclose(
    _total(scores, choices), _brute_force(space, scores, [budget]), rtol=1e-5
  )


@pytest.mark.parametrize('relative', [0.5, 0.8, 1.3])
def test_products_of_two_decisions_of_a_layer_are_exact(relative):
  space = _space(8, 4, 6, 3, formats=('INT2', 'INT4', 'INT8'), mode='separate')
  bops, size = space.cost('bops'), space.cost('size')
  budgets = [
    allocation.Budget(bops, relative * fliqs.uniform_cost(bops, 'INT4')),
    allocation.Budget(size, fliqs.uniform_cost(size, 'INT4')),
  ]
  scores = _scores(space, seed=1)
  choices = allocation.solve(space, scores, budgets)
  assert all(budget.admits(choices) for budget in budgets)
  np.testing.assert_allclose(
    _total(scores, choices), _brute_force(space, scores, budgets), rtol=1e-9
  )


def test_a_group_is_one_variable():
  space = _space(
    8, 8, 8, formats=('INT4', 'INT8'), groups=(('pair', 'QuantDense_[01]'),)
  )
  assert [d.name for d in space.formats] == ['pair', 'QuantDense_2']
  cost = space.cost('bops')
  # 64 MACs a layer: 16 x 64 at INT4, 64 x 64 at INT8. The budget pays for one
  # layer at INT8: the pair would be two, whatever it is worth.
  budget = allocation.Budget(cost, (64 + 16 + 16) * 64 / 1e9)
  scores = {'pair': [9.0, 0.0], 'QuantDense_2': [1.0, 0.0]}
  choices = allocation.solve(space, scores, [budget])
  assert space.assignment(choices) == {
    'QuantDense_0': ('INT4', 'INT4'),
    'QuantDense_1': ('INT4', 'INT4'),
    'QuantDense_2': ('INT8', 'INT8'),
  }


def test_tables_of_terms_add_up_to_the_cost_where_sizes_are_open():
  spec = fliqs.QuantSpec(formats='int_s')
  model = mobilenet_v2.MobileNetV2(
    num_classes=10,
    conv=fliqs.with_spec(fliqs.QuantConv, spec),
    dense=fliqs.with_spec(fliqs.QuantDense, spec),
    sizes=sizes_lib.Sizes((0.5, 1.0), (3, 5), 'masked'),
  )
  example = jax.ShapeDtypeStruct((1, 128, 128, 3), np.float32)
  space = fliqs.find_decisions(model, example, spec=spec, train=False)
  rng = np.random.default_rng(0)
  for kind in ('bops', 'size'):
    cost = space.cost(kind)
    terms = allocation.terms(space, cost)
    for _ in range(3):
      chosen = {
        d.name: int(rng.integers(len(d.labels))) for d in space.decisions
      }
      np.testing.assert_allclose(
        terms.cost(chosen), cost(space.at(chosen)), rtol=1e-6
      )


def test_equal_scores_take_what_the_budget_pays_for():
  space = _space(8, 8, formats=('INT4', 'INT8'))
  cost = space.cost('bops')
  budget = allocation.Budget(cost, (64 + 16) * 64 / 1e9)
  zero = {d.name: [0.0, 0.0] for d in space.decisions}
  choices = allocation.solve(space, zero, [budget])
  np.testing.assert_allclose(cost(choices), budget.target, rtol=1e-6)


def test_near_keeps_to_both_sides_of_the_target():
  space = _space(24, 16, 16, 12, 8, 10, formats=_INTEGERS)
  cost = space.cost('bops')
  target = fliqs.uniform_cost(cost, 'INT4')
  worthless = {d.name: np.zeros(4) for d in space.decisions}
  for d in space.decisions:
    worthless[d.name][3] = 1.0  # INT8 is the worst.
  choices = allocation.solve(
    space, worthless, [allocation.near(cost, 1.5 * target, 0.01)]
  )
  assert abs(float(cost(choices)) / (1.5 * target) - 1) <= 0.01


@pytest.mark.parametrize('method', [allocation.solve, allocation.greedy])
def test_a_budget_below_the_cheapest_names_it(method):
  space = _space(8, 8, formats=('INT4', 'INT8'))
  cost = space.cost('bops')
  # The cheapest: 2 layers x 64 MACs x 16 = 2048 bit operations.
  with pytest.raises(ValueError, match='2e-06 GBOPs allowed.*costs 2.048e-06'):
    method(space, _scores(space), [allocation.Budget(cost, 2e-6)])


@pytest.mark.parametrize('target', [0, -1.5, np.nan, np.inf])
def test_a_budget_is_a_finite_number(target):
  cost = _space(8, 8, formats=('INT4', 'INT8')).cost('bops')
  with pytest.raises(ValueError, match=f'target={target} must be a finite'):
    allocation.Budget(cost, target)


def test_scores_that_do_not_fit_are_named():
  space = _space(8, 8, formats=('INT4', 'INT8'))
  good = {'QuantDense_0': [1.0, 0.0], 'QuantDense_1': [1.0, 0.0]}
  for bad, message in (
    ({'QuantDense_1': [np.nan, 0.0]}, 'scores of QuantDense_1.*nan'),
    ({'QuantDense_1': [1.0, 0.0, 0.0]}, 'QuantDense_1 has 2 options'),
    ({'other': [1.0, 0.0]}, 'lacks: other'),
  ):
    with pytest.raises(ValueError, match=message):
      allocation.check_scores(space, good | bad)
  with pytest.raises(ValueError, match='no scores for QuantDense_0'):
    allocation.check_scores(space, {'QuantDense_1': [1.0, 0.0]})


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
def test_nothing_is_selected_from_a_policy_that_is_not_finite(bad):
  net = _Net(fliqs.QuantSpec('int_s'), (3,))
  space = fliqs.find_decisions(net, np.zeros((1, 2), np.float32))
  (decision,) = space.decisions
  policy = {decision.name: np.array([0.0, bad, 1.0])}
  with pytest.raises(ValueError, match='the policy of .* is not finite'):
    allocation.likeliest(space, policy)


def test_the_policy_of_another_space_is_refused():
  net = _Net(fliqs.QuantSpec('int_s'), (3,))
  space = fliqs.find_decisions(net, np.zeros((1, 2), np.float32))
  (decision,) = space.decisions
  for policy, message in (
    (
      {decision.name: np.zeros(2)},
      r'logits of the shape \(3,\), and has \(2,\)',
    ),
    ({decision.name: np.zeros(3), 'z': np.zeros(3)}, 'z must .* None, and has'),
    ({}, f'{decision.name} must have .* and has None'),
  ):
    with pytest.raises(ValueError, match=message):
      allocation.likeliest(space, policy)


@pytest.mark.parametrize('target', [np.nan, np.inf, '1', None])
def test_a_target_that_is_no_number_is_refused(target):
  with pytest.raises(ValueError, match=f'target={target!r} must be a finite'):
    fliqs.Budget(lambda choices: 1.0, target)


@pytest.mark.parametrize('lowest', [np.nan, 2.5, '1'])
def test_a_lowest_cost_is_a_number_at_most_the_target(lowest):
  with pytest.raises(ValueError, match=f'lowest={lowest!r} must be .*target=2'):
    fliqs.Budget(lambda choices: 1.0, 2.0, lowest)
