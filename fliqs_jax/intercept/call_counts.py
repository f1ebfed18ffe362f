"""Counts of how often linen transforms run each op of an intercepted model.

`nn.scan` and `nn.vmap` trace their body once and run it many times; the cost of
an op counts every run.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fliqs_jax.intercept import carried_variables
from fliqs_jax.intercept import layer_calls
from fliqs_jax.space import ops as ops_lib


def calls(program) -> dict[str, list[float]]:
  """Returns {layer path: [number of runs, ...]}, an entry for each call site.

  Args:
    program: the closed jaxpr of the model's `init`, with the marks that
      `carried_variables.LayerState.mark` leaves.
  """
  runs: dict[str, list[float]] = {}

  def walk(jaxpr, times):
    for equation in jaxpr.eqns:
      name = str(equation.params.get('name', ''))
      if name.startswith(carried_variables.MARK):
        if not equation.invars:
          continue  # nn.scan's own search for constants leaves these behind.
        size, _, path = name.removeprefix(carried_variables.MARK).partition(' ')
        slices = equation.invars[0].aval.size / max(int(size), 1)
        runs.setdefault(path, []).append(times * slices)
        continue
      if equation.primitive.name == 'scan':
        inside = times * equation.params['length']
      else:
        inside = times
      for value in jax.tree.leaves(
        list(equation.params.values()), is_leaf=_is_program
      ):
        if _is_program(value):
          walk(getattr(value, 'jaxpr', value), inside)

  walk(program.jaxpr, 1)
  return runs


def _is_program(value):
  return hasattr(value, 'eqns') or hasattr(value, 'jaxpr')


def costs(
  variables: Mapping[str, Any],
  carried: Mapping[tuple[str, ...], Any],
  called: Mapping[str, list[float]],
  shared: bool,
) -> dict[str, Any]:
  """Returns the `cost` collection, in which transforms' repetitions count.

  Args:
    variables: the first result of `carried_variables.split`.
    carried: the second result of `carried_variables.split`: {layer path: the
      collections that traveled in `params`}.
    called: the result of `calls`.
    shared: whether all iterations of a scanned layer share one decision.

  Raises:
    ValueError: the number of runs of a layer is unknown, or it rules out that
      the layer's activations are quantized.
  """
  cost = variables.get('cost', {})
  cost = _stacked_natively(cost, variables, shared)
  for path, state in carried.items():
    for parts, shapes in _records(state.get('cost', {})):
      layer = '/'.join((*path, *parts))
      iterations = carried_variables.length(state)
      if iterations is None:  # Nothing is quantized.
        iterations = _ratio(variables['params'], path, shapes[0])
      stacked = iterations > 1 or carried_variables.is_stacked(state)
      times = called.get(layer, [])
      if len(times) != len(shapes):
        raise ValueError(
          f'{layer}: the model calls it {len(shapes)} times, but {len(times)} '
          'of these calls show in the traced program: nn.jit treats modules '
          'with equal fields as one and traces only the first. Give the '
          'modules different fields, or jit the whole model instead'
        )
      repeated = [
        _repeat(layer, s, t / iterations) for s, t in zip(shapes, times)
      ]
      if stacked:
        repeated = [ops_lib.Stacked(s, iterations, shared) for s in repeated]
      cost = carried_variables.with_entry(
        cost, (*path, *parts), 'ops', tuple(repeated)
      )
  return cost


def _repeat(layer, shape, times):
  if times > 1 and shape.act_menu is not None:
    raise ValueError(
      f'{layer} has the same weights in all {times:g} iterations of a '
      'transform, which therefore cannot keep statistics of its inputs: '
      "exclude the layer, use mode='weights', or carry the collections arch "
      'and quant_stats through the transform (variable_broadcast and '
      'variable_carry of nn.scan)'
    )
  return shape.replace(macs=round(shape.macs * times))


def _records(tree, parts=()):
  for key, value in tree.items():
    if key == 'ops':
      yield parts, value
    else:
      yield from _records(value, (*parts, key))


def _ratio(params, path, shape):
  """Returns how often the weights of one iteration fit into the parameter."""
  for key in path:
    params = params.get(key, {})
  sizes = [
    jnp.size(nn.meta.unbox(params[name]))
    for name in layer_calls.WEIGHTS
    if name in params
  ]
  return sizes[0] // shape.weights if sizes and shape.weights else 1


def _stacked_natively(cost, variables, shared):
  """Marks the ops that a transform of all collections has stacked."""
  for parts, shapes in _records(cost):
    arch = variables.get('arch', {})
    for key in parts:
      arch = arch.get(key, {})
    iterations = sum(key.startswith('@') for key in arch)
    if not iterations:
      iterations = _ratio(variables.get('params', {}), parts, shapes[0])
    if iterations > 1:
      stacked = tuple(ops_lib.Stacked(s, iterations, shared) for s in shapes)
      cost = carried_variables.with_entry(cost, parts, 'ops', stacked)
  return cost
