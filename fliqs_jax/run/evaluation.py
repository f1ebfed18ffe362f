"""Evaluation of one architecture with the weights of a run.

The running statistics are first settled for the architecture; then the test
split is read. A finished run is restored from its last checkpoint.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
import functools
import itertools
import pathlib
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from fliqs_jax.run import experiment as experiment_lib
from fliqs_jax.run import statistics as statistics_lib
from fliqs_jax.run.configs import config as config_lib
from fliqs_jax.run.records import results
from fliqs_jax.runtime import devices as devices_lib
from fliqs_jax.runtime import restoring
from fliqs_jax.runtime import workdir as workdir_lib
from fliqs_jax.search import train_step
from fliqs_jax.space import arch_file
from fliqs_jax.tasks import super_resolution

# Batches of the validation split on which a quality is measured.
_BATCHES = 8
# Test pictures that are kept, evenly spaced: crops of one picture are next to
# each other.
_PICTURES = 4


class Served(NamedTuple):
  """Statistics of one architecture, and how good it is with them.

  Attributes:
    statistics: the model's collections but the parameters.
    quality: quality on the validation split.
  """

  statistics: Mapping[str, Any]
  quality: float


def served(
  experiment: experiment_lib.Experiment,
  state: Any,
  choices: Mapping[str, Any],
  devices: devices_lib.Devices,
  model: nn.Module | None = None,
) -> Served:
  """Returns the statistics with which an architecture is served.

  Of those that training left and of settled ones, those with the better
  quality. Where many activations are equal, such as the background of an image,
  a small shift rounds all of them another way; settled statistics that saw both
  ways fit neither.

  Args:
    experiment: parts of the run.
    state: `TrainState` of the run, on the devices.
    choices: {decision: [K]}, one-hot unless the model is a relaxed one.
    devices: devices among which each batch is split.
    model: network that is measured; None: that of the experiment.
  """
  model = model or experiment.model
  evaluate = _evaluation(experiment, state, choices, devices, model)

  def measured(statistics: Mapping[str, Any]) -> Served:
    batches = itertools.islice(experiment.streams.valid(0), _BATCHES)
    qualities = map(
      jax.device_get, evaluate(statistics, batches, experiment.quality)
    )
    return Served(statistics, float(np.mean(list(qualities))))

  moved = measured(
    statistics_lib.settled(experiment, state, choices, devices, model)
  )
  trained = measured(state.model_state)
  # A quality that is not finite is never better.
  return trained if trained.quality > moved.quality else moved


def test_metrics(
  experiment: experiment_lib.Experiment,
  state: Any,
  choices: Mapping[str, Any],
  statistics: Mapping[str, Any],
  devices: devices_lib.Devices,
) -> dict[str, Any]:
  """Returns the metrics of the test split, and the costs, of an architecture.

  Args:
    experiment: parts of the run.
    state: last `TrainState` of the run, on the devices.
    choices: {decision: [K] one-hot}.
    statistics: the model's collections but the parameters, `settled` ones.
    devices: devices among which each batch is split.
  """
  evaluate = _evaluation(experiment, state, choices, devices, experiment.model)
  batches = experiment.streams.test()
  totals: dict[str, np.ndarray] = {}
  for sums in evaluate(statistics, batches, experiment.task.measure):
    for name, value in jax.device_get(sums).items():
      totals[name] = totals.get(name, 0.0) + np.asarray(value, np.float64)
  return results.measurements(experiment, choices, totals)


def pictures(
  experiment: experiment_lib.Experiment,
  state: Any,
  choices: Mapping[str, Any],
  statistics: Mapping[str, Any],
  devices: devices_lib.Devices,
) -> dict[str, np.ndarray]:
  """Returns up to four test pictures: what goes in, comes out, and should.

  Args:
    experiment: parts of a run whose labels are pictures.
    state: last `TrainState` of the run, on the devices.
    choices: {decision: [K] one-hot}.
    statistics: the model's collections but the parameters, `settled` ones.
    devices: devices among which each batch is split.

  Returns:
    uint8 `low` [N, h, w, 3], `made` and `target` [N, H, W, 3].
  """

  def shown(outputs: Any, batch: Any) -> dict[str, jax.Array]:
    low, result = map(super_resolution.quantized, (batch['image'], outputs))
    kinds = dict(low=low, made=result, target=batch['label'])
    return {name: jnp.asarray(x, jnp.uint8) for name, x in kinds.items()}

  size = experiment.config.data.test_batch_size
  count = experiment.streams.num_examples['test']
  chosen = [i * count // _PICTURES for i in range(_PICTURES)]
  evaluate = _evaluation(experiment, state, choices, devices, experiment.model)
  rows: list[dict[str, np.ndarray]] = []
  for number, batch in enumerate(experiment.streams.test()):
    here = sorted({i - number * size for i in chosen if i // size == number})
    if here:
      (made,) = evaluate(statistics, [batch], shown)
      rows.append({k: x[here] for k, x in jax.device_get(made).items()})
  return {k: np.concatenate([row[k] for row in rows]) for k in rows[0]}


def _evaluation(
  experiment: experiment_lib.Experiment,
  state: Any,
  choices: Mapping[str, Any],
  devices: devices_lib.Devices,
  model: nn.Module,
) -> Callable[..., Iterator[Any]]:
  """Returns `(statistics, batches, measure)` -> what `measure` says of each.

  `measure` is called with a model's outputs and the batch. Its results are on
  the devices, and every process can read them.
  """
  network = _network(model, devices)
  arch = experiment.space.expand(choices)

  def evaluate(
    statistics: Mapping[str, Any], batches: Iterable[Any], measure: Callable
  ) -> Iterator[Any]:
    measured = devices.jit_everywhere(measure)
    for batch in devices.feed(batches):
      inputs = {name: batch[name] for name in experiment.streams.inputs}
      outputs = network(state.served_params, statistics, arch, inputs)
      yield measured(outputs, batch)

  return evaluate


@functools.lru_cache(maxsize=4)
def _network(model: nn.Module, devices: devices_lib.Devices) -> Callable:
  """Returns the jitted network: one program for all that is measured of it."""
  return devices.jit(
    train_step.eval_step(model.apply, lambda outputs, batch: outputs)
  )


class RestoredRun(NamedTuple):
  """A finished run, restored from its workdir.

  Attributes:
    experiment: parts of the run.
    state: last `TrainState` of the run.
    choices: architecture that the run selected, {decision: [K] one-hot}.
  """

  experiment: experiment_lib.Experiment
  state: Any
  choices: dict[str, np.ndarray]


def restore(workdir: str) -> RestoredRun:
  """Returns a finished run, restored from its last checkpoint.

  Args:
    workdir: path of the run's workdir.

  Raises:
    ValueError: the directory is no workdir of a run, the run is not finished,
      or its config.json was changed.
  """
  path = pathlib.Path(workdir)
  try:
    content = config_lib.read(path / workdir_lib.CONFIG)
  except OSError as error:
    raise ValueError(
      f'{workdir} is no workdir of a run: {error}; name the --workdir of a '
      'finished run'
    ) from None
  experiment = experiment_lib.build(ml_collections.ConfigDict(content))
  folder = path / workdir_lib.CHECKPOINTS
  saved = restoring.newest_extra(folder)
  config_lib.check_binding(experiment.binding, saved or {}, workdir)
  abstract = jax.eval_shape(experiment.initial_state)
  restored = restoring.restore_latest(folder, abstract)
  if restored is None or restored.step < experiment.phases.steps:
    raise ValueError(
      f'{workdir} holds a run at step {restored.step if restored else 0} of '
      f'{experiment.phases.steps}; finish it first, with the same command as '
      'before'
    )
  policy = restored.state.search_state.policy
  choices = experiment.selected(jax.device_get(policy))
  return RestoredRun(experiment, restored.state, choices)


def choose(
  run: RestoredRun, arch_path: str = '', numeric_format: str = ''
) -> dict[str, np.ndarray]:
  """Returns an architecture: the selected one, one of a file, or a uniform one.

  Args:
    run: a finished run.
    arch_path: path of an arch.json; empty: none.
    numeric_format: name of the format of every layer; empty: none.

  Raises:
    ValueError: both are given, or the search space lacks the assignment.
  """
  if arch_path and numeric_format:
    raise ValueError('give --arch or --format, not both')
  if arch_path:
    content = arch_file.read(arch_path)
    assigned = arch_file.assignment(content)
    return run.experiment.space.choices(assigned, content['sizes'])
  if numeric_format:
    return run.experiment.space.uniform(numeric_format)
  return run.choices


def evaluate(
  workdir: str, arch_path: str = '', numeric_format: str = ''
) -> dict[str, Any]:
  """Returns the test metrics of an assignment with a finished run's weights.

  Args:
    workdir: path of the workdir of a finished run.
    arch_path: path of an arch.json; empty: none.
    numeric_format: name of the format of every layer; empty: none.

  Raises:
    ValueError: the run is unfinished, or the search space lacks the assignment.
  """
  run = restore(workdir)
  choices = choose(run, arch_path, numeric_format)
  devices = devices_lib.one_device(run.experiment.config)
  statistics = served(run.experiment, run.state, choices, devices).statistics
  return test_metrics(run.experiment, run.state, choices, statistics, devices)
