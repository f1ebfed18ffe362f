"""Load an exported model and serve it.

  served = serving.load(DIR)
  logits = served(images)

The networks are those of `models`, built with the layers of `served_layers`, or
the one that `searchable` was given: `serving.load(DIR, model=MyModule())`.
"""

from collections.abc import Callable, Mapping
import functools
import os
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fliqs_jax import models
from fliqs_jax.intercept import layer_calls
from fliqs_jax.layers import quant_layers
from fliqs_jax.numerics import int8_ops
from fliqs_jax.serving import export_files
from fliqs_jax.serving import served_layers
from fliqs_jax.serving import served_model
from fliqs_jax.serving import stablehlo
from fliqs_jax.serving import stored_layers
from fliqs_jax.space import quant_spec
from fliqs_jax.space import sizes as sizes_lib

# A batch of 64 takes 1.1 (ResNet-20 of 64 channels) to 1.4 (DeiT-Ti) times as
# long in one piece; benchmarks/serving.py.
_AT_ONCE = 16


class Served:
  """A model that runs in low-bit arithmetic.

  Attributes:
    model: the network, of served layers, or a `served_model.ServedModel`.
    variables: its collections.
    manifest: of the export that it comes from; `call` are the options with
      which the model is called.
    at_once: examples that run together; larger batches run in slices, because
      XLA on CPU is slower once a layer's results leave the cache. Then every
      input and output has the examples on its first axis. None: all.
  """

  def __init__(
    self,
    model: nn.Module | served_model.ServedModel,
    variables: Mapping[str, Any],
    manifest: Mapping[str, Any],
    at_once: int | None = None,
  ):
    self.model = model
    self.variables = jax.device_put(variables)
    self.manifest = manifest
    self.at_once = at_once
    # The variables are arguments: constants would be reassociated.
    self._apply = jax.jit(functools.partial(model.apply, **manifest['call']))

  def __call__(self, *inputs: Any) -> Any:
    """Returns the model's outputs for its inputs; compiles per shape."""
    if self.at_once is None:
      return self._apply(self.variables, *inputs)
    step = self.at_once
    slices = [
      jax.tree.map(lambda x, i=i: x[i : i + step], inputs)
      for i in range(0, len(jax.tree.leaves(inputs)[0]), step)
    ]
    outputs = [self._apply(self.variables, *x) for x in slices]
    if len(outputs) == 1:
      return outputs[0]
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *outputs)


def load(
  directory: str | os.PathLike[str],
  at_once: int | None = None,
  *,
  model: nn.Module | None = None,
) -> Served:
  """Returns the model that `export` wrote to a directory.

  Args:
    directory: what `export` was given as `out`.
    at_once: as of `Served`; by default 16 for this package's networks on a CPU,
      elsewhere all. Integer layers do not notice; sums of floats may be rounded
      in another order.
    model: the module that `searchable` was given, of an export of
      `export_model`.

  Raises:
    ValueError: files are missing, damaged or not as the manifest has them, or
      the model is not that of the export.
  """
  content = export_files.read(directory)
  manifest = content.manifest
  needs_model = 'module' in manifest
  if needs_model and model is None:
    raise ValueError(
      f'{directory} holds {manifest["module"]}, which this package cannot '
      'build: load it with model= that module, or run its '
      f'{stablehlo.NAME}'
    )
  if not needs_model and model is not None:
    raise ValueError(
      f'model={type(model).__name__}: {directory} was exported from a workdir, '
      f'which says that its network is {manifest["model"]["name"]}; leave '
      'model= out'
    )
  built = build(manifest, content.layers, model)
  unpacked = variables(built, content.tensors, content.layers)
  if needs_model:
    args, _ = reference(directory, manifest)
    _check_model(directory, manifest, built, unpacked, args)
  elif at_once is None and jax.default_backend() == 'cpu':
    at_once = _AT_ONCE
  return Served(built, unpacked, manifest, at_once)


def reference(
  directory: str | os.PathLike[str], manifest: Mapping[str, Any]
) -> tuple[tuple, dict[str, np.ndarray]]:
  """Returns example inputs, as the model takes them, and their outputs by name.

  Raises:
    ValueError: a file is not as it was written.
  """
  found = export_files.read_tensors(directory, manifest, export_files.REFERENCE)
  program = stablehlo.deserialize(
    export_files.read_file(directory, manifest, stablehlo.NAME)
  )
  tree = program.in_tree
  (_, *args), _ = jax.tree.unflatten(tree, range(tree.num_leaves))
  names = named('inputs', tuple(args))
  inputs = jax.tree.unflatten(
    jax.tree.structure(tuple(args)), [found.pop(name) for name in names]
  )
  return inputs, found


