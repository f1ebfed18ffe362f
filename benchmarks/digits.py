r"""Compares searched models with uniform ones on real digits.

python -m benchmarks.digits [--seeds=5] [--steps=1500] [--targets=1.5] \
    [--rows=uniform,formats,default,paper,sizes,sizes_default]

For each seed the benchmark trains the uniform networks and searches each space
for each target (a multiple of the uniform 4-bit cost) with `configs/digits.py`.
All runs use the same code and the same number of steps. It prints cost, test
accuracy and cross-entropy, mean and standard deviation over seeds. Rows:

  uniform  one format for all layers
  formats  searches of formats only, with the config's own preset
  default  the same with the preset `default`
  paper    the same with the paper's controller
  sizes    searches of channels, at one format and together with formats
  sizes_default  the same with the preset `default`
"""

import argparse
import statistics
import tempfile

from configs import digits
from fliqs_jax.run import experiment
from fliqs_jax.run import train

_ROWS = {
  'uniform': ('space=INT4', 'space=INT8', 'space=BF16'),
  'formats': ('space=int_s', 'space=int_l'),
  'default': ('space=int_s,preset=default', 'space=int_l,preset=default'),
  'paper': ('space=int_s,preset=paper', 'space=int_l,preset=paper'),
  'sizes': ('space=INT4,nas', 'space=INT8,nas', 'space=int_l,nas'),
  'sizes_default': (
    'space=INT4,nas,preset=default',
    'space=INT8,nas,preset=default',
    'space=int_l,nas,preset=default',
  ),
}


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
  parser.add_argument('--rows', default=','.join(_ROWS))
  args = parser.parse_args()
  int4 = experiment.build(digits.get_config('space=INT4'))
  int4_cost = float(int4.cost_of(int4.space.only()))
  print('| network | cost / INT4 | test accuracy % | test cross-entropy |')
  print('|---|---|---|---|')
  for kind in args.rows.split(','):
    targets = [''] if kind == 'uniform' else args.targets.split(',')
    for target in targets:
      for arg in _ROWS[kind]:
        arg += f',target={target}' if target else ''
        runs = [
          _found(f'{arg},steps={args.steps},seed={seed}')
          for seed in range(args.seeds)
        ]
        _print_row(arg, runs, int4_cost)


if __name__ == '__main__':
  main()
