"""Task of a config, and whether its model and its data fit it."""

from collections.abc import Callable, Mapping
import types
from typing import Any

import flax.linen as nn
import jax
import ml_collections

from fliqs_jax import data
from fliqs_jax import tasks
from fliqs_jax.tasks import augment


def of(config: ml_collections.ConfigDict) -> types.ModuleType:
  """Returns the task of a config.

  Raises:
    ValueError: it is unknown, or a key does not suit it.
  """
  if config.task not in tasks.TASKS:
    raise ValueError(
      f'task={config.task!r} is unknown; allowed: {", ".join(tasks.TASKS)}'
    )
  task = tasks.TASKS[config.task]
  if config.search.quality not in task.QUALITIES:
    raise ValueError(
      f'search.quality={config.search.quality!r} is unknown for '
      f'task={config.task!r}; allowed: {", ".join(task.QUALITIES)}'
    )
  if not 0 <= config.train.label_smoothing < 1:
    raise ValueError(
      f'train.label_smoothing={config.train.label_smoothing} must be below 1'
    )
  task.loss(config.train.label_smoothing)  # It may refuse the value.
  return task


def mixing(
  config: ml_collections.ConfigDict, streams: data.Streams
) -> Callable[..., Any] | None:
  """Returns what mixes training batches, `augment.mixing`; None: nothing.

  Raises:
    ValueError: the examples cannot be mixed.
  """
  mixup, cutmix = config.train.mixup, config.train.cutmix
  if not mixup and not cutmix:
    return None
  if 'image' not in streams.inputs or config.task != 'classification':
    raise ValueError(
      f'train.mixup={mixup} and train.cutmix={cutmix} need images and '
      "task='classification'; set both to 0"
    )
  return augment.mixing(streams.num_classes, mixup, cutmix)


def check_scores(
  config: ml_collections.ConfigDict, key: str, scores: str
) -> None:
  """Checks that scores of options fit the task.

  Raises:
    ValueError: they compare softmax outputs, and the task has none.
  """
  if scores == 'kl' and config.task != 'classification':
    raise ValueError(
      f'{key}={scores!r} compares softmax outputs, which task={config.task!r} '
      "does not have; use 'fisher' or 'loss'"
    )


def example(streams: data.Streams) -> Any:
  """Returns the shapes of the model's input for one example."""
  return jax.tree.map(
    lambda spec: jax.ShapeDtypeStruct((1, *spec.shape), spec.dtype),
    data.model_inputs(streams.inputs),
  )


def check_inputs(
  config: ml_collections.ConfigDict, model: nn.Module, streams: data.Streams
) -> None:
  """Checks that a model takes what the data give.

  Raises:
    ValueError: it does not; the message names the keys.
  """
  shape = model.input_shape
  takes = tuple(shape) if isinstance(shape, Mapping) else ('image',)
  if set(takes) != set(streams.inputs):
    raise ValueError(
      f'model.name={config.model.name!r} takes {", ".join(takes)}, but '
      f'data.name={config.data.name!r} gives {", ".join(streams.inputs)}; use '
      'a model and data of one task'
    )
  for key in ('buckets', 'scale'):
    in_both = key in config.model and key in config.data
    if in_both and config.model[key] != config.data[key]:
      raise ValueError(
        f'model.{key}={config.model[key]} and data.{key}={config.data[key]} '
        'must be the same'
      )


def check_task(
  config: ml_collections.ConfigDict,
  task: types.ModuleType,
  outputs: jax.ShapeDtypeStruct,
  streams: data.Streams,
) -> None:
  """Checks that a model's outputs are those of the task.

  Args:
    config: the config.
    task: its task.
    outputs: [1, ...] the model's outputs for one example.
    streams: its data.

  Raises:
    ValueError: they are not; the message names the keys.
  """
  expected = task.output_shape(streams)
  if outputs.shape[1:] != expected:
    raise ValueError(
      f'model.name={config.model.name!r} gives an output of shape '
      f'{outputs.shape[1:]} for an example, but task={config.task!r} needs '
      f'{expected}; use a model of that task'
    )


def check_classes(
  config: ml_collections.ConfigDict,
  task: types.ModuleType,
  streams: data.Streams,
) -> None:
  """Reads the test split until it has shown as many classes as it must have.

  Args:
    config: the config.
    task: its task.
    streams: its data.

  Raises:
    ValueError: the split has fewer.
  """
  if task.LEAST_CLASSES == 1:
    return
  seen: set[int] = set()
  for batch in streams.test():
    seen.update(batch['label'][batch['example_mask'] > 0].tolist())
    if len(seen) >= task.LEAST_CLASSES:
      return
  raise ValueError(
    f'data.test_split={config.data.test_split!r} has no label but '
    f'{sorted(seen)}, and {task.METRIC} needs {task.LEAST_CLASSES} classes; '
    'use a split that has them'
  )
