"""Finished run: the files of its workdir, read, checked and joined."""

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import json
import math
import os
import sys
from typing import Any

from fliqs_jax.numerics import formats
from fliqs_jax.runtime import workdir as workdir_lib
from fliqs_jax.search import schedules
from fliqs_jax.space import cost_model
from fliqs_jax.space import sizes as sizes_lib

SIDES = ('weights', 'activations')
UNIFORM_BITS = 8  # Bits of the uniform model that is the reference of costs.
_FILES = (
  workdir_lib.CONFIG,
  workdir_lib.ARCH,
  workdir_lib.RESULT,
  workdir_lib.HISTORY,
)
_MEASURED = (
  'loss',
  'cost',
  'cost_target',
  'size_bits',
  'average_bits',
)
_CURVES = ('loss', 'quality', 'reward', 'cost', 'entropy')


@dataclasses.dataclass(frozen=True)
class Size:
  """A number of channels or a size of a kernel of a layer.

  Attributes:
    count: number of channels, or height and width of the kernel in pixels.
    decision: name of the decision that picked it; None if unknown.
    label: the picked option, from which `count` follows (it may be a multiple).
    options: the options of the decision.
    probability: probability of the picked option; NaN if unknown.
  """

  count: int
  decision: str | None = None
  label: float = math.nan
  options: tuple[int, ...] = ()
  probability: float = math.nan

  @property
  def share(self) -> float:
    """The picked option divided by the largest one; NaN if unknown."""
    return self.label / max(self.options, default=math.nan)


@dataclasses.dataclass(frozen=True)
class FinishedRun:
  """The content of the files of a finished run.

  Attributes:
    config: the config, nested.
    arch: content of arch.json.
    result: content of result.json.
    found: measurements of the selected model; NaN if unknown.
    references: {name: measurements of a uniform model, or of the selected one
      retrained from the beginning}; NaN if unknown.
    history: rows in the order of steps; a number that is missing or not finite
      is NaN.
    layers: rows in the order of the model: `path`, `kind`, `weights`,
      `activations`, `macs`, `params`, `cost`; fractions of their sums: `share`
      of the cost, `reference_share` of the cost at `UNIFORM_BITS`,
      `macs_share`; `probabilities`, {side: probability of its format}; `sizes`,
      {name of `sizes.LEAVES`: `Size`} if a decision picked it. An unknown
      number is NaN.
    reference: description of the model of `reference_share`; None if the
      formats do not determine this kind of cost.
  """

  config: Mapping[str, Any]
  arch: Mapping[str, Any]
  result: Mapping[str, Any]
  found: Mapping[str, Any]
  references: Mapping[str, Mapping[str, Any]]
  history: Sequence[Mapping[str, Any]]
  layers: Sequence[Mapping[str, Any]]
  reference: str | None

  @property
  def metric(self) -> str:
    """The name of the metric: `accuracy`, `AUC` or `PSNR`."""
    return self.result['metric']

  @property
  def searched(self) -> dict[str, Mapping[str, Any]]:
    """The decisions with several options, by name."""
    decisions = self.result['decisions'].items()
    return {name: d for name, d in decisions if len(d['options']) > 1}

  @property
  def searched_formats(self) -> dict[str, Mapping[str, Any]]:
    """The decisions about formats with several options, by name."""
    return {n: d for n, d in self.searched.items() if d['kind'] == 'format'}

  @property
  def searched_sizes(self) -> dict[str, Mapping[str, Any]]:
    """The decisions about sizes with several options, channels first."""
    sizes = [x for x in self.searched.items() if x[1]['kind'] != 'format']
    return dict(sorted(sizes, key=lambda x: x[1]['kind']))

  @property
  def scored(self) -> dict[str, Mapping[str, Any]]:
    """The decisions whose options were scored, with `anchor` and `scores`."""
    # Results of 0.2.0 lack the key, as those of other searches.
    scores = self.result.get('scored', {}).get('decisions', {})
    return {
      n: {**d, **scores[n]} for n, d in self.searched.items() if n in scores
    }

  @property
  def has_sizes(self) -> bool:
    """Whether a decision picked a size of any layer, in this run or before."""
    return any(layer['sizes'] for layer in self.layers)

  @property
  def marks(self) -> dict[str, int]:
    """The first step of each phase, by its description."""
    keys = 'train.steps', 'quant.act_start', 'search.start', 'search.freeze'
    phases = schedules.phases(*(config_value(self.config, k) for k in keys))
    marks = {'activations quantized': phases.act_start}
    if self.searched:
      marks |= {'search starts': phases.search_start}
      # A single scoring is the start of the search and its end.
      if self.config['search'].get('scorings') != 1:
        marks |= {'policy frozen': phases.freeze}
    return marks

  @property
  def policy_rows(self) -> list[Mapping[str, Any]]:
    """The rows of the history whose policy is complete."""
    return [
      row
      for row in self.history
      if row.get('policy')
      and all(
        math.isfinite(_number(p))
        for name in self.searched
        for p in row['policy'].get(name, [None])
      )
    ]


