"""Click prediction task: a logit per example, judged by AUC (A.13)."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fliqs_jax import data

Batch = Mapping[str, jax.Array]

METRIC, UNIT, LEAST_CLASSES = 'AUC', '%', 2

# Bins of the predicted probability, which give the ranks of a whole split.
_BINS = 2**16


def output_shape(streams: data.Streams) -> tuple[int, ...]:
  """Returns the shape of a model's output for one example.

  Raises:
    ValueError: the data have more than two classes.
  """
  if streams.num_classes != 2:
    raise ValueError(
      "task='click_through' needs data with two classes, not "
      f'{streams.num_classes}'
    )
  return ()


def loss(label_smoothing: float) -> Callable[..., Any]:
  """Returns the training loss (logits [N], batch) -> (scalar, metrics).

  It is the sigmoid cross-entropy in nats, mean over the batch.

  Args:
    label_smoothing: share of the labels that is replaced by 1/2, in [0, 1).
  """

  def smoothed_cross_entropy(logits: jax.Array, batch: Batch):
    labels = (1 - label_smoothing) * batch['label'] + label_smoothing / 2
    value = optax.sigmoid_binary_cross_entropy(logits, labels).mean()
    return value, dict(loss=value)

  return smoothed_cross_entropy


def auc(logits: jax.Array, batch: Batch) -> jax.Array:
  """Returns the area under the ROC curve [] of one batch.

  It is the probability that a click has a higher logit than a non-click, with
  ties counted half: Mann-Whitney's U over the number of pairs. It is 0.5 if
  there is no pair.
  """
  clicks = batch['label'].astype(jnp.float32)
  number = clicks.sum()
  pairs = number * (clicks.size - number)
  # Ranks relative to their mean, so that their float32 sums stay near zero.
  ranks = jax.scipy.stats.rankdata(logits) - (clicks.size + 1) / 2
  above = jnp.sum(ranks * clicks) / jnp.maximum(pairs, 1)
  return jnp.where(pairs > 0, 0.5 + above, 0.5)


def minus_cross_entropy(logits: jax.Array, batch: Batch) -> jax.Array:
  """Returns minus the mean cross-entropy [] in nats."""
  return -jnp.mean(optax.sigmoid_binary_cross_entropy(logits, batch['label']))


QUALITIES = {'auc': auc, 'cross_entropy': minus_cross_entropy}


def labels_of(outputs: jax.Array) -> jax.Array:
  """Returns what a network teaches with its logits [N]: probabilities."""
  return jax.nn.sigmoid(outputs)


def measure(logits: jax.Array, batch: Batch) -> dict[str, jax.Array]:
  """Returns sums over the real examples of a padded batch.

  Args:
    logits: [N] outputs of the model.
    batch: `label` int32 [N], and `mask` float32 [N], 0 for padding.

  Returns:
    `clicks` and `others` [65536], counts by bin of the predicted probability;
    `cross_entropy` (nats) and `examples` [].
  """
  mask, labels = batch['example_mask'], batch['label']
  bins = (jax.nn.sigmoid(logits) * _BINS).astype(jnp.int32)
  empty = jnp.zeros(_BINS)

  def count(weights: jax.Array) -> jax.Array:
    return empty.at[jnp.minimum(bins, _BINS - 1)].add(weights)

  cross_entropy = optax.sigmoid_binary_cross_entropy(logits, labels)
  return dict(
    clicks=count(mask * labels),
    others=count(mask * (1 - labels)),
    cross_entropy=jnp.sum(mask * cross_entropy),
    examples=jnp.sum(mask),
  )


def summarize(sums: Mapping[str, np.ndarray]) -> dict[str, float]:
  """Returns AUC, loss (nats) and number of examples of the whole split.

  Pairs in the same of 65,536 bins count as ties: the error of the AUC is at
  most half their share of all pairs. The AUC is NaN if there is no pair.
  """
  clicks, others = (
    np.asarray(sums[name], np.float64) for name in ('clicks', 'others')
  )
  below = np.cumsum(others) - others
  pairs = clicks.sum() * others.sum()
  above = np.sum(clicks * (below + others / 2))
  return dict(
    AUC=float(above / pairs) if pairs else float('nan'),
    loss=float(sums['cross_entropy'] / sums['examples']),
    examples=int(sums['examples']),
  )
