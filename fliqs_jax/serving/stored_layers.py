"""What is stored of a network: its tensors by name, and back to variables.

A name is a variable's path, collection first: `params/head/kernel` holds the
weights of the layer `head` in the layout of `packing`, `scales/head/weights`
their scales. Each step of a scanned layer is a layer, `head/@3`, with a format
of its own. Whatever is not the weights of a quantized layer is as it was, and
of those nothing else is kept.
"""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any

from flax import traverse_util
import jax
import numpy as np

from fliqs_jax.numerics import formats
from fliqs_jax.numerics import packing

# Collections that only the search reads.
_SEARCH = ('arch', 'quant_stats', 'cost', 'operands')
_WEIGHTS = ('kernel', 'embedding')
# Up to here float32 holds every integer, so that the search's sums are exact.
_EXACT = 2**24

Assignment = Mapping[str, tuple[str | None, str | None]]


@dataclasses.dataclass(frozen=True)
class Layer:
  """What is stored of one layer.

  Attributes:
    weights: format of the weights; None where not quantized.
    activations: format of the input activations, or None.
    shape: of the weights.
    largest_sum: bound on the magnitude of the op's partial sums in units of the
      grids, for any input; None where the layer is not served in integers.
    variable: what the layer calls its weights, `kernel` or `embedding`; empty
      for a product of attention, whose `weights` are keys and values.
    lead: of the step of a scanned layer, how the transform stacks the steps;
      see `stacks.told`. Else empty.
    stacked: likewise the shape of the parameter with all of the steps.
  """

  weights: formats.NumericFormat | None
  activations: formats.NumericFormat | None
  shape: tuple[int, ...]
  largest_sum: int | None = None
  variable: str = 'kernel'
  lead: tuple[int, ...] = ()
  stacked: tuple[int, ...] = ()

  @property
  def arithmetic(self) -> str:
    """`int8`, or `float32` on grid values."""
    return 'float32' if self.largest_sum is None else 'int8'

  @property
  def exact(self) -> bool:
    """Whether the op's sums have no rounding in the search either.

    Then serving in integers gives the search's bits for every input. Sums of
    floats are rounded, and equal only if they are added in the same order.
    """
    return self.largest_sum is not None and self.largest_sum < _EXACT


def teller(apply: Callable, **kwargs: Any) -> Callable:
  """Returns the jitted `(variables, *args) -> what the layers multiply`.

  Args:
    apply: the search model's `apply`.
    **kwargs: of the call, static.
  """
  # The layers themselves tell: there is no second formula, and within jit the
  # scales are rounded as they are in the search.
  return jax.jit(
    lambda variables, *args: apply(
      variables, *args, **kwargs, mutable=['operands']
    )[1]
  )


def tensors(
  tell: Callable,
  variables: Mapping[str, Any],
  assignment: Assignment,
  *args,
) -> tuple[dict[str, np.ndarray], dict[str, Layer]]:
  """Returns what to store of the search's model, at one architecture.

  Args:
    tell: `teller` of the model.
    variables: its collections, `arch` with the architecture, settled.
    assignment: the same architecture in names.
    *args: an input.

  Raises:
    ValueError: activations that are to be quantized never were, or a layer was
      not called.
  """
  told = _flat(jax.device_get(tell(dict(variables), *args)).get('operands', {}))
  flat = _flat(
    {k: v for k, v in variables.items() if k not in _SEARCH},
  )
  flat = {name: np.asarray(jax.device_get(x)) for name, x in flat.items()}
  stats = _flat(variables.get('quant_stats', {}))
  layers: dict[str, Layer] = {}
  replaced = set()
  for path, names in assignment.items():
    if join(path, 'activations') not in told:
      if any(names):
        raise ValueError(
          f'{path or "the model"} has the formats {names}, but multiplies '
          'nothing in this call; call the model as find_decisions did'
        )
      continue  # An excluded layer of a model that was not written for us.
    module = _module(path)
    if names[1] is not None:
      _check_seen(module, stats)
    says = {k: told[join(path, k)][0] for k in _TOLD if join(path, k) in told}
    variable = _variable(flat, module) if 'values' in says else ''
    layer = _layer(names, says, variable)
    if path != module:
      lead = told[join(module, 'lead')][0].shape
      whole = flat[join('params', module, variable)].shape if variable else ()
      layer = dataclasses.replace(layer, lead=lead, stacked=whole)
    for side in ('weights', 'activations'):
      if getattr(layer, side) is not None:
        flat[join('scales', path, side)] = says[side]
    if layer.weights is not None and variable:
      replaced.add(join('params', module, variable))
      flat[join('params', path, variable)] = packing.encode(
        says['values'], layer.weights
      )
    layers[path] = layer
  kept = {k: v for k, v in flat.items() if k not in replaced}
  stored = {name: flat[name] for name in quantized_names(layers)}
  return kept | stored, _in_one_arithmetic(layers)


