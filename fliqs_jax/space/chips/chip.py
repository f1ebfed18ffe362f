"""Chip: what a section of a `targets/NAME.yaml` says."""

from collections.abc import Callable, Mapping
import dataclasses
import math
from typing import NamedTuple

from fliqs_jax.numerics import formats

# Where figures come from: a vendor's data sheet, measurement, assumption.
CONFIDENCES = ('datasheet', 'measured', 'assumed')


class Section(NamedTuple):
  """A row of `SECTIONS`: a kind of cost that a file may describe.

  Attributes:
    unit: unit of the cost, as it is printed.
    rate: key of the price of a multiply-accumulate in the file.
    of_rate: value of that key -> price of a multiply-accumulate, in the unit.
    layer: key of a price of an op as such, 1000 times the unit; empty: none.
    memory: key of the price of memory traffic; empty: it costs nothing.
    of_memory: value of that key -> price of a byte, in the unit.
    lanes: key of the number of multiply-accumulates that a price is of; empty:
      it is of one.
    overlaps: whether computing hides memory traffic, so that the longer of
      both counts and not their sum.
  """

  unit: str
  rate: str
  of_rate: Callable[[float], float]
  layer: str
  memory: str
  of_memory: Callable[[float], float]
  lanes: str
  overlaps: bool


# A multiply-accumulate is two operations, as vendors count them.
SECTIONS: dict[str, Section] = {
  'latency': Section(
    'ms',
    'teraops',
    lambda teraops: 2e-9 / teraops,
    'microseconds_per_layer',
    'terabytes_per_second',
    lambda terabytes: 1e-9 / terabytes,
    '',
    overlaps=True,
  ),
  'energy': Section(
    'uJ',
    'picojoules',
    lambda picojoules: 1e-6 * picojoules,
    '',
    'picojoules_per_byte',
    lambda picojoules: 1e-6 * picojoules,
    '',
    overlaps=False,
  ),
  'lut': Section(
    'kLUT',
    'luts',
    lambda luts: 1e-3 * luts,
    'luts_per_layer',
    '',
    lambda luts: 0.0,
    'macs_per_lane',
    overlaps=False,
  ),
}


class Figures(NamedTuple):
  """Where a figure comes from.

  Attributes:
    source: a publication or a command.
    date: when it was read or measured, as text.
    confidence: one of `CONFIDENCES`.
  """

  source: str
  date: str
  confidence: str


class Rate(NamedTuple):
  """The price of an op whose operands have two formats.

  Attributes:
    weights: format of the weights, without a strategy.
    activations: format of the activations.
    ops: kinds of ops that have this price; (): all.
    per_mac: price of a multiply-accumulate, in the unit of the section.
    per_layer: price of the op as such, in the unit of the section.
    figures: where it comes from.
  """

  weights: formats.NumericFormat
  activations: formats.NumericFormat
  ops: tuple[str, ...]
  per_mac: float
  per_layer: float
  figures: Figures


class Key(NamedTuple):
  """What identifies a layer among measured ones.

  Attributes:
    is_depthwise: whether it is a depthwise convolution.
    inputs: input channels that an output channel reads.
    outputs: output channels.
    kernel: height and width of its kernel in pixels; (1, 1) of a dense layer.
    strides: its strides; (1, 1) of a dense layer.
    positions: number of results of a channel for one input, such as 28 * 28.
  """

  is_depthwise: bool
  inputs: int
  outputs: int
  kernel: tuple[int, ...]
  strides: tuple[int, ...]
  positions: int

  @property
  def macs(self) -> int:
    """The multiply-accumulates of the layer for one input."""
    taps = math.prod(self.kernel)
    return self.positions * taps * self.inputs * self.outputs


class Measured(NamedTuple):
  """The measured times of one layer, weights and activations at one format.

  Attributes:
    key: what identifies the layer.
    times: {format: price}, in the unit of the section.
    figures: where they come from.
  """

  key: Key
  times: Mapping[formats.NumericFormat, float]
  figures: Figures


@dataclasses.dataclass(frozen=True, eq=False)
class Chip:
  """One section of a file: the prices of a chip.

  Attributes:
    name: name in the file.
    kind: `SECTION:NAME`, as `cost.kind` has it.
    unit: unit of the prices.
    batch: number of inputs that are computed at once, which a price is of.
    rates: prices by formats; () if only measured layers have prices.
    per_byte: price of a byte of memory traffic.
    overlaps: as in `Section`.
    cast_passes: how often an operand passes through memory in the format of its
      rate, if it is stored in another one.
    stored_bits: {format: bits} of formats whose numbers are not stored in the
      next of 4, 8 and 16 bits.
    layers: measured layers; others are interpolated.
    fixed_share: share of the price at `fixed_format` that no format changes.
    fixed_format: the format of that price; None: there is no such share.
    digest: hash of the file's content.
  """

  name: str
  kind: str
  unit: str
  batch: int
  rates: tuple[Rate, ...]
  per_byte: float
  overlaps: bool
  cast_passes: float
  stored_bits: Mapping[formats.NumericFormat, int]
  layers: tuple[Measured, ...]
  fixed_share: float
  fixed_format: formats.NumericFormat | None
  digest: str

  def bits(self, numeric_format: formats.NumericFormat) -> int:
    """Returns the bits in which a number of a format is stored."""
    stored = self.stored_bits.get(numeric_format)
    if stored is not None:
      return stored
    return next(bits for bits in (4, 8, 16) if numeric_format.bits <= bits)
