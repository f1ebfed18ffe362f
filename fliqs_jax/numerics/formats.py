"""Numeric formats: their numbers, their names, the named spaces (Table 5)."""

from collections.abc import Iterable, Sequence
import dataclasses
import re

# The candidates of DQSS; `numerics.strategies` computes their thresholds.
STRATEGIES = ('max_abs', 'kl', 'eq', 'admm')


@dataclasses.dataclass(frozen=True)
class NumericFormat:
  """A symmetric numeric format, described as a float with subnormals.

  One description serves integers and floats: an integer of k bits is the float
  whose whole range is subnormal, with a step of 1 (`min_exponent` equals
  `mantissa_bits`). Formats have no infinities and no NaN codes.

  It may name a strategy, a rule that finds the threshold in the numbers
  themselves (`numerics.strategies`); otherwise a rule of the layer applies.

  Attributes:
    name: canonical spelling, `INT4`, `E4M3`, `BF16`, or `INT4:kl`.
    bits: bits of one stored value, sign included; what BOPs count (Eq. 1).
    mantissa_bits: number of explicit mantissa bits.
    min_exponent: exponent of the smallest normal number; below
      `2**min_exponent` the step is `2**(min_exponent - mantissa_bits)`.
    max_value: largest representable magnitude on the unscaled grid.
    scaled: whether a scale maps values to the grid. Only BF16 has none; its
      exponent covers the range by itself.
    strategy: one of `STRATEGIES`; empty: none.
  """

  name: str
  bits: int
  mantissa_bits: int
  min_exponent: int
  max_value: float
  scaled: bool = True
  strategy: str = ''

  @property
  def grid_format(self) -> 'NumericFormat':
    """The format of the same grid without a strategy."""
    if not self.strategy:
      return self
    return dataclasses.replace(
      self, name=self.name.partition(':')[0], strategy=''
    )

  @property
  def is_integer(self) -> bool:
    """Whether it is one of INT2 to INT8."""
    return self.name.startswith('INT')

  def __str__(self) -> str:
    return self.name


def _integer(bits: int) -> NumericFormat:
  return NumericFormat(
    f'INT{bits}', bits, bits - 2, bits - 2, float(2 ** (bits - 1) - 1)
  )


def _float(exponent_bits: int, mantissa_bits: int) -> NumericFormat:
  # The bias centres the exponents on zero (A.5); all codes are finite.
  bias = 2 ** (exponent_bits - 1) - 1
  max_exponent = 2**exponent_bits - 1 - bias
  return NumericFormat(
    f'E{exponent_bits}M{mantissa_bits}',
    1 + exponent_bits + mantissa_bits,
    mantissa_bits,
    1 - bias,
    2.0**max_exponent * (2 - 2.0**-mantissa_bits),
  )


# The least exponent is not bfloat16's own -126: a step below the smallest
# normal float32 would be flushed to zero by XLA.
BF16 = NumericFormat(
  'BF16', 16, 7, -119, 2.0**127 * (2 - 2.0**-7), scaled=False
)

_ALLOWED = (
  'INT2 to INT8, ExMy with at least one exponent bit and 4 to 8 bits in all '
  '(E2M1, E4M3, ...), or BF16'
)


def parse(name: str | NumericFormat) -> NumericFormat:
  """Returns the format that `name` spells, in any case.

  Raises:
    ValueError: for anything but INT2..INT8, an ExMy of 4 to 8 bits, or BF16; a
      colon and a strategy may follow, but not behind BF16, and `kl` only behind
      an integer.
  """
  if isinstance(name, NumericFormat):
    return name
  # A config may hold a number where a name is due; it gets the error below.
  grid_name, colon, strategy = f'{name}'.strip().partition(':')
  if colon:
    return with_strategy(_grid_format(grid_name, name), strategy.lower())
  return _grid_format(grid_name, name)


