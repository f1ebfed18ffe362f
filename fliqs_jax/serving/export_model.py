"""Export of a model: writes it with reference outputs, and verifies an export.

  fliqs.export_model(searchable, variables, choices, images, out=DIR)
  served = serving.load(DIR, model=MyModule())

`export_files` lists the files; `loader` builds the served model from them.
"""

from collections.abc import Mapping
import json
import os
import platform
from typing import Any

from flax import core
from flax import traverse_util
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fliqs_jax.intercept import searchable as searchable_lib
from fliqs_jax.runtime import versions
from fliqs_jax.serving import export_files
from fliqs_jax.serving import loader
from fliqs_jax.serving import qwix_rules
from fliqs_jax.serving import stablehlo
from fliqs_jax.serving import stored_layers
from fliqs_jax.space import discovery

# Largest difference of an output, relative to the largest output. Other
# hardware adds floats in another order, which may round a value that lies
# between two grid points to the other one.
_TOLERANCE = 0.05


def export_model(
  model: searchable_lib.Searchable,
  variables: Mapping[str, Any],
  choices: Mapping[str, Any],
  /,
  *args: Any,
  out: str | os.PathLike[str],
  **kwargs: Any,
) -> dict[str, Any]:
  """Writes a searched model with packed low-bit weights.

  Weights and scales are those that the layers multiply in the search's
  evaluation (Eq. 10, 11).

  Args:
    model: a model that `searchable` made.
    variables: `params`, `quant_stats` and the other collections after training,
      without `arch`, which `choices` gives.
    choices: {decision: [K]}; the largest entry selects the option.
    *args: example inputs, arrays [N, ...] or pytrees of them; they are stored
      with the outputs of the search's evaluation.
    out: path of a directory that is empty or does not exist.
    **kwargs: keyword arguments of the model's call, static.

  Returns:
    The manifest, plain JSON values, as in `manifest.json`.

  Raises:
    ValueError: the directory is not empty; the model cannot be called with
      these arguments, or a manifest cannot hold them; the choices are those of
      another model; activations were never quantized in training; or a layer
      cannot be served in its stored format: there is no fallback to float.
  """
  export_files.check_free(out)
  if not isinstance(model, searchable_lib.Searchable):
    raise ValueError(
      f'{type(model).__name__} was not made by searchable; pass the model that '
      'searchable returned'
    )
  call = _checked_call(kwargs)
  # JAX turns 64 bits into 32; the stored inputs must equal what the model gets.
  args = jax.tree.map(lambda x: np.asarray(jnp.asarray(x)), args)
  space = discovery.find(model, *args, **call)
  _check_choices(space, choices)
  assignment = space.assignment(choices)
  variables = {
    **_plain(variables),
    'arch': space.expand(space.choices(assignment)),
  }
  tensors, layers = stored_layers.tensors(
    stored_layers.operand_recorder(model.apply, **call),
    variables,
    assignment,
    *args,
  )
  outputs = jax.jit(lambda v, *args: model.apply(v, *args, **call))(
    variables, *args
  )
  module = type(model.model)
  manifest = dict(
    module=f'{module.__module__}.{module.__qualname__}',
    call=call,
    parameters=loader.parameters(model.model, args, call),
    arch=dict(
      layers={
        path: dict(weights=weights, activations=activations)
        for path, (weights, activations) in assignment.items()
      }
    ),
  )
  return write(out, manifest, layers, tensors, args, outputs, model.model)


def write(
  out: str | os.PathLike[str],
  manifest: Mapping[str, Any],
  layers: Mapping[str, stored_layers.Layer],
  tensors: Mapping[str, np.ndarray],
  args: tuple,
  outputs: Any,
  model: nn.Module | None = None,
) -> dict[str, Any]:
  """Writes an export, after comparing the served model with the search's.

  Args:
    out: path of a directory that is empty or does not exist.
    manifest: entries that describe how the model is built and, in `call`, the
      keyword arguments of its call.
    layers: {layer path: description of the stored layer}.
    tensors: {name: tensor} of the served model.
    args: example inputs.
    outputs: outputs of the search's evaluation for the example inputs.
    model: the module; None if the manifest describes how to build it.

  Returns:
    The manifest as written.

  Raises:
    ValueError: the served model's outputs differ from `outputs`, or the export
      cannot be written.
  """
  served = loader.build(manifest, layers, model)
  variables = loader.variables(served, tensors, layers)
  expected = loader.named('outputs', outputs)
  given = loader.Served(served, variables, manifest)(*args)
  difference = _difference(args, loader.named('outputs', given), expected)
  if not _is_close(difference):
    raise ValueError(
      f'{difference["output"]} of the served model differs from the search by '
      f'up to {difference["max_difference"]}, with a largest output of '
      f'{difference["largest_output"]}: perhaps the model reads the weights of '
      'a layer without calling it; add such a layer to quant.exclude'
    )
  program, is_open = stablehlo.serialize(
    loader.program(served, layers, manifest['call']), tensors, args
  )
  rules, missing = qwix_rules.rules(layers)
  references = loader.named('inputs', args) | expected
  others = {
    export_files.REFERENCE: export_files.packed_file(
      {name: np.asarray(x) for name, x in references.items()}
    ),
    stablehlo.NAME: program,
    'qwix.json': json.dumps(rules, indent=2).encode() + b'\n',
  }
  manifest = dict(
    versions=versions.versions(),
    machine=f'{platform.machine()} {jax.default_backend()}',
    **manifest,
    reference=difference,
    program=dict(batch='any' if is_open else difference['examples']),
    qwix_cannot_express=missing,
  )
  return export_files.write(out, manifest, layers, tensors, others)


