"""Allocation: the architecture with the lowest score within a budget.

Scores say how much each option of each decision costs in quality, as
`search.sensitivity` measures them; they add up over decisions. Costs need not:
a cost that multiplies decisions (weights by activations, formats by channels)
is exact here, too.
"""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import math
from typing import Any, NamedTuple

import numpy as np
import scipy.optimize
import scipy.sparse
import scipy.special

from fliqs_jax.space import cost_model
from fliqs_jax.space import search_space

Scores = Mapping[str, Any]  # {decision: [K]}
Choices = dict[str, np.ndarray]  # {decision: [K] one-hot}

# Costs are sums of float32, so a target is met up to this relative error.
TOLERANCE = 1e-6


@dataclasses.dataclass(frozen=True)
class Budget:
  """A limit of one cost.

  Attributes:
    cost: the cost of the space.
    target: its highest value, in its unit.
    lowest: its lowest value, in its unit.
  """

  cost: cost_model.Cost
  target: float
  lowest: float = -math.inf

  def admits(self, choices: Mapping[str, Any]) -> bool:
    """Returns whether an architecture is within the budget."""
    cost = float(self.cost(choices))
    slack = TOLERANCE * abs(self.target)
    return self.lowest - slack <= cost <= self.target + slack


def near(cost: cost_model.Cost, target: float, share: float) -> Budget:
  """Returns the budget of costs within a share of the target, either way."""
  return Budget(cost, target * (1 + share), target * (1 - share))


def check_scores(space: search_space.SearchSpace, scores: Scores) -> None:
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
  scores: Scores,
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
  least, most = least_within(space, cost), least_within(space, cost, sign=-1)
  assert least is not None
  assert most is not None
  return least, most


def least_within(
  space: search_space.SearchSpace,
  cost: cost_model.Cost,
  budgets: Sequence[Budget] = (),
  sign: int = 1,
) -> float | None:
  """Returns the lowest cost of all architectures within budgets.

  Args:
    space: the decisions of a model.
    cost: one of its costs.
    budgets: limits of other costs.
    sign: 1 for the lowest cost, -1 for the highest one.

  Returns:
    The cost in its unit; None if no architecture is within all budgets.
  """
  table = terms(space, cost)
  chosen = _program(space, budgets).extreme(table, sign)
  return None if chosen is None else float(cost(space.at(chosen)))


