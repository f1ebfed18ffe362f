r"""Quantize a trained network without training its weights.

python -m fliqs_jax.ptq --init_from=CHECKPOINT --workdir=DIR \
    --config=configs/fashion_mnist.py:data_dir=DATA,space=int_l

Weights and batch norm stay as they are; the search of the config's preset has
`--steps` steps to find formats within the cost target and, with
`--config.quant.strategies`, rules for their thresholds. The workdir is that of
any other run: `evaluate` and `export` take it. All flags and exit statuses are
those of `fliqs_jax.main`.
"""

from collections.abc import Sequence

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


def main(argv: Sequence[str]) -> None:
  """Runs the search; a user's mistake gives one line and status 2."""
  main_lib.start(
    argv, lambda config: adapt(config, _STEPS.value, _TEACHER.value)
  )


def adapt(config: ml_collections.ConfigDict, steps: int, teacher: bool) -> None:
  """Changes a config into one that only quantizes a trained network.

  Args:
    config: config from a file in `configs/`.
    steps: number of steps; the weights learn in none.
    teacher: whether labels are the outputs of the network without formats.
  """
  search = presets.search_keys(config.search.preset, steps)
  with config.unlocked():
    config.quant.act_start = 0.0
    config.search.update(
      start=0.0,
      # The last step is left to the architecture that was chosen.
      freeze=max(steps - 1, 1) / steps,
      learning_rate=search['learning_rate'],
    )
    every = max(1, steps // 10)
    config.train.update(
      steps=steps,
      frozen=True,
      teacher=teacher,
      mixup=0.0,
      cutmix=0.0,
      label_smoothing=0.0,
      log_every=every,
      checkpoint_every=every,
    )


if __name__ == '__main__':
  app.run(main, flags_parser=main_lib.parsed)
