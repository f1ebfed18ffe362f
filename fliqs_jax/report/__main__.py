"""Makes the report of a finished run again.

python -m fliqs_jax.report DIR
"""

import argparse
from collections.abc import Sequence

from fliqs_jax.report import report
from fliqs_jax.runtime import commands


@commands.reported
def main(argv: Sequence[str]) -> int:
  """Writes the report of the run in the directory that the argument names."""
  parser = argparse.ArgumentParser(
    prog='python -m fliqs_jax.report',
    description='Writes report.html and its pictures for a finished run.',
  )
  parser.add_argument('workdir', help='directory of a finished run')
  workdir = parser.parse_args(argv).workdir
  try:
    print(report.write_report(workdir))
  except (AttributeError, KeyError, TypeError) as error:
    raise ValueError(
      f'{workdir}: a file lacks something, or has something else in its place, '
      f'so it is damaged, or another version of fliqs_jax has written it '
      f'({type(error).__name__}: {error})'
    ) from error
  return 0


if __name__ == '__main__':
  commands.run(main)
