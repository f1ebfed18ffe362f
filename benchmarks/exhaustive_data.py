"""Data of the exhaustive problem: scikit-learn's digits, in splits of its own.

Networks of one seed begin with the same weights and see the same batches,
whatever their formats are and whoever chooses these, so that differences
between methods are paired.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from sklearn import datasets

# Training and validation images; the test split has the rest of 1797.
_TRAIN, _VALID = 900, 300


class Stream(NamedTuple):
  """The randomness of one seed.

  Attributes:
    key: typed PRNG key [] of the initial weights and of the run.
    train: [steps + settle batches, B] int32 rows of the training split.
    valid: [steps, V] int32 rows of the validation split.
  """

  key: jax.Array
  train: jax.Array
  valid: jax.Array


@functools.cache
def splits() -> dict[str, dict[str, np.ndarray]]:
  """Returns {split: batch of all its images}, the same in every process."""
  digits = datasets.load_digits()
  order = np.random.default_rng(0).permutation(len(digits.target))
  images = digits.images[order][..., None].astype(np.float32)
  images = (images - images.mean()) / images.std()
  labels = digits.target[order].astype(np.int32)
  parts = dict(
    train=slice(_TRAIN),
    valid=slice(_TRAIN, _TRAIN + _VALID),
    test=slice(_TRAIN + _VALID, None),
  )
  return {
    name: dict(image=images[part], label=labels[part])
    for name, part in parts.items()
  }


def rows_of(split: str, rows: jax.Array) -> dict[str, jax.Array]:
  """Returns a batch: some rows [B] of a split."""
  return {k: jnp.asarray(v)[rows] for k, v in splits()[split].items()}


def streams(
  seeds: int, steps: int, more: int, batch: int, valid_batch: int
) -> Stream:
  """Returns the streams of the first seeds, with leaves [seeds, ...].

  Args:
    seeds: number of seeds.
    steps: number of steps of training.
    more: number of training batches after the last step.
    batch: training images a step.
    valid_batch: validation images a step.
  """

  def rows(rng: np.random.Generator, size: int, shape: tuple[int, int]):
    epochs = -(-shape[0] * shape[1] // size)
    order = np.concatenate([rng.permutation(size) for _ in range(epochs)])
    return order[: shape[0] * shape[1]].reshape(shape).astype(np.int32)

  def stream(seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    train = rows(rng, _TRAIN, (steps + more, batch))
    return train, rows(rng, _VALID, (steps, valid_batch))

  train, valid = zip(*map(stream, range(seeds)))
  keys = jax.vmap(jax.random.key)(jnp.arange(seeds))
  return Stream(keys, jnp.stack(train), jnp.stack(valid))
