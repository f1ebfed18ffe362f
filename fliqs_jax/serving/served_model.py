"""Serving of any linen model, over stored low-bit weights.

As in the search, the calls of linen's layers are intercepted; here their
operands are those of `served_layers`.
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

# The variables that a layer reads besides its weights.
_READ = (
  ('scales', 'weights'),
  ('scales', 'activations'),
  ('shifts', 'kernel'),
)


@dataclasses.dataclass(frozen=True)
class ServedModel:
  """A linen model that runs over its stored layers.

  Attributes:
    model: the original, unbound module.
    layers: {layer path: description of the stored layer}; layers that are not
      in it run unchanged.
  """

  model: nn.Module
  layers: Mapping[str, stored_layers.Layer]

  @functools.cached_property
  def choices(self) -> dict[str, quant_spec.Choices]:
    """{module path: formats}; a scanned layer has those of all iterations."""
    return {
      path: quant_spec.Choices(
        _menu(iterations, 'weights'), _menu(iterations, 'activations'), False
      )
      for path, iterations in stored_layers.by_module(self.layers).items()
    }

  def variables(self, unpacked: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the variables for `apply`, all that layers read in `params`.

    Args:
      unpacked: the result of `stored_layers.variables`, iterations apart; with
        `shifts` if layers run in the unsigned form.
    """
    flat = traverse_util.flatten_dict(unpacked, sep='/')
    for module, iterations in stored_layers.by_module(self.layers).items():
      paths = [module]
      if iterations[0].leading_shape:
        paths = [f'{module}/@{i}' for i in range(len(iterations))]
        _stack_weights(flat, module, iterations, paths)
      self._carry(flat, module, iterations, paths)
    return traverse_util.unflatten_dict(flat, sep='/')

  def _carry(self, flat, module, iterations, paths) -> None:
    """Moves the variables of `_READ` to `params`, where the layer looks."""
    leading_shape = iterations[0].leading_shape or carried_variables.PAD
    # A product of attention is a part of the module that is called.
    owner, part = module, ''
    if not iterations[0].variable:
      owner, _, part = module.rpartition('/')

    def put(collection, name, values):
      key = stored_layers.join(
        'params', owner, carried_variables.NAME, collection, part, name
      )
      flat[key] = scan_iterations.together(values, leading_shape)

    for collection, name in _READ:
      names = [stored_layers.join(collection, path, name) for path in paths]
      if names[0] in flat:
        put(collection, name, [flat.pop(name) for name in names])
    menus = []
    for side in ('weights', 'activations'):
      menu = getattr(self.choices[module], side) or ()
      menus.append(','.join(map(str, menu)))
      if len(menu) > 1:
        chosen = [getattr(layer, side) for layer in iterations]
        put('arch', side, [np.float32([f == c for f in menu]) for c in chosen])
    # `nn.jit` treats modules as equal if their variables have the same names:
    # a variable named for the formats keeps layers of other formats apart.
    put('formats', ' '.join(menus), [np.zeros((), np.bool_)] * len(iterations))

  def apply(self, variables: Mapping[str, Any], *args, **kwargs) -> Any:
    """Applies the model.

    Args:
      variables: the result of the method `variables`.
      *args: positional arguments of the model's call.
      **kwargs: keyword arguments of the model's call, and `method`.
    """
    return self._apply(set(), variables, *args, **kwargs)

  def called(self, variables: Mapping[str, Any], *args, **kwargs) -> set[str]:
    """Returns the modules of `choices` that one call of the model reaches."""
    called: set[str] = set()
    apply = functools.partial(self._apply, called, **kwargs)
    jax.eval_shape(apply, variables, *args)
    if called != set(self.choices):
      # `nn.jit` has reused a trace of equal modules, or of an earlier call.
      with jax.disable_jit():
        jax.eval_shape(apply, variables, *args)
    return called

  def _apply(self, called, variables, *args, **kwargs):
    # `nn.jit` caches traced programs by the collections that may change. With
    # this name, of no model's collection, it reuses no program of other layers.
    token = f'fliqs served {sorted(self.choices.items())!r}'
    replace = functools.partial(self._call, called)
    with nn.intercept_methods(layer_calls.interceptor(replace)):
      outputs, _ = self.model.apply(variables, *args, mutable=[token], **kwargs)
    return outputs

  def _call(self, called, linen_class, call, args, kwargs, context):
    """Calls a layer over its stored weights, if they are stored."""
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
  """Operands of a product of attention, both rounded."""

  has_integer_op = False

  def __init__(self, module, inputs, choices, state):
    super().__init__(module, inputs, choices, state)
    self.dtype = inputs.dtype

  def __call__(self, lhs, rhs, contracted=()):
    del contracted  # One scale for each operand.
    return self.rounded(lhs, 'activations'), self.rounded(rhs, 'weights')


def _menu(iterations, side):
  formats = dict.fromkeys(getattr(layer, side) for layer in iterations)
  return None if None in formats else tuple(formats)


def _stack_weights(flat, module, iterations, paths) -> None:
  """Stacks the iterations' weights to the model's own parameter."""
  first = iterations[0]
  if first.weights is None or not first.variable:
    return
  weights = [
    flat.pop(stored_layers.join('params', path, first.variable))
    for path in paths
  ]
  if len({w.dtype for w in weights}) > 1:  # bfloat16 holds every grid value.
    weights = [w.astype(jnp.bfloat16) for w in weights]
  flat[stored_layers.join('params', module, first.variable)] = (
    scan_iterations.parameter(weights, first.leading_shape, first.stacked)
  )
