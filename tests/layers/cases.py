"""Layers of every kind, and what a quantized one is given and multiplies."""

from collections.abc import Callable
import dataclasses
from typing import Any

import flax.linen as nn
import jax
import ml_dtypes
import numpy as np
import pytest

from fliqs_jax.layers import quant_layers
from fliqs_jax.numerics import clipping
from fliqs_jax.numerics import formats
from fliqs_jax.space import quant_spec
from tests import helpers

QUANTIZED = {
  nn.Conv: quant_layers.QuantConv,
  nn.Dense: quant_layers.QuantDense,
  nn.DenseGeneral: quant_layers.QuantDenseGeneral,
  nn.Einsum: quant_layers.QuantEinsum,
}
INTEGERS = ('INT4', 'INT5', 'INT6', 'INT7', 'INT8')
FLOATS = ('E2M1', 'E3M2', 'E4M3', 'E5M2', 'BF16')
MENU = formats.menu(INTEGERS + FLOATS)
SEPARATE = quant_spec.QuantSpec(MENU, mode='separate')
EXCLUDED = quant_spec.QuantSpec(MENU, exclude=('*',))
# Of the activations, as profiled. Against inputs of std 1 and the Laplacian
# multiples, INT4 clips at 4.0 * 0.3 = 1.2 and INT8 not at all.
ACT_STD = np.float32(0.3)


def _drop(scale, axes):
  return np.squeeze(scale, axes)


@dataclasses.dataclass(frozen=True)
class Case:
  """A layer, its input and how its weights meet its output.

  Attributes:
    linen: the linen class.
    kwargs: of the class.
    input_shape: of its input.
    summed: axes of the kernel that the op sums over.
    layout: lays the weights' scales (kernel's rank) out against the output;
      None: the summed axes drop out, the rest are the last axes of the output.
    kind: what the layer says that it is.
  """

  linen: type[nn.Module]
  kwargs: dict[str, Any]
  input_shape: tuple[int, ...]
  summed: tuple[int, ...]
  layout: Callable[[np.ndarray], np.ndarray] | None = None
  kind: str = 'dense'

  def plain(self, **kwargs):
    return self.linen(**self.kwargs, **kwargs)

  def quantized(self, spec=SEPARATE, **kwargs):
    return QUANTIZED[self.linen](**self.kwargs, **kwargs, spec=spec)

  def scale_of_output(self, scale):
    scale = np.asarray(scale)
    return self.layout(scale) if self.layout else _drop(scale, self.summed)


def conv(
  shape=(2, 7, 6, 4), kernel_size=(3, 3), features=6, kind='conv', **kwargs
):
  kwargs = dict(features=features, kernel_size=kernel_size, **kwargs)
  summed = tuple(range(len(kernel_size) + 1))
  return Case(nn.Conv, kwargs, shape, summed, kind=kind)


def einsum(einsum_str, input_shape, shape, summed, layout=None, **kwargs):
  kwargs = dict(shape=shape, einsum_str=einsum_str, **kwargs)
  return Case(nn.Einsum, kwargs, input_shape, summed, layout, 'einsum')


CASES = {
  'conv': conv(),
  'conv_dilated': conv(kernel_dilation=2, padding='VALID', use_bias=False),
  'conv_strided_grouped': conv(strides=(2, 1), feature_group_count=2),
  'conv_depthwise': conv(
    feature_group_count=4, features=4, strides=2, kind='depthwise'
  ),
  'conv_multiplier': conv(
    feature_group_count=4, features=8, padding=1, kind='depthwise'
  ),
  'conv_input_dilated': conv(input_dilation=2, padding=((2, 0), (0, 1))),
  'conv_circular': conv(padding='CIRCULAR'),
  'conv_1x1_unbatched': conv(
    (7, 6, 4), (1, 1), strides=(2, 1), kind='pointwise'
  ),
  'conv_of_one_channel': conv((2, 7, 6, 1)),
  'conv_small_map': conv((2, 2, 2, 4)),
  'conv_1d_causal': conv((2, 3, 9, 4), (3,), padding='CAUSAL'),
  'dense': Case(nn.Dense, dict(features=5), (2, 3, 8), (0,)),
  'dense_general': Case(
    nn.DenseGeneral, dict(features=(3, 4), axis=(-3, -1)), (5, 2, 6, 4), (0, 1)
  ),
  'dense_general_batch': Case(
    nn.DenseGeneral,
    dict(features=(5,), axis=-1, batch_dims=(0,)),
    (3, 4, 8),
    (1,),
    lambda scale: scale,  # Kernel [B, C, F] and output [B, N, F].
  ),
  'einsum_heads': einsum('btd,dhk->bthk', (2, 3, 8), (8, 2, 3), (0,)),
  'einsum_merge': einsum('...hk,hkd->...d', (2, 2, 4), (2, 4, 5), (0, 1)),
  'einsum_batch_label': einsum(
    'bge,gef->bgf', (4, 3, 8), (3, 8, 5), (1,), use_bias=False
  ),
  'einsum_permuted': einsum(
    'bc, dec -> ebd',
    (4, 8),
    (2, 3, 8),
    (2,),
    lambda scale: scale.transpose(1, 2, 0),  # d e 1 to e 1 d.
  ),
}
# Written as other sums than linen's on a CPU (fliqs_jax/linear.py).
REORDERED = ('conv_depthwise', 'conv_1x1_unbatched', 'conv_small_map')
CASE = pytest.mark.parametrize('case', CASES.values(), ids=CASES.keys())
# For comparisons of bits: one layer of each kind is compiled as users do.
_FIRST = {case.kind: name for name, case in reversed(CASES.items())}.values()
CASE_OF_BITS = pytest.mark.parametrize(
  'case',
  [
    pytest.param(
      case, id=name, marks=[pytest.mark.optimized] if name in _FIRST else []
    )
    for name, case in CASES.items()
  ],
)


def one_hot(name):
  return np.asarray([f.name == name for f in MENU], np.float32)


def stats(std=ACT_STD, menu=MENU, **kwargs):
  """Returns the `quant_stats` of a layer that has seen activations."""
  return dict(
    mean=np.float32(0),
    variance=np.float32(std) ** 2,
    largest=np.float32(1e3),  # Beyond every threshold.
    count=np.int32(1),
    active=np.bool_(True),
    clip=np.asarray(clipping.multiples('laplacian', menu), np.float32),
  ) | dict(kwargs)


def with_formats(params, weights, activations):
  arch = dict(weights=one_hot(weights), activations=one_hot(activations))
  return dict(params=params, arch=arch, quant_stats=stats())


def random_params(case, seed):
  shapes = jax.eval_shape(
    case.plain().init, jax.random.key(0), helpers.random(case.input_shape)
  )['params']
  return {k: helpers.random(v.shape, seed + len(k)) for k, v in shapes.items()}


def on_grid(x, name, threshold):
  """Returns values and scale, by numpy in float32."""
  fmt = formats.parse(name)
  if not fmt.scaled:
    return x.astype(ml_dtypes.bfloat16).astype(np.float32), np.float32(1)
  scale = threshold * np.float32(1 / fmt.max_value)
  x = np.clip(x * (1 / scale), -fmt.max_value, fmt.max_value)
  # frexp's fraction is in [.5, 1), so that its exponent is one too large.
  exponent = np.maximum(np.frexp(x)[1] - 1, fmt.min_exponent)
  step = exponent - fmt.mantissa_bits
  return np.ldexp(np.rint(np.ldexp(x, -step)), step), scale
