"""Statistics of a network besides its weights: seen, profiled, settled.

They are thresholds of activations and, where the model has it, batch norm.
"""

from collections.abc import Iterator, Mapping
import functools
import itertools
import logging
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fliqs_jax import data
from fliqs_jax.run import experiment as experiment_lib
from fliqs_jax.runtime import devices as devices_lib
from fliqs_jax.search import calibration
from fliqs_jax.search import policy as policy_lib
from fliqs_jax.search import train_state
from fliqs_jax.search import train_step

_LOG = logging.getLogger(__name__)

# Batches of a profile. Table 10c: from 5 on, their number does not matter.
_PROFILED = 10
# Least number of examples in which strategies find thresholds; EasyQuant takes
# about 50, and its search takes most of the time.
_CALIBRATED = 32
# Examples, or pixels, of a batch by which statistics are settled, and the
# largest number of training batches that make one.
_SETTLED, _MOST_JOINED = 1024, 16


def observed(
  experiment: experiment_lib.Experiment,
  state: train_state.TrainState,
  devices: devices_lib.Devices,
) -> train_state.TrainState:
  """Returns the state with statistics of a trained network's activations.

  Args:
    experiment: parts of a run whose weights are frozen.
    state: state before the first step.
    devices: devices among which each batch is split.
  """
  settle = devices.jit_everywhere(
    train_step.settle_step(experiment.model.apply, frozen=True)
  )
  arch = experiment.space.expand(experiment.space.dearest())
  model_state = train_step.in_phase(state.model_state, False)
  batches = itertools.islice(experiment.streams.train(0), _PROFILED)
  for batch in devices.feed(batches):
    model_state = settle(state.params, model_state, arch, batch, state.key)
  model_state = train_step.in_phase(model_state, True)
  return state.replace(model_state=model_state)


def profiled(
  experiment: experiment_lib.Experiment,
  state: train_state.TrainState,
  devices: devices_lib.Devices,
) -> train_state.TrainState:
  """Returns the state with clipping multiples of each layer's activations.

  Args:
    experiment: parts of the run.
    state: state before step `quant.act_start`.
    devices: devices among which each batch is split.
  """
  policy = jax.device_get(state.search_state.policy)
  variables = {
    'params': state.params,
    'arch': experiment.space.expand(policy_lib.argmax(policy)),
    **state.model_state,
  }
  batches = itertools.islice(
    experiment.streams.train(experiment.phases.act_start), _PROFILED
  )
  stats = calibration.profiled_clips(
    experiment.model.apply,
    experiment.space,
    variables,
    map(data.model_inputs, devices.feed(batches)),
    experiment.spec.act_threshold,
    devices.jit_everywhere,
  )
  stats = jax.device_put(stats, devices.everywhere)
  return state.replace(model_state={**state.model_state, 'quant_stats': stats})


@functools.lru_cache(maxsize=2)
def _strategy_step(model: nn.Module, devices: devices_lib.Devices) -> Any:
  """Returns the jitted `calibration.strategy_step`; it is long to compile.

  It tries hundreds of thresholds, so it is compiled well even for a run of few
  steps: its second call regains the time.
  """
  step = calibration.strategy_step(model.apply)
  return jax.jit(step, out_shardings=devices.everywhere)


