r"""Solve any budget from the measured sensitivities of a finished run.

python -m fliqs_jax.assign WORKDIR --target=1.5 [--relative_to=INT4]
  [--kind=bops] [--method=exact|greedy] [--table=FILE] [--out=arch.json]
python -m fliqs_jax.assign WORKDIR --front=20 [--out=front.csv]

The command reads WORKDIR/sensitivity.json, or the file that --table names, and
takes the options with the least sum of scores whose cost is at most the target,
a multiple of the cost of uniform INT4; an empty --relative_to= makes it a cost.
The kind of the cost is that of the run's config, unless --kind names another.
It prints one JSON object. --out writes an arch.json: `--config=...:arch=PATH`
trains it, and `python -m fliqs_jax.evaluate WORKDIR --arch=PATH` measures it
with the weights of the run.

--front solves N budgets, even in the logarithm of the cost from the cheapest to
the dearest architecture, and prints one Markdown table; --out writes it as CSV,
with the option of every decision.
"""

import argparse
from collections.abc import Sequence
import csv
import io
import json
import pathlib
import sys
from typing import Any

from fliqs_jax.report import number_text
from fliqs_jax.run import evaluation
from fliqs_jax.run import experiment as experiment_lib
from fliqs_jax.run import sensitivity_table
from fliqs_jax.run.records import results
from fliqs_jax.runtime import commands
from fliqs_jax.runtime import files
from fliqs_jax.runtime import workdir as workdir_lib
from fliqs_jax.search import sensitivity


def allocate(
  experiment: experiment_lib.Experiment,
  raw: sensitivity.Scores,
  method: str,
  out: str = '',
) -> dict[str, Any]:
  """Solves one budget; returns what it costs and scores.

  Args:
    experiment: parts of a run, with the target.
    raw: {decision: [K]} scores, as measured.
    method: a key of `sensitivity_table.METHODS`.
    out: path of the arch.json to write; empty: none.

  Raises:
    ValueError: as `sensitivity_table.allocate`.
  """
  point = sensitivity_table.allocate(experiment, raw, method)
  if out:
    files.write_json(out, results.arch(experiment, point.choices))
  return dict(
    sum_of_scores=point.score,
    cost=point.cost,
    cost_target=point.target,
    unit=experiment.cost.unit,
    cost_over_target=point.cost / point.target,
  )


def front(
  experiment: experiment_lib.Experiment,
  raw: sensitivity.Scores,
  count: int,
  method: str,
  out: str = '',
) -> str:
  """Solves many budgets; returns a Markdown table.

  Args:
    experiment: parts of a run.
    raw: {decision: [K]} scores, as measured.
    count: the number of budgets, at least 2.
    method: a key of `sensitivity_table.METHODS`.
    out: path of the CSV file to write; empty: none.

  Raises:
    ValueError: as `sensitivity_table.front`.
  """
  points = sensitivity_table.front(experiment, raw, count, method)
  unit = experiment.cost.unit
  head = [f'target, {unit}', f'cost, {unit}', 'cost / target', 'sum of scores']
  rows = [(p.target, p.cost, p.cost / p.target, p.score) for p in points]
  if out:
    decisions = experiment.space.decisions
    text = io.StringIO()
    writer = csv.writer(text, lineterminator='\n')
    writer.writerow([*head, *(d.name for d in decisions)])
    for point, row in zip(points, rows):
      picked = (d.labels[point.choices[d.name].argmax()] for d in decisions)
      writer.writerow([*row, *picked])
    files.write_bytes(out, text.getvalue().encode())
  return number_text.markdown(
    head, [[f'{value:.5g}' for value in row] for row in rows]
  )


@commands.reported
def main(argv: Sequence[str]) -> int:
  """Prints the result; a user's mistake gives one line and status 2."""
  parser = argparse.ArgumentParser(prog='python -m fliqs_jax.assign')
  parser.add_argument('workdir')
  parser.add_argument('--target', type=float)
  parser.add_argument('--relative_to', default='INT4')
  parser.add_argument('--kind', default='')
  parser.add_argument('--method', default='exact')
  parser.add_argument('--table', default='')
  parser.add_argument('--out', default='')
  parser.add_argument('--front', type=int)
  args = parser.parse_args(argv)
  if (args.target is None) == (args.front is None):
    parser.error('give --target or --front')
  run = evaluation.restore(args.workdir)
  table = args.table or str(
    pathlib.Path(args.workdir) / workdir_lib.SENSITIVITY
  )
  raw = sensitivity_table.raw_scores(sensitivity_table.read(table, run))
  _, negative = sensitivity.regular(run.experiment.space, raw)
  # A front has targets of its own; any will do.
  target = 1.0 if args.target is None else args.target
  experiment = sensitivity_table.at_target(
    run.experiment, target, args.relative_to, args.kind
  )
  if args.front is None:
    solved = allocate(experiment, raw, args.method, args.out)
    print(json.dumps(dict(solved, negative_scores=negative)))
  else:
    print(front(experiment, raw, args.front, args.method, args.out))
    if negative:
      print(f'{negative} scores below zero count as zero', file=sys.stderr)
  return 0


if __name__ == '__main__':
  commands.run(main)
