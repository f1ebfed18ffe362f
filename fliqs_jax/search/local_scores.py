"""Scores that layers have by themselves: the errors of their operands.

They need no forward pass for each option: all layers are at the same option at
once, and each has its own error.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from fliqs_jax import data
from fliqs_jax.search import sensitivity
from fliqs_jax.space import search_space

# (variables, batches) -> scores.
Scorer = Callable[[Mapping[str, Any], Sequence[Any]], sensitivity.Scores]

# What a format may be of; a tied decision sets both.
_SIDES = ('weights', 'activations')
# The least sum of squares: an operand that is all zero has no error.
_TINY = 1e-30

# Hutchinson's trace: most draws, and the relative change at which they end.
_DRAWS, _CHANGE = 50, 1e-3


def hessian(
  apply: Callable[..., Any],
  float_apply: Callable[..., Any],
  task_loss: Callable[..., Any],
  space: search_space.SearchSpace,
) -> Scorer:
  """Returns the function `(variables, batches) -> scores` of the Hessian.

  Tr(H) / n ||W - Q(W)||^2 of a layer's n weights, where H is their block of the
  Hessian of the network that is not quantized (HAWQ-V2), summed over the layers
  of a decision, less the same of the dearest option. Activations are not seen.
  The trace is Hutchinson's mean of v . H v over Rademacher vectors v, of at
  most 50 draws; it ends when no layer's mean changes by more than 1e-3.

  Args:
    apply: the model's `apply`.
    float_apply: the `apply` of the same network of linen's own layers.
    task_loss: (outputs, batch) -> (scalar, metrics), a mean over examples.
    space: the model's decisions, each of the format of some weights.

  Raises:
    ValueError: a decision does not set the format of weights.
  """
  layers = _layers(space)
  paths = [path for group in layers.values() for path in group]

  def kernels(params: Any) -> dict[str, jax.Array]:
    flat: dict[str, Any] = traverse_util.flatten_dict(params, sep='/')
    return {
      path: flat[f'{path}/kernel' if path else 'kernel'] for path in paths
    }

  @jax.jit
  def draw(variables: Mapping[str, Any], batch: Any, key: jax.Array) -> Any:
    params = variables['params']

    def loss_of(params: Any) -> jax.Array:
      inputs = data.model_inputs(batch)
      outputs = float_apply(
        {**variables, 'params': params}, inputs, train=False
      )
      return task_loss(outputs, batch)[0]

    flat, tree = jax.tree.flatten(params)
    keys = jax.random.split(key, len(flat))
    signs = tree.unflatten(
      [jax.random.rademacher(k, x.shape, x.dtype) for k, x in zip(keys, flat)]
    )
    _, product = jax.jvp(jax.grad(loss_of), (params,), (signs,))
    v, hv = kernels(signs), kernels(product)
    return {path: jnp.mean(v[path] * hv[path]) for path in paths}

  errors = _errors(apply, space)

  def scores(
    variables: Mapping[str, Any], batches: Sequence[Any]
  ) -> sensitivity.Scores:
    traces = _mean_of_draws(draw, variables, batches)

    def squares(choices: Any) -> dict[str, float]:
      found = errors(variables, choices, batches[0])
      return {
        name: sum(
          traces[path] * float(found[_join(path, 'weights')][0])
          for path in paths
        )
        for name, paths in layers.items()
      }

    return _of_all_at_once(space, squares)

  return scores


def error(apply: Callable[..., Any], space: search_space.SearchSpace) -> Scorer:
  """Returns the function `(variables, batches) -> scores` of local errors.

  ||x - Q(x)||^2 / ||x||^2 of each operand of which a decision sets the format,
  summed over these, less the same of the dearest option. It sees neither the
  outputs of the network nor labels. All layers are at the same option, so the
  inputs of a layer are those that this option gives.

  Args:
    apply: the `apply` of a model of this package's layers.
    space: the model's decisions, each of formats.

  Raises:
    ValueError: a decision sets no format.
  """
  operands = _operands(space)
  errors = _errors(apply, space)

  def scores(
    variables: Mapping[str, Any], batches: Sequence[Any]
  ) -> sensitivity.Scores:
    def relative(choices: Any) -> dict[str, float]:
      seen = [errors(variables, choices, batch) for batch in batches]
      sums = {
        key: np.stack([one[key] for one in seen]).astype(np.float64).sum(axis=0)
        for key in seen[0]
      }
      return {
        name: sum(sums[key][0] / max(sums[key][1], _TINY) for key in keys)
        for name, keys in operands.items()
      }

    return _of_all_at_once(space, relative)

  return scores


def _errors(
  apply: Callable[..., Any], space: search_space.SearchSpace
) -> Callable[[Mapping[str, Any], Any, Any], dict[str, np.ndarray]]:
  """Returns `(variables, choices, batch) -> {layer/side: [2] squares}`."""

  @jax.jit
  def noted(variables: Mapping[str, Any], choices: Any, batch: Any) -> Any:
    _, recorded = apply(
      {**variables, 'arch': space.expand(choices)},
      data.model_inputs(batch),
      train=False,
      mutable=['errors'],
    )
    flat: dict[str, Any] = traverse_util.flatten_dict(
      recorded['errors'], sep='/'
    )
    # A scanned layer has squares for each iteration.
    return {k: jnp.sum(v.reshape(-1, 2), axis=0) for k, v in flat.items()}

  return lambda *args: jax.device_get(noted(*args))


def _of_all_at_once(
  space: search_space.SearchSpace,
  measure: Callable[[Any], Mapping[str, float]],
) -> sensitivity.Scores:
  """Returns scores of what each layer has by itself.

  Args:
    space: the model's decisions.
    measure: {decision: [K] one-hot} -> {decision: its own error}.
  """
  result = {d.name: np.zeros(len(d.labels)) for d in space.decisions}
  for k in range(max(len(d.labels) for d in space.decisions)):
    chosen = {d.name: min(k, len(d.labels) - 1) for d in space.decisions}
    for name, error in measure(space.at(chosen)).items():
      result[name][chosen[name]] = error
  return {
    d.name: result[d.name] - result[d.name][d.dearest] for d in space.decisions
  }


def _join(path: str, name: str) -> str:
  return f'{path}/{name}' if path else name


def _layers(space: search_space.SearchSpace) -> dict[str, list[str]]:
  """Returns {decision: paths of the layers whose weights it sets}."""
  layers = {}
  for d in space.decisions:
    parts = [leaf.rpartition('/') for leaf in d.leaves]
    paths = [path for path, _, name in parts if name in ('format', 'weights')]
    if not paths:
      raise ValueError(
        f'hessian sees weights alone, but {d.name} does not set the format of '
        f'weights; use one of {", ".join(sensitivity.METRICS)}'
      )
    layers[d.name] = paths
  return layers


def _operands(space: search_space.SearchSpace) -> dict[str, list[str]]:
  """Returns {decision: operands, layer/side, of which it sets the format}."""
  operands = {}
  for d in space.decisions:
    if d.kind != 'format':
      raise ValueError(
        f'error sees formats alone, but {d.name} sets a size; use one of '
        f'{", ".join(sensitivity.METRICS)}'
      )
    parts = [leaf.rpartition('/') for leaf in d.leaves]
    operands[d.name] = [
      _join(path, side)
      for path, _, name in parts
      for side in (_SIDES if name == 'format' else (name,))
    ]
  return operands


# {metric: space -> {decision: what it sees of it}}; a decision of which it sees
# nothing is a ValueError.
SEEN = dict(hessian=_layers, error=_operands)


def _mean_of_draws(
  draw: Callable[..., Any], variables: Mapping[str, Any], batches: Sequence[Any]
) -> dict[str, float]:
  """Returns {layer: mean of its draws}, over all batches."""
  total: dict[str, float] = {}
  for i in range(_DRAWS):
    key = jax.random.key(i)
    fetched = [jax.device_get(draw(variables, b, key)) for b in batches]
    new = {
      path: total.get(path, 0.0)
      + float(np.mean([part[path] for part in fetched]))
      for path in fetched[0]
    }
    is_settled = i > 0 and all(
      abs(new[path] / (i + 1) - total[path] / i)
      <= _CHANGE * abs(total[path] / i)
      for path in new
    )
    total = new
    if is_settled:
      break
  return {path: value / (i + 1) for path, value in total.items()}
