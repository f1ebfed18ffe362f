"""Measures each served layer alone, and gives the reason for a missing gain.

A layer is timed as a served program of its own: the input is rounded,
multiplied and scaled, and the bias is added. In a network XLA fuses some of
that with the layer's neighbours. Each slice of a batch is a call, whose
overhead is visible in the smallest layers.
"""

from collections.abc import Callable, Mapping
import dataclasses
import functools
import math
import statistics
import time
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fliqs_jax.numerics import int8_ops
from fliqs_jax.program import searchable as searchable_lib
from fliqs_jax.serving import served_program
from fliqs_jax.serving import stored_products
from fliqs_jax.space import ops as ops_lib

# Length of a sample in seconds. It has many calls of a small op, so that
# neither the resolution of the clock nor one interruption matters.
_SAMPLE = 2e-3
# Multiply-accumulates for each input and output number. Below this bound the
# work per number (rounding, copying windows, adding the rows of a kernel,
# scaling) takes longer than the product. Of 30 shapes of MobileNetV2, with one
# image on two cores with VNNI, those up to 55 gained nothing and those from 77
# on did, except depthwise convolutions and the stem, which are slow in linen.
_FEW = 64
# Collections of a network before a search.
_FLOATS = ('params', 'batch_stats')


@dataclasses.dataclass(frozen=True)
class Row:
  """Layers of equal shapes.

  Attributes:
    path: path of the first layer.
    count: number of layers.
    op: shape of the op of each layer.
    inputs: shape of the input without the batch.
    plain: linen's layer, a compiled function of its input.
    served: the served layer, another such function.
  """

  path: str
  count: int
  op: ops_lib.OpShape
  inputs: tuple[int, ...]
  plain: Callable[[jax.Array], Any]
  served: Callable[[jax.Array], Any]

  @property
  def macs_per_number(self) -> float:
    """Multiply-accumulates divided by the sizes of the input and the result."""
    results = self.op.macs * self.op.channels / self.op.weights
    return self.op.macs / (math.prod(self.inputs) + results)

  def why_no_gain(self) -> str:
    """Returns the known reason why such a layer gains nothing."""
    if self.macs_per_number < _FEW:
      return 'few MACs for each number that is rounded, copied or scaled'
    if not int8_ops.instructions():
      return 'the CPU has no fast product of int8 (VNNI, AMX)'
    return 'unknown: profile it'


def rows(
  stock: nn.Module,
  program: searchable_lib.Searchable,
  variables: Mapping[str, Any],
  ops: Mapping[str, ops_lib.OpShape],
  images: jax.Array,
) -> list[Row]:
  """Returns the layers of a network, which is traced.

  Args:
    stock: the network of linen's own layers.
    program: the same network, searchable.
    variables: its variables, with `arch` and `quant_stats`, all INT8.
    ops: {path of a layer: shape of its op}.
    images: example inputs [N, H, W, C].
  """
  alike: dict[Any, list[str]] = {}
  for path, (layer, shape) in _calls(stock, variables, images).items():
    alike.setdefault((layer, shape, ops[path]), []).append(path)

  @jax.jit
  def noted(variables: Any) -> Any:
    return program.apply(variables, images, train=False, mutable=['operands'])[
      1
    ]

  everything = {**variables, **noted(variables)}
  return [
    Row(
      paths[0],
      len(paths),
      op,
      shape[1:],
      *_alone(layer, program, _below(everything, paths[0]), shape),
    )
    for (layer, shape, op), paths in alike.items()
  ]


