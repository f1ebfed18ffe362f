r"""Measures the gain of an exported INT8 model on this machine's CPU.

python -m benchmarks.serving [--network=resnet20,deit_ti] [--batch=1,64]
    [--rounds=20]

The benchmark compares inference of one network, in one process:

  float32  linen's own layers
  fake     the model of the search at INT8: grid values in float32
  int8     the served model: int8 x int8 -> int32

`/16` runs a batch in slices of 16, as `serving.load` does on a CPU. All are
compiled first and then run interleaved. A number is the median over rounds of
the ratio of times within a round (above 1: faster than float32), with the
quartiles.

A table for each batch size follows: each layer alone, `int8/16` against
float32, and the reason if it gains nothing.
"""

import argparse
import functools
import statistics
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import layer_times
from fliqs_jax import models
from fliqs_jax.search import train_step
from fliqs_jax.serving import loader
from fliqs_jax.serving import stored_layers
from fliqs_jax.space import discovery
from fliqs_jax.space import quant_spec

# {network: (config, height and width of the images in pixels)}.
NETWORKS = {
  'resnet20': (dict(name='resnet_cifar', depth=20, filters=16), 32),
  'resnet20_64': (dict(name='resnet_cifar', depth=20, filters=64), 32),
  'resnet18': (models.published('resnet18'), 224),
  'mobilenetv2': (models.published('mobilenetv2'), 224),
  'deit_ti': (models.published('deit_ti16'), 224),
}

_FORMAT = 'INT8'


def variants(config, size: int):
  """Returns {variant: function of images}, and {layer: shape of its op}."""
  spec = quant_spec.QuantSpec(_FORMAT)
  search = models.build(config, 10, spec)
  image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
  space = discovery.find(search, image, spec=spec, train=False)
  example = jnp.zeros(image.shape, image.dtype)
  init = jax.jit(functools.partial(search.init, train=False))
  variables = dict(init(jax.random.key(0), example))
  params = variables.pop('params')
  arch = space.expand(space.only())
  state = {k: v for k, v in variables.items() if k not in ('arch', 'cost')}
  x = jax.random.normal(jax.random.key(1), (2, size, size, 3))
  settle = jax.jit(train_step.settle_step(search.apply))
  state = settle(params, state, arch, dict(image=x), jax.random.key(2))
  fake = dict(params=params, arch=arch, **state)
  tensors, kept = stored_layers.tensors(
    stored_layers.operand_recorder(search.apply, train=False),
    fake,
    space.assignment(space.only()),
    x,
  )
  plain = models.construct(config, 10, conv=nn.Conv, dense=nn.Dense)
  floats = {k: v for k, v in fake.items() if k in ('params', 'batch_stats')}
  low_bit = models.construct(config, 10, **loader.constructors(kept))
  integers = loader.variables(low_bit, tensors, kept)
  how = dict(call=dict(train=False))
  functions = {
    'float32': loader.Served(plain, floats, how),
    'float32/16': loader.Served(plain, floats, how, at_once=16),
    'fake': loader.Served(search, fake, how),
    'int8': loader.Served(low_bit, integers, how),
    'int8/16': loader.Served(low_bit, integers, how, at_once=16),
  }
  return functions, {op.path: op.shape for op in space.ops}


def _ratios(functions, x, rounds: int) -> dict[str, tuple[float, ...]]:
  """Returns quartiles of float32's time over each variant's, and ms of it."""
  times = {name: [] for name in functions}
  for round_ in range(rounds + 1):
    for name, function in functions.items():
      began = time.perf_counter()
      jax.block_until_ready(function(x))
      if round_:  # The first compiles.
        times[name].append(time.perf_counter() - began)
  result = {}
  for name in functions:
    ratios = [a / b for a, b in zip(times['float32'], times[name])]
    low, middle, high = statistics.quantiles(ratios, n=4)
    result[name] = (middle, low, high, 1e3 * statistics.median(times[name]))
  return result


def _print(title: str, result) -> None:
  for name, (middle, low, high, milliseconds) in result.items():
    print(
      f'{title:34} {name:10} {milliseconds:9.3f} ms   '
      f'float32 / it {middle:6.2f} ({low:.2f} to {high:.2f})',
      flush=True,
    )


def main() -> None:
  """Prints the ratios."""
  parser = argparse.ArgumentParser(prog='python -m benchmarks.serving')
  parser.add_argument('--network', default='resnet20_64,resnet18,deit_ti')
  parser.add_argument('--batch', default='1,64')
  parser.add_argument('--rounds', type=int, default=20)
  args = parser.parse_args()
  for network in args.network.split(','):
    config, size = NETWORKS[network]
    functions, ops = variants(config, size)
    plain, served = functions['float32'], functions['int8/16']
    image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    layers = layer_times.rows(plain, served, ops, image)
    for batch in map(int, args.batch.split(',')):
      rng = np.random.default_rng(0)
      x = rng.standard_normal((batch, size, size, 3), np.float32)
      x = jnp.asarray(x)
      _print(f'{network}, batch {batch}', _ratios(functions, x, args.rounds))
      lines = layer_times.table(layers, batch, served.at_once, args.rounds)
      print('', *lines, '', sep='\n', flush=True)


if __name__ == '__main__':
  main()
