"""Faults that a run must survive, at random: kills, bit flips, full disks.

python -m tests.faults [--seed=0]

It takes some five minutes on two cores and prints a Markdown table, which
docs/reliability.md records. `survived`: the run ends with the same results as
one without the fault. `refused`: one line says what is wrong, and what to do.
`lost`: neither; the exit status is then 1.
"""

import argparse
import collections
from collections.abc import Callable, Iterator
import math
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any

import jax

from fliqs_jax.run import experiment as experiment_lib
from fliqs_jax.run.configs import config as config_lib
from fliqs_jax.runtime import digests
from fliqs_jax.runtime import restoring
from tests import helpers
from tests import tiny

_ROOT = pathlib.Path(__file__).parents[1]
SURVIVED, REFUSED, LOST = 'survived', 'refused', 'lost'
# What a key of a config may hold by mistake.
VALUES = (
  *(None, True, -1, 0, 1.5, math.nan, math.inf, -math.inf, 2**31, 2**63, 1e300),
  *('x', '', '*', b'x', (), (1,), (0,), (-1,), ('x',), (None,), ((),)),
  *((('*',),), (('*', 'x'),), ((1, 2),), (math.nan,), (math.inf,), (True,)),
  *(('*', '*'), (('*', '*'),), ((('*',),),), [['*']], {'a': 1}),
)


def _start(workdir: pathlib.Path, blocks: str = 'unlimited'):
  """Starts the tiny run; no file may have more than so many kilobytes."""
  command = f'ulimit -f {blocks}; exec "$0" -m fliqs_jax.main "$@"'
  flags = '--config=tests/tiny.py', f'--workdir={workdir}'
  return subprocess.Popen(
    ['bash', '-c', command, sys.executable, *flags],
    cwd=_ROOT,
    stderr=subprocess.PIPE,
    text=True,
    env={**os.environ, 'JAX_PLATFORMS': 'cpu'},
  )


def _ends_as(whole: pathlib.Path, workdir: pathlib.Path) -> str:
  """Continues a run to its end; says whether the results are the same."""
  process = _start(workdir)
  process.communicate()
  is_same = not process.returncode and (
    helpers.facts(workdir) == helpers.facts(whole)
  )
  return SURVIVED if is_same else LOST


def kills(rng, whole, folder, how: signal.Signals, seconds: float):
  """A run gets a signal at a random moment, and is started again."""
  for _ in range(5):
    workdir = folder / 'killed'
    process = _start(workdir)
    try:
      process.communicate(timeout=rng.uniform(1, seconds))
    except subprocess.TimeoutExpired:
      process.send_signal(how)
      process.communicate()
    yield _ends_as(whole, workdir)
    shutil.rmtree(workdir)


def flips(rng, whole, folder) -> Iterator[str]:
  """One bit of a file of the newest checkpoint is another one."""
  abstract = jax.eval_shape(
    experiment_lib.build(tiny.get_config()).initial_state
  )
  saved = _digests(whole, abstract)
  files = [p for p in (whole / 'checkpoints' / '60').rglob('*') if p.is_file()]
  for _ in range(100):
    workdir = shutil.copytree(whole, folder / 'flipped')
    path = workdir / rng.choice(files).relative_to(whole)
    data = bytearray(path.read_bytes() or b'\0')
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    step, found = _digests(workdir, abstract)
    # Of the checkpoint before, a continued run makes the same one again.
    is_sound = step == 50 or (step, found) == saved
    yield SURVIVED if is_sound else LOST
    shutil.rmtree(workdir)


def _digests(workdir, abstract) -> tuple[int, dict[str, int]]:
  restored = restoring.restore_latest(workdir / 'checkpoints', abstract)
  leaves = digests.named_leaves(restored.state)
  return restored.step, digests.digests(leaves)


