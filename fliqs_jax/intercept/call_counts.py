"""How often transforms run each op of an intercepted model.

`nn.scan` and `nn.vmap` trace a step once; its costs count as often as it runs.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fliqs_jax.intercept import carried_variables
from fliqs_jax.space import cost_model


def calls(program) -> dict[str, list[float]]:
  """Returns {layer: [times, ...]}: one entry for each place of a call.

  Args:
    program: jaxpr of the model's initialisation.
  """
  found: dict[str, list[float]] = {}

  def walk(jaxpr, times):
    for equation in jaxpr.eqns:
      name = str(equation.params.get('name', ''))
      if name.startswith(carried_variables.MARK):
        if not equation.invars:
          continue  # What nn.scan's look for constants leaves behind.
        size, _, path = name.removeprefix(carried_variables.MARK).partition(' ')
        slices = equation.invars[0].aval.size / max(int(size), 1)
        found.setdefault(path, []).append(times * slices)
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
  return found


def _is_program(value):
  return hasattr(value, 'eqns') or hasattr(value, 'jaxpr')


def costs(
  variables: Mapping[str, Any],
  carried: Mapping[tuple[str, ...], Any],
  called: Mapping[str, list[float]],
  shared: bool,
) -> dict[str, Any]:
  """Returns the `cost` collection with what transforms repeat.

  Args:
    variables: as `carried.split` returns them.
    carried: what was carried.
    called: as `calls` returns it.
    shared: whether all steps of a stack share a decision.

  Raises:
    ValueError: the repetitions of a layer cannot be known or not be quantized.
  """
  cost = variables.get('cost', {})
  cost = _stacked_natively(cost, variables, shared)
  for path, state in carried.items():
    for parts, shapes in _records(state.get('cost', {})):
      layer = '/'.join((*path, *parts))
      steps = carried_variables.length(state)
      if steps is None:  # Nothing is quantized.
        steps = _ratio(variables['params'], path, shapes[0])
      stacked = steps > 1 or carried_variables.is_stacked(state)
      times = called.get(layer, [])
      if len(times) != len(shapes):
        raise ValueError(
          f'{layer}: {len(shapes)} calls, of which {len(times)} show in the '
          'traced program: nn.jit takes modules for equal and traces the first '
          'alone; give them different fields, or leave nn.jit to the caller'
        )
      repeated = [_repeat(layer, s, t / steps) for s, t in zip(shapes, times)]
      if stacked:
        repeated = [cost_model.Stacked(s, steps, shared) for s in repeated]
      cost = carried_variables.with_entry(
        cost, (*path, *parts), 'ops', tuple(repeated)
      )
  return cost


def _repeat(layer, shape, times):
  if times > 1 and shape.act_menu is not None:
    raise ValueError(
      f'{layer} has the same weights in all {times:g} steps of a transform, '
      'which therefore cannot keep statistics of its inputs: exclude it, use '
      "mode='weights', or carry the collections arch and quant_stats through "
      'the transform (variable_broadcast and variable_carry of nn.scan)'
    )
  return shape.replace(macs=round(shape.macs * times))


def _records(tree, parts=()):
  for key, value in tree.items():
    if key == 'ops':
      yield parts, value
    else:
      yield from _records(value, (*parts, key))


def _ratio(params, path, shape):
  """Returns how often the weights of one step fit into a parameter."""
  for key in path:
    params = params.get(key, {})
  sizes = [
    jnp.size(nn.meta.unbox(params[name]))
    for name in ('kernel', 'embedding')
    if name in params
  ]
  return sizes[0] // shape.weights if sizes and shape.weights else 1


def _stacked_natively(cost, variables, shared):
  """Marks what a transform that takes all collections along has stacked."""
  for parts, shapes in _records(cost):
    arch = variables.get('arch', {})
    for key in parts:
      arch = arch.get(key, {})
    steps = sum(key.startswith('@') for key in arch)
    steps = steps or _ratio(variables.get('params', {}), parts, shapes[0])
    if steps > 1:
      stacked = tuple(cost_model.Stacked(s, steps, shared) for s in shapes)
      cost = carried_variables.with_entry(cost, parts, 'ops', stacked)
  return cost
