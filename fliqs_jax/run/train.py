"""Complete run: trains and searches, evaluates, and writes the results."""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import json
import logging
import os
import pathlib
import time
from typing import Any

import jax
import ml_collections

from fliqs_jax.report import number_text
from fliqs_jax.run import evaluation
from fliqs_jax.run import experiment as experiment_lib
from fliqs_jax.run import loop
from fliqs_jax.run.configs import config as config_lib
from fliqs_jax.run.records import costs
from fliqs_jax.run.records import results
from fliqs_jax.runtime import devices as devices_lib
from fliqs_jax.runtime import files
from fliqs_jax.runtime import monitoring
from fliqs_jax.runtime import processes
from fliqs_jax.runtime import restoring
from fliqs_jax.runtime import workdir as workdir_lib

_LOG = logging.getLogger(__name__)


def train_and_evaluate(
  config: ml_collections.ConfigDict,
  workdir: str | os.PathLike[str],
  *,
  stop: Callable[[], bool] = lambda: False,
  profile_steps: str = '',
  retrain: bool = False,
) -> dict[str, Any]:
  """Trains and searches, or continues a run that was stopped.

  The run uses all devices of all processes that `processes.join` connected;
  each process must call this function.

  Afterwards `workdir` holds config.json, arch.json, result.json, history.jsonl,
  TensorBoard files, checkpoints, heartbeats, report.html and its figures; and
  pictures.npz, if the network makes pictures.

  Args:
    config: config from a file in `configs/`.
    workdir: path of a new or empty directory, or of the workdir of an earlier
      start of the same run; the same for all processes.
    stop: `() -> bool`, called after each step; True: save and stop. It must
      return the same value in all processes.
    profile_steps: `N:M`, the steps to profile into `workdir/profile`; empty:
      none.
    retrain: whether the selected network is also trained from the beginning,
      with the same seed, in `workdir/retrained`; what it gains is what serving
      the search's own weights costs (A.11).

  Returns:
    The content of result.json.

  Raises:
    ValueError: the config cannot work, or trains no weights that `retrain`
      could; the processes have different configs; or the workdir belongs to
      another run or is in use.
    DivergedError: training diverged; the last good checkpoint remains.
    PreemptedError: `stop` returned True; the state is saved.
  """
  began = time.monotonic()
  path = pathlib.Path(workdir)
  if retrain and config.train.frozen:
    raise ValueError(
      '--retrain trains the selected network from the beginning, but no '
      'weights train in fliqs_jax.ptq or with train.frozen=True: leave it out, '
      'or train with fliqs_jax.main --config=FILE:arch=WORKDIR/arch.json'
    )
  _check_same(config, path)
  with contextlib.ExitStack() as until_the_end:
    with processes.together():
      experiment = experiment_lib.build(
        config,
        process_index=processes.index(),
        process_count=processes.count(),
      )
      devices = devices_lib.all_devices(config, experiment.controller.samples)
      trace = monitoring.Trace(
        profile_steps, config.train.steps, path / workdir_lib.PROFILE
      )
      if processes.index() == 0:
        until_the_end.enter_context(_claimed(experiment, path))
    _describe(experiment)
    run = loop.run(experiment, devices, path, stop, trace, began)
    search_state = jax.device_get(run.state.search_state)
    policy = search_state.policy
    choices = experiment.selected(policy)
    with processes.together():
      if processes.index() == 0:
        arch = results.arch(experiment, choices)
        files.write_json(path / workdir_lib.ARCH, arch)
    # Before other networks train, which may take as long again.
    served = evaluation.served(experiment, run.state, choices, devices)
    evaluated = experiment, run.state, choices, served.statistics, devices
    found = evaluation.test_metrics(*evaluated)
    _log_found(experiment.task.METRIC, found)
    if len(experiment.streams.label.shape) == 3:
      shown = results.packed(evaluation.pictures(*evaluated))
      if processes.index() == 0:
        files.write_bytes(path / workdir_lib.PICTURES, shown)
    references = {
      name: _reference(config, name, path, stop) for name in config.references
    }
    retrained = _retrained(config, path, stop) if retrain else None
    result = dict(
      metric=experiment.task.METRIC,
      found=found,
      references=references,
      retrained=retrained,
      costs=costs.costs(experiment, choices),
      layers=results.layers(experiment, choices),
      decisions=results.decisions(experiment, policy),
      warnings=results.warnings(experiment, policy),
      steps=config.train.steps,
      seed=config.seed,
      step_seconds=run.effort.step_seconds,
      compilations=run.effort.compilations,
      compile_seconds=run.effort.compile_seconds,
      step_bytes=run.effort.step_bytes,
      wall_seconds=run.effort.since(began),
      **results.relaxed(search_state),
      **results.scored(experiment, search_state),
    )
    if processes.index() == 0:
      # It needs matplotlib, which takes long to import: not before a config is
      # checked, and not in other processes.
      from fliqs_jax.report import report

      _LOG.info('report: %s', report.write_report(path, result))
      files.write_json(path / workdir_lib.RESULT, result)
  _summarize(result)
  return result


