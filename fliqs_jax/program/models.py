"""Models of other libraries and pure functions, in the form of linen modules.

Each has `init(rngs, *args, **kwargs) -> variables` and `apply(variables, *args,
mutable=..., rngs=..., **kwargs)`, where `variables` is {collection: tree}.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import inspect
import sys
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

# Arguments of linen's `apply` that are none of the module's call.
_OF_APPLY = ('method', 'mutable', 'capture_intermediates')


def adapted(model: Any, params: Any) -> Any:
  """Returns a model in the form of a linen module.

  Args:
    model: a linen module, an NNX module, a transformed Haiku function, a
      callable pytree such as an Equinox module, or a function
      `f(params, *inputs)`.
    params: parameters of a function; None for the others, which have their own.

  Raises:
    ValueError: it is none of these, a linen module is bound to variables, or
      `params` are missing or surplus.
  """
  name = type(model).__name__
  is_function = callable(model) and not jax.tree.leaves(float_arrays(model))
  if isinstance(model, nn.Module):
    if model.scope is not None:
      raise ValueError(f'{name} is bound to variables; pass the unbound module')
    result = model
  elif _is_nnx(model):
    result = NnxModel.of(model)
  elif _is_haiku(model):
    result = HaikuModel.of(model)
  elif is_function and params is not None:
    return PureFunction.of(model, params)
  elif is_function:
    raise ValueError(
      'a function f(params, *inputs) needs its parameters: '
      'searchable(f, spec, params=...)'
    )
  elif callable(model):
    result = PureFunction.of(_call, model)
  else:
    raise ValueError(
      f'{name} is no model: pass a linen or NNX module, a transformed Haiku '
      'function, an Equinox module, or a function f(params, *inputs)'
    )
  if params is not None:
    raise ValueError(
      f'params are those of a function f(params, *inputs), but {name} has its '
      'own; leave params out'
    )
  return result


def _call(model: Any, *inputs: Any, **kwargs: Any) -> Any:
  return model(*inputs, **kwargs)


@dataclasses.dataclass(frozen=True)
class PureFunction:
  """A function `f(params, *inputs)` as a model.

  Its collection `params` holds the floating-point arrays of the given tree,
  with None for every other leaf. Those, such as activation functions or
  integers, are constants.

  Attributes:
    function: the function. It may have the keyword arguments `train` (whether
      the call trains) and `key` (typed PRNG key [], for random numbers), and
      any others that the caller gives.
    leaves: leaves of the given tree, with None for floating-point arrays.
    params: the floating-point arrays.
    treedef: the structure of the given tree.
  """

  function: Callable[..., Any]
  leaves: tuple[Any, ...]
  params: Any
  treedef: Any

  @classmethod
  def of(cls, function: Callable[..., Any], params: Any) -> 'PureFunction':
    """Returns the model of a function and its parameters."""
    leaves, treedef = jax.tree.flatten(params)
    static = tuple(None if _is_float(leaf) else leaf for leaf in leaves)
    return cls(function, static, float_arrays(params), treedef)

  def init(self, rngs: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Returns copies of the parameters that the model was made with."""
    del rngs, args, kwargs
    return dict(params=jax.tree.map(jnp.array, self.params))

  def apply(
    self,
    variables: Mapping[str, Any],
    *args: Any,
    mutable: Any = False,
    rngs: Mapping[str, jax.Array] | None = None,
    **kwargs: Any,
  ) -> Any:
    """Returns the result, and with `mutable` also {}: nothing changes.

    Raises:
      ValueError: the parameters are missing, or are not as many as before.
    """
    if 'params' not in variables:
      raise ValueError(
        f'the variables have {", ".join(variables) or "nothing"}, but no '
        "'params': pass dict(params=...), with the other collections of `init`"
      )
    given = jax.tree.leaves(float_arrays(variables['params']))
    expected = sum(leaf is None for leaf in self.leaves)
    if len(given) != expected:
      raise ValueError(
        f'params have {len(given)} arrays, but the function was made '
        f'searchable with {expected}'
      )
    arrays = iter(given)
    params = self.treedef.unflatten(
      [next(arrays) if leaf is None else leaf for leaf in self.leaves]
    )
    args = (params, *args)
    kwargs = _accepted(self.function, args, kwargs, rngs)
    outputs = self.function(*args, **kwargs)
    return (outputs, {}) if mutable else outputs


