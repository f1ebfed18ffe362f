"""Search of any linen model, without a change to the model's code.

`nn.intercept_methods`, which is public in linen, intercepts each call of a
linen layer; the same layer then runs in the same scope with a quantized op.
Parameters keep their names, shapes and values, so a checkpoint of the original
model loads. README.md beside this file shows the variables.
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

# Fields of linen's layers that quantization replaces: they must hold linen's
# own default.
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
    model: any linen module that is not bound to variables.
    spec: the formats that its layers may use; patterns match the paths of the
      layers that `coverage` lists.
    embed: whether the weights of `nn.Embed` layers are quantized.
    attention: whether the two products of attention are quantized: parts `qk`
      and `av` of an attention layer's path.
    stacks: `separate`: each iteration of a scanned or vmapped layer has its own
      decision; `shared`: all iterations share one. Groups of the spec join
      decisions further.

  Returns:
    A model for `find_decisions`, `create_state` and a training loop.

  Raises:
    ValueError: `model` is no linen module or is bound, or an option is unknown.
  """
  if not isinstance(model, nn.Module):
    raise ValueError(
      f'{type(model).__name__} is not a linen module; only the layers of linen '
      'models can be intercepted, not those of NNX models, with or without '
      'nnx.bridge'
    )
  if model.scope is not None:
    raise ValueError(
      f'{type(model).__name__} is bound to variables; pass the unbound module'
    )
  if stacks not in STACKS:
    raise ValueError(
      f'stacks={stacks!r} is unknown; allowed: {", ".join(STACKS)}'
    )
  spec = spec or quant_spec.QuantSpec()
  if attention and spec.act_clip == 'profiled':
    raise ValueError(
      "quant.act_clip='profiled' profiles the inputs of layers, and a product "
      'of attention is not a layer; use attention=False, or for act_clip a '
      'table or a number'
    )
  return Searchable(model, spec, embed, attention, stacks)


