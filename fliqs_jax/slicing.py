r"""Make the found network out of the searched one: what is dead is cut away.

python -m fliqs_jax.slicing WORKDIR --out=DIR

Reads a finished run and writes the run of the network that it found: channels
that are not live and kernels that were not chosen are gone from parameters,
statistics and compute. DIR is a workdir as any other, for `evaluate` and
`report`; its arch.json builds the same network from nothing. Prints one JSON
object: the test metrics of the sliced network.
"""

import argparse
from collections.abc import Sequence
import json
import sys

from fliqs_jax.run import slicing


def main(argv: Sequence[str]) -> int:
  """Prints the metrics; a mistake of the user's ends in one line, status 2."""
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
