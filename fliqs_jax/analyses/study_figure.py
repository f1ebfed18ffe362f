"""Figure of a study: differences from a base, ours and the paper's."""

from collections.abc import Mapping, Sequence
import itertools
from typing import Any

from matplotlib import figure as figure_lib

from fliqs_jax.report import figures
from fliqs_jax.report import number_text

_COLOURS = ('#4c8dc4', '#dc5c4c', '#2e9c80', '#c98a1b')
_DASHES = ('--', ':', '-.', (0, (5, 1, 1, 1, 1, 1)))


def draw(
  study: Any, rows: Sequence[Mapping[str, Any]], metric: str
) -> figure_lib.Figure:
  """Draws the differences over the varied value.

  Args:
    study: the study, of which the figure names `heading`.
    rows: rows of its table.
    metric: name of the metric, such as `accuracy`.
  """
  figure = figure_lib.Figure((6.4, 3.2))
  axes = figure.add_subplot()
  shown = [row for row in rows if row.get('ahead') is not None]
  values = list(dict.fromkeys(row['value'] for row in shown))
  lines: dict[str, list[Mapping[str, Any]]] = {}
  for row in shown:
    lines.setdefault(row['series'] or 'ours', []).append(row)
  scale = number_text.scale(metric)
  axes.axhline(0, color=figures.GREY, lw=0.8, zorder=0)
  for (name, part), colour in zip(lines.items(), itertools.cycle(_COLOURS)):
    at = [values.index(row['value']) for row in part]
    ahead = [scale * row['ahead'] for row in part]
    errors = [scale * (row['ahead_error'] or 0) for row in part]
    look = dict(color=colour, capsize=2, elinewidth=0.9, zorder=3)
    axes.errorbar(at, ahead, errors, marker='o', ms=5, label=name, **look)
  for name, dash in zip(study.paper, itertools.cycle(_DASHES)):
    papers = study.ahead(name)
    at = [i for i, value in enumerate(values) if value in papers]
    ahead = [papers[values[i]] for i in at]
    look = dict(color=figures.GREY, ls=dash, lw=1.2, marker='.')
    axes.plot(at, ahead, label=f'{name}, paper', **look)
  axes.set_xticks(range(len(values)), values)
  axes.set(xlabel=study.heading)
  axes.set(ylabel=f'difference, {number_text.points(metric)}')
  axes.tick_params(length=2)
  axes.legend(
    frameon=False,
    loc='center left',
    bbox_to_anchor=(1.01, 0.5),
    handlelength=3,
  )
  return figure
