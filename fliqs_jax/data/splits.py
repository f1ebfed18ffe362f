"""Parsing of split strings such as 'train[:80%]' into example numbers.

The grammar and the rounding are those of TFDS, so a string has the same meaning
in both. The parser is here because data sets without TFDS use it, too, and
because mistakes must be reported before a data set is opened.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import itertools
import re

_BOUND = r'(-?\d[\d_]*(?:\.\d+)?)?(%)?'
_PART = re.compile(rf'(\w[\w-]*)(?:\[{_BOUND}:{_BOUND}\])?')
_ALLOWED = (
  "allowed: a split's name, alone or with a range in percent or in examples, "
  "such as 'train', 'train[:80%]', 'train[-100:]', or several joined by '+'"
)


@dataclasses.dataclass(frozen=True, order=True)
class Range:
  """Examples start .. stop - 1 of a named split."""

  split: str
  start: int
  stop: int

  def __len__(self) -> int:
    return self.stop - self.start

  def times(self, parts: int) -> 'Range':
    """Returns the range of all parts of its units."""
    return Range(self.split, parts * self.start, parts * self.stop)

  def __str__(self) -> str:
    return f'{self.split}[{self.start}:{self.stop}]'


def parse(
  key: str, spec: str, split_sizes: Mapping[str, int]
) -> tuple[Range, ...]:
  """Returns the ranges that a split string names, in its order.

  Args:
    key: the config key of `spec`, which error messages name.
    spec: the split string.
    split_sizes: number of examples of every named split.

  Raises:
    ValueError: the string is malformed, a split is unknown, or a range is empty
      or reaches beyond its split.
  """
  parts = re.split(r'\s*\+\s*', spec)
  return tuple(_parse_part(key, spec, part, split_sizes) for part in parts)


def _parse_part(
  key: str, spec: str, part: str, split_sizes: Mapping[str, int]
) -> Range:
  match = _PART.fullmatch(part)
  if not match:
    raise ValueError(f'{key}={spec!r} is no split; {_ALLOWED}')
  split, start, start_unit, stop, stop_unit = match.groups()
  if split not in split_sizes:
    raise ValueError(
      f'{key}={spec!r} names an unknown split {split!r}; this data set has: '
      f'{", ".join(split_sizes)}'
    )
  if start and stop and start_unit != stop_unit:
    # TFDS reads [10:50%] as [10%:50%].
    raise ValueError(
      f'{key}={spec!r} mixes examples and percent; write both bounds of a '
      'range in the same unit'
    )
  size = split_sizes[split]
  bounds = []
  for text, unit, default in (start, start_unit, 0), (stop, stop_unit, size):
    if not text:
      if unit:
        raise ValueError(f'{key}={spec!r} is no split; {_ALLOWED}')
      bounds.append(default)
      continue
    if not unit and '.' in text:
      raise ValueError(f'{key}={spec!r} names part of an example; {_ALLOWED}')
    bound = round(float(text) * size / 100.0) if unit else int(text)
    if abs(bound) > size:
      raise ValueError(
        f'{key}={spec!r} reaches beyond the {size} examples of {split!r}; '
        'name a smaller range'
      )
    bounds.append(bound + size if bound < 0 else bound)
  if bounds[0] >= bounds[1]:
    raise ValueError(
      f'{key}={spec!r} selects none of the {size} examples of {split!r}; '
      'name a larger range'
    )
  return Range(split, *bounds)


def check_disjoint(
  specs: Mapping[str, str], ranges: Mapping[str, Sequence[Range]]
) -> None:
  """Checks that no two ranges share an example.

  Args:
    specs: {config key: split string}, which error messages name.
    ranges: {config key: the ranges of its split string}.

  Raises:
    ValueError: two ranges share an example.
  """
  named = sorted((r, key) for key in ranges for r in ranges[key])
  for (left, left_key), (right, right_key) in itertools.pairwise(named):
    if left.split == right.split and right.start < left.stop:
      raise ValueError(
        f'{left_key}={specs[left_key]!r} and {right_key}={specs[right_key]!r} '
        f'overlap: {left} and {right}; weights learn on train, the controller '
        'on valid, and test is reported, so each example may be in one of them '
        'only'
      )
