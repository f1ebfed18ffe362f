"""Interface of a controller, its state, and the reward that it optimises."""

from collections.abc import Callable
from typing import Any, NamedTuple

from flax import struct
import jax
import jax.numpy as jnp

# {decision: [K]} -> (expected) cost / target, as `SearchSpace.relative_cost`.
RelativeCost = Callable[[Any], Any]


class Controller(NamedTuple):
  """A search method over a tree of decisions.

  Attributes:
    init: tree of [K] logits -> state, which has a field `policy`.
    propose: (state, key, step) -> `samples` architectures, leaves [M, K].
    update: (state, architectures, qualities [M], step) -> (state, metrics).
    samples: number M of architectures in each step.
    judges: whether the step judges the architectures on the validation batch;
      if not, `update` gets None for qualities.
    warm_up: on what the weights train until the search starts: `proposed`, the
      first proposal; `dearest_formats`, that at the most precise formats; or
      `dearest`, which has the largest sizes, too.
    differentiates: whether `update` gets, in place of qualities, the gradient
      of the training loss with respect to the first proposal, a tree of [K].
  """

  init: Callable[[Any], Any]
  propose: Callable[[Any, jax.Array, jax.Array], Any]
  update: Callable[..., tuple[Any, dict[str, jax.Array]]]
  samples: int
  judges: bool = True
  warm_up: str = 'proposed'
  differentiates: bool = False


@struct.dataclass
class SearchState:
  """State of a controller of `reinforce`.

  Attributes:
    policy: tree of [K] logits.
    opt_state: Adam's moments.
    average: [] running mean, of the reward (`paper`) or of the squared
      advantage (`default`), biased to zero.
    peak: [] largest advantage scale of the search so far (`default`).
    count: [] int32 updates of the average, which unbias it.
  """

  policy: Any
  opt_state: Any
  average: jax.Array
  peak: jax.Array
  count: jax.Array


# A quality of order one is below the last bit of float32 beside it.
_LARGEST_GAMMA = 1e6


def reward(quality: Any, cost_error: Any, gamma: Any) -> Any:
  """Returns r = Q + gamma |C / C_T - 1| (Eq. 1).

  Args:
    quality: quality Q; more is better.
    cost_error: |C / C_T - 1| of an architecture, or its expectation under a
      policy (`expected_absolute_error`).
    gamma: weight of the cost, negative, in units of the quality.
  """
  return quality + gamma * cost_error


def absolute_error(relative_cost: Any) -> Any:
  """Returns |C / C_T - 1|."""
  return jnp.abs(relative_cost - 1.0)


def expected_absolute_error(
  relative_cost: RelativeCost, probabilities: Any, weight: jax.Array
) -> jax.Array:
  """Returns E|C / C_T - 1| [] under a factorised policy, differentiable.

  C / C_T is near normal, so its absolute error is a folded normal with the
  exact mean and, to first order in the decisions, the exact variance. The plain
  |E[C] / C_T - 1| is blind to the variance; its argmax ends up to 3 % below the
  target.

  Args:
    relative_cost: tree of [K] -> C / C_T [].
    probabilities: tree of [K].
    weight: [] in [0, 1], weight of the gradient through the variance.
  """
  mean, slopes = jax.value_and_grad(relative_cost)(probabilities)
  slopes = jax.lax.stop_gradient(slopes)

  def variance(p: jax.Array, h: jax.Array) -> jax.Array:
    return jnp.sum(p * h**2) - jnp.sum(p * h) ** 2

  terms = jax.tree.map(variance, probabilities, slopes)
  sd = jnp.sqrt(jnp.maximum(sum(jax.tree.leaves(terms)), 1e-12))
  sd = weight * sd + (1 - weight) * jax.lax.stop_gradient(sd)
  mu = mean - 1.0
  return mu * jax.lax.erf(mu / (sd * jnp.sqrt(2.0))) + sd * jnp.sqrt(
    2 / jnp.pi
  ) * jnp.exp(-(mu**2) / (2 * sd**2))


def excess(relative_cost: Any) -> Any:
  """Returns max(C / C_T - 1, 0), what is above a cap."""
  return jnp.maximum(relative_cost - 1.0, 0.0)


def expected_excess(
  relative_cost: RelativeCost, probabilities: Any, weight: jax.Array
) -> jax.Array:
  """Returns E max(C / C_T - 1, 0) [] under a factorised policy.

  It is half of E|C / C_T - 1| and of E[C] / C_T - 1.

  Args:
    relative_cost: tree of [K] -> C / C_T [].
    probabilities: tree of [K].
    weight: [] in [0, 1], weight of the gradient through the variance.
  """
  error = expected_absolute_error(relative_cost, probabilities, weight)
  return (error + relative_cost(probabilities) - 1.0) / 2


def check_gamma(gamma: float) -> None:
  """Checks the weight of the cost.

  Raises:
    ValueError: gamma is not negative, or so large that the quality is lost.
  """
  if not -_LARGEST_GAMMA <= gamma < 0:
    raise ValueError(
      f'search.gamma={gamma} must be negative and at least '
      f'-{_LARGEST_GAMMA:g}: Eq. 1 adds it to the quality, so a positive '
      'weight would reward cost'
    )