@dataclasses.dataclass(frozen=True)
class Searchable:
  """A linen model with decisions; `init` and `apply` are as linen's.

  Besides the model's own collections there are `arch` and `quant_stats`, and
  after `init` also `cost`, as with the layers of `layers.quant_layers`.

  Attributes:
    model: the original, unbound module.
    spec: the formats that its layers may use.
    embed: whether the weights of `nn.Embed` layers are quantized.
    attention: whether the two products of attention are quantized.
    stacks: `separate` or `shared`: decisions of a scanned layer's iterations.
  """

  model: nn.Module
  spec: quant_spec.QuantSpec
  embed: bool
  attention: bool
  stacks: str

  def init(self, rngs: Any, *args, **kwargs) -> dict[str, Any]:
    """Returns the variables; `params` are those of the model's own `init`.

    Args:
      rngs: a key, or a dict of keys.
      *args: positional arguments of the model's call.
      **kwargs: keyword arguments of the model's call, and `method`.

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
    # Only the traced program shows how often transforms call a layer.
    traced = any('cost' in state for state in carried.values())
    called = call_counts.calls(jax.make_jaxpr(run)()) if traced else {}
    cost = call_counts.costs(
      variables, carried, called, self.stacks == 'shared'
    )
    if not cost and 'ToLinen' in seen:
      raise ValueError(
        'the model wraps an NNX model by nnx.bridge.ToLinen: linen does not '
        'see the layers inside the bridge, so none of them can be quantized; '
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
      *args: positional arguments of the model's call.
      mutable: False, True, or the names of the collections that may change.
        With `quant_stats` among them, the running statistics are updated; with
        `operands`, each layer records its operands there.
      **kwargs: keyword arguments of the model's call, `rngs` and `method`.

    Returns:
      The model's outputs; with `mutable`, also the changed collections.

    Raises:
      ValueError: the call lacks arguments, or the variables lack entries of
        `arch` or `quant_stats`.
    """
    layer_calls.check_call(self.model, args, kwargs)
    wanted = _names(mutable, variables)
    inner = carried_variables.merge(core.unfreeze(variables))
    changing = {*wanted, self._token}
    recording = 'operands' in wanted
    if recording or (
      'quant_stats' in wanted and carried_variables.has_carried(variables)
    ):
      changing.add('params')
    with nn.intercept_methods(self._interceptor([], recording)):
      outputs, changed = self.model.apply(
        inner, *args, mutable=sorted(changing), **kwargs
      )
    if mutable is False:
      return outputs
    changed = core.unfreeze(changed)
    if recording:
      changed = scan_iterations.with_operands(changed)
    changed, _ = carried_variables.split(changed)
    return outputs, {k: v for k, v in changed.items() if k in wanted}

  @property
  def _token(self) -> str:
    """The name of a collection that no model has.

    `nn.jit` caches traced programs by the collections that may change. With
    this name among them, it never reuses a program that other rules made.
    """
    return f'fliqs {dataclasses.replace(self, model=None)!r}'

  def _check_stacks(self, variables, carried) -> None:
    stacked = [p for p, s in carried.items() if carried_variables.is_stacked(s)]
    if stacked and self.spec.act_clip == 'profiled':
      raise ValueError(
        f"quant.act_clip='profiled': the inputs of {'/'.join(stacked[0])} "
        'cannot be profiled, because the layer is scanned; use a table or a '
        'number'
      )

  def _interceptor(self, seen: list[str], recording: bool = False) -> Callable:
    """Returns the interceptor of one call of the model.

    Args:
      seen: list to which the class names of all called modules are appended.
      recording: whether the layers record their operands.
    """
    layer = layer_calls.interceptor(functools.partial(self._call, recording))

    def intercept(call, args, kwargs, context):
      seen.extend(c.__name__ for c in type(context.module).__mro__)
      return layer(call, args, kwargs, context)

    return intercept

  def _call(self, recording, linen_class, call, args, kwargs, context):
    """Calls a layer, quantized if the spec allows formats for it."""
    module = context.module
    state = carried_variables.LayerState(module, recording=recording)
    if linen_class is nn.Embed and not self.embed:
      return call(*args, **kwargs)
    if not _is_float(module):  # Complex or integer; `coverage` lists it.
      return call(*args, **kwargs)
    if linen_class is nn.MultiHeadDotProductAttention:
      attend = self._quantized_attention(module, state) or call
      return attend(*args, **kwargs)
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

  def _quantized_attention(self, module, state) -> Callable | None:
    """Returns attention with quantized products; None if none has formats."""
    if not self.attention:
      return None
    parts = [state.at(name).path for name in other_layers.PRODUCTS.values()]
    choices = [other_layers.product_choices(self.spec, part) for part in parts]
    if not any(c.weights or c.activations for c in choices):
      return None
    _refuse(module, nn.MultiHeadDotProductAttention, state.path)
    return other_layers.attention(
      module,
      lambda name, inputs: other_layers.Product(
        module, inputs, self.spec, state.at(name)
      ),
    )


def _refuse(module, linen_class, path) -> None:
  """Raises ValueError for a layer that cannot be quantized."""
  reason = ''
  for name in _REPLACED:
    field = linen_class.__dataclass_fields__.get(name)
    if field is not None and getattr(module, name) is not field.default:
      reason = f'its field {name} is set, and quantization replaces that field'
  if linen_class is nn.MultiHeadDotProductAttention:
    taken = inspect.signature(module.attention_fn).parameters
    if 'qk_attn_weights_einsum' not in taken:
      reason = 'its attention_fn has no argument qk_attn_weights_einsum'
    if module.precision is not None:
      reason = (
        'its field precision is set, which linen does not allow together with '
        'an einsum of ours'
      )
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
      'mutable: name the collections that may change; a DenyList would also '
      'let params and arch change'
    )
  if mutable is False:
    return ()
  if mutable is True:
    return tuple(variables)
  return (mutable,) if isinstance(mutable, str) else tuple(mutable)