@dataclasses.dataclass(frozen=True)
class NnxModel:
  """An NNX module as a model.

  The collection `params` holds its `nnx.Param` variables, `nnx_state` all
  others (batch statistics, random streams), both as nested dicts.

  Attributes:
    graph: the module's graph.
    state: all its variables, parameters first.
    accepts: the module's call, whose keyword arguments are known.
  """

  graph: Any
  state: tuple[Any, Any]
  accepts: Callable[..., Any]

  @classmethod
  def of(cls, module: Any) -> 'NnxModel':
    """Returns the model of a module with its variables."""
    from flax import nnx

    graph, params, others = nnx.split(module, nnx.Param, ...)
    return cls(graph, (params, others), type(module).__call__)

  def init(self, rngs: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Returns copies of the variables that the module was made with."""
    from flax import nnx

    del rngs, args, kwargs
    params, others = (
      jax.tree.map(jnp.copy, nnx.to_pure_dict(state)) for state in self.state
    )
    return dict(params=params, **({'nnx_state': others} if others else {}))

  def apply(
    self,
    variables: Mapping[str, Any],
    *args: Any,
    mutable: Any = False,
    rngs: Mapping[str, jax.Array] | None = None,
    train: bool | None = None,
    **kwargs: Any,
  ) -> Any:
    """Calls the module, in its training or evaluation mode if `train` is given.

    With `mutable`, the result is (outputs, {'nnx_state': changed}).
    """
    from flax import nnx

    states = []
    for name, template in zip(('params', 'nnx_state'), self.state):
      state = jax.tree.map(lambda x: x, template)
      nnx.replace_by_pure_dict(state, variables.get(name, {}))
      states.append(state)
    module = nnx.merge(self.graph, *states)
    if train is not None:
      module.train() if train else module.eval()
      kwargs = {**kwargs, 'train': train}
    kwargs = _accepted(self.accepts, (module, *args), kwargs, rngs)
    outputs = module(*args, **kwargs)
    if not mutable:
      return outputs
    _, _, others = nnx.split(module, nnx.Param, ...)
    changed = nnx.to_pure_dict(others)
    return outputs, {'nnx_state': changed} if changed else {}


@dataclasses.dataclass(frozen=True)
class HaikuModel:
  """A transformed Haiku function as a model.

  Attributes:
    initialize: its `init`.
    function: its `apply`.
    has_state: whether it has a state, the collection `state`.
    takes_key: whether `apply` takes a key, as without `without_apply_rng`.
  """

  initialize: Callable[..., Any]
  function: Callable[..., Any]
  has_state: bool
  takes_key: bool

  @classmethod
  def of(cls, transformed: Any) -> 'HaikuModel':
    """Returns the model of a transformed function."""
    has_state = type(transformed).__name__ == 'TransformedWithState'
    names = [*inspect.signature(transformed.apply).parameters]
    takes_key = names[1 + has_state : 2 + has_state] == ['rng']
    return cls(transformed.init, transformed.apply, has_state, takes_key)

  def init(self, rngs: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Returns new parameters, and the state."""
    kwargs.pop('train', None)
    made = self.initialize(_first(rngs), *args, **kwargs)
    names = ('params', 'state') if self.has_state else ('params',)
    return dict(zip(names, made if self.has_state else (made,)))

  def apply(
    self,
    variables: Mapping[str, Any],
    *args: Any,
    mutable: Any = False,
    rngs: Mapping[str, jax.Array] | None = None,
    **kwargs: Any,
  ) -> Any:
    """Calls the function; `train`, which Haiku does not know, is left out."""
    kwargs.pop('train', None)
    state = (variables['state'],) if self.has_state else ()
    key = (_first(rngs) if rngs else None,) if self.takes_key else ()
    result = self.function(variables['params'], *state, *key, *args, **kwargs)
    outputs, changed = result if self.has_state else (result, None)
    if not mutable:
      return outputs
    return outputs, {'state': changed} if self.has_state else {}


def accepted(
  module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
  """Returns the keyword arguments of a linen call, `train` if it has it.

  Raises:
    ValueError: arguments are missing or surplus.
  """
  method = kwargs.get('method') or '__call__'
  if isinstance(method, str):
    method = getattr(type(module), method)
  signature = inspect.signature(method)
  known = signature.parameters
  takes_any = any(p.kind is p.VAR_KEYWORD for p in known.values())
  kwargs = dict(kwargs)
  if 'train' not in known and not takes_any:
    kwargs.pop('train', None)
  options = {k: v for k, v in kwargs.items() if k not in _OF_APPLY}
  owner = () if inspect.ismethod(method) else (module,)
  called = f'{type(module).__name__} is called as {method.__name__}'
  _check_call(called, signature, (*owner, *args), options)
  return kwargs


def _accepted(
  function: Callable[..., Any],
  args: tuple[Any, ...],
  kwargs: Mapping[str, Any],
  rngs: Mapping[str, jax.Array] | None,
) -> dict[str, Any]:
  """Returns the keyword arguments of a call, `train` and `key` if it has them.

  What is given by position is not given again.

  Raises:
    ValueError: arguments are missing or surplus.
  """
  signature = inspect.signature(function)
  known = signature.parameters
  positional = [
    name
    for name, p in known.items()
    if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
  ]
  known = known.keys() - positional[: len(args)]
  kwargs = dict(kwargs)
  if 'train' not in known:
    kwargs.pop('train', None)
  if 'key' in known and 'key' not in kwargs:
    kwargs['key'] = _first(rngs) if rngs else None
  _check_call('the function is called as ', signature, args, kwargs)
  return kwargs


def _check_call(
  name: str, signature: inspect.Signature, args: Any, kwargs: Any
) -> None:
  """Raises ValueError if arguments are missing or surplus."""
  try:
    signature.bind(*args, **kwargs)
  except TypeError as error:
    raise ValueError(f'{name}{signature}: {error}') from None


def _first(rngs: Any) -> Any:
  """Returns the key, or the first of several."""
  return next(iter(rngs.values())) if isinstance(rngs, Mapping) else rngs


def _is_float(x: Any) -> bool:
  return hasattr(x, 'dtype') and jnp.issubdtype(x.dtype, jnp.inexact)


def float_arrays(tree: Any) -> Any:
  """Returns the floating-point arrays of a tree, None in place of the rest."""
  return jax.tree.map(lambda x: x if _is_float(x) else None, tree)


def _is_nnx(model: Any) -> bool:
  # Who has an NNX module has imported NNX, a sixth of this package's imports.
  nnx = sys.modules.get('flax.nnx')
  return nnx is not None and isinstance(model, nnx.Module)


def _is_haiku(model: Any) -> bool:
  fields = getattr(model, '_fields', ())
  return fields == ('init', 'apply')


def is_array(x: Any) -> bool:
  """Returns whether a leaf of arguments is an array, traced or not."""
  return isinstance(
    x, (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct)
  )


def split_arrays(tree: Any) -> tuple[list[Any], Callable[[Sequence[Any]], Any]]:
  """Returns the arrays of a tree, and the function that puts others in it.

  All other leaves of the tree are static.
  """
  leaves, treedef = jax.tree.flatten(tree)
  places = [i for i, leaf in enumerate(leaves) if is_array(leaf)]

  def filled(arrays: Sequence[Any]) -> Any:
    given = list(leaves)
    for i, array in zip(places, arrays, strict=True):
      given[i] = array
    return treedef.unflatten(given)

  return [leaves[i] for i in places], filled
