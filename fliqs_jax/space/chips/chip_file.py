"""Files of chips: `targets/NAME.yaml`, read and checked.

A file describes one chip. Its sections `latency`, `energy` and `lut` are costs
apart, `cost.kind='latency:NAME'` and so on; NAME is that of a file of
`fliqs_jax/targets/`, or the path of another one. docs/chips.md has the schema.
"""

from collections.abc import Iterator
import hashlib
import math
import os
import pathlib
from typing import Any

from fliqs_jax.numerics import formats
from fliqs_jax.runtime import files
from fliqs_jax.space.chips import chip as chip_lib

_DIRECTORY = pathlib.Path(__file__).parents[2] / 'targets'
# Kinds of ops that a rate may be limited to, of `ops.OpShape.kind`.
_OPS = (
  'pointwise',
  'depthwise',
  'conv',
  'dense',
  'einsum',
  'embed',
  'attend',
)


def names() -> list[str]:
  """Returns the names of the files in `fliqs_jax/targets/`."""
  return sorted(path.stem for path in _DIRECTORY.glob('*.yaml'))


def is_chip(kind: str) -> bool:
  """Returns whether a kind of cost names a section of a chip."""
  return ':' in kind


def read(kind: str) -> chip_lib.Chip:
  """Returns the prices that `SECTION:NAME` names.

  Args:
    kind: a key of `chip.SECTIONS`, a colon, and the name of a file in
      `fliqs_jax/targets/` or the path of another file.

  Raises:
    ValueError: there is no such file or section, or its content is wrong; the
      message names file, key and value.
  """
  section, _, name = kind.partition(':')
  if section not in chip_lib.SECTIONS:
    raise ValueError(
      f'{kind!r}: {section!r} is no section of a chip; allowed: '
      f'{", ".join(chip_lib.SECTIONS)}, as in latency:t4'
    )
  shipped = _DIRECTORY / f'{name}.yaml'
  path = shipped if name in names() else files.at_home(name)
  if not path.is_file():
    raise ValueError(
      f'{kind!r}: there is no file {name}; allowed: the path of a file, or '
      f'{", ".join(names())}'
    )
  try:
    content = _Content(files.read_yaml(path), '')
    return _chip(content, kind, section, path)
  except (OSError, ValueError) as error:
    raise ValueError(f'{path}: {error}') from None


class _Content:
  """A mapping of a file whose keys are read once; `done` refuses others."""

  def __init__(self, mapping: Any, where: str):
    self._where = where
    if not isinstance(mapping, dict):
      raise ValueError(f'{where or "a target"} must be a mapping of keys')
    self._mapping: dict[Any, Any] = mapping
    self._seen: list[str] = []

  def __contains__(self, key: str) -> bool:
    return key in self._mapping

  def error(self, key: str, problem: str) -> ValueError:
    """Returns the error of a key's value."""
    return ValueError(f'{self._name(key)}={self._mapping.get(key)!r} {problem}')

  def _name(self, key: str) -> str:
    return f'{self._where}.{key}' if self._where else key

  def get(self, key: str, default: Any = None) -> Any:
    """Returns a value; without a default the key must be there."""
    self._seen.append(key)
    if key in self._mapping:
      return self._mapping[key]
    if default is None:
      raise ValueError(f'{self._name(key)} is missing')
    return default

  def number(
    self, key: str, default: float | None = None, *, positive: bool = False
  ) -> float:
    """Returns a finite number, at least 0 or above it."""
    value = self.get(key, default)
    # YAML 1.1 reads 1e12 as text.
    try:
      number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
      number = math.nan
    if not 0 <= number < math.inf or (positive and not number):
      bound = 'above 0' if positive else 'of at least 0'
      raise self.error(key, f'must be a finite number {bound}')
    return number

  def count(self, key: str, default: int | None = None) -> int:
    """Returns a whole number of at least 1."""
    number = self.number(key, default, positive=True)
    if number != int(number):
      raise self.error(key, 'must be a whole number')
    return int(number)

  def share(self, key: str) -> float:
    """Returns a number from 0 to 1."""
    number = self.number(key)
    if number > 1:
      raise self.error(key, 'must be at most 1')
    return number

  def pair(self, key: str) -> tuple[int, int]:
    """Returns two whole numbers; one stands for both, none for ones."""
    value = self.get(key, 1)
    both = value if isinstance(value, list) else [value, value]
    is_pair = len(both) == 2 and all(type(n) is int and n > 0 for n in both)
    if not is_pair:
      raise self.error(key, 'must be one or two whole numbers of at least 1')
    return both[0], both[1]

  def text(self, key: str, default: str | None = None) -> str:
    """Returns text, or a date as text."""
    value = self.get(key, default)
    if isinstance(value, (dict, list, bool)) or value is None:
      raise self.error(key, 'must be text')
    return str(value)

  def parsed(self, key: str, names: Any) -> formats.NumericFormat:
    """Returns a format; raises with the name of the key."""
    try:
      parsed = formats.parse(names)
    except ValueError as error:
      raise ValueError(f'{self._name(key)}: {error}') from None
    if parsed.strategy:
      raise self.error(key, 'must be a format without a strategy')
    return parsed

  def format(self, key: str) -> formats.NumericFormat:
    """Returns the format that a key names."""
    return self.parsed(key, self.get(key))

  def mapping(self, key: str) -> '_Content':
    """Returns the mapping at a key; empty if the key is missing."""
    return _Content(self.get(key, {}), self._name(key))

  def items(self, key: str) -> list['_Content']:
    """Returns the mappings of a list; empty if the key is missing."""
    items = self.get(key, [])
    if not isinstance(items, list):
      raise self.error(key, 'must be a list of mappings')
    where = self._name(key)
    return [_Content(item, f'{where}[{i}]') for i, item in enumerate(items)]

  def by_format(self) -> dict[formats.NumericFormat, str]:
    """Returns {format: key} of a mapping whose keys are formats."""
    return {self.parsed(key, key): key for key in self._mapping}

  def figures(
    self, default: chip_lib.Figures | None = None
  ) -> chip_lib.Figures:
    """Returns source, date and confidence of what the mapping holds."""
    known = default._asdict() if default else {}
    found = chip_lib.Figures(
      *(self.text(k, known.get(k)) for k in chip_lib.Figures._fields)
    )
    if found.confidence not in chip_lib.CONFIDENCES:
      raise self.error(
        'confidence', f'must be one of {", ".join(chip_lib.CONFIDENCES)}'
      )
    return found

  def done(self) -> None:
    """Refuses the keys that nothing has read."""
    for key in self._mapping:
      if key not in self._seen:
        raise ValueError(
          f'unknown key {self._name(str(key))}; allowed here: '
          f'{", ".join(dict.fromkeys(self._seen))}'
        )


