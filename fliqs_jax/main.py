"""The door: flags of a run.

python -m fliqs_jax.main --config=configs/digits.py:space=int_l --workdir=DIR
"""

from collections.abc import Sequence
import logging
import os
import sys

from absl import app
from absl import flags
from absl import logging as absl_logging
import jax
from ml_collections import config_flags

from fliqs_jax import train

_CONFIG = config_flags.DEFINE_config_file(
  'config', None, 'A file of configs/, with its arguments after a colon.'
)
_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Where the run leaves its files, and resumes from.'
)
flags.mark_flags_as_required(['config', 'workdir'])


def main(argv: Sequence[str]) -> None:
  """Runs the search; a mistake of the user's ends in one line, status 2."""
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments: {" ".join(argv[1:])}')
  # Only this project's own lines: libraries have a hundred to say per save.
  absl_logging.set_verbosity(absl_logging.ERROR)
  log = logging.getLogger('fliqs_jax')
  log.setLevel(logging.INFO)
  log.propagate = False
  handler = logging.StreamHandler()
  handler.setFormatter(logging.Formatter('%(asctime)s %(message)s', '%H:%M:%S'))
  log.addHandler(handler)
  try:
    _check_alone()
    train.train_and_evaluate(_CONFIG.value, _WORKDIR.value)
  except (ValueError, train.DivergedError) as error:
    log.error('%s', error)
    sys.exit(2)


def _check_alone() -> None:
  """Refuses to be one of several processes: each would search by itself."""
  told = [os.environ.get(k) for k in ('FLIQS_NUM_PROCESSES', 'SLURM_NTASKS')]
  counts = {count for count in told if count}
  # JAX is asked last: it would wait for the others.
  if counts - {'1'} or jax.process_count() > 1:
    raise ValueError(
      'a search runs in one process so far, on one device; this is one of '
      'several. Start one process for each search'
    )


if __name__ == '__main__':
  app.run(main)