def named(name: str, tree: Any) -> dict[str, Any]:
  """Returns {name: leaf} of a pytree, each name with the path of its leaf."""
  return {
    stored_layers.join(
      name, jax.tree_util.keystr(path, simple=True, separator='/')
    ): x
    for path, x in jax.tree_util.tree_leaves_with_path(tree)
  }


def parameters(
  model: nn.Module, args: tuple, call: Mapping[str, Any]
) -> dict[str, list[int]]:
  """Returns the shape of each parameter that a call of a model has."""
  made = jax.eval_shape(
    lambda *args: model.init(jax.random.key(0), *args, **call), *args
  )
  return {
    name: list(x.shape)
    for name, x in named('params', nn.meta.unbox(made['params'])).items()
  }


def _check_model(directory, manifest, model, variables, args) -> None:
  """Checks that a model has the parameters and the layers of the export."""
  name, call = type(model.model).__name__, manifest['call']
  if not isinstance(model.model, nn.Module) or model.model.scope is not None:
    raise ValueError(
      f'model={name} is no linen module, or one that is bound; give the '
      f'{manifest["module"]} that searchable was given'
    )
  layer_calls.check_call(model.model, args, call)
  found = parameters(model.model, args, call)
  expected = manifest['parameters']
  for path in sorted(found | expected):
    if found.get(path) != expected.get(path):
      raise ValueError(
        f'model={name}: {path} is of shape {found.get(path, "(not there)")}, '
        f'but in {directory} of {expected.get(path, "(not there)")}; give the '
        f'{manifest["module"]} that was exported, with its fields'
      )
  missed = set(model.choices) - model.called(variables, *args, **call)
  if missed:
    raise ValueError(
      f'model={name} calls no layer of linen at {", ".join(sorted(missed))}, '
      f'of which {directory} has the weights in low bits; give the '
      f'{manifest["module"]} that was exported'
    )


def variables(
  model: nn.Module | served_model.ServedModel,
  tensors: Mapping[str, np.ndarray],
  layers: Mapping[str, stored_layers.Layer],
) -> dict[str, Any]:
  """Returns the served model's collections, in the form fast on this host."""
  unpacked = stored_layers.variables(tensors, layers)
  if int8_ops.prefers_unsigned():
    unpacked |= with_shifts(unpacked, layers)
  if isinstance(model, served_model.ServedModel):
    unpacked = model.variables(unpacked)
  return unpacked


def program(
  model: nn.Module | served_model.ServedModel,
  layers: Mapping[str, stored_layers.Layer],
  call: Mapping[str, Any],
) -> Callable:
  """Returns `(tensors, *args) -> outputs`, in the form of every platform."""

  def run(tensors, *args):
    unpacked = stored_layers.variables(tensors, layers)
    if isinstance(model, served_model.ServedModel):
      unpacked = model.variables(unpacked)
    return model.apply(unpacked, *args, **call)

  return run


def build(
  manifest: Mapping[str, Any],
  layers: Mapping[str, stored_layers.Layer],
  model: nn.Module | None = None,
) -> nn.Module | served_model.ServedModel:
  """Returns the network that a manifest describes, or a model, served."""
  if model is not None:
    return served_model.ServedModel(model, layers)
  sizes = sizes_lib.Sizes(found=manifest['arch']['sizes'], is_served=True)
  return models.construct(
    manifest['model'],
    manifest['num_classes'],
    sizes=sizes,
    **constructors(layers),
  )


def constructors(layers: Mapping[str, stored_layers.Layer]) -> dict[str, Any]:
  """Returns the `conv` and `dense` constructors of served layers."""
  assignment = {
    path: tuple(f and f.name for f in (layer.weights, layer.activations))
    for path, layer in layers.items()
  }
  spec = quant_spec.QuantSpec(mode='separate', assignment=assignment)
  return dict(
    conv=quant_layers.with_spec(served_layers.ServedConv, spec),
    dense=quant_layers.with_spec(served_layers.ServedDense, spec),
  )


def with_shifts(
  variables: Mapping[str, Any], layers: Mapping[str, stored_layers.Layer]
) -> dict[str, Any]:
  """Returns the collection `shifts`, with which the unsigned form is served."""
  shifts: dict[str, Any] = {}
  for path, layer in layers.items():
    if layer.arithmetic != 'int8':
      continue
    parts = [part for part in path.split('/') if part]
    kernel, scale, leaf = variables['params'], variables['scales'], shifts
    for part in parts:
      kernel, scale = kernel[part], scale[part]
      leaf = leaf.setdefault(part, {})
    kernel, scale = kernel['kernel'], scale['weights']
    summed = [i for i, n in enumerate(scale.shape) if n < kernel.shape[i]]
    leaf['kernel'] = np.asarray(int8_ops.offset(jnp.asarray(kernel), summed))
  return dict(shifts=shifts) if shifts else {}
