"""Writes a served model with what it must give; checks such an export.

  fliqs.export_model(searchable, variables, choices, images, out=DIR)
  served = serving.load(DIR, model=MyModule())

`artifact` lists the files. How the served model is built again is `serving`'s.
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

# Other hardware adds floats in another order, and a value at the edge of two
# steps may then fall to the other one; relative to the largest output.
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
  """Writes a model that was made searchable in real low-bit form.

  Args:
    model: made by `searchable`.
    variables: `params` and the other collections of its training, `quant_stats`
      among them; not `arch`, which `choices` say.
    choices: {decision: [K]}; of each the largest entry counts.
    *args: example inputs, arrays [N, ...] or pytrees of them; stored with the
      outputs that they must give.
    out: a directory that is empty or does not exist.
    **kwargs: more of the call, static.

  Returns:
    The manifest.

  Raises:
    ValueError: a directory in use, a call that the model does not have or that
      a manifest cannot keep, choices that are not the model's, activations that
      never were quantized, or a model that cannot be served as it is stored.
  """
  export_files.check_free(out)
  if not isinstance(model, searchable_lib.Searchable):
    raise ValueError(
      f'{type(model).__name__} was not made by searchable; export that'
    )
  call = _kept(kwargs)
  # As JAX would take them: of 32 bits.
  args = jax.tree.map(lambda x: np.asarray(jnp.asarray(x)), args)
  space = discovery.find(model, *args, **call)
  _check_choices(space, choices)
  assignment = space.assignment(choices)
  variables = {
    **_plain(variables),
    'arch': space.expand(space.choices(assignment)),
  }
  tensors, layers = stored_layers.tensors(
    stored_layers.teller(model.apply, **call), variables, assignment, *args
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
  """Writes an export, with what the served model makes of its inputs.

  Args:
    out: a directory that is empty or does not exist.
    manifest: what says how the model is built and, as `call`, called.
    layers: what is stored of each layer.
    tensors: of the served model.
    args: example inputs.
    outputs: what the search's evaluation gives for them.
    model: the module, unless the manifest says how to build one.

  Returns:
    The manifest as written.

  Raises:
    ValueError: the served model gives something else, or cannot be written.
  """
  served = loader.build(manifest, layers, model)
  variables = loader.variables(served, tensors, layers)
  expected = loader.named('outputs', outputs)
  given = loader.Served(served, variables, manifest)(*args)
  found = _difference(args, loader.named('outputs', given), expected)
  if not _is_close(found):
    raise ValueError(
      f'the served model differs from the search by {found["max_difference"]} '
      f'in {found["output"]}, of which the largest is '
      f'{found["largest_output"]}: perhaps the model reads the weights of a '
      'layer without calling it; exclude such a layer'
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
    reference=found,
    program=dict(batch='any' if is_open else found['examples']),
    qwix_cannot_express=missing,
  )
  return export_files.write(out, manifest, layers, tensors, others)


def verify(
  directory: str | os.PathLike[str], model: nn.Module | None = None
) -> dict[str, Any]:
  """Checks an export: files, tensors, layers, and the outputs they give.

  Args:
    directory: of the export.
    model: as of `serving.load`. Without the module of an export that needs one,
      its StableHLO program is run.

  Returns:
    How the outputs differ from the stored ones of the search: `bit_equal`,
    `max_difference`, `largest_output`; and `through` what they were computed.

  Raises:
    ValueError: the first thing that is not as the manifest has it.
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
  found = _difference(args, loader.named('outputs', outputs), expected)
  if not _is_close(found):
    raise ValueError(
      f'{directory}: the outputs differ from the reference outputs by '
      f'{found["max_difference"]:.3g} (largest output '
      f'{found["largest_output"]:.3g}); exported with '
      f'{manifest["versions"]} on {manifest["machine"]}'
    )
  return found | dict(through=through)


def _kept(kwargs: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the options of a call as a manifest has them."""
  for name, value in kwargs.items():
    if name in ('mutable', 'rngs', 'capture_intermediates'):
      raise ValueError(
        f'{name}={value!r}: a served model changes nothing and draws nothing; '
        'export the call of its evaluation'
      )
    try:
      kept = json.loads(json.dumps(value))
    except (TypeError, ValueError):
      kept = None
    if kept != value or type(kept) is not type(value):
      raise ValueError(
        f'{name}={value!r} cannot be kept in manifest.json, from which the '
        'served model is called: give arrays as example inputs, by position, '
        'and set other fields in the module'
      )
  return dict(kwargs)


def _plain(variables: Mapping[str, Any]) -> dict[str, Any]:
  """Returns collections of arrays alone."""
  variables = core.unfreeze(nn.meta.unbox(variables))
  for path, value in traverse_util.flatten_dict(variables, sep='/').items():
    if not hasattr(value, 'dtype') and not path.startswith('cost/'):
      raise ValueError(
        f'variables: {path} is a {type(value).__name__}, and no array'
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
  """Says how outputs, by name, differ: of several the one that does most."""
  each = []
  for name, y in expected.items():
    x, y = np.asarray(served[name]), np.asarray(y)
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
  # What is no number is as far as can be.
  worst = max(each, key=lambda found: np.nan_to_num(_share(found), nan=np.inf))
  first = jax.tree.leaves(args)[0]
  return worst | dict(
    examples=len(first) if np.ndim(first) else 1,
    bit_equal=all(found['bit_equal'] for found in each),
  )


def _share(found):
  return found['max_difference'] / max(found['largest_output'], 1e-30)


def _is_close(found) -> bool:
  return _share(found) <= _TOLERANCE
