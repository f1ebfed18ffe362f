"""Times of training steps beside other tools, as ratios in one process.

python -m benchmarks.peers [--network=resnet_cifar,mlp] [--rounds=10]

A row is a training step of the same network and batch, on one thread: forward,
backward and update. Its time is divided by that of plain float training in the
same framework, so that what differs is the quantization alone:

  ours, INT8          training at uniform INT8
  ours, sensitivity   the search that judges nothing, three formats
  ours, default       the search that judges four architectures
  Qwix, INT8          quantized training in JAX, no search
  Brevitas, INT8      quantized training in PyTorch, no search
  PyTorch, composite  a search as of EdMIPS, three formats, written here

All steps run interleaved; a number is the median over rounds of a ratio within
a round, with the quartiles. It needs qwix, torch and brevitas, which this
project does not install: `pip install qwix torch brevitas`.
"""

import argparse
from collections.abc import Callable
import os
import statistics
import time
from typing import Any

# One thread for XLA, as for PyTorch.
os.environ['XLA_FLAGS'] = '--xla_cpu_multi_thread_eigen=false'

import jax  # noqa: E402
import qwix  # noqa: E402

from benchmarks import step_time  # noqa: E402
from benchmarks import torch_steps  # noqa: E402
from fliqs_jax import models  # noqa: E402

_NETWORKS = ('resnet_cifar', 'mlp')
# {row: step of `step_time`}.
_OURS = {
  'Flax, float': 'stock',
  'ours, INT8': 'uniform',
  'ours, sensitivity': 'scored',
  'ours, default': '3',
}
_TORCH = {
  'PyTorch, float': 'float',
  'Brevitas, INT8': 'brevitas',
  'PyTorch, composite': 'composite',
}


def steps(name: str) -> dict[str, Callable[[], Any]]:
  """Returns {row: function that takes a step} of a network."""
  fields, pixels, batch = step_time.NETWORKS[name]
  model = models.published(name) | fields
  problem = step_time.Problem(model, pixels, batch)
  compiled = {
    row: step_time.compiled_step(problem, step_time.STEPS[step])
    for row, step in _OURS.items()
  }
  rule = qwix.QtRule(module_path='.*', weight_qtype='int8', act_qtype='int8')
  compiled['Qwix, INT8'] = step_time.compiled_step(
    problem,
    None,
    lambda network: qwix.quantize_model(network, qwix.QtProvider([rule])),
  )

  def taken(one: step_time.Compiled) -> Callable[[], Any]:
    def take() -> None:
      one.state = jax.block_until_ready(one.step(one.state))

    return take

  taken_by = {row: taken(one) for row, one in compiled.items()}
  data = step_time.batch_of(problem)
  for row, kind in _TORCH.items():
    conv, dense = torch_steps.LAYERS[kind]
    if name == 'mlp':
      inputs = 3 * pixels**2
      network = torch_steps.mlp(dense, problem.classes, inputs, model['hidden'])
    else:
      network = torch_steps.resnet_cifar(conv, dense, problem.classes)
    taken_by[row] = torch_steps.step(network, data['image'], data['label'])
  return taken_by


def table(name: str, rounds: int) -> list[str]:
  """Returns the lines of a network's table."""
  taken_by = steps(name)
  seconds: dict[str, list[float]] = {row: [] for row in taken_by}
  for round_ in range(rounds + 1):
    for row, take in taken_by.items():
      began = time.process_time()
      take()
      if round_ > 0:  # The first round is slower: its memory is cold.
        seconds[row].append(time.process_time() - began)
  lines = ['| step | / float | CPU ms |', '|---|---|---|']
  for row, times in seconds.items():
    is_torch = row in _TORCH
    float_times = seconds['PyTorch, float' if is_torch else 'Flax, float']
    ratios = [a / b for a, b in zip(times, float_times)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    lines.append(
      f'| {row} | {middle:.2f} ({low:.2f} to {high:.2f}) '
      f'| {1e3 * statistics.median(times):.1f} |'
    )
  return lines


def main() -> None:
  """Prints a table for each network."""
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--network', default=','.join(_NETWORKS))
  parser.add_argument('--rounds', type=int, default=10)
  args = parser.parse_args()
  for name in args.network.split(','):
    print('', name, *table(name, args.rounds), sep='\n', flush=True)


if __name__ == '__main__':
  main()
