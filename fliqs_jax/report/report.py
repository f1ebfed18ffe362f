"""Writes the report of a finished run: `report.html` and its figures.

It needs matplotlib, which only reports and sweeps use.
"""

from collections.abc import Callable, Mapping
import functools
import os
from typing import Any

from matplotlib import figure as figure_lib

from fliqs_jax.numerics import formats
from fliqs_jax.report import allocation_figure
from fliqs_jax.report import architecture_figure
from fliqs_jax.report import figures
from fliqs_jax.report import finished_run
from fliqs_jax.report import page
from fliqs_jax.report import picture_figure
from fliqs_jax.report import policy_figure
from fliqs_jax.report import sensitivity_figure
from fliqs_jax.runtime import files
from fliqs_jax.runtime import workdir as workdir_lib


def write_report(
  workdir: str | os.PathLike[str], result: Mapping[str, Any] | None = None
) -> str:
  """Writes `report.html` and its pictures into a finished run's workdir.

  Args:
    workdir: path of the run's workdir.
    result: content of result.json, which a run writes after its report; None:
      it is read.

  Returns:
    The path of the page.

  Raises:
    FileNotFoundError: a file of the run is missing; the message names it.
    ValueError: the content of a file is wrong; the message names the file.
  """
  run = finished_run.read(workdir, result)
  names = {layer[side] for layer in run.layers for side in finished_run.SIDES}
  names |= {
    name for d in run.searched_formats.values() for name in d['options']
  }
  names |= {name for name in run.references if _is_format(name)}
  # One palette, so that a format has the same shade in every picture.
  tint = figures.palette(names - {None})
  images = {}
  drawings = _drawings(run, tint)
  if shown := picture_figure.read(workdir, [*run.references]):
    scale = finished_run.config_value(run.config, 'data.scale')
    drawings['pictures'] = functools.partial(
      picture_figure.pictures, shown, scale
    )
  for name, draw in drawings.items():
    images[name] = figures.pngs(draw)
    files.write_bytes(os.path.join(workdir, f'{name}.png'), images[name][0])
  path = os.path.join(workdir, workdir_lib.REPORT)
  files.write_bytes(path, page.render(run, images, tint).encode())
  return path


def _drawings(
  run: finished_run.FinishedRun, tint: dict[str, str]
) -> dict[str, Callable[[], figure_lib.Figure]]:
  """Returns {name of a figure: the function that draws it}."""
  bind = functools.partial
  result = {
    'architecture': bind(architecture_figure.architecture, run.layers, tint),
    'curves': bind(figures.curves, run.history, run.marks, bool(run.searched)),
    'cost_per_layer': bind(
      figures.cost_per_layer, run.layers, tint, run.reference
    ),
  }
  if len(run.policy_rows) > 1:  # One point makes no curve.
    for name, decisions in (
      ('policy', run.searched_formats),
      ('policy_of_sizes', run.searched_sizes),
    ):
      if decisions:
        result[name] = bind(
          policy_figure.policy, run.policy_rows, decisions, tint
        )
  if run.scored:
    result['scores'] = bind(
      sensitivity_figure.sensitivity, run.scored, run.result['scored']['metric']
    )
  if allocation_figure.panes(run.layers):
    result['allocation'] = bind(allocation_figure.allocation, run.layers, tint)
  if run.references:
    result['pareto'] = bind(
      figures.pareto, run.found, run.references, run.metric, tint
    )
  return result


def _is_format(name: str) -> bool:
  try:
    formats.parse(name)
  except ValueError:
    return False
  return True
