"""Sensitivity tables: scores of a finished run, and what any budget takes.

A table is measured once, at the weights of a run. Every budget of every cost is
then solved from it in a moment, without data. It belongs to these weights: the
hashes in the file refuse those of another run.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import itertools
import math
import pathlib
from typing import Any, NamedTuple

import flax.linen as nn
import numpy as np

from fliqs_jax import models
from fliqs_jax.run import evaluation
from fliqs_jax.run import experiment as experiment_lib
from fliqs_jax.run.configs import checks
from fliqs_jax.run.configs import config as config_lib
from fliqs_jax.run.records import results
from fliqs_jax.runtime import devices as devices_lib
from fliqs_jax.runtime import digests
from fliqs_jax.runtime import files
from fliqs_jax.runtime import versions
from fliqs_jax.search import local_scores
from fliqs_jax.search import sensitivity
from fliqs_jax.space import allocation
from fliqs_jax.space import cost_model
from fliqs_jax.space import decisions as decisions_lib
from fliqs_jax.space import search_space
from fliqs_jax.tasks import fitting

_SCHEMA = 1

# The values of `--method`: each returns an architecture within its budgets.
METHODS = {'exact': allocation.solve, 'greedy': allocation.greedy}

# The values of `--scores`.
METRICS = (*sensitivity.METRICS, *local_scores.SEEN)

# The hashes of a table, and what differs where they do.
_HASHED = dict(
  space='another model or other menus',
  data='other data',
  weights='other weights',
)


def check_metric(
  experiment: experiment_lib.Experiment, key: str, metric: str
) -> None:
  """Checks that a metric can score every option of an experiment.

  Args:
    experiment: parts of a run.
    key: the flag that names the metric, for the message.
    metric: one of `METRICS`.

  Raises:
    ValueError: the metric is unknown, does not suit the task or does not see a
      decision.
  """
  if metric not in METRICS:
    raise ValueError(
      f'{key}={metric} is unknown; allowed: {", ".join(METRICS)}'
    )
  fitting.check_scores(experiment.config, key, metric)
  if metric in local_scores.SEEN:
    with checks.named(key, metric):
      local_scores.SEEN[metric](experiment.space)


def measure(
  run: evaluation.RestoredRun, metric: str = 'fisher', batches: int = 8
) -> dict[str, Any]:
  """Returns the content of sensitivity.json: a score for every option.

  One decision at a time leaves the dearest architecture, for which the running
  statistics are settled first. The scores are means over validation batches,
  with the weights that the run serves, zero at the dearest option; a negative
  one stays as it is, and is counted.

  Args:
    run: a finished run with an open decision.
    metric: one of `METRICS`.
    batches: the number of validation batches, at least 1.

  Raises:
    ValueError: the metric is unknown or does not see a decision, `batches` is
      below 1, the run has no open decision, or a score is not finite (the
      decision is named).
  """
  experiment, state, _ = run
  space = experiment.space
  check_metric(experiment, '--scores', metric)
  if batches < 1:
    raise ValueError(f'--batches={batches} must be at least 1')
  if space.is_fixed:
    raise ValueError(
      'every decision of this run has one option, so there is nothing to '
      'score; use a run with a menu of formats, such as quant.formats=int_s'
    )
  devices = devices_lib.one_device(experiment.config)
  dearest = space.dearest()
  settled = evaluation.served(experiment, state, dearest, devices)
  examples = experiment.streams.valid(experiment.phases.steps)
  scores = scorer(experiment, metric, devices)(
    {'params': state.served_params, **settled.statistics},
    list(devices.feed(itertools.islice(examples, batches))),
  )
  allocation.check_scores(space, scores)
  return dict(
    schema=_SCHEMA,
    versions=versions.versions(),
    metric=metric,
    batches=batches,
    hashes=hashes(run),
    negative=sensitivity.regular(space, scores)[1],
    costs={
      kind: _range(space, space.cost(kind))
      for kind, rules in cost_model.KINDS.items()
      if not (rules.is_per_weight and space.open_sizes)
    },
    decisions={
      d.name: dict(
        kind=d.kind,
        options=list(d.labels),
        anchor=d.labels[_anchor(d, scores[d.name])],
        scores=scores[d.name].tolist(),
      )
      for d in space.decisions
    },
  )


def scorer(
  experiment: experiment_lib.Experiment,
  metric: str,
  devices: devices_lib.Devices,
) -> Callable[[Mapping[str, Any], Sequence[Any]], sensitivity.Scores]:
  """Returns the function `(variables, batches) -> scores` of a metric.

  Args:
    experiment: parts of a run.
    metric: one of `METRICS`.
    devices: devices among which each batch is split.

  Raises:
    ValueError: the metric does not see a decision.
  """
  apply, loss = experiment.model.apply, experiment.task.loss(0.0)
  if metric == 'error':
    return local_scores.error(apply, experiment.space)
  if metric == 'hessian':
    plain = models.construct(
      experiment.config.model,
      experiment.streams.num_classes,
      dtype=experiment.config.train.dtype,
      conv=nn.Conv,
      dense=nn.Dense,
    )
    return local_scores.hessian(apply, plain.apply, loss, experiment.space)
  return sensitivity.scorer(
    apply,
    sensitivity.METRICS[metric](loss),
    experiment.space,
    devices.jit_everywhere,
    experiment.reference,
  )


def _anchor(decision: decisions_lib.Decision, scores: np.ndarray) -> int:
  """Returns the option that others are scored against; its score is zero."""
  zeros = np.flatnonzero(scores == 0).tolist()
  return decision.dearest if decision.dearest in zeros else zeros[0]


def hashes(run: evaluation.RestoredRun) -> dict[str, str]:
  """Returns the hashes of the space, the data settings and the weights.

  Args:
    run: a finished run.
  """
  experiment, state, _ = run
  space, config = experiment.space, experiment.config.to_dict()
  data = {
    # As if empty, its default, so that tables made there fit everywhere.
    key: '' if f'data.{key}' in config_lib.FREE else value
    for key, value in config['data'].items()
  }
  parts = dict(
    space=dict(
      options={d.name: d.labels for d in space.decisions},
      leaves={d.name: d.leaves for d in space.decisions},
      ops=[(op.path, op.shape.macs, op.shape.weights) for op in space.ops],
    ),
    data=dict(data, seed=config['seed']),
    weights=digests.digests(digests.named_leaves(state.served_params)),
  )
  return {name: results.config_hash(part) for name, part in parts.items()}


def read(
  path: str | pathlib.Path, run: evaluation.RestoredRun
) -> dict[str, Any]:
  """Returns the content of a sensitivity.json that belongs to a run.

  Args:
    path: path of the file.
    run: the finished run with which it was measured.

  Raises:
    ValueError: the file cannot be read, is no sensitivity.json, has a score
      that is not finite, or was measured with another model, with other data
      or with other weights.
  """
  try:
    content = files.read_json(path)
    stored = {name: content['hashes'][name] for name in _HASHED}
    raw = raw_scores(content)
  except OSError as error:
    raise ValueError(
      f'{path} cannot be read: {error.strerror}; write it with '
      'python -m fliqs_jax.sensitivity WORKDIR'
    ) from None
  except (ValueError, KeyError, TypeError, AttributeError):
    raise ValueError(
      f'{path} is no sensitivity.json: it must have "hashes" and "decisions", '
      'each decision with "scores"; write it with '
      'python -m fliqs_jax.sensitivity WORKDIR'
    ) from None
  own = hashes(run)
  if other := [_HASHED[name] for name in _HASHED if stored[name] != own[name]]:
    raise ValueError(
      f'{path} was measured with {" and ".join(other)}; measure this run with '
      'python -m fliqs_jax.sensitivity WORKDIR'
    )
  allocation.check_scores(run.experiment.space, raw)
  return content


def raw_scores(content: Mapping[str, Any]) -> sensitivity.Scores:
  """Returns {decision: [K] float64} of a table, as measured.

  Negative scores are among them; `sensitivity.regular` removes the noise.

  Args:
    content: content of a sensitivity.json.
  """
  return {
    name: np.asarray(decision['scores'], np.float64)
    for name, decision in content['decisions'].items()
  }


def at_target(
  experiment: experiment_lib.Experiment,
  target: float,
  relative_to: str = '',
  kind: str = '',
) -> experiment_lib.Experiment:
  """Returns the experiment with another cost target.

  It serves for costs and for the content of an arch.json (`results.arch`); its
  config and controller stay as they are.

  Args:
    experiment: parts of a run.
    target: the target, in the unit of the cost or a multiple.
    relative_to: the format of the uniform network that `target` multiplies;
      empty: none.
    kind: a key of `cost_model.KINDS`; empty: that of the config.

  Raises:
    ValueError: the target is no finite number above zero, or the format or the
      kind is unknown.
  """
  if not 0 < target < math.inf:
    raise ValueError(f'--target={target} must be a finite number above 0')
  cost = experiment.space.cost(kind or experiment.cost.kind)
  if relative_to:
    target *= cost_model.uniform(cost, relative_to)
  return dataclasses.replace(experiment, cost=cost, target=target)


class Allocated(NamedTuple):
  """An architecture that was allocated from scores.

  Attributes:
    choices: {decision: [K] one-hot}.
    score: the sum of its scores, without noise (`sensitivity.regular`).
    cost: its cost, in the unit of the experiment's cost.
    target: the budget, in the same unit.
  """

  choices: dict[str, np.ndarray]
  score: float
  cost: float
  target: float


def allocate(
  experiment: experiment_lib.Experiment,
  raw: sensitivity.Scores,
  method: str = 'exact',
) -> Allocated:
  """Returns an architecture that costs at most the experiment's target.

  Args:
    experiment: parts of a run; `at_target` sets another target or cost.
    raw: {decision: [K]} scores as measured; `sensitivity.regular` is applied.
    method: `exact`, the least sum of scores, or `greedy`.

  Raises:
    ValueError: the method is unknown, scores are missing or not finite, or the
      target is below the cost of the cheapest architecture.
  """
  if method not in METHODS:
    raise ValueError(
      f'--method={method} is unknown; allowed: {", ".join(METHODS)}'
    )
  scores, _ = sensitivity.regular(experiment.space, raw)
  budget = allocation.Budget(experiment.cost, experiment.target)
  budgets = [budget, *experiment.caps]
  choices = METHODS[method](experiment.space, scores, budgets)
  return Allocated(
    choices,
    sum(float(scores[name] @ one_hot) for name, one_hot in choices.items()),
    float(experiment.cost_of(choices)),
    experiment.target,
  )


def front(
  experiment: experiment_lib.Experiment,
  raw: sensitivity.Scores,
  count: int,
  method: str = 'exact',
) -> list[Allocated]:
  """Returns the architectures of evenly spaced budgets, cheapest first.

  The targets are even in the logarithm of the cost, from the cheapest to the
  dearest architecture.

  Args:
    experiment: parts of a run; its target is not used.
    raw: {decision: [K]} scores as measured; `sensitivity.regular` is applied.
    count: the number of budgets, at least 2.
    method: as in `allocate`.

  Raises:
    ValueError: as in `allocate`, or `count` is below 2.
  """
  if count < 2:
    raise ValueError(f'--front={count} must be at least 2')
  targets = np.geomspace(
    *allocation.bounds(experiment.space, experiment.cost), count
  )
  return [
    allocate(dataclasses.replace(experiment, target=float(t)), raw, method)
    for t in targets
  ]


def _range(
  space: search_space.SearchSpace, cost: cost_model.Cost
) -> dict[str, Any]:
  cheapest, dearest = allocation.bounds(space, cost)
  return dict(unit=cost.unit, cheapest=cheapest, dearest=dearest)
