r"""Write a finished run's model in packed low-bit form, or check an export.

python -m fliqs_jax.export WORKDIR --out=DIR [--target=native] [--examples=8]
    [--onnx]
python -m fliqs_jax.export --verify DIR

The model has the architecture that the run selected, or that of `--arch`, or
one uniform `--format`; its statistics are settled as in `evaluate`.
`serving.export_files` lists the files of DIR, and `serving.load(DIR)` serves
them. `--target=native` refuses a format that no type of ml_dtypes holds;
`--onnx` writes `model.onnx`, too, for ONNX Runtime. `--verify` also takes an
export of `export_model`.
"""

import argparse
from collections.abc import Mapping, Sequence
import dataclasses
import json
import os
import sys
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fliqs_jax import data
from fliqs_jax import models
from fliqs_jax.numerics import packing
from fliqs_jax.program import searchable as searchable_lib
from fliqs_jax.run import evaluation
from fliqs_jax.run import experiment as experiment_lib
from fliqs_jax.run import slicing
from fliqs_jax.run.records import results
from fliqs_jax.runtime import commands
from fliqs_jax.runtime import devices as devices_lib
from fliqs_jax.serving import export_files
from fliqs_jax.serving import export_model as model_export
from fliqs_jax.serving import stored_products
from fliqs_jax.space import sizes as sizes_lib

TARGETS = ('packed', 'native')

# A user looks for these two names here.
export_model = model_export.export_model
verify = model_export.verify


def export(
  workdir: str | os.PathLike[str],
  out: str | os.PathLike[str],
  *,
  arch: str = '',
  numeric_format: str = '',
  target: str = 'packed',
  examples: int = 8,
  onnx: bool = False,
) -> dict[str, Any]:
  """Writes the model of a finished run to a directory.

  Args:
    workdir: directory of a run that reached its last step.
    out: directory to write, which is empty or does not exist.
    arch: path of an arch.json whose architecture replaces the run's own; '' for
      the run's own.
    numeric_format: name of one format for every layer, which replaces the run's
      architecture; '' for the run's own.
    target: `packed`, which takes every format, or `native`, which takes only
      formats whose grid a type of ml_dtypes holds.
    examples: number of test examples to store, with the outputs that the
      served model must give for them.
    onnx: whether to write `model.onnx`, too.

  Returns:
    The manifest, plain JSON values, as in `manifest.json`.

  Raises:
    ValueError: the run is not finished, its space lacks the architecture, the
      directory is not empty, the target lacks a format, or an option is
      unknown.
  """
  if target not in TARGETS:
    raise ValueError(f'target={target!r} is unknown; allowed: packed, native')
  if examples < 1:
    raise ValueError(f'examples={examples} must be at least 1')
  export_files.check_free(out)
  run = evaluation.restore(str(workdir))
  choices = evaluation.choose(run, arch, numeric_format)
  space = run.experiment.space
  if space.sizes(choices) and not space.is_fixed:  # Drop inactive channels.
    run = slicing.sliced(run, choices, arch)
    choices = run.choices
  experiment = run.experiment
  assignment = experiment.space.assignment(choices)
  _check_target(target, assignment)
  variables = dict(
    params=run.state.served_params,
    arch=experiment.space.expand(choices),
    **evaluation.served(
      experiment,
      run.state,
      choices,
      devices_lib.one_device(experiment.config),
    ).statistics,
  )
  batch = data.model_inputs(next(iter(experiment.streams.test())))
  inputs = jax.tree.map(lambda x: jnp.asarray(x)[:examples], batch)
  manifest = dict(
    task=experiment.config.task,
    target=target,
    model=json.loads(json.dumps(experiment.config.model.to_dict())),
    num_classes=experiment.streams.num_classes,
    arch=results.arch(experiment, choices),
  )
  return model_export.write(
    out,
    program(experiment, choices, inputs),
    variables,
    assignment,
    manifest,
    (inputs,),
    None,
    dict(train=False),
    onnx,
  )


def program(
  experiment: experiment_lib.Experiment,
  choices: Mapping[str, Any],
  inputs: Any,
) -> searchable_lib.Searchable:
  """Returns the run's network of stock layers, as a program.

  What the run's network has as stock layers, such as squeeze-and-excitation,
  stays as it is.

  Args:
    experiment: parts of the run.
    choices: {decision: [K]}.
    inputs: a batch of the model's inputs.
  """
  stock = models.construct(
    experiment.config.model,
    experiment.streams.num_classes,
    sizes=sizes_lib.Sizes(
      found=experiment.space.sizes(choices), is_served=True
    ),
    dtype=experiment.config.train.dtype,
    conv=nn.Conv,
    dense=nn.Dense,
  )
  spec = experiment.spec
  model = searchable_lib.searchable(stock, spec)
  layers = experiment.space.assignment(choices)
  _, parts = model.parts_of(inputs, train=False)
  others = [
    part.product.layer
    for part in parts
    if not part.reason and part.product.layer not in layers
  ]
  if others:
    spec = dataclasses.replace(spec, exclude=(*spec.exclude, *others))
    model = searchable_lib.searchable(stock, spec)
  return dataclasses.replace(model, fast_forms=True)


def _check_target(target: str, assignment: stored_products.Assignment) -> None:
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


@commands.reported
def main(argv: Sequence[str]) -> int:
  """Exports or verifies; a user's mistake gives one line and status 2."""
  parser = argparse.ArgumentParser(prog='python -m fliqs_jax.export')
  parser.add_argument('workdir', nargs='?')
  parser.add_argument('--out')
  parser.add_argument('--arch', default='')
  parser.add_argument('--format', default='')
  parser.add_argument('--target', default='packed', choices=TARGETS)
  parser.add_argument('--examples', type=int, default=8)
  parser.add_argument('--onnx', action='store_true')
  parser.add_argument('--verify', metavar='DIR')
  args = parser.parse_args(argv)
  if args.verify is None and not (args.workdir and args.out):
    parser.error('give WORKDIR and --out=DIR, or --verify DIR')
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
    onnx=args.onnx,
  )
  print(json.dumps({k: manifest[k] for k in ('bytes', 'reference')}))
  for line in manifest['qwix_cannot_express']:
    print(f'qwix.json cannot express {line}', file=sys.stderr)
  return 0


if __name__ == '__main__':
  commands.run(main)
