r"""Write a finished run's model in real low-bit form; check such an export.

python -m fliqs_jax.export WORKDIR --out=DIR [--target=native] [--examples=8]
python -m fliqs_jax.export --verify DIR

The found architecture (or that of `--arch`, or a uniform `--format`), settled
as `evaluate` does it. `artifact` lists the files of DIR; `serving.load(DIR)`
serves them. `--target=native` refuses formats that no stock type holds.
"""

import argparse
from collections.abc import Mapping, Sequence
import json
import os
import platform
import sys
from typing import Any

import jax
import numpy as np

from fliqs_jax import artifact
from fliqs_jax import data
from fliqs_jax import evaluate
from fliqs_jax import packing
from fliqs_jax import parallel
from fliqs_jax import qwix_rules
from fliqs_jax import results
from fliqs_jax import serving
from fliqs_jax import slicing
from fliqs_jax import stablehlo
from fliqs_jax import stored

TARGETS = ('packed', 'native')

# Other hardware adds floats in another order, and a value at the edge of two
# steps may then fall to the other one; relative to the largest output.
_TOLERANCE = 0.05


def export(
  workdir: str | os.PathLike[str],
  out: str | os.PathLike[str],
  *,
  arch: str = '',
  numeric_format: str = '',
  target: str = 'packed',
  examples: int = 8,
) -> dict[str, Any]:
  """Writes the model of a finished run to a directory.

  Args:
    workdir: of a run that reached its last step.
    out: a directory that is empty or does not exist.
    arch: path of an arch.json, in place of the found architecture.
    numeric_format: a uniform format, likewise.
    target: `packed` takes every format; `native` only those whose grid a type
      of ml_dtypes holds.
    examples: test examples to store with the outputs that they must give.

  Returns:
    The manifest.

  Raises:
    ValueError: an unfinished run, an architecture that its space lacks, a
      directory in use, or a format that the target lacks.
  """
  if target not in TARGETS:
    raise ValueError(f'target={target!r} is unknown; allowed: packed, native')
  if examples < 1:
    raise ValueError(f'examples={examples} must be at least 1')
  artifact.check_free(out)
  run = evaluate.restore(str(workdir))
  choices = evaluate.choose(run, arch, numeric_format)
  space = run.experiment.space
  if space.sizes(choices) and not space.is_fixed:  # Not what is dead.
    run = slicing.sliced(run, choices, arch)
    choices = run.found
  experiment = run.experiment
  assignment = experiment.space.assignment(choices)
  _check_target(target, assignment)
  variables = dict(
    params=run.state.served_params,
    arch=experiment.space.expand(choices),
    **evaluate.settled_statistics(
      experiment, run.state, choices, parallel.one_device()
    ),
  )
  batch = data.model_inputs(next(iter(experiment.streams.test())))
  inputs = jax.tree.map(lambda x: np.asarray(x)[:examples], batch)
  apply = experiment.model.apply
  tell = stored.teller(apply, train=False)
  tensors, layers = stored.tensors(tell, variables, assignment, inputs)
  outputs = jax.jit(lambda v, x: apply(v, x, train=False))(variables, inputs)
  specs = data.model_inputs(experiment.streams.inputs)
  manifest = dict(
    versions=results.versions(),
    machine=f'{platform.machine()} {jax.default_backend()}',
    task=experiment.config.task,
    target=target,
    model=json.loads(json.dumps(experiment.config.model.to_dict())),
    num_classes=experiment.streams.num_classes,
    arch=results.arch(experiment, choices),
    batch_norm='kept',
  )
  return _write(out, manifest, layers, tensors, specs, inputs, outputs)


