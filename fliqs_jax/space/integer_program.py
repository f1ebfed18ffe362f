"""Integer program: the best options of decisions within limits of costs.

It knows costs as tables alone, one for each set of decisions that a cost
depends on together. HiGHS solves it to optimality (`scipy.optimize.milp`).
"""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import math
from typing import Any, NamedTuple

import numpy as np
import scipy  # Its modules are imported when they are first used.

Scores = Mapping[str, Any]  # {decision: [K]}


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

  def _constraints(self, slack: float) -> 'scipy.optimize.LinearConstraint':
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
    constraints: 'scipy.optimize.LinearConstraint',
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
