"""Prices of an op on a chip, as a table over all of its options.

A price depends on both formats and on sizes together, as the longer of
computing and memory traffic does. It is taken for each combination of the
options before the search, so that the cost stays linear in each leaf.
"""

from collections.abc import Mapping, Sequence
import functools
import math
from typing import Any, NamedTuple

import numpy as np

from fliqs_jax.numerics import formats
from fliqs_jax.space import ops as ops_lib
from fliqs_jax.space import sizes
from fliqs_jax.space.chips import chip as chip_lib

# Where a price comes from, if not from a figure of the file.
INTERPOLATED = 'interpolated'


class Price(NamedTuple):
  """What an op costs on a chip.

  Attributes:
    value: the price, in the unit of the chip.
    weights: format in which the chip multiplies the weights.
    activations: format in which it multiplies the activations.
    confidence: one of `chip.CONFIDENCES`, or `interpolated`.
  """

  value: float
  weights: formats.NumericFormat
  activations: formats.NumericFormat
  confidence: str


class Counts(NamedTuple):
  """The numbers of an op at one choice of sizes, for one input.

  Attributes:
    kind: as in `ops.OpShape`.
    macs: multiply-accumulates.
    weights: number of weights.
    channels: number of output channels.
    inputs: number of activations that it reads.
    outputs: number of its results.
    window: height and width of the kernel; () if it has none.
    strides: strides; () if it has none.
  """

  kind: str
  macs: float
  weights: float
  channels: float
  inputs: float
  outputs: float
  window: tuple[int, ...]
  strides: tuple[int, ...]

  @property
  def key(self) -> chip_lib.Key:
    """What identifies the op among measured layers."""
    window = self.window or (1, 1)
    channels = round(self.channels)
    inputs = self.weights / (math.prod(window) * channels)
    return chip_lib.Key(
      self.kind == 'depthwise',
      max(round(inputs), 1),
      channels,
      window,
      self.strides or (1, 1),
      max(round(self.macs / max(self.weights, 1)), 1),
    )


def of_op(chip: chip_lib.Chip, op: ops_lib.Op, leaves: ops_lib.Leaves) -> Any:
  """Returns the (expected) price [] of an op, in the unit of the chip.

  Args:
    chip: the chip.
    op: the op.
    leaves: {leaf's path: [K] one-hot or probability}.

  Raises:
    ValueError: the chip has no price for the op or a format; the message names
      both.
  """
  try:
    table, axes = _table(chip, op.shape)
  except ValueError as error:
    raise ValueError(f'{op.path}: {error}') from None
  result: Any = table
  for position, name in reversed(list(enumerate(axes))):
    leaf = leaves[op.leaf(name)]
    # The axes of options that are still there lie before the last one.
    leaf = leaf[(..., *(None,) * position, slice(None))]
    result = (result * leaf).sum(-1)
  return result


@functools.lru_cache(maxsize=4096)
def _table(
  chip: chip_lib.Chip, shape: ops_lib.OpShape
) -> tuple[np.ndarray, tuple[str, ...]]:
  """Returns [K1, K2, ...] prices, float32, and the leaf of each axis."""
  # Sizes of one decision go together: the leaf of the first stands for all.
  first: dict[str, str] = {}
  axis_of = {name: name for name in shape.format_leaves()}
  for name, size in shape.decided:
    axis_of[name] = first.setdefault(size.decision, name)
  axes = tuple(dict.fromkeys(axis_of.values()))
  options = shape.leaves()
  table = np.empty([len(options[name]) for name in axes], np.float32)
  for index in np.ndindex(table.shape):
    picked = dict(zip(axes, index))
    at = {name: picked[axis] for name, axis in axis_of.items()}
    table[index] = price(chip, *_at(shape, at)).value
  return table, axes


def chosen(
  op: ops_lib.Op, leaves: ops_lib.Leaves
) -> tuple[Counts, formats.NumericFormat, formats.NumericFormat]:
  """Returns the numbers of an op and its formats, as `price` takes them.

  Args:
    op: the op.
    leaves: {leaf's path: [K] one-hot}.
  """
  names = op.shape.leaves()
  return _at(
    op.shape, {name: int(np.argmax(leaves[op.leaf(name)])) for name in names}
  )


