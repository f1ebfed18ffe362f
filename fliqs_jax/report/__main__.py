"""Makes the report of a finished run again.

python -m fliqs_jax.report DIR
"""

import argparse
from collections.abc import Sequence
import sys

from fliqs_jax.report import report


def main(arguments: Sequence[str] | None = None) -> None:
  """Writes the report of the run in the directory that the argument names."""
  parser = argparse.ArgumentParser(
    prog='python -m fliqs_jax.report',
    description='Writes report.html and its pictures for a finished run.',
  )
  parser.add_argument('workdir', help='directory of a finished run')
  try:
    print(report.write_report(parser.parse_args(arguments).workdir))
  except (FileNotFoundError, ValueError) as error:
    sys.exit(f'No report: {error}')


if __name__ == '__main__':
  main()
