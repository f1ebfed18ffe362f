r"""Served quality of searches where every assignment has been trained.

python -m benchmarks.exhaustive [--directory=DIR] [--seeds=16] [--steps=350] \
    [--targets=.7,1.25,2] [--methods=random,paper] [--menu=INT2,INT4,INT8]

First trains every assignment of `exhaustive_problem` alone, for every seed;
this takes most of the time, and DIR keeps the results, so that a second start
goes on. Then runs the methods of `exhaustive_methods`, prints a table, and
writes the same numbers to DIR/exhaustive-STEPS.json: `random` assignments that
use most of the budget; `judged`, the best one by the score of whole networks,
where `sensitivity` adds up those of single layers; `two_trainings`, of which
the first, at the dearest format, gives the scores that solve the budget, and
the second trains the result from scratch; the presets. The last rows, `one
seed`, show the noise of a training: of all assignments within the budget, the
one that has the least test loss of all with the same seed. Columns:

  cost / target   mean and standard deviation over seeds
  within          share of the networks that are within the budget
  served          test loss in nats with the weights of the search, mean and
                  standard deviation over seeds
  from scratch    the same assignments, each trained alone with the same seed
  gap             served minus from scratch, seed by seed: mean and standard
                  error
  regret          loss of the selected assignment beyond that of the best one
                  within the budget, both trained alone, means of all seeds. The
                  best one is selected by the seeds of one half and valued by
                  the other half's, so that it is not the luckiest
  uniform         uniform precision at the same cost, interpolated in log cost
  compute         matrix products of examples, a backward pass counted twice,
                  over those of training without a search
"""

import argparse
import datetime
import pathlib
import tempfile
from typing import Any

import numpy as np

from benchmarks import exhaustive_methods
from benchmarks import exhaustive_problem
from fliqs_jax.runtime import files
from fliqs_jax.space import allocation

_ONE_SEED = 'one seed'
_HEAD = (
  'target',
  'method',
  'cost / target',
  'within',
  'served',
  'from scratch',
  'gap',
  'regret',
  'uniform',
  'compute',
)


def best(
  problem: exhaustive_problem.Problem, table: np.ndarray, target: float
) -> float:
  """Returns the loss of the best assignment within a budget.

  Args:
    problem: the network and its training.
    table: [S, N] losses of all assignments, S of at least 2.
    target: the budget.
  """
  within = np.flatnonzero(problem.within(target))
  halves = [table[start::2, within].mean(axis=0) for start in (0, 1)]
  return float(np.mean([b[a.argmin()] for a, b in (halves, reversed(halves))]))


def of_one_seed(
  problem: exhaustive_problem.Problem, table: np.ndarray, targets: np.ndarray
) -> exhaustive_methods.Selected:
  """Selects the best assignment within each budget, by each seed alone.

  Args:
    problem: the network and its training.
    table: [S, N] losses of all assignments.
    targets: [T] budgets.
  """
  within = np.stack([problem.within(target) for target in targets])
  numbers = np.where(within[:, None], table, np.inf).argmin(axis=-1)
  return exhaustive_methods.Selected(numbers, None, float(table.shape[1]))


def row(
  problem: exhaustive_problem.Problem,
  table: np.ndarray,
  target: float,
  numbers: np.ndarray,
  served: np.ndarray | None,
) -> dict[str, Any]:
  """Returns the numbers of a method at a target.

  Args:
    problem: the network and its training.
    table: [S, N] losses of all assignments.
    target: the budget.
    numbers: [S] selected assignments.
    served: [S] losses of the served networks; None: trained from scratch.
  """
  cost = problem.costs[numbers]
  scratch = table[np.arange(len(numbers)), numbers]
  served = scratch if served is None else served
  uniform = [problem.uniform(i) for i in range(len(problem.menu))]
  line = np.interp(
    np.log(cost), np.log(problem.costs[uniform]), table[:, uniform].mean(axis=0)
  )
  mean = table.mean(axis=0)
  return dict(
    target=target,
    cost=_spread(cost / target),
    within=float(np.mean(cost <= target * (1 + allocation.TOLERANCE))),
    served=_spread(served),
    from_scratch=_spread(scratch),
    gap=_spread(served - scratch, of_mean=True),
    regret=float(mean[numbers].mean() - best(problem, table, target)),
    uniform=float(line.mean()),
    assignments=problem.assignments[numbers].tolist(),
  )


