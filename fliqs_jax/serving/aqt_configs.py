"""AQT configs of searched layers, for search, training and serving.

The only file that imports aqt (aqtp 0.9). In: `searched()` is the config of a
codebase that threads AQT's; `fliqs.searchable` finds its products. `config`
trains at formats that may be traced. Out: `read(DIR)` has the configs of an
export's layers, `dot_general_cls` gives them to a linen model by path, and
`converted` stores its weights in AQT's types.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import os
from typing import Any, NamedTuple

from aqt.jax.v2 import aqt_dot_general
from aqt.jax.v2 import aqt_quantizer
from aqt.jax.v2 import calibration
from aqt.jax.v2 import utils as aqt
from aqt.jax.v2.flax import aqt_flax
from aqt.jax.v2.numerics import numerics
from flax import struct
from flax import traverse_util
import flax.linen as nn
import jax
from jax import ad_checkpoint
from jax import lax
import jax.numpy as jnp

from fliqs_jax.numerics import float_ops
from fliqs_jax.numerics import formats
from fliqs_jax.numerics import int8_ops
from fliqs_jax.numerics import quantize
from fliqs_jax.program import equations
from fliqs_jax.program import products as products_lib
from fliqs_jax.serving import export_files
from fliqs_jax.serving import stored_layers

# The types of jax that hold the whole grid of a format at its own scale.
# Integers of other widths lie in int8. The float8 types end below our largest
# values, and XLA has no float6.
_CONTAINERS: dict[str, Any] = {
  **{f'INT{bits}': jnp.int8 for bits in range(2, 9)},
  'INT4': jnp.int4,
  'E2M1': jnp.float4_e2m1fn,
  'BF16': jnp.bfloat16,
}
MODES = dict(convert=aqt.QuantMode.CONVERT, serve=aqt.QuantMode.SERVE)
# Collections: AQT's, of stored weights and scales; and what took a config.
_STORED, _TAKEN = 'aqt', 'aqt_taken'


@struct.dataclass(frozen=False, kw_only=True)
class FormatNumerics(numerics.AqtNumerics):
  """A format as AQT's numerics; it may be traced.

  Attributes:
    grid: numbers of the format.
    container: type of the values; None: float32.
  """

  grid: quantize.Grid
  container: Any = struct.field(pytree_node=False, default=None)

  def get_dtype(self) -> Any:
    """Returns the type of the values."""
    return self.container or jnp.float32

  def get_quant_bound(self) -> Any:
    """Returns the largest value of the grid."""
    return self.grid.max_value

  def vjp_fwd(self, x: jax.Array, context: Any) -> tuple[jax.Array, Any]:
    """Returns x [...], in units of the grid, on it; and where it was inside."""
    del context
    # The largest element of a channel defines its threshold. Divided by its
    # scale, it may be two steps of float32 beyond the largest value.
    inside = jnp.abs(x) <= self.grid.max_value * (1 + 2.0**-22)
    return quantize.round_to_grid(x, self.grid).astype(self.get_dtype()), inside

  @staticmethod  # A bound method would hold tracers where JAX compares values.
  def vjp_bwd(inside: jax.Array, grad: jax.Array) -> tuple[jax.Array]:
    """Returns the straight-through gradient [...] (Eq. 10, 11)."""
    return (jnp.where(inside, grad, 0.0),)


@struct.dataclass(frozen=False, kw_only=True)
class FormatCalibration(calibration.Calibration):
  """The scale of a format: given, or that of the largest magnitude.

  Attributes:
    scale: float32 [], or of the operand's rank; None: of the largest magnitude
      along the axes that share a scale.
  """

  scale: Any = None

  def get_scale_and_bias_and_sparsity(
    self,
    x: jax.Array,
    shared_axes: Sequence[int] | None,
    numerics_: numerics.AqtNumerics,
    context: Any = None,
  ) -> tuple[list[jax.Array], list[jax.Array], None]:
    """Returns one scale, no bias and no mask."""
    del context
    scale = self.scale
    if scale is None:
      peak = jnp.max(jnp.abs(x), axis=tuple(shared_axes or ()), keepdims=True)
      scale = quantize.scale_of(peak.astype(jnp.float32), numerics_.grid)
    elif jnp.ndim(scale) == 0:
      scale = jnp.reshape(scale, (1,) * x.ndim)
    return [scale], [], None


@struct.dataclass(frozen=False, kw_only=True)
class _Quantizer(aqt_quantizer.Quantizer):
  """AQT's quantizer, whose format and scale are data and may be traced."""

  numerics: Any
  _calibrator: Any = None

  def init_calibration(self) -> None:
    """Does nothing: the calibration is given, not a class to construct."""