def verify(
  directory: str | os.PathLike[str], model: nn.Module | None = None
) -> dict[str, Any]:
  """Checks an export: its files, tensors, layers, and the model's outputs.

  Args:
    directory: path of the export.
    model: the module that `searchable` got, if the export was made by
      `export_model`. Without it, the export's StableHLO program computes the
      outputs.

  Returns:
    The difference between the outputs and the search's stored outputs:
    `bit_equal`, `max_difference`, `largest_output`; and `through`: what
    computed the outputs, `serving.load` or the program's file.

  Raises:
    ValueError: something differs from the manifest; the message names the
      first such thing.
  """
  content = export_files.read(directory)
  manifest = content.manifest
  args, expected = loader.reference(directory, manifest)
  if 'module' in manifest and model is None:
    through = stablehlo.NAME
    program = stablehlo.deserialize(
      export_files.read_file(directory, manifest, stablehlo.NAME)
    )
    outputs = program.call(content.tensors, *args)
  else:
    through = 'serving.load'
    outputs = loader.load(directory, model=model)(*args)
  difference = _difference(args, loader.named('outputs', outputs), expected)
  if not _is_close(difference):
    raise ValueError(
      f'{directory}: the outputs differ from the reference outputs by '
      f'{difference["max_difference"]:.3g} (largest output '
      f'{difference["largest_output"]:.3g}); exported with '
      f'{manifest["versions"]} on {manifest["machine"]}'
    )
  return difference | dict(through=through)


def _checked_call(kwargs: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the keyword arguments of a call, which a manifest must hold."""
  for name, value in kwargs.items():
    if name in ('mutable', 'rngs', 'capture_intermediates'):
      raise ValueError(
        f'{name}={value!r}: a served model changes no variables and draws no '
        'random numbers; give the keyword arguments of an evaluation'
      )
    try:
      kept = json.loads(json.dumps(value))
    except (TypeError, ValueError):
      kept = None
    if kept != value or type(kept) is not type(value):
      raise ValueError(
        f'{name}={value!r} cannot be stored in manifest.json, from which the '
        'served model takes its keyword arguments: give arrays as positional '
        'example inputs, and make other values fields of the module'
      )
  return dict(kwargs)


def _plain(variables: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the collections without boxes; every leaf must be an array."""
  variables = core.unfreeze(nn.meta.unbox(variables))
  for path, value in traverse_util.flatten_dict(variables, sep='/').items():
    if not hasattr(value, 'dtype') and not path.startswith('cost/'):
      raise ValueError(
        f'variables: {path} is a {type(value).__name__}; it must be an array'
      )
  return variables


def _check_choices(space, choices) -> None:
  known, given = {d.name for d in space.decisions}, set(choices)
  if known != given:
    raise ValueError(
      'choices: missing are '
      f'{", ".join(sorted(known - given)) or "none"}; surplus are '
      f'{", ".join(sorted(given - known)) or "none"}'
    )


def _difference(args, served, expected) -> dict[str, Any]:
  """Returns the largest difference among several outputs, by name."""
  each = []
  for name, reference in expected.items():
    x, y = np.asarray(served[name]), np.asarray(reference)
    same = (x == y) | ((x != x) & (y != y))
    x, y = x.astype(np.float64), y.astype(np.float64)
    apart = np.abs(np.where(same, 0, x) - np.where(same, 0, y))
    largest = np.abs(y).max(initial=0, where=np.isfinite(y))
    each.append(
      dict(
        output=name,
        bit_equal=bool(same.all()),
        max_difference=float(apart.max(initial=0)),
        largest_output=float(largest),
      )
    )
  # NaN counts as the largest difference.
  worst = max(each, key=lambda one: np.nan_to_num(_share(one), nan=np.inf))
  first = jax.tree.leaves(args)[0]
  return worst | dict(
    examples=len(first) if np.ndim(first) else 1,
    bit_equal=all(one['bit_equal'] for one in each),
  )


def _share(difference):
  return difference['max_difference'] / max(difference['largest_output'], 1e-30)


def _is_close(difference) -> bool:
  return _share(difference) <= _TOLERANCE
