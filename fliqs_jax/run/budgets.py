"""Budgets of a run: the target of one cost, and caps of others."""

from collections.abc import Mapping, Sequence
import contextlib
import math
import re
from typing import Any

import ml_collections

from fliqs_jax.run.configs import checks
from fliqs_jax.space import allocation
from fliqs_jax.space import cost_model
from fliqs_jax.space import search_space

# The values of `cost.bound`: the cost is at most the target, or near it.
AT_MOST, NEAR = 'at_most', 'near'
# Distances from the target that are tried for `near`, in this order.
_SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
# Relative tolerance with which a cost target is compared with the lowest and
# the highest cost: all of them are float32 sums.
_TOLERANCE = 1e-6


def solved(
  space: search_space.SearchSpace,
  scores: Mapping[str, Any],
  budget: allocation.Budget,
  caps: Sequence[allocation.Budget],
  bound: str,
) -> dict[str, Any]:
  """Returns the architecture of the least scores at `cost.bound`.

  Args:
    space: the decisions of a model.
    scores: {decision: [K]}, more is worse.
    budget: the target.
    caps: limits of other costs, which hold for each bound.
    bound: `at_most` or `near`.

  Raises:
    ValueError: a score is not finite, or no architecture is within the bound.
  """
  if bound == AT_MOST:
    return allocation.solve(space, scores, [budget, *caps])
  *shares, last = _SHARES
  for share in shares:
    near = allocation.near(budget.cost, budget.target, share)
    with contextlib.suppress(ValueError):
      return allocation.solve(space, scores, [near, *caps])
  near = allocation.near(budget.cost, budget.target, last)
  return allocation.solve(space, scores, [near, *caps])


def caps(
  keys: ml_collections.ConfigDict, space: search_space.SearchSpace
) -> tuple[allocation.Budget, ...]:
  """Returns the budgets that `cost.caps` names.

  Args:
    keys: the `cost` section of a config.
    space: the decisions of a model.

  Raises:
    ValueError: an entry is no `KIND=NUMBER` or `KIND=NUMBERxFORMAT`, its cost
      is limited twice, no architecture is within it, or none is within all.
  """
  found: dict[str, allocation.Budget] = {}
  for entry in keys.caps:
    with checks.named('cost.caps', entry):
      kind, budget = _cap(entry, space)
      if kind in (keys.kind, *found):
        raise ValueError(f'{kind} is limited twice; limit it once')
      least, _ = allocation.bounds(space, budget.cost)
      if least > budget.target * (1 + _TOLERANCE) and not space.is_fixed:
        raise ValueError(
          f'it cannot be met: {budget.target:.6g} {budget.cost.unit} are '
          f'allowed, and the cheapest network costs {least:.6g}'
        )
      found[kind] = budget
  budgets = tuple(found.values())
  if len(budgets) > 1 and not space.is_fixed:
    _check_together(space, budgets)
  return budgets


def _cap(
  entry: str, space: search_space.SearchSpace
) -> tuple[str, allocation.Budget]:
  kind, equals, limit = entry.rpartition('=')
  match = re.fullmatch(r'([0-9.]+(?:[eE][+-]?\d+)?)(?:x(\w+))?', limit.strip())
  if not equals or match is None:
    raise ValueError(
      'it must be KIND=NUMBER, in the unit of the cost, or KIND=NUMBERxFORMAT, '
      'a multiple of the uniform network; for example size=1.5xINT4'
    )
  cost = space.cost(kind)
  try:
    target = float(match[1])
  except ValueError:
    raise ValueError(f'{match[1]} is no number') from None
  if match[2]:
    target *= cost_model.uniform(cost, match[2])
  if not 0 < target < math.inf:
    raise ValueError('the limit must be a finite number above 0')
  return kind, allocation.Budget(cost, target)


def _check_together(
  space: search_space.SearchSpace, budgets: Sequence[allocation.Budget]
) -> None:
  """Raises ValueError if no architecture is within all caps."""
  *others, last = budgets
  least = allocation.least_within(space, last.cost, others)
  if least is None:
    _check_together(space, others)
    return
  if least > last.target * (1 + _TOLERANCE):
    within = ', '.join(
      f'{b.cost.kind} of at most {b.target:.6g} {b.cost.unit}' for b in others
    )
    raise ValueError(
      f'cost.caps exclude each other: with {within} the lowest '
      f'{last.cost.kind} is {least:.6g} {last.cost.unit}, and '
      f'{last.target:.6g} are allowed; raise it to that, or raise the others'
    )


def reported(
  keys: ml_collections.ConfigDict, space: search_space.SearchSpace
) -> tuple[cost_model.Cost, ...]:
  """Returns the costs that `cost.reported` names.

  Args:
    keys: the `cost` section of a config.
    space: the decisions of a model.

  Raises:
    ValueError: a cost is unknown, or has no price for an option.
  """
  costs = []
  for kind in keys.reported:
    with checks.named('cost.reported', kind):
      costs.append(space.cost(kind))
      allocation.bounds(space, costs[-1])
  return tuple(costs)


def target(
  keys: ml_collections.ConfigDict,
  cost: cost_model.Cost,
  space: search_space.SearchSpace,
  limits: Sequence[allocation.Budget] = (),
) -> float:
  """Returns the cost target C_T, in the unit of the cost.

  Args:
    keys: the `cost` section of a config.
    cost: the cost that it names.
    space: the decisions of a model.
    limits: the budgets of `cost.caps`.

  Raises:
    ValueError: a key is wrong, or no network, or only the cheapest one, meets
      the target.
  """
  if keys.bound not in (AT_MOST, NEAR):
    raise ValueError(
      f'cost.bound={keys.bound!r} is unknown; allowed: {AT_MOST}, {NEAR}'
    )
  result = keys.target
  if keys.relative_to:
    with checks.named('cost.relative_to', keys.relative_to):
      result *= cost_model.uniform(cost, keys.relative_to)
  with checks.named('cost.kind', keys.kind):
    least, most = allocation.bounds(space, cost)
  slack = _TOLERANCE * most
  if most - least <= slack and result >= least - slack:
    return result  # Strategies cost nothing.
  if space.is_fixed:
    return result
  relative = f' x {keys.relative_to}' if keys.relative_to else ''
  if not least - slack <= result <= most + slack:
    raise ValueError(
      f'cost.target={keys.target}{relative} = {result:.6g} {cost.unit} cannot '
      f'be reached: the cheapest assignment costs {least:.6g}, the most '
      f'expensive one {most:.6g}'
    )
  if result <= least + slack:
    raise ValueError(
      f'cost.target={keys.target} = {result:.6g} {cost.unit} leaves nothing to '
      'search: only the cheapest network costs no more; raise the target, or '
      'train that network with quant.formats=FORMAT'
    )
  if limits:
    within = allocation.least_within(space, cost, limits)
    if within is None or within > result + slack:
      raise ValueError(
        f'cost.target={keys.target}{relative} = {result:.6g} {cost.unit} and '
        f'cost.caps={list(keys.caps)} exclude each other: the cheapest network '
        f'within the caps costs {within:.6g} {cost.unit}; raise the target to '
        'that, or raise a cap'
      )
  return result
