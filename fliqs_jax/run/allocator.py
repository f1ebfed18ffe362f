"""Allocation within a run: between two steps, on the host.

Before some steps, `Experiment.allocations`, an architecture within the budget
is put into the policy, and the weights train on it from then on. It is a
function of the state and the step, so a run that is killed and started again
allocates the same.
"""

from collections.abc import Mapping
import dataclasses
import itertools
import logging
from typing import Any

import jax
import numpy as np

from fliqs_jax.run import evaluation
from fliqs_jax.run import experiment as experiment_lib
from fliqs_jax.run import sensitivity_table
from fliqs_jax.runtime import devices as devices_lib
from fliqs_jax.search import policy as policy_lib
from fliqs_jax.search import sensitivity
from fliqs_jax.search import train_state
from fliqs_jax.search.controllers import scored

_LOG = logging.getLogger(__name__)

BATCHES = 8  # Of validation images, at each scoring.


class Allocator:
  """Puts an architecture into a state: by scores, or the likeliest one."""

  def __init__(
    self,
    experiment: experiment_lib.Experiment,
    devices: devices_lib.Devices,
  ):
    """Compiles nothing yet.

    Args:
      experiment: parts of the run.
      devices: devices among which each batch is split.
    """
    self._experiment, self._devices = experiment, devices
    if experiment.is_scored:
      metric = experiment.config.search.scores
      self._score = sensitivity_table.scorer(experiment, metric, devices)

  def __call__(
    self, state: train_state.TrainState, step: int
  ) -> train_state.TrainState:
    """Returns the state with an architecture in its policy.

    Args:
      state: state before the step.
      step: number of the step.

    Raises:
      ValueError: a score is not finite; the decision is named.
    """
    experiment = self._experiment
    if experiment.is_scored:
      scores = self._scores(state, step)
      choices = experiment.allocate(scores)
      search_state = scored.allocated(choices, scores)
    else:
      policy = jax.device_get(state.search_state.policy)
      choices = experiment.selected(policy)
      search_state = dataclasses.replace(
        state.search_state,
        policy=_settled(policy, choices),
        **self._gap(state, policy, choices),
      )
    _LOG.info(
      'before step %d: allocated %.4g of %.4g %s',
      step,
      float(experiment.cost_of(choices)),
      experiment.target,
      experiment.cost.unit,
    )
    search_state = jax.device_put(search_state, self._devices.everywhere)
    return state.replace(search_state=search_state)

  def _gap(
    self,
    state: train_state.TrainState,
    policy: Mapping[str, Any],
    choices: Mapping[str, Any],
  ) -> dict[str, jax.Array]:
    """Returns what a relaxed search remembers: two qualities; {} if sampled."""
    experiment, devices = self._experiment, self._devices
    if not experiment.is_relaxed:
      return {}
    mixture = policy_lib.probabilities(policy)
    soft, hard = (
      evaluation.served(experiment, state, each, devices, model).quality
      for each, model in (
        (mixture, experiment.step_model),
        (choices, experiment.model),
      )
    )
    _LOG.info(
      '%s of the mixture %.4f, of the architecture %.4f: a gap of %.4f',
      experiment.config.search.quality,
      soft,
      hard,
      soft - hard,
    )
    return dict(soft=np.float32(soft), hard=np.float32(hard))

  def _scores(
    self, state: train_state.TrainState, step: int
  ) -> sensitivity.Scores:
    batches = self._experiment.streams.valid(step)
    raw = self._score(
      {'params': state.params, **state.model_state},
      self._devices.feed(itertools.islice(batches, BATCHES)),
    )
    scores, negative = sensitivity.regular(self._experiment.space, raw)
    _LOG.info(
      'before step %d: scored %d options of %d decisions; %d scores below zero '
      'count as zero',
      step,
      sum(map(len, scores.values())),
      len(scores),
      negative,
    )
    return scores


def _settled(policy: Mapping[str, Any], choices: Mapping[str, Any]) -> Any:
  """Returns the policy, settled where another option was chosen."""
  return {
    name: logits
    if np.argmax(logits) == np.argmax(choices[name])
    else policy_lib.settled(choices[name])
    for name, logits in policy.items()
  }
