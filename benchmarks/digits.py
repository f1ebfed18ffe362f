r"""Found models against uniform ones on real digits, equally long trained.

python -m benchmarks.digits [--seeds=5] [--steps=1500] [--targets=1.5]

Trains, per seed, the uniform networks and searches each space to each target
(multiples of the uniform 4-bit cost) with `configs/digits.py`, every run by the
same code and for the same number of steps; prints test accuracy and
cross-entropy against cost, mean and standard deviation over seeds.
"""

import argparse
import statistics
import tempfile

from configs import digits
from fliqs_jax import train

_UNIFORM = ('INT4', 'INT8', 'BF16')
_SEARCHES = (
  ('int_s', 'default'),
  ('int_l', 'default'),
  ('int_s', 'paper'),
  ('int_l', 'paper'),
)


def _found(arg: str) -> dict:
  with tempfile.TemporaryDirectory() as workdir:
    return train.train_and_evaluate(digits.get_config(arg), workdir)['found']


def _spread(values) -> str:
  return f'{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}'


def _print_row(name: str, runs, int4_cost: float) -> None:
  accuracy = [100 * run['accuracy'] for run in runs]
  print(
    f'| {name} | {_spread([run["cost"] / int4_cost for run in runs])} | '
    f'{statistics.mean(accuracy):.2f} ± {statistics.stdev(accuracy):.2f} | '
    f'{_spread([run["loss"] for run in runs])} |',
    flush=True,
  )


def main() -> None:
  """Runs everything and prints one table."""
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--seeds', type=int, default=5)
  parser.add_argument('--steps', type=int, default=1500)
  parser.add_argument('--targets', default='1.5')
  args = parser.parse_args()
  print('| network | cost / INT4 | test accuracy % | test cross-entropy |')
  print('|---|---|---|---|')
  int4_cost = None
  for name in _UNIFORM:
    runs = [
      _found(f'space={name},steps={args.steps},seed={seed}')
      for seed in range(args.seeds)
    ]
    int4_cost = int4_cost or runs[0]['cost']
    _print_row(f'uniform {name}', runs, int4_cost)
  for target in args.targets.split(','):
    for space, preset in _SEARCHES:
      runs = [
        _found(
          f'space={space},preset={preset},target={target},steps={args.steps},'
          f'seed={seed}'
        )
        for seed in range(args.seeds)
      ]
      _print_row(f'{space}, {preset}, target {target}', runs, int4_cost)


if __name__ == '__main__':
  main()
