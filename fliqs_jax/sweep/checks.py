"""Checks of the runs of a sweep before the first of them starts."""

import os
import pathlib

from fliqs_jax.sweep import collect
from fliqs_jax.sweep import sweep_file


def workdirs(sweep: sweep_file.Sweep, out: str | os.PathLike[str]) -> None:
  """Checks that `out` holds no other runs of these names.

  Raises:
    ValueError: a run there is of another config, or damaged.
  """
  for run in sweep.runs:
    seen = collect.look(run, pathlib.Path(out, run.name))
    if seen['state'] in ('of another config', 'damaged'):
      raise ValueError(
        f'--out={out}: the run {run.name} there is {seen["state"]}: '
        f'{seen["detail"]}; choose another directory, or delete this run'
      )
