"""Mixup and cutmix: pure functions of a batch and a key, inside the step.

Here and not among the data: the batch is mixed where it is used, at no cost to
the machine that decodes, and whoever shards it need not know who mixes with
whom. Labels leave as distributions, which a cross-entropy takes as it takes
one-hot vectors.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from scipy import special

Batch = Mapping[str, jax.Array]

_LEVELS = 4096


def mixing(
  num_classes: int, mixup: float, cutmix: float
) -> Callable[[jax.Array, Batch], dict[str, jax.Array]]:
  """Returns the function `(key, batch) -> batch` that mixes neighbours.

  Mixup (Zhang et al. 2018) shows lambda x_i + (1 - lambda) x_j; cutmix (Yun et
  al. 2019) shows x_i with a rectangle of x_j, lambda its share of what is left.
  As in DeiT, lambda ~ Beta(a, a) is one for a batch, and where both are on,
  each batch is mixed by one of them, at even odds.

  Args:
    num_classes: size C of the distributions.
    mixup: a of mixup; 0 is never.
    cutmix: a of cutmix; 0 is never.

  Returns:
    A function of a key and a batch with `image` [N, H, W, D] and `label` int
    [N] to the same with mixed images, and labels float32 [N, C].

  Raises:
    ValueError: if a parameter is negative, or both are 0.
  """
  if min(mixup, cutmix) < 0 or max(mixup, cutmix) == 0:
    raise ValueError(
      f'mixup={mixup} and cutmix={cutmix} must not be negative, and one of '
      'them above 0'
    )

  # Constants of the step, where they cost nothing; None for what is off.
  blended, pasted = (_quantiles(a) if a else None for a in (mixup, cutmix))

  def mix(key: jax.Array, batch: Batch) -> dict[str, jax.Array]:
    image = batch['image']
    shape = image.shape[1:3]
    kind_key, share_key, place_key = jax.random.split(key, 3)
    level = jax.random.randint(share_key, (), 0, _LEVELS)
    shares = []
    if blended is not None:
      shares.append(jnp.full(shape, jnp.asarray(blended)[level]))
    if pasted is not None:
      shares.append(_outside(place_key, jnp.asarray(pasted)[level], shape))
    # Of one map, the first is the last.
    share = jnp.where(jax.random.bernoulli(kind_key), shares[0], shares[-1])
    labels = jax.nn.one_hot(batch['label'], num_classes)
    return {
      **batch,
      'image': _blend(image, share[None, :, :, None].astype(image.dtype)),
      'label': _blend(labels, jnp.mean(share)),
    }

  return mix


def _blend(x: jax.Array, share: jax.Array) -> jax.Array:
  """Returns `share` of every row and the rest of the next one.

  Rows are shuffled, so any other row would do; the next one is on the same
  device, most of the time.
  """
  return share * x + (1 - share) * jnp.roll(x, -1, axis=0)


def _quantiles(a: float) -> np.ndarray:
  """Returns float32 [4096], as many equally likely values of Beta(a, a).

  `jax.random.beta` takes two seconds to compile, for one number.
  """
  middles = (np.arange(_LEVELS) + 0.5) / _LEVELS
  return special.betaincinv(a, a, middles).astype(np.float32)


def _outside(
  key: jax.Array, kept: jax.Array, shape: tuple[int, int]
) -> jax.Array:
  """Returns float32 [H, W], 0 inside of a random rectangle and 1 outside.

  Its centre is uniform and its sides sqrt(1 - kept) of the image's, cut off at
  the borders, so that its mean, what counts for the label, may exceed `kept`.
  """
  size = jnp.asarray(shape)
  half = jnp.floor(size * jnp.sqrt(1 - kept)).astype(int) // 2
  middle = jax.random.randint(key, (2,), 0, size)
  inside = [
    (middle[i] - half[i] <= jnp.arange(shape[i]))
    & (jnp.arange(shape[i]) < middle[i] + half[i])
    for i in range(2)
  ]
  return 1.0 - (inside[0][:, None] & inside[1][None, :])
