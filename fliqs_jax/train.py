"""One run from a config to a found, evaluated and reported model."""

import dataclasses
import itertools
import json
import logging
import math
import os
import pathlib
import time
from typing import Any

import jax
import ml_collections

from fliqs_jax import checkpoint
from fliqs_jax import config_lib
from fliqs_jax import data
from fliqs_jax import evaluate
from fliqs_jax import experiment as experiment_lib
from fliqs_jax import files
from fliqs_jax import metrics as metrics_lib
from fliqs_jax import policy as policy_lib
from fliqs_jax import profile
from fliqs_jax import report
from fliqs_jax import results
from fliqs_jax import train_state

_LOG = logging.getLogger(__name__)

_PROFILE_BATCHES = 10  # Table 10c: from 5 on, their number does not matter.


class DivergedError(RuntimeError):
  """The loss is not finite any more, or above `train.max_loss`."""


def train_and_evaluate(
  config: ml_collections.ConfigDict, workdir: str | os.PathLike[str]
) -> dict[str, Any]:
  """Trains and searches, or goes on where a killed run stopped.

  Leaves in `workdir`: config.json, arch.json, result.json, history.jsonl,
  TensorBoard files, checkpoints, report.html and its pictures.

  Args:
    config: as the files in `configs/` make it.
    workdir: empty, or that of an earlier start of the same run.

  Returns:
    The content of result.json.

  Raises:
    ValueError: the config cannot work, or the workdir is another run's.
    DivergedError: training diverged; the last good checkpoint stays.
  """
  began = time.monotonic()
  experiment = experiment_lib.build(config)
  workdir = _claim(config, pathlib.Path(workdir))
  _describe(experiment)
  with checkpoint.Checkpoints(
    workdir / 'checkpoints', keep=config.train.checkpoints_kept
  ) as checkpoints:
    run = _train(experiment, workdir, checkpoints, began)
  policy = run.state.search_state.policy
  choices = jax.device_get(policy_lib.argmax(policy))
  references = {
    name: _reference(config, name, workdir) for name in config.references
  }
  result = dict(
    metric=experiment.task.METRIC,
    found=evaluate.test_metrics(experiment, run.state, choices),
    references=references,
    layers=results.layers(experiment, choices),
    decisions=results.decisions(experiment, policy),
    warnings=results.warnings(experiment, policy),
    steps=config.train.steps,
    seed=config.seed,
    compilations=run.compilations,
    compile_seconds=run.compile_seconds,
    wall_seconds=run.seconds_before + time.monotonic() - began,
  )
  files.write_json(workdir / 'arch.json', results.arch(experiment, choices))
  files.write_json(workdir / 'result.json', result)
  _LOG.info('report: %s', report.write_report(str(workdir)))
  _summarize(result)
  return result


@dataclasses.dataclass
class _Run:
  """How far a run is, and what it took.

  Attributes:
    state: after the last step.
    seconds_before: wall time of earlier starts, up to the checkpoint.
    compilations: of the step, by this process.
    compile_seconds: what they took.
  """

  state: train_state.TrainState
  seconds_before: float
  compilations: int = 0
  compile_seconds: float = 0.0


def _claim(
  config: ml_collections.ConfigDict, workdir: pathlib.Path
) -> pathlib.Path:
  """Makes the workdir this config's, or finds that it is."""
  content = json.loads(json.dumps(config.to_dict()))
  path = workdir / 'config.json'
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    if not path.exists():
      files.write_json(path, content)
    claimed = json.loads(path.read_text())
  except (OSError, json.JSONDecodeError) as error:
    raise ValueError(
      f'--workdir={workdir} cannot be used: {error}; choose a directory that '
      'can be written'
    ) from None
  if found := config_lib.differences(claimed, content):
    raise ValueError(
      f'--workdir={workdir} belongs to a run of another config, which differs '
      f'in {"; ".join(found)}; choose another workdir or the same config'
    )
  return workdir


