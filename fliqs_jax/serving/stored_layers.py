"""Stored tensors of a network: made from its variables, and turned back.

The name of a tensor is a variable's path, collection first:
`params/head/kernel` holds the weights of the layer `head`, packed by
`numerics.packing`, and `scales/head/weights` their scales. Each iteration of a
scanned layer is stored as a layer with its own format, such as `head/@3`. The
weights of a quantized layer are stored in packed form only; all other variables
are stored unchanged.
"""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any

from flax import traverse_util
import jax
import numpy as np

from fliqs_jax.intercept import layer_calls
from fliqs_jax.numerics import formats
from fliqs_jax.numerics import packing

# Collections that only the search reads.
_SEARCH = ('arch', 'quant_stats', 'cost', 'operands')
# Below this bound float32 holds every integer, so the search's sums are exact.
_EXACT = 2**24

Assignment = Mapping[str, tuple[str | None, str | None]]


@dataclasses.dataclass(frozen=True)
class Layer:
  """Description of one stored layer.

  Attributes:
    weights: format of the weights; None if they are not quantized.
    activations: format of the input activations; None if not quantized.
    shape: shape of the weights.
    largest_sum: bound on the magnitude of the op's partial sums for any input,
      in units of the grids' steps; None if the layer is not served in integers.
    variable: name of the parameter that holds the weights, `kernel` or
      `embedding`; empty for a product of attention, whose `weights` are keys
      and values.
    leading_shape: for an iteration of a scanned layer, the leading shape of its
      carried variables (`carried_variables.leading_shape`); empty otherwise.
    stacked: for an iteration of a scanned layer, the shape of the parameter
      with all iterations; empty otherwise.
  """

  weights: formats.NumericFormat | None
  activations: formats.NumericFormat | None
  shape: tuple[int, ...]
  largest_sum: int | None = None
  variable: str = 'kernel'
  leading_shape: tuple[int, ...] = ()
  stacked: tuple[int, ...] = ()

  @property
  def arithmetic(self) -> str:
    """Arithmetic of the served op: `int8`, or `float32` on grid values."""
    return 'float32' if self.largest_sum is None else 'int8'

  @property
  def exact(self) -> bool:
    """Whether the search, too, computes the op's sums without rounding.

    If so, serving in integers gives bit-equal results for every input. Sums of
    floats are rounded, and equal only if they are added in the same order.
    """
    return self.largest_sum is not None and self.largest_sum < _EXACT


def operand_recorder(apply: Callable, **kwargs: Any) -> Callable:
  """Returns a jitted `(variables, *args) -> {'operands': ...}`.

  Args:
    apply: the `apply` method of the search's model.
    **kwargs: keyword arguments of the model's call, static.
  """
  # The layers record the operands themselves, so there is no second formula for
  # a scale; inside jit, scales are rounded exactly as in the search.
  return jax.jit(
    lambda variables, *args: apply(
      variables, *args, **kwargs, mutable=['operands']
    )[1]
  )


def tensors(
  record: Callable,
  variables: Mapping[str, Any],
  assignment: Assignment,
  *args,
) -> tuple[dict[str, np.ndarray], dict[str, Layer]]:
  """Returns the tensors and layers of a model to store, at one architecture.

  Args:
    record: the model's `operand_recorder`.
    variables: collections of the model; `arch` holds the architecture, and the
      running statistics are settled for it.
    assignment: the same architecture as {layer: (weights, activations)}, names
      of formats or None.
    *args: example inputs of the model.

  Raises:
    ValueError: a layer's activations have a format but were never quantized in
      training, or a layer with a format is not called.
  """
  recorded = jax.device_get(record(dict(variables), *args))
  operands = _flat(recorded.get('operands', {}))
  flat = {
    name: np.asarray(jax.device_get(x))
    for name, x in _flat(
      {k: v for k, v in variables.items() if k not in _SEARCH}
    ).items()
  }
  stats = _flat(variables.get('quant_stats', {}))
  layers: dict[str, Layer] = {}
  replaced = set()
  for path, names in assignment.items():
    if join(path, 'activations') not in operands:
      if any(names):
        raise ValueError(
          f'{path or "the model"} has the formats {names}, but this call of '
          'the model does not run it; use the arguments that find_decisions got'
        )
      continue  # An intercepted layer that the spec excludes.
    module = _module(path)
    if names[1] is not None:
      _check_seen(module, stats)
    own = {
      name: operands[join(path, name)][0]
      for name in _OPERANDS
      if join(path, name) in operands
    }
    variable = _variable(flat, module) if 'values' in own else ''
    layer = _layer(names, own, variable)
    if path != module:
      layer = dataclasses.replace(
        layer,
        leading_shape=operands[join(module, 'leading_shape')][0].shape,
        stacked=flat[join('params', module, variable)].shape
        if variable
        else (),
      )
    for side in ('weights', 'activations'):
      if getattr(layer, side) is not None:
        flat[join('scales', path, side)] = own[side]
    if layer.weights is not None and variable:
      replaced.add(join('params', module, variable))
      flat[join('params', path, variable)] = packing.encode(
        own['values'], layer.weights
      )
    layers[path] = layer
  kept = {k: v for k, v in flat.items() if k not in replaced}
  stored = {name: flat[name] for name in quantized_names(layers)}
  return kept | stored, _in_one_arithmetic(layers)


