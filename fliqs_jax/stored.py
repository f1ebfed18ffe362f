"""What is stored of a network: its tensors by name, and back to variables.

A name is a variable's path, collection first: `params/head/kernel` holds the
weights of the layer `head` in the layout of `packing`, `scales/head/weights`
their scales. Whatever is not the weights of a quantized layer is float32, and
of those nothing else is kept.
"""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any

from flax import traverse_util
import jax
import numpy as np

from fliqs_jax import formats
from fliqs_jax import packing
from fliqs_jax import served_layers

# Collections that only the search reads.
_SEARCH = ('arch', 'quant_stats', 'cost', 'operands')
# Up to here float32 holds every integer, so that the search's sums are exact.
_EXACT = 2**24

Assignment = Mapping[str, tuple[str | None, str | None]]


@dataclasses.dataclass(frozen=True)
class Layer:
  """What is stored of one layer.

  Attributes:
    weights: format of the weights; None where not quantized.
    activations: format of the input activations, or None.
    shape: of the kernel.
    largest_sum: bound on the magnitude of the op's partial sums in units of the
      grids, for any input; None where the layer is not served in integers.
  """

  weights: formats.NumericFormat | None
  activations: formats.NumericFormat | None
  shape: tuple[int, ...]
  largest_sum: int | None = None

  @property
  def arithmetic(self) -> str:
    """`int8`, or `float32` on grid values."""
    integers = served_layers.in_integers(self.weights, self.activations)
    return 'int8' if integers else 'float32'

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
    ValueError: activations that are to be quantized never were.
  """
  told = _flat(jax.device_get(tell(dict(variables), *args)).get('operands', {}))
  flat = _flat(
    {k: v for k, v in variables.items() if k not in _SEARCH},
  )
  flat = {name: np.asarray(jax.device_get(x)) for name, x in flat.items()}
  stats = _flat(variables.get('quant_stats', {}))
  stored = {}
  for path, (weights, activations) in assignment.items():
    weights, activations = (
      f and formats.parse(f) for f in (weights, activations)
    )
    kernel = _join('params', path, 'kernel')
    # A layer that is called twice tells the same twice.
    w, x_scale = (
      told[_join(path, 'weights')][0],
      told[_join(path, 'activations')][0],
    )
    if activations is not None:
      if not np.asarray(stats[_join(path, 'active')]):
        raise ValueError(
          f'the activations of {path} were never quantized in this run '
          '(quant.act_start); there is nothing to export for them'
        )
      flat[_join('scales', path, 'activations')] = x_scale
    shape = flat[kernel].shape
    largest = None
    if weights is not None:
      flat[kernel] = packing.encode(w.values, weights)
      flat[_join('scales', path, 'weights')] = w.scale
    if served_layers.in_integers(weights, activations):
      summed = [i for i, n in enumerate(w.scale.shape) if n < shape[i]]
      sums = np.abs(w.values).sum(tuple(summed), dtype=np.float64)
      largest = int(sums.max() * activations.max_value)
    stored[path] = Layer(weights, activations, shape, largest)
  return flat, stored


def variables(
  flat: Mapping[str, Any], layers: Mapping[str, Layer]
) -> dict[str, Any]:
  """Returns the served model's collections from stored tensors.

  Args:
    flat: {name: tensor}; numpy, or traced.
    layers: {layer path: what is stored of it}.
  """
  flat = dict(flat)
  for path, layer in layers.items():
    name = _join('params', path, 'kernel')
    if layer.weights is not None:
      flat[name] = packing.decode(flat[name], layer.weights, layer.shape)
  return traverse_util.unflatten_dict(flat, sep='/')


def quantized_names(layers: Mapping[str, Layer]) -> dict[str, Layer]:
  """Returns {name of the tensor of quantized weights: its layer}."""
  return {
    _join('params', path, 'kernel'): layer
    for path, layer in layers.items()
    if layer.weights is not None
  }


def _join(*parts: str) -> str:
  return '/'.join(part for part in parts if part)


def _flat(tree: Mapping) -> dict[str, Any]:
  return traverse_util.flatten_dict(tree, sep='/')
