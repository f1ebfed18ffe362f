"""Summary of a comparison: what its rows say, as tables, page and JSON."""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import types
from typing import Any

from fliqs_jax.comparison import figure
from fliqs_jax.comparison import methods as methods_lib
from fliqs_jax.comparison import page
from fliqs_jax.comparison import plan as plan_lib
from fliqs_jax.comparison import rows as rows_lib
from fliqs_jax.report import figures
from fliqs_jax.report import number_text
from fliqs_jax.runtime import files
from fliqs_jax.runtime import workdir as workdir_lib
from fliqs_jax.sweep import collect
from fliqs_jax.sweep import curves

_SCHEMA = 1
# A difference is certain if it is this number of standard errors from zero.
_ERRORS = 2.0


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
  rows: Sequence[rows_lib.Row]

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
    head += [f'gap, {number_text.points(metric)}', 'gap, loss', 'steps, s']
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
          '' if row.seconds is None else f'{row.seconds.value:,.0f}',
          f'{row.forward:,.0f}',
          f'{row.backward:,.0f}',
          '' if row.memory is None else number_text.memory(8 * row.memory),
        ]
        for row in self.rows
      ),
    ]

  def _points(self, apart: curves.Difference) -> str:
    scale = number_text.scale(self.sweep.metric)
    return rows_lib.Mean(apart.value, apart.error).text('+.2f', scale)

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


def summarize(
  plan: plan_lib.Plan,
  failed: Mapping[str, str] = types.MappingProxyType({}),
) -> Summary:
  """Reads the finished runs of a comparison.

  Args:
    plan: what is compared.
    failed: {name of a run that failed a moment ago: why}.

  Raises:
    ValueError: no run is finished.
  """
  sweep = collect.collect(plan.sweep, plan.out, failed=failed)
  return Summary(plan, sweep, rows_lib.of_plan(plan, sweep))


def _plain(row: rows_lib.Row) -> dict[str, Any]:
  content = dataclasses.asdict(row)
  ahead = row.ahead
  return content | dict(ahead=ahead and ahead._asdict())


def _text(number: rows_lib.Mean | None, form: str, scale: float = 1.0) -> str:
  return '' if number is None else number.text(form, scale)


def _markdown(cells: Sequence[Sequence[str]]) -> str:
  head, *rows = cells
  return number_text.markdown(head, rows)
