"""Summary of a comparison: a row per method and target, and what it says."""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import pathlib
import statistics
from typing import Any

from fliqs_jax.comparison import figure
from fliqs_jax.comparison import methods as methods_lib
from fliqs_jax.comparison import page
from fliqs_jax.comparison import passes
from fliqs_jax.comparison import plan as plan_lib
from fliqs_jax.report import figures
from fliqs_jax.report import number_text
from fliqs_jax.run import config as config_lib
from fliqs_jax.runtime import files
from fliqs_jax.runtime import workdir as workdir_lib
from fliqs_jax.space import allocation
from fliqs_jax.sweep import collect
from fliqs_jax.sweep import curves

_SCHEMA = 1
# A difference is certain if it is this number of standard errors from zero.
_ERRORS = 2.0


@dataclasses.dataclass(frozen=True)
class Mean:
  """The mean of a number over seeds.

  Attributes:
    value: the mean.
    spread: the standard deviation; None for one run.
  """

  value: float
  spread: float | None

  def text(self, form: str, scale: float = 1.0) -> str:
    """Returns the mean, and the spread after a plus-minus sign."""
    text = f'{scale * self.value:{form}}'
    if self.spread is None:
      return text
    return f'{text} ± {scale * self.spread:{form.lstrip("+")}}'


def mean(values: Sequence[float]) -> Mean:
  """Returns the mean of at least one number over seeds."""
  spread = statistics.stdev(values) if len(values) > 1 else None
  return Mean(statistics.fmean(values), spread)


@dataclasses.dataclass(frozen=True)
class Row:
  """The runs of one method at one target.

  Attributes:
    method: name of the method.
    point: the target, or the format of a uniform network; empty for neither.
    finished: number of finished runs.
    planned: number of planned runs.
    cost: cost, in the unit of the comparison.
    relative: cost / target; None if the method has no target.
    within: share of the runs that cost at most the target; None as above.
    quality: test metric of the served network, a fraction of 1.
    loss: test loss of the served network.
    ahead: quality minus that of uniform formats at equal cost; None if no
      uniform networks are on both sides of the cost.
    scratch: test metric of the same networks trained from the beginning; None
      if they were not.
    gap: quality minus `scratch`, seed by seed.
    loss_gap: the same of the loss.
    seconds: wall time of training in seconds, without compiling.
    forward: forward passes, in training batches.
    backward: backward passes, in training batches.
    memory: bytes that a step of training needs beside its arguments, by the
      compiler's accounting; the largest of all seeds, None if unknown.
  """

  method: str
  point: str
  finished: int
  planned: int
  cost: Mean
  relative: Mean | None
  within: float | None
  quality: Mean
  loss: Mean
  ahead: curves.Difference | None
  scratch: Mean | None
  gap: Mean | None
  loss_gap: Mean | None
  seconds: Mean
  forward: float
  backward: float
  memory: int | None

  @property
  def label(self) -> str:
    """The method and its target."""
    return f'{self.method} at {self.point}' if self.point else self.method


