"""Linen's own layers with a quantized op, whose formats `arch` selects.

Each layer is the linen layer of the same name (same parameters, same options)
in which the one multiplication is replaced: both operands are put on the grid
of a format that the `arch` collection selects, the op runs on grid values with
a float32 accumulator, and the scales are applied to its result.

If the sizes of a layer are open, inactive input channels and inactive taps of
its kernel have no influence on scales and statistics.

Collections, per layer:
  arch: `format` [K] one-hot, or `weights` and `activations` [K]; probabilities
    instead if `QuantSpec.mix` makes the layer a relaxed one. If sizes are open,
    `input_channels`, `output_channels` and `kernel` [K].
  quant_stats: `mean`, `variance`, `largest` [], running statistics of the
    input; `count` [], batches seen; `active` [], whether activations are
    quantized yet; `clip` [K], the multiple of the standard deviation for each
    format. With strategies, `ratio` [K] and `weight_ratio` [K, channels], the
    thresholds over the largest magnitudes.
  cost: `ops`, a static `ops.OpShape` per call.
"""

from collections.abc import Callable
import functools

import flax.linen as nn
import jax

from fliqs_jax.layers import quant_ops
from fliqs_jax.space import quant_spec
from fliqs_jax.space import sizes


class QuantConv(nn.Conv):
  """`nn.Conv` (any stride, dilation, groups) with a searchable format.

  Its other fields are those of `nn.Conv`. Operands are quantized as in Eq. 10
  and 11, one scale per output channel for the weights and one for the input.

  Attributes:
    spec: the formats that the layer may use, by rules on the layer's path.
    input_channels: the possible numbers of active channels of the input; None:
      all are active.
    output_channels: the possible numbers of active channels of the output;
      None: all are active.
    kernel: the possible sizes of the kernel, of which `kernel_size` is the
      largest; needs `SAME` padding. None: `kernel_size` is the only one.
  """

  spec: quant_spec.QuantSpec = quant_spec.QuantSpec()
  input_channels: sizes.Channels | None = None
  output_channels: sizes.Channels | None = None
  kernel: sizes.Kernel | None = None

  @nn.compact
  def __call__(self, inputs: jax.Array) -> jax.Array:
    """Applies the convolution: [..., H, W, C] to [..., H', W', features].

    Raises:
      ValueError: a size of the kernel does not fit the padding, the dilation,
        the stride or the size of the input.
    """
    if self.kernel is not None:
      _check_kernel(self, inputs.shape)
      if self.kernel.has_branches:
        return quant_ops.branched_conv(self, inputs)
    return quant_ops.apply(self, nn.Conv, inputs)


class QuantDense(nn.Dense):
  """`nn.Dense` with a searchable format.

  Its other fields are those of `nn.Dense`. Operands are quantized as in Eq. 10
  and 11, one scale per output channel for the weights and one for the input.

  Attributes:
    spec: the formats that the layer may use, by rules on the layer's path.
    input_channels: the possible numbers of active channels of the input; None:
      all are active.
    output_channels: the possible numbers of active channels of the output;
      None: all are active.
  """

  spec: quant_spec.QuantSpec = quant_spec.QuantSpec()
  input_channels: sizes.Channels | None = None
  output_channels: sizes.Channels | None = None

  @nn.compact
  def __call__(self, inputs: jax.Array) -> jax.Array:
    """Applies the layer: [..., C] to [..., features]."""
    return quant_ops.apply(self, nn.Dense, inputs)


class QuantDenseGeneral(nn.DenseGeneral):
  """`nn.DenseGeneral` with a searchable format.

  Its other fields are those of `nn.DenseGeneral`; operands are quantized as in
  `QuantDense`.

  Attributes:
    spec: the formats that the layer may use, by rules on the layer's path.
  """

  spec: quant_spec.QuantSpec = quant_spec.QuantSpec()

  @nn.compact
  def __call__(self, inputs: jax.Array) -> jax.Array:
    """Applies the layer: contracts the axes `axis` of [...] to `features`."""
    return quant_ops.apply(self, nn.DenseGeneral, inputs)


class QuantEinsum(nn.Einsum):
  """`nn.Einsum` with a searchable format.

  Its other fields are those of `nn.Einsum`; operands are quantized as in
  `QuantDense`.

  Attributes:
    spec: the formats that the layer may use, by rules on the layer's path.
  """

  spec: quant_spec.QuantSpec = quant_spec.QuantSpec()

  @nn.compact
  def __call__(
    self, inputs: jax.Array, einsum_str: str | None = None
  ) -> jax.Array:
    """Contracts the inputs [...] with the kernel, as the einsum string says."""
    einsum_str = nn.merge_param('einsum_str', self.einsum_str, einsum_str)
    return quant_ops.apply_einsum(self, einsum_str, inputs)


def with_spec(
  layer: type[nn.Module], spec: quant_spec.QuantSpec
) -> Callable[..., nn.Module]:
  """Returns the constructor of a layer with its `spec` given.

  Args:
    layer: a layer class that has a `spec`, such as `QuantConv`.
    spec: the formats that the layers may use, by rules on their paths.

  Returns:
    A function that takes the other fields of the layer, as `nn.Conv` does.
  """
  return functools.partial(layer, spec=spec)


def _check_kernel(module: QuantConv, shape: tuple[int, ...]) -> None:
  """Raises ValueError for sizes of a kernel that the layer cannot have."""
  kernel, path = module.kernel, '/'.join(module.path)
  if module.padding != 'SAME':
    raise ValueError(
      f'{path}: padding={module.padding!r} fits kernels of one size only; a '
      "kernel of several sizes needs padding='SAME'"
    )
  dilations = module.input_dilation, module.kernel_dilation
  is_dilated = any(d not in (None, 1, (1, 1)) for d in dilations)
  if kernel.has_branches and (is_dilated or module.mask is not None):
    raise ValueError(
      f'{path}: branches of a kernel can have neither dilation nor mask; use '
      "sizes.kernel_weights='masked' or one size"
    )
  strides = module.strides or 1
  stride = strides if isinstance(strides, int) else max(strides)
  if kernel.is_masked and min(kernel.labels) < stride:
    raise ValueError(
      f'{path}: at a stride of {stride} a kernel of {min(kernel.labels)} reads '
      'other pixels than the centre of a larger one; remove it from '
      f'sizes.kernels={kernel.labels}'
    )
  height, width = shape[-3:-1]
  if len(kernel.labels) > 1 and kernel.size > 2 * min(height, width) - 1:
    raise ValueError(
      f'{path}: on a map of {height}x{width} the outermost taps of a kernel of '
      f'{kernel.size} see only padding; remove {kernel.size} from '
      f'sizes.kernels={kernel.labels} or use larger images'
    )
