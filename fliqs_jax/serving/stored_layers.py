"""Descriptions of stored layers, as the manifest of an export has them."""

from collections.abc import Mapping
import dataclasses

from fliqs_jax.numerics import formats

# Below this bound float32 holds every integer, so the search's sums are exact.
_EXACT = 2**24


@dataclasses.dataclass(frozen=True)
class Layer:
  """Description of one stored product, or of one iteration of it.

  Attributes:
    weights: format of the weights; None if they are not quantized.
    activations: format of the input activations; None if not quantized.
    shape: shape of the weights; () if they are activations, too.
    largest_sum: bound on the magnitude of the op's partial sums for any input,
      in units of the grids' steps; None if the product is not served in
      integers.
    tensor: name of the tensor of the packed weights; empty if there is none.
  """

  weights: formats.NumericFormat | None
  activations: formats.NumericFormat | None
  shape: tuple[int, ...]
  largest_sum: int | None = None
  tensor: str = ''

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


def by_product(layers: Mapping[str, Layer]) -> dict[str, list[Layer]]:
  """Returns {path of a product: its iterations}; one if it is not scanned."""
  products: dict[str, dict[int, Layer]] = {}
  for path, layer in layers.items():
    product, _, iteration = path.rpartition('@')
    if not iteration.isdigit():
      product, iteration = path, '0'
    products.setdefault(product.rstrip('/'), {})[int(iteration)] = layer
  return {
    path: [iterations[i] for i in sorted(iterations)]
    for path, iterations in products.items()
  }


def packed(layers: Mapping[str, Layer]) -> dict[str, Layer]:
  """Returns {name of a tensor of packed weights: the first layer it is of}."""
  result: dict[str, Layer] = {}
  for layer in layers.values():
    if layer.weights is not None and layer.tensor:
      result.setdefault(layer.tensor, layer)
  return result
