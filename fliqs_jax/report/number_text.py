"""Formatting of numbers in reports; a number that is not finite is a dash."""

import math

UNKNOWN = '–'


def significant(value: float, digits: int = 3) -> str:
  """Spells a number with so many significant digits, never as 1e6."""
  if not math.isfinite(value):
    return UNKNOWN
  least = digits - 1 - math.floor(math.log10(abs(value))) if value else 0
  return f'{value:,.{max(0, least)}f}'


def decimals(value: float) -> int:
  """Returns how many decimals leave a column's largest number four digits.

  One number of them to a column, so that its points are below each other.
  """
  return len(significant(value, 4).partition('.')[2])


def fixed(value: float, places: int) -> str:
  """Spells a number with so many decimals."""
  return f'{value:,.{places}f}' if math.isfinite(value) else UNKNOWN


def percent(fraction: float, places: int = 2) -> str:
  """Spells a fraction of 1."""
  known = math.isfinite(fraction)
  return f'{100 * fraction:.{places}f}%' if known else UNKNOWN


def memory(bits: float) -> str:
  """Spells a number of bits in bytes."""
  if not math.isfinite(bits):
    return UNKNOWN
  size, unit = bits / 8, 'B'
  for larger in ('kB', 'MB', 'GB'):
    if size >= 1000:
      size, unit = size / 1000, larger
  return f'{significant(size)} {unit}'


def duration(seconds: float) -> str:
  """Spells a time in seconds, minutes and hours."""
  minutes, rest = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  if hours:
    return f'{hours} h {minutes} min'
  return f'{minutes} min {rest} s' if minutes else f'{seconds:.1f} s'
