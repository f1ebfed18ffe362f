"""Export of a searched model as programs, and the check that they agree.

  fliqs.export_model(model, variables, choices, images, out=DIR)
  served = serving.load(DIR)

The files need neither the model's code nor this package.
"""

from collections.abc import Mapping
import dataclasses
import json
import os
import platform
from typing import Any

from flax import core
import flax.linen as nn
import jax
from jax.extend import core as jaxprs
import jax.numpy as jnp
import numpy as np

from fliqs_jax.program import guard
from fliqs_jax.program import models
from fliqs_jax.program import products as products_lib
from fliqs_jax.program import searchable as searchable_lib
from fliqs_jax.runtime import devices
from fliqs_jax.runtime import versions
from fliqs_jax.serving import differences
from fliqs_jax.serving import export_files
from fliqs_jax.serving import loader
from fliqs_jax.serving import pytrees
from fliqs_jax.serving import qwix_rules
from fliqs_jax.serving import served_program
from fliqs_jax.serving import stored_products
from fliqs_jax.serving.portable import stablehlo
from fliqs_jax.space import discovery

# The file of the ONNX model, if one was asked for.
_ONNX = 'model.onnx'


def export_model(
  model: searchable_lib.Searchable,
  variables: Mapping[str, Any],
  choices: Mapping[str, Any],
  /,
  *args: Any,
  out: str | os.PathLike[str],
  rngs: Mapping[str, jax.Array] | None = None,
  onnx: bool = False,
  **kwargs: Any,
) -> dict[str, Any]:
  """Writes a searched model with packed low-bit weights.

  Weights and scales are those that the products multiply in the search's
  evaluation (Eq. 10, 11).

  Args:
    model: a model that `searchable` made.
    variables: `params`, `quant_stats` and the other collections after training,
      without `arch`, which `choices` gives.
    choices: {decision: [K]}; the largest entry selects the option.
    *args: example inputs, arrays [N, ...] or pytrees of them; they are stored
      with the outputs of the search's evaluation. What is static, such as
      `train=False`, is given by keyword.
    out: path of a directory that is empty or does not exist.
    rngs: {name: typed PRNG key []} of a model that draws random numbers when it
      evaluates; then the served model takes such keys, too.
    onnx: whether to write an ONNX model, too.
    **kwargs: keyword arguments of the model's call, static.

  Returns:
    The manifest, plain JSON values, as in `manifest.json`.

  Raises:
    ValueError: the directory is not empty; the model cannot be called with
      these arguments, or changes its variables in the call; an input is no
      array, or a key of a dict neither a str nor an int; the choices are those
      of another model; activations were never quantized in training; a product
      at BF16 differs from the model's by more than rounding; or the served
      outputs differ from those of the search, in ONNX Runtime, too, if `onnx`.
  """
  export_files.check_free(out)
  searchable_lib.check_made(model)
  for name in ('mutable', 'capture_intermediates'):
    if name in kwargs:
      raise ValueError(
        f'{name}={kwargs[name]!r}: a served model changes no variables; give '
        'the keyword arguments of an evaluation'
      )
  args = _arrays(args)
  # One format of each menu is served, whatever mixtures were searched.
  spec = dataclasses.replace(model.spec, mix='sampled')
  model = dataclasses.replace(model, spec=spec)
  known = jax.eval_shape(
    lambda: {k: v for k, v in variables.items() if k not in searchable_lib.OWN}
  )
  found = dataclasses.replace(model, known=known)
  space = discovery.find(found, *args, **kwargs)
  _check_evaluates(model, plain(variables), args, rngs, kwargs)
  assignment = space.assignment(choices)
  variables = plain(variables)
  arch = space.expand(space.choices(assignment))
  guard.check(model, variables, *args, rngs=rngs, **kwargs)
  return write(
    out,
    model,
    {**variables, 'arch': arch},
    assignment,
    dict(
      arch=dict(
        layers={
          path: dict(weights=weights, activations=activations)
          for path, (weights, activations) in assignment.items()
        }
      )
    ),
    args,
    rngs,
    kwargs,
    onnx,
  )


