"""Allocation: the architecture with the lowest score within a budget.

Scores say how much each option of each decision costs in quality, as
`search.sensitivity` measures them; they add up over decisions. Costs need not:
a cost that multiplies decisions (weights by activations, formats by channels)
is exact here, too.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import math
from typing import Any

import numpy as np
import scipy

from fliqs_jax.space import cost_model
from fliqs_jax.space import decisions as decisions_lib
from fliqs_jax.space import integer_program
from fliqs_jax.space import search_space

Choices = dict[str, np.ndarray]  # {decision: [K] one-hot}

# Costs are sums of float32, so a target is met up to this relative error.
TOLERANCE = 1e-6


def check_target(target: Any, name: str = 'target') -> None:
  """Raises ValueError if a target is no finite number above 0."""
  try:
    is_target = 0 < target < math.inf
  except TypeError:  # A text, or None.
    is_target = False
  if not is_target:
    raise ValueError(f'{name}={target!r} must be a finite number above 0')


@dataclasses.dataclass(frozen=True)
class Budget:
  """A limit of one cost.

  Attributes:
    cost: the cost of the space.
    target: its highest value, in its unit, a finite number above 0.
    lowest: its lowest value, in its unit, at most the target.

  Raises:
    ValueError: the target is no finite number above 0, or `lowest` no number
      that is at most the target.
  """

  cost: cost_model.Cost
  target: float
  lowest: float = -math.inf

  def __post_init__(self):
    check_target(self.target, 'Budget: target')
    if isinstance(self.lowest, str) or not self.lowest <= self.target:
      raise ValueError(
        f'Budget: lowest={self.lowest!r} must be a number, at most '
        f'target={self.target}'
      )

  def admits(self, choices: Mapping[str, Any]) -> bool:
    """Returns whether an architecture is within the budget."""
    cost = float(self.cost(choices))
    slack = TOLERANCE * abs(self.target)
    return self.lowest - slack <= cost <= self.target + slack


def near(cost: cost_model.Cost, target: float, share: float) -> Budget:
  """Returns the budget of costs within a share of the target, either way."""
  return Budget(cost, target * (1 + share), target * (1 - share))


def check_scores(
  space: search_space.SearchSpace, scores: integer_program.Scores
) -> None:
  """Checks that there is a finite score for every option of a space.

  Raises:
    ValueError: naming the decision.
  """
  for decision in space.decisions:
    if decision.name not in scores:
      raise ValueError(
        f'no scores for {decision.name}; given: {", ".join(scores)}'
      )
    values = np.asarray(scores[decision.name], np.float64)
    if values.shape != (len(decision.labels),):
      raise ValueError(
        f'{decision.name} has {len(decision.labels)} options, but scores of '
        f'shape {values.shape}'
      )
    if not np.isfinite(values).all():
      named = dict(zip(decision.labels, values.tolist()))
      raise ValueError(
        f'the scores of {decision.name} must be finite numbers: {named}; the '
        'network gives no finite loss there'
      )
  if surplus := sorted(set(scores) - {d.name for d in space.decisions}):
    raise ValueError(
      f'scores of decisions that the model lacks: {", ".join(surplus)}'
    )


def solve(
  space: search_space.SearchSpace,
  scores: integer_program.Scores,
  budgets: Sequence[Budget],
) -> Choices:
  """Returns the architecture with the least sum of scores within all budgets.

  An integer program, solved to optimality (HiGHS by `scipy.optimize.milp`). A
  term of a cost that depends on several decisions has a variable for each
  combination of their options, whose sums over the others are the choices; so
  products of decisions are exact. Of architectures with equal scores the
  dearer one is preferred: it uses what the budget leaves.

  Args:
    space: the decisions of a model.
    scores: {decision: [K]} the loss of quality by each option, in any unit.
    budgets: limits of one or several costs of the space.

  Raises:
    ValueError: scores are missing or not finite, or no architecture is within
      all budgets; the message names the lowest cost.
  """
  check_scores(space, scores)
  program = _program(space, budgets)
  # Sums of float32 may exceed a limit that the program's float64 sums meet.
  for slack in (0.5 * TOLERANCE, 0.0, -TOLERANCE):
    chosen = program.solved(scores, slack)
    if chosen is None:
      break
    choices = space.at(chosen)
    if all(budget.admits(choices) for budget in budgets):
      return choices
  raise ValueError(_infeasible(space, budgets))


def bounds(
  space: search_space.SearchSpace, cost: cost_model.Cost
) -> tuple[float, float]:
  """Returns the cost of the cheapest and of the dearest architecture.

  Args:
    space: the decisions of a model.
    cost: one of its costs.
  """
  table, program = terms(space, cost), _program(space, ())
  least, most = program.extreme(table, 1), program.extreme(table, -1)
  assert least is not None
  assert most is not None
  return float(cost(space.at(least))), float(cost(space.at(most)))


def least_within(
  space: search_space.SearchSpace,
  cost: cost_model.Cost,
  budgets: Sequence[Budget],
) -> float | None:
  """Returns the lowest cost of all architectures within budgets.

  Args:
    space: the decisions of a model.
    cost: one of its costs.
    budgets: limits of other costs.

  Returns:
    The cost in its unit; None if no architecture is within all budgets.
  """
  chosen = _program(space, budgets).extreme(terms(space, cost), 1)
  return None if chosen is None else float(cost(space.at(chosen)))


def _program(
  space: search_space.SearchSpace, budgets: Sequence[Budget]
) -> integer_program.Program:
  return integer_program.Program(
    {d.name: len(d.labels) for d in space.decisions},
    [
      integer_program.Limit(
        terms(space, budget.cost), budget.target, budget.lowest
      )
      for budget in budgets
    ],
  )


def likeliest(
  space: search_space.SearchSpace,
  policy: Mapping[str, Any],
  budgets: Sequence[Budget] = (),
) -> Choices:
  """Returns the likeliest architecture of all within the budgets.

  Args:
    space: the decisions of a model.
    policy: {decision: [K]} logits.
    budgets: limits of costs; none: the argmax of the policy.

  Raises:
    ValueError: no architecture is within the budgets, a logit is not finite, or
      the policy is that of another space.
  """
  logits = {name: np.asarray(values) for name, values in policy.items()}
  shapes = {d.name: (len(d.labels),) for d in space.decisions}
  given = {name: values.shape for name, values in logits.items()}
  for name in sorted(shapes.keys() | given.keys()):
    if shapes.get(name) != given.get(name):
      raise ValueError(
        f'the policy is that of another space: {name} must have logits of the '
        f'shape {shapes.get(name)}, and has {given.get(name)}'
      )
  for name, values in logits.items():
    if not np.isfinite(values).all():
      raise ValueError(
        f'the policy of {name} is not finite, so it selects nothing: '
        f'{values.tolist()}; the run has diverged'
      )
  best = space.at(
    {name: int(values.argmax()) for name, values in logits.items()}
  )
  if all(budget.admits(best) for budget in budgets):
    return best
  minus = {name: -scipy.special.log_softmax(v) for name, v in logits.items()}
  return solve(space, minus, budgets)


def greedy(
  space: search_space.SearchSpace,
  scores: integer_program.Scores,
  budgets: Sequence[Budget],
) -> Choices:
  """Returns an architecture within all budgets, found step by step.

  Starts at the dearest options, of several the one of the lowest score, and
  takes, as long as a budget is exceeded, the option that adds the least to the
  scores for what it saves of that cost, of those that exceed no budget that is
  met.

  Args:
    space: the decisions of a model.
    scores: {decision: [K]} the loss of quality by each option, in any unit.
    budgets: upper limits of one or several costs of the space.

  Raises:
    ValueError: scores are missing or not finite, or no step leads within the
      budgets.
  """
  check_scores(space, scores)
  chosen = {d.name: _start(d, scores[d.name]) for d in space.decisions}
  limits = [
    (terms(space, budget.cost), budget.target * (1 + TOLERANCE))
    for budget in budgets
  ]
  for table, limit in limits:
    while (cost := table.cost(chosen)) > limit:
      met = [x for x in limits if x[0].cost(chosen) <= x[1]]
      steps: list[tuple[float, str, Any]] = []
      for d in space.decisions:
        values = np.asarray(scores[d.name], np.float64)
        added = values - values[chosen[d.name]]
        saved = table.saved(d.name, chosen)
        allowed = saved > TOLERANCE * cost
        for other, most in met:
          room = most - other.cost(chosen)
          allowed = allowed & (-other.saved(d.name, chosen) <= room)
        steps += [
          (added[k] / saved[k], d.name, k) for k in np.flatnonzero(allowed)
        ]
      if not steps:
        raise ValueError(_infeasible(space, budgets))
      _, name, k = min(steps)
      chosen[name] = int(k)
  return space.at(chosen)


def terms(
  space: search_space.SearchSpace, cost: cost_model.Cost
) -> integer_program.Terms:
  """Returns a cost as tables: every op at every combination of its options.

  Args:
    space: the decisions of a model.
    cost: one of its costs.
  """
  constant = cost.constant
  tables: dict[tuple[str, ...], np.ndarray] = {}
  options = {d.name: len(d.labels) for d in space.decisions}
  for leaves, of in cost.terms():
    follows = {leaf: cost.decision_of[leaf] for leaf in leaves}
    names = tuple(dict.fromkeys(follows.values()))
    if not names:
      constant += float(of({}))
      continue
    # All combinations at once: the options of each decision lie along an axis.
    one_hots = {
      name: np.eye(options[name])[
        tuple(slice(None) if other == name else None for other in names)
      ]
      for name in names
    }
    table = of({leaf: one_hots[name] for leaf, name in follows.items()})
    shape = tuple(options[name] for name in names)
    tables[names] = tables.get(names, 0.0) + np.broadcast_to(table, shape)
  return integer_program.Terms(constant, tables)


def _start(decision: decisions_lib.Decision, scores: Any) -> int:
  """Returns the option of the lowest score among the most precise ones."""
  ranked = zip(decision.precision, (-float(score) for score in scores))
  return max(enumerate(ranked), key=lambda option: option[1])[0]


def _infeasible(
  space: search_space.SearchSpace, budgets: Sequence[Budget]
) -> str:
  lines = []
  for budget in budgets:
    least, most = bounds(space, budget.cost)
    limit = f'at most {budget.target:.6g}'
    if budget.lowest > -math.inf:
      limit = f'{budget.lowest:.6g} to {budget.target:.6g}'
    lines.append(
      f'{budget.cost.kind}: {limit} {budget.cost.unit} allowed, the cheapest '
      f'architecture costs {least:.6g}, the dearest {most:.6g}'
    )
  return f'no architecture is within the budget: {"; ".join(lines)}'
