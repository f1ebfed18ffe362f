"""StableHLO program of a served model, for machines without this package.

  import jax, safetensors
  program = jax.export.deserialize(open('model.stablehlo', 'rb').read())
  with safetensors.safe_open('weights.safetensors', 'flax') as file:
    tensors = {name: file.get_tensor(name) for name in file.keys()}
  logits = program.call(tensors, images)

The stored tensors are arguments, and the program unpacks them itself. So they
are not stored twice, and scales are not constants, which XLA would reassociate.
The batch size is symbolic if the model allows it. Products are int8 x int8 ->
int32, which every platform has; convolutions become such products, except on
TPU, which has an int8 convolution.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.export
import numpy as np

NAME = 'model.stablehlo'
PLATFORMS = ('cpu', 'cuda', 'tpu')


def serialize(
  program: Callable,
  tensors: Mapping[str, np.ndarray],
  args: Sequence[Any],
) -> tuple[bytes, bool]:
  """Returns a serialized program, and whether it takes any batch size.

  Args:
    program: `(tensors, *args) -> outputs`.
    tensors: {name: tensor}; only shapes and dtypes are used.
    args: example inputs, pytrees of arrays [N, ...]; an array with another
      first axis keeps its shape.

  Raises:
    ValueError: the model cannot be lowered to StableHLO.
  """
  fixed = jax.tree.map(_shape, (dict(tensors), *args))
  batch = np.shape(jax.tree.leaves(args)[0])[:1]
  (symbol,) = jax.export.symbolic_shape('batch')

  def opened(x):
    if batch and x.shape[:1] == batch:
      return jax.ShapeDtypeStruct((symbol, *x.shape[1:]), x.dtype)
    return x

  export = jax.export.export(jax.jit(program), platforms=PLATFORMS)
  try:
    exported = export(fixed[0], *jax.tree.map(opened, fixed[1:]))
    return bytes(exported.serialize()), bool(batch)
  # A model that needs the batch size as a number may raise any error.
  except Exception:
    try:
      return bytes(export(*fixed).serialize()), False
    except ValueError as error:
      raise ValueError(
        f'the model cannot be written as a StableHLO program: {error}'
      ) from error


def _shape(x):
  return jax.ShapeDtypeStruct(np.shape(x), x.dtype)


def deserialize(data: bytes) -> jax.export.Exported:
  """Returns a program; `call` is `(tensors, *args) -> outputs`."""
  return jax.export.deserialize(bytearray(data))
