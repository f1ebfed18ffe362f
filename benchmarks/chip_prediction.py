r"""Predicted against measured serving times of random assignments.

python -m benchmarks.chip_prediction [--network=resnet8_64] [--batch=8] \
    [--formats=INT4,INT8,BF16] [--assignments=10] [--rounds=20] [--seed=0]

Profiles the layers of a network alone (`fliqs_jax.profile_chip`), predicts the
time of random assignments by the resulting file, exports each, and measures all
of them interleaved. It prints both times and Spearman's rank correlation.
"""

import argparse
import dataclasses
import functools
import pathlib
import tempfile

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

from benchmarks import serving
from fliqs_jax import models
from fliqs_jax import profile_chip
from fliqs_jax.program import searchable as searchable_lib
from fliqs_jax.search import train_step
from fliqs_jax.space import discovery
from fliqs_jax.space import quant_spec

# {network: (config, height and width of the images in pixels)}.
NETWORKS = {
  'resnet8_64': (dict(name='resnet_cifar', depth=8, filters=64), 32),
  'resnet20_16': (dict(name='resnet_cifar', depth=20, filters=16), 32),
  'mobilenetv2': (models.published('mobilenetv2'), 96),
}


def _assignments(space, count: int, rng) -> list[dict[str, np.ndarray]]:
  """Returns random architectures, from nearly all one format to an even mix."""
  result = []
  for _ in range(count):
    odds = rng.dirichlet(np.ones(len(space.formats[0].menu)))
    chosen = {d.name: int(rng.choice(len(odds), p=odds)) for d in space.formats}
    result.append(space.at(chosen))
  return result


def _served(config, space, variables, choices, x, spec):
  """Returns the served network of an assignment."""
  stock = models.construct(config, 10, conv=nn.Conv, dense=nn.Dense)
  program = dataclasses.replace(
    searchable_lib.searchable(stock, spec), fast_forms=True
  )
  arch = space.expand(choices)
  assignment = space.assignment(choices)
  return serving.exported(program, variables | dict(arch=arch), assignment, x)[
    0
  ]


def main() -> None:
  """Prints the table and the rank correlation."""
  parser = argparse.ArgumentParser(prog='python -m benchmarks.chip_prediction')
  parser.add_argument('--network', default='resnet8_64')
  parser.add_argument('--batch', type=int, default=8)
  parser.add_argument('--formats', default='INT4,INT8,BF16')
  parser.add_argument('--assignments', type=int, default=10)
  parser.add_argument('--rounds', type=int, default=20)
  parser.add_argument('--seed', type=int, default=0)
  args = parser.parse_args()
  config, size = NETWORKS[args.network]
  spec = quant_spec.QuantSpec(tuple(args.formats.split(',')))
  search = models.build(config, 10, spec)
  image = jnp.zeros((1, size, size, 3))
  space = discovery.find(search, image, spec=spec, train=False)
  rows, _ = profile_chip.profile(space.ops, (), args.batch, args.rounds)
  with tempfile.TemporaryDirectory() as directory:
    path = pathlib.Path(directory) / 'measured.yaml'
    path.write_text(profile_chip.content(rows, args.batch, 'a benchmark'))
    cost = space.cost(f'latency:{path}')
  init = jax.jit(functools.partial(search.init, train=False))
  variables = dict(init(jax.random.key(0), image))
  params = variables.pop('params')
  state = {k: v for k, v in variables.items() if k not in ('arch', 'cost')}
  x = jax.random.normal(jax.random.key(1), (2, size, size, 3))
  settle = jax.jit(train_step.settle_step(search.apply))
  rng = np.random.default_rng(args.seed)
  assignments = _assignments(space, args.assignments, rng)
  arch = space.expand(space.dearest())
  state = settle(params, state, arch, dict(image=x), jax.random.key(2))
  functions = {
    str(i): _served(
      config, space, dict(params=params, **state), choices, x, spec
    )
    for i, choices in enumerate(assignments)
  }
  x = jax.random.normal(jax.random.key(3), (args.batch, size, size, 3))
  measured = profile_chip.seconds(functions, x, args.rounds)
  times = []
  for name, choices in zip(functions, assignments):
    predicted, actual = float(cost(choices)), 1e3 * measured[name]
    times.append((predicted, actual))
    print(
      f'{name:>3}  predicted {predicted:8.3f} ms  measured {actual:8.3f} ms'
    )
  rank = scipy.stats.spearmanr(*zip(*times)).statistic
  print(f'rank correlation {rank:.3f}')


if __name__ == '__main__':
  main()
