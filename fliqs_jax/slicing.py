r"""Cut the inactive channels and unused kernels out of a searched network.

python -m fliqs_jax.slicing WORKDIR --out=DIR

The command reads a finished run and writes the run of the resulting network:
its parameters, statistics and computation lack inactive channels and kernels
that were not selected. DIR is a workdir for `evaluate` and `report`; a config
with its arch.json builds the same network. The command prints one JSON object:
the test metrics of the sliced network.
"""

import argparse
from collections.abc import Sequence
import json
import sys

from fliqs_jax.run import slicing


def main(argv: Sequence[str]) -> int:
  """Prints the metrics; a user's mistake gives one line and status 2."""
  parser = argparse.ArgumentParser(prog='python -m fliqs_jax.slicing')
  parser.add_argument('workdir')
  parser.add_argument('--out', required=True)
  args = parser.parse_args(argv)
  try:
    print(json.dumps(slicing.slice_run(args.workdir, args.out)))
  except ValueError as error:
    print(error, file=sys.stderr)
    return 2
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
