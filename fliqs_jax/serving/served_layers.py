"""Linen layers that run over stored low-bit weights.

Their parameters have the same names as in the search, but `kernel` is int8 for
integer formats and bfloat16, which holds every grid value, for float formats.
If weights and activations are both integers, the op runs in int8 with int32
accumulators; otherwise it runs on grid values in float32, as in the search.
`layers.quant_layers` does the rest.

Collections of a layer:
  params: `kernel` in the linen layer's shape, and `bias`.
  scales: `weights`, float32 in the kernel's shape with 1 for each summed axis,
    and `activations` [], float32.
  shifts: `kernel`, int32 in the shape of the weights' scales; only if the layer
    runs in the unsigned form of `int8_ops`.
"""

from typing import Any

import flax.linen as nn
import jax
from jax import lax
import jax.numpy as jnp

from fliqs_jax.layers import operands as operands_lib
from fliqs_jax.layers import quant_layers
from fliqs_jax.numerics import int8_ops
from fliqs_jax.numerics import quantize
from fliqs_jax.space import quant_spec


class ServedConv(nn.Conv):
  """`quant_layers.QuantConv` over stored weights.

  Attributes:
    spec: spec with an assignment, in which the layer's path is looked up.
  """

  spec: quant_spec.QuantSpec = quant_spec.QuantSpec(assignment={})

  @nn.compact
  def __call__(self, inputs: jax.Array) -> jax.Array:
    """Applies the convolution: [..., H, W, C] to [..., H', W', features]."""
    return quant_layers.apply(Stored(self, inputs), nn.Conv, inputs)


class ServedDense(nn.Dense):
  """`quant_layers.QuantDense` over stored weights.

  Attributes:
    spec: spec with an assignment, in which the layer's path is looked up.
  """

  spec: quant_spec.QuantSpec = quant_spec.QuantSpec(assignment={})

  @nn.compact
  def __call__(self, inputs: jax.Array) -> jax.Array:
    """Applies the layer: [..., C] to [..., features]."""
    return quant_layers.apply(Stored(self, inputs), nn.Dense, inputs)


class ServedDenseGeneral(nn.DenseGeneral):
  """`quant_layers.QuantDenseGeneral` over stored weights.

  Attributes:
    spec: spec with an assignment, in which the layer's path is looked up.
  """

  spec: quant_spec.QuantSpec = quant_spec.QuantSpec(assignment={})

  @nn.compact
  def __call__(self, inputs: jax.Array) -> jax.Array:
    """Applies the layer over `axis` of the inputs."""
    return quant_layers.apply(Stored(self, inputs), nn.DenseGeneral, inputs)


class ServedEinsum(nn.Einsum):
  """`quant_layers.QuantEinsum` over stored weights.

  Attributes:
    spec: spec with an assignment, in which the layer's path is looked up.
  """

  spec: quant_spec.QuantSpec = quant_spec.QuantSpec(assignment={})

  @nn.compact
  def __call__(
    self, inputs: jax.Array, einsum_str: str | None = None
  ) -> jax.Array:
    """Applies the contraction of the inputs with the kernel."""
    einsum_str = nn.merge_param('einsum_str', self.einsum_str, einsum_str)
    return quant_layers.apply_einsum(Stored(self, inputs), einsum_str, inputs)


class Stored(operands_lib.Operands):
  """Operands of a served layer: stored weights, and rounded activations."""

  def __init__(
    self,
    module: nn.Module,
    inputs: jax.Array,
    choices: quant_spec.Choices | None = None,
    state: Any = None,
  ):
    """Initializes the operands of one call.

    Args:
      module: the bound linen layer.
      inputs: input of the layer's call.
      choices: formats of the layer; None: those of `module.spec`. Several
        formats on a side are those of a scanned layer's iterations; the
        collection `arch` selects the iteration's own.
      state: variables of the layer; None: those of `module` itself.
    """
    spec = None if choices is None else quant_spec.QuantSpec()
    super().__init__(module, inputs, spec, state)
    self.choices = choices or self.choices

  @property
  def in_integers(self) -> bool:
    """Whether the op runs in int8 with int32 accumulators."""
    sides = (self.choices.weights, self.choices.activations)
    return self.has_integer_op and all(
      menu and all(f.is_integer for f in menu) for menu in sides
    )

  @property
  def accumulator(self) -> Any:
    """Dtype of the op's sums."""
    return jnp.int32 if self.in_integers else jnp.float32

  def __call__(self, x, w, contracted):
    """Returns activations and stored weights on their grids."""
    del contracted  # The shape of the stored scale shows it.
    w = quantize.unquantized(w)
    if self.choices.weights is not None:
      scale = self.state.get_variable('scales', 'weights')
      w = quantize.Quantized(w.values, scale)
    x = self.rounded(x, 'activations')
    if self.in_integers:
      return quantize.Quantized(x.values.astype(jnp.int8), x.scale), w
    return self._compute_dtype(x), self._compute_dtype(w)

  def record(self, *cost) -> None:
    """Does nothing: a served model has no cost to search with."""
    del cost

  def conv(self, x, w, window_strides, padding, **kwargs):
    """Returns the convolution of both operands, float32."""
    if not self.in_integers:
      return super().conv(x, w, window_strides, padding, **kwargs)
    del kwargs['precision']  # Integer products have one precision only.
    y = int8_ops.conv_general_dilated(
      x.values, w.values, window_strides, padding, **kwargs, shift=self._shift()
    )
    return y.astype(jnp.float32)

  def dot_general(self, x, w, dimension_numbers, precision):
    """Returns the product of both operands, float32."""
    if not self.in_integers:
      return super().dot_general(x, w, dimension_numbers, precision)
    y = int8_ops.dot_general(
      x.values, w.values, dimension_numbers, shift=self._shift()
    )
    return y.astype(jnp.float32)

  def keep(self, *arrays, dtype):
    """Returns input, kernel and bias; only the input's dtype changes."""
    del dtype
    inputs, kernel, bias = arrays
    return inputs.astype(jnp.float32), kernel, bias

  def rounded(self, x: jax.Array, side: str) -> quantize.Quantized:
    """Returns activations [...] on the grid of a side, float32."""
    menu = getattr(self.choices, side)
    x = x.astype(jnp.float32)
    if menu is None:
      return quantize.unquantized(x)
    scale = self.state.get_variable('scales', side)
    if len(menu) == 1:
      grid = quantize.grid_of(menu[0])
    else:
      grid = quantize.select(menu, self.state.get_variable('arch', side))
    x = x * (1.0 / scale)
    if self.in_integers:
      # Equals `round_to_grid`, since all steps of the grid are 1.
      x = jnp.clip(x, -grid.max_value, grid.max_value)
      x = lax.round(x, lax.RoundingMethod.TO_NEAREST_EVEN)
    else:
      x = quantize.round_to_grid(x, grid)
    return quantize.Quantized(x, scale)

  def _shift(self):
    if not self.state.has_variable('shifts', 'kernel'):
      return None
    return self.state.get_variable('shifts', 'kernel')
