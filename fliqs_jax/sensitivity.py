r"""Measure how much each option of each decision costs in quality.

python -m fliqs_jax.sensitivity WORKDIR [--scores=fisher] [--batches=8]
  [--out=DIR]

The command restores a finished run, settles its statistics for the dearest
architecture, and scores each other option alone with the weights of the run, on
validation batches. It writes sensitivity.json and the picture sensitivity.png
to DIR (without the flag: to WORKDIR) and prints a Markdown table.
`python -m fliqs_jax.assign` solves any budget from the file.
"""

import argparse
from collections.abc import Mapping, Sequence
import functools
import os
import pathlib
import sys
from typing import Any

from fliqs_jax.report import figures
from fliqs_jax.report import number_text
from fliqs_jax.report import sensitivity_figure
from fliqs_jax.run import evaluation
from fliqs_jax.run import sensitivity_table
from fliqs_jax.runtime import commands
from fliqs_jax.runtime import files
from fliqs_jax.runtime import workdir as workdir_lib


def write(
  workdir: str, metric: str, batches: int, out: str = ''
) -> dict[str, Any]:
  """Measures a finished run; returns the content of its sensitivity.json.

  Args:
    workdir: path of the run's workdir.
    metric: one of `sensitivity_table.METRICS`.
    batches: the number of validation batches.
    out: path of the directory for both files; empty: the workdir.

  Raises:
    ValueError: as `sensitivity_table.measure`, the run is unfinished, or the
      directory cannot be written.
  """
  target = pathlib.Path(out or workdir)
  if target.exists() and not os.access(target, os.W_OK):
    raise ValueError(
      f'{target} cannot be written; name a directory by --out=DIR'
    )
  run = evaluation.restore(workdir)
  target.mkdir(parents=True, exist_ok=True)
  content = sensitivity_table.measure(run, metric, batches)
  draw = functools.partial(
    sensitivity_figure.sensitivity, content['decisions'], metric
  )
  files.write_bytes(target / workdir_lib.SENSITIVITY_FIGURE, figures.png(draw))
  files.write_json(target / workdir_lib.SENSITIVITY, content)
  return content


def markdown(decisions: Mapping[str, Mapping[str, Any]]) -> str:
  """Returns the scores as Markdown, a table for each kind of decision.

  Args:
    decisions: the decisions of a sensitivity.json.
  """
  tables = []
  for kind in dict.fromkeys(d['kind'] for d in decisions.values()):
    part = {name: d for name, d in decisions.items() if d['kind'] == kind}
    scores = {
      name: dict(zip(d['options'], d['scores'])) for name, d in part.items()
    }
    if kind == 'format':
      options = sensitivity_figure.columns(part)
    else:
      options = sorted({option for row in scores.values() for option in row})
    rows = [
      [name, *(f'{row[o]:.3g}' if o in row else '' for o in options)]
      for name, row in scores.items()
    ]
    tables.append(number_text.markdown(['decision', *map(str, options)], rows))
  return '\n\n'.join(tables)


@commands.reported
def main(argv: Sequence[str]) -> int:
  """Prints the table; a user's mistake gives one line and status 2."""
  parser = argparse.ArgumentParser(prog='python -m fliqs_jax.sensitivity')
  parser.add_argument('workdir')
  parser.add_argument('--scores', default='fisher')
  parser.add_argument('--batches', type=int, default=8)
  parser.add_argument('--out', default='')
  args = parser.parse_args(argv)
  content = write(args.workdir, args.scores, args.batches, args.out)
  print(markdown(content['decisions']))
  if content['negative']:
    print(
      f'{content["negative"]} scores are below zero; an allocation counts them '
      'as zero',
      file=sys.stderr,
    )
  return 0


if __name__ == '__main__':
  commands.run(main)
