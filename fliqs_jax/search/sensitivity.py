"""Sensitivities: how much each option of each decision costs in quality.

One decision at a time leaves the dearest architecture; a batch judges both
networks with the same weights and statistics. The scores of different decisions
are taken to add up, which `space.allocation` relies on.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from fliqs_jax import data
from fliqs_jax.space import search_space

# (outputs, the dearest architecture's outputs, batch) -> score [].
Metric = Callable[[Any, Any, Any], jax.Array]
Scores = dict[str, np.ndarray]  # {decision: [K]}, zero at the dearest option


def loss(task_loss: Callable[..., Any]) -> Metric:
  """Returns the rise of the mean loss.

  Args:
    task_loss: (outputs, batch) -> (scalar, metrics), as of `search_step`.
  """

  def rise(outputs: Any, dearest: Any, batch: Any) -> jax.Array:
    return task_loss(outputs, batch)[0] - task_loss(dearest, batch)[0]

  return rise


def fisher(task_loss: Callable[..., Any]) -> Metric:
  """Returns half the mean square of the change of an example's loss.

  The empirical Fisher information along the change that an option makes: to
  first order an example's loss changes by <dL/dy, delta y>.

  Args:
    task_loss: (outputs, batch) -> (scalar, metrics), a mean over examples.
  """

  def of_example(outputs: Any, batch: Any) -> jax.Array:
    outputs, batch = jax.tree.map(lambda x: x[None], (outputs, batch))
    return task_loss(outputs, batch)[0]

  def half_square(outputs: Any, dearest: Any, batch: Any) -> jax.Array:
    each = jax.vmap(of_example)
    return 0.5 * jnp.mean((each(outputs, batch) - each(dearest, batch)) ** 2)

  return half_square


def kl(task_loss: Callable[..., Any]) -> Metric:
  """Returns the Kullback-Leibler divergence of softmax outputs, in nats.

  Args:
    task_loss: not used; the divergence needs no labels.
  """
  del task_loss

  def divergence(outputs: Any, dearest: Any, batch: Any) -> jax.Array:
    del batch
    log_p, log_q = jax.nn.log_softmax(dearest), jax.nn.log_softmax(outputs)
    return jnp.mean(jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1))

  return divergence


# The names of `search.scores`. Another metric is another row.
METRICS: dict[str, Callable[[Callable[..., Any]], Metric]] = {
  'loss': loss,
  'fisher': fisher,
  'kl': kl,
}


# Hutchinson's trace: most draws, and the relative change at which they end.
_DRAWS, _CHANGE = 50, 1e-3


def scorer(
  apply: Any,
  metric: Metric,
  space: search_space.SearchSpace,
  jit: Callable[..., Any] = jax.jit,
) -> Callable[[Mapping[str, Any], Iterable[Any]], Scores]:
  """Returns the function `(variables, batches) -> scores`.

  It compiles one network, the forward pass with the architecture as an input,
  at its first call. Its arguments are `params` and the model's other
  collections but `arch`, and batches with labels. It returns {decision: [K]
  float64}, means over the batches, zero at the dearest option; it raises
  ValueError if there is no batch.

  Where sizes are open, running statistics are means over networks of all sizes
  and fit none of them, so each network is judged in training mode, with the
  statistics of the batch.

  Args:
    apply: the model's `apply`.
    metric: one of `METRICS`, of the task's loss.
    space: the model's decisions.
    jit: `jax.jit`; of a run `Devices.jit_everywhere`, since the batches may be
      split over the devices of several processes.
  """
  has_sizes = any(
    d.kind != 'format' and len(d.labels) > 1 for d in space.decisions
  )

  def forward(variables: Mapping[str, Any], choices: Any, batch: Any) -> Any:
    everything = {**variables, 'arch': space.expand(choices)}
    inputs = data.model_inputs(batch)
    if not has_sizes:
      return apply(everything, inputs, train=False)
    outputs, _ = apply(
      everything,
      inputs,
      train=True,
      mutable=[name for name in variables if name != 'params'],
      rngs={'dropout': jax.random.key(0)},
    )
    return outputs

  def judged(
    variables: Mapping[str, Any], choices: Any, reference: Any, batch: Any
  ) -> tuple[jax.Array, Any]:
    outputs = forward(variables, choices, batch)
    return metric(outputs, reference, batch), outputs

  judge = jit(judged)
  empty = jit(lambda *args: jax.tree.map(jnp.zeros_like, forward(*args)))
  dearest = space.dearest()
  others = {
    (d.name, k): {**dearest, d.name: d.one_hot(label)}
    for d in space.decisions
    for k, label in enumerate(d.labels)
    if k != d.dearest
  }

  def scores(variables: Mapping[str, Any], batches: Iterable[Any]) -> Scores:
    seen: list[dict[tuple[str, int], Any]] = []
    for batch in batches:
      # The first call is for its outputs: one program is compiled, not two, as
      # long as zeros are placed as outputs are.
      reference = empty(variables, dearest, batch)
      _, reference = judge(variables, dearest, reference, batch)
      seen.append(
        {
          key: judge(variables, choices, reference, batch)[0]
          for key, choices in others.items()
        }
      )
    if not seen:
      raise ValueError('sensitivities need at least one batch')
    fetched = jax.device_get(seen)
    result = {d.name: np.zeros(len(d.labels)) for d in space.decisions}
    for name, k in others:
      parts = [part[name, k] for part in fetched]
      result[name][k] = np.mean(np.asarray(parts, np.float64))
    return result

  return scores


def hessian_scorer(
  apply: Callable[..., Any],
  float_apply: Callable[..., Any],
  task_loss: Callable[..., Any],
  space: search_space.SearchSpace,
) -> Callable[[Mapping[str, Any], Sequence[Any]], Scores]:
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
  layers = {d.name: _weighted_layers(d) for d in space.decisions}
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

  @jax.jit
  def errors(variables: Mapping[str, Any], choices: Any, batch: Any) -> Any:
    _, recorded = apply(
      {**variables, 'arch': space.expand(choices)},
      data.model_inputs(batch),
      train=False,
      mutable=['operands'],
    )
    operands: dict[str, Any] = traverse_util.flatten_dict(
      recorded['operands'], sep='/'
    )
    result = {}
    for path, w in kernels(variables['params']).items():
      prefix = f'{path}/' if path else ''
      values, scale = (operands[prefix + n] for n in ('values', 'weights'))
      on_grid = values.astype(jnp.float32) * scale
      result[path] = jnp.sum((w - on_grid) ** 2)
    return result

  def scores(variables: Mapping[str, Any], batches: Sequence[Any]) -> Scores:
    traces = _mean_of_draws(draw, variables, batches)
    result = {d.name: np.zeros(len(d.labels)) for d in space.decisions}
    for k in range(max(len(d.labels) for d in space.decisions)):
      # All layers at once: the weights of one do not depend on another's.
      chosen = {d.name: min(k, len(d.labels) - 1) for d in space.decisions}
      squares = jax.device_get(errors(variables, space.at(chosen), batches[0]))
      for d in space.decisions:
        result[d.name][chosen[d.name]] = sum(
          traces[path] * float(squares[path]) for path in layers[d.name]
        )
    return {
      d.name: result[d.name] - result[d.name][d.dearest]
      for d in space.decisions
    }

  return scores


def _weighted_layers(decision: search_space.Decision) -> list[str]:
  """Returns the paths of the layers whose weights a decision sets."""
  parts = [leaf.rpartition('/') for leaf in decision.leaves]
  paths = [path for path, _, name in parts if name in ('format', 'weights')]
  if not paths:
    raise ValueError(
      f'--scores=hessian sees weights alone, but {decision.name} does not set '
      f'the format of weights; use one of {", ".join(METRICS)}'
    )
  return paths


def _mean_of_draws(
  draw: Callable[..., Any], variables: Mapping[str, Any], batches: Sequence[Any]
) -> dict[str, float]:
  """Returns {layer: mean of its draws}, over all batches."""
  total: dict[str, float] = {}
  for i in range(_DRAWS):
    key = jax.random.key(i)
    fetched = jax.device_get([draw(variables, b, key) for b in batches])
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


def regular(space: search_space.SearchSpace, raw: Scores) -> tuple[Scores, int]:
  """Returns scores without what only noise explains, and how many were below 0.

  No score is below zero, and an option is no worse than one of fewer bits,
  fewer channels or a smaller kernel.

  Args:
    space: the model's decisions.
    raw: {decision: [K]} measured scores.
  """
  result = {}
  for decision in space.decisions:
    scores, rank = raw[decision.name], np.asarray(decision.precision)
    # [K, K]: whether the option of the column has at most the row's precision.
    below = (rank[None, :] < rank[:, None]) | np.eye(len(rank), dtype=bool)
    least = np.min(np.where(below, scores[None, :], np.inf), axis=1)
    result[decision.name] = np.maximum(least, 0.0)
  return result, sum(int(np.sum(scores < 0)) for scores in raw.values())