def two_runs(rng, whole, folder) -> Iterator[str]:
  """A second run is started in the workdir of a live one."""
  for _ in range(3):
    workdir = folder / 'two'
    first = _start(workdir)
    while not (workdir / 'config.json').exists():
      time.sleep(0.05)
    time.sleep(rng.uniform(0, 4))
    second = _start(workdir)
    line = second.communicate()[1].splitlines()[-1]
    first.communicate()
    refused = second.returncode == 2 and 'in use by process' in line
    is_same = helpers.facts(workdir) == helpers.facts(whole)
    yield REFUSED if refused and is_same else LOST
    shutil.rmtree(workdir)


def full_disks(rng, whole, folder) -> Iterator[str]:
  """No file may grow beyond a size; then there is room again."""
  for blocks in (0, 1, 2, 4, 8, 32):
    workdir = folder / 'full'
    process = _start(workdir, str(blocks))
    lines = process.communicate()[1].splitlines()
    refused = process.returncode in (0, 2) and lines
    end = _ends_as(whole, workdir)
    yield REFUSED if refused and end == SURVIVED else LOST
    shutil.rmtree(workdir)


def configs(rng, whole, folder) -> Iterator[str]:
  """A key of the config has another value."""
  for key in _keys(config_lib.SCHEMA):
    for value in VALUES:
      config = tiny.get_config()
      with config.unlocked(), config.ignore_type():
        *sections, last = key
        section = config
        for name in sections:
          section = section[name]
        section[last] = value
        # It would prepare the digits in a directory of that name.
        if key == ('data', 'data_dir') and isinstance(value, str):
          continue
      yield _built(config)


def _keys(schema, place=()) -> Iterator[tuple[str, ...]]:
  for key, inner in schema.items():
    if isinstance(inner, dict):
      yield from _keys(inner, (*place, key))
    else:
      yield (*place, key)


def _built(config: Any) -> str:
  try:
    experiment_lib.build(config)
  except ValueError:
    return REFUSED
  except Exception as error:  # What a user would see as a traceback.
    print(f'{type(error).__name__}: {error}', file=sys.stderr)
    return LOST
  return SURVIVED


def main() -> int:
  """Tries all faults, and prints the table."""
  parser = argparse.ArgumentParser(prog='python -m tests.faults')
  parser.add_argument('--seed', type=int, default=0)
  seed = parser.parse_args().seed
  rows = []
  with tempfile.TemporaryDirectory() as scratch:
    folder = pathlib.Path(scratch)
    os.environ['JAX_COMPILATION_CACHE_DIR'] = str(folder / 'compiled')
    _start(folder / 'compiles').communicate()
    began = time.monotonic()
    _start(folder / 'whole').communicate()
    seconds = time.monotonic() - began
    for fault, trials in _faults(seed, folder, seconds).items():
      counts = collections.Counter(trials())
      numbers = [sum(counts.values())]
      numbers += [counts[end] for end in (SURVIVED, REFUSED, LOST)]
      rows.append([fault, *numbers])
      print('|', ' | '.join(map(str, rows[-1])), '|', flush=True)
  return int(any(row[-1] for row in rows))


def _faults(
  seed: int, folder: pathlib.Path, seconds: float
) -> dict[str, Callable[[], Iterator[str]]]:
  rng = random.Random(seed)
  given = rng, folder / 'whole', folder
  print('| fault | tried | survived | refused | lost |')
  print('|---|---|---|---|---|')
  return {
    '`kill -9` at a random moment': lambda: kills(
      *given, signal.SIGKILL, seconds
    ),
    'SIGTERM at a random moment': lambda: kills(
      *given, signal.SIGTERM, seconds
    ),
    'Ctrl-C at a random moment': lambda: kills(*given, signal.SIGINT, seconds),
    'a bit of the newest checkpoint flips': lambda: flips(*given),
    'a second run in the workdir': lambda: two_runs(*given),
    'the disk is full': lambda: full_disks(*given),
    'a key of the config has another value': lambda: configs(*given),
  }


if __name__ == '__main__':
  sys.exit(main())