def _write(out, manifest, layers, tensors, specs, inputs, outputs):
  model = serving.build(manifest, layers)
  served = serving.Served(model, serving.variables(tensors, layers), manifest)(
    inputs
  )
  rules, missing = qwix_rules.rules(layers)
  others = {
    artifact.REFERENCE: artifact.packed_file(
      _named('inputs', inputs) | dict(outputs=np.asarray(outputs))
    ),
    'model.stablehlo': stablehlo.serialize(model, layers, tensors, specs),
    'qwix.json': json.dumps(rules, indent=2).encode() + b'\n',
  }
  manifest |= dict(
    reference=_difference(served, outputs),
    qwix_cannot_express=missing,
  )
  return artifact.write(out, manifest, layers, tensors, others)


def verify(directory: str | os.PathLike[str]) -> dict[str, Any]:
  """Checks an export: files, tensors, layers, and the outputs they give.

  Returns:
    How the served outputs differ from the stored ones of the search:
    `bit_equal`, `max_difference`, `largest_output`.

  Raises:
    ValueError: the first thing that is not as the manifest has it.
  """
  served = serving.load(directory)
  reference = artifact.read_tensors(
    directory, served.manifest, artifact.REFERENCE
  )
  outputs = reference.pop('outputs')
  inputs = {k.removeprefix('inputs/'): v for k, v in reference.items()}
  inputs = inputs.get('inputs', inputs)
  found = _difference(served(inputs), outputs)
  if not found['max_difference'] <= _TOLERANCE * found['largest_output']:
    raise ValueError(
      f'{directory}: the outputs differ from the reference outputs by '
      f'{found["max_difference"]:.3g} (largest output '
      f'{found["largest_output"]:.3g}); exported with '
      f'{served.manifest["versions"]} on {served.manifest["machine"]}'
    )
  return found


def _named(name: str, inputs: Any) -> dict[str, np.ndarray]:
  if isinstance(inputs, Mapping):
    return {f'{name}/{key}': np.asarray(x) for key, x in inputs.items()}
  return {name: np.asarray(inputs)}


def _difference(served: Any, outputs: Any) -> dict[str, Any]:
  served, outputs = np.asarray(served), np.asarray(outputs)
  return dict(
    examples=len(outputs),
    bit_equal=bool((served == outputs).all()),
    max_difference=float(np.abs(served - outputs).max()),
    largest_output=float(np.abs(outputs).max()),
  )


def _check_target(target: str, assignment: stored.Assignment) -> None:
  if target == 'packed':
    return
  for path, (weights, _) in assignment.items():
    numeric_format = weights and packing.formats.parse(weights)
    if numeric_format and packing.layout(numeric_format).native is None:
      raise ValueError(
        f'--target=native: no native type holds {weights}, the weights of '
        f'{path}; the nearest format that has one is '
        f'{packing.nearest_native(numeric_format)} (search among such formats, '
        'or use --target=packed)'
      )


def main(argv: Sequence[str]) -> int:
  """Exports or verifies; a mistake of the user's ends in one line, status 2."""
  parser = argparse.ArgumentParser(prog='python -m fliqs_jax.export')
  parser.add_argument('workdir', nargs='?')
  parser.add_argument('--out')
  parser.add_argument('--arch', default='')
  parser.add_argument('--format', default='')
  parser.add_argument('--target', default='packed', choices=TARGETS)
  parser.add_argument('--examples', type=int, default=8)
  parser.add_argument('--verify', metavar='DIR')
  args = parser.parse_args(argv)
  if args.verify is None and not (args.workdir and args.out):
    parser.error('give WORKDIR and --out=DIR, or --verify DIR')
  try:
    if args.verify is not None:
      print(json.dumps(verify(args.verify)))
      return 0
    manifest = export(
      args.workdir,
      args.out,
      arch=args.arch,
      numeric_format=args.format,
      target=args.target,
      examples=args.examples,
    )
  except ValueError as error:
    print(' '.join(str(error).split()), file=sys.stderr)
    return 2
  print(json.dumps({k: manifest[k] for k in ('bytes', 'reference')}))
  for line in manifest['qwix_cannot_express']:
    print(f'qwix.json cannot express {line}', file=sys.stderr)
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
