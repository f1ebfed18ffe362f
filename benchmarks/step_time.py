r"""What a search step costs: time, memory and compilation, as ratios.

python -m benchmarks.step_time [--network=cnn,depthwise] [--rounds=20]

Compares, for one network and batch, variants of the same fused step (training
batch forward and backward, update, validation forward, controller):

  float    every layer excluded from quantization, same model code
  int8     uniform INT8: menus of one format, nothing to choose
  3        three formats (int_s) in every layer
  16       sixteen formats (fp_l) in every layer

All variants are compiled first and then run interleaved in one process; a
figure is the median over rounds of the ratio to `float` within a round, with
the quartiles. Memory is XLA's own analysis of the compiled step. The step of
`float` and `int8` judges its one architecture as often as the search step does,
so that only quantization differs.
"""

import argparse
from collections.abc import Callable
import dataclasses
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fliqs_jax import classification
from fliqs_jax import controller
from fliqs_jax import cost_model
from fliqs_jax import formats
from fliqs_jax import models
from fliqs_jax import quant_spec
from fliqs_jax import schedules
from fliqs_jax import search_space
from fliqs_jax import train_state
from fliqs_jax import train_step

NETWORKS = {
  'cnn': (dict(name='resnet_cifar', depth=20, filters=16), 32, 64),
  'depthwise': (dict(name='mobilenetv2', width=1.0, dropout=0.2), 64, 64),
}

VARIANTS = {
  'float': dict(exclude=('*',)),
  'int8': dict(formats='INT8'),
  '3': dict(formats='int_s'),
  '16': dict(formats='fp_l'),
}


@dataclasses.dataclass
class Compiled:
  """One variant, ready to run."""

  step: Callable
  state: Any
  compile_seconds: float
  temporary_mb: float


def _compile(model_config, size: int, batch_size: int, variant) -> Compiled:
  spec = quant_spec.QuantSpec(**variant, act_clip=4.0)
  model = models.build(model_config, 10, spec)
  image = jnp.zeros((1, size, size, 3))
  space = search_space.find(model, image, spec=spec, train=False)
  if space.is_fixed:
    # A decision that governs nothing, so that this step judges as well.
    idle = search_space.Decision('idle', formats.menu('int_s'), ())
    space = dataclasses.replace(space, decisions=(*space.decisions, idle))
  cost = space.cost('bops')
  target = cost_model.uniform(cost, 'INT8')
  steps = 1000
  phases = schedules.phases(steps, 0.0, 0.0, 1.0)
  search = controller.make('default', space.relative_cost(cost, target), phases)
  optimizer = optax.sgd(0.01, momentum=0.9)
  state = train_state.create(
    model, space, optimizer, search, jax.random.key(0), image, train=False
  )
  step = train_step.search_step(
    model.apply,
    classification.loss(0.1),
    classification.minus_cross_entropy,
    space,
    search,
    optimizer,
    phases,
  )
  rng = np.random.default_rng(0)
  batch = dict(
    image=rng.normal(size=(batch_size, size, size, 3)).astype(np.float32),
    label=rng.integers(0, 10, batch_size).astype(np.int32),
  )
  lowered = jax.jit(step, donate_argnums=0).lower(state, batch, batch)
  began = time.perf_counter()
  compiled = lowered.compile()
  seconds = time.perf_counter() - began
  memory = compiled.memory_analysis()
  return Compiled(
    lambda state: compiled(state, batch, batch)[0],
    state,
    seconds,
    memory.temp_size_in_bytes / 1e6,
  )


def _measure(network: str, rounds: int, steps: int) -> None:
  model_config, size, batch_size = NETWORKS[network]
  variants = {
    name: _compile(model_config, size, batch_size, variant)
    for name, variant in VARIANTS.items()
  }
  ratios = {name: [] for name in variants}
  milliseconds = {name: [] for name in variants}
  for round_ in range(rounds + 1):
    times = {}
    for name, variant in variants.items():
      began = time.perf_counter()
      for _ in range(steps):
        variant.state = variant.step(variant.state)
      jax.block_until_ready(variant.state)
      times[name] = (time.perf_counter() - began) / steps
    if round_ == 0:
      continue  # The first touches cold memory.
    for name, seconds in times.items():
      ratios[name].append(seconds / times['float'])
      milliseconds[name].append(1e3 * seconds)
  print(
    f'\n{network}: {model_config["name"]}, {size}x{size}, batch {batch_size}, '
    f'{rounds} rounds of {steps} steps'
  )
  print('| step | time / float | quartiles | ms | memory / int8 | compile s |')
  print('|---|---|---|---|---|---|')
  for name, variant in variants.items():
    low, middle, high = statistics.quantiles(ratios[name], n=4)
    memory = variant.temporary_mb / variants['int8'].temporary_mb
    print(
      f'| {name} | {middle:.3f} | {low:.3f} to {high:.3f} | '
      f'{statistics.median(milliseconds[name]):.1f} | {memory:.3f} '
      f'({variant.temporary_mb:.1f} MB) | {variant.compile_seconds:.1f} |'
    )
  paired = statistics.median(a / b for a, b in zip(ratios['16'], ratios['3']))
  print(f'16 formats / 3 formats: {paired:.3f}')


def main() -> None:
  """Measures and prints a table per network."""
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--network', default=','.join(NETWORKS))
  parser.add_argument('--rounds', type=int, default=20)
  parser.add_argument('--steps', type=int, default=3)
  args = parser.parse_args()
  for network in args.network.split(','):
    _measure(network, args.rounds, args.steps)


if __name__ == '__main__':
  main()
