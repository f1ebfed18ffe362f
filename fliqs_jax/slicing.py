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
import numpy as np

from fliqs_jax import artifact
from fliqs_jax import checkpoint
from fliqs_jax import evaluate
from fliqs_jax import experiment as experiment_lib
from fliqs_jax import files
from fliqs_jax import loop
from fliqs_jax import results
from fliqs_jax import train


def sliced(
  run: evaluate.Finished, choices: Mapping[str, Any], arch: str
) -> evaluate.Finished:
  """Returns the run of one architecture, as if it had trained by itself.

  Args:
    run: a finished run.
    choices: {decision: [K] one-hot}.
    arch: path that the new config names as its arch.json.

  Returns:
    The run with nothing open and every array cut to the shape that the network
    has: of channels the first, of a masked kernel the centre, of branches the
    chosen one. Step, key and the optimizer's moments stay.
  """
  config = run.experiment.config.copy_and_resolve_references()
  with config.unlocked(), config.ignore_type():
    config.quant.update(arch=arch, exclude=(), menus=(), groups=())
    config.sizes.update(widths=(), kernels=())
    # The yardstick of a relative target would be the found network itself.
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
  return evaluate.Finished(experiment, state, experiment.space.only())


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
  source, target = pathlib.Path(workdir), artifact.check_free(out)
  run = evaluate.restore(workdir)
  arch = target / 'arch.json'
  found = sliced(run, run.found, str(arch))
  target.mkdir(parents=True, exist_ok=True)
  files.write_json(arch, results.arch(run.experiment, run.found))
  shutil.copy(source / 'history.jsonl', target / 'history.jsonl')
  with checkpoint.Checkpoints(target / 'checkpoints') as checkpoints:
    loop.save(checkpoints, found.state)
    checkpoints.wait()
  return train.train_and_evaluate(found.experiment.config, target)['found']


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
