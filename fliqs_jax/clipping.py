"""Compute the table of clipping thresholds from synthetic tensors (A.8).

python -m fliqs_jax.clipping           # prints the table; a few seconds
python -m fliqs_jax.clipping --write   # also replaces the package's table

`numerics.clipping` says how a threshold is chosen, and why.
"""

import argparse
import json

from fliqs_jax.numerics import clipping


def main() -> None:
  """Prints the table; with `--write` also replaces the file."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument(
    '--write', action='store_true', help=f'write {clipping.TABLE_PATH.name}'
  )
  write = parser.parse_args().write
  menu = clipping.table_formats()
  table = {}
  for distribution in clipping.DISTRIBUTIONS:
    columns = [clipping.best_multiples(distribution, menu)]
    columns += [
      clipping.best_multiples(distribution, menu, [r])
      for r in clipping.ALL_RATES
    ]
    columns += [clipping.best_multiples(distribution, menu, clipping.ALL_RATES)]
    headings = ['table', *(f'{rate:g}' for rate in clipping.ALL_RATES), 'all']
    print(f'{distribution:10}', *(f'{heading:>7}' for heading in headings))
    for fmt, *row in zip(menu, *columns):
      print(f'{fmt.name:10}', *(f'{multiple:7.3f}' for multiple in row))
    table[distribution] = {
      fmt.name: float(multiple) for fmt, multiple in zip(menu, columns[0])
    }
  if write:
    text = json.dumps(table, indent=2) + '\n'
    clipping.TABLE_PATH.write_text(text, 'utf-8')


if __name__ == '__main__':
  main()