@dataclasses.dataclass(frozen=True)
class Summary:
  """The results of a comparison.

  Attributes:
    plan: what is compared.
    sweep: the runs and their points, as of a sweep.
    rows: a row per method and target, in the order of the plan.
  """

  plan: plan_lib.Plan
  sweep: collect.Summary
  rows: Sequence[Row]

  @property
  def warnings(self) -> list[str]:
    """Sentences on the methods that uniform formats match, and on budgets."""
    lines, unit = [], number_text.points(self.sweep.metric)
    for row in self.rows:
      ahead = row.ahead
      if row.method != methods_lib.UNIFORM and ahead is not None:
        if ahead.value <= 0:
          lines.append(
            f'{row.label} is not better than uniform formats at equal cost: '
            f'{self._points(ahead)} {unit}'
          )
        elif ahead.error is None or ahead.value < _ERRORS * ahead.error:
          lines.append(
            f'{row.label} is not surely better than uniform formats at equal '
            f'cost: {self._points(ahead)} {unit}'
            + (', of one seed' if ahead.error is None else '')
          )
      if row.within is not None and row.within < 1:
        lines.append(
          f'{row.label} exceeds its target in {1 - row.within:.0%} of the runs'
        )
    return lines

  def qualities(self) -> list[list[str]]:
    """Returns the cells of the qualities; the first row is the head."""
    metric = self.sweep.metric
    places = number_text.decimals(max(row.cost.value for row in self.rows))
    head = ['method', 'target', 'runs', f'cost, {self.sweep.unit}', 'of target']
    head += ['within', number_text.title(metric), 'loss']
    head += [f'over uniform, {number_text.points(metric)}']
    rows = [head]
    for row in self.rows:
      runs = str(row.finished)
      if row.finished < row.planned:
        runs += f' of {row.planned}'
      is_uniform = row.method == methods_lib.UNIFORM
      rows.append(
        [
          row.method,
          row.point,
          runs,
          f'{row.cost.value:,.{places}f}',
          _text(row.relative, '.3f'),
          '' if row.within is None else f'{row.within:.0%}',
          row.quality.text('.2f', number_text.scale(metric)),
          row.loss.text('.3f'),
          '' if is_uniform or not row.ahead else self._points(row.ahead),
        ]
      )
    return rows

  def efforts(self) -> list[list[str]]:
    """Returns the cells of the efforts; the first row is the head."""
    metric = self.sweep.metric
    unit, scale = number_text.unit(metric), number_text.scale(metric)
    head = ['method', 'target', f'{metric} from scratch, {unit}']
    head += [f'gap, {number_text.points(metric)}', 'gap, loss', 'training, s']
    head += ['forward', 'backward', 'memory']
    return [
      head,
      *(
        [
          row.method,
          row.point,
          _text(row.scratch, '.2f', scale),
          _text(row.gap, '+.2f', scale),
          _text(row.loss_gap, '+.3f'),
          f'{row.seconds.value:,.0f}',
          f'{row.forward:,.0f}',
          f'{row.backward:,.0f}',
          '' if row.memory is None else number_text.memory(8 * row.memory),
        ]
        for row in self.rows
      ),
    ]

  def _points(self, apart: curves.Difference) -> str:
    scale = number_text.scale(self.sweep.metric)
    return Mean(apart.value, apart.error).text('+.2f', scale)

  def json(self) -> dict[str, Any]:
    """Returns the content of compare.json."""
    return dict(
      schema=_SCHEMA,
      **self.plan.claim,
      targets=list(self.plan.targets),
      metric_of_quality=self.sweep.metric,
      unit=self.sweep.unit,
      rows=[_plain(row) for row in self.rows],
      pairs=[
        dict(method=one, other=other, **apart._asdict())
        for (one, other), apart in self.sweep.pairs.items()
      ],
      warnings=self.warnings,
      runs=list(self.sweep.runs),
    )

  def markdown(self) -> str:
    """Returns the tables, the warnings and the missing runs."""
    parts = [
      _markdown(self.qualities()),
      _markdown(self.efforts()),
      *filter(None, [collect.markdown_of_pairs(self.sweep)]),
    ]
    if self.warnings:
      parts.append('\n'.join(f'- warning: {text}' for text in self.warnings))
    if missing := self.sweep.missing:
      lines = [
        f'- {run["name"]}: {run["state"]}: {run["detail"]}' for run in missing
      ]
      parts.append('Missing runs:\n\n' + '\n'.join(lines))
    return '\n\n'.join(parts)

  def write(self) -> None:
    """Writes compare.html, compare.json and compare.png."""
    points = sorted(
      self.sweep.points,
      key=lambda p: self.plan.methods.index(p.settings['method']),
    )
    draw = functools.partial(
      figure.draw, points, self.sweep.metric, self.sweep.unit
    )
    image = figures.pngs(draw)
    out = self.plan.out
    files.write_bytes(out / workdir_lib.COMPARISON_FIGURE, image[0])
    files.write_bytes(
      out / workdir_lib.COMPARISON_PAGE,
      page.render(
        self.plan.config,
        self.sweep.json(),
        self.qualities(),
        self.efforts(),
        self.sweep.differences(),
        self.warnings,
        image,
      ).encode(),
    )
    files.write_json(out / workdir_lib.COMPARISON_RESULT, self.json())


def summarize(plan: plan_lib.Plan) -> Summary:
  """Reads the finished runs of a comparison.

  Args:
    plan: what is compared.

  Raises:
    ValueError: no run is finished.
  """
  sweep = collect.collect(plan.sweep, plan.out)
  measured = _measured(plan, sweep)
  uniform = sweep.lines.get(methods_lib.UNIFORM, {})
  rows = [
    _row(
      plan,
      key,
      runs,
      curves.difference(
        {key: {m.seed: (m.found['cost'], m.value) for m in runs}}, uniform
      ),
    )
    for key, runs in measured.items()
  ]
  return Summary(plan, sweep, rows)


