"""Start a run from a config, or resume it.

python -m fliqs_jax.main --config=configs/digits.py:space=int_l --workdir=DIR

Exit status 0: the run finished. 2: the user made a mistake, the disk is full,
or training diverged. 75: SIGTERM or Ctrl-C stopped the run; the same command
goes on. Any other: the run crashed.
"""

from collections.abc import Callable, Mapping, Sequence
import gc
import os
import sys
from typing import Any

from absl import app
from absl import flags
import jax
import ml_collections
from ml_collections import config_flags

from fliqs_jax.run import loop
from fliqs_jax.run import train
from fliqs_jax.run.records import run_log
from fliqs_jax.runtime import checkpoint
from fliqs_jax.runtime import commands
from fliqs_jax.runtime import devices
from fliqs_jax.runtime import processes
from fliqs_jax.sweep import sweep_file

_CONFIG = config_flags.DEFINE_config_file(
  'config', None, 'A file of configs/, with its arguments after a colon.'
)
_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Directory of the files of the run, from which it resumes.'
)
_PROFILE_STEPS = flags.DEFINE_string(
  'profile_steps', '', 'N:M profiles steps N to M - 1 into WORKDIR/profile.'
)
_RETRAIN = flags.DEFINE_bool(
  'retrain',
  False,
  'Also trains the selected network from the beginning, to measure what the '
  'served weights lack.',
)
_INIT_FROM = flags.DEFINE_string(
  'init_from',
  '',
  'Checkpoint of a trained network to start from: the workdir of a finished '
  'run, a .safetensors file, a directory that Orbax wrote or a model.json of '
  'TensorFlow.js.',
)
_COMPILATION_CACHE = flags.DEFINE_string(
  'compilation_cache',
  None,
  'Directory of compiled programs, which the next start loads; empty keeps '
  'none. By default what JAX_COMPILATION_CACHE_DIR names, or else '
  "fliqs_jax/compiled in the user's cache.",
)
_JOIN_TIMEOUT = flags.DEFINE_integer(
  'join_timeout', 300, 'Seconds to wait for the other processes.', 1
)
_DEAD_AFTER = flags.DEFINE_integer(
  'dead_after',
  60,
  'Seconds without a heartbeat of one process after which all processes end.',
  1,
)
flags.mark_flags_as_required(['config', 'workdir'])


def main(argv: Sequence[str]) -> None:
  """Runs the search; a user's mistake gives one line and status 2."""
  start(argv, lambda config, overrides: None)


def start(
  argv: Sequence[str],
  adapt: Callable[[ml_collections.ConfigDict, Mapping[str, Any]], None],
) -> None:
  """Runs the search that the flags describe.

  Args:
    argv: arguments that are no flags, the name of the program first.
    adapt: changes the config before it is used, but leaves the values of
      {dotted key: value} that flags set.
  """
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments: {" ".join(argv[1:])}')
  # Tracing makes many small objects; by default an eighth of a start would be
  # spent on looking for garbage among them.
  gc.freeze()
  gc.set_threshold(200_000)
  log = commands.log()
  stop = processes.Stop()
  try:
    processes.join(_JOIN_TIMEOUT.value, _DEAD_AFTER.value)
    if processes.count() > 1:
      place = f'[{processes.index()}/{processes.count()}]'
      commands.log(place)
    devices.keep_compiled(_COMPILATION_CACHE.value)
    config = _CONFIG.value
    flag = flags.FLAGS['config']
    overrides = config_flags.get_override_values(flag)
    adapt(config, overrides)
    sweep_file.check_overrides(
      config_flags.get_config_filename(flag), overrides
    )
    if _INIT_FROM.value:
      config.init_from = _INIT_FROM.value
    train.train_and_evaluate(
      config,
      _WORKDIR.value,
      stop=stop,
      profile_steps=_PROFILE_STEPS.value,
      retrain=_RETRAIN.value,
    )
  except run_log.DivergedError as error:
    log.error('%s', error)
    sys.exit(commands.MISTAKE)
  except (ValueError, OSError, checkpoint.SaveError) as error:
    log.error('%s', commands.line(error))
    sys.exit(commands.status(error))
  except loop.PreemptedError as error:
    log.info('%s', error)
    sys.exit(commands.STOPPED)
  except jax.errors.JaxRuntimeError as error:
    if processes.count() == 1:
      raise
    log.error(
      'a step failed, most likely because another process is gone; the same '
      'command resumes the run: %s',
      ' '.join(str(error).split())[-300:],
    )
    # A normal exit would wait for the other processes.
    os._exit(commands.CRASHED)


def parsed(argv: Sequence[str]) -> list[str]:
  """Returns the arguments that are no flags; a mistake gives one line.

  absl ends with status 1, for which launchers start the command again.
  """
  try:
    argv = commands.at_home(argv)
  except ValueError as error:
    print(commands.line(error), file=sys.stderr)
    sys.exit(commands.MISTAKE)
  try:
    others = flags.FLAGS(argv)
    commands.loaded(_CONFIG.value)
    return others
  except Exception as error:  # Loading a file as Python raises any.
    print(commands.no_config(error), file=sys.stderr)
    sys.exit(commands.MISTAKE)


if __name__ == '__main__':
  app.run(main, flags_parser=parsed)
