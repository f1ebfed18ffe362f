r"""Measures a search step on an accelerator: ResNet-50, bfloat16 compute.

python -m benchmarks.gpu_step [--batch=128] [--rounds=20] [--steps=5] [--tiny]

The benchmark times these steps at 224x224; `step_time` describes the columns:

  stock  plain training with `nn.Conv`, `nn.Dense` and batch norm in bfloat16
  float  our fused step without quantization: training, and judging on
         validation data
  3, 16  the fused step with three and with sixteen formats in every layer

Parameters, batch norm's statistics and the quantizers' arithmetic are float32
in all of them. Without an accelerator the benchmark prints a message and ends.
--tiny runs the same code on a CPU, with 8 images of 32x32 and a ResNet-10 of an
eighth of the width; its numbers have no meaning.
"""

import argparse

import jax
import jax.numpy as jnp

from benchmarks import step_time
from fliqs_jax import models

STEPS = ('stock', 'float', '3', '16')


def problem(batch: int, tiny: bool) -> step_time.Problem:
  """Returns the training problem; if `tiny`, one that a CPU can run."""
  name, pixels = ('resnet10', 32) if tiny else ('resnet50', 224)
  model = models.published(name) | (dict(width=1 / 8) if tiny else {})
  return step_time.Problem(model, pixels, batch, jnp.bfloat16, classes=1000)


def main() -> None:
  """Measures and prints a table, if there is an accelerator."""
  parser = argparse.ArgumentParser(prog='python -m benchmarks.gpu_step')
  parser.add_argument('--batch', type=int, default=128)
  parser.add_argument('--rounds', type=int, default=20)
  parser.add_argument('--steps', type=int, default=5)
  parser.add_argument('--tiny', action='store_true')
  args = parser.parse_args()
  if jax.default_backend() == 'cpu' and not args.tiny:
    print('jax finds no accelerator: nothing measured; --tiny runs on a CPU')
    return
  task = problem(8 if args.tiny else args.batch, args.tiny)
  with step_time.compilation_cache():
    lines = step_time.measure(task, list(STEPS), args.rounds, args.steps)
  print(f'{task.model["name"]} on {jax.devices()[0].device_kind}')
  print(*lines, sep='\n')


if __name__ == '__main__':
  main()
