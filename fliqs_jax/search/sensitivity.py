"""Sensitivities: how much each option of each decision costs in quality.

One decision at a time leaves the dearest architecture; a batch judges both
networks with the same weights and statistics. The scores of different decisions
are taken to add up, which `space.allocation` relies on.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

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


def scorer(
  apply: Any,
  metric: Metric,
  space: search_space.SearchSpace,
  everywhere: jax.sharding.Sharding | None = None,
) -> Callable[[Mapping[str, Any], Iterable[Any]], Scores]:
  """Returns the function `(variables, batches) -> scores`.

  It compiles one program, the forward pass with the architecture as an input,
  at its first call. Its arguments are `params` and the model's other
  collections but `arch`, and batches with labels. It returns {decision: [K]
  float64}, means over the batches, zero at the dearest option; it raises
  ValueError if there is no batch.

  Args:
    apply: the model's `apply`.
    metric: one of `METRICS`, of the task's loss.
    space: the model's decisions.
    everywhere: where all processes can read an array, if the batches are split
      over the devices of several.
  """

  def forward(variables: Mapping[str, Any], choices: Any, batch: Any) -> Any:
    arch = space.expand(choices)
    inputs = data.model_inputs(batch)
    return apply({**variables, 'arch': arch}, inputs, train=False)

  def judged(
    variables: Mapping[str, Any], choices: Any, reference: Any, batch: Any
  ) -> tuple[jax.Array, Any]:
    outputs = forward(variables, choices, batch)
    return metric(outputs, reference, batch), outputs

  judge = jax.jit(judged, out_shardings=everywhere)
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
      # The first call is for its outputs: one program is compiled, not two.
      reference = jax.tree.map(
        lambda s: np.zeros(s.shape, s.dtype),
        jax.eval_shape(forward, variables, dearest, batch),
      )
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
