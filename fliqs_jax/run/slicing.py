"""Slicing: cuts the selected network out of the searched one, as a new run."""

from collections.abc import Mapping
import pathlib
import shutil
from typing import Any

import jax
import numpy as np

from fliqs_jax.run import evaluation
from fliqs_jax.run import experiment as experiment_lib
from fliqs_jax.run import loop
from fliqs_jax.run import train
from fliqs_jax.run.records import results
from fliqs_jax.runtime import checkpoint
from fliqs_jax.runtime import files
from fliqs_jax.runtime import workdir as workdir_lib
from fliqs_jax.serving import export_files


def sliced(
  run: evaluation.RestoredRun, choices: Mapping[str, Any], arch_path: str
) -> evaluation.RestoredRun:
  """Returns the run of one architecture, as if it had been trained alone.

  Args:
    run: a finished run.
    choices: {decision: [K] one-hot}.
    arch_path: path of the arch.json that the new config names.

  Returns:
    A run without open decisions. Every array has the shape of the selected
    network: the first channels, the centre of a masked kernel, the selected one
    of several branches. Step, key and the optimizer's moments stay.
  """
  config = run.experiment.config.copy_and_resolve_references()
  with config.unlocked(), config.ignore_type():
    config.quant.update(arch=arch_path, exclude=(), menus=(), groups=())
    config.sizes.update(widths=(), kernels=())
    # A relative target would refer to the cost of the selected network.
    config.cost.update(target=run.experiment.target, relative_to='')
    config.references = ()
  content = results.arch(run.experiment, choices)
  experiment = experiment_lib.build(config, content)
  target = jax.eval_shape(experiment.initial_state)
  leaves = run.experiment.space.leaves(choices)

  def cut(tree, like):
    have = {_path(p): x for p, x in jax.tree_util.tree_leaves_with_path(tree)}
    return jax.tree_util.tree_map_with_path(
      lambda path, leaf: _cut(have, _path(path), leaf.shape, leaves), like
    )

  state = run.state.replace(
    params=cut(run.state.params, target.params),
    average=cut(run.state.average, target.average),
    opt_state=cut(run.state.opt_state, target.opt_state),
    model_state=cut(run.state.model_state, target.model_state),
    search_state=experiment.controller.init(experiment.space.zeros()),
  )
  return evaluation.RestoredRun(experiment, state, experiment.space.only())


def _path(keys: tuple[Any, ...]) -> tuple[str, ...]:
  return tuple(str(getattr(k, 'key', getattr(k, 'name', k))) for k in keys)


def _cut(
  have: Mapping[tuple[str, ...], Any],
  path: tuple[str, ...],
  shape: tuple[int, ...],
  leaves: Mapping[str, Any],
) -> jax.Array:
  """Returns the array at a path of the selected network's tree."""
  name = path[-1]
  if path not in have:  # A branch, whose name ends with the kernel's size.
    path = (*path[:-1], f'{name}{shape[0]}')
  x = have[path]
  if path[0] == 'quant_stats' and name == 'clip':
    return x[_chosen_format(leaves, '/'.join(path[1:-1]))]
  is_kernel = name == 'kernel' and x.ndim == 4
  index = []
  for axis, (size, active) in enumerate(zip(x.shape, shape, strict=True)):
    first = (size - active) // 2 if is_kernel and axis < 2 else 0
    index.append(slice(first, first + active))
  return x[tuple(index)]


def _chosen_format(leaves: Mapping[str, Any], layer: str) -> slice:
  """Returns the selected entry of the activations' menu, as a slice."""
  for leaf in ('format', 'activations'):
    one_hot = leaves.get(f'{layer}/{leaf}' if layer else leaf)
    if one_hot is not None:
      chosen = int(np.argmax(one_hot))
      return slice(chosen, chosen + 1)
  raise AssertionError(f'{layer} has clips but no format of its activations')


def slice_run(workdir: str, out: str) -> dict[str, Any]:
  """Writes the run of the selected network; returns its test metrics.

  Args:
    workdir: path of the workdir of a finished run.
    out: path of a directory that is empty or does not exist.

  Raises:
    ValueError: the run is unfinished, or the directory is not empty.
  """
  source, target = pathlib.Path(workdir), export_files.check_free(out)
  run = evaluation.restore(workdir)
  arch_path = target / workdir_lib.ARCH
  new = sliced(run, run.choices, str(arch_path))
  target.mkdir(parents=True, exist_ok=True)
  files.write_json(arch_path, results.arch(run.experiment, run.choices))
  shutil.copy(source / workdir_lib.HISTORY, target / workdir_lib.HISTORY)
  with checkpoint.Checkpoints(target / workdir_lib.CHECKPOINTS) as checkpoints:
    loop.save(checkpoints, new.experiment, new.state)
    checkpoints.wait()
  return train.train_and_evaluate(new.experiment.config, target)['found']