@dataclasses.dataclass(frozen=True)
class _Run:
  """A finished run: its seed, result.json, metric, time and passes."""

  seed: str
  result: Mapping[str, Any]
  value: float
  seconds: float
  passes: passes.Passes

  @property
  def found(self) -> Mapping[str, Any]:
    return self.result['found']


def _measured(
  plan: plan_lib.Plan, sweep: collect.Summary
) -> dict[tuple[str, str], list[_Run]]:
  """Returns {(method, point): finished runs}, in the order of the plan."""
  order = {
    (run['swept']['method'], _point(run['swept'])): []
    for run in sorted(
      sweep.runs, key=lambda r: plan.methods.index(r['swept']['method'])
    )
  }
  for run in sweep.runs:
    if run['state'] == 'finished':
      key = run['swept']['method'], _point(run['swept'])
      order[key].append(_read(plan, run))
  return {key: runs for key, runs in order.items() if runs}


def _point(swept: Mapping[str, str]) -> str:
  return swept.get('target', swept.get('format', ''))


def _read(plan: plan_lib.Plan, run: Mapping[str, Any]) -> _Run:
  swept = run['swept']
  result, seconds, counted = _compute(plan.out / run['name'])
  row = methods_lib.ASSIGNED.get(swept['method'])
  if row and row.has_scores:
    # As if the scores were for this run alone.
    base = plan.workdir(plan.dearest(int(swept['seed'])))
    if (base / workdir_lib.RESULT).exists():
      _, more, before = _compute(base)
      seconds += more
      counted = passes.Passes(
        counted.forward + before.forward, counted.backward + before.backward
      )
  return _Run(swept['seed'], result, run['value'], seconds, counted)


def _compute(
  workdir: pathlib.Path,
) -> tuple[dict[str, Any], float, passes.Passes]:
  """Returns result.json, the seconds of training, and the passes of a run."""
  config = config_lib.read(workdir / workdir_lib.CONFIG)
  result = files.read_json(workdir / workdir_lib.RESULT)
  seconds = result['wall_seconds'] - result['compile_seconds']
  beside = [*result.get('references', {})]
  if result.get('retrained'):
    beside.append(workdir_lib.RETRAINED)
  for name in beside:
    path = workdir / workdir_lib.reference(name) / workdir_lib.RESULT
    seconds -= files.read_json(path)['wall_seconds']
  return result, max(seconds, 0.0), passes.of_run(config, result)


def _row(
  plan: plan_lib.Plan,
  key: tuple[str, str],
  runs: Sequence[_Run],
  ahead: curves.Difference | None,
) -> Row:
  method, point = key
  has_target = point in plan.targets
  relative = [run.found['cost'] / run.found['cost_target'] for run in runs]
  metric = runs[0].result['metric']

  def found(name: str) -> Mean:
    return mean([run.found[name] for run in runs])

  return Row(
    method=method,
    point=point,
    finished=len(runs),
    planned=plan.seeds,
    cost=found('cost'),
    relative=mean(relative) if has_target else None,
    within=statistics.fmean(r <= 1 + allocation.TOLERANCE for r in relative)
    if has_target
    else None,
    quality=found(metric),
    loss=found('loss'),
    ahead=ahead,
    **_from_scratch(runs, metric),
    seconds=mean([run.seconds for run in runs]),
    forward=statistics.fmean(run.passes.forward for run in runs),
    backward=statistics.fmean(run.passes.backward for run in runs),
    memory=max(
      (m for run in runs if (m := run.result.get('step_bytes'))), default=None
    ),
  )


def _from_scratch(runs: Sequence[_Run], metric: str) -> dict[str, Mean | None]:
  """Returns the fields of a row that need networks trained again."""
  pairs = [
    (run.found, scratch)
    for run in runs
    if (scratch := run.result.get('retrained'))
  ]
  if not pairs:
    return dict(scratch=None, gap=None, loss_gap=None)
  return dict(
    scratch=mean([scratch[metric] for _, scratch in pairs]),
    gap=mean([found[metric] - scratch[metric] for found, scratch in pairs]),
    loss_gap=mean(
      [found['loss'] - scratch['loss'] for found, scratch in pairs]
    ),
  )


def _plain(row: Row) -> dict[str, Any]:
  content = dataclasses.asdict(row)
  ahead = row.ahead
  return content | dict(ahead=ahead and ahead._asdict())


def _text(number: Mean | None, form: str, scale: float = 1.0) -> str:
  return '' if number is None else number.text(form, scale)


def _markdown(cells: Sequence[Sequence[str]]) -> str:
  head, *rows = cells
  return number_text.markdown(head, rows)
