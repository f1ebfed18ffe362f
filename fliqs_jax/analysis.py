"""Repeat one of the paper's analyses: a table, a picture, expected figures.

python -m fliqs_jax.analysis NAME --out=DIR

It prints a Markdown table, and writes NAME.csv, NAME.png and NAME.html to DIR.
"""

import argparse
from collections.abc import Callable, Sequence

from fliqs_jax.analyses import best_clip
from fliqs_jax.analyses import finding as finding_lib
from fliqs_jax.analyses import switching_error
from fliqs_jax.runtime import commands

# {name: (what it measures, the function)}; another analysis is another row.
COMPUTED: dict[str, tuple[str, Callable[[], finding_lib.Finding]]] = {
  'switching_error': (
    'what a change of the format changes in a tensor (Figure 4a)',
    switching_error.analyse,
  ),
  'best_clip': (
    'threshold of least error, by number of bits (A.8)',
    best_clip.analyse,
  ),
}


@commands.reported
def main(argv: Sequence[str]) -> int:
  """Analyses; a user's mistake gives one line and status 2."""
  names = '\n'.join(
    f'  {name:17} {line}' for name, (line, _) in COMPUTED.items()
  )
  parser = argparse.ArgumentParser(
    prog='python -m fliqs_jax.analysis',
    description=__doc__.split('\n')[0],
    epilog=f'analyses:\n{names}',
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('name', metavar='NAME', help='one of those below')
  parser.add_argument('--out', required=True, help='directory of the results')
  args = parser.parse_args(argv)
  if args.name not in COMPUTED:
    raise ValueError(
      f'unknown analysis {args.name!r}; allowed: {", ".join(COMPUTED)}'
    )
  finding = COMPUTED[args.name][1]()
  print(finding.markdown())
  print(f'\nwritten: {finding_lib.write(finding, args.name, args.out)}')
  return 0


if __name__ == '__main__':
  commands.run(main)