def _chip(
  content: _Content, kind: str, section: str, path: pathlib.Path
) -> chip_lib.Chip:
  name, rules = content.text('name'), chip_lib.SECTIONS[section]
  figures = content.figures()
  described = [key for key in chip_lib.SECTIONS if key in content]
  for key in chip_lib.SECTIONS:
    content.get(key, {})
  content.done()
  if section not in described:
    raise ValueError(
      f'it has no section {section!r}, only {", ".join(described) or "none"}'
    )
  part = content.mapping(section)
  base = None
  if 'layers_of' in part:
    base = read(f'{section}:{_sibling(part.text("layers_of"), path)}')
  lanes = part.number(rules.lanes, 1, positive=True) if rules.lanes else 1.0
  rates = tuple(_rates(part, rules, figures, lanes))
  layers = base.layers if base else tuple(_layers(part, figures))
  if not rates and not layers:
    raise ValueError(
      f'{section} needs `rates`, prices by formats, or `layers`, measured ones'
    )
  per_byte = 0.0
  if rates and rules.memory:
    price = part.number(rules.memory, positive=rules.overlaps)
    per_byte = rules.of_memory(price)
  stored, fixed = part.mapping('stored_bits'), part.mapping('fixed')
  chip = chip_lib.Chip(
    name=name,
    kind=kind,
    unit=part.text('unit', base.unit if base else rules.unit),
    batch=part.count('batch', base.batch if base else 1),
    rates=rates,
    per_byte=per_byte,
    overlaps=rules.overlaps,
    cast_passes=part.number('cast_passes', 0),
    stored_bits={f: stored.count(key) for f, key in stored.by_format().items()},
    layers=layers,
    fixed_share=fixed.share('share') if 'fixed' in part else 0.0,
    fixed_format=fixed.format('format') if 'fixed' in part else None,
    digest=hashlib.sha256(path.read_bytes()).hexdigest()[:16],
  )
  fixed.done()
  part.done()
  return chip


def _sibling(name: str, path: pathlib.Path) -> str:
  """Returns a name that `read` takes; a path is relative to the own file."""
  if name in names():
    return name
  return os.fspath(path.parent / name)


def _rates(
  part: _Content,
  rules: chip_lib.Section,
  figures: chip_lib.Figures,
  lanes: float,
) -> Iterator[chip_lib.Rate]:
  for item in part.items('rates'):
    if 'formats' in item:
      weights = activations = item.format('formats')
    else:
      weights, activations = item.format('weights'), item.format('activations')
    ops = item.get('ops', [])
    if not isinstance(ops, list) or any(op not in _OPS for op in ops):
      raise item.error('ops', f'must be a list of some of {", ".join(_OPS)}')
    per_layer = per_mac = 0.0
    if rules.layer in item:
      per_layer = 1e-3 * item.number(rules.layer, positive=True)
    if rules.rate in item or not per_layer:
      per_mac = rules.of_rate(item.number(rules.rate, positive=True)) / lanes
    yield chip_lib.Rate(
      weights,
      activations,
      tuple(ops),
      per_mac,
      per_layer,
      item.figures(figures),
    )
    item.done()


def _layers(
  part: _Content, figures: chip_lib.Figures
) -> Iterator[chip_lib.Measured]:
  for item in part.items('layers'):
    inputs, outputs = item.count('inputs'), item.count('outputs')
    kernel, strides = item.pair('kernel'), item.pair('strides')
    positions, is_depthwise = item.count('positions'), False
    if 'ops' in item:
      is_depthwise = item.text('ops') == 'depthwise'
      if not is_depthwise:
        raise item.error('ops', "must be 'depthwise', or be left out")
    times = item.mapping('times')
    yield chip_lib.Measured(
      chip_lib.Key(is_depthwise, inputs, outputs, kernel, strides, positions),
      times={
        f: times.number(key, positive=True)
        for f, key in times.by_format().items()
      },
      figures=item.figures(figures),
    )
    item.done()
