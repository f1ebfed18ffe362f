"""A tensor on several grids at once: the mean over a menu, differentiable.

A relaxed layer weighs the K formats of a menu by probabilities p. Its operand
is sum_k p_k Q_k(x), which is linear in p, so the gradient with respect to p_k
is <g, Q_k(x)>, and that with respect to x passes through the share
sum_k p_k 1[|x| <= t_k] of the formats that do not clip.
"""

from collections.abc import Callable
import functools

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from fliqs_jax.numerics import quantize

# one-hot [K] -> a tensor on the grid of that format of the menu.
OnGrid = Callable[[jax.Array], quantize.Quantized]


def one_hots(size: int) -> np.ndarray:
  """Returns the one-hot vectors of a menu, float32 [K, K]."""
  return np.eye(size, dtype=np.float32)


def mixed(on_grid: OnGrid, probabilities: jax.Array) -> quantize.Quantized:
  """Returns the mean of a tensor over the formats of a menu.

  The values are sum_k p_k (s_k / S) v_k with the scale S = sum_k p_k s_k. At a
  one-hot p both equal `on_grid(p)` bit for bit. The formats are computed one
  after another, and again for the gradient, so the memory does not grow with K.

  Args:
    on_grid: gives the tensor [...] on the grid of a format, with a scale of the
      same shape for each format.
    probabilities: [K], their sum is 1.

  Returns:
    The values, float32 [...], which in general are no grid values and not exact
    in bfloat16; and the scale, which has no gradient: any other one would give
    the same product.
  """
  menu = one_hots(probabilities.size)
  scales = lax.stop_gradient(jax.vmap(lambda e: on_grid(e).scale)(menu))
  p = probabilities.reshape((-1,) + (1,) * (scales.ndim - 1))
  scale = lax.stop_gradient(jnp.sum(p * scales, axis=0, keepdims=True))
  # A quotient of equal numbers may not be 1: XLA writes some divisions as
  # products with a reciprocal.
  weights = p * jnp.where(scales == scale, 1.0, scales / scale)

  # Only this is computed again for the gradient. With the sum inside, each of
  # the K sums would be kept.
  @jax.checkpoint
  def term(one_hot: jax.Array, weight: jax.Array) -> jax.Array:
    return weight * on_grid(one_hot).values

  def add(
    total: jax.Array, option: tuple[jax.Array, jax.Array]
  ) -> tuple[jax.Array, None]:
    return total + term(*option), None

  # -0 is the neutral element: 0 + -0 would lose the sign.
  none = jnp.full_like(jax.eval_shape(on_grid, menu[0]).values, -0.0)
  values, _ = lax.scan(add, none, (jnp.asarray(menu), weights))
  return quantize.Quantized(values, scale[0])


def branched(
  at: Callable[[jax.Array], jax.Array], probabilities: jax.Array
) -> jax.Array:
  """Returns the mean of an op's results over the formats of a menu.

  Args:
    at: one-hot [K] -> result of the op at that format.
    probabilities: [K], their sum is 1.
  """
  # Hidden from XLA, which reassociates the scales of constant formats.
  menu = lax.optimization_barrier(one_hots(probabilities.size))
  # Unrolled: XLA on CPU runs convolutions inside a loop on one thread.
  return functools.reduce(
    jnp.add, [p * at(one_hot) for p, one_hot in zip(probabilities, menu)]
  )
