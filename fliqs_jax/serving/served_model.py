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

from fliqs_jax.intercept import carried_variables
from fliqs_jax.intercept import layer_calls
from fliqs_jax.intercept import scan_iterations
from fliqs_jax.layers import other_layers
from fliqs_jax.serving import served_layers
from fliqs_jax.serving import stored_layers
from fliqs_jax.space import quant_spec

# What a layer reads beside its weights.
_READ = (
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
  layers: Mapping[str, stored_layers.Layer]

  @functools.cached_property
  def choices(self) -> dict[str, quant_spec.Choices]:
    """Per module the formats of its steps, which differ where it is scanned."""
    return {
      path: quant_spec.Choices(
        _menu(steps, 'weights'), _menu(steps, 'activations'), False
      )
      for path, steps in stored_layers.by_module(self.layers).items()
    }

  def variables(self, unpacked: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what `apply` takes: all that transforms must hand on in `params`.

    Args:
      unpacked: collections as of `stored.variables`, steps apart; `shifts`
        where layers are served in the unsigned form.
    """
    flat = traverse_util.flatten_dict(unpacked, sep='/')
    for module, steps in stored_layers.by_module(self.layers).items():
      paths = [module]
      if steps[0].lead:
        paths = [f'{module}/@{i}' for i in range(len(steps))]
        _stack_weights(flat, module, steps, paths)
      self._carry(flat, module, steps, paths)
    return traverse_util.unflatten_dict(flat, sep='/')

  def _carry(self, flat, module, steps, paths) -> None:
    """Moves what a layer reads beside its weights to where it looks for it."""
    lead = steps[0].lead or carried_variables.PAD
    # A product of attention is a part of the module that is called.
    owner, part = module, ''
    if not steps[0].variable:
      owner, _, part = module.rpartition('/')

    def put(collection, name, values):
      key = stored_layers.join(
        'params', owner, carried_variables.NAME, collection, part, name
      )
      flat[key] = scan_iterations.together(values, lead)

    for collection, name in _READ:
      names = [stored_layers.join(collection, path, name) for path in paths]
      if names[0] in flat:
        put(collection, name, [flat.pop(name) for name in names])
    menus = []
    for side in ('weights', 'activations'):
      menu = getattr(self.choices[module], side) or ()
      menus.append(','.join(map(str, menu)))
      if len(menu) > 1:
        chosen = [getattr(step, side) for step in steps]
        put('arch', side, [np.float32([f == c for f in menu]) for c in chosen])
    # `nn.jit` takes modules for equal whose variables have the same names.
    put('formats', ' '.join(menus), [np.zeros((), np.bool_)] * len(steps))

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
    with nn.intercept_methods(layer_calls.interceptor(replace)):
      outputs, _ = self.model.apply(variables, *args, mutable=[token], **kwargs)
    return outputs

  def _call(self, called, linen_class, call, args, kwargs, context):
    """Calls a layer over what is stored of it."""
    module = context.module
    state = carried_variables.LayerState(module)
    if linen_class is nn.MultiHeadDotProductAttention:
      parts = [state.at(name).path for name in other_layers.PRODUCTS.values()]
      if not any(part in self.choices for part in parts):
        return call(*args, **kwargs)
      called.update(part for part in parts if part in self.choices)
      twin = other_layers.attention(
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
      layer_calls.inputs_of(args, kwargs),
      self._choices(state),
      state,
    )
    return layer_calls.apply(
      operands, linen_class, args, kwargs, context.method_name
    )

  def _choices(self, state: carried_variables.LayerState) -> quant_spec.Choices:
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


def _stack_weights(flat, module, steps, paths) -> None:
  """Puts the steps' weights together, as the model's author has them."""
  first = steps[0]
  if first.weights is None or not first.variable:
    return
  weights = [
    flat.pop(stored_layers.join('params', path, first.variable))
    for path in paths
  ]
  if len({w.dtype for w in weights}) > 1:  # One that holds every grid value.
    weights = [w.astype(jnp.bfloat16) for w in weights]
  flat[stored_layers.join('params', module, first.variable)] = (
    scan_iterations.parameter(weights, first.lead, first.stacked)
  )
