r"""Print the cost of a network, layer by layer, from shapes alone.

python -m fliqs_jax.cost --model=mobilenetv2 [--width=0.5] [--format=INT8]
    [--image_size=192] [--classes=1000] [--kind=latency:h100] [--json]

The cost is that of one input with every layer at one format: bit operations, or
another kind, such as that of a chip, of which a price may be of several inputs.
The command prints a table and the total; with --json the last line is an object
with gbops, gmacs, params, layers, and cost and unit of --kind. No parameter is
allocated.
"""

import argparse
from collections.abc import Sequence
import json
from typing import Any

import jax
import jax.numpy as jnp

from fliqs_jax import models
from fliqs_jax.runtime import commands
from fliqs_jax.space import discovery
from fliqs_jax.space import quant_spec
from fliqs_jax.space import search_space
from fliqs_jax.space.chips import prices


def space_of(
  name: str,
  numeric_format: str,
  width: float | None = None,
  image_size: int | None = None,
  classes: int | None = None,
) -> search_space.SearchSpace:
  """Returns the search space of a network whose layers all have one format.

  Args:
    name: name of the network, a key of `models.MODELS`.
    numeric_format: name of the format of every layer.
    width: multiplier of the channels; None: as published.
    image_size: height and width of the input in pixels; None: as published.
    classes: number of outputs; None: 1000, as of ImageNet.

  Raises:
    ValueError: the network or the format is unknown, a number is too small, or
      the network has no width, tells no classes apart or sees no images.
  """
  spec = quant_spec.QuantSpec(numeric_format, exclude=models.unquantized(name))
  if len(spec.formats) > 1:
    raise ValueError(
      f'--format={numeric_format} names {len(spec.formats)} formats, but the '
      f'cost is that of one: choose one of {", ".join(map(str, spec.formats))}'
    )
  config = models.published(name)
  if width is not None:
    if 'width' not in config:
      raise ValueError(f'--width={width}: {name} has no width; omit the flag')
    if width <= 0:
      raise ValueError(f'--width={width} must be positive')
    config |= dict(width=width)
  if classes is not None:
    if not models.has_classes(name):
      raise ValueError(
        f'--classes={classes}: {name} tells no classes apart; omit the flag'
      )
    if classes < 1:
      raise ValueError(f'--classes={classes} must be at least 1')
  if image_size is not None and image_size < 1:
    raise ValueError(f'--image_size={image_size} must be at least 1')
  model = models.build(config, classes or 1000, spec)
  inputs = model.input_shape
  if isinstance(inputs, tuple):
    shape = (image_size, image_size, inputs[2]) if image_size else inputs
    example = jax.ShapeDtypeStruct(shape, jnp.float32)
  elif image_size is None:
    example = inputs
  else:
    raise ValueError(
      f'--image_size={image_size}: {name} does not see images; omit the flag'
    )
  one = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape), leaf.dtype), example
  )
  return discovery.find(model, one, spec=spec, train=False)


def totals(
  space: search_space.SearchSpace, kind: str = 'bops'
) -> dict[str, Any]:
  """Returns the totals of a space with nothing open.

  Args:
    space: the decisions of a model, of one option each.
    kind: as `cost.kind`.

  Returns:
    gbops, gmacs, params; layers, the number of quantized layers, as the paper
    counts them; cost and unit of the kind.

  Raises:
    ValueError: the kind is unknown, or prices no option of a layer.
  """
  cost = space.cost(kind)
  return dict(
    gbops=float(space.cost('bops')(space.only())),
    gmacs=sum(op.shape.macs for op in space.ops) / 1e9,
    params=space.params,
    layers=len(space.decisions),
    cost=float(cost(space.only())),
    unit=cost.unit,
  )


def table(space: search_space.SearchSpace, kind: str = 'bops') -> str:
  """Returns a table with one line per layer, and a line of totals.

  The columns are kind, format, MACs, weights, cost and share of the cost; of a
  chip also the format in which it multiplies, and where the price comes from.

  Args:
    space: the decisions of a model, of one option each.
    kind: as `cost.kind`.

  Raises:
    ValueError: as `totals`.
  """
  leaves = space.leaves(space.only())
  formats_of = space.assignment(space.only())
  total, cost = totals(space, kind), space.cost(kind)
  chip = cost.rules.chip
  width = max(len(op.path) for op in space.ops)
  more = f'  {"runs as":13}  price' if chip else ''
  lines = [
    f'{"layer":{width}}  {"kind":9}  {"format":6}  {"MACs":>13}  '
    f'{"weights":>11}  {cost.unit:>10}  {"share":>6}{more}'
  ]
  for op in space.ops:
    shape = op.shape
    weights, _ = formats_of[op.path]
    value = float(cost.of_op(op, leaves))
    if chip:
      price = prices.price(chip, *prices.chosen(op, leaves))
      pair = dict.fromkeys((price.weights.name, price.activations.name))
      more = f'  {" x ".join(pair):13}  {price.confidence}'
    lines.append(
      f'{op.path:{width}}  {shape.kind:9}  {weights or "BF16":6}  '
      f'{shape.macs:13,}  {shape.weights:11,}  {value:10.4g}  '
      f'{value / total["cost"]:6.1%}{more}'
    )
  last = (
    f'{total["layers"]} layers, {total["params"]:,} parameters, '
    f'{total["gmacs"]:.4f} GMACs, {total["gbops"]:.4f} GBOPs'
  )
  if kind != 'bops':
    last += f', {total["cost"]:.5g} {cost.unit}'
  if chip:
    inputs = f'{chip.batch} inputs' if chip.batch > 1 else 'one input'
    last += f' for {inputs} on {chip.name}, predicted'
  return '\n'.join([*lines, last])


@commands.reported
def main(argv: Sequence[str]) -> int:
  """Prints the table; a user's mistake gives one line and status 2."""
  parser = argparse.ArgumentParser(prog='python -m fliqs_jax.cost')
  parser.add_argument('--model', required=True, help=', '.join(models.MODELS))
  parser.add_argument('--width', type=float)
  parser.add_argument('--format', default='BF16')
  parser.add_argument('--image_size', type=int)
  parser.add_argument('--classes', type=int)
  parser.add_argument('--kind', default='bops')
  parser.add_argument('--json', action='store_true')
  args = parser.parse_args(argv)
  space = space_of(
    args.model, args.format, args.width, args.image_size, args.classes
  )
  print(table(space, args.kind))
  if args.json:
    print(json.dumps(totals(space, args.kind)))
  return 0


if __name__ == '__main__':
  commands.run(main)
