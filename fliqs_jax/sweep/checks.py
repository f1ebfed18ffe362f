"""Checks of the runs of a sweep before the first of them starts."""

import json
import os
import pathlib

import ml_collections

from fliqs_jax.run import budgets
from fliqs_jax.run import experiment as experiment_lib
from fliqs_jax.sweep import collect
from fliqs_jax.sweep import sweep_file


def configs(sweep: sweep_file.Sweep) -> None:
  """Checks the config of every run, but for what needs data or devices.

  A config that names a file of another machine is left to that machine.

  Raises:
    ValueError: a config cannot work; the message names run, key and value.
  """
  built: dict[str, experiment_lib.Experiment] = {}
  for run in sweep.runs:
    config = sweep_file.load(run)
    if _names_absent(config):
      continue
    # Seeds and targets share a network: to trace each again takes minutes.
    content = config.to_dict()
    del content['seed'], content['cost']['target']
    network = json.dumps(content, sort_keys=True)
    try:
      if same := built.get(network):
        budgets.target(config.cost, same.cost, same.space, same.caps)
      else:
        built[network] = experiment_lib.build(config, read=False)
    except ValueError as error:
      where = f'run {run.name!r}: ' if run.name else ''
      raise ValueError(f'{where}{error}') from None


def _names_absent(config: ml_collections.ConfigDict) -> bool:
  """Returns whether a file is named that only another machine may have.

  A relative path is one of the checkout, which every machine gets.
  """
  costs = [config.cost.kind, *config.cost.reported]
  costs += [cap.rpartition('=')[0] for cap in config.cost.caps]
  paths = [config.quant.arch, *(cost.partition(':')[2] for cost in costs)]
  return any(
    (os.path.isabs(path) or '://' in path) and not os.path.exists(path)
    for path in map(os.path.expanduser, paths)
  )


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
