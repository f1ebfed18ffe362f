"""Launches the processes of a config or of a sweep file.

python -m launch local|slurm|tpu_vm|gke [ACTION] --config=FILE --workdir=DIR
python -m launch local|slurm|tpu_vm|gke [ACTION] --sweep=FILE --out=DIR

docs/launching.md has an example for each platform; `--dry_run` prints the shell
script and does nothing.
"""

from collections.abc import Sequence
import sys

from fliqs_jax.runtime import commands
from launch import common
from launch import gke
from launch import local
from launch import slurm
from launch import tpu_vm

PLATFORMS = dict(local=local, slurm=slurm, tpu_vm=tpu_vm, gke=gke)


def main(argv: Sequence[str]) -> int:
  """Launches; a user's mistake gives one line and status 2."""
  try:
    if not argv or argv[0] not in PLATFORMS:
      given = repr(argv[0]) if argv else 'nothing'
      raise ValueError(
        f'the first argument must be a platform, {", ".join(PLATFORMS)}, not '
        f'{given}'
      )
    platform = PLATFORMS[argv[0]]
    parser = common.Parser(
      prog=f'python -m launch {argv[0]}',
      description=platform.__doc__.split('\n')[0],
      allow_abbrev=False,
    )
    parser.add_argument(
      'action', nargs='?', choices=platform.ACTIONS, default='up'
    )
    common.add_flags(parser)
    platform.add_flags(parser)
    args, overrides = common.parse(parser, commands.at_home(argv[1:]))
    plan = common.plan(args, overrides)
    script = platform.script(args, plan)
    common.check(args, plan)
    if args.dry_run:
      print(script, end='')
      return 0
    return platform.perform(args, plan)
  except ValueError as error:
    print(f'launch: {error}', file=sys.stderr)
    return common.MISTAKE


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
