"""A linen model that was not written for this, over stored low-bit weights.

As in the search, linen's layers are intercepted where the model calls them;
their operands are those of `served_layers`.
"""

from collections.abc import Mapping
import dataclasses
import functools
from typing import Any

from flax import traverse_util
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fliqs_jax import carried
from fliqs_jax import linen_calls
from fliqs_jax import quant_spec
from fliqs_jax import served_layers
from fliqs_jax import stacks
from fliqs_jax import stored
from fliqs_jax import unhooked

_CARRIED = (
  ('scales', 'weights'),
  ('scales', 'activations'),
  ('shifts', 'kernel'),
)


@dataclasses.dataclass(frozen=True)
class ServedModel:
  """A model whose layers are served as they are stored.

  Attributes:
    model: the module as its author wrote it.
    layers: what is stored of each layer; others run as they are.
  """

  model: nn.Module
  layers: Mapping[str, stored.Layer]

  @functools.cached_property
  def choices(self) -> dict[str, quant_spec.Choices]:
    """Per module the formats of its steps, which differ where it is scanned."""
    return {
      path: quant_spec.Choices(
        _menu(steps, 'weights'), _menu(steps, 'activations'), False
      )
      for path, steps in stored.by_module(self.layers).items()
    }

  def variables(self, unpacked: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what `apply` takes: all that transforms must hand on in `params`.

    Args:
      unpacked: collections as of `stored.variables`, steps apart; `shifts`
        where layers are served in the unsigned form.
    """
    flat = traverse_util.flatten_dict(unpacked, sep='/')
    for module, steps in stored.by_module(self.layers).items():
      first = steps[0]
      # A product of attention is a part of the module that is called.
      owner, part = (module, '')
      if not first.variable:
        owner, _, part = module.rpartition('/')
      lead, paths = carried.PAD, [module]
      if first.lead:
        lead = first.lead
        paths = [f'{module}/@{i}' for i in range(len(steps))]
        if first.weights is not None and first.variable:
          weights = [
            flat.pop(stored.join('params', path, first.variable))
            for path in paths
          ]
          name = stored.join('params', module, first.variable)
          flat[name] = stacks.parameter(
            _of_one_type(weights), lead, first.stacked
          )
      carry = functools.partial(stored.join, 'params', owner, carried.NAME)
      for collection, name in _CARRIED:
        names = [stored.join(collection, path, name) for path in paths]
        if names[0] in flat:
          flat[carry(collection, part, name)] = stacks.together(
            [flat.pop(name) for name in names], lead
          )
      sides = ('weights', 'activations')
      menus = [getattr(self.choices[module], side) or () for side in sides]
      # `nn.jit` takes modules for equal whose variables have the same names.
      formats = ' '.join(','.join(map(str, menu)) for menu in menus)
      flat[carry('formats', part, formats)] = stacks.together(
        [np.zeros((), np.bool_)] * len(paths), lead
      )
      for side, menu in zip(sides, menus):
        if len(menu) > 1:
          one_hots = [
            np.float32([f == getattr(step, side) for f in menu])
            for step in steps
          ]
          flat[carry('arch', part, side)] = stacks.together(one_hots, lead)
    return traverse_util.unflatten_dict(flat, sep='/')

  def apply(self, variables: Mapping[str, Any], *args, **kwargs) -> Any:
    """Applies the model.

    Args:
      variables: as the method of that name returns them.
      *args: what the model is called with.
      **kwargs: more of the call, and `method`.
    """
    return self._apply(set(), variables, *args, **kwargs)

  def called(self, variables: Mapping[str, Any], *args, **kwargs) -> set[str]:
    """Returns the modules among `layers` that a call of the model reaches."""
    called: set[str] = set()
    apply = functools.partial(self._apply, called, **kwargs)
    jax.eval_shape(apply, variables, *args)
    if called != set(self.choices):
      # `nn.jit` has repeated what it traced of equal modules, or before.
      with jax.disable_jit():
        jax.eval_shape(apply, variables, *args)
    return called

  def _apply(self, called, variables, *args, **kwargs):
    # `nn.jit` keeps what it traced by the collections that may change; no model
    # has this one.
    token = f'fliqs served {sorted(self.choices.items())!r}'
    replace = functools.partial(self._call, called)
    with nn.intercept_methods(linen_calls.interceptor(replace)):
      outputs, _ = self.model.apply(variables, *args, mutable=[token], **kwargs)
    return outputs

  def _call(self, called, linen_class, call, args, kwargs, context):
    """Calls a layer over what is stored of it."""
    module = context.module
    state = carried.LayerState(module)
    if linen_class is nn.MultiHeadDotProductAttention:
      parts = [state.at(name).path for name in unhooked.PRODUCTS.values()]
      if not any(part in self.choices for part in parts):
        return call(*args, **kwargs)
      called.update(part for part in parts if part in self.choices)
      twin = unhooked.attention(
        module,
        lambda name, inputs: _Product(
          module, inputs, self._choices(state.at(name)), state.at(name)
        ),
      )
      return twin(*args, **kwargs)
    if state.path not in self.choices:
      return call(*args, **kwargs)
    called.add(state.path)
    operands = served_layers.Stored(
      module,
      linen_calls.inputs_of(args, kwargs),
      self._choices(state),
      state,
    )
    return linen_calls.apply(
      operands, linen_class, args, kwargs, context.method_name
    )

  def _choices(self, state: carried.LayerState) -> quant_spec.Choices:
    return self.choices.get(state.path, quant_spec.Choices(None, None, False))


class _Product(served_layers.Stored):
  """The operands of a product of attention, rounded."""

  has_integer_op = False

  def __init__(self, module, inputs, choices, state):
    super().__init__(module, inputs, choices, state)
    self.dtype = inputs.dtype

  def __call__(self, lhs, rhs):
    return self.rounded(lhs, 'activations'), self.rounded(rhs, 'weights')


def _menu(steps, side):
  formats = dict.fromkeys(getattr(step, side) for step in steps)
  return None if None in formats else tuple(formats)


def _of_one_type(weights):
  """Returns the steps' weights in one type; bfloat16 holds every grid value."""
  types = {w.dtype for w in weights}
  return (
    weights if len(types) == 1 else [w.astype(jnp.bfloat16) for w in weights]
  )
