"""Load an exported model and serve it.

  served = serving.load(DIR)
  logits = served(images)

The networks are those of `models`, built with the layers of `served_layers`.
"""

from collections.abc import Mapping
import functools
import os
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fliqs_jax import artifact
from fliqs_jax import integer
from fliqs_jax import layers as layers_lib
from fliqs_jax import models
from fliqs_jax import quant_spec
from fliqs_jax import served_layers
from fliqs_jax import sizes as sizes_lib
from fliqs_jax import stored

# A batch of 64 takes 1.1 (ResNet-20 of 64 channels) to 1.4 (DeiT-Ti) times as
# long in one piece; benchmarks/serving.py.
_AT_ONCE = 16


class Served:
  """A model that runs in low-bit arithmetic.

  Attributes:
    model: the network, of served layers.
    variables: its collections.
    manifest: of the export that it comes from.
    at_once: examples that run together; larger batches run in slices, because
      XLA on CPU is slower once a layer's results leave the cache. None: all.
  """

  def __init__(
    self,
    model: nn.Module,
    variables: Mapping[str, Any],
    manifest: Mapping[str, Any],
    at_once: int | None = None,
  ):
    self.model = model
    self.variables = jax.device_put(variables)
    self.manifest = manifest
    self.at_once = at_once
    # The variables are arguments: constants would be reassociated.
    self._apply = jax.jit(functools.partial(model.apply, train=False))

  def __call__(self, inputs: Any) -> jax.Array:
    """Returns the model's outputs for a batch of inputs; compiles per shape."""
    size = len(jax.tree.leaves(inputs)[0])
    step = self.at_once or size
    slices = [
      jax.tree.map(lambda x, i=i: x[i : i + step], inputs)
      for i in range(0, size, step)
    ]
    outputs = [self._apply(self.variables, x) for x in slices]
    return outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs)


def load(
  directory: str | os.PathLike[str], at_once: int | None = None
) -> Served:
  """Returns the model that `export` wrote to a directory.

  Args:
    directory: what `export` was given as `out`.
    at_once: as of `Served`; by default 16 on a CPU, elsewhere all. Integer
      layers do not notice; sums of floats may be rounded in another order.

  Raises:
    ValueError: files are missing, damaged or not as the manifest has them.
  """
  content = artifact.read(directory)
  model = build(content.manifest, content.layers)
  unpacked = variables(content.tensors, content.layers)
  if at_once is None and jax.default_backend() == 'cpu':
    at_once = _AT_ONCE
  return Served(model, unpacked, content.manifest, at_once)


def variables(
  tensors: Mapping[str, np.ndarray], layers: Mapping[str, stored.Layer]
) -> dict[str, Any]:
  """Returns the served model's collections, in the form fast on this host."""
  unpacked = stored.variables(tensors, layers)
  if integer.likes_unsigned():
    unpacked |= with_shifts(unpacked, layers)
  return unpacked


def build(
  manifest: Mapping[str, Any], layers: Mapping[str, stored.Layer]
) -> nn.Module:
  """Returns the network that a manifest describes, of served layers."""
  sizes = sizes_lib.Sizes(found=manifest['arch']['sizes'], is_served=True)
  return models.construct(
    manifest['model'],
    manifest['num_classes'],
    sizes=sizes,
    **constructors(layers),
  )


def constructors(layers: Mapping[str, stored.Layer]) -> dict[str, Any]:
  """Returns the `conv` and `dense` constructors of served layers."""
  assignment = {
    path: tuple(f and f.name for f in (layer.weights, layer.activations))
    for path, layer in layers.items()
  }
  spec = quant_spec.QuantSpec(mode='separate', assignment=assignment)
  return dict(
    conv=layers_lib.with_spec(served_layers.ServedConv, spec),
    dense=layers_lib.with_spec(served_layers.ServedDense, spec),
  )


def with_shifts(
  variables: Mapping[str, Any], layers: Mapping[str, stored.Layer]
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
    leaf['kernel'] = np.asarray(integer.offset(jnp.asarray(kernel), summed))
  return dict(shifts=shifts) if shifts else {}
