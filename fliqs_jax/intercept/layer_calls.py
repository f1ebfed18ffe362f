"""Where a model calls one of linen's layers, and how it is called instead.

What is searched and what is served share this: they differ in the operands
alone.
"""

from collections.abc import Callable
import inspect
from typing import Any

import flax.linen as nn

from fliqs_jax.layers import operands as operands_lib
from fliqs_jax.layers import other_layers
from fliqs_jax.layers import quant_layers

_OURS = (
  quant_layers.QuantConv,
  quant_layers.QuantDense,
  quant_layers.QuantDenseGeneral,
  quant_layers.QuantEinsum,
)
_LAYERS = (
  nn.Conv,
  nn.ConvLocal,
  nn.ConvTranspose,
  nn.Dense,
  nn.DenseGeneral,
  nn.Einsum,
  nn.Embed,
  nn.MultiHeadDotProductAttention,
)


def interceptor(replace: Callable) -> Callable:
  """Returns what `nn.intercept_methods` takes, for one call of a model.

  Args:
    replace: `(linen_class, call, args, kwargs, context) -> outputs`, run where
      a layer of that class is called; what it calls itself is let through.

  Raises:
    ValueError: when the model turns out to hold quantized layers.
  """
  replaced: list[Any] = []  # Scopes in which a layer of ours is at work.

  def intercept(call, args, kwargs, context):
    module = context.module
    if isinstance(module, _OURS):
      raise ValueError(
        f'{"/".join(module.path) or "the model"} is a '
        f'{type(module).__name__}: the model was built with quantized '
        'layers, which would be quantized twice; give find_decisions the '
        'model itself'
      )
    linen_class = _linen_class(context)
    if linen_class is None or any(module.scope is s for s in replaced):
      return call(*args, **kwargs)
    replaced.append(module.scope)
    try:
      return replace(linen_class, call, args, kwargs, context)
    finally:
      replaced.pop()

  return intercept


def check_call(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
  """Raises ValueError unless a module can be called in this way."""
  method = kwargs.get('method') or type(model).__call__
  if isinstance(method, str):
    method = getattr(type(model), method)
  call = {
    k: v
    for k, v in kwargs.items()
    if k not in ('method', 'rngs', 'mutable', 'capture_intermediates')
  }
  signature = inspect.signature(method)
  bound = () if inspect.ismethod(method) else (model,)
  try:
    signature.bind(*bound, *args, **call)
  except TypeError as error:
    name = type(model).__name__
    raise ValueError(
      f'{name} is called as {name}{signature}: {error}; give what it is called '
      'with to init, apply, find_decisions, create_state and export_model alike'
    ) from None


def inputs_of(args: tuple, kwargs: dict[str, Any]) -> Any:
  """Returns what a layer is called with, apart from its options."""
  return args[0] if args else kwargs['inputs']


def apply(
  operands: operands_lib.Operands,
  linen_class: type[nn.Module],
  args: tuple,
  kwargs: dict[str, Any],
  method: str,
) -> Any:
  """Returns what the layer gives, of operands on their grids.

  Args:
    operands: of the layer.
    linen_class: the layer's; not that of attention.
    args: of the call.
    kwargs: of the call.
    method: the name of what is called.
  """
  inputs = inputs_of(args, kwargs)
  if linen_class is nn.Embed:
    return other_layers.embed(operands, inputs, method)
  if linen_class is nn.ConvTranspose:
    return other_layers.conv_transpose(operands, inputs)
  if linen_class is nn.ConvLocal:
    return other_layers.conv_local(operands, inputs)
  if linen_class is nn.Einsum:
    module = operands.module
    given = args[1] if len(args) > 1 else kwargs.get('einsum_str')
    einsum_str = nn.merge_param('einsum_str', module.einsum_str, given)
    return quant_layers.apply_einsum(operands, einsum_str, inputs)
  return quant_layers.with_op(operands, linen_class, inputs)


def _raw(method):
  return inspect.unwrap(method)


# `Conv` and `ConvLocal` have one method.
_METHODS = {_raw(c.__call__): c for c in _LAYERS} | {
  _raw(nn.Embed.attend): nn.Embed
}


def _linen_class(context) -> type[nn.Module] | None:
  """Returns the linen layer whose own method is about to run.

  A subclass that calls it by `super()` is seen at that call, so that what the
  subclass does before and after is kept.
  """
  method = getattr(context.orig_method, 'func', None)
  found = _METHODS.get(method)
  if found in (nn.Conv, nn.ConvLocal):
    return nn.ConvLocal if isinstance(context.module, nn.ConvLocal) else nn.Conv
  return found
