"""Passes: the compute of a run, in forward and backward passes of a batch."""

from collections.abc import Mapping
import statistics
from typing import Any, NamedTuple

import ml_collections

from fliqs_jax.run import allocator
from fliqs_jax.search import presets
from fliqs_jax.search import schedules


class Passes(NamedTuple):
  """The compute of a run until its last step.

  Attributes:
    forward: number of forward passes, in training batches.
    backward: number of backward passes, in training batches.
  """

  forward: float
  backward: float


def of_run(content: Mapping[str, Any], result: Mapping[str, Any]) -> Passes:
  """Counts the passes of a finished run.

  A step of training is one pass forward and one backward; one of a branched
  network, which computes every option, is as many as its menus have options,
  in the mean. Architectures that are judged, and options that are scored, are
  forward passes of validation examples. What all runs do after their last step
  is not counted.

  Args:
    content: content of config.json.
    result: content of result.json.
  """
  config = ml_collections.ConfigDict(content)
  steps = config.train.steps
  options = [len(d['options']) for d in result['decisions'].values()]
  if all(count == 1 for count in options):
    return Passes(steps, steps)
  keys = config.search
  branches = 1.0
  if presets.PRESETS[keys.preset].mix == 'branched':
    branches = statistics.fmean(options)
  valid_share = config.data.valid_batch_size / config.data.batch_size
  judged = 0.0
  if _judges(config):
    judged += steps * valid_share
  # The dearest network, whose outputs are the reference, and each other option.
  networks = 1 + sum(options) - len(options)
  judged += keys.scorings * allocator.BATCHES * networks * valid_share
  return Passes(steps * branches + judged, steps * branches)


def _judges(config: Any) -> bool:
  """Returns whether each step judges architectures on a validation batch."""
  keys = config.search
  phases = schedules.phases(
    config.train.steps, config.quant.act_start, keys.start, keys.freeze
  )
  controller = presets.make(
    keys.preset,
    lambda choices: 1.0,
    phases,
    gamma=keys.gamma,
    learning_rate=keys.learning_rate,
    entropy_schedule=keys.entropy_schedule,
    entropy_beta=keys.entropy_beta,
  )
  return controller.judges
