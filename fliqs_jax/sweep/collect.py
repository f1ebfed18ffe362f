"""Collects the finished runs of a sweep: points of one table, their front."""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import itertools
import json
import math
import os
import pathlib
import types
from typing import Any

from fliqs_jax.report import figures
from fliqs_jax.report import number_text
from fliqs_jax.run.configs import config as config_lib
from fliqs_jax.runtime import files
from fliqs_jax.runtime import workdir as workdir_lib
from fliqs_jax.sweep import curves
from fliqs_jax.sweep import figure
from fliqs_jax.sweep import page
from fliqs_jax.sweep import pareto
from fliqs_jax.sweep import sweep_file

_SCHEMA = 1
# {name of a cost in result.json: its unit}; the unit of `cost`, the cost that
# the search controlled, is in the file.
COSTS = dict(
  cost=None, gbops='GBOPs', size_bits='bits', average_bits='bits a weight'
)


@dataclasses.dataclass(frozen=True)
class Summary:
  """The results of a sweep.

  Attributes:
    name: name of the sweep.
    metric: name of the test metric, such as `accuracy`.
    unit: unit of the costs.
    points: points of the finished runs, by cost.
    runs: a mapping for each planned run: `name`, `swept`, `state`, `detail`,
      and if it is finished `value`, `cost` and `warnings`.
  """

  name: str
  metric: str
  unit: str
  points: Sequence[pareto.Point]
  runs: Sequence[dict[str, Any]]

  @property
  def settings(self) -> list[str]:
    """The names of all settings but the seed."""
    return list(dict.fromkeys(k for p in self.points for k in p.settings))

  @property
  def missing(self) -> list[dict[str, Any]]:
    """The runs that are not finished."""
    return [run for run in self.runs if run['state'] != 'finished']

  @functools.cached_property
  def lines(self) -> dict[str, curves.Runs]:
    """{label of a curve: {settings: {seed: (cost, metric)}}}."""
    found: dict[str, dict[Any, dict[Any, tuple[float, float]]]] = {}
    for run in self.runs:
      if run['state'] == 'finished':
        settings = pareto.without_seed(run['swept'])
        line = found.setdefault(figure.label(pareto.series(settings)), {})
        of_seed = line.setdefault(tuple(settings.items()), {})
        of_seed[run['swept'].get('seed')] = run['cost'], run['value']
    return found

  @functools.cached_property
  def pairs(self) -> dict[tuple[str, str], curves.Difference]:
    """{(curve, other): mean difference at equal cost}, where they have one.

    Of several sweeps only curves of the same one are compared.
    """
    found = {}
    for labels in self._sweeps().values():
      for one, other in itertools.combinations(labels, 2):
        apart = curves.difference(self.lines[one], self.lines[other])
        if apart is not None:
          found[one, other] = apart
          found[other, one] = apart.reversed()
    return found

  def differences(self) -> list[list[list[str]]]:
    """Returns the cells of all pairs, a table for each sweep; head first."""
    return [
      [
        ['minus', *labels],
        *(
          [one, *(self._difference(one, other) for other in labels)]
          for one in labels
        ),
      ]
      for labels in self._sweeps().values()
      if any(pair in self.pairs for pair in itertools.combinations(labels, 2))
    ]

  def _sweeps(self) -> dict[str, list[str]]:
    """Returns {name of a sweep: labels of its curves}."""
    found: dict[str, list[str]] = {}
    for label, line in self.lines.items():
      found.setdefault(
        dict(next(iter(line))).get(sweep_file.SWEEP, ''), []
      ).append(label)
    return found

  def _difference(self, one: str, other: str) -> str:
    if (one, other) not in self.pairs:
      return ''
    apart = self.pairs[one, other]
    scale = number_text.scale(self.metric)
    return _spread(apart.value, apart.error, '+.2f', scale)

  def warnings(self, point: pareto.Point) -> int:
    """Returns the number of warnings of all runs of a point."""
    return sum(
      len(run['warnings'])
      for run in self.runs
      if run['state'] == 'finished'
      and pareto.without_seed(run['swept']) == point.settings
    )

  def json(self) -> dict[str, Any]:
    """Returns the content of sweep.json."""
    points = [
      dict(
        settings=dict(p.settings),
        runs=len(p.values),
        planned=p.planned,
        value=p.value,
        value_spread=p.value_spread,
        cost=p.cost,
        cost_spread=p.cost_spread,
        not_dominated=p.front,
        warnings=self.warnings(p),
      )
      for p in self.points
    ]
    return dict(
      schema=_SCHEMA,
      sweep=self.name,
      metric=self.metric,
      unit=self.unit,
      points=points,
      pairs=[
        dict(curve=one, other=other, **apart._asdict())
        for (one, other), apart in self.pairs.items()
      ],
      runs=list(self.runs),
    )


def collect(
  sweep: sweep_file.Sweep,
  out: str | os.PathLike[str],
  cost: str = 'cost',
  failed: Mapping[str, str] = types.MappingProxyType({}),
) -> Summary:
  """Reads the runs of a sweep.

  Args:
    sweep: the planned runs.
    out: directory of the runs' workdirs.
    cost: name of the cost in the table, a key of `COSTS`.
    failed: {name of a run that failed a moment ago: why}.

  Raises:
    ValueError: no run is finished, or the runs cannot be compared.
  """
  runs = [look(run, pathlib.Path(out, run.name), cost) for run in sweep.runs]
  for run in runs:
    if run['state'] != 'finished' and run['name'] in failed:
      run.update(state='failed', detail=failed[run['name']])
  finished = [run for run in runs if run['state'] == 'finished']
  if not finished:
    raise ValueError(
      f'no run is finished in {out}; the first of {len(runs)}, '
      f'{runs[0]["name"]}, is {runs[0]["state"]}: {runs[0]["detail"]}'
    )
  for key in ('metric', 'unit'):
    if len(different := sorted({run[key] for run in finished})) > 1:
      raise ValueError(
        f'the runs of the sweep {sweep.name!r} differ in their {key}, '
        f'{" and ".join(different)}, and fit no common table; '
        + (
          'use --cost=gbops, which has one unit'
          if key == 'unit'
          else 'make a sweep of each task'
        )
      )
  measured = [
    (r['swept'], (r['value'], r['cost']) if r['state'] == 'finished' else None)
    for r in runs
  ]
  return Summary(
    sweep.name,
    finished[0]['metric'],
    finished[0]['unit'],
    pareto.points(measured),
    runs,
  )


