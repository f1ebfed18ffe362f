r"""Searches the formats of a classifier that has no code for the search.

The example uses the fused step of the package. It exports the resulting model
in low bits and evaluates the served model.

python -m examples.search_digits OUT

It takes half a minute on a CPU; expect about 97 % of the test digits at 1.5
times the cost of INT4.
"""

from collections.abc import Iterator
import sys
from typing import Any

import jax
import numpy as np
import optax
from sklearn import datasets

from examples import digits_cnn
import fliqs_jax as fliqs
from fliqs_jax import serving

STEPS = 300
TARGET = 1.5  # A multiple of the cost of uniform INT4.


def splits(seed: int = 0) -> list[dict[str, np.ndarray]]:
  """Returns train, valid and test: real scanned digits [N, 8, 8, 1]."""
  digits = datasets.load_digits()
  images = (digits.images[..., None] / 16).astype(np.float32)
  order = np.random.default_rng(seed).permutation(len(images))
  return [
    dict(image=images[part], label=digits.target[part].astype(np.int32))
    for part in np.split(order, [1000, 1400])
  ]


def batches(split: dict, size: int, seed: int) -> Iterator[dict]:
  """Yields random batches without end."""
  rng = np.random.default_rng(seed)
  while True:
    chosen = rng.choice(len(split['label']), size, replace=False)
    yield {k: v[chosen] for k, v in split.items()}


def loss(logits: jax.Array, batch: dict) -> tuple[jax.Array, dict]:
  """Returns the cross-entropy of logits [N, 10] in nats, and metrics to log."""
  value = optax.softmax_cross_entropy_with_integer_labels(
    logits, batch['label']
  ).mean()
  return value, dict(loss=value)


def quality(logits: jax.Array, batch: dict) -> jax.Array:
  """Returns the quality that the search maximizes: minus the loss in nats."""
  return -loss(logits, batch)[0]


def search(out: str, steps: int = STEPS) -> dict[str, Any]:
  """Trains, searches, exports to a new directory; returns the results."""
  train, valid, test = splits()
  images = train['image'][:1]

  spec = fliqs.QuantSpec(formats='int_l')
  model = fliqs.searchable(digits_cnn.DigitsCNN(), spec)
  space = fliqs.find_decisions(model, images, train=False)
  cost = space.cost('bops')
  relative_cost = space.relative_cost(
    cost, TARGET * fliqs.uniform_cost(cost, 'INT4')
  )

  phases = fliqs.phases(steps, act_start=0.15, search_start=0.25, freeze=0.95)
  controller = fliqs.make_controller('default', relative_cost, phases)
  optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, steps))
  state = fliqs.create_state(
    model, space, optimizer, controller, jax.random.key(1), images, train=False
  )
  step = jax.jit(
    fliqs.search_step(
      model.apply, loss, quality, space, controller, optimizer, phases
    ),
    donate_argnums=0,
  )
  history = []
  feeds = zip(batches(train, 64, 0), batches(valid, 128, 1))
  for _, (train_batch, valid_batch) in zip(range(steps), feeds):
    state, metrics = step(state, train_batch, valid_batch)
    history.append(metrics['loss'])

  choices = fliqs.argmax(state.search_state.policy)
  exported = fliqs.export_model(
    model,
    {'params': state.params, **state.model_state},
    choices,
    test['image'][:8],
    out=out,
    train=False,
  )
  logits = serving.load(out)(test['image'])
  return dict(
    coverage=fliqs.coverage(model, images, train=False),
    exported=exported,
    params=state.params,
    losses=np.asarray(history),
    assignment=space.assignment(choices),
    relative_cost=float(relative_cost(choices)),
    accuracy=float(np.mean(np.argmax(logits, -1) == test['label'])),
  )


if __name__ == '__main__':
  if len(sys.argv) != 2:
    sys.exit('usage: python -m examples.search_digits OUT')
  result = search(sys.argv[1])
  print(result['coverage'])
  for layer, formats in result['assignment'].items():
    print(f'{layer:10} {formats[0]}')
  print(
    f'{result["accuracy"]:.1%} of the test digits at '
    f'{result["relative_cost"]:.3f} of the target, in '
    f'{result["exported"]["bytes"]["stored"]:,} bytes'
  )