def _train(experiment, workdir, checkpoints, began) -> _Run:
  """Runs every step that is still to be run."""
  config, phases = experiment.config, experiment.phases
  initial_state = jax.jit(experiment.initial_state)
  restored = checkpoints.restore_latest(jax.eval_shape(initial_state))
  if restored is None:
    first, run = 0, _Run(initial_state(), 0.0)
  else:
    first, state, extra = restored
    run = _Run(state, extra['seconds'])
    _LOG.info('resumed at step %d', first)
  if first == phases.steps:
    return run
  streams = experiment.streams
  batches = zip(streams.train(first), streams.valid(first))
  batch = next(batches)
  step_fn = _compile(experiment, run, batch)
  batches = itertools.chain([batch], batches)
  logged_at, logged, accumulated = None, first, None
  with metrics_lib.Writer(workdir, first or None) as writer:
    for step, (train_batch, valid_batch) in zip(
      range(first, phases.steps), batches
    ):
      if step == phases.act_start and config.quant.act_clip == 'profiled':
        run.state = _profile(experiment, run.state)
      with jax.transfer_guard_device_to_host('disallow'):
        run.state, step_metrics = step_fn(run.state, train_batch, valid_batch)
        accumulated = metrics_lib.accumulate(accumulated, step_metrics)
      done = step + 1
      if done % config.train.log_every and done != phases.steps:
        continue
      scalars, accumulated = metrics_lib.compute(accumulated), None
      _check_progress(config, done, scalars, workdir)
      now = time.monotonic()
      timing = {}
      if logged_at is not None:
        timing = dict(steps_per_second=(done - logged) / (now - logged_at))
      logged_at, logged = now, done
      probabilities = jax.device_get(
        policy_lib.probabilities(run.state.search_state.policy)
      )
      writer.write(
        done,
        scalars,
        {name: [float(p) for p in pi] for name, pi in probabilities.items()},
        timing,
      )
      _LOG.info('%s', _progress_line(experiment, done, scalars, timing))
      if done % config.train.checkpoint_every == 0 or done == phases.steps:
        seconds = run.seconds_before + now - began
        checkpoints.save(done, run.state, dict(seconds=seconds))
  checkpoints.wait()
  return run


def _compile(experiment, run, batch):
  """Compiles the step ahead of time: it cannot compile again, only refuse."""
  step = experiment.search_step()
  began = time.monotonic()
  _LOG.info('compiling the step ...')
  compiled = jax.jit(step, donate_argnums=0).lower(run.state, *batch).compile()
  run.compilations += 1
  run.compile_seconds = time.monotonic() - began
  _LOG.info('compiled in %.1f s', run.compile_seconds)
  return compiled


def _profile(experiment, state):
  """Fills in each layer's clipping multiples from its own activations."""
  choices = policy_lib.argmax(state.search_state.policy)
  variables = {
    'params': state.params,
    'arch': experiment.space.expand(choices),
    **state.model_state,
  }
  batches = itertools.islice(
    experiment.streams.train(experiment.phases.act_start), _PROFILE_BATCHES
  )
  stats = profile.profiled_clips(
    experiment.model.apply,
    experiment.space,
    variables,
    map(data.model_inputs, batches),
  )
  return state.replace(model_state={**state.model_state, 'quant_stats': stats})


def _check_progress(config, step, scalars, workdir) -> None:
  for name in ('loss', 'grad_norm'):
    value = scalars[name]
    if not math.isfinite(value) or value > _limit(config, name):
      raise DivergedError(
        f'training diverged: mean {name} is {value} at step {step} (allowed: '
        f'finite, loss up to train.max_loss={config.train.max_loss}); the last '
        f'good checkpoint is in {workdir / "checkpoints"}. Lower '
        'optimizer.learning_rate or lengthen optimizer.warmup'
      )


def _limit(config, name: str) -> float:
  return config.train.max_loss if name == 'loss' else math.inf


def _reference(config, name: str, workdir: pathlib.Path) -> dict[str, Any]:
  """Trains the published network at one format, by the same code."""
  uniform = config.copy_and_resolve_references()
  with uniform.unlocked(), uniform.ignore_type():
    uniform.quant.formats = name
    uniform.quant.menus, uniform.quant.groups = (), ()
    uniform.sizes.widths, uniform.sizes.kernels = (), ()
    uniform.references = ()
  _LOG.info('reference: uniform %s', name)
  return train_and_evaluate(uniform, workdir / f'uniform_{name}')['found']


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


def _progress_line(experiment, step, scalars, timing) -> str:
  steps = experiment.phases.steps
  line = f'step {step}/{steps}  loss {scalars["loss"]:.3f}'
  if not experiment.space.is_fixed:
    cost = scalars['cost'] * experiment.target
    line += (
      f'  quality {scalars["quality"]:.3f}  cost {cost:.4g}/'
      f'{experiment.target:.4g} {experiment.cost.unit}'
      f'  entropy {scalars["entropy"]:.2f}'
    )
  if speed := timing.get('steps_per_second'):
    left = round((steps - step) / speed)
    line += f'  {speed:.1f} steps/s  {left // 60}:{left % 60:02d} left'
  return line


def _summarize(result) -> None:
  found = result['found']
  _LOG.info(
    'test %s %.2f %% of %d examples at %.4g %s (target %.4g), '
    '%.2f bits a weight',
    result['metric'],
    100 * found[result['metric']],
    found['examples'],
    found['cost'],
    found['unit'],
    found['cost_target'],
    found['average_bits'],
  )
  for warning in result['warnings']:
    _LOG.warning('%s', warning)