def _spread(values: np.ndarray, of_mean: bool = False) -> list[float]:
  """Returns the mean and the standard deviation, of values or of the mean."""
  spread = values.std(ddof=1) / (np.sqrt(len(values)) if of_mean else 1)
  return [float(values.mean()), float(spread)]


def _cells(method: str, values: dict[str, Any], compute: float) -> list[str]:
  gap, error = values['gap']
  return [
    f'{values["target"]:g}',
    method,
    '{:.2f} ± {:.2f}'.format(*values['cost']),
    f'{values["within"]:.0%}',
    '{:.3f} ± {:.3f}'.format(*values['served']),
    '{:.3f} ± {:.3f}'.format(*values['from_scratch']),
    f'{gap:+.3f} ± {error:.3f}' if gap or error else '',
    f'{values["regret"]:+.3f}',
    f'{values["uniform"]:.3f}',
    f'{compute:.2f}',
  ]


def _line(cells: Any) -> str:
  return f'| {" | ".join(cells)} |'


def measure(
  problem: exhaustive_problem.Problem,
  directory: pathlib.Path,
  seeds: int,
  targets: list[float],
  methods: list[str],
) -> dict[str, Any]:
  """Prints the tables; returns their numbers.

  Args:
    problem: the network and its training.
    directory: where the losses of all assignments are kept.
    seeds: number of seeds, at least 2.
    targets: budgets, in multiples of the cost of uniform INT4.
    methods: keys of `exhaustive_methods.METHODS`.
  """
  table = problem.table(directory, seeds)
  uniform = {
    name: _spread(table[:, problem.uniform(i)])
    for i, name in enumerate(problem.menu)
  }
  print('| uniform | cost / INT4 | test loss |\n|---|---|---|')
  for i, (name, loss) in enumerate(uniform.items()):
    cost = problem.costs[problem.uniform(i)]
    print(_line((name, f'{cost:.2f}', '{:.3f} ± {:.3f}'.format(*loss))))
  print()
  print(_line(_HEAD), _line(['---'] * len(_HEAD)), sep='\n')
  rows: dict[str, Any] = {}
  budgets, streams = np.asarray(targets), problem.streams(seeds)
  for name in (*methods, _ONE_SEED):
    if name == _ONE_SEED:
      selected = of_one_seed(problem, table, budgets)
    else:
      selected = exhaustive_methods.METHODS[name](problem, budgets, streams)
    rows[name] = []
    for i, target in enumerate(targets):
      served = None if selected.served is None else selected.served[i]
      values = row(problem, table, target, selected.numbers[i], served)
      rows[name].append(values | dict(compute=selected.compute))
      print(_line(_cells(name, values, selected.compute)), flush=True)
  limits = {target: best(problem, table, target) for target in targets}
  print(f'\nBest within budget: {limits}; {seeds} seeds')
  return dict(uniform=uniform, best=list(limits.values()), methods=rows)


def main() -> None:
  """Trains, searches, prints the table and writes the numbers."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--directory', default='')
  parser.add_argument('--seeds', type=int, default=16)
  parser.add_argument('--steps', type=int, default=350)
  parser.add_argument('--targets', default='.7,1.25,2')
  parser.add_argument('--methods', default=','.join(exhaustive_methods.METHODS))
  parser.add_argument('--menu', default='INT2,INT3,INT4,INT8')
  args = parser.parse_args()
  problem = exhaustive_problem.Problem(
    steps=args.steps, menu=tuple(args.menu.split(','))
  )
  directory = pathlib.Path(args.directory or tempfile.mkdtemp())
  result = measure(
    problem,
    directory,
    args.seeds,
    [float(target) for target in args.targets.split(',')],
    args.methods.split(','),
  )
  result |= dict(
    date=str(datetime.date.today()), seeds=args.seeds, steps=args.steps
  )
  files.write_json(directory / f'exhaustive-{args.steps}.json', result)


if __name__ == '__main__':
  main()
