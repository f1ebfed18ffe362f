"""Compare search methods and baselines on one config, at equal cost.

python -m fliqs_jax.compare --config=configs/digits.py:space=int_l --out=DIR \
    --methods=uniform,manual,random,greedy,ilp,default,sensitivity \
    --targets=1.15,1.5 --seeds=5

Every method is trained for every target and seed, one run after another, in
DIR/METHOD/TARGET/seedN. A comparison that was stopped is continued by the same
command; more methods, targets and seeds can be added. It prints a Markdown
table, and writes compare.html, compare.json and compare.png. Values of keys
follow as for `fliqs_jax.main`: --config.KEY=VALUE.

Methods: uniform (each format of the menus), manual (first and last layer at 8
bits, the rest at 4), random (at the target's cost), greedy and ilp (allocated
from sensitivities), and the search presets. Exit status as of `fliqs_jax.main`.
"""

import argparse
from collections.abc import Sequence
import os
import pathlib
import sys

from fliqs_jax.comparison import perform
from fliqs_jax.comparison import plan as plan_lib
from fliqs_jax.comparison import summary as summary_lib
from fliqs_jax.run import loop
from fliqs_jax.runtime import commands
from fliqs_jax.runtime import devices
from fliqs_jax.runtime import processes
from fliqs_jax.runtime import workdir as workdir_lib
from fliqs_jax.sweep import sweep_file


@commands.reported
def main(argv: Sequence[str]) -> int:
  """Compares; a user's mistake gives one line and status 2."""
  parser = argparse.ArgumentParser(
    prog='python -m fliqs_jax.compare', description=__doc__.split('\n')[0]
  )
  parser.add_argument('--config', required=True)
  parser.add_argument('--out', required=True, help='directory of the runs')
  parser.add_argument(
    '--methods', default='uniform,manual,random,greedy,ilp,default,sensitivity'
  )
  parser.add_argument('--targets', required=True)
  parser.add_argument('--seeds', type=int, default=3, help='number of seeds')
  parser.add_argument(
    '--metric', default='fisher', help='scores of greedy and ilp'
  )
  parser.add_argument(
    '--retrain',
    action=argparse.BooleanOptionalAction,
    default=True,
    help='also train each searched network from the beginning',
  )
  parser.add_argument(
    '--compilation_cache',
    help='directory of compiled programs, as for fliqs_jax.main',
  )
  # argparse would take one with a space in its value for something else.
  overrides = [text for text in argv if text.startswith('--config.')]
  others = [text for text in argv if text not in overrides]
  args, unknown = parser.parse_known_args(others)
  commands.log()
  devices.keep_compiled(args.compilation_cache)
  stop = processes.Stop()
  try:
    plan = plan_lib.Plan(
      config=args.config,
      out=pathlib.Path(args.out),
      methods=_texts(args.methods),
      targets=_texts(args.targets),
      seeds=args.seeds,
      overrides=sweep_file.overrides([*overrides, *unknown]),
      metric=args.metric,
    )
    plan.check()
    failed = perform.perform(plan, args.retrain, stop)
    summary = summary_lib.summarize(plan, failed)
    print(summary.markdown())
    summary.write()
  except loop.PreemptedError as error:
    print(error, file=sys.stderr)
    return commands.STOPPED
  page = os.path.join(args.out, workdir_lib.COMPARISON_PAGE)
  print(
    f'\nwritten: {page}, {workdir_lib.COMPARISON_FIGURE}, '
    f'{workdir_lib.COMPARISON_RESULT}'
  )
  return commands.MISTAKE if failed else 0


def _texts(text: str) -> tuple[str, ...]:
  return tuple(filter(None, (item.strip() for item in text.split(','))))


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
