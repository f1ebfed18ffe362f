"""A finished run for people: `report.html` and its pictures.

python -m fliqs_jax.report DIR

Needs matplotlib; nothing else of this package does.
"""

import argparse
from collections.abc import Callable, Sequence
import functools
import os
import sys

from matplotlib import figure as figure_lib

from fliqs_jax import allocation_picture
from fliqs_jax import architecture_picture
from fliqs_jax import files
from fliqs_jax import finished_run
from fliqs_jax import formats
from fliqs_jax import pictures
from fliqs_jax import policy_picture
from fliqs_jax import report_page


def write_report(workdir: str) -> str:
  """Writes `report.html` and its pictures into a finished run's workdir.

  Returns:
    The path of the page.

  Raises:
    FileNotFoundError: naming the first file of the run that is missing.
    ValueError: naming a file that does not hold what it should.
  """
  run = finished_run.read(workdir)
  names = {layer[side] for layer in run.layers for side in finished_run.SIDES}
  names |= {
    name for d in run.searched_formats.values() for name in d['options']
  }
  names |= {name for name in run.references if _is_format(name)}
  # One palette for all: a format has the same shade in every picture.
  tint = pictures.palette(names - {None})
  images = {}
  for name, draw in _drawings(run, tint).items():
    light = pictures.png(draw)
    files.write_bytes(os.path.join(workdir, f'{name}.png'), light)
    images[name] = light, pictures.png(draw, dark=True)
  path = os.path.join(workdir, 'report.html')
  files.write_bytes(path, report_page.render(run, images, tint).encode())
  return path


def _drawings(
  run: finished_run.FinishedRun, tint: dict[str, str]
) -> dict[str, Callable[[], figure_lib.Figure]]:
  """Returns what to draw, by the picture's name."""
  bind = functools.partial
  result = {
    'architecture': bind(architecture_picture.architecture, run.layers, tint),
    'curves': bind(pictures.curves, run.history, run.marks, bool(run.searched)),
    'cost_per_layer': bind(
      pictures.cost_per_layer, run.layers, tint, run.reference
    ),
  }
  if len(run.policy_rows) > 1:  # One point is no course.
    for name, decisions in (
      ('policy', run.searched_formats),
      ('policy_of_sizes', run.searched_sizes),
    ):
      if decisions:
        result[name] = bind(
          policy_picture.policy, run.policy_rows, decisions, tint
        )
  if allocation_picture.panes(run.layers):
    result['allocation'] = bind(allocation_picture.allocation, run.layers, tint)
  if run.references:
    result['pareto'] = bind(
      pictures.pareto, run.found, run.references, run.metric, tint
    )
  return result


def _is_format(name: str) -> bool:
  try:
    formats.parse(name)
  except ValueError:
    return False
  return True


def main(arguments: Sequence[str] | None = None) -> None:
  """Writes the report of the run in the directory that was named."""
  parser = argparse.ArgumentParser(
    prog='python -m fliqs_jax.report',
    description='Writes report.html and its pictures for a finished run.',
  )
  parser.add_argument('workdir', help='directory of a finished run')
  try:
    print(write_report(parser.parse_args(arguments).workdir))
  except (FileNotFoundError, ValueError) as error:
    sys.exit(f'No report: {error}')


if __name__ == '__main__':
  main()