# The operands that a layer, or an iteration of it, records.
_OPERANDS = ('values', 'weights', 'activations', 'integer_op')
# Statistics that are zero until activations are quantized for the first time.
_SEEN = ('active', 'count')


def _layer(names, operands, variable: str) -> Layer:
  weights, activations = (f and formats.parse(f) for f in names)
  shape = operands['values'].shape if variable else ()
  largest = None
  in_integers = all(f and f.is_integer for f in (weights, activations))
  if in_integers and operands.get('integer_op'):
    scale = operands['weights']
    summed = [i for i, n in enumerate(scale.shape) if n < shape[i]]
    sums = np.abs(operands['values']).sum(tuple(summed), dtype=np.float64)
    largest = int(sums.max() * activations.max_value)
  return Layer(weights, activations, shape, largest, variable)


def _variable(flat, path: str) -> str:
  names = layer_calls.WEIGHTS
  return next(name for name in names if join('params', path, name) in flat)


def _check_seen(path: str, stats: Mapping[str, Any]) -> None:
  """Raises ValueError if the activations of a layer have no scale yet."""
  for name, value in stats.items():
    own = name.startswith(f'{path}/' if path else '')
    if own and name.endswith(_SEEN) and not np.all(value):
      raise ValueError(
        f'the activations of {path or "the model"} were never quantized in '
        'this run, so they have no scale to export; train beyond '
        'quant.act_start'
      )


def _in_one_arithmetic(layers: dict[str, Layer]) -> dict[str, Layer]:
  """Returns the layers, each scanned layer with one arithmetic.

  One program runs all iterations of a scanned layer. It runs in integers only
  if every iteration can.
  """
  floats = {
    module
    for module, iterations in by_module(layers).items()
    if any(layer.largest_sum is None for layer in iterations)
  }
  return {
    path: dataclasses.replace(layer, largest_sum=None)
    if _module(path) in floats
    else layer
    for path, layer in layers.items()
  }


def by_module(layers: Mapping[str, Layer]) -> dict[str, list[Layer]]:
  """Returns {path of a module: its iterations}; one if it is not scanned."""
  modules: dict[str, dict[int, Layer]] = {}
  for path, layer in layers.items():
    iteration = int(path.partition('/@')[2] or 0)
    modules.setdefault(_module(path), {})[iteration] = layer
  return {
    path: [iterations[i] for i in sorted(iterations)]
    for path, iterations in modules.items()
  }


def _module(path: str) -> str:
  return path.partition('/@')[0]


def variables(
  flat: Mapping[str, Any], layers: Mapping[str, Layer]
) -> dict[str, Any]:
  """Returns the served model's collections from stored tensors.

  Args:
    flat: {name: tensor}, numpy arrays or traced arrays.
    layers: {layer path: description of the stored layer}.
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
  """Returns the parts of a name joined by slashes; empty parts are left out."""
  return '/'.join(part for part in parts if part)


def _flat(tree: Mapping) -> dict[str, Any]:
  return traverse_util.flatten_dict(tree, sep='/')
