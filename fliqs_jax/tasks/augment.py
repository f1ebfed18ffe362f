"""Mixup and cutmix: pure functions of a batch and a key, inside the step.

They are not in `data`: mixing inside the step costs the decoding machine no
time, and a batch can be split over devices without regard to its pairs. Mixed
labels are distributions, which a cross-entropy takes like one-hot vectors.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import scipy

Batch = Mapping[str, jax.Array]

_LEVELS = 4096


def mixing(
  num_classes: int, mixup: float, cutmix: float
) -> Callable[[jax.Array, Batch], dict[str, jax.Array]]:
  """Returns the function `(key, batch) -> batch` that mixes neighbours.

  Mixup (Zhang et al. 2018) shows lambda x_i + (1 - lambda) x_j. Cutmix (Yun et
  al. 2019) shows x_i with a rectangle of x_j; lambda is the share of x_i that
  remains. As in DeiT, all examples of a batch have the same lambda ~ Beta(a,
  a); if both are on, each batch is mixed by one of them, with probability 1/2.

  Args:
    num_classes: number of classes C.
    mixup: parameter a of mixup; 0 switches it off.
    cutmix: parameter a of cutmix; 0 switches it off.

  Returns:
    A function of a key and a batch with `image` [N, H, W, D] and `label` int
    [N], which returns the batch with mixed images and labels float32 [N, C].

  Raises:
    ValueError: a parameter is negative, or both are 0.
  """
  if min(mixup, cutmix) < 0 or max(mixup, cutmix) == 0:
    raise ValueError(
      f'mixup={mixup} and cutmix={cutmix} must not be negative, and one of '
      'them must be above 0'
    )

  # Constants of the compiled step; None if the method is off.
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
    # If one method is on, both indices select its map.
    share = jnp.where(jax.random.bernoulli(kind_key), shares[0], shares[-1])
    labels = jax.nn.one_hot(batch['label'], num_classes)
    return {
      **batch,
      'image': _blend(image, share[None, :, :, None].astype(image.dtype)),
      'label': _blend(labels, jnp.mean(share)),
    }

  return mix


def _blend(x: jax.Array, share: jax.Array) -> jax.Array:
  """Returns `share` of each row plus 1 - `share` of the next row.

  Rows are shuffled, so any other row is as good; the next one is usually on the
  same device.
  """
  return share * x + (1 - share) * jnp.roll(x, -1, axis=0)


def _quantiles(a: float) -> np.ndarray:
  """Returns float32 [4096] equally likely values of Beta(a, a).

  `jax.random.beta` would take two seconds to compile.
  """
  middles = (np.arange(_LEVELS) + 0.5) / _LEVELS
  return scipy.special.betaincinv(a, a, middles).astype(np.float32)


def _outside(
  key: jax.Array, kept: jax.Array, shape: tuple[int, int]
) -> jax.Array:
  """Returns float32 [H, W], 0 inside of a random rectangle and 1 outside.

  The centre of the rectangle is uniform, and its sides are sqrt(1 - kept) of
  the image's, cut off at the borders. So the mean of the result, which weights
  the labels, may exceed `kept`.
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
