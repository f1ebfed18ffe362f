r"""Evaluate one assignment with the weights of a finished run.

python -m fliqs_jax.evaluate WORKDIR [--arch=OTHER/arch.json | --format=INT8]

The command restores the last checkpoint, fixes every decision as the flag says
(without a flag: as the run selected), settles the running statistics for this
architecture and evaluates it on the test split. It prints one JSON object.
Nothing in WORKDIR changes.
"""

import argparse
from collections.abc import Sequence
import json
import sys

from fliqs_jax.run import evaluation


def main(argv: Sequence[str]) -> int:
  """Prints the metrics; a user's mistake gives one line and status 2."""
  parser = argparse.ArgumentParser(prog='python -m fliqs_jax.evaluate')
  parser.add_argument('workdir')
  parser.add_argument('--arch', default='')
  parser.add_argument('--format', default='')
  args = parser.parse_args(argv)
  try:
    print(json.dumps(evaluation.evaluate(args.workdir, args.arch, args.format)))
  except ValueError as error:
    print(error, file=sys.stderr)
    return 2
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