# What a layer, or a step of it, tells.
_TOLD = ('values', 'weights', 'activations', 'integer_op')
# Statistics that are zero as long as nothing is quantized.
_SEEN = ('active', 'count')


def _layer(names, says, variable: str) -> Layer:
  weights, activations = (f and formats.parse(f) for f in names)
  shape = says['values'].shape if variable else ()
  largest = None
  in_integers = all(f and f.is_integer for f in (weights, activations))
  if in_integers and says.get('integer_op'):
    scale = says['weights']
    summed = [i for i, n in enumerate(scale.shape) if n < shape[i]]
    sums = np.abs(says['values']).sum(tuple(summed), dtype=np.float64)
    largest = int(sums.max() * activations.max_value)
  return Layer(weights, activations, shape, largest, variable)


def _variable(flat, path: str) -> str:
  return next(name for name in _WEIGHTS if join('params', path, name) in flat)


def _check_seen(path: str, stats: Mapping[str, Any]) -> None:
  """Raises ValueError where activations have no scale yet."""
  for name, value in stats.items():
    own = name.startswith(f'{path}/' if path else '')
    if own and name.endswith(_SEEN) and not np.all(value):
      raise ValueError(
        f'the activations of {path or "the model"} were never quantized in '
        'this run (quant.act_start); there is nothing to export for them'
      )


def _in_one_arithmetic(layers: dict[str, Layer]) -> dict[str, Layer]:
  """Returns the layers; a program runs all steps of a stack in one arithmetic.

  So steps of integers are served in integers where all of them are.
  """
  floats = {
    module
    for module, steps in by_module(layers).items()
    if any(step.largest_sum is None for step in steps)
  }
  return {
    path: dataclasses.replace(layer, largest_sum=None)
    if _module(path) in floats
    else layer
    for path, layer in layers.items()
  }


def by_module(layers: Mapping[str, Layer]) -> dict[str, list[Layer]]:
  """Returns {path of a module: its steps}; one where nothing is scanned."""
  modules: dict[str, dict[int, Layer]] = {}
  for path, layer in layers.items():
    step = int(path.partition('/@')[2] or 0)
    modules.setdefault(_module(path), {})[step] = layer
  return {
    path: [steps[i] for i in sorted(steps)] for path, steps in modules.items()
  }


def _module(path: str) -> str:
  return path.partition('/@')[0]


def variables(
  flat: Mapping[str, Any], layers: Mapping[str, Layer]
) -> dict[str, Any]:
  """Returns the served model's collections from stored tensors.

  Args:
    flat: {name: tensor}; numpy, or traced.
    layers: {layer path: what is stored of it}.
  """
  flat = dict(flat)
  for name, layer in quantized_names(layers).items():
    flat[name] = packing.decode(flat[name], layer.weights, layer.shape)
  return traverse_util.unflatten_dict(flat, sep='/')


def quantized_names(layers: Mapping[str, Layer]) -> dict[str, Layer]:
  """Returns {name of the tensor of quantized weights: its layer}."""
  return {
    join('params', path, layer.variable): layer
    for path, layer in layers.items()
    if layer.weights is not None and layer.variable
  }


def join(*parts: str) -> str:
  """Returns a name of its parts, of which some may be empty."""
  return '/'.join(part for part in parts if part)


def _flat(tree: Mapping) -> dict[str, Any]:
  return traverse_util.flatten_dict(tree, sep='/')