class Operand(NamedTuple):
  """How an operand is quantized.

  Attributes:
    grid: `quantize.grid_of(format)`, or `quantize.select(menu, one_hot)`.
    scale: float32 [], or of the operand's rank: `quantize.scale_of` of a
      threshold; None: of the largest magnitude in a channel.
    container: type of the values; None: float32.
  """

  grid: quantize.Grid
  scale: jax.Array | None = None
  container: Any = None


def config(
  activations: Operand | None, weights: Operand | None
) -> aqt_dot_general.DotGeneral:
  """Returns AQT's config of a product with the numbers of a search.

  A layer takes it as `dot_general`, or in `aqt_flax.AqtDotGeneral` and
  `AqtEinsum`. Products run on grid values and their scales are applied
  afterwards, that of the activations first.

  Args:
    activations: the left operand; None: it is not quantized.
    weights: the right operand; None: it is not quantized.
  """
  made = aqt_dot_general.dot_general_make()
  quantizer = made.fwd.dg_quantizer
  if activations is not None:
    quantizer.lhs = _quantizer(activations)
  if weights is not None:
    quantizer.rhs = _quantizer(weights)
  # Gradients are those at the values on the grid.
  made.drhs.rhs.use_fwd_quant = activations is not None
  made.dlhs.rhs.use_fwd_quant = weights is not None
  made.fwd.dot_general = _dot_general
  return made


def searched() -> aqt_dot_general.DotGeneral:
  """Returns the config of a codebase whose model is searched.

  It changes nothing by itself. `fliqs.searchable(model)` finds the products of
  every layer that has it, names them after their parameters, and gives them
  formats.
  """
  made = aqt_dot_general.dot_general_make()
  made.fwd.dot_general = _open_dot_general
  return made


def read(
  directory: str | os.PathLike[str],
) -> dict[str, aqt_dot_general.DotGeneral]:
  """Returns {path of a layer: AQT's config} of an export.

  Args:
    directory: what `export` or `export_model` wrote: formats and scales.

  Raises:
    ValueError: AQT cannot hold a layer; the message names all of them.
  """
  content = export_files.read(directory)
  made, refused = {}, []
  for path, iterations in stored_layers.by_product(content.layers).items():
    layer, *others = iterations
    if reason := _refusal(path, layer, bool(others)):
      refused.append(f'{path}: {reason}')
    else:
      made[path] = _stored_config(path, layer, content.tensors)
  if refused:
    raise ValueError(
      f'{directory}: AQT cannot hold {"; ".join(refused)}. Search among '
      f'{", ".join(_CONTAINERS)} and exclude such layers, or serve the export '
      'by serving.load'
    )
  return made


def dot_general_cls(
  configs: Mapping[str, aqt_dot_general.DotGeneral], mode: str
) -> Any:
  """Returns what linen layers take as `dot_general_cls`.

  Args:
    configs: {path of a layer: its config}; other layers are not quantized.
    mode: `convert`, which quantizes weights and stores them; or `serve`.

  Raises:
    ValueError: the mode is unknown.
  """
  if mode not in MODES:
    raise ValueError(f'mode={mode!r} is unknown; allowed: {", ".join(MODES)}')
  return functools.partial(_DotGeneral, configs=configs, mode=MODES[mode])


def converted(
  model: nn.Module,
  configs: Mapping[str, aqt_dot_general.DotGeneral],
  variables: Mapping[str, Any],
  *args: Any,
  **kwargs: Any,
) -> dict[str, Any]:
  """Returns the variables of a model for AQT's SERVE.

  Args:
    model: a linen module with `dot_general_cls(configs, 'convert')`.
    configs: the same configs.
    variables: its trained variables.
    *args: positional arguments of the model's call, arrays.
    **kwargs: keyword arguments of the model's call, static.

  Returns:
    The same with the collection `aqt`: weights in their types, and scales. AQT
    asks for the float weights in `params`, too, but does not read them.

  Raises:
    ValueError: a config is of a layer that the model lacks.
  """

  def convert(variables: Any, *args: Any) -> Any:
    mutable = [_STORED, _TAKEN]
    return model.apply(variables, *args, mutable=mutable, **kwargs)[1]

  stored = dict(jax.jit(convert)(dict(variables), *args))
  # {path of the product: {name: what is sown}}, below that of the layer.
  taken = sorted(
    '/'.join(path[:-2])
    for path in traverse_util.flatten_dict(stored.pop(_TAKEN, {}))
  )
  if missing := sorted(set(configs) - set(taken)):
    raise ValueError(
      f'configs: no layer {", ".join(missing)} of the model takes a '
      f'dot_general; these do: {", ".join(taken) or "none"}. Remove the others '
      '(convolutions and look-ups), or pass the searched model'
    )
  return {**variables, **stored}


