"""StableHLO programs of a served model, for machines without this package.

  import json, jax, numpy
  read = lambda name: jax.export.deserialize(bytearray(open(name, 'rb').read()))
  operands = read('unpack.stablehlo').call(tensors)
  outputs = read('model.stablehlo').call(operands, *leaves_of_the_inputs)

`tensors` is {name: array} of weights.safetensors. `unpack` decodes packed
weights once; `model` takes its results and the leaves of the inputs, and
returns the leaves of the outputs. So tensors are not stored twice, and scales
are not constants, which XLA would reassociate. The batch size is symbolic if
the model allows it.

Products are int8 x int8 -> int32, which every platform has. Convolutions become
such products, except where there is an int8 convolution: on TPU, and on CPU if
windows overlap. The programs whose names end in `.vnni` are the same for CPUs
that multiply uint8 by int8 faster.
"""

from collections.abc import Callable, Iterator, Sequence
import contextlib
from typing import Any

import jax
import jax.export
import numpy as np

UNPACK, MODEL = 'unpack.stablehlo', 'model.stablehlo'
VNNI_UNPACK, VNNI_MODEL = 'unpack.vnni.stablehlo', 'model.vnni.stablehlo'
PLATFORMS = ('cpu', 'cuda', 'tpu')


def serialize(
  function: Callable[..., Any], *args: Any, platforms: Sequence[str]
) -> bytes:
  """Returns a serialized function.

  Args:
    function: a function of arrays, lists and dicts of them, to a list.
    *args: example arguments, or their shapes; only these are used.
    platforms: names of the platforms that it is lowered for.

  Raises:
    ValueError: it cannot be lowered to StableHLO.
  """
  try:
    return _written(function, jax.tree.map(_shape, args), platforms)
  except ValueError as error:
    raise ValueError(
      f'the model cannot be written as a StableHLO program: {error}'
    ) from error


def serialize_for_batches(
  function: Callable[..., Any],
  operands: Any,
  inputs: Sequence[Any],
  has_batch: Sequence[bool],
  platforms: Sequence[str],
) -> tuple[bytes, bool]:
  """Returns a serialized function, and whether it takes any batch size.

  Args:
    function: `(operands, *inputs) -> list of arrays`.
    operands: what does not depend on the batch.
    inputs: arrays.
    has_batch: whether the first axis of each input is that of the examples.
    platforms: names of the platforms that it is lowered for.

  Raises:
    ValueError: it cannot be lowered to StableHLO.
  """
  try:
    shapes = jax.tree.map(_shape, operands), *open_shapes(inputs, has_batch)
    return _written(function, shapes, platforms), any(has_batch)
  # A model that needs the batch size as a number may raise any error.
  except Exception:
    return serialize(function, operands, *inputs, platforms=platforms), False


def open_shapes(
  inputs: Sequence[Any], has_batch: Sequence[bool]
) -> list[jax.ShapeDtypeStruct]:
  """Returns the shapes of inputs, with a symbol for the number of examples.

  Args:
    inputs: arrays.
    has_batch: whether the first axis of each is that of the examples.
  """
  (symbol,) = jax.export.symbolic_shape('batch')
  return [
    jax.ShapeDtypeStruct((symbol, *np.shape(x)[1:]), x.dtype)
    if has
    else _shape(x)
    for x, has in zip(inputs, has_batch, strict=True)
  ]


def deserialize(data: bytes) -> jax.export.Exported:
  """Returns a program; `call` is its function.

  Raises:
    ValueError: the bytes are no program.
  """
  try:
    return jax.export.deserialize(bytearray(data))
  except Exception as error:  # Of flatbuffers, struct or JAX.
    raise ValueError(
      f'a program of the export cannot be read: {error}; export again'
    ) from error


def _written(
  function: Callable[..., Any], shapes: Sequence[Any], platforms: Sequence[str]
) -> bytes:
  export = jax.export.export(jax.jit(function), platforms=platforms)
  with _without_places():
    exported = export(*shapes)
  if exported.nr_devices > 1:
    raise ValueError(
      f'it would be for {exported.nr_devices} devices, because the model '
      'asks for shardings; export it outside of `jax.set_mesh`, and without '
      '`with_sharding_constraint` and `shard_map`'
    )
  return bytes(exported.serialize())


@contextlib.contextmanager
def _without_places() -> Iterator[None]:
  """Lowers without the lines of code that each operation comes from.

  They hold paths of the machine that exports, so that two machines would write
  different programs.
  """
  limit = jax.config.jax_traceback_in_locations_limit
  jax.config.update('jax_traceback_in_locations_limit', 0)
  try:
    yield
  finally:
    jax.config.update('jax_traceback_in_locations_limit', limit)


def _shape(x: Any) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(np.shape(x), x.dtype)
