"""Search a linen model that was not written for it, without editing it.

Through linen's public `nn.intercept_methods` alone: where the model calls one
of linen's layers, the same layer is run in the same scope with a quantized op.
The parameters keep their names, shapes and values, so a checkpoint of the
original loads.
"""

from collections.abc import Callable, Mapping
import dataclasses
import functools
import inspect
from typing import Any

from flax import core
import flax.linen as nn
import jax
import jax.numpy as jnp

from fliqs_jax.intercept import call_counts
from fliqs_jax.intercept import carried_variables
from fliqs_jax.intercept import layer_calls
from fliqs_jax.intercept import scan_iterations
from fliqs_jax.layers import operands as operands_lib
from fliqs_jax.layers import other_layers
from fliqs_jax.space import quant_spec

STACKS = ('separate', 'shared')

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
    layer_calls.check_call(self.model, args, kwargs)
    seen: list[str] = []

    def run():
      with nn.intercept_methods(self._interceptor(seen)):
        return self.model.init(
          rngs,
          *args,
          mutable=core.DenyList(('intermediates', self._token)),
          **kwargs,
        )

    variables, carried = carried_variables.split(run())
    self._check_stacks(variables, carried)
    # How often transforms call a layer shows in the program alone.
    traced = any('cost' in state for state in carried.values())
    called = call_counts.calls(jax.make_jaxpr(run)()) if traced else {}
    cost = call_counts.costs(
      variables, carried, called, self.stacks == 'shared'
    )
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
        `quant_stats` among them the running statistics learn; with `operands`
        the layers tell what they multiply.
      **kwargs: more of the call, and `rngs` and `method`.

    Returns:
      What the model returns, and the changed collections if `mutable`.

    Raises:
      ValueError: the call lacks arguments, or `arch` or `quant_stats` entries.
    """
    layer_calls.check_call(self.model, args, kwargs)
    wanted = _names(mutable, variables)
    inner = carried_variables.merge(core.unfreeze(variables))
    changing = {*wanted, self._token}
    telling = 'operands' in wanted
    if telling or (
      'quant_stats' in wanted and carried_variables.is_carrying(variables)
    ):
      changing.add('params')
    with nn.intercept_methods(self._interceptor([], telling)):
      outputs, changed = self.model.apply(
        inner, *args, mutable=sorted(changing), **kwargs
      )
    if mutable is False:
      return outputs
    changed = core.unfreeze(changed)
    changed, _ = carried_variables.split(
      scan_iterations.told(changed) if telling else changed
    )
    return outputs, {k: v for k, v in changed.items() if k in wanted}

  @property
  def _token(self) -> str:
    """The name of a collection that no model has.

    `nn.jit` keeps what it traced by the collections that may change; with this
    one among them it keeps no program of other rules.
    """
    return f'fliqs {dataclasses.replace(self, model=None)!r}'

  def _check_stacks(self, variables, carried) -> None:
    stacked = [p for p, s in carried.items() if carried_variables.is_stacked(s)]
    if stacked and self.spec.act_clip == 'profiled':
      raise ValueError(
        f"quant.act_clip='profiled': the inputs of {'/'.join(stacked[0])}, "
        'which is scanned, cannot be profiled; use a table or a number'
      )

  def _interceptor(self, seen: list[str], telling: bool = False) -> Callable:
    """Returns the interceptor of one call of the model.

    Args:
      seen: gets the names of the classes of what is called.
      telling: whether the layers leave what they multiply.
    """
    layer = layer_calls.interceptor(functools.partial(self._call, telling))

    def intercept(call, args, kwargs, context):
      seen.extend(c.__name__ for c in type(context.module).__mro__)
      return layer(call, args, kwargs, context)

    return intercept

  def _call(self, telling, linen_class, call, args, kwargs, context):
    """Calls a layer, quantized if the rules say so."""
    module = context.module
    state = carried_variables.LayerState(module, telling=telling)
    if linen_class is nn.Embed and not self.embed:
      return call(*args, **kwargs)
    if not _is_float(module):  # No layer to us; `coverage` says so.
      return call(*args, **kwargs)
    if linen_class is nn.MultiHeadDotProductAttention:
      if not self.attention:
        return call(*args, **kwargs)
      parts = [state.at(name).path for name in other_layers.PRODUCTS.values()]
      choices = [
        other_layers.product_choices(self.spec, part) for part in parts
      ]
      if any(c.weights or c.activations for c in choices):
        _refuse(module, linen_class, state.path)
        twin = other_layers.attention(
          module,
          lambda name, inputs: other_layers.Product(
            module, inputs, self.spec, state.at(name)
          ),
        )
        return twin(*args, **kwargs)
      return call(*args, **kwargs)
    inputs = layer_calls.inputs_of(args, kwargs)
    operands = operands_lib.Operands(module, inputs, self.spec, state)
    excluded = not operands.is_quantized
    if linen_class is nn.Embed:
      excluded = operands.choices.weights is None
    if not excluded:
      _refuse(module, linen_class, state.path)
    elif not module.is_initializing():
      return call(*args, **kwargs)
    state.mark(inputs)
    return layer_calls.apply(
      operands, linen_class, args, kwargs, context.method_name
    )


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
