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

from fliqs_jax.run import slicing
from fliqs_jax.runtime import commands


@commands.reported
def main(argv: Sequence[str]) -> int:
  """Prints the metrics; a user's mistake gives one line and status 2."""
  parser = argparse.ArgumentParser(prog='python -m fliqs_jax.slicing')
  parser.add_argument('workdir')
  parser.add_argument('--out', required=True)
  args = parser.parse_args(argv)
  print(json.dumps(slicing.slice_run(args.workdir, args.out)))
  return 0


if __name__ == '__main__':
  commands.run(main)
