"""Baselines: architectures that need no search, by hand or by chance."""

from collections.abc import Sequence
import math

import numpy as np

from fliqs_jax.space import allocation
from fliqs_jax.space import cost_model
from fliqs_jax.space import search_space

# Bits of the manual assignment, the paper's INT4*.
_ENDS, _REST = 8, 4
# A random architecture costs at least this share of its target.
_LEAST_SHARE = 0.99
_DRAWS = 64
_REPAIRS = 10_000
_BISECTIONS = 60


def manual(space: search_space.SearchSpace) -> allocation.Choices:
  """Returns the architecture with a precise first and last layer.

  The first and the last quantized layer, in the order of calls, have the
  dearest format of at most 8 bits, every other one the cheapest of at least 4
  bits. If a menu has no such format, the nearest in bits is taken. Sizes are
  the published ones.

  Args:
    space: the decisions of a model.

  Raises:
    ValueError: no layer is quantized.
  """
  ops = [op for op in space.ops if op.shape.format_leaves()]
  if not ops:
    raise ValueError('no layer is quantized, so there is no manual assignment')
  decision_of = space.decision_of
  ends = {
    decision_of[op.leaf(name)]
    for op in (ops[0], ops[-1])
    for name in op.shape.format_leaves()
  }
  chosen = {}
  for d in space.formats:
    bits = [(f.bits, f.mantissa_bits) for f in d.menu]
    if d.name in ends:
      allowed = [b for b in bits if b[0] <= _ENDS]
      best = max(allowed) if allowed else min(bits)
    else:
      allowed = [b for b in bits if b[0] >= _REST]
      best = min(allowed) if allowed else max(bits)
    chosen[d.name] = bits.index(best)
  chosen |= {d.name: d.size.published for d in space.open_sizes}
  return space.at(chosen)


def random_at_cost(
  space: search_space.SearchSpace,
  cost: cost_model.Cost,
  target: float,
  rng: np.random.Generator,
  caps: Sequence[allocation.Budget] = (),
) -> allocation.Choices:
  """Returns a random architecture that costs the target, or up to 1 % less.

  Options are drawn with `probabilities_at_cost`. If none of 64 draws costs 99
  to 100 % of the target, single options of the last one are drawn anew, cheaper
  ones above the target and dearer ones below, until one does; after many, the
  dearest architecture within the target is returned. With caps, it is the one
  of the least sum of random scores if no draw is within all limits.

  Args:
    space: the decisions of a model.
    cost: one of its costs.
    target: the highest cost, in the unit of `cost`.
    rng: source of the draws.
    caps: limits of other costs.

  Raises:
    ValueError: no architecture costs so little.
  """
  least, _ = allocation.bounds(space, cost)
  highest = target * (1 + allocation.TOLERANCE)
  if least > highest:
    raise ValueError(
      f'no architecture costs at most {target:.6g} {cost.unit}: the cheapest '
      f'costs {least:.6g}; raise the target'
    )
  terms = allocation.terms(space, cost)
  probabilities = probabilities_at_cost(space, cost, target)
  chosen = {d.name: 0 for d in space.decisions}
  for _ in range(_DRAWS):
    chosen = {
      name: rng.choice(len(p), p=p) for name, p in probabilities.items()
    }
    if _LEAST_SHARE * target <= terms.cost(chosen) <= highest:
      found = space.at(chosen)
      if all(cap.admits(found) for cap in caps):
        return found
  if caps:
    scores = {d.name: rng.random(len(d.labels)) for d in space.decisions}
    budgets = [allocation.Budget(cost, target), *caps]
    return allocation.solve(space, scores, budgets)
  best, best_cost = chosen, math.inf
  for _ in range(_REPAIRS):
    now = terms.cost(chosen)
    if now <= highest and (best_cost > highest or now > best_cost):
      best, best_cost = chosen, now
      if now >= _LEAST_SHARE * target:
        break
    d = space.decisions[rng.integers(len(space.decisions))]
    other = {**chosen, d.name: int(rng.integers(len(d.labels)))}
    change = terms.cost(other) - now
    if change < 0 if now > highest else change > 0:
      chosen = other
  return space.at(best)


def probabilities_at_cost(
  space: search_space.SearchSpace, cost: cost_model.Cost, target: float
) -> dict[str, np.ndarray]:
  """Returns {decision: [K] probabilities} whose expected cost is the target.

  p_l(f) is proportional to exp(-lambda c_l(f) / C_T), where c_l(f) is the cost
  of option f with all other decisions uniformly random; a bisection finds
  lambda. If the target is beyond the reach of lambda, the nearest end is taken.

  Args:
    space: the decisions of a model.
    cost: one of its costs.
    target: the expected cost C_T, in the unit of `cost`.
  """
  even = {d.name: np.full(n := len(d.labels), 1 / n) for d in space.decisions}
  costs = {
    name: np.array([float(cost({**even, name: row})) for row in np.eye(len(p))])
    for name, p in even.items()
  }

  def at(factor: float) -> dict[str, np.ndarray]:
    return {name: _softmax(-factor * c / target) for name, c in costs.items()}

  def expected(factor: float) -> float:
    return float(cost(at(factor)))

  low, high = -1.0, 1.0
  while expected(low) < target and low > -1e9:
    low *= 2
  while expected(high) > target and high < 1e9:
    high *= 2
  for _ in range(_BISECTIONS):
    middle = (low + high) / 2
    low, high = (middle, high) if expected(middle) > target else (low, middle)
  return at((low + high) / 2)


def _softmax(logits: np.ndarray) -> np.ndarray:
  weights = np.exp(logits - logits.max())
  return weights / weights.sum()
