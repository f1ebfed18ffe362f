"""Collects the results of a sweep: one Pareto table and figure.

python -m fliqs_jax.sweep FILE... [--out=DIR] [--cost=gbops]

The command reads from DIR the runs that the sweep file FILE declares and
`python -m launch PLATFORM --sweep=FILE` made. It prints a Markdown table and
writes pareto.png, sweep.html and sweep.json there. A run that is not finished
is listed with the number of steps that it has taken. The runs of several files
are in DIR/NAME each, NAME.yaml being the file; by default in runs/NAME.
"""

import argparse
from collections.abc import Sequence
import os

from fliqs_jax.runtime import commands
from fliqs_jax.runtime import workdir as workdir_lib
from fliqs_jax.sweep import collect
from fliqs_jax.sweep import sweep_file


@commands.reported
def main(argv: Sequence[str]) -> int:
  """Prints the table; a user's mistake gives one line and status 2."""
  parser = argparse.ArgumentParser(
    prog='python -m fliqs_jax.sweep', description=__doc__.split('\n')[0]
  )
  parser.add_argument('files', nargs='+', metavar='file', help='a sweep file')
  parser.add_argument('--out', help='directory of the runs; default runs/NAME')
  parser.add_argument(
    '--cost', choices=collect.COSTS, default='cost', help='cost of the table'
  )
  args = parser.parse_args(argv)
  sweep = sweep_file.joined([sweep_file.read(file) for file in args.files])
  default = sweep.out if len(args.files) == 1 else os.path.dirname(sweep.out)
  out = default if args.out is None else args.out
  if out.startswith('gs://'):
    raise ValueError(
      f'--out={out} is a bucket; fetch it first: gcloud storage rsync '
      f"--recursive --exclude='.*/checkpoints/.*' {out} DIR"
    )
  summary = collect.collect(sweep, out, args.cost)
  print(collect.markdown(summary))
  collect.write(summary, out)
  page = os.path.join(out, workdir_lib.SWEEP_PAGE)
  print(
    f'\nwritten: {page}, {workdir_lib.SWEEP_FIGURE}, {workdir_lib.SWEEP_RESULT}'
  )
  return 0


if __name__ == '__main__':
  commands.run(main)