def _program(
  space: search_space.SearchSpace, budgets: Sequence[Budget]
) -> 'Program':
  return Program(
    {d.name: len(d.labels) for d in space.decisions},
    [
      Limit(terms(space, budget.cost), budget.target, budget.lowest)
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
    ValueError: no architecture is within the budgets, or a logit is not finite.
  """
  logits = {name: np.asarray(values) for name, values in policy.items()}
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
  scores: Scores,
  budgets: Sequence[Budget],
) -> Choices:
  """Returns an architecture within all budgets, found step by step.

  Starts at the dearest options and takes, as long as a budget is exceeded, the
  option that adds the least to the scores for what it saves of that cost, of
  those that exceed no budget that is met.

  Args:
    space: the decisions of a model.
    scores: {decision: [K]} the loss of quality by each option, in any unit.
    budgets: upper limits of one or several costs of the space.

  Raises:
    ValueError: scores are missing or not finite, or no step leads within the
      budgets.
  """
  check_scores(space, scores)
  chosen = {d.name: d.dearest for d in space.decisions}
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


@dataclasses.dataclass(frozen=True)
class Terms:
  """A cost as tables: one per set of decisions that it depends on together.

  Attributes:
    constant: the part that no decision changes, in the unit.
    tables: {names of decisions: [K1, K2, ...] cost of each combination}.
  """

  constant: float
  tables: Mapping[tuple[str, ...], np.ndarray]

  def cost(self, chosen: Mapping[str, int]) -> float:
    """Returns the cost of {decision: index of its option}, in the unit."""
    return self.constant + sum(
      float(table[tuple(chosen[name] for name in names)])
      for names, table in self.tables.items()
    )

  def saved(self, decision: str, chosen: Mapping[str, int]) -> np.ndarray:
    """Returns [K] what each option of a decision saves of the cost.

    Args:
      decision: name of the decision.
      chosen: {decision: index of its option} before the change.
    """
    result = np.zeros(())
    for names, table in self.tables.items():
      if decision in names:
        costs = table[
          tuple(slice(None) if n == decision else chosen[n] for n in names)
        ]
        result = result + costs[chosen[decision]] - costs
    return np.atleast_1d(result)


def terms(space: search_space.SearchSpace, cost: cost_model.Cost) -> Terms:
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
  return Terms(constant, tables)


class Limit(NamedTuple):
  """A limit of one cost that is given as tables.

  Attributes:
    terms: the cost.
    target: its highest value, in its unit.
    lowest: its lowest value, in its unit.
  """

  terms: Terms
  target: float
  lowest: float = -math.inf


class Program:
  """The integer program of decisions, and of limits of their costs."""

  def __init__(self, options: Mapping[str, int], limits: Sequence[Limit]):
    """Makes the constraints that no scores change.

    Args:
      options: {decision: number of its options}.
      limits: limits of one or several costs.
    """
    self._options, self._limits = options, limits
    self._first: dict[str, int] = {}
    self._count = 0
    self._rows: list[tuple[list[int], list[float], float, float]] = []
    for name, count in options.items():
      self._first[name] = self._add(count)
      ones = range(self._first[name], self._count)
      self._rows.append((list(ones), [1.0] * len(ones), 1.0, 1.0))
    self._binary = self._count
    self._joint: dict[tuple[str, ...], int] = {}
    self._costs = [list(self._coefficients(limit.terms)) for limit in limits]

  def _add(self, count: int) -> int:
    self._count += count
    return self._count - count

  def _coefficients(self, cost: Terms) -> Iterator[tuple[int, float]]:
    """Yields the variables of a cost and what each adds to it."""
    for names, table in cost.tables.items():
      if len(names) == 1:
        first = self._first[names[0]]
      else:
        first = self._joined(names, table.shape)
      for i, value in enumerate(table.ravel()):
        yield first + i, float(value)

  def _joined(self, names: tuple[str, ...], shape: tuple[int, ...]) -> int:
    """Returns the first variable of the combinations of some decisions."""
    if names in self._joint:
      return self._joint[names]
    first = self._add(math.prod(shape))
    self._joint[names] = first
    numbers = first + np.arange(math.prod(shape)).reshape(shape)
    for axis, name in enumerate(names):
      for k in range(shape[axis]):
        with_k = np.take(numbers, k, axis=axis).ravel().tolist()
        self._rows.append(
          (
            [*with_k, self._first[name] + k],
            [1.0] * len(with_k) + [-1.0],
            0.0,
            0.0,
          )
        )
    return first

  def solved(self, scores: Scores, slack: float = 0.0) -> dict[str, int] | None:
    """Returns {decision: index of its option} at the least sum of scores.

    None if no choice is within the limits.

    Args:
      scores: {decision: [K]}.
      slack: relative error with which a target may be exceeded.
    """
    excess = np.zeros(self._count)
    for name, first in self._first.items():
      values = np.asarray(scores[name], np.float64)
      excess[first : first + len(values)] = values - values.min()
    rows = self._constraints(slack)
    # An option that alone adds more than a known solution is in no better one.
    # Without it the rest is scaled up: the solver sees 1e-6 of the largest
    # score, but scores differ by more than that.
    chosen, largest = None, float(excess.max())
    while True:
      objective = excess / (largest or 1.0)
      for limit, costs in zip(self._limits, self._costs):
        # So small that it decides among equal scores alone.
        for variable, value in costs:
          objective[variable] -= 1e-6 * value / (abs(limit.target) or 1.0)
      found = self._minimum(objective, excess <= largest, rows)
      if found is None:
        return chosen
      chosen = found
      total = sum(excess[self._first[name] + k] for name, k in chosen.items())
      if largest == 0 or total > largest / 8:
        return chosen
      largest = float(total)

  def extreme(self, cost: Terms, sign: int) -> dict[str, int] | None:
    """Returns {decision: index of its option} at the least or most cost.

    None if no choice is within the limits.

    Args:
      cost: the cost.
      sign: 1 for the least, -1 for the most.
    """
    coefficients = list(self._coefficients(cost))
    objective = np.zeros(self._count)
    for variable, value in coefficients:
      objective[variable] += sign * value
    objective /= np.abs(objective).max() or 1.0
    allowed = np.ones(self._count, bool)
    return self._minimum(objective, allowed, self._constraints(0.0))

  def _constraints(self, slack: float) -> scipy.optimize.LinearConstraint:
    rows = list(self._rows)
    for limit, costs in zip(self._limits, self._costs):
      unit, constant = abs(limit.target) or 1.0, limit.terms.constant
      rows.append(
        (
          [variable for variable, _ in costs],
          [value / unit for _, value in costs],
          (limit.lowest - constant) / unit - slack,
          (limit.target - constant) / unit + slack,
        )
      )
    entries = [
      (value, i, variable)
      for i, (variables, values, _, _) in enumerate(rows)
      for variable, value in zip(variables, values)
    ]
    values, *places = map(np.asarray, zip(*entries))
    # Entries at the same place add up.
    matrix = scipy.sparse.csr_array(
      (values, tuple(places)), shape=(len(rows), self._count)
    )
    return scipy.optimize.LinearConstraint(
      matrix, [row[2] for row in rows], [row[3] for row in rows]
    )

  def _minimum(
    self,
    objective: np.ndarray,
    allowed: np.ndarray,
    constraints: scipy.optimize.LinearConstraint,
  ) -> dict[str, int] | None:
    """Returns {decision: index of its option} of the best choice.

    None if there is none.

    Args:
      objective: what each variable adds.
      allowed: whether each variable may be used.
      constraints: the rows of the program.
    """
    binary = np.arange(self._count) < self._binary
    x = scipy.optimize.milp(
      objective,
      integrality=binary.astype(int),
      bounds=scipy.optimize.Bounds(0, np.where(allowed, 1, 0)),
      constraints=constraints,
      options={'mip_rel_gap': 0.0},
    ).x
    if x is None:
      return None
    return {
      name: int(np.argmax(x[first : first + self._options[name]]))
      for name, first in self._first.items()
    }


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
