"""Calls of linen's layers: which are intercepted, and what runs instead.

Search and serving share this module; they differ only in the operands that they
give to `apply`.
"""

from collections.abc import Callable
import inspect
from typing import Any, NamedTuple

import flax.linen as nn
import jax

from fliqs_jax.layers import operands as operands_lib
from fliqs_jax.layers import other_layers
from fliqs_jax.layers import quant_layers

_OURS = (
  quant_layers.QuantConv,
  quant_layers.QuantDense,
  quant_layers.QuantDenseGeneral,
  quant_layers.QuantEinsum,
)


def interceptor(replace: Callable) -> Callable:
  """Returns an interceptor for `nn.intercept_methods`, for one model call.

  Args:
    replace: `(linen_class, call, args, kwargs, context) -> outputs`; it runs in
      place of each call of a layer of that class. Calls that `replace` makes in
      the layer's scope are not intercepted.

  Raises:
    ValueError: during the call, if the model holds quantized layers of ours.
  """
  replaced: list[Any] = []  # Scopes of the layers that `replace` runs now.

  def intercept(call, args, kwargs, context):
    module = context.module
    if isinstance(module, _OURS):
      raise ValueError(
        f'{"/".join(module.path) or "the model"} is a '
        f'{type(module).__name__}: the model is built with quantized layers, '
        'and searchable would quantize them twice; pass the model itself to '
        'find_decisions'
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
  """Raises ValueError unless a module can be called with these arguments."""
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
      f'{name} is called as {name}{signature}: {error}; give the same '
      'arguments to init, apply, find_decisions, create_state and export_model'
    ) from None


def inputs_of(args: tuple, kwargs: dict[str, Any]) -> Any:
  """Returns the input of a layer's call: its first argument."""
  return args[0] if args else kwargs['inputs']


def apply(
  operands: operands_lib.Operands,
  linen_class: type[nn.Module],
  args: tuple,
  kwargs: dict[str, Any],
  method: str,
) -> Any:
  """Returns the outputs of a layer, computed from operands on their grids.

  Args:
    operands: the layer's operands.
    linen_class: one of the intercepted classes, except attention.
    args: positional arguments of the call.
    kwargs: keyword arguments of the call.
    method: name of the called method.
  """
  call = Call(operands, linen_class, args, kwargs, method)
  return LAYERS[linen_class].op(call)


class Call(NamedTuple):
  """A call of a layer, with the operands that replace its own."""

  operands: operands_lib.Operands
  linen_class: type[nn.Module]
  args: tuple
  kwargs: dict[str, Any]
  method: str

  @property
  def inputs(self) -> Any:
    """The input of the call."""
    return inputs_of(self.args, self.kwargs)


def _hooked(call: Call) -> jax.Array:
  return quant_layers.with_op(call.operands, call.linen_class, call.inputs)


def _conv_local(call: Call) -> jax.Array:
  return other_layers.conv_local(call.operands, call.inputs)


def _conv_transpose(call: Call) -> jax.Array:
  return other_layers.conv_transpose(call.operands, call.inputs)


def _einsum(call: Call) -> jax.Array:
  given = call.args[1] if len(call.args) > 1 else call.kwargs.get('einsum_str')
  einsum_str = nn.merge_param(
    'einsum_str', call.operands.module.einsum_str, given
  )
  return quant_layers.apply_einsum(call.operands, einsum_str, call.inputs)


def _embed(call: Call) -> jax.Array:
  return other_layers.embed(call.operands, call.inputs, call.method)


class Layer(NamedTuple):
  """An intercepted linen class.

  Attributes:
    weights: name of the parameter that holds its weights.
    op: the quantized op that runs in place of the class's own.
  """

  weights: str
  op: Callable[[Call], jax.Array]


# Every intercepted class with weights, once: search, coverage, call counts and
# serving all read this table. Attention is intercepted besides; its weights are
# those of the layers inside it.
LAYERS = {
  nn.Conv: Layer('kernel', _hooked),
  nn.ConvLocal: Layer('kernel', _conv_local),
  nn.ConvTranspose: Layer('kernel', _conv_transpose),
  nn.Dense: Layer('kernel', _hooked),
  nn.DenseGeneral: Layer('kernel', _hooked),
  nn.Einsum: Layer('kernel', _einsum),
  nn.Embed: Layer('embedding', _embed),
}
# The names of the weights of all layers.
WEIGHTS = tuple(dict.fromkeys(layer.weights for layer in LAYERS.values()))


def _raw(method):
  return inspect.unwrap(method)


# `Conv` and `ConvLocal` share one method.
_METHODS = {
  _raw(c.__call__): c for c in (*LAYERS, nn.MultiHeadDotProductAttention)
} | {_raw(nn.Embed.attend): nn.Embed}


def _linen_class(context) -> type[nn.Module] | None:
  """Returns the linen layer whose own method is about to run.

  A subclass that calls this method by `super()` is intercepted at that call, so
  what the subclass does before and after it is kept.
  """
  method = getattr(context.orig_method, 'func', None)
  linen_class = _METHODS.get(method)
  if linen_class in (nn.Conv, nn.ConvLocal):
    return nn.ConvLocal if isinstance(context.module, nn.ConvLocal) else nn.Conv
  return linen_class
