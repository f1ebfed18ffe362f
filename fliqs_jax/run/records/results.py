"""Results of a run as data: arch.json, result.json and pictures.npz."""

from collections.abc import Mapping
import hashlib
import io
import json
from typing import Any

import jax
import numpy as np

from fliqs_jax.run import experiment as experiment_lib
from fliqs_jax.runtime import versions
from fliqs_jax.search import policy as policy_lib
from fliqs_jax.search.controllers import relaxed as relaxed_lib
from fliqs_jax.space import allocation
from fliqs_jax.space import cost_model
from fliqs_jax.space import ops as ops_lib

_SCHEMA = 1
# A decision is settled if its likeliest option has at least this probability.
_SETTLED = 0.9


def config_hash(config: Mapping[str, Any]) -> str:
  """Returns a hash of a config's content, 16 hex digits."""
  text = json.dumps(config, sort_keys=True, default=list)
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def arch(
  experiment: experiment_lib.Experiment, choices: Mapping[str, Any]
) -> dict[str, Any]:
  """Returns the content of arch.json.

  Args:
    experiment: parts of the run.
    choices: {decision: [K] one-hot}.
  """
  config = experiment.config.to_dict()
  assigned = experiment.space.assignment(choices)
  return dict(
    schema=_SCHEMA,
    versions=versions.versions(),
    config_hash=config_hash(config),
    model=config['model'],
    mode=experiment.spec.mode,
    cost=dict(
      kind=experiment.cost.kind,
      value=float(experiment.cost_of(choices)),
      target=experiment.target,
      unit=experiment.cost.unit,
    ),
    sizes=experiment.space.sizes(choices),
    layers={
      path: dict(weights=weights, activations=activations)
      for path, (weights, activations) in assigned.items()
    },
  )


def packed(pictures: Mapping[str, np.ndarray]) -> bytes:
  """Returns the content of pictures.npz, of `evaluation.pictures`."""
  file = io.BytesIO()
  np.savez_compressed(file, **pictures)
  return file.getvalue()


def measurements(
  experiment: experiment_lib.Experiment,
  choices: Mapping[str, Any],
  sums: Mapping[str, np.ndarray],
) -> dict[str, Any]:
  """Returns the test metrics and the costs of one architecture.

  Args:
    experiment: parts of the run.
    choices: {decision: [K] one-hot}.
    sums: {name: sum over the test split}, of the task's `measure`.
  """

  def cost(kind: str) -> float:
    return float(experiment.space.cost(kind)(choices))

  return dict(
    **experiment.task.summarize(sums),
    cost=float(experiment.cost(choices)),
    cost_target=experiment.target,
    unit=experiment.cost.unit,
    gbops=cost('bops'),
    size_bits=cost('size') * 1e6,
    average_bits=cost('average_bits'),
  )


def layers(
  experiment: experiment_lib.Experiment, choices: Mapping[str, Any]
) -> list[dict[str, Any]]:
  """Returns a row per layer: kind, formats, sizes and cost.

  A row has the sizes `input_channels`, `output_channels` and `kernel` that a
  decision selects; its `decided` names the decision of each.

  Args:
    experiment: parts of the run.
    choices: {decision: [K] one-hot}.
  """
  leaves = experiment.space.leaves(choices)
  assigned = experiment.space.assignment(choices)
  return [
    dict(
      path=op.path,
      kind=op.shape.kind,
      macs=round(float(cost_model.op_macs(op, leaves))),
      params=round(float(cost_model.op_weights(op, leaves))),
      weights=assigned[op.path][0],
      activations=assigned[op.path][1],
      gbops=float(cost_model.op_gbops(op, leaves)),
      cost=float(experiment.cost.of_op(op, leaves)),
      **_sizes(op, leaves),
    )
    for op in experiment.space.ops
  ]


def _sizes(op: ops_lib.Op, leaves: Mapping[str, Any]) -> dict[str, Any]:
  if not op.shape.decided:
    return {}
  counts = {
    name: size.counts[int(np.argmax(leaves[op.leaf(name)]))]
    for name, size in op.shape.decided
  }
  decided = {name: size.decision for name, size in op.shape.decided}
  return dict(counts, decided=decided)


def decisions(
  experiment: experiment_lib.Experiment, policy: Mapping[str, Any]
) -> dict[str, Any]:
  """Returns {decision: kind, options, layers and probabilities}."""
  probabilities = jax.device_get(policy_lib.probabilities(policy))
  layers = {op.path for op in experiment.space.ops}
  return {
    d.name: dict(
      kind=d.kind,
      options=list(d.labels),
      layers=sorted(layers & {leaf.rpartition('/')[0] for leaf in d.leaves}),
      probabilities=[float(p) for p in probabilities[d.name]],
    )
    for d in experiment.space.decisions
  }


def relaxed(search_state: Any) -> dict[str, Any]:
  """Returns what a relaxed search lost when its mixture became one-hot.

  Args:
    search_state: state of the controller at the end, on the host.

  Returns:
    {'relaxed': qualities at the freeze, and their difference}; {} for other
    searches, and for one that is not frozen before the end.
  """
  if not isinstance(search_state, relaxed_lib.RelaxedState):
    return {}
  soft, hard = float(search_state.soft), float(search_state.hard)
  if not np.isfinite(soft - hard):
    return {}
  gap = dict(soft_quality=soft, hard_quality=hard, gap=soft - hard)
  return dict(relaxed=gap)


def scored(
  experiment: experiment_lib.Experiment, search_state: Any
) -> dict[str, Any]:
  """Returns the scores that led to the served architecture.

  Args:
    experiment: parts of the run.
    search_state: state of the controller at the end, on the host.

  Returns:
    {'scored': the metric, the sum over the selected options, and for each
    decision its dearest option and [K] scores}; {} if nothing was scored.
  """
  if not experiment.is_scored:
    return {}
  scores = search_state.scores
  choices = experiment.selected(search_state.policy)
  return dict(
    scored=dict(
      metric=experiment.config.search.scores,
      sum=sum(float(scores[name] @ choices[name]) for name in scores),
      decisions={
        d.name: dict(
          anchor=d.labels[d.dearest],
          scores=[float(score) for score in scores[d.name]],
        )
        for d in experiment.space.decisions
        if len(d.labels) > 1
      },
    )
  )


def warnings(
  experiment: experiment_lib.Experiment, policy: Mapping[str, Any]
) -> list[str]:
  """Returns warnings: of unsettled decisions, and of a missed cost target."""
  if experiment.space.is_fixed:
    return []
  lines = []
  probabilities = jax.device_get(policy_lib.probabilities(policy))
  for name, pi in probabilities.items():
    if pi.max() < _SETTLED:
      lines.append(
        f'{name} had not settled: its likeliest option has probability '
        f'{pi.max():.2f}'
      )
  choices = experiment.selected(policy)
  cost = float(experiment.cost_of(choices))
  error = cost / experiment.target - 1
  least, most = allocation.bounds(experiment.space, experiment.cost)
  if abs(error) > 0.05 and most > least:
    lines.append(
      f'the selected architecture costs {cost:.4g} {experiment.cost.unit}, '
      f'{error:+.1%} of the target {experiment.target:.4g}'
    )
  return lines
