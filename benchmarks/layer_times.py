"""Measures each served layer alone, and says why where it gains nothing.

A layer is timed as it is served: its input is rounded, multiplied, scaled, and
the bias added. In a network XLA fuses some of that with the layer's neighbours.
Slices of a batch are calls of their own, which shows in the smallest layers.
"""

from collections.abc import Mapping
import dataclasses
import math
import statistics
import time
from typing import Any

import flax.linen as nn
import jax

from fliqs_jax.numerics import int8_ops
from fliqs_jax.serving import loader
from fliqs_jax.space import ops as ops_lib
from fliqs_jax.space import quant_spec

# Seconds. A sample has as many calls as fill it, so that neither the clock's
# tick nor one interruption hides a small op.
_SAMPLE = 2e-3
# Multiply-accumulates for each number that comes in or goes out. What is paid
# per number (rounding, copying windows, adding the rows of a kernel, scaling)
# outweighs the product below: 30 shapes of MobileNetV2, one image at a time on
# two cores with VNNI, lost or tied up to 55 and won from 77 on, but for
# depthwise convolutions and the stem, which linen is slow at.
_FEW = 64


@dataclasses.dataclass(frozen=True)
class Row:
  """Layers of equal shapes.

  Attributes:
    path: of the first one.
    count: how many there are.
    op: what each is.
    inputs: shape of its input but for the batch.
    plain: linen's layer and its variables.
    served: the served one and its variables.
  """

  path: str
  count: int
  op: ops_lib.OpShape
  inputs: tuple[int, ...]
  plain: tuple[nn.Module, Mapping[str, Any]]
  served: tuple[nn.Module, Mapping[str, Any]]

  @property
  def macs_per_number(self) -> float:
    """Multiply-accumulates over the sizes of the input and of the result."""
    results = self.op.macs * self.op.channels / self.op.weights
    return self.op.macs / (math.prod(self.inputs) + results)

  def why_no_gain(self) -> str:
    """Returns what is known to keep such a layer from gaining."""
    if self.macs_per_number < _FEW:
      return 'few MACs for each number that is rounded, copied or scaled'
    if not int8_ops.prefers_unsigned():
      return 'the CPU has no product of uint8 by int8 (VNNI)'
    return 'unknown: profile it'


def rows(
  plain: loader.Served,
  served: loader.Served,
  ops: Mapping[str, ops_lib.OpShape],
  image: jax.ShapeDtypeStruct,
) -> list[Row]:
  """Returns the layers of a network, found by tracing it.

  Args:
    plain: of linen's own layers.
    served: the same network of served layers, all INT8.
    ops: {path of a layer: what it is}.
    image: [1, H, W, C].
  """
  linen, ours = _calls(plain, image), _calls(served, image)
  # Alone, a layer has the empty path.
  spec = quant_spec.QuantSpec('INT8', assignment={'': ('INT8', 'INT8')})
  alike: dict[Any, list[str]] = {}
  for path, (layer, shape) in linen.items():
    alike.setdefault((layer, shape, ops[path]), []).append(path)
  return [
    Row(
      paths[0],
      len(paths),
      op,
      shape[1:],
      (layer, _below(plain.variables, paths[0])),
      (
        ours[paths[0]][0].clone(spec=spec),
        _below(served.variables, paths[0]),
      ),
    )
    for (layer, shape, op), paths in alike.items()
  ]


def table(
  layers: list[Row], batch: int, at_once: int, rounds: int
) -> list[str]:
  """Measures layers; returns a table's lines, the least gain first.

  Args:
    layers: as of `rows`.
    batch: examples.
    at_once: examples that the served layer takes together.
    rounds: interleaved samples of both.
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


def _calls(network: loader.Served, image) -> dict[str, tuple[nn.Module, Any]]:
  """Returns {path: (unbound layer, shape of its input)}."""
  calls = {}

  def note(call, args, kwargs, context):
    module = context.module
    if isinstance(module, (nn.Conv, nn.Dense)):
      # A served layer first, then linen's in its scope.
      alone = module.clone(parent=None, name=None)
      calls.setdefault('/'.join(module.path), (alone, args[0].shape))
    return call(*args, **kwargs)

  def apply(variables, x):
    with nn.intercept_methods(note):
      return network.model.apply(variables, x, train=False)

  jax.eval_shape(apply, network.variables, image)
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
  """Returns medians: float32's time over int8's in a round, both in ms."""
  x = jax.random.normal(jax.random.key(0), (batch, *row.inputs))
  slices = [x[i : i + at_once] for i in range(0, batch, at_once)]
  runs = [
    (jax.jit(layer.apply), variables, inputs)
    for (layer, variables), inputs in ((row.plain, [x]), (row.served, slices))
  ]
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


def _seconds(run, variables, inputs: list[jax.Array], calls: int) -> float:
  """Returns the time of a call, all slices of the inputs in turn."""
  began = time.perf_counter()
  for _ in range(calls):
    jax.block_until_ready([run(variables, x) for x in inputs])
  return (time.perf_counter() - began) / calls