class Calibrator:
  """Finds the thresholds of strategies."""

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

  def __call__(
    self, state: train_state.TrainState, step: int
  ) -> train_state.TrainState:
    """Returns the state with the thresholds for what it trains on.

    Args:
      state: state before the step.
      step: number of the step.
    """
    experiment = self._experiment
    policy = jax.device_get(state.search_state.policy)
    model, choices = experiment.model, policy_lib.argmax(policy)
    if experiment.is_relaxed and step < experiment.phases.freeze:
      model = experiment.step_model
      choices = policy_lib.probabilities(policy)
    found = self.found(state.params, state.model_state, choices, model, step)
    return state.replace(model_state=found)

  def found(
    self,
    params: Any,
    model_state: Mapping[str, Any],
    choices: Mapping[str, Any],
    model: nn.Module,
    step: int,
  ) -> Mapping[str, Any]:
    """Returns the collections with the thresholds that strategies find.

    Args:
      params: the parameters.
      model_state: the model's collections but the parameters.
      choices: {decision: [K]}, which the layers before have.
      model: the network.
      step: the training batches from this step on are read.
    """
    batches = _joined(self._experiment, step, _CALIBRATED)
    batch = next(self._devices.feed(batches))
    arch = self._experiment.space.expand(choices)
    _LOG.info('before step %d: thresholds of strategies', step)
    find = _strategy_step(model, self._devices)
    return find(params, model_state, arch, batch)

  def warn(self, state: train_state.TrainState) -> None:
    """Logs which operands are too small for the strategy `kl`."""
    space, model = self._experiment.space, self._experiment.model
    batch = next(self._devices.feed(_joined(self._experiment, 0, _CALIBRATED)))
    choices = policy_lib.argmax(jax.device_get(state.search_state.policy))
    variables = {
      'params': state.params,
      'arch': space.expand(choices),
      **state.model_state,
    }
    calibration.warn_of_few(model.apply, space, variables, batch)


def settled(
  experiment: experiment_lib.Experiment,
  state: Any,
  choices: Mapping[str, Any],
  devices: devices_lib.Devices,
  model: nn.Module,
) -> Mapping[str, Any]:
  """Returns statistics after `train.settle_batches` batches, weights fixed.

  That is the mean over the second half of the batches. A small training batch
  is joined with the next ones, because its statistics are too noisy. Then
  strategies find their thresholds in the layers' new inputs.

  Args:
    experiment: parts of the run.
    state: `TrainState` of the run, on the devices.
    choices: {decision: [K]}, one-hot unless the model is a relaxed one.
    devices: devices among which each batch is split.
    model: the network.
  """
  settle = devices.jit(
    train_step.settle_step(model.apply, experiment.config.train.frozen)
  )
  arch = experiment.space.expand(choices)
  steps = experiment.phases.steps
  count = experiment.config.train.settle_batches
  batches = devices.feed(_joined(experiment, steps, _SETTLED))
  mean = model_state = state.model_state
  for i in range(count):
    key = jax.random.fold_in(state.key, steps + i)
    model_state = settle(
      state.served_params, model_state, arch, next(batches), key
    )
    seen = i - count // 2
    mean = _averaged(mean, model_state, seen) if seen > 0 else model_state
  if not experiment.spec.has_strategies:
    return mean
  calibrator = Calibrator(experiment, devices)
  return calibrator.found(state.served_params, mean, choices, model, steps)


def _joined(
  experiment: experiment_lib.Experiment, step: int, examples: int
) -> Iterator[Mapping[str, Any]]:
  """Yields training batches from a step on, small ones joined to larger ones.

  They have at least so many examples, if that takes at most `_MOST_JOINED`
  training batches: the forward pass needs no more memory than training then.
  Where outputs are pictures, each pixel is an example.
  """
  pixels = math.prod(experiment.streams.label.shape[:-1])
  size = experiment.config.data.batch_size * pixels
  number = min(math.ceil(examples / size), _MOST_JOINED)
  batches = iter(experiment.streams.train(step))
  while True:
    parts = list(itertools.islice(batches, number))
    yield jax.tree.map(lambda *rows: np.concatenate(rows), *parts)


@jax.jit
def _averaged(mean: Any, new: Any, seen: Any) -> Any:
  """Returns the mean of `seen` values and a new one; of integers the new one.

  What does not change, such as an infinite threshold, stays bit for bit.
  """

  def averaged(mean: jax.Array, new: jax.Array) -> jax.Array:
    if not jnp.issubdtype(new.dtype, jnp.floating):
      return new
    return jnp.where(new == mean, new, mean + (new - mean) / (seen + 1))

  return jax.tree.map(averaged, mean, new)
