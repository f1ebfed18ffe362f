"""A program as a converter to ONNX needs it.

What depends on no input is computed, calls are replaced by what they call, and
operations that the converter writes in a form that ONNX Runtime does not run
become nodes.
"""

import collections
from collections.abc import Sequence
from typing import Any

import jax
from jax.extend import core
import numpy as np

from fliqs_jax.program import equations
from fliqs_jax.serving.portable import folded
from fliqs_jax.serving.portable import onnx_nodes

_OWN_DERIVATIVES = frozenset(('custom_jvp_call', 'custom_vjp_call'))
# Results that may be larger than what they are computed from.
_SMALL = 10_000


def simplified(program: Any, *inputs: Any) -> list[Any]:
  """Returns the results of a closed jaxpr, traced in the simpler form.

  Each result is a value of its own, since a value has one name in ONNX.

  Args:
    program: the closed jaxpr.
    *inputs: values of its arguments, traced.
  """
  consts = [np.asarray(x) for x in program.consts]
  results = _run(equations.Body(program.jaxpr, consts), inputs)
  results = [getattr(y, 'traced', y) for y in results]
  taken = {id(x) for x in inputs}
  for i, y in enumerate(results):
    if id(y) in taken or isinstance(y, np.ndarray):
      results[i] = onnx_nodes.node('Identity', y, shape=y.shape, dtype=y.dtype)
    taken.add(id(results[i]))
  return results


def _run(body: equations.Body, operands: Sequence[Any]) -> list[Any]:
  values: dict[core.Var, Any] = {}
  values.update(zip(body.jaxpr.constvars, body.consts, strict=True))
  values.update(zip(body.jaxpr.invars, operands, strict=True))

  def read(atom: Any) -> Any:
    return np.asarray(atom.val) if _is_literal(atom) else values[atom]

  uses = collections.Counter(
    x
    for atoms in (*(e.invars for e in body.jaxpr.eqns), body.jaxpr.outvars)
    for x in atoms
    if not _is_literal(x)
  )
  for eqn in body.jaxpr.eqns:
    results = _results(eqn, [read(x) for x in eqn.invars])
    for v, y in zip(eqn.outvars, results, strict=True):
      # What takes in one of several uses would be computed again for another.
      values[v] = y if uses[v] == 1 else getattr(y, 'traced', y)
  return [read(x) for x in body.jaxpr.outvars]


def _is_literal(atom: Any) -> bool:
  return isinstance(atom, core.Literal)


def _results(eqn: core.JaxprEqn, operands: list[Any]) -> list[Any]:
  name = equations.name(eqn)
  if equations.is_call(eqn) or name in _OWN_DERIVATIVES:
    return _run(equations.body(eqn), operands)
  if (result := folded.folded(eqn, operands)) is not None:
    return [result]
  operands = [getattr(x, 'traced', x) for x in operands]
  if name != onnx_nodes.node_p.name and _is_constant(eqn, operands):
    with jax.ensure_compile_time_eval():
      return [np.asarray(x) for x in equations.bind(eqn, operands)]
  if name == 'conv_general_dilated':
    y = onnx_nodes.convolution(eqn, *operands)
    return equations.bind(eqn, operands) if y is None else [y]
  if name == 'reduce_window_max' and _is_of_images(eqn):
    return [_max_pool(eqn, *operands)]
  return equations.bind(eqn, operands)


def _is_constant(eqn: core.JaxprEqn, operands: Sequence[Any]) -> bool:
  """Returns whether results depend on no input, and are not much larger."""
  if not all(isinstance(x, np.ndarray) for x in operands):
    return False
  shapes = [v.aval for v in eqn.outvars]
  if not all(isinstance(n, int) for aval in shapes for n in aval.shape):
    return False
  if any(jax.dtypes.issubdtype(a.dtype, jax.dtypes.extended) for a in shapes):
    return False
  largest = max((x.nbytes for x in operands), default=0)
  return all(
    aval.size <= _SMALL or aval.size * aval.dtype.itemsize <= largest
    for aval in shapes
  )


def _pooled(eqn: core.JaxprEqn) -> list[int]:
  window = eqn.params['window_dimensions']
  return [i for i, n in enumerate(window) if n > 1]


def _is_of_images(eqn: core.JaxprEqn) -> bool:
  """Returns whether a window leaves two axes alone: examples and channels."""
  params = eqn.params
  others = len(params['window_dimensions']) - len(_pooled(eqn))
  moved = [
    n for i, n in enumerate(params['window_strides']) if i not in _pooled(eqn)
  ]
  return (
    others == 2 and set(moved) == {1} and set(params['base_dilation']) == {1}
  )


def _max_pool(eqn: core.JaxprEqn, x: Any) -> jax.Array:
  """Returns the maxima of windows by MaxPool, which has images last."""
  params, images = eqn.params, _pooled(eqn)
  order = [*(i for i in range(x.ndim) if i not in images), *images]
  shape = eqn.outvars[0].aval.shape
  y = onnx_nodes.node(
    'MaxPool',
    x.transpose(order),
    shape=[shape[i] for i in order],
    kernel_shape=tuple(params['window_dimensions'][i] for i in images),
    strides=tuple(params['window_strides'][i] for i in images),
    pads=tuple(params['padding'][i][side] for side in (0, 1) for i in images),
    dilations=tuple(params['window_dilation'][i] for i in images),
  )
  return y.transpose(np.argsort(order))
