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

import flax.linen as nn
import jax
from jax import lax
import jax.numpy as jnp

from fliqs_jax import formats
from fliqs_jax import integer
from fliqs_jax import layers
from fliqs_jax import operands as operands_lib
from fliqs_jax import quant_spec
from fliqs_jax import quantize


class ServedConv(nn.Conv):
  """`layers.QuantConv`, served.

  Attributes:
    spec: an assignment; matched against the layer's path.
  """

  spec: quant_spec.QuantSpec = quant_spec.QuantSpec(assignment={})

  @nn.compact
  def __call__(self, inputs: jax.Array) -> jax.Array:
    """Applies the convolution: [..., H, W, C] to [..., H', W', features]."""
    return layers.apply(_Stored(self, inputs), nn.Conv, inputs)


class ServedDense(nn.Dense):
  """`layers.QuantDense`, served.

  Attributes:
    spec: an assignment; matched against the layer's path.
  """

  spec: quant_spec.QuantSpec = quant_spec.QuantSpec(assignment={})

  @nn.compact
  def __call__(self, inputs: jax.Array) -> jax.Array:
    """Applies the layer: [..., C] to [..., features]."""
    return layers.apply(_Stored(self, inputs), nn.Dense, inputs)


class ServedDenseGeneral(nn.DenseGeneral):
  """`layers.QuantDenseGeneral`, served.

  Attributes:
    spec: an assignment; matched against the layer's path.
  """

  spec: quant_spec.QuantSpec = quant_spec.QuantSpec(assignment={})

  @nn.compact
  def __call__(self, inputs: jax.Array) -> jax.Array:
    """Applies the layer over `axis` of the inputs."""
    return layers.apply(_Stored(self, inputs), nn.DenseGeneral, inputs)


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
    return layers.apply_einsum(_Stored(self, inputs), einsum_str, inputs)


def in_integers(
  weights: formats.NumericFormat | None,
  activations: formats.NumericFormat | None,
) -> bool:
  """Returns whether a layer of these formats is served in integers."""
  return all(f and f.name.startswith('INT') for f in (weights, activations))


class _Stored(operands_lib.Operands):
  """The operands of a served layer: weights as stored, activations rounded."""

  def __init__(self, module: nn.Module, inputs: jax.Array):
    super().__init__(module, inputs)
    menus = (self.choices.weights, self.choices.activations)
    self.weights, self.activations = (menu and menu[0] for menu in menus)
    self.in_integers = in_integers(self.weights, self.activations)
    self.accumulator = jnp.int32 if self.in_integers else jnp.float32

  def __call__(self, x, w, contracted):
    del contracted  # It shows in the scale.
    x = quantize.unquantized(x.astype(jnp.float32))
    w = quantize.unquantized(w)
    if self.weights is not None:
      scale = self.module.get_variable('scales', 'weights')
      w = quantize.Quantized(w.values, scale)
    if self.activations is not None:
      x = self._rounded(x.values)
    if self.in_integers:
      return x, w
    return self._compute_dtype(x), self._compute_dtype(w)

  def record(self, *cost) -> None:
    del cost  # What is served has been paid for.

  def conv(self, x, w, window_strides, padding, **kwargs):
    if not self.in_integers:
      return super().conv(x, w, window_strides, padding, **kwargs)
    del kwargs['precision']  # Integers have but one.
    y = integer.conv_general_dilated(
      x.values, w.values, window_strides, padding, **kwargs, shift=self._shift()
    )
    return y.astype(jnp.float32)

  def dot_general(self, x, w, dimension_numbers, precision):
    if not self.in_integers:
      return super().dot_general(x, w, dimension_numbers, precision)
    y = integer.dot_general(
      x.values, w.values, dimension_numbers, shift=self._shift()
    )
    return y.astype(jnp.float32)

  def keep(self, *arrays, dtype):
    del dtype
    inputs, kernel, bias = arrays
    return inputs.astype(jnp.float32), kernel, bias

  def _rounded(self, x):
    scale = self.module.get_variable('scales', 'activations')
    if not self.in_integers:
      grid = quantize.grid_of(self.activations)
      return quantize.Quantized(
        quantize.round_to_grid(x * (1.0 / scale), grid), scale
      )
    # What `round_to_grid` comes to where all steps are 1.
    limit = self.activations.max_value
    x = jnp.clip(x * (1.0 / scale), -limit, limit)
    x = lax.round(x, lax.RoundingMethod.TO_NEAREST_EVEN)
    return quantize.Quantized(x.astype(jnp.int8), scale)

  def _shift(self):
    if not self.module.has_variable('shifts', 'kernel'):
      return None
    return self.module.get_variable('shifts', 'kernel')
