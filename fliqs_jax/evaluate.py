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

from fliqs_jax.run import evaluation
from fliqs_jax.runtime import commands


@commands.reported
def main(argv: Sequence[str]) -> int:
  """Prints the metrics; a user's mistake gives one line and status 2."""
  parser = argparse.ArgumentParser(prog='python -m fliqs_jax.evaluate')
  parser.add_argument('workdir')
  parser.add_argument('--arch', default='')
  parser.add_argument('--format', default='')
  args = parser.parse_args(argv)
  print(json.dumps(evaluation.evaluate(args.workdir, args.arch, args.format)))
  return 0


if __name__ == '__main__':
  commands.run(main)
