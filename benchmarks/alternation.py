"""One pass or two: how weights and probabilities of options learn in turns.

python -m benchmarks.alternation ARGUMENTS [--recipe=fashion_mnist] [--seeds=5]

ARGUMENTS are those of the recipe, such as
data_dir=DIR,steps=800,space=INT4,strategies=max_abs+kl+eq+admm,mode=separate,preset=dqss;
the preset must learn from a gradient. For each seed the run is trained twice:

  single pass   as the preset does: weights and probabilities learn from the
                same gradient on the training batch
  alternation   as DARTS does (first order): the probabilities learn from the
                validation batch, then the weights from the training batch

The table has the metric of the task on the test split, mean and standard
deviation over seeds, and CPU time of the process.
"""

import argparse
import dataclasses
import importlib
import pathlib
import tempfile
import time
from typing import Any

import jax
import numpy as np

from fliqs_jax.run import evaluation
from fliqs_jax.run import experiment as experiment_lib
from fliqs_jax.run import loop
from fliqs_jax.runtime import devices as devices_lib
from fliqs_jax.runtime import monitoring
from fliqs_jax.search import controller as controller_lib
from fliqs_jax.search import train_step


class Alternating(experiment_lib.Experiment):
  """The parts of a run whose probabilities learn from the validation batch."""

  def search_step(self) -> train_step.Step:
    """Returns the step, two steps of `train_step` in one."""

    def step_of(
      controller: controller_lib.Controller, frozen: bool
    ) -> train_step.Step:
      return train_step.search_step(
        self.step_model.apply,
        self.loss,
        self.quality,
        self.space,
        controller,
        self.optimizer,
        self.phases,
        ema_decay=self.config.optimizer.ema_decay,
        frozen=frozen,
      )

    keeping = self.controller._replace(
      update=lambda state, *unused: (state, {}), differentiates=False
    )
    search, learn = step_of(self.controller, True), step_of(keeping, False)

    def step(state: Any, train_batch: Any, valid_batch: Any) -> Any:
      searched, found = search(state, valid_batch, valid_batch)
      searched = dataclasses.replace(searched, step=state.step)
      state, metrics = learn(searched, train_batch, valid_batch)
      return state, {**found, **metrics}

    return step


def trained(experiment: experiment_lib.Experiment) -> float:
  """Returns the metric on the test split of what a run finds."""
  config, began = experiment.config, time.monotonic()
  devices = devices_lib.one_device(config)
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder)
    trace = monitoring.Trace('', config.train.steps, path / 'profile')
    state = loop.run(
      experiment, devices, path, lambda: False, trace, began
    ).state
  choices = experiment.selected(jax.device_get(state.search_state.policy))
  served = evaluation.served(experiment, state, choices, devices)
  metrics = evaluation.test_metrics(
    experiment, state, choices, served.statistics, devices
  )
  return metrics[experiment.task.METRIC]


def main() -> None:
  """Prints a row for each way."""
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('arguments')
  parser.add_argument('--recipe', default='fashion_mnist')
  parser.add_argument('--seeds', type=int, default=5)
  args = parser.parse_args()
  recipe = importlib.import_module(f'configs.{args.recipe}')
  ways = {
    'single pass': experiment_lib.Experiment,
    'alternation': Alternating,
  }
  metrics: dict[str, list[float]] = {way: [] for way in ways}
  seconds = dict.fromkeys(ways, 0.0)
  for seed in range(args.seeds):
    for way, kind in ways.items():
      built = experiment_lib.build(
        recipe.get_config(f'{args.arguments},seed={seed}')
      )
      began = time.process_time()
      metrics[way].append(trained(kind(**vars(built))))
      seconds[way] += time.process_time() - began
      print(seed, way, metrics[way][-1], flush=True)
  for way, values in metrics.items():
    print(
      f'| {way} | {np.mean(values):.4f} ± {np.std(values, ddof=1):.4f} '
      f'| {seconds[way] / args.seeds:.0f} s |'
    )


if __name__ == '__main__':
  main()
