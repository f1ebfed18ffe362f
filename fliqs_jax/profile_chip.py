r"""Measure what the layers of a network cost on this machine, as a chip's file.

python -m fliqs_jax.profile_chip --config=configs/digits.py --out=mine.yaml
    [--batch=8] [--rounds=20] [--formats=INT8,BF16] [--config.KEY=VALUE]

Each layer of the config's network that differs from the others in shape is
compiled alone, as it is served, with weights and activations at each format of
the menus of all layers of this shape, and timed on what JAX runs on. Then
`cost.kind=latency:mine.yaml` is the predicted time of a network on this
machine; layers of other shapes are interpolated.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
import dataclasses
import datetime
import functools
import json
import math
import pathlib
import platform
import shlex
import time
from typing import Any

import flax.linen as nn
import jax

from fliqs_jax.numerics import formats as formats_lib
from fliqs_jax.numerics import int8_ops
from fliqs_jax.program import searchable as searchable_lib
from fliqs_jax.run import experiment as experiment_lib
from fliqs_jax.runtime import commands
from fliqs_jax.runtime import files
from fliqs_jax.search import train_step
from fliqs_jax.serving import served_program
from fliqs_jax.serving import stored_products
from fliqs_jax.space import discovery
from fliqs_jax.space import ops as ops_lib
from fliqs_jax.space import quant_spec
from fliqs_jax.space.chips import chip as chip_lib
from fliqs_jax.space.chips import prices
from fliqs_jax.sweep import sweep_file

# Seconds of a sample, which has many calls of a fast layer: neither the
# resolution of the clock nor one interruption matters.
_SAMPLE = 2e-3
_KINDS = ('conv', 'pointwise', 'depthwise', 'dense')

Compiled = Callable[[jax.Array], Any]


def layer_of(op: ops_lib.OpShape) -> tuple[nn.Module, tuple[int, ...]]:
  """Returns a linen layer with the shape of an op, and the shape of its input.

  The input has one example. Maps are taken to be as near to square as
  can be, with padding `SAME`.

  Args:
    op: shape of a convolution with two spatial dimensions or of a dense layer.

  Raises:
    ValueError: it is another op.
  """
  key = prices.counts(op, {}).key
  if op.kind not in _KINDS or len(key.kernel) != 2:
    raise ValueError(f'{op.kind} is no convolution of images or dense layer')
  if not op.window:
    return nn.Dense(key.outputs), (1, key.positions, key.inputs)
  down, across = key.strides
  rows = min(
    (n for n in range(1, key.positions + 1) if key.positions % n == 0),
    key=lambda n: abs(math.log(n**2 * down / (key.positions * across))),
  )
  height, width = rows * down, key.positions // rows * across
  groups = max(round(op.inputs / (height * width * key.inputs)), 1)
  layer = nn.Conv(
    key.outputs, key.kernel, key.strides, feature_group_count=groups
  )
  return layer, (1, height, width, key.inputs * groups)


def served(
  layer: nn.Module, shape: tuple[int, ...], numeric_format: str
) -> Compiled:
  """Returns a layer as it is served, a compiled function of its input.

  The input is rounded, multiplied and scaled, and the bias is added. In a
  network XLA fuses some of that with the layer's neighbours.

  Args:
    layer: a linen layer.
    shape: shape of its input.
    numeric_format: name of the format of weights and activations.
  """
  x = jax.random.normal(jax.random.key(0), shape)
  params = dict(jax.jit(layer.init)(jax.random.key(1), x))
  model = searchable_lib.searchable(layer, quant_spec.QuantSpec(numeric_format))
  model = dataclasses.replace(model, fast_forms=True)
  space = discovery.find(model, x)
  variables = {
    **model.prepare(params, x),
    'arch': space.expand(space.only()),
  }

  def noted(variables: Any, x: jax.Array, name: str) -> Any:
    return model.apply(variables, x, mutable=[name])[1]

  jitted = jax.jit(noted, static_argnums=2)
  floats = train_step.in_phase(variables, False)
  variables = train_step.in_phase(
    {**floats, **jitted(floats, x, 'quant_stats')}, True
  )
  own = {k: v for k, v in variables.items() if k not in searchable_lib.OWN}
  parts = model.replaced(model.trace(own, (x,), {}, None, []).parts)
  stored = stored_products.stored(
    parts,
    variables,
    space.assignment(space.only()),
    jax.device_get(jitted(variables, x, 'operands')['operands']),
  )
  program = served_program.make(model, own, {}, stored, (x,), None)
  unpack = jax.jit(program.unpack, static_argnums=1)
  operands = unpack(program.tensors, int8_ops.prefers_unsigned())
  run = jax.jit(lambda *args: program.run(*args)[0])
  return functools.partial(run, operands)


def seconds(
  functions: Mapping[str, Compiled], x: jax.Array, rounds: int
) -> dict[str, float]:
  """Returns the least times of functions, measured in turn.

  Other work on the machine only adds to a time.

  Args:
    functions: {name: compiled function}.
    x: [...] their input.
    rounds: number of samples of each.
  """

  def once(function: Compiled, calls: int) -> float:
    began = time.perf_counter()
    for _ in range(calls):
      jax.block_until_ready(function(x))
    return (time.perf_counter() - began) / calls

  for function in functions.values():
    once(function, 1)  # Compiles.
  calls = {
    name: math.ceil(_SAMPLE / once(f, 3)) for name, f in functions.items()
  }
  samples = [
    {name: once(f, calls[name]) for name, f in functions.items()}
    for _ in range(rounds)
  ]
  return {name: min(sample[name] for sample in samples) for name in functions}


def profile(
  ops: Sequence[ops_lib.Op],
  formats: Sequence[str],
  batch: int,
  rounds: int,
) -> tuple[list[dict[str, Any]], list[str]]:
  """Returns measured layers, as a chip's file has them, and paths of others.

  Args:
    ops: ops of a network.
    formats: names of formats; empty: those of the menus of all ops of a shape,
      and BF16 where a side has none.
    batch: number of inputs at once.
    rounds: number of samples of each layer and format.
  """
  # Layers of one shape may have different menus.
  first: dict[chip_lib.Key, tuple[str, nn.Module, tuple[int, ...]]] = {}
  menus: dict[chip_lib.Key, dict[str, None]] = {}
  skipped = []
  for op in ops:
    try:
      layer, (_, *shape) = layer_of(op.shape)
    except ValueError:
      skipped.append(op.path)
      continue
    key = prices.counts(op.shape, {}).key
    first.setdefault(key, (op.path, layer, (batch, *shape)))
    menu = dict.fromkeys(formats or _menu(op.shape))
    menus[key] = menus.get(key, {}) | menu
  rows = []
  for key, (path, layer, shape) in first.items():
    x = jax.random.normal(jax.random.key(2), shape)
    timed = seconds(
      {name: served(layer, shape, name) for name in menus[key]}, x, rounds
    )
    row = dict(
      inputs=key.inputs,
      outputs=key.outputs,
      kernel=list(key.kernel),
      strides=list(key.strides),
      positions=key.positions,
      **(dict(ops='depthwise') if key.is_depthwise else {}),
      times={name: float(f'{1e3 * t:.4g}') for name, t in timed.items()},
    )
    print(f'{path}: {row["times"]} ms', flush=True)
    rows.append(row)
  return rows, skipped


def _menu(shape: ops_lib.OpShape) -> list[str]:
  menus = [
    menu or (formats_lib.BF16,) for menu in (shape.weight_menu, shape.act_menu)
  ]
  return list(dict.fromkeys(f.grid_format.name for f in sum(menus, ())))


def content(rows: Sequence[Mapping[str, Any]], batch: int, source: str) -> str:
  """Returns a chip's file.

  Args:
    rows: the first result of `profile`.
    batch: number of inputs at once.
    source: the command that has measured them.
  """
  device = jax.devices()[0]
  # JSON is YAML, and quotes what needs quotes.
  lines = [
    f'name: {json.dumps(f"{device.device_kind}, {platform.machine()}")}',
    f'source: {json.dumps(source)}',
    f'date: {datetime.date.today()}',
    'confidence: measured',
    'latency:',
    f'  batch: {batch}',
    '  layers:',
    *(f'  - {json.dumps(row)}' for row in rows),
  ]
  return '\n'.join(lines) + '\n'


@commands.reported
def main(argv: Sequence[str]) -> int:
  """Writes the file; a user's mistake gives one line and status 2."""
  parser = argparse.ArgumentParser(prog='python -m fliqs_jax.profile_chip')
  parser.add_argument('--config', required=True)
  parser.add_argument('--out', required=True, help='the file, NAME.yaml')
  parser.add_argument('--batch', type=int, default=8)
  parser.add_argument('--rounds', type=int, default=20)
  parser.add_argument('--formats', default='', help='instead of the menus')
  args, unknown = parser.parse_known_args(argv)
  for name in ('batch', 'rounds'):
    if getattr(args, name) < 1:
      raise ValueError(f'--{name}={getattr(args, name)} must be at least 1')
  out = pathlib.Path(args.out)
  if not out.resolve().parent.is_dir():
    raise ValueError(f'--out={args.out}: there is no such directory; make it')
  if out.is_dir():
    raise ValueError(f'--out={args.out} is a directory; name a file in it')
  formats = [f.name for f in _formats(args.formats)]
  overrides = sweep_file.overrides(unknown)
  run = sweep_file.Run('profile', {}, args.config, overrides)
  config = sweep_file.load(run)
  config.cost.update(kind='bops', caps=(), reported=())
  space = experiment_lib.build(config).space
  rows, skipped = profile(space.ops, formats, args.batch, args.rounds)
  if not rows:
    raise ValueError(f'--config={args.config} has no layer that can be timed')
  command = shlex.join(['python', '-m', 'fliqs_jax.profile_chip', *argv])
  files.write_bytes(out, content(rows, args.batch, command).encode())
  if skipped:
    print(f'not measured, prices are interpolated: {", ".join(skipped)}')
  print(f'written: {args.out}; use it as cost.kind=latency:{args.out}')
  return 0


def _formats(text: str) -> Sequence[formats_lib.NumericFormat]:
  names = [name.strip() for name in text.split(',') if name.strip()]
  found = formats_lib.menu(names) if names else ()
  for numeric_format in found:
    if numeric_format.strategy:
      raise ValueError(
        f'--formats={text}: {numeric_format.name} has a strategy, which does '
        'not change what a layer costs; write '
        f'{numeric_format.grid_format.name}'
      )
  return found


if __name__ == '__main__':
  commands.run(main)
