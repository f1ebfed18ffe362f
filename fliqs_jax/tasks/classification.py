"""Classification task: loss, qualities, metrics of the test split."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fliqs_jax import data

Batch = Mapping[str, jax.Array]

METRIC, UNIT, LEAST_CLASSES = 'accuracy', '%', 1


def output_shape(streams: data.Streams) -> tuple[int, ...]:
  """Returns the shape of a model's output for one example.

  Raises:
    ValueError: the labels of the data are no classes.
  """
  if streams.label.shape:
    raise ValueError(
      "task='classification' needs data whose labels are classes, not of shape "
      f'{streams.label.shape}'
    )
  return (streams.num_classes,)


def loss(label_smoothing: float) -> Callable[..., Any]:
  """Returns the training loss (logits [N, C], batch) -> (scalar, metrics).

  It is the softmax cross-entropy in nats with label smoothing, mean over the
  batch (A.4). Labels are classes, int [N], or distributions, float [N, C],
  which `augment.mixing` makes.

  Args:
    label_smoothing: share of the labels that is spread over all classes, in
      [0, 1).
  """

  def smoothed_cross_entropy(logits: jax.Array, batch: Batch):
    labels = batch['label']
    if labels.ndim == 1:
      labels = jax.nn.one_hot(labels, logits.shape[-1])
    value = optax.softmax_cross_entropy(
      logits, optax.smooth_labels(labels, label_smoothing)
    ).mean()
    correct = _correct(logits, jnp.argmax(labels, axis=-1))
    return value, dict(loss=value, accuracy=jnp.mean(correct))

  return smoothed_cross_entropy


def accuracy(logits: jax.Array, batch: Batch) -> jax.Array:
  """Returns the fraction of the batch [] that is classified correctly."""
  return jnp.mean(_correct(logits, batch['label']))


def minus_cross_entropy(logits: jax.Array, batch: Batch) -> jax.Array:
  """Returns minus the mean cross-entropy [] in nats.

  As a quality it has far less noise per image than accuracy; 0.03 nats
  correspond to about one percentage point of accuracy.
  """
  return -jnp.mean(_cross_entropy(logits, batch['label']))


QUALITIES = {'accuracy': accuracy, 'cross_entropy': minus_cross_entropy}


def labels_of(outputs: jax.Array) -> jax.Array:
  """Returns what a network teaches with its logits [N, C]: probabilities."""
  return jax.nn.softmax(outputs)


def measure(logits: jax.Array, batch: Batch) -> dict[str, jax.Array]:
  """Returns sums over the real examples of a padded batch.

  Args:
    logits: [N, C] outputs of the model.
    batch: `label` int32 [N], and `mask` float32 [N], 0 for padding.

  Returns:
    `correct`, `cross_entropy` (nats) and `examples`, each [].
  """
  mask = batch['example_mask']
  return dict(
    correct=jnp.sum(mask * _correct(logits, batch['label'])),
    cross_entropy=jnp.sum(mask * _cross_entropy(logits, batch['label'])),
    examples=jnp.sum(mask),
  )


def summarize(sums: Mapping[str, float]) -> dict[str, float]:
  """Returns accuracy, loss (nats) and number of examples of the whole split."""
  return dict(
    accuracy=float(sums['correct'] / sums['examples']),
    loss=float(sums['cross_entropy'] / sums['examples']),
    examples=int(sums['examples']),
  )


def _correct(logits: jax.Array, labels: jax.Array) -> jax.Array:
  return (jnp.argmax(logits, axis=-1) == labels).astype(jnp.float32)


def _cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
  return optax.softmax_cross_entropy_with_integer_labels(logits, labels)
