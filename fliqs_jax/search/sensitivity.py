"""Sensitivities: how much each option of each decision costs in quality.

One decision at a time leaves the dearest architecture; a batch judges both
networks with the same weights and statistics. The scores of different decisions
are taken to add up, which `space.allocation` relies on.

Options of one format that differ in their strategy cost the same, so there are
several dearest architectures, and most may be bad ones. There all networks are
compared with the one without formats; decisions leave the best one of a single
strategy, and a score may be below zero: that option is better.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fliqs_jax import data
from fliqs_jax.search import objectives
from fliqs_jax.space import decisions as decisions_lib
from fliqs_jax.space import search_space

# (outputs, the outputs of a reference, batch) -> score [].
Metric = Callable[[Any, Any, Any], jax.Array]
Scores = dict[str, np.ndarray]  # {decision: [K]}, zero at the dearest option


def loss(task_loss: Callable[..., Any]) -> Metric:
  """Returns the rise of the mean loss.

  Args:
    task_loss: (outputs, batch) -> (scalar, metrics), as of `search_step`.
  """

  def rise(outputs: Any, reference: Any, batch: Any) -> jax.Array:
    before, after = (
      objectives.loss_of(task_loss, y, batch)[0] for y in (reference, outputs)
    )
    return after - before

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
    return objectives.loss_of(task_loss, outputs, batch)[0]

  def half_square(outputs: Any, reference: Any, batch: Any) -> jax.Array:
    each = jax.vmap(of_example)
    return 0.5 * jnp.mean((each(outputs, batch) - each(reference, batch)) ** 2)

  return half_square


def kl(task_loss: Callable[..., Any]) -> Metric:
  """Returns the Kullback-Leibler divergence of softmax outputs, in nats.

  Args:
    task_loss: not used; the divergence needs no labels.
  """
  del task_loss

  def divergence(outputs: Any, reference: Any, batch: Any) -> jax.Array:
    del batch
    log_p, log_q = jax.nn.log_softmax(reference), jax.nn.log_softmax(outputs)
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
  jit: Callable[..., Any] = jax.jit,
  reference: Callable[..., Any] | None = None,
) -> Callable[[Mapping[str, Any], Iterable[Any]], Scores]:
  """Returns the function `(variables, batches) -> scores`.

  It compiles one network, the forward pass with the architecture as an input,
  at its first call, and the reference if there is one. Its arguments are
  `params` and the model's other collections but `arch`, and batches with
  labels. It returns {decision: [K] float64}, means over the batches, zero at
  the dearest option, with strategies at that of the best one; it raises
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
    reference: the `apply` of the same network without formats, with which all
      networks are compared where menus have strategies; None: they are compared
      with the dearest architecture.
  """
  has_sizes = any(
    d.kind != 'format' and len(d.labels) > 1 for d in space.decisions
  )

  def forward(
    network: Callable[..., Any],
    variables: Mapping[str, Any],
    choices: Any,
    batch: Any,
  ) -> Any:
    everything = {**variables, 'arch': space.expand(choices)}
    inputs = data.model_inputs(batch)
    if not has_sizes:
      return network(everything, inputs, train=False)
    outputs, _ = network(
      everything,
      inputs,
      train=True,
      mutable=[name for name in variables if name != 'params'],
      rngs={'dropout': jax.random.key(0)},
    )
    return outputs

  def judged(
    variables: Mapping[str, Any], choices: Any, compared: Any, batch: Any
  ) -> tuple[jax.Array, Any]:
    outputs = forward(apply, variables, choices, batch)
    return metric(outputs, compared, batch), outputs

  def first(variables: Mapping[str, Any], choices: Any, batch: Any) -> Any:
    if reference is not None:
      return forward(reference, variables, choices, batch)
    outputs = forward(apply, variables, choices, batch)
    return jax.tree.map(jnp.zeros_like, outputs)

  judge, compute_first = jit(judged), jit(first)
  anchors = _anchors(space) if reference is not None else [space.dearest()]

  def scores(variables: Mapping[str, Any], batches: Iterable[Any]) -> Scores:
    seen = []
    for batch in batches:
      compared = compute_first(variables, anchors[0], batch)
      if reference is None:
        # Judged for its outputs: one program is compiled, not two, as long as
        # zeros are placed as outputs are.
        _, compared = judge(variables, anchors[0], compared, batch)
      seen.append((jax.block_until_ready(compared), batch))
    if not seen:
      raise ValueError('sensitivities need at least one batch')

    def means(networks: Mapping[Any, Any]) -> dict[Any, float]:
      return {
        key: float(
          np.mean(
            [_fetched(judge(variables, choices, *one)[0]) for one in seen]
          )
        )
        for key, choices in networks.items()
      }

    of_anchors = means(dict(enumerate(anchors)))
    best = min(of_anchors, key=of_anchors.__getitem__)
    result = {d.name: np.zeros(len(d.labels)) for d in space.decisions}
    others = {
      (d.name, k): {**anchors[best], d.name: d.one_hot(label)}
      for d in space.decisions
      for k, label in enumerate(d.labels)
      if not anchors[best][d.name][k]
    }
    for (name, k), value in means(others).items():
      result[name][k] = value - of_anchors[best]
    return result

  return scores


def _fetched(value: jax.Array) -> np.float64:
  """Returns a number [] when the program that computes it has ended.

  Scores are hundreds of independent programs. XLA on CPU has a few threads for
  all devices; if these hold parts of several programs, of which each waits for
  the sum over its other parts, none of them ends.
  """
  return np.float64(jax.device_get(value))


def _anchors(space: search_space.SearchSpace) -> list[dict[str, np.ndarray]]:
  """Returns the dearest architectures that have one strategy wherever it is."""
  names = dict.fromkeys(
    fmt.strategy for d in space.formats for fmt in d.menu if fmt.strategy
  )

  def option(d: decisions_lib.FormatDecision, name: str) -> int:
    grid = d.menu[d.dearest].grid_format
    equal = [k for k, fmt in enumerate(d.menu) if fmt.grid_format == grid]
    return next((k for k in equal if d.menu[k].strategy == name), d.dearest)

  dearest = {d.name: d.dearest for d in space.decisions}
  return [
    space.at(dearest | {d.name: option(d, name) for d in space.formats})
    for name in names or ('',)
  ]


def regular(space: search_space.SearchSpace, raw: Scores) -> tuple[Scores, int]:
  """Returns scores without what only noise explains, and how many had noise.

  Zero is the best of the most precise options; no score is below it, and an
  option is no worse than one of fewer bits, fewer channels or a smaller kernel.

  Args:
    space: the model's decisions.
    raw: {decision: [K]} measured scores.
  """
  result: Scores = {}
  negative = 0
  for decision in space.decisions:
    rank = np.asarray(decision.precision)
    scores = raw[decision.name] - raw[decision.name][rank == rank.max()].min()
    negative += int(np.sum(scores < 0))
    # [K, K]: whether the option of the column has at most the row's precision.
    below = (rank[None, :] < rank[:, None]) | np.eye(len(rank), dtype=bool)
    least = np.min(np.where(below, scores[None, :], np.inf), axis=1)
    result[decision.name] = np.maximum(least, 0.0)
  return result, negative
