r"""Strategies of trained networks: each one, random ones, chosen, searched.

python -m benchmarks.strategies WORKDIR ... [--format=INT4] [--steps=300] \
    [--strategies=max_abs,kl,eq,admm] [--scores=fisher,loss] [--random=8] \
    [--batches=3] [--scored=8] [--mode=separate]

Each workdir is a finished run whose formats are BF16. Its network is quantized
to one format without training, so all networks cost the same. Weights and
activations of each layer have a strategy of their own, with --mode=tied one of
them both. Rows:

  max_abs, kl, eq, admm   one strategy everywhere
  random                  a strategy for each decision, --random draws
  error                   the strategy of the least error of the operands
  scores fisher, ...      the strategy that brings the network nearest to the
                          one without formats, each scored alone, by the scores
                          --scores; kl needs softmax outputs
  dqss                    importances that learn for --steps steps

Thresholds are found for each network anew, layer by layer, in a training batch
of 32 examples, or pixels, or more, and scores in 8 validation batches of
--scored examples, by default of those of the run. The table has the metric of
the task on the test split, the mean over --batches such batches, each apart; a
random network has one.
"""

import argparse
from collections.abc import Sequence
import itertools
import pathlib
import tempfile
from typing import Any

import ml_collections
import numpy as np

from fliqs_jax import ptq
from fliqs_jax.numerics import formats
from fliqs_jax.run import allocator
from fliqs_jax.run import evaluation
from fliqs_jax.run import experiment as experiment_lib
from fliqs_jax.run import pretrained
from fliqs_jax.run import sensitivity_table
from fliqs_jax.run import statistics
from fliqs_jax.run import train
from fliqs_jax.run.configs import config as config_lib
from fliqs_jax.runtime import devices as devices_lib
from fliqs_jax.runtime import workdir as workdir_lib
from fliqs_jax.search import presets
from fliqs_jax.search import sensitivity


def config_of(
  workdir: str,
  name: str,
  strategies: Sequence[str],
  steps: int,
  scored: int,
  mode: str,
) -> ml_collections.ConfigDict:
  """Returns the config that searches the strategies of a trained network.

  Args:
    workdir: path of the run that trained it.
    name: name of the format.
    strategies: names of the strategies.
    steps: number of steps in which the importances learn.
    scored: examples of a validation batch; 0: as many as of the run.
    mode: 'separate' or 'tied'.
  """
  content = config_lib.read(pathlib.Path(workdir) / workdir_lib.CONFIG)
  config = ml_collections.ConfigDict(content)
  config.quant.update(formats=name, strategies=tuple(strategies))
  config.quant.update(mode=mode)
  config.cost.update(target=1.0, relative_to=name)
  keys = presets.search_keys('dqss', steps)
  config.search.update(keys | dict(quality=config.search.quality))
  if scored:
    config.data.valid_batch_size = scored
  config.init_from = workdir
  ptq.adapt(config, steps, teacher=False)
  return config.lock()


class Network:
  """A trained network that is quantized in several ways.

  Attributes:
    experiment: parts of the run that searches its strategies.
  """

  def __init__(self, config: ml_collections.ConfigDict):
    """Reads the network and profiles its activations."""
    self.experiment = experiment = experiment_lib.build(config)
    self._devices = devices = devices_lib.one_device(config)
    self._calibrator = statistics.Calibrator(experiment, devices)
    state = devices.create(experiment.initial_state)
    state = pretrained.started(state, config.init_from)
    self._state = statistics.observed(experiment, state, devices)

  def thresholds(self, choices: Any, batch: int) -> Any:
    """Returns the statistics, with thresholds of a batch for choices."""
    state, model = self._state, self.experiment.model
    return self._calibrator.found(
      state.params, state.model_state, choices, model, step=batch
    )

  def metric(self, choices: Any, batch: int) -> float:
    """Returns the metric of the task on the test split.

    Args:
      choices: {decision: [K] one-hot}.
      batch: number of the training batch in which thresholds are found.
    """
    experiment = self.experiment
    found = self.thresholds(choices, batch)
    measured = evaluation.test_metrics(
      experiment, self._state, choices, found, self._devices
    )
    return measured[experiment.task.METRIC]

  def allocated(self, kind: str) -> dict[str, Any]:
    """Returns the options of the least scores.

    Args:
      kind: one of `sensitivity_table.METRICS`.
    """
    experiment = self.experiment
    space = experiment.space
    batches = itertools.islice(experiment.streams.valid(0), allocator.BATCHES)
    score = sensitivity_table.scorer(experiment, kind, self._devices)
    found = self.thresholds(space.dearest(), 0)
    raw = score(
      {'params': self._state.params, **found},
      list(self._devices.feed(batches)),
    )
    return experiment.allocate(sensitivity.regular(space, raw)[0])

  def searched(self) -> dict[str, Any]:
    """Returns the options that `dqss` finds."""
    with tempfile.TemporaryDirectory() as folder:
      train.train_and_evaluate(self.experiment.config, folder)
      return evaluation.restore(folder).choices

  def rows(
    self, scores: Sequence[str], draws: int, batches: int
  ) -> dict[str, list[float]]:
    """Returns {row: metrics}, one for each batch, or for each draw."""
    space, quant = self.experiment.space, self.experiment.config.quant
    found = {
      strategy: space.uniform(f'{quant.formats}:{strategy}')
      for strategy in quant.strategies
    }
    found['error'] = self.allocated('error')
    found |= {f'scores {name}': self.allocated(name) for name in scores}
    found['dqss'] = self.searched()
    rng = np.random.default_rng(0)
    rows = {
      row: [self.metric(choices, i) for i in range(batches)]
      for row, choices in found.items()
    }
    rows['random'] = [
      self.metric(
        space.at(
          {d.name: int(rng.integers(len(d.labels))) for d in space.decisions}
        ),
        i % batches,
      )
      for i in range(draws)
    ]
    return rows


def main() -> None:
  """Prints a column for each workdir, their mean, and the spread within one."""
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('workdirs', nargs='+')
  parser.add_argument('--format', default='INT4')
  parser.add_argument('--strategies', default=','.join(formats.STRATEGIES))
  parser.add_argument('--steps', type=int, default=300)
  parser.add_argument('--scores', default='fisher,loss')
  parser.add_argument('--random', type=int, default=8)
  parser.add_argument('--batches', type=int, default=3)
  parser.add_argument('--scored', type=int, default=0)
  parser.add_argument('--mode', default='separate')
  args = parser.parse_args()
  columns = []
  for workdir in args.workdirs:
    strategies = args.strategies.split(',')
    config = config_of(
      workdir, args.format, strategies, args.steps, args.scored, args.mode
    )
    network = Network(config)
    scores = args.scores.split(',')
    columns.append(network.rows(scores, args.random, args.batches))
    for row, metrics in columns[-1].items():
      print(workdir, row, ' '.join(f'{m:.4f}' for m in metrics), flush=True)
  for row in columns[0]:
    means = [float(np.mean(column[row])) for column in columns]
    spread = np.mean([np.std(column[row]) for column in columns])
    cells = ' | '.join(f'{mean:.4f}' for mean in means)
    print(f'| {row} | {cells} | {np.mean(means):.4f} | {spread:.4f} |')


if __name__ == '__main__':
  main()