def config_value(config: Mapping[str, Any], key: str) -> Any:
  """Returns the value of a dotted key.

  Raises:
    ValueError: the config lacks the key, which the message names.
  """
  value = config
  for part in key.split('.'):
    if not isinstance(value, Mapping) or part not in value:
      raise ValueError(
        f'config.json lacks {key}, which a report needs; it is not the config '
        'of a run'
      )
    value = value[part]
  return value


def read(
  workdir: str | os.PathLike[str], result: Mapping[str, Any] | None = None
) -> FinishedRun:
  """Reads a finished run.

  Args:
    workdir: path of the run's workdir.
    result: content of a result.json that is not written yet; None: it is read.

  Raises:
    FileNotFoundError: a file is missing; the message names it.
    ValueError: the content of a file is wrong; the message names the file.
  """
  texts = {
    name: json.dumps(result)
    if name == workdir_lib.RESULT and result is not None
    else _text(workdir, name)
    for name in _FILES
  }
  config, arch, result = (
    _parse(texts[name], os.path.join(workdir, name)) for name in _FILES[:3]
  )
  rows = [
    _parse(line, f'{os.path.join(workdir, _FILES[3])} line {i}')
    for i, line in enumerate(texts[_FILES[3]].splitlines(), 1)
    if line.strip()
  ]
  history = [
    row | {name: _number(row.get(name)) for name in _CURVES} for row in rows
  ]
  for name, decision in result['decisions'].items():
    if not {'kind', 'options'} <= set(decision):
      raise ValueError(
        f'{os.path.join(workdir, workdir_lib.RESULT)} lacks kind or options of '
        f'the decision {name!r}: another version of fliqs_jax has written it; '
        'make the report with that version'
      )
  _check_formats(
    os.path.join(workdir, workdir_lib.ARCH), _formats_of(arch['layers'].items())
  )
  _check_formats(
    os.path.join(workdir, workdir_lib.RESULT),
    [
      *_formats_of((row['path'], row) for row in result['layers']),
      *(
        (f'decision {name!r}', option)
        for name, decision in result['decisions'].items()
        for option in decision['options']
        if decision['kind'] == 'format'
      ),
    ],
  )
  layers, reference = _layers(arch, result)
  models = dict(result['references'])
  # Results of 0.2.0 lack the key.
  if result.get('retrained'):
    models['retrained'] = result['retrained']
  return FinishedRun(
    config=config,
    arch=arch,
    result=result,
    found=_measured(result['found'], result['metric']),
    references={
      name: _measured(model, result['metric']) for name, model in models.items()
    },
    history=history,
    layers=layers,
    reference=reference,
  )


def _text(workdir: str | os.PathLike[str], name: str) -> str:
  path = os.path.join(workdir, name)
  try:
    with open(path, encoding='utf-8') as file:
      return file.read()
  except (FileNotFoundError, NotADirectoryError):
    raise FileNotFoundError(
      f'{path} is missing: a report needs the workdir of a finished run, which '
      f'has {", ".join(_FILES)}'
    ) from None
  except UnicodeDecodeError as error:
    raise ValueError(f'{path} is damaged: {error}') from None


def _parse(text: str, where: str) -> dict[str, Any]:
  try:
    value = json.loads(text)
  except (json.JSONDecodeError, RecursionError) as error:
    raise ValueError(
      f'{where} is not JSON, so the file is damaged: {error}'
    ) from None
  if not isinstance(value, dict):
    raise ValueError(
      f'{where} holds {type(value).__name__}, but it must be an object'
    )
  return value


def _formats_of(
  layers: Iterable[tuple[str, Mapping[str, Any]]],
) -> list[tuple[str, Any]]:
  """Returns (place, name) of the formats of layers, (path, layer)."""
  return [
    (f'layer {path!r}', layer[side])
    for path, layer in layers
    for side in SIDES
    if layer.get(side) is not None
  ]