def write(
  out: str | os.PathLike[str],
  model: searchable_lib.Searchable,
  variables: Mapping[str, Any],
  assignment: stored_products.Assignment,
  manifest: Mapping[str, Any],
  args: tuple[Any, ...],
  rngs: Any,
  call: Mapping[str, Any],
  onnx: bool = False,
) -> dict[str, Any]:
  """Writes an export, after comparing the served program with the search's.

  Args:
    out: path of a directory that is empty or does not exist.
    model: the searched model.
    variables: its collections, `arch` and settled statistics included.
    assignment: the same architecture as {layer: (weights, activations)}.
    manifest: entries of the manifest that describe the model.
    args: example inputs.
    rngs: {name: key} of a model that draws random numbers, or None.
    call: keyword arguments of the model's call, static.
    onnx: whether to write an ONNX model, too.

  Returns:
    The manifest as written.

  Raises:
    ValueError: the served outputs differ from those of the search, or the
      export cannot be written.
  """
  random = {} if rngs is None else dict(rngs=rngs)

  def evaluate(variables: Any, args: Any, random: Any) -> Any:
    return model.apply(variables, *args, **random, **call)

  def operands_of(variables: Any, args: Any, random: Any) -> Any:
    noting = dict(random, mutable=['operands'])
    return model.apply(variables, *args, **noting, **call)[1]

  outputs = jax.jit(evaluate)(variables, args, random)
  expected = _outputs(outputs)
  trees = dict(
    inputs=pytrees.describe((args, rngs)), outputs=pytrees.describe(outputs)
  )
  noted = jax.device_get(jax.jit(operands_of)(variables, args, random))
  own = {k: v for k, v in variables.items() if k not in searchable_lib.OWN}
  parts = model.replaced(model.trace(own, args, call, rngs, []).parts)
  stored = stored_products.stored(
    parts, variables, assignment, noted.get('operands', {})
  )
  served = served_program.make(model, own, call, stored, args, rngs)
  tensors = served.tensors
  leaves = [served_program.raw(x) for x in jax.tree.leaves((args, rngs))]
  operands = jax.jit(lambda t: served.unpack(t, False))(tensors)
  given = jax.jit(served.run)(operands, *leaves)
  found = differences.checked(
    'the outputs of the served model',
    leaves,
    dict(zip(expected, given)),
    expected,
  )
  has_batch = _has_batch(jax.tree.leaves((args, rngs)))
  files, entries = {}, {}
  if onnx:
    model_file, entries['onnx'] = _onnx(served, leaves, has_batch, expected)
    files[_ONNX] = model_file
  programs, is_open = _programs(served, tensors, leaves, has_batch)
  rules, missing = qwix_rules.rules(stored.layers)
  # Numbered, since a safetensors file has an order of its own.
  references = expected | {f'inputs/{i}': x for i, x in enumerate(leaves)}
  files |= programs | {
    export_files.REFERENCE: export_files.packed_file(
      {name: np.asarray(x) for name, x in references.items()}
    ),
    'qwix.json': json.dumps(rules, indent=2).encode() + b'\n',
  }
  manifest = dict(
    versions=versions.versions(),
    machine=f'{platform.machine()} {jax.default_backend()}',
    **manifest,
    **trees,
    keys=[
      str(jax.random.key_impl(x)) if served_program.is_key(x) else None
      for x in jax.tree.leaves((args, rngs))
    ],
    reference=found,
    program=dict(batch='any' if is_open else found['examples']),
    **entries,
    qwix_cannot_express=missing,
  )
  return export_files.write(out, manifest, stored.layers, tensors, files)


def _onnx(*given: Any) -> tuple[bytes, dict[str, Any]]:
  """Returns an ONNX model, and its entry in the manifest."""
  try:
    from fliqs_jax.serving.portable import onnx_model
  except ImportError as error:
    raise ValueError(
      f'an ONNX model needs the package {error.name}: '
      "pip install 'fliqs_jax[onnx]'"
    ) from error
  return onnx_model.write(*given)


def _programs(
  served: served_program.ProgramModel,
  tensors: Any,
  leaves: list[Any],
  has_batch: list[bool],
) -> tuple[dict[str, bytes], bool]:
  """Returns {name of a file: program}, and whether the batch size is open."""
  files, is_open = {}, []
  for unpack_name, model_name, unsigned, platforms in (
    (stablehlo.UNPACK, stablehlo.MODEL, False, stablehlo.PLATFORMS),
    (stablehlo.VNNI_UNPACK, stablehlo.VNNI_MODEL, True, ('cpu',)),
  ):

    def unpack(tensors: Any, unsigned: bool = unsigned) -> list[Any]:
      return jax.tree.leaves(served.unpack(tensors, unsigned))

    shapes = jax.eval_shape(lambda t, u=unsigned: served.unpack(t, u), tensors)
    structure = jax.tree.structure(shapes)

    def run(
      operands: list[Any], *inputs: Any, structure: Any = structure
    ) -> list[Any]:
      return served.run(structure.unflatten(operands), *inputs)

    files[unpack_name] = stablehlo.serialize(
      unpack, tensors, platforms=platforms
    )
    files[model_name], opened = stablehlo.serialize_for_batches(
      run, jax.tree.leaves(shapes), leaves, has_batch, platforms
    )
    is_open.append(opened)
  return files, all(is_open)