def look(
  run: sweep_file.Run, workdir: pathlib.Path, cost: str = 'cost'
) -> dict[str, Any]:
  """Returns the state and detail of a run, and its numbers if finished.

  Args:
    run: the planned run.
    workdir: path of its workdir.
    cost: name of the cost, a key of `COSTS`.
  """
  known = dict(name=run.name, swept=dict(run.swept))

  def is_(state, detail='', **more):
    return known | dict(state=state, detail=detail) | more

  if not (workdir / workdir_lib.CONFIG).exists():
    return is_('not started', f'{workdir} holds no run')
  try:
    claimed = config_lib.read(workdir / workdir_lib.CONFIG)
    planned = json.loads(json.dumps(sweep_file.config(run)))
    if different := config_lib.differences_in_training(claimed, planned):
      return is_('of another config', '; '.join(different))
    if not (workdir / workdir_lib.RESULT).exists():
      step, steps = _last_step(workdir), claimed['train']['steps']
      return is_('unfinished', f'logged up to step {step} of {steps}')
    result = files.read_json(workdir / workdir_lib.RESULT)
    metric, found = result['metric'], result['found']
    value, spent = found[metric], found[cost]
    if not (math.isfinite(value) and math.isfinite(spent)):
      return is_('failed', f'{metric} {value}, {cost} {spent}')
    return is_(
      'finished',
      metric=metric,
      value=value,
      cost=spent,
      unit=COSTS[cost] or found['unit'],
      warnings=result['warnings'],
    )
  except (OSError, ValueError, KeyError, TypeError) as error:
    return is_('damaged', f'{workdir}: {type(error).__name__}: {error}')


def _last_step(workdir: pathlib.Path) -> int:
  try:
    lines = (workdir / workdir_lib.HISTORY).read_text('utf-8').splitlines()
    # The last line of a killed run may be incomplete.
    rows = [line for line in lines if line.endswith('}')]
    return json.loads(rows[-1])['step'] if rows else 0
  except FileNotFoundError:
    return 0


def table(summary: Summary) -> list[list[str]]:
  """Returns the cells of the table; the first row is the head."""
  largest = max(point.cost for point in summary.points)
  decimals = 3 - math.floor(math.log10(largest)) if largest > 0 else 0
  # One number of decimals aligns the decimal points. The costs of a tiny model
  # would all be zeros.
  form = f',.{max(0, decimals)}f' if decimals <= 6 else '.3e'
  head = [*summary.settings, 'runs', number_text.title(summary.metric)]
  scale = number_text.scale(summary.metric)
  rows = [head + [f'cost, {summary.unit}', 'not dominated', 'warnings']]
  for point in summary.points:
    count = str(len(point.values))
    if len(point.values) < point.planned:
      count += f' of {point.planned}'
    rows.append(
      [
        *(point.settings.get(key, '') for key in summary.settings),
        count,
        _spread(point.value, point.value_spread, '.2f', scale),
        _spread(point.cost, point.cost_spread, form),
        '*' if point.front else '',
        str(summary.warnings(point) or ''),
      ]
    )
  return rows


def _spread(
  mean: float, spread: float | None, form: str, scale: float = 1.0
) -> str:
  text = f'{scale * mean:{form}}'
  if spread is None:
    return text
  return f'{text} ± {scale * spread:{form.lstrip("+")}}'


def markdown(summary: Summary) -> str:
  """Returns the tables, and below them a list of all unfinished runs."""
  head, *rows = table(summary)
  text = number_text.markdown(head, rows)
  if pairs := markdown_of_pairs(summary):
    text += f'\n\n{pairs}'
  if missing := summary.missing:
    text += f'\n\n{len(missing)} of {len(summary.runs)} runs are missing:\n'
    text += ''.join(
      f'\n- {run["name"]}: {run["state"]}: {run["detail"]}' for run in missing
    )
  return text


def markdown_of_pairs(summary: Summary) -> str:
  """Returns the table of all pairs of curves; empty if there is none."""
  tables = [
    number_text.markdown(head, rows) for head, *rows in summary.differences()
  ]
  if not tables:
    return ''
  return '\n\n'.join(
    [
      f'Mean difference of the {summary.metric} at equal cost, in '
      f'{number_text.points(summary.metric)}, of a row minus a column:',
      *tables,
    ]
  )


def write(summary: Summary, out: str | os.PathLike[str]) -> None:
  """Writes pareto.png, sweep.html and sweep.json to the directory `out`."""
  draw = functools.partial(
    figure.draw, summary.points, summary.metric, summary.unit
  )
  image = figures.pngs(draw)
  directory = pathlib.Path(out)
  files.write_bytes(directory / workdir_lib.SWEEP_FIGURE, image[0])
  files.write_bytes(
    directory / workdir_lib.SWEEP_PAGE,
    page.render(
      summary.json(), table(summary), summary.differences(), image
    ).encode(),
  )
  files.write_json(directory / workdir_lib.SWEEP_RESULT, summary.json())
