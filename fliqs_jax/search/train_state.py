"""Everything a checkpoint must hold."""

from collections.abc import Mapping
from typing import Any

from flax import struct
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from fliqs_jax.search import controller as controller_lib
from fliqs_jax.space import search_space


@struct.dataclass
class TrainState:
  """The whole state of a run; the data position is a function of `step`.

  Attributes:
    step: [] int32, steps taken.
    params: the model's parameters.
    average: their running mean, which is what is served; {} if none is kept.
    opt_state: the weights' optimizer.
    model_state: the model's other collections that change (`batch_stats`,
      `quant_stats`).
    search_state: the controller's state, policy included.
    key: typed PRNG key [] of the run; each step folds its number in.
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
    return self.average or self.params


def create(
  model: nn.Module,
  space: search_space.SearchSpace,
  optimizer: optax.GradientTransformation,
  controller: controller_lib.Controller,
  key: jax.Array,
  *args: Any,
  keep_average: bool = False,
  **kwargs: Any,
) -> TrainState:
  """Returns the state before the first step.

  Args:
    model: the network, of our layers or made searchable.
    space: the decisions of the model, by `find_decisions`.
    optimizer: the optimizer of the weights.
    controller: the controller of the policy.
    key: typed PRNG key [].
    *args: positional arguments of the model's call.
    keep_average: whether a running mean of the parameters is kept.
    **kwargs: keyword arguments of the model's call.
  """
  init_key, run_key = jax.random.split(key)
  variables = dict(model.init(init_key, *args, **kwargs))
  params = variables.pop('params')
  model_state = {
    name: collection
    for name, collection in variables.items()
    if name not in ('arch', 'cost', 'sizes')
  }
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    # A copy, because a step that is given the state may not own a buffer twice.
    average=jax.tree.map(jnp.copy, params) if keep_average else {},
    opt_state=optimizer.init(params),
    model_state=model_state,
    search_state=controller.init(space.zeros()),
    key=run_key,
  )
