"""Formatting of numbers in reports; a number that is not finite is a dash."""

from collections.abc import Sequence
import math

from fliqs_jax import tasks

UNKNOWN = '–'


def significant(value: float, digits: int = 3) -> str:
  """Spells a number with `digits` significant digits, never as 1e6."""
  if not math.isfinite(value):
    return UNKNOWN
  least = digits - 1 - math.floor(math.log10(abs(value))) if value else 0
  return f'{value:,.{max(0, least)}f}'


def decimals(value: float) -> int:
  """Returns the number of decimals with which `value` has four digits.

  All numbers of a column have the decimals of its largest one, so that the
  decimal points are aligned.
  """
  return len(significant(value, 4).partition('.')[2])


def fixed(value: float, places: int) -> str:
  """Spells a number with `places` decimals."""
  return f'{value:,.{places}f}' if math.isfinite(value) else UNKNOWN


def percent(fraction: float, places: int = 2) -> str:
  """Spells a fraction of 1 in percent."""
  known = math.isfinite(fraction)
  return f'{100 * fraction:.{places}f}%' if known else UNKNOWN


def unit(metric: str) -> str:
  """Returns the unit in which a task's metric is shown, '%' or 'dB'."""
  units = {task.METRIC: task.UNIT for task in tasks.TASKS.values()}
  return units.get(metric, '%')


def scale(metric: str) -> float:
  """Returns the factor from a task's metric to its unit."""
  return 100.0 if unit(metric) == '%' else 1.0


def title(metric: str) -> str:
  """Returns the title of a column or axis of a metric of the test split."""
  return f'test {metric}, {unit(metric)}'


def points(metric: str) -> str:
  """Returns the unit of a difference of a task's metric."""
  return 'points' if unit(metric) == '%' else unit(metric)


def quality(value: float, metric: str) -> str:
  """Spells a task's metric with its unit: 97.10%, or 33.31 dB."""
  if unit(metric) == '%':
    return percent(value)
  known = math.isfinite(value)
  return f'{value:.2f} {unit(metric)}' if known else UNKNOWN


def memory(bits: float) -> str:
  """Spells a number of bits in bytes, kB, MB or GB."""
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


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """Returns a Markdown table.

  Args:
    head: [C] names of the columns.
    rows: [C] texts each.
  """
  lines = [head, ['---'] * len(head), *rows]
  return '\n'.join(f'| {" | ".join(line)} |' for line in lines)
