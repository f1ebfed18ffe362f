"""Repeat one of the paper's analyses: a table, a picture, expected figures.

python -m fliqs_jax.analysis NAME --out=DIR
python -m fliqs_jax.analysis NAME --out=DIR --seeds=3 \
    --config=configs/fashion_mnist.py:data_dir=DATA
python -m fliqs_jax.analysis allocation_trends --out=DIR --runs=DIR

It prints a Markdown table, and writes NAME.csv, NAME.png and NAME.html to DIR.
Some analyses train networks of a config, one run after another in DIR/NAME; the
same command continues what was stopped, and more seeds can be added. Values of
keys follow as for `fliqs_jax.main`: --config.KEY=VALUE. Exit status as of
`fliqs_jax.main`.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
import pathlib
import sys

from fliqs_jax.analyses import allocation_trends
from fliqs_jax.analyses import best_clip
from fliqs_jax.analyses import finding as finding_lib
from fliqs_jax.analyses import studies
from fliqs_jax.analyses import study as study_lib
from fliqs_jax.analyses import switching_error
from fliqs_jax.run import loop
from fliqs_jax.runtime import commands
from fliqs_jax.runtime import devices
from fliqs_jax.runtime import processes
from fliqs_jax.sweep import sweep_file

# {name: function}; another one is another row. The first line of its module
# says what it is. Those that train are `studies.STUDIES`.
COMPUTED: dict[str, Callable[[], finding_lib.Finding]] = {
  'switching_error': switching_error.analyse,
  'best_clip': best_clip.analyse,
}
# The same of a directory with finished runs.
FINISHED: dict[str, Callable[[pathlib.Path], finding_lib.Finding]] = {
  'allocation_trends': allocation_trends.analyse,
}
_OF_STUDIES = ('config', 'seeds', 'compilation_cache')


def described() -> dict[str, str]:
  """Returns {name of an analysis: what it measures}."""
  trained = {name: study.text[0] for name, study in studies.STUDIES.items()}
  others = {
    name: (sys.modules[analyse.__module__].__doc__ or '').splitlines()[0]
    for name, analyse in {**COMPUTED, **FINISHED}.items()
  }
  return others | trained


@commands.reported
def main(argv: Sequence[str]) -> int:
  """Analyses; a user's mistake gives one line and status 2."""
  # argparse would take one with a space in its value for something else.
  overrides = [text for text in argv if text.startswith('--config.')]
  others = [text for text in argv if text not in overrides]
  args, unknown = _parser().parse_known_args(others)
  keys = sweep_file.overrides([*overrides, *unknown])
  if args.name in studies.STUDIES:
    _refuse(args, {}, 'runs')
    return _train(args, keys)
  if args.name in COMPUTED:
    _refuse(args, keys, 'runs', *_OF_STUDIES)
    # What cannot be a directory is refused before a minute is spent.
    pathlib.Path(args.out).mkdir(parents=True, exist_ok=True)
    return _end(COMPUTED[args.name](), args)
  if args.name in FINISHED:
    _refuse(args, keys, *_OF_STUDIES)
    if args.runs is None:
      raise ValueError(
        f'the analysis {args.name} needs --runs=DIR, a directory with the '
        'workdirs of finished searches'
      )
    return _end(FINISHED[args.name](pathlib.Path(args.runs)), args)
  raise ValueError(
    f'unknown analysis {args.name!r}; allowed: {", ".join(described())}'
  )


def _refuse(
  args: argparse.Namespace, keys: Mapping[str, str], *names: str
) -> None:
  """Refuses flags and keys of a config that the analysis would not read."""
  given = [name for name in names if getattr(args, name) is not None]
  for flag in (*given, *(f'config.{key}' for key in keys)):
    raise ValueError(f'the analysis {args.name} does not take --{flag}')


def _train(args: argparse.Namespace, keys: Mapping[str, str]) -> int:
  study = studies.STUDIES[args.name]
  sweep = study_lib.plan(
    study,
    args.config or 'configs/fashion_mnist.py',
    3 if args.seeds is None else args.seeds,
    keys,
  )
  out = pathlib.Path(args.out, args.name)
  commands.log()
  devices.keep_compiled(args.compilation_cache)
  try:
    failed = study_lib.perform(study, sweep, out, processes.Stop())
  except loop.PreemptedError as error:
    print(error, file=sys.stderr)
    return commands.STOPPED
  points = study_lib.read(study, sweep, out, failed)
  _end(study_lib.finding(study, points), args)
  return commands.MISTAKE if failed else 0


def _end(finding: finding_lib.Finding, args: argparse.Namespace) -> int:
  print(finding.markdown())
  print(f'\nwritten: {finding_lib.write(finding, args.name, args.out)}')
  return 0


def _parser() -> argparse.ArgumentParser:
  lines = [f'  {name:17} {text}' for name, text in described().items()]
  parser = argparse.ArgumentParser(
    prog='python -m fliqs_jax.analysis',
    description=__doc__.split('\n')[0],
    epilog='analyses:\n' + '\n'.join(lines),
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('name', metavar='NAME', help='one of those below')
  parser.add_argument('--out', required=True, help='directory of the results')
  parser.add_argument(
    '--runs', help='of allocation_trends: directory with finished searches'
  )
  parser.add_argument(
    '--config', help='of those that train; default configs/fashion_mnist.py'
  )
  parser.add_argument('--seeds', type=int, help='number of seeds; default 3')
  parser.add_argument(
    '--compilation_cache',
    help='directory of compiled programs, as for fliqs_jax.main',
  )
  return parser


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