def _check_same(config: ml_collections.ConfigDict, workdir) -> None:
  """Raises ValueError unless all processes were started for the same run."""
  own = json.dumps(dict(config=config.to_dict(), workdir=str(workdir)))
  first, *others = map(json.loads, processes.texts(own))
  for i, other in enumerate(others, 1):
    if lines := config_lib.differences(first, other):
      raise ValueError(
        f'process {i} was started with another config than process 0: '
        f'{"; ".join(lines)}; start all with the same flags and files'
      )


@contextlib.contextmanager
def _claimed(
  experiment: experiment_lib.Experiment, workdir: pathlib.Path
) -> Iterator[None]:
  """Holds the workdir, which must be of the same config, and writes it."""
  content = json.loads(json.dumps(experiment.config.to_dict()))
  try:
    workdir.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise ValueError(
      f'--workdir={workdir} cannot be used: {error}; choose a directory that '
      'can be written'
    ) from None
  with workdir_lib.held(workdir):
    saved = restoring.newest_extra(workdir / workdir_lib.CHECKPOINTS)
    config_lib.check_binding(experiment.binding, saved or {}, str(workdir))
    if config_lib.claimed(workdir, content) != content:
      files.write_json(workdir / workdir_lib.CONFIG, content)
    yield


def _reference(
  config, name: str, workdir: pathlib.Path, stop: Callable[[], bool]
) -> dict[str, Any]:
  """Trains the published network with one format everywhere."""
  _LOG.info('reference: uniform %s', name)
  folder = workdir / workdir_lib.reference(name)
  return _trained_fixed(config, folder, stop, formats=name)


def _retrained(
  config, workdir: pathlib.Path, stop: Callable[[], bool]
) -> dict[str, Any]:
  """Trains the network that arch.json describes from the beginning."""
  _LOG.info('from the beginning: the selected network')
  return _trained_fixed(
    config,
    workdir / workdir_lib.RETRAINED,
    stop,
    arch=str(workdir / workdir_lib.ARCH),
    exclude=(),  # The arch.json names these layers, too.
  )


def _trained_fixed(
  config, workdir: pathlib.Path, stop: Callable[[], bool], **quant: Any
) -> dict[str, Any]:
  """Trains a network with nothing open; `quant` are keys of that section."""
  fixed = config.copy_and_resolve_references()
  with fixed.unlocked(), fixed.ignore_type():
    fixed.quant.update(menus=(), groups=(), **quant)
    fixed.sizes.update(widths=(), kernels=())
    fixed.references = ()
  return train_and_evaluate(fixed, workdir, stop=stop)['found']


def _describe(experiment) -> None:
  space, config = experiment.space, experiment.config
  _LOG.info(
    '%s on %s: %d layers, %d parameters; %d decisions, 10^%.1f architectures; '
    'cost target %.4g %s',
    config.model.name,
    config.data.name,
    len(space.ops),
    space.params,
    len(space.decisions),
    space.size,
    experiment.target,
    experiment.cost.unit,
  )


def _log_found(metric: str, found: Mapping[str, Any]) -> None:
  _LOG.info(
    'test %s %s of %d examples at %.4g %s (target %.4g), %.2f bits a weight',
    metric,
    number_text.quality(found[metric], metric),
    found['examples'],
    found['cost'],
    found['unit'],
    found['cost_target'],
    found['average_bits'],
  )


def _summarize(result) -> None:
  found, metric = result['found'], result['metric']
  if retrained := result['retrained']:
    _LOG.info(
      'retrained from the beginning: test %s %s; served minus retrained '
      '%+.2f %s, loss %+.4f',
      metric,
      number_text.quality(retrained[metric], metric),
      number_text.scale(metric) * (found[metric] - retrained[metric]),
      number_text.points(metric),
      found['loss'] - retrained['loss'],
    )
  for warning in result['warnings']:
    _LOG.warning('%s', warning)
