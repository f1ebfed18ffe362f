"""State of a run: everything that a checkpoint must hold."""

from collections.abc import Mapping
from typing import Any

from flax import struct
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from fliqs_jax.program import models
from fliqs_jax.program import products as products_lib
from fliqs_jax.search import controller as controller_lib
from fliqs_jax.space import search_space


@struct.dataclass
class TrainState:
  """The whole state of a run; the data position is a function of `step`.

  Attributes:
    step: [] int32 number of steps taken.
    params: the model's parameters.
    average: running mean of the parameters, which is served; {} if none is
      kept.
    opt_state: state of the optimizer of the weights.
    model_state: the model's other collections that change (`batch_stats`,
      `quant_stats`).
    search_state: the controller's state, policy included.
    key: typed PRNG key [] of the run, into which each step folds its number.
  """

  step: jax.Array
  params: Any
  average: Any
  opt_state: optax.OptState
  model_state: Mapping[str, Any]
  search_state: Any
  key: jax.Array

  @property
  def served_params(self) -> Any:
    """The parameters that are evaluated and served."""
    if not jax.tree.leaves(self.average):
      return self.params
    return jax.tree.map(
      lambda mean, own: mean.astype(own.dtype), self.average, self.params
    )


def create(
  model: nn.Module,
  space: search_space.SearchSpace,
  optimizer: optax.GradientTransformation,
  controller: controller_lib.Controller,
  key: jax.Array,
  *args: Any,
  keep_average: bool = False,
  params: Any = None,
  model_state: Mapping[str, Any] | None = None,
  **kwargs: Any,
) -> TrainState:
  """Returns the state before the first step.

  Args:
    model: the network, of our layers or made by `searchable`.
    space: the decisions of the model, the result of `find_decisions`.
    optimizer: the optimizer of the weights.
    controller: the controller of the policy.
    key: typed PRNG key [], from which the keys of the initial weights and of
      the run are made.
    *args: positional arguments of the model's call, such as inputs [N, ...];
      their values do not matter.
    keep_average: whether a running mean of the parameters is kept; then
      `search_step` needs an `ema_decay` above 0, otherwise of 0.
    params: parameters of a trained network, of the tree, the shapes and the
      types of those of the model; None: new ones.
    model_state: its other collections, such as `batch_stats`; those that are
      not given are new.
    **kwargs: keyword arguments of the model's call, static.

  Returns:
    The state, of arrays on the default device; the policy is uniform.

  Raises:
    ValueError: the model cannot be called with these arguments, one of its
      layers cannot be quantized, or the given parameters are those of another
      network: those that are missing, surplus or of another shape are named.
  """
  init_key, run_key = jax.random.split(key)
  variables = dict(model.init(init_key, *args, **kwargs))
  given = dict(model_state or {})
  if params is not None:
    # In a tree of other leaves, too, only the floating-point arrays learn.
    own = jax.tree.structure(variables['params'])
    is_own = jax.tree.structure(params) == own
    given['params'] = params if is_own else models.float_arrays(params)
  for name, tree in given.items():
    variables[name] = replaced(name, variables.get(name, {}), tree)
  params = variables.pop('params')
  model_state = {
    name: collection
    for name, collection in variables.items()
    if name not in ('arch', 'cost', 'sizes')
  }
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    average=first_average(params) if keep_average else {},
    opt_state=optimizer.init(params),
    model_state=model_state,
    search_state=controller.init(space.zeros()),
    key=run_key,
  )


def _dtype(x: Any) -> Any:
  return x.dtype if hasattr(x, 'dtype') else np.asarray(x).dtype


def _kind(x: Any) -> Any:
  """Returns the kind of an array's type: all floats are of one."""
  dtype = _dtype(x)
  kinds = (jnp.floating, jnp.integer, jnp.complexfloating, jax.dtypes.extended)
  return next((k for k in kinds if jnp.issubdtype(dtype, k)), dtype)


def first_average(params: Any) -> Any:
  """Returns the mean of the weights before the first step.

  It is a copy, as a step that donates the state may not own a buffer twice, and
  at least float32: in bfloat16 its small steps would be rounded away.
  """
  return jax.tree.map(
    lambda x: jnp.array(x, jnp.promote_types(x.dtype, jnp.float32)), params
  )


def replaced(name: str, own: Any, given: Any) -> Any:
  """Returns given values in the tree of a model's collection.

  Args:
    name: name of the collection, for messages.
    own: the collection of the model, arrays or their shapes.
    given: the collection of a trained network.

  Raises:
    ValueError: leaves are missing, surplus or of another shape or kind of type;
      the message names them.
  """
  own_leaves, given_leaves = products_lib.named(own), products_lib.named(given)
  missing = [path for path in own_leaves if path not in given_leaves]
  surplus = [path for path in given_leaves if path not in own_leaves]
  if missing or surplus:
    raise ValueError(
      f'{name} are those of another network: missing are '
      f'{", ".join(missing) or "none"}; surplus are '
      f'{", ".join(surplus) or "none"}'
    )
  for path, leaf in own_leaves.items():
    new = given_leaves[path]
    if jnp.shape(new) != leaf.shape:
      raise ValueError(
        f'{name}/{path} has the shape {jnp.shape(new)}, but that of the model '
        f'is {leaf.shape}'
      )
    if _kind(new) != _kind(leaf):
      raise ValueError(
        f'{name}/{path} has the type {_dtype(new)}, but that of the model is '
        f'{leaf.dtype}; give the values that the network computes with'
      )
  return jax.tree.unflatten(
    jax.tree.structure(own),
    [
      jnp.array(given_leaves[path], leaf.dtype)
      for path, leaf in own_leaves.items()
    ],
  )
