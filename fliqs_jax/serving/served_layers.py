"""Linen's own layers over stored low-bit weights: the search's layers, served.

Same parameters by name, but `kernel` is int8 (integer formats) or bfloat16
(floats; it holds every grid value). Where weights and activations are both
integers the op runs in int8 with int32 accumulators, else on grid values in
float32 as in the search. Everything around the op is `layers`'.

Collections, per layer:
  params: `kernel`, in the linen layer's shape; `bias`.
  scales: `weights`, the shape that the kernel has without the summed axes'
    extent; `activations` [].
  shifts: `kernel`, int32 of the shape of `scales`' `weights`; only where the
    layer is served in the unsigned form of `integer`.
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
  """`layers.QuantConv`, served.

  Attributes:
    spec: an assignment; matched against the layer's path.
  """

  spec: quant_spec.QuantSpec = quant_spec.QuantSpec(assignment={})

  @nn.compact
  def __call__(self, inputs: jax.Array) -> jax.Array:
    """Applies the convolution: [..., H, W, C] to [..., H', W', features]."""
    return quant_layers.apply(Stored(self, inputs), nn.Conv, inputs)


class ServedDense(nn.Dense):
  """`layers.QuantDense`, served.

  Attributes:
    spec: an assignment; matched against the layer's path.
  """

  spec: quant_spec.QuantSpec = quant_spec.QuantSpec(assignment={})

  @nn.compact
  def __call__(self, inputs: jax.Array) -> jax.Array:
    """Applies the layer: [..., C] to [..., features]."""
    return quant_layers.apply(Stored(self, inputs), nn.Dense, inputs)


class ServedDenseGeneral(nn.DenseGeneral):
  """`layers.QuantDenseGeneral`, served.

  Attributes:
    spec: an assignment; matched against the layer's path.
  """

  spec: quant_spec.QuantSpec = quant_spec.QuantSpec(assignment={})

  @nn.compact
  def __call__(self, inputs: jax.Array) -> jax.Array:
    """Applies the layer over `axis` of the inputs."""
    return quant_layers.apply(Stored(self, inputs), nn.DenseGeneral, inputs)


class ServedEinsum(nn.Einsum):
  """`layers.QuantEinsum`, served.

  Attributes:
    spec: an assignment; matched against the layer's path.
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
  """The operands of a served layer: weights as stored, activations rounded."""

  def __init__(
    self,
    module: nn.Module,
    inputs: jax.Array,
    choices: quant_spec.Choices | None = None,
    state: Any = None,
  ):
    """Keeps what decides how the layer is served.

    Args:
      module: the layer.
      inputs: of the layer.
      choices: the formats it has, unless `module.spec` says so; several on a
        side are those of the steps of a scanned layer, of which the collection
        `arch` has the step's own.
      state: as of `operands.Operands`.
    """
    spec = None if choices is None else quant_spec.QuantSpec()
    super().__init__(module, inputs, spec, state)
    self.choices = choices or self.choices

  @property
  def in_integers(self) -> bool:
    """Whether the layer is served in integers."""
    sides = (self.choices.weights, self.choices.activations)
    return self.has_integer_op and all(
      menu and all(f.is_integer for f in menu) for menu in sides
    )

  @property
  def accumulator(self) -> Any:
    """Type of the op's sums."""
    return jnp.int32 if self.in_integers else jnp.float32

  def __call__(self, x, w, contracted):
    del contracted  # It shows in the scale.
    w = quantize.unquantized(w)
    if self.choices.weights is not None:
      scale = self.state.get_variable('scales', 'weights')
      w = quantize.Quantized(w.values, scale)
    x = self.rounded(x, 'activations')
    if self.in_integers:
      return quantize.Quantized(x.values.astype(jnp.int8), x.scale), w
    return self._compute_dtype(x), self._compute_dtype(w)

  def record(self, *cost) -> None:
    del cost  # What is served has been paid for.

  def conv(self, x, w, window_strides, padding, **kwargs):
    if not self.in_integers:
      return super().conv(x, w, window_strides, padding, **kwargs)
    del kwargs['precision']  # Integers have but one.
    y = int8_ops.conv_general_dilated(
      x.values, w.values, window_strides, padding, **kwargs, shift=self._shift()
    )
    return y.astype(jnp.float32)

  def dot_general(self, x, w, dimension_numbers, precision):
    if not self.in_integers:
      return super().dot_general(x, w, dimension_numbers, precision)
    y = int8_ops.dot_general(
      x.values, w.values, dimension_numbers, shift=self._shift()
    )
    return y.astype(jnp.float32)

  def keep(self, *arrays, dtype):
    del dtype
    inputs, kernel, bias = arrays
    return inputs.astype(jnp.float32), kernel, bias

  def rounded(self, x: jax.Array, side: str) -> quantize.Quantized:
    """Returns activations [...] on the grid of a side, float32."""
    menu, x = getattr(self.choices, side), x.astype(jnp.float32)
    if menu is None:
      return quantize.unquantized(x)
    scale = self.state.get_variable('scales', side)
    if len(menu) == 1:
      grid = quantize.grid_of(menu[0])
    else:
      grid = quantize.select(menu, self.state.get_variable('arch', side))
    x = x * (1.0 / scale)
    if self.in_integers:
      # What `round_to_grid` comes to where all steps are 1.
      x = jnp.clip(x, -grid.max_value, grid.max_value)
      x = lax.round(x, lax.RoundingMethod.TO_NEAREST_EVEN)
    else:
      x = quantize.round_to_grid(x, grid)
    return quantize.Quantized(x, scale)

  def _shift(self):
    if not self.state.has_variable('shifts', 'kernel'):
      return None
    return self.state.get_variable('shifts', 'kernel')
