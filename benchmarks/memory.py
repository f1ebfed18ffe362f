r"""Prices a relaxed search: memory, time and search parameters (Table 6).

python -m benchmarks.memory [--network=resnet18] [--pixels=64] [--batch=16] \
    [--space=int_s]

Compares the whole search step of one network, by default with three formats.
With `--space=INT4:max_abs+INT4:kl` and more the options are strategies, and
`composite` is DQSS's efficient convolution. Rows:

  FLIQS                   one sampled option a layer (`paper`, which also judges
                          it on a validation batch)
  composite               the mean of each operand over its options (`edmips`),
                          of which the gradient keeps all
  composite, checkpoint   the same as we do it: options are computed again for
                          the gradient
  branched                the mean of the results of each option (`dnas`), with
                          shared weights

The first table is the accounting of the paper for the published network: its
weights in half precision, a copy for each option that is kept; gradients, those
of the weights and of every copy; the outputs of convolutions, a copy for each
option. The second is what XLA plans for the compiled step, without arguments
and results, and the time of a step over that of FLIQS, interleaved in one
process: the median over rounds with the quartiles.
"""

import argparse
import contextlib
import statistics
import time
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import step_time
from fliqs_jax import models
from fliqs_jax.layers import quant_layers
from fliqs_jax.search import presets
from fliqs_jax.search import schedules
from fliqs_jax.search import train_state
from fliqs_jax.search import train_step
from fliqs_jax.space import cost_model
from fliqs_jax.space import discovery
from fliqs_jax.space import quant_spec
from fliqs_jax.tasks import classification

# Preset of the step, whether options are computed again for the gradient, and
# whether the paper's accounting keeps a copy of a tensor for each option.
ROWS = {
  'FLIQS': ('paper', True, False),
  'composite': ('edmips', False, True),
  'composite, checkpoint': ('edmips', True, False),
  'branched': ('dnas', True, True),
}
_OPTIMIZER = optax.sgd(0.01, momentum=0.9)


def _model(problem: step_time.Problem, spec: quant_spec.QuantSpec):
  return problem.network(
    quant_layers.with_spec(quant_layers.QuantConv, spec),
    quant_layers.with_spec(quant_layers.QuantDense, spec),
  )


def _space(problem: step_time.Problem, options: str):
  image = jnp.zeros((1, problem.pixels, problem.pixels, 3))
  spec = quant_spec.QuantSpec(options, act_clip=4.0)
  return discovery.find(_model(problem, spec), image, spec=spec, train=False)


def accounting(name: str, batch: int, options: str) -> list[str]:
  """Returns the lines of the table by the accounting of the paper.

  Args:
    name: the network, as published, at 224x224.
    batch: images in a step.
    options: the menu of each layer, as in a `QuantSpec`.
  """
  space = _space(
    step_time.Problem(models.published(name), 224, batch, None, 1000), options
  )
  weights = 2 * space.params / 1e6
  outputs = sum(
    op.shape.macs * op.shape.channels // op.shape.weights
    for op in space.ops
    if not op.path.endswith(('shortcut', 'head'))
  )
  lines = [
    f'{name}, 224x224, batch {batch}: by accounting, MB',
    '',
    '| step | weights | gradients | activations at 1 byte | at 2 bytes | '
    'search parameters |',
    '|---|---|---|---|---|---|',
  ]
  scores = sum(len(decision.labels) for decision in space.decisions)
  most = max(len(decision.labels) for decision in space.decisions)
  for row, (_, _, keeps) in ROWS.items():
    copies = most if keeps else 1
    kept = outputs * batch * copies / 1e6
    lines.append(
      f'| {row} | {weights * copies:.1f} | {weights * (1 + copies):.1f} | '
      f'{kept:.1f} | {2 * kept:.1f} | {scores} |'
    )
  return lines