def _check_formats(where: str, named: Iterable[tuple[str, Any]]) -> None:
  """Raises a ValueError if one of (place, name) in a file is no format."""
  for place, name in named:
    try:
      formats.parse(name)
    except ValueError as error:
      raise ValueError(f'{where} is damaged, {place}: {error}') from None


def _number(value: Any) -> float:
  """Returns a finite number, or NaN for any other value."""
  known = isinstance(value, (int, float)) and abs(value) <= sys.float_info.max
  return float(value) if known else math.nan


def _measured(model: Mapping[str, Any], metric: str) -> dict[str, Any]:
  numbers = {name: _number(model.get(name)) for name in (metric, *_MEASURED)}
  return {**model, **numbers}


def _layers(
  arch: Mapping[str, Any], result: Mapping[str, Any]
) -> tuple[list[dict[str, Any]], str | None]:
  """Joins the rows of each layer in all files; see `FinishedRun.layers`."""
  details = {row['path']: row for row in result['layers']}
  layers = {}
  for path in dict.fromkeys([*arch['layers'], *details]):
    row = details.get(path, {})
    layers[path] = {
      'path': path,
      'kind': row.get('kind', ''),
      **{side: arch['layers'].get(path, row)[side] for side in SIDES},
      **{name: _number(row.get(name)) for name in ('macs', 'params', 'cost')},
      'probabilities': {},
    }
  _join_formats(layers, arch['mode'], result['decisions'])
  for path, layer in layers.items():
    layer['sizes'] = _sizes(
      details.get(path, {}), arch.get('sizes', {}), result['decisions']
    )
  kind = arch['cost']['kind']
  counted = cost_model.KINDS[kind].sides if kind in cost_model.KINDS else ()
  rows = list(layers.values())
  uniform = [_uniform_cost(row, counted) for row in rows]
  for name, costs in (
    ('share', [row['cost'] for row in rows]),
    ('reference_share', uniform),
    ('macs_share', [row['macs'] for row in rows]),
  ):
    total = math.fsum(cost for cost in costs if math.isfinite(cost))
    for row, cost in zip(rows, costs):
      row[name] = cost / total if total else math.nan
  reference = f'uniform {UNIFORM_BITS} bits'
  if any(row['sizes'] for row in rows):
    reference += ' and the selected sizes'
  return rows, reference if counted else None


def _join_formats(
  layers: Mapping[str, dict[str, Any]],
  mode: str,
  decisions: Mapping[str, Mapping[str, Any]],
) -> None:
  """Adds `probabilities` to {path: row of the layer}."""
  for name, decision in decisions.items():
    if decision['kind'] != 'format':
      continue
    # The name of a separate decision ends in its side; otherwise the mode is
    # the side.
    side = name.split('/')[-1] if mode == 'separate' else mode
    side = side if side in SIDES else SIDES[0]
    chances = dict(zip(decision['options'], decision['probabilities']))
    for path in decision['layers']:
      if path not in layers:
        raise ValueError(
          f'result.json: decision {name!r} governs layer {path!r}, which '
          'neither arch.json nor result.json lists'
        )
      chance = _number(chances.get(layers[path][side]))
      layers[path]['probabilities'][side] = chance


def _sizes(
  row: Mapping[str, Any],
  found: Mapping[str, int],
  decisions: Mapping[str, Mapping[str, Any]],
) -> dict[str, Size]:
  """Returns the sizes of a row of result.json that decisions picked."""
  sizes = {}
  for what in (what for what in sizes_lib.LEAVES if what in row):
    sizes[what] = Size(row[what])
    name = row.get('decided', {}).get(what)
    if name is None:
      continue
    if name not in decisions or name not in found:
      raise ValueError(
        f'{what} of layer {row["path"]!r} follows the decision {name!r}, which '
        'result.json does not list or arch.json lacks among its sizes'
      )
    options = tuple(decisions[name]['options'])
    chances = dict(zip(options, decisions[name]['probabilities']))
    chance = _number(chances.get(found[name]))
    sizes[what] = Size(row[what], name, found[name], options, chance)
  return sizes


def _uniform_cost(layer: Mapping[str, Any], counted: Sequence[str]) -> float:
  """Returns the cost of a layer whose quantized sides have `UNIFORM_BITS`.

  The cost is proportional to the bits of each counted side (except for the
  scales in a size), so the unit is not needed.
  """
  cost = layer['cost']
  for side in counted:
    if layer[side]:
      cost *= UNIFORM_BITS / formats.parse(layer[side]).bits
  return cost
