"""The served program as an ONNX model.

jax2onnx converts the program; the only primitive of ours in it is a node of
ONNX (`onnx_nodes`).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
import contextlib
import functools
import logging
from typing import Any
import warnings

import jax
from jax.extend import core
import jax2onnx
from jax2onnx.plugins import plugin_system
import numpy as np
import onnx_ir

from fliqs_jax.serving import served_program
from fliqs_jax.serving.portable import onnx_nodes
from fliqs_jax.serving.portable import onnx_runtime
from fliqs_jax.serving.portable import simplified
from fliqs_jax.serving.portable import stablehlo

# What jax2onnx writes unless told otherwise; INT4 exists since 21.
OPSET = 23


def write(
  served: served_program.ProgramModel,
  inputs: list[Any],
  has_batch: Sequence[bool],
  expected: Mapping[str, Any],
) -> tuple[bytes, dict[str, Any]]:
  """Returns a model's bytes, and its entry in the manifest.

  Its inputs are named `inputs/0` and so on, its outputs like the expected ones.

  Args:
    served: the served program.
    inputs: leaves of the example inputs, of keys their uint32 data.
    has_batch: whether the first axis of each input is that of the examples.
    expected: {name: output} of the search.

  Raises:
    ValueError: a part of the program has no form in ONNX, or the outputs in
      ONNX Runtime differ by more than rounding can explain.
  """
  unpack = jax.jit(lambda tensors: served.unpack(tensors, False))
  operands = jax.device_get(unpack(served.tensors))

  def run(*inputs: Any) -> list[Any]:
    return served.run(operands, *inputs, kind=onnx_nodes.Nodes)

  is_open = any(has_batch)
  try:
    model = converted(run, stablehlo.open_shapes(inputs, has_batch), expected)
  # A model that needs the batch size as a number may raise any error.
  except Exception:
    is_open, closed = False, [False] * len(inputs)
    try:
      model = converted(run, stablehlo.open_shapes(inputs, closed), expected)
    except Exception as error:
      raise ValueError(
        f'the model cannot be written as ONNX: {error}; export it without, or '
        'write this operation in another way'
      ) from error
  found = onnx_runtime.checked(
    'the outputs in ONNX Runtime', model, inputs, expected
  )
  batch = 'any' if is_open else found['examples']
  return model, dict(opset=OPSET, batch=batch, reference=found)


def converted(run: Any, shapes: Sequence[Any], outputs: Iterable[str]) -> bytes:
  """Returns the bytes of a model.

  Args:
    run: a function of arrays to a list of arrays.
    shapes: shapes of its arguments, of which sizes may be symbols.
    outputs: names of its results.
  """
  # Traced before the converter puts its own functions in the place of those of
  # JAX and Flax: products are known by their places in the program.
  traced = jax.make_jaxpr(run)(*shapes)
  for _ in range(2):  # What became a node takes in what follows it.
    simpler = functools.partial(simplified.simplified, traced)
    traced = jax.make_jaxpr(simpler)(*shapes)
  program = core.jaxpr_as_fun(traced)
  with _quiet():
    plugin_system.import_all_plugins()
    # Since JAX 0.10 the function is a primitive.
    rules = plugin_system.PLUGIN_REGISTRY
    rules.setdefault('stack', rules['jax.numpy.stack'])
    model = jax2onnx.to_onnx(
      program,
      shapes,
      model_name='fliqs_jax',
      opset=OPSET,
      input_names=[f'inputs/{i}' for i in range(len(shapes))],
      output_names=list(outputs),
    )
  return model.SerializeToString()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Silences the converter: it warns of packages that it does not need."""
  loggers = [logging.getLogger(name) for name in ('jax2onnx', 'onnx_ir')]
  before = [logger.level for logger in loggers]
  for logger in loggers:
    logger.setLevel(logging.CRITICAL)
  try:
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')
      yield
  finally:
    for logger, level in zip(loggers, before):
      logger.setLevel(level)


@plugin_system.register_primitive(jaxpr_primitive=onnx_nodes.node_p.name)
class _Node(plugin_system.PrimitiveLeafPlugin):
  """The converter's rule for a node of ONNX."""

  def lower(self, context: Any, eqn: core.JaxprEqn) -> None:
    operands = [context.get_value_for_var(x) for x in eqn.invars]
    (out,) = eqn.outvars
    expected = context.get_value_for_var(out)
    attributes = {
      name: list(x) if isinstance(x, tuple) else x
      for name, x in eqn.params['attributes']
    }
    make = getattr(context.builder, eqn.params['op'])
    name = eqn.params['name'] or expected.name
    result = make(*operands, _outputs=[name], **attributes)
    dtype = onnx_ir.DataType.from_numpy(np.dtype(out.aval.dtype))
    result.type, result.shape = onnx_ir.TensorType(dtype), expected.shape
    context.bind_value_for_var(out, result)
