r"""Measures the gain of an exported INT8 model on this machine's CPU.

python -m benchmarks.serving [--network=resnet20,deit_ti] [--batch=1,64]
    [--rounds=20] [--onnx]

The benchmark compares inference of one network, in one process:

  float32  linen's own layers
  fake     the model of the search at INT8: grid values in float32
  int8     the export, loaded: int8 x int8 -> int32

`--onnx` measures, instead of layers, networks in ONNX Runtime, on as many
threads as the process has cores: the ONNX model of the export (`onnx`) and the
float32 network, converted in the same way; where `onnx_networks` has it, also
that network as ONNX Runtime likes it, in float32 (`onnx own`) and quantized by
its own tool (`onnx static`). It prints the sizes of the files and how far the
outputs are apart.

`/8` runs a batch in slices of 8, as `serving.load` does on a CPU. All are
compiled first and then run interleaved. Times are CPU times of the process. A
number is the median over rounds of the ratio of times within a round (above 1:
faster than float32), with the quartiles.

A table for each batch size follows: each layer alone, `int8/8` against
float32, and the reason if it gains nothing.
"""

import argparse
import copy
import dataclasses
import functools
import os
import pathlib
import statistics
import tempfile
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import layer_times
from fliqs_jax import models
from fliqs_jax import serving
from fliqs_jax.program import searchable as searchable_lib
from fliqs_jax.search import train_step
from fliqs_jax.serving import export_model
from fliqs_jax.serving.portable import stablehlo
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
# Number of images that run together, as `serving.load` has it on a CPU.
SLICE = 8


def variants(config, size: int, onnx: bool = False):
  """Returns {variant: function of images}, and its layers, if not `onnx`."""
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
  stock = models.construct(config, 10, conv=nn.Conv, dense=nn.Dense)
  floats = {k: v for k, v in fake.items() if k in ('params', 'batch_stats')}
  program = dataclasses.replace(
    searchable_lib.searchable(stock, spec), fast_forms=True
  )
  assignment = space.assignment(space.only())
  int8, model = exported(program, fake, assignment, x, onnx)
  sliced = copy.copy(int8)
  sliced.at_once = SLICE
  plain = _applied(stock, floats)
  functions = {
    'float32': plain,
    f'float32/{SLICE}': _in_slices(plain),
    'fake': _applied(search, fake),
    'int8': int8,
    f'int8/{SLICE}': sliced,
  }
  if onnx:
    from benchmarks import onnx_networks
    from fliqs_jax.serving.portable import onnx_model

    files = int8.manifest['files']
    for name in ('weights.safetensors', 'model.onnx'):
      print(f'{name}: {files[name]["bytes"]} bytes')
    print(f'ONNX Runtime: {int8.manifest["onnx"]["reference"]}', flush=True)
    functions['onnx'] = _session(model)
    make = onnx_networks.NETWORKS.get(config['name'])
    if make is not None:
      own = make(jax.tree.map(np.asarray, floats), size)
      functions['onnx own'] = _session(own)
      functions['onnx static'] = _session(onnx_networks.static(own, size))
    functions['onnx float32'] = _session(
      onnx_model.converted(
        lambda x: [stock.apply(floats, x, train=False)],
        stablehlo.open_shapes([x], [True]),
        ['outputs'],
      )
    )
    return functions, None
  ops = {op.path: op.shape for op in space.ops}
  return functions, layer_times.rows(stock, program, fake, ops, x)


def exported(program, variables, assignment, x, onnx: bool = False):
  """Returns an export of a network, loaded, and its ONNX model if asked for.

  Args:
    program: the searchable network.
    variables: its collections, `arch` and statistics included.
    assignment: the same architecture as {layer: (weights, activations)}.
    x: [N, H, W, C] example images.
    onnx: whether to export an ONNX model, too.
  """
  with tempfile.TemporaryDirectory() as directory:
    out = pathlib.Path(directory) / 'out'
    call = dict(train=False)
    export_model.write(
      out, program, variables, assignment, {}, (x,), None, call, onnx
    )
    model = (out / 'model.onnx').read_bytes() if onnx else b''
    return serving.load(out), model


def _session(model: bytes):
  """Returns an ONNX model as a function of images."""
  import onnxruntime

  options = onnxruntime.SessionOptions()
  options.intra_op_num_threads = len(os.sched_getaffinity(0))
  session = onnxruntime.InferenceSession(
    model, options, providers=['CPUExecutionProvider']
  )
  return lambda x: session.run(None, {'inputs/0': np.asarray(x)})[0]


def _applied(model, variables):
  """Returns a model as a compiled function of images."""
  apply = jax.jit(functools.partial(model.apply, train=False))
  return functools.partial(apply, variables)


def _in_slices(function):
  """Returns a function that takes a batch in slices."""

  def sliced(x):
    parts = [function(x[i : i + SLICE]) for i in range(0, len(x), SLICE)]
    return jnp.concatenate(parts)

  return sliced


def _ratios(functions, x, rounds: int) -> dict[str, tuple[float, ...]]:
  """Returns quartiles of float32's time over each variant's, and ms of it."""
  times = {name: [] for name in functions}
  for round_ in range(rounds + 1):
    for name, function in functions.items():
      began = time.process_time()
      jax.block_until_ready(function(x))
      if round_:  # The first compiles.
        times[name].append(time.process_time() - began)
  result = {}
  for name in functions:
    ratios = [a / b for a, b in zip(times['float32'], times[name])]
    low, middle, high = statistics.quantiles(ratios, n=4)
    result[name] = (middle, low, high, 1e3 * statistics.median(times[name]))
  return result


def _print(title: str, result) -> None:
  for name, (middle, low, high, milliseconds) in result.items():
    print(
      f'{title:34} {name:12} {milliseconds:9.3f} ms   '
      f'float32 / it {middle:6.2f} ({low:.2f} to {high:.2f})',
      flush=True,
    )


def main() -> None:
  """Prints the ratios."""
  parser = argparse.ArgumentParser(prog='python -m benchmarks.serving')
  parser.add_argument('--network', default='resnet20_64,resnet18,deit_ti')
  parser.add_argument('--batch', default='1,64')
  parser.add_argument('--rounds', type=int, default=20)
  parser.add_argument('--onnx', action='store_true')
  args = parser.parse_args()
  for network in args.network.split(','):
    config, size = NETWORKS[network]
    functions, layers = variants(config, size, args.onnx)
    for batch in map(int, args.batch.split(',')):
      rng = np.random.default_rng(0)
      x = rng.standard_normal((batch, size, size, 3), np.float32)
      x = jnp.asarray(x)
      _print(f'{network}, batch {batch}', _ratios(functions, x, args.rounds))
      if args.onnx:
        continue
      lines = layer_times.table(layers, batch, SLICE, args.rounds)
      print('', *lines, '', sep='\n', flush=True)


if __name__ == '__main__':
  main()
