"""Search a linen model that was not written for it, without editing it.

Through linen's public `nn.intercept_methods` alone: where the model calls one
of linen's layers, the same layer is run in the same scope with a quantized op.
The parameters keep their names, shapes and values, so a checkpoint of the
original loads.
"""

from collections.abc import Callable, Mapping
import dataclasses
import inspect
from typing import Any

from flax import core
import flax.linen as nn
import jax
import jax.numpy as jnp

from fliqs_jax import carried as carried_lib
from fliqs_jax import layers
from fliqs_jax import operands as operands_lib
from fliqs_jax import quant_spec
from fliqs_jax import repeats
from fliqs_jax import unhooked

STACKS = ('separate', 'shared')

_OURS = (
  layers.QuantConv,
  layers.QuantDense,
  layers.QuantDenseGeneral,
  layers.QuantEinsum,
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
# What a layer's field may hold only if it is linen's own.
_REPLACED = (
  'promote_dtype',
  'preferred_element_type',
  'dot_general',
  'dot_general_cls',
  'conv_general_dilated',
  'conv_general_dilated_cls',
  'qk_attn_weights_einsum_cls',
  'attn_weights_value_einsum_cls',
)


def searchable(
  model: nn.Module,
  spec: quant_spec.QuantSpec | None = None,
  *,
  embed: bool = False,
  attention: bool = False,
  stacks: str = 'separate',
) -> 'Searchable':
  """Makes a linen model searchable.

  Args:
    model: any linen module, not bound.
    spec: which formats its layers may use; patterns match the paths of the
      layers, as `coverage` lists them.
    embed: whether `nn.Embed` is quantized, weights alone.
    attention: whether attention's two products are; `qk` and `av` under its
      path.
    stacks: whether the steps of a scanned (or vmapped) layer have `separate`
      decisions, or a `shared` one. Groups of the spec tie further.

  Returns:
    What `find_decisions`, `create_state` and a training loop take for a model.

  Raises:
    ValueError: no linen module, one that is bound, or an unknown option.
  """
  if not isinstance(model, nn.Module):
    raise ValueError(
      f'{type(model).__name__} is not a linen module; the layers of an NNX '
      'model cannot be intercepted, wrapped by nnx.bridge or not'
    )
  if model.scope is not None:
    raise ValueError(
      f'{type(model).__name__} is bound to variables; give the module itself'
    )
  if stacks not in STACKS:
    raise ValueError(
      f'stacks={stacks!r} is unknown; allowed: {", ".join(STACKS)}'
    )
  spec = spec or quant_spec.QuantSpec()
  if attention and spec.act_clip == 'profiled':
    raise ValueError(
      "quant.act_clip='profiled' profiles the inputs of layers, and the "
      'products of attention are none; use attention=False or a table'
    )
  return Searchable(model, spec, embed, attention, stacks)


@dataclasses.dataclass(frozen=True)
class Searchable:
  """A linen model with decisions; `init` and `apply` are as linen's.

  Collections besides the model's own: `arch`, `quant_stats` and, of `init`,
  `cost`, as of the layers in `layers`.

  Attributes:
    model: the module as its author wrote it.
    spec: the rules of its layers.
    embed: whether `nn.Embed` is quantized.
    attention: whether the products of attention are.
    stacks: `separate` or `shared` decisions of scanned layers.
  """

  model: nn.Module
  spec: quant_spec.QuantSpec
  embed: bool
  attention: bool
  stacks: str

  def init(self, rngs: Any, *args, **kwargs) -> dict[str, Any]:
    """Returns the variables; `params` are those of the model's own `init`.

    Args:
      rngs: a key or a dict of keys.
      *args: what the model is called with.
      **kwargs: more of the call, and `method`.

    Raises:
      ValueError: the call lacks arguments, or a layer cannot be quantized.
    """
    self._check_call(args, kwargs)
    seen: list[str] = []

    def run():
      with nn.intercept_methods(self._interceptor(seen)):
        return self.model.init(
          rngs,
          *args,
          mutable=core.DenyList(('intermediates', self._token)),
          **kwargs,
        )

    variables, carried = carried_lib.split(run())
    self._check_stacks(variables, carried)
    # How often transforms call a layer shows in the program alone.
    traced = any('cost' in state for state in carried.values())
    called = repeats.calls(jax.make_jaxpr(run)()) if traced else {}
    cost = repeats.costs(variables, carried, called, self.stacks == 'shared')
    if not cost and 'ToLinen' in seen:
      raise ValueError(
        'the model is an NNX model in nnx.bridge.ToLinen: linen calls the '
        'bridge and sees none of the layers within, so none can be quantized; '
        'write the layers in linen'
      )
    return {**variables, 'cost': cost} if cost else variables

  def apply(
    self,
    variables: Mapping[str, Any],
    *args,
    mutable: Any = False,
    **kwargs,
  ) -> Any:
    """Applies the model with the formats that `arch` chooses.

    Args:
      variables: `params` and the other collections of `init`; `arch` is
        `space.expand(choices)`.
      *args: what the model is called with.
      mutable: False, True, or the names of the collections that change. With
        `quant_stats` among them the running statistics learn.
      **kwargs: more of the call, and `rngs` and `method`.

    Returns:
      What the model returns, and the changed collections if `mutable`.

    Raises:
      ValueError: the call lacks arguments, or `arch` or `quant_stats` entries.
    """
    self._check_call(args, kwargs)
    wanted = _names(mutable, variables)
    inner = carried_lib.merge(core.unfreeze(variables))
    changing = {*wanted, self._token}
    if 'quant_stats' in wanted and carried_lib.is_carrying(variables):
      changing.add('params')
    with nn.intercept_methods(self._interceptor([])):
      outputs, changed = self.model.apply(
        inner, *args, mutable=sorted(changing), **kwargs
      )
    if mutable is False:
      return outputs
    changed, _ = carried_lib.split(core.unfreeze(changed))
    return outputs, {k: v for k, v in changed.items() if k in wanted}

  @property
  def _token(self) -> str:
    """The name of a collection that no model has.

    `nn.jit` keeps what it traced by the collections that may change; with this
    one among them it keeps no program of other rules.
    """
    return f'fliqs {dataclasses.replace(self, model=None)!r}'

  def _check_call(self, args, kwargs) -> None:
    method = kwargs.get('method') or type(self.model).__call__
    if isinstance(method, str):
      method = getattr(type(self.model), method)
    call = {
      k: v
      for k, v in kwargs.items()
      if k not in ('method', 'rngs', 'mutable', 'capture_intermediates')
    }
    signature = inspect.signature(method)
    bound = () if inspect.ismethod(method) else (self.model,)
    try:
      signature.bind(*bound, *args, **call)
    except TypeError as error:
      name = type(self.model).__name__
      raise ValueError(
        f'{name} is called as {name}{signature}: {error}; give what it is '
        'called with to init, apply, find_decisions and create_state alike'
      ) from None

  def _check_stacks(self, variables, carried) -> None:
    stacked = [p for p, s in carried.items() if carried_lib.is_stacked(s)]
    if stacked and self.spec.act_clip == 'profiled':
      raise ValueError(
        f"quant.act_clip='profiled': the inputs of {'/'.join(stacked[0])}, "
        'which is scanned, cannot be profiled; use a table or a number'
      )

  def _interceptor(self, seen: list[str]) -> Callable:
    """Returns the interceptor of one call of the model."""
    replaced: list[Any] = []  # Scopes in which a layer of ours is at work.

    def intercept(call, args, kwargs, context):
      module = context.module
      seen.extend(c.__name__ for c in type(module).__mro__)
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
        return self._call(linen_class, call, args, kwargs, context)
      finally:
        replaced.pop()

    return intercept

  def _call(self, linen_class, call, args, kwargs, context):
    """Calls a layer, quantized if the rules say so."""
    module = context.module
    state = carried_lib.LayerState(module)
    path = state.path
    if linen_class is nn.Embed and not self.embed:
      return call(*args, **kwargs)
    if not _is_float(module):  # No layer to us; `coverage` says so.
      return call(*args, **kwargs)
    if linen_class is nn.MultiHeadDotProductAttention:
      if not self.attention:
        return call(*args, **kwargs)
      parts = (f'{path}/qk', f'{path}/av') if path else ('qk', 'av')
      choices = [unhooked.product_choices(self.spec, part) for part in parts]
      if any(c.weights or c.activations for c in choices):
        _refuse(module, linen_class, path)
        twin = unhooked.attention(module, self.spec, state)
        return twin(*args, **kwargs)
      return call(*args, **kwargs)
    inputs, *rest = args or (kwargs['inputs'],)
    operands = operands_lib.Operands(module, inputs, self.spec, state)
    choices = operands.choices
    excluded = choices.weights is None and choices.activations is None
    if linen_class is nn.Embed:
      excluded = choices.weights is None
    if not excluded:
      _refuse(module, linen_class, path)
    elif not module.is_initializing():
      return call(*args, **kwargs)
    state.mark(inputs)
    if linen_class is nn.Embed:
      return unhooked.embed(operands, inputs, context.method_name)
    if linen_class is nn.ConvTranspose:
      return unhooked.conv_transpose(operands, inputs)
    if linen_class is nn.ConvLocal:
      return unhooked.conv_local(operands, inputs)
    if linen_class is nn.Einsum:
      given = rest[0] if rest else kwargs.get('einsum_str')
      einsum_str = nn.merge_param('einsum_str', module.einsum_str, given)
      return layers.apply_einsum(operands, einsum_str, inputs)
    return layers.with_op(operands, linen_class, inputs)


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


def _refuse(module, linen_class, path) -> None:
  """Raises ValueError for a layer that cannot be quantized."""
  reason = ''
  for name in _REPLACED:
    field = linen_class.__dataclass_fields__.get(name)
    if field is not None and getattr(module, name) is not field.default:
      reason = f'it was given {name}, which is what quantization replaces'
  if linen_class is nn.MultiHeadDotProductAttention:
    taken = inspect.signature(module.attention_fn).parameters
    if 'qk_attn_weights_einsum' not in taken:
      reason = 'its attention_fn takes no qk_attn_weights_einsum'
    if module.precision is not None:
      reason = 'its precision is given, which linen forbids beside an einsum'
  if reason:
    raise ValueError(
      f'{path or "the model"} ({type(module).__name__}) cannot be quantized: '
      f'{reason}; add its path to quant.exclude'
    )


def _is_float(module) -> bool:
  return all(
    jnp.issubdtype(dtype, jnp.floating)
    for dtype in (module.dtype, module.param_dtype)
    if dtype is not None
  )


def _names(mutable, variables) -> tuple[str, ...]:
  """Returns the names of the collections that may change."""
  if isinstance(mutable, core.DenyList):
    raise ValueError(
      'mutable: name the collections that change; a DenyList would let params '
      'and arch change'
    )
  if mutable is False:
    return ()
  if mutable is True:
    return tuple(variables)
  return (mutable,) if isinstance(mutable, str) else tuple(mutable)