def with_strategy(
  numeric_format: NumericFormat, strategy: str
) -> NumericFormat:
  """Returns a format whose thresholds a strategy finds.

  Args:
    numeric_format: a format without a strategy.
    strategy: one of `STRATEGIES`.

  Raises:
    ValueError: the strategy is unknown, or the format cannot have it.
  """
  name = f'{numeric_format}:{strategy}'
  if strategy not in STRATEGIES:
    raise ValueError(
      f'unknown strategy in {name!r}; allowed: {", ".join(STRATEGIES)}'
    )
  if not numeric_format.scaled:
    raise ValueError(f'{name!r}: {numeric_format} has no threshold to choose')
  if strategy == 'kl' and not numeric_format.is_integer:
    raise ValueError(
      f'{name!r}: kl merges a histogram into equal steps, which only integers '
      'have; use max_abs, eq or admm with floats'
    )
  return dataclasses.replace(numeric_format, name=name, strategy=strategy)


def with_strategies(
  formats: Sequence[NumericFormat], strategies: Sequence[str]
) -> tuple[NumericFormat, ...]:
  """Returns each format with each strategy; BF16 and those that have one stay.

  Args:
    formats: a menu.
    strategies: names of strategies; empty: the menu stays as it is.

  Raises:
    ValueError: a strategy is unknown, or a format cannot have it.
  """
  if not strategies:
    return tuple(formats)
  return tuple(
    option
    for fmt in formats
    for option in (
      (with_strategy(fmt, strategy) for strategy in strategies)
      if fmt.scaled and not fmt.strategy
      else (fmt,)
    )
  )


def has_strategies(formats: Sequence[NumericFormat]) -> bool:
  """Returns whether any format of a menu has a strategy."""
  return any(fmt.strategy for fmt in formats)


def _grid_format(text: str, name: str) -> NumericFormat:
  """Returns the format of a text; an error repeats the whole name."""
  text = text.strip().upper()
  if text == 'BF16':
    return BF16
  if match := re.fullmatch(r'INT([2-8])', text):
    return _integer(int(match[1]))
  if match := re.fullmatch(r'E(\d)M(\d)', text):
    exponent_bits, mantissa_bits = int(match[1]), int(match[2])
    if exponent_bits >= 1 and 4 <= 1 + exponent_bits + mantissa_bits <= 8:
      return _float(exponent_bits, mantissa_bits)
  raise ValueError(f'unknown format {name!r}; allowed: {_ALLOWED}')


_LOW_FLOATS = tuple(f'E{x}M{y}' for x in range(2, 7) for y in range(1, 8 - x))

# Table 5.
SPACES: dict[str, tuple[str, ...]] = {
  'int_s': ('INT4', 'INT8', 'BF16'),
  'int_l': ('INT4', 'INT5', 'INT6', 'INT7', 'INT8', 'BF16'),
  'fp_s': ('E2M1', 'E4M3', 'BF16'),
  'fp_l': (*_LOW_FLOATS, 'BF16'),
}


def menu(
  formats: str | NumericFormat | Sequence[str],
) -> tuple[NumericFormat, ...]:
  """Returns the formats a decision may choose from, in the given order.

  Args:
    formats: a named space (`int_s`, `int_l`, `fp_s`, `fp_l`), one format or
      its name, several of both joined by `+`, or a list of names. What two
      named spaces share counts once.

  Raises:
    ValueError: for an unknown name, an empty list or a format named twice.
  """
  if isinstance(formats, str) and '+' in formats:
    parts = [part.strip() for part in formats.split('+')]
    spaces = [menu(part) for part in parts if part in SPACES]
    others = tuple(parse(part) for part in parts if part not in SPACES)
    choices = (*dict.fromkeys(sum(spaces, ())), *others)
  elif isinstance(formats, str) and formats in SPACES:
    choices = tuple(parse(name) for name in SPACES[formats])
  elif isinstance(formats, (str, NumericFormat)):
    try:
      choices = (parse(formats),)
    except ValueError as error:
      raise ValueError(
        f'{error}; or a named space: {", ".join(SPACES)}'
      ) from None
  elif isinstance(formats, Iterable):
    choices = tuple(parse(name) for name in formats)
  else:
    raise ValueError(
      f'formats are {formats!r}; give a named space ({", ".join(SPACES)}), the '
      'name of a format, or a list of names'
    )
  if not choices:
    raise ValueError(
      'a menu of formats is empty; name at least one format, or exclude the '
      'layer from quantization'
    )
  names = [choice.name for choice in choices]
  if len(set(names)) < len(names):
    raise ValueError(
      f'a menu names a format twice: {", ".join(names)}; name each once'
    )
  return choices