class _DotGeneral(nn.Module):
  """AQT's product with the config of the layer that calls it."""

  configs: Mapping[str, Any]
  mode: aqt.QuantMode

  @nn.compact
  def __call__(
    self,
    lhs: jax.Array,
    rhs: jax.Array,
    dimension_numbers: lax.DotDimensionNumbers,
    precision: lax.PrecisionLike = None,
    preferred_element_type: Any = None,
  ) -> jax.Array:
    path = '/'.join(self.path[:-1])
    self.sow(_TAKEN, 'taken', jnp.zeros(()))
    layer = self.configs.get(path)
    sides: dict[str, Any] = {}
    if layer is not None:
      quantizer, freeze = layer.fwd.dg_quantizer, aqt_flax.FreezerMode
      # Scales are variables: XLA would join constants and round otherwise.
      for side, own, kept in (
        ('lhs', quantizer.lhs, freeze.CALIBRATION),
        ('rhs', quantizer.rhs, freeze.CALIBRATION_AND_VALUE),
      ):
        if isinstance(own, _Quantizer):
          sides[f'{side}_quant_mode'] = self.mode
          sides[f'{side}_freeze_mode'] = kept
    product = aqt_flax.AqtDotGeneral(
      layer,
      prng_name=None,
      quant_collection=_STORED,
      use_legacy_freezer=False,
      **sides,
    )
    return product(
      lhs, rhs, dimension_numbers, precision, preferred_element_type
    )


def _quantizer(operand: Operand) -> _Quantizer:
  stock = aqt_quantizer.quantizer_make(None, initialize_calibration=False)
  fields = {f.name: getattr(stock, f.name) for f in dataclasses.fields(stock)}
  fields |= dict(
    numerics=FormatNumerics(grid=operand.grid, container=operand.container),
    calibration=FormatCalibration,
    _calibrator=FormatCalibration(scale=operand.scale),
  )
  return _Quantizer(**fields)


def _dot_general(
  lhs: jax.Array,
  rhs: jax.Array,
  dimension_numbers: lax.DotDimensionNumbers,
  preferred_element_type: Any = None,
  precision: lax.PrecisionLike = None,
) -> jax.Array:
  """Sums of grid values, int32 of integers and float32 of others.

  AQT would multiply int8 by int4 in int32, and sum int8 in int8.
  """
  del preferred_element_type
  if all(jnp.issubdtype(x.dtype, jnp.integer) for x in (lhs, rhs)):
    lhs, rhs = lhs.astype(jnp.int8), rhs.astype(jnp.int8)
    return int8_ops.dot_general(lhs, rhs, dimension_numbers)
  lhs, rhs = lhs.astype(jnp.float32), rhs.astype(jnp.float32)
  return float_ops.dot_general(lhs, rhs, dimension_numbers, precision)


def _open_dot_general(*args: Any, **kwargs: Any) -> jax.Array:
  """`lax.dot_general` that a search may replace."""
  y = lax.dot_general(*args, **kwargs)
  return ad_checkpoint.checkpoint_name(y, equations.OPEN)


def _refusal(path: str, layer: stored_layers.Layer, is_stacked: bool) -> str:
  """Returns why AQT cannot hold a layer; empty if it can."""
  if is_stacked:
    return 'each iteration of a scanned layer has scales of its own'
  if products_lib.first_use(path) != path:
    return 'each use of a layer has a scale of its own'
  if not layer.shape:
    return 'a look-up, or a product of two activations'
  weights = layer.weights
  if weights is not None and weights.name not in _CONTAINERS:
    return f'{weights} weights, of which no type of JAX has the grid'
  return ''


def _stored_config(
  path: str, layer: stored_layers.Layer, tensors: Mapping[str, Any]
) -> aqt_dot_general.DotGeneral:
  def operand(
    side: str, numeric_format: formats.NumericFormat | None, container: Any
  ) -> Operand | None:
    if numeric_format is None:
      return None
    scale = jnp.asarray(tensors[products_lib.join('scales', path, side)])
    return Operand(quantize.grid_of(numeric_format), scale, container)

  stored = layer.weights and _CONTAINERS[layer.weights.name]
  given = jnp.int8 if layer.arithmetic == 'int8' else None
  return config(
    operand('activations', layer.activations, given),
    operand('weights', layer.weights, stored),
  )
