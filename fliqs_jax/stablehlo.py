"""The served model as a StableHLO program, for machines without this package.

  import jax, safetensors
  program = jax.export.deserialize(open('model.stablehlo', 'rb').read())
  with safetensors.safe_open('weights.safetensors', 'flax') as file:
    tensors = {name: file.get_tensor(name) for name in file.keys()}
  logits = program.call(tensors, images)

The weights are arguments, exactly as stored: the program unpacks them itself.
So they are not stored twice, and scales are no constants, which XLA would
reassociate. The batch size is open. Products are int8 x int8 -> int32, which
every platform has; a convolution is one of its own on TPU only.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.export
import numpy as np

from fliqs_jax import stored

PLATFORMS = ('cpu', 'cuda', 'tpu')


def serialize(
  model: nn.Module,
  layers: Mapping[str, stored.Layer],
  tensors: Mapping[str, np.ndarray],
  inputs: Any,
) -> bytes:
  """Returns the program `(tensors, inputs) -> outputs`, serialized.

  Args:
    model: of served layers.
    layers: what is stored of each layer.
    tensors: by name; only their shapes and types matter.
    inputs: `jax.ShapeDtypeStruct` of one example each, as the model takes them.
  """

  def program(tensors, inputs):
    return model.apply(stored.variables(tensors, layers), inputs, train=False)

  (batch,) = jax.export.symbolic_shape('batch')
  shapes = (
    {k: jax.ShapeDtypeStruct(x.shape, x.dtype) for k, x in tensors.items()},
    jax.tree.map(
      lambda x: jax.ShapeDtypeStruct((batch, *x.shape), x.dtype), inputs
    ),
  )
  exported = jax.export.export(jax.jit(program), platforms=PLATFORMS)
  return bytes(exported(*shapes).serialize())