def _alone(
  layer: nn.Module,
  program: searchable_lib.Searchable,
  variables: Mapping[str, Any],
  shape: tuple[int, ...],
) -> tuple[Callable[[jax.Array], Any], Callable[[jax.Array], Any]]:
  """Returns a layer as linen has it, and as a served program of its own."""
  own = dict(params=variables['params'])
  model = dataclasses.replace(program, model=layer)
  x = jax.ShapeDtypeStruct(shape, jnp.float32)
  parts = tuple(model.replaced(model.parts(own, None, x)))
  # The path of a layer outside of a network is empty.
  stored = stored_products.stored(
    parts, variables, {'': ('INT8', 'INT8')}, variables['operands']
  )
  served = served_program.make(
    model, own, {}, stored, (jnp.zeros(shape),), None
  )
  unpack = jax.jit(served.unpack, static_argnums=1)
  operands = unpack(served.tensors, int8_ops.prefers_unsigned())
  return (
    functools.partial(jax.jit(layer.apply), own),
    functools.partial(jax.jit(lambda *args: served.run(*args)[0]), operands),
  )


def table(
  layers: list[Row], batch: int, at_once: int, rounds: int
) -> list[str]:
  """Measures layers; returns the lines of a table, the least gain first.

  Args:
    layers: the result of `rows`.
    batch: number of examples.
    at_once: number of examples in each call of the served layer.
    rounds: number of interleaved samples of both layers.
  """
  measured = [(_measure(row, batch, at_once, rounds), row) for row in layers]
  lines = [
    '| layer | alike | kind | MACs per number | float32 ms | int8 ms | '
    'float32 / int8 | where it gains nothing, why |',
    '|---|---|---|---|---|---|---|---|',
  ]
  for (ratio, plain, served), row in sorted(measured, key=lambda x: x[0]):
    why = row.why_no_gain() if ratio < 1 else ''
    lines.append(
      f'| {row.path} | {row.count} | {row.op.kind} | '
      f'{row.macs_per_number:.0f} | {plain:.3f} | {served:.3f} | {ratio:.2f} | '
      f'{why} |'
    )
  return lines


def _calls(
  network: nn.Module, variables: Mapping[str, Any], images: jax.Array
) -> dict[str, tuple[nn.Module, Any]]:
  """Returns {path: (unbound layer, shape of its input)}."""
  calls = {}

  def note(call, args, kwargs, context):
    module = context.module
    if isinstance(module, (nn.Conv, nn.Dense)):
      alone = module.clone(parent=None, name=None)
      calls['/'.join(module.path)] = (alone, args[0].shape)
    return call(*args, **kwargs)

  def apply(variables, x):
    with nn.intercept_methods(note):
      return network.apply(variables, x, train=False)

  floats = {k: v for k, v in variables.items() if k in _FLOATS}
  jax.eval_shape(apply, floats, images)
  return calls


def _below(variables: Mapping[str, Any], path: str) -> dict[str, Any]:
  """Returns the collections of the layer at a path."""
  found = {}
  for collection, tree in variables.items():
    for part in path.split('/'):
      tree = tree.get(part, {})
    if tree:
      found[collection] = tree
  return found


def _measure(
  row: Row, batch: int, at_once: int, rounds: int
) -> tuple[float, float, float]:
  """Returns medians: the ratio of float32's to int8's time, and both in ms."""
  x = jax.random.normal(jax.random.key(0), (batch, *row.inputs))
  slices = [x[i : i + at_once] for i in range(0, batch, at_once)]
  runs = [(row.plain, [x]), (row.served, slices)]
  for run in runs:
    _seconds(*run, calls=1)  # Compiles.
  calls = [math.ceil(_SAMPLE / _seconds(*run, calls=3)) for run in runs]
  times = [
    [_seconds(*run, calls=n) for run, n in zip(runs, calls)]
    for _ in range(rounds)
  ]
  ratio = statistics.median(plain / served for plain, served in times)
  plain, served = (1e3 * statistics.median(column) for column in zip(*times))
  return ratio, plain, served


def _seconds(run, inputs: list[jax.Array], calls: int) -> float:
  """Returns the seconds of one call with all slices of the inputs."""
  began = time.perf_counter()
  for _ in range(calls):
    jax.block_until_ready([run(x) for x in inputs])
  return (time.perf_counter() - began) / calls