def _at(
  shape: ops_lib.OpShape, index: Mapping[str, int]
) -> tuple[Counts, formats.NumericFormat, formats.NumericFormat]:
  """Returns what `price` takes, at {name of a leaf: index of its option}."""
  picks = {name: (size, index[name]) for name, size in shape.decided}
  menus = shape.format_leaves()
  sides = _sides({name: menu[index[name]] for name, menu in menus.items()})
  return counts(shape, picks), *sides


def _sides(
  picked: Mapping[str, formats.NumericFormat],
) -> tuple[formats.NumericFormat, formats.NumericFormat]:
  """Returns the formats of weights and activations; BF16: unquantized."""
  tied = picked.get('format', formats.BF16)
  return picked.get('weights', tied), picked.get('activations', tied)


def counts(
  shape: ops_lib.OpShape, picks: Mapping[str, tuple[Any, int]]
) -> Counts:
  """Returns the numbers of an op at chosen sizes.

  Args:
    shape: shape of the op at its largest sizes.
    picks: {name of a size leaf: (its size, index of the chosen option)}.
  """
  share = {name: size.shares[i] for name, (size, i) in picks.items()}
  outputs = share.get(sizes.OUTPUT_CHANNELS, 1.0)
  inputs = share.get(sizes.INPUT_CHANNELS, 1.0)
  both = inputs * outputs * share.get(sizes.KERNEL, 1.0)
  if shape.kind == 'depthwise':
    inputs = outputs  # Each output channel reads its own.
  window = shape.window
  if sizes.KERNEL in picks:
    size, i = picks[sizes.KERNEL]
    window = (size.labels[i],) * len(window)
  return Counts(
    shape.kind,
    shape.macs * both,
    shape.weights * both,
    shape.channels * outputs,
    shape.inputs * inputs,
    shape.outputs * outputs,
    window,
    shape.strides,
  )


def price(
  chip: chip_lib.Chip,
  op: Counts,
  weights: formats.NumericFormat,
  activations: formats.NumericFormat,
) -> Price:
  """Returns the price of an op whose operands have two formats.

  Args:
    chip: the chip.
    op: numbers of the op.
    weights: format of its weights; BF16 if they are not quantized.
    activations: format of its activations.

  Raises:
    ValueError: the chip multiplies the formats neither as they are nor in wider
      ones.
  """
  pair = weights.grid_format, activations.grid_format
  found = _variable(chip, op, *pair)
  if chip.fixed_format is None:
    return found
  fixed = _variable(chip, op, chip.fixed_format, chip.fixed_format).value
  share = chip.fixed_share
  return found._replace(value=share * fixed + (1 - share) * found.value)


def _variable(
  chip: chip_lib.Chip,
  op: Counts,
  weights: formats.NumericFormat,
  activations: formats.NumericFormat,
) -> Price:
  if op.kind not in ('attend', 'embed'):
    key = op.key
    for layer in chip.layers:
      if layer.key == key:
        held = _held(layer.times, weights, activations)
        if held is not None:
          return Price(layer.times[held], held, held, layer.figures.confidence)
  if chip.rates:
    return _rated(chip, op, weights, activations)
  return _interpolated(chip, op, weights, activations)


def holds(wide: formats.NumericFormat, narrow: formats.NumericFormat) -> bool:
  """Returns whether a chip that multiplies one format takes another one, too.

  BF16 takes all. An integer takes narrower integers, a float those with neither
  more exponents nor more mantissa bits. A float would hold many integers
  exactly, but no chip or compiler is known to multiply them so.
  """
  if wide == formats.BF16 or wide == narrow:
    return True
  if narrow == formats.BF16 or wide.is_integer != narrow.is_integer:
    return False
  exponents = [f.bits - f.mantissa_bits for f in (wide, narrow)]
  return (
    wide.mantissa_bits >= narrow.mantissa_bits and exponents[0] >= exponents[1]
  )