def _outputs(tree: Any) -> dict[str, Any]:
  """Returns {name in the file of references: output}.

  Raises:
    ValueError: one is a typed PRNG key.
  """
  outputs = {
    products_lib.join('outputs', path): x
    for path, x in products_lib.named(tree).items()
  }
  for name, x in outputs.items():
    if served_program.is_key(x):
      raise ValueError(
        f'{name} is a typed PRNG key, which a served model cannot return: '
        'return jax.random.key_data of it, or nothing'
      )
  return outputs


def _check_evaluates(
  model: searchable_lib.Searchable,
  variables: Mapping[str, Any],
  args: tuple[Any, ...],
  rngs: Any,
  call: Mapping[str, Any],
) -> None:
  """Checks that a call changes no variables, as one that trains does.

  Raises:
    ValueError: it does; the message names the first that changes.
  """
  own = {k: v for k, v in variables.items() if k not in searchable_lib.OWN}
  names = [name for name in own if name != 'params']
  if not names:
    return
  traced = model.trace(own, args, call, rngs, names)
  run = devices.jit_once(jaxprs.jaxpr_as_fun(traced.program))
  _, changed = jax.tree.unflatten(traced.outputs, run(*traced.operands))
  before, after = (
    {
      path: served_program.raw(x)
      for path, x in products_lib.named(tree).items()
    }
    for tree in (own, changed)
  )
  for path in sorted(before.keys() & after.keys()):
    if not np.array_equal(before[path], after[path], equal_nan=True):
      raise ValueError(
        f'the call changes {path}, as in training, but a served model changes '
        'nothing: give train=False, or what the model is told to evaluate by'
      )


def _arrays(args: tuple[Any, ...]) -> tuple[Any, ...]:
  """Returns the inputs as JAX's arrays.

  Raises:
    ValueError: one is no array, which a served model could not be given, or has
      a name that a manifest cannot hold.
  """
  pytrees.describe(args)
  for path, leaf in jax.tree_util.tree_leaves_with_path(args):
    if not models.is_array(leaf):
      place = jax.tree_util.keystr(path)
      raise ValueError(
        f'input {place} is {leaf!r}, a {type(leaf).__name__}: inputs are '
        'arrays. Give what is static by keyword, as in train=False, and a '
        'number that a served model takes as an array'
      )
  return jax.tree.map(jnp.asarray, args)


def _has_batch(leaves: list[Any]) -> list[bool]:
  """Returns whether the first axis of each input is that of the examples.

  It is if it is as long as the first input's. A key has no axis, though its
  data do.
  """
  batch = np.shape(leaves[0])[:1] if leaves else ()
  return [bool(batch) and np.shape(x)[:1] == batch for x in leaves]


def plain(variables: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the collections without boxes; every leaf must be an array.

  Raises:
    ValueError: a leaf is no array; the message names it.
  """
  plain_ones = core.unfreeze(nn.meta.unbox(variables))
  plain_ones = {k: v for k, v in plain_ones.items() if k != 'cost'}
  for path, leaf in products_lib.named(plain_ones).items():
    if not hasattr(leaf, 'dtype'):
      raise ValueError(
        f'variables: {path} is a {type(leaf).__name__}; it must be an array'
      )
  return plain_ones


def verify(directory: str | os.PathLike[str]) -> dict[str, Any]:
  """Checks an export: its files, tensors, layers, and the model's outputs.

  Args:
    directory: path of the export.

  Returns:
    The difference between the outputs and the search's stored outputs:
    `bit_equal`, `max_difference`, `largest_output`; if there is an ONNX model,
    also `onnx`, the same of its outputs in ONNX Runtime, or why it did not run.

  Raises:
    ValueError: something differs from the manifest; the message names the
      first such thing.
  """
  manifest = export_files.read_manifest(directory)
  with export_files.refused(directory):
    (args, rngs), inputs, expected = loader.reference(directory, manifest)
    outputs = _outputs(loader.load(directory)(*args, rngs=rngs))
    made = f'exported with {manifest["versions"]} on {manifest["machine"]}'
    found = differences.checked(
      f'{directory}, {made}: the outputs', inputs, outputs, expected
    )
    if 'onnx' in manifest:
      model = export_files.read_file(directory, manifest, _ONNX)
      found['onnx'] = _in_onnx_runtime(directory, model, inputs, expected)
  return found


def _in_onnx_runtime(directory, model, inputs, expected) -> Any:
  try:
    from fliqs_jax.serving.portable import onnx_runtime
  except ImportError:
    return 'not checked: onnxruntime is not installed'
  what = f'{directory}: the outputs in ONNX Runtime'
  return onnx_runtime.checked(what, model, inputs, expected)