def _compile(
  problem: step_time.Problem, row: str, options: str
) -> tuple[Any, Any, float]:
  """Returns the compiled step, its state, and its temporaries in MB."""
  preset, checkpoints, _ = ROWS[row]
  shape = (problem.pixels, problem.pixels, 3)
  spec = quant_spec.QuantSpec(
    options, act_clip=4.0, mix=presets.PRESETS[preset].mix
  )
  model, space = _model(problem, spec), _space(problem, options)
  cost = space.cost('bops')
  phases = schedules.phases(1000, 0.0, 0.0, 1.0)
  controller = presets.make(
    preset,
    space.relative_cost(cost, cost_model.uniform(cost, 'INT8')),
    phases,
  )
  state = jax.jit(
    lambda key: train_state.create(
      model,
      space,
      _OPTIMIZER,
      controller,
      key,
      jnp.zeros((1, *shape)),
      train=False,
    )
  )(jax.random.key(0))
  step = train_step.search_step(
    model.apply,
    classification.loss(0.1),
    classification.minus_cross_entropy,
    space,
    controller,
    _OPTIMIZER,
    phases,
  )
  rng = np.random.default_rng(0)
  batch = dict(
    image=rng.standard_normal((problem.batch, *shape), np.float32),
    label=rng.integers(0, problem.classes, problem.batch).astype(np.int32),
  )
  batch = jax.device_put(batch)
  forgets = contextlib.nullcontext()
  if not checkpoints:
    forgets = mock.patch.object(jax, 'checkpoint', lambda term: term)
  with forgets:
    lowered = jax.jit(step, donate_argnums=0).lower(state, batch, batch)
  compiled = lowered.compile()
  temporaries = compiled.memory_analysis().temp_size_in_bytes / 1e6
  return lambda s: compiled(s, batch, batch)[0], state, temporaries


def measured(
  problem: step_time.Problem, rounds: int, options: str
) -> list[str]:
  """Compiles and times the steps; returns the lines of a table.

  Args:
    problem: the training problem.
    rounds: number of interleaved steps of each kind, at least 2.
    options: the menu of each layer, as in a `QuantSpec`.
  """
  steps, states, memory = {}, {}, {}
  for row in ROWS:
    steps[row], states[row], memory[row] = _compile(problem, row, options)
  seconds = {row: [] for row in ROWS}
  for round_ in range(rounds + 1):
    for row, step in steps.items():
      began = time.perf_counter()
      states[row] = jax.block_until_ready(step(states[row]))
      if round_ > 0:  # The first round is slower: its memory is cold.
        seconds[row].append(time.perf_counter() - began)
  lines = [
    f'{problem.model["name"]}, {problem.pixels}x{problem.pixels}, batch '
    f'{problem.batch}, {rounds} rounds: as compiled by XLA for '
    f'{jax.devices()[0].device_kind}',
    '',
    '| step | temporaries MB | / FLIQS | time / FLIQS |',
    '|---|---|---|---|',
  ]
  for row in ROWS:
    ratios = [a / b for a, b in zip(seconds[row], seconds['FLIQS'])]
    low, middle, high = statistics.quantiles(ratios, n=4)
    lines.append(
      f'| {row} | {memory[row]:.1f} | {memory[row] / memory["FLIQS"]:.2f} | '
      f'{middle:.2f} ({low:.2f} to {high:.2f}) |'
    )
  return lines


def main() -> None:
  """Prints both tables."""
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--network', default='resnet18')
  parser.add_argument('--pixels', type=int, default=64)
  parser.add_argument('--batch', type=int, default=16)
  parser.add_argument('--rounds', type=int, default=9)
  parser.add_argument('--space', default='int_s')
  args = parser.parse_args()
  lines = accounting(args.network, batch=32, options=args.space)
  print(*lines, '', sep='\n', flush=True)
  model = models.published(args.network)
  problem = step_time.Problem(model, args.pixels, args.batch)
  print(*measured(problem, args.rounds, args.space), sep='\n')


if __name__ == '__main__':
  main()
