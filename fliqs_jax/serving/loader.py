"""Loading of exports: builds the served model from the files.

  served = serving.load(DIR)
  logits = served(images)

The export of a run holds a network of `models`, which is built with the layers
of `served_layers`. The export of `export_model` needs the module that
`searchable` got: `serving.load(DIR, model=MyModule())`.
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

# On a CPU, a batch of 64 in one piece takes 1.1 (ResNet-20 of 64 channels) to
# 1.4 (DeiT-Ti) times as long as in slices of 16; benchmarks/serving.py.
_AT_ONCE = 16


class Served:
  """A model that runs in low-bit arithmetic.

  Attributes:
    model: a network with served layers, or a `served_model.ServedModel`.
    variables: the collections of the model, on the device.
    manifest: the export's manifest; `call` holds the keyword arguments of the
      model's call.
    at_once: number of examples that run together; None: all. Larger batches run
      in slices, because XLA on CPU is slower once a layer's results leave the
      cache. Then every input and output has the examples on its first axis.
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
    # The variables are arguments: XLA would reassociate constant scales.
    self._apply = jax.jit(functools.partial(model.apply, **manifest['call']))

  def __call__(self, *inputs: Any) -> Any:
    """Returns the model's outputs for its inputs; compiles once per shape.

    Args:
      *inputs: arrays [N, ...] or pytrees of them, as in the model's call.
    """
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
    directory: path of the export, which `export` got as `out`.
    at_once: number of examples that run together. None: 16 for a network of
      this package on a CPU, all otherwise. The results of integer layers do not
      depend on it; sums of floats may be rounded in another order.
    model: the module that `searchable` got, if the export was made by
      `export_model`.

  Raises:
    ValueError: files are missing, damaged or differ from the manifest, or the
      export was made from another model.
  """
  content = export_files.read(directory)
  manifest = content.manifest
  needs_model = 'module' in manifest
  if needs_model and model is None:
    raise ValueError(
      f'{directory} holds {manifest["module"]}, which this package cannot '
      'build: pass that module as model=, or run its program '
      f'{stablehlo.NAME}'
    )
  if not needs_model and model is not None:
    raise ValueError(
      f'model={type(model).__name__}: {directory} was exported from a workdir, '
      f'and its network is {manifest["model"]["name"]}; leave model= out'
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
  """Returns the example inputs of an export, and {name: output} for them.

  Raises:
    ValueError: a file is missing or damaged.
  """
  arrays = export_files.read_tensors(
    directory, manifest, export_files.REFERENCE
  )
  program = stablehlo.deserialize(
    export_files.read_file(directory, manifest, stablehlo.NAME)
  )
  tree = program.in_tree
  (_, *args), _ = jax.tree.unflatten(tree, range(tree.num_leaves))
  names = named('inputs', tuple(args))
  inputs = jax.tree.unflatten(
    jax.tree.structure(tuple(args)), [arrays.pop(name) for name in names]
  )
  return inputs, arrays


def named(name: str, tree: Any) -> dict[str, Any]:
  """Returns {`name` and the path of a leaf, joined by slashes: the leaf}."""
  return {
    stored_layers.join(
      name, jax.tree_util.keystr(path, simple=True, separator='/')
    ): x
    for path, x in jax.tree_util.tree_leaves_with_path(tree)
  }


def parameters(
  model: nn.Module, args: tuple, call: Mapping[str, Any]
) -> dict[str, list[int]]:
  """Returns {name of a parameter: its shape}, for one call of a model."""
  made = jax.eval_shape(
    lambda *args: model.init(jax.random.key(0), *args, **call), *args
  )
  return {
    name: list(x.shape)
    for name, x in named('params', nn.meta.unbox(made['params'])).items()
  }


def _check_model(directory, manifest, model, variables, args) -> None:
  """Raises ValueError unless a model has the export's parameters and layers."""
  name, call = type(model.model).__name__, manifest['call']
  if not isinstance(model.model, nn.Module) or model.model.scope is not None:
    raise ValueError(
      f'model={name} must be an unbound linen module; pass the '
      f'{manifest["module"]} that searchable got'
    )
  layer_calls.check_call(model.model, args, call)
  given = parameters(model.model, args, call)
  expected = manifest['parameters']
  for path in sorted(given | expected):
    if given.get(path) != expected.get(path):
      raise ValueError(
        f'model={name}: the shape of {path} is {given.get(path, "missing")}, '
        f'but in {directory} it is {expected.get(path, "missing")}; pass the '
        f'{manifest["module"]} that was exported, with the same fields'
      )
  missed = set(model.choices) - model.called(variables, *args, **call)
  if missed:
    raise ValueError(
      f'model={name} calls no linen layer at {", ".join(sorted(missed))}, '
      f'for which {directory} has low-bit weights; pass the '
      f'{manifest["module"]} that was exported'
    )


def variables(
  model: nn.Module | served_model.ServedModel,
  tensors: Mapping[str, np.ndarray],
  layers: Mapping[str, stored_layers.Layer],
) -> dict[str, Any]:
  """Returns the served model's collections, in this host's fastest form."""
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
  """Returns `(tensors, *args) -> outputs`, in a form for every platform."""

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
  """Returns the served form of a model, or of the network in a manifest."""
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
  """Returns constructors of served layers: {'conv': ..., 'dense': ...}."""
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
  """Returns the collection `shifts`, which the unsigned int8 op reads."""
  shifts: dict[str, Any] = {}
  for path, layer in layers.items():
    if layer.arithmetic != 'int8':
      continue
    parts = [part for part in path.split('/') if part]
    params, scales, leaf = variables['params'], variables['scales'], shifts
    for part in parts:
      params, scales = params[part], scales[part]
      leaf = leaf.setdefault(part, {})
    kernel, scale = params['kernel'], scales['weights']
    summed = [i for i, n in enumerate(scale.shape) if n < kernel.shape[i]]
    leaf['kernel'] = np.asarray(int8_ops.offset(jnp.asarray(kernel), summed))
  return dict(shifts=shifts) if shifts else {}
