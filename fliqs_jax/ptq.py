r"""Quantize a trained network without training its weights.

python -m fliqs_jax.ptq --init_from=CHECKPOINT --workdir=DIR \
    --config=configs/fashion_mnist.py:data_dir=DATA,space=int_l

Weights and batch norm stay as they are; the search of the config's preset has
`--steps` steps to find formats within the cost target and, with
`--config.quant.strategies`, rules for their thresholds. The workdir is that of
any other run: `evaluate` and `export` take it. All flags and exit statuses are
those of `fliqs_jax.main`. The keys of the recipe that suit only the training of
weights are replaced (its length, phases, mixed images and smoothed labels, the
mean of the weights, the search's learning rate, how often it logs and saves),
but not those that flags --config.KEY=VALUE set. There is nothing to --retrain.
"""

from collections.abc import Mapping, Sequence
import types
from typing import Any

from absl import app
from absl import flags
import ml_collections

from fliqs_jax import main as main_lib
from fliqs_jax.search import presets

_STEPS = flags.DEFINE_integer(
  'steps', 300, 'Number of steps in which the search learns.', 1
)
_TEACHER = flags.DEFINE_bool(
  'teacher',
  False,
  'Learns from the outputs of the network without formats, not from labels.',
)
# What else to do than to override a key.
_INSTEAD = {
  'train.steps': 'the number of steps is given by --steps',
  'train.teacher': 'labels of the network without formats need --teacher',
  'train.frozen': 'weights never train here, but in fliqs_jax.main',
  'optimizer.ema_decay': 'weights never train here and have no mean; leave it',
}


def main(argv: Sequence[str]) -> None:
  """Runs the search; a user's mistake gives one line and status 2."""
  main_lib.start(
    argv,
    lambda config, overrides: adapt(
      config, _STEPS.value, _TEACHER.value, overrides
    ),
  )


def adapt(
  config: ml_collections.ConfigDict,
  steps: int,
  teacher: bool,
  overrides: Mapping[str, Any] = types.MappingProxyType({}),
) -> None:
  """Changes a config into one that only quantizes a trained network.

  Args:
    config: config from a file in `configs/`.
    steps: number of steps; the weights learn in none.
    teacher: whether labels are the outputs of the network without formats.
    overrides: {dotted key: value} of keys that the user has set, which stay.

  Raises:
    ValueError: a key is set that does nothing here, or that a flag of this
      command stands for.
  """
  for key, instead in _INSTEAD.items():
    if key in overrides:
      raise ValueError(f'--config.{key}={overrides[key]}: {instead}')
  search = presets.search_keys(config.search.preset, steps)
  every = max(1, steps // 10)
  values = {
    'quant.act_start': 0.0,
    'search.start': 0.0,
    # The last step is left to the architecture that was chosen.
    'search.freeze': max(steps - 1, 1) / steps,
    'search.learning_rate': search['learning_rate'],
    'optimizer.ema_decay': 0.0,
    'train.steps': steps,
    'train.frozen': True,
    'train.teacher': teacher,
    'train.mixup': 0.0,
    'train.cutmix': 0.0,
    'train.label_smoothing': 0.0,
    'train.log_every': every,
    'train.checkpoint_every': every,
  }
  with config.unlocked():
    config.update_from_flattened_dict(
      {key: values[key] for key in values if key not in overrides}
    )


if __name__ == '__main__':
  app.run(main, flags_parser=main_lib.parsed)
