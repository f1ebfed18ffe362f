"""Costs of a finished network: what limits allow, and where chips gain."""

from collections.abc import Mapping
import contextlib
from typing import Any

from fliqs_jax.run import experiment as experiment_lib
from fliqs_jax.space import cost_model
from fliqs_jax.space.chips import chip as chip_lib
from fliqs_jax.space.chips import prices

# The uniform networks whose costs stand beside that of the found one.
_UNIFORM = ('INT4', 'INT8', 'E4M3', 'BF16')
# Prices are float32 sums.
_TOLERANCE = 1e-6


def costs(
  experiment: experiment_lib.Experiment, choices: Mapping[str, Any]
) -> list[dict[str, Any]]:
  """Returns a row for the target, each cap and each of `cost.reported`.

  A row has `kind`, `unit`, `value`, `limit` (None: none), `bound` (`at_most`,
  `near`; empty: none) and `uniform`, {format: cost of the uniform network}, of
  the formats that the cost prices. That of a chip has `chip`, its name,
  `batch`, the number of inputs that it is of, and `layers`, see `_layers`.

  Args:
    experiment: parts of the run.
    choices: {decision: [K] one-hot}.
  """
  bound = experiment.config.cost.bound
  limits = [(experiment.cost, experiment.target, bound)]
  limits += [(cap.cost, cap.target, 'at_most') for cap in experiment.caps]
  limits += [(cost, None, '') for cost in experiment.reported]
  return [
    dict(
      kind=cost.kind,
      unit=cost.unit,
      value=float(cost(choices)),
      limit=limit,
      bound=bound,
      uniform=_uniform(cost),
      **_of_chip(experiment, cost, choices),
    )
    for cost, limit, bound in limits
  ]


def _uniform(cost: cost_model.Cost) -> dict[str, float]:
  result = {}
  for name in _UNIFORM:
    with contextlib.suppress(ValueError):  # The chip has no price for it.
      result[name] = cost_model.uniform(cost, name)
  return result


def _of_chip(
  experiment: experiment_lib.Experiment,
  cost: cost_model.Cost,
  choices: Mapping[str, Any],
) -> dict[str, Any]:
  chip = cost.rules.chip
  if chip is None:
    return {}
  return dict(
    chip=chip.name,
    batch=chip.batch,
    layers=_layers(chip, experiment, choices),
  )


def _layers(
  chip: chip_lib.Chip,
  experiment: experiment_lib.Experiment,
  choices: Mapping[str, Any],
) -> list[dict[str, Any]]:
  """Returns what each layer costs on a chip.

  A row has `path`, `value`, `weights` and `activations`, in which the chip
  multiplies, `confidence`, and `gains`: whether the formats of the layer cost
  less than those in which the chip multiplies them, or are the same.
  """
  leaves = experiment.space.leaves(choices)
  rows = []
  for op in experiment.space.ops:
    counts, *formats = prices.chosen(op, leaves)
    price = prices.price(chip, counts, *formats)
    used = price.weights, price.activations
    wider = prices.price(chip, counts, *used).value
    narrower = any(u.bits > f.bits for u, f in zip(used, formats))
    rows.append(
      dict(
        path=op.path,
        value=price.value,
        weights=price.weights.name,
        activations=price.activations.name,
        confidence=price.confidence,
        gains=not narrower or price.value < wider * (1 - _TOLERANCE),
      )
    )
  return rows