def _held(
  times: Mapping[formats.NumericFormat, float],
  weights: formats.NumericFormat,
  activations: formats.NumericFormat,
) -> formats.NumericFormat | None:
  """Returns the fastest format that takes both operands, if there is one."""
  fitting = [
    (time, f.bits, f)
    for f, time in times.items()
    if holds(f, weights) and holds(f, activations)
  ]
  return min(fitting, default=(0.0, 0, None), key=lambda fit: fit[:2])[2]


def _rated(
  chip: chip_lib.Chip,
  op: Counts,
  weights: formats.NumericFormat,
  activations: formats.NumericFormat,
) -> Price:
  """Returns the price by the cheapest rate that takes both operands."""
  fitting = [
    rate
    for rate in chip.rates
    if (not rate.ops or op.kind in rate.ops)
    and holds(rate.weights, weights)
    and holds(rate.activations, activations)
  ]
  if not fitting:
    raise ValueError(_no_price(chip, op, weights, activations))

  def computing(rate: chip_lib.Rate) -> float:
    return rate.per_mac * op.macs * chip.batch + rate.per_layer

  rate = min(
    fitting,
    key=lambda r: (computing(r), r.weights.bits + r.activations.bits),
  )
  read = op.weights
  if op.kind == 'embed':
    read = op.outputs * chip.batch  # The rows that are looked up.
  # The layer before writes an activation in the format in which this one reads
  # it.
  moved = read * chip.bits(weights)
  moved += 2 * op.inputs * chip.batch * chip.bits(activations)
  cast = 0.0
  for count, stored, used in (
    (read, weights, rate.weights),
    (op.inputs * chip.batch, activations, rate.activations),
  ):
    if chip.bits(stored) != chip.bits(used):
      cast += chip.cast_passes * count * chip.bits(used)
  terms = computing(rate), moved / 8 * chip.per_byte
  value = max(terms) if chip.overlaps else sum(terms)
  return Price(
    value + cast / 8 * chip.per_byte,
    rate.weights,
    rate.activations,
    rate.figures.confidence,
  )


def _interpolated(
  chip: chip_lib.Chip,
  op: Counts,
  weights: formats.NumericFormat,
  activations: formats.NumericFormat,
) -> Price:
  """Returns a price between those of measured layers of similar size.

  The logarithm of the time is linear in that of the multiply-accumulates,
  between measured layers of the same kernel if there are two, else of all.
  Beyond the largest and the smallest, a multiply-accumulate costs what it does
  there.
  """
  times = {}
  for numeric_format in {f for layer in chip.layers for f in layer.times}:
    layers = [x for x in chip.layers if numeric_format in x.times]
    same = [x for x in layers if _alike(x.key, op.key)]
    if len({x.key.macs for x in same}) > 1:
      layers = same
    times[numeric_format] = _between(layers, numeric_format, op.macs)
  held = _held(times, weights, activations)
  if held is None:
    raise ValueError(_no_price(chip, op, weights, activations))
  return Price(times[held], held, held, INTERPOLATED)


def _alike(one: chip_lib.Key, other: chip_lib.Key) -> bool:
  return (one.is_depthwise, one.kernel) == (other.is_depthwise, other.kernel)


def _between(
  layers: Sequence[chip_lib.Measured],
  numeric_format: formats.NumericFormat,
  macs: float,
) -> float:
  times: dict[int, list[float]] = {}
  for layer in layers:
    times.setdefault(layer.key.macs, []).append(layer.times[numeric_format])
  known = sorted(times)
  nearest = min(max(macs, known[0]), known[-1])
  means = [np.mean(np.log(times[n])) for n in known]
  time = np.exp(np.interp(np.log(nearest), np.log(known), means))
  return float(time * macs / nearest)


def _no_price(
  chip: chip_lib.Chip,
  op: Counts,
  weights: formats.NumericFormat,
  activations: formats.NumericFormat,
) -> str:
  known = {f'{r.weights} x {r.activations}' for r in chip.rates}
  known |= {f'{f} x {f}' for layer in chip.layers for f in layer.times}
  return (
    f'{chip.kind} has no price of {weights} weights x {activations} '
    f'activations for {op.kind} ops; it prices {", ".join(sorted(known))}, and '
    'a narrower format as a wider one of its kind. Remove the format from the '
    'menu, or add its price to the file'
  )
