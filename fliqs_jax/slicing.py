r"""Make the found network out of the searched one: what is dead is cut away.

python -m fliqs_jax.slicing WORKDIR --out=DIR

Reads a finished run and writes the run of the network that it found: channels
that are not live and kernels that were not chosen are gone from parameters,
statistics and compute. DIR is a workdir as any other, for `evaluate` and
`report`; its arch.json builds the same network from nothing. Prints one JSON
object: the test metrics of the sliced network.
"""

import argparse
from collections.abc import Mapping, Sequence
import json
import pathlib
import shutil
import sys
from typing import Any

import jax
import ml_collections
import numpy as np

from fliqs_jax import checkpoint
from fliqs_jax import evaluate
from fliqs_jax import experiment as experiment_lib
from fliqs_jax import files
from fliqs_jax import results
from fliqs_jax import train
from fliqs_jax import train_state


def sliced_config(
  searched: experiment_lib.Experiment, arch: str
) -> ml_collections.ConfigDict:
  """Returns the config of a run whose every decision an arch.json has made."""
  fixed = searched.config.copy_and_resolve_references()
  with fixed.unlocked(), fixed.ignore_type():
    fixed.quant.update(arch=arch, exclude=(), menus=(), groups=())
    fixed.sizes.update(widths=(), kernels=())
    # The yardstick of a relative target would be the found network itself.
    fixed.cost.update(target=searched.target, relative_to='')
    fixed.references = ()
  return fixed


def sliced_state(
  searched: experiment_lib.Experiment,
  state: train_state.TrainState,
  choices: Mapping[str, Any],
  found: experiment_lib.Experiment,
) -> train_state.TrainState:
  """Returns the state of the found network, as if it had trained by itself.

  Args:
    searched: the run that `state` is of.
    state: its state.
    choices: {decision: [K] one-hot}, which `found` is fixed to.
    found: the experiment of `sliced_config`.

  Returns:
    Every array cut to the shape that the found network has: of channels the
    first, of a masked kernel the centre, of branches the chosen one. Step, key
    and the optimizer's moments stay; there is nothing left to search.
  """
  target = jax.eval_shape(found.initial_state)
  leaves = searched.space.leaves(choices)

  def cut(tree, like):
    have = {_path(p): x for p, x in jax.tree_util.tree_leaves_with_path(tree)}
    return jax.tree_util.tree_map_with_path(
      lambda path, leaf: _cut(have, _path(path), leaf.shape, leaves), like
    )

  return state.replace(
    params=cut(state.params, target.params),
    average=cut(state.average, target.average),
    opt_state=cut(state.opt_state, target.opt_state),
    model_state=cut(state.model_state, target.model_state),
    search_state=jax.jit(found.initial_state)().search_state,
  )


def _path(keys: tuple[Any, ...]) -> tuple[str, ...]:
  return tuple(str(getattr(k, 'key', getattr(k, 'name', k))) for k in keys)


def _cut(
  have: Mapping[tuple[str, ...], Any],
  path: tuple[str, ...],
  shape: tuple[int, ...],
  leaves: Mapping[str, Any],
) -> jax.Array:
  """Returns what belongs at a path of the found network's tree."""
  name = path[-1]
  if path not in have:  # A branch; alone it has a plain kernel's name.
    path = (*path[:-1], f'{name}{shape[0]}')
  x = have[path]
  if path[0] == 'quant_stats' and name == 'clip':
    return x[_chosen_format(leaves, '/'.join(path[1:-1]))]
  is_kernel = name == 'kernel' and x.ndim == 4
  index = []
  for axis, (size, live) in enumerate(zip(x.shape, shape, strict=True)):
    first = (size - live) // 2 if is_kernel and axis < 2 else 0
    index.append(slice(first, first + live))
  return x[tuple(index)]


def _chosen_format(leaves: Mapping[str, Any], layer: str) -> slice:
  """Returns the entry of the activations' menu that was chosen."""
  for leaf in ('format', 'activations'):
    one_hot = leaves.get(f'{layer}/{leaf}' if layer else leaf)
    if one_hot is not None:
      chosen = int(np.argmax(one_hot))
      return slice(chosen, chosen + 1)
  raise AssertionError(f'{layer} has clips but no format of its activations')


def slice_run(workdir: str, out: str) -> dict[str, Any]:
  """Writes the run of the found network; returns its test metrics.

  Args:
    workdir: of a finished run.
    out: a new directory.

  Raises:
    ValueError: an unfinished run, or a directory that is not empty.
  """
  source, target = pathlib.Path(workdir), pathlib.Path(out)
  if target.exists() and any(target.iterdir()):
    raise ValueError(f'--out={out} is not empty; choose a new directory')
  searched, state, choices = evaluate.restore(workdir)
  target.mkdir(parents=True, exist_ok=True)
  arch = target / 'arch.json'
  files.write_json(arch, results.arch(searched, choices))
  config = sliced_config(searched, str(arch))
  found = experiment_lib.build(config)
  state = sliced_state(searched, state, choices, found)
  shutil.copy(source / 'history.jsonl', target / 'history.jsonl')
  with checkpoint.Checkpoints(target / 'checkpoints') as checkpoints:
    checkpoints.save(int(state.step), state, dict(seconds=0.0))
    checkpoints.wait()
  return train.train_and_evaluate(config, target)['found']


def main(argv: Sequence[str]) -> int:
  """Prints the metrics; a mistake of the user's ends in one line, status 2."""
  parser = argparse.ArgumentParser(prog='python -m fliqs_jax.slicing')
  parser.add_argument('workdir')
  parser.add_argument('--out', required=True)
  args = parser.parse_args(argv)
  try:
    print(json.dumps(slice_run(args.workdir, args.out)))
  except ValueError as error:
    print(error, file=sys.stderr)
    return 2
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
