"""Functions of training progress: phases, entropy weight, learning rates."""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

# Number of stairs of the exponential learning rate, and the factor of each.
_STAIRS, _STAIR = 150, 0.97

ENTROPY = ('cosine', 'linear', 'constant', 'off')


@dataclasses.dataclass(frozen=True)
class Phases:
  """The steps at which the phases of a run begin (Figure 2a).

  Attributes:
    steps: number of steps of training.
    act_start: first step with quantized activations.
    search_start: first step that samples its architecture from the policy and
      updates the policy; earlier architectures are uniformly random.
    freeze: first step at which the policy is replaced by its argmax and does
      not learn.
  """

  steps: int
  act_start: int
  search_start: int
  freeze: int

  def progress(self, step: jax.Array) -> jax.Array:
    """Returns the progress of training s, 0 to 1 (Eq. 9)."""
    return step / self.steps

  def search_progress(self, step: jax.Array) -> jax.Array:
    """Returns the progress of the search p: 0 at its start, 1 at the end."""
    searched = (step - self.search_start) / (self.steps - self.search_start)
    return jnp.clip(searched, 0.0, 1.0)

  def searching(self, step: jax.Array) -> jax.Array:
    """Returns whether the policy learns at this step, bool []."""
    return (step >= self.search_start) & (step < self.freeze)

  def branch_probability(self, step: jax.Array) -> jax.Array:
    """Returns the probability that all branches learn together (A.4).

    It falls from 1 to 0 before the search.
    """
    return jnp.clip(1.0 - step / max(self.search_start, 1), 0.0, 1.0)

  def scorings(self, count: int) -> tuple[int, ...]:
    """Returns the steps before which formats are scored, evenly spaced.

    The first is `search_start`, the last `freeze`; a single one is the first.

    Args:
      count: number of scorings.
    """
    if count < 2:
      return (self.search_start,) * count
    distance = (self.freeze - self.search_start) / (count - 1)
    return tuple(round(self.search_start + i * distance) for i in range(count))

  @property
  def search_steps(self) -> int:
    """Steps from the start of the search to the end of training."""
    return self.steps - self.search_start


def phases(
  steps: int, act_start: float, search_start: float, freeze: float
) -> Phases:
  """Returns the phases of a run from fractions of training.

  Args:
    steps: number of steps of training, at least 1.
    act_start: fraction of training, in [0, 1], at which activation quantization
      begins (A.2: best at 0.15 to 0.2).
    search_start: fraction of training, in [0, 1], at which the policy begins to
      learn (A.4: 0.25).
    freeze: fraction of training, in [0, 1], at which the policy is replaced by
      its argmax; 1: never.

  Returns:
    The first step of each phase, counted from 0 (Figure 2a).

  Raises:
    ValueError: `steps` is below 1, a fraction is outside of [0, 1],
      `search_start` is before `act_start`, or no step is between `search_start`
      and `freeze`.
  """
  if steps < 1:
    raise ValueError(f'train.steps={steps} must be at least 1')
  for key, value in (
    ('quant.act_start', act_start),
    ('search.start', search_start),
    ('search.freeze', freeze),
  ):
    if not 0 <= value <= 1:
      raise ValueError(
        f'{key}={value} must be a fraction of training, between 0 and 1'
      )
  if search_start < act_start:
    raise ValueError(
      f'search.start={search_start} comes before quant.act_start={act_start}: '
      'the controller would judge formats whose activations are not quantized '
      'yet; start the search later or activation quantization earlier'
    )
  start, end = round(search_start * steps), round(freeze * steps)
  if start >= end:
    raise ValueError(
      f'search.start={search_start} and search.freeze={freeze} leave no search '
      f'step among train.steps={steps}; freeze later, start earlier or train '
      'longer'
    )
  return Phases(steps, round(act_start * steps), start, end)


def entropy_weight(kind: str, beta: float) -> Callable[[Any], jax.Array]:
  """Returns beta_H as a function of progress in [0, 1] (Eq. 9).

  Args:
    kind: kind of the schedule: `cosine` (Eq. 9), `linear`, `constant` or `off`.
    beta: value of beta_H at the end, at least 0.

  Raises:
    ValueError: the kind is unknown, or beta is negative.
  """
  if kind not in ENTROPY:
    raise ValueError(
      f'search.entropy_schedule={kind!r} is unknown; allowed: '
      f'{", ".join(ENTROPY)}'
    )
  if beta < 0:
    raise ValueError(
      f'search.entropy_beta={beta} must not be negative: it would reward '
      'entropy, and the policy would never settle'
    )
  shape = {
    'cosine': lambda s: 0.5 * (1 - jnp.cos(jnp.pi * s)),
    'linear': lambda s: s,
    'constant': jnp.ones_like,
    'off': jnp.zeros_like,
  }[kind]
  return lambda progress: beta * shape(jnp.asarray(progress, jnp.float32))


def learning_rate(
  kind: str, base: float, steps: int, warmup_steps: int
) -> optax.Schedule:
  """Returns a learning rate schedule with linear warm-up from zero.

  Args:
    kind: kind of the schedule: `cosine` to zero, `exponential` in 150 stairs of
      0.97 (EfficientNet's 2.4 epochs each, of the paper's 360), `halved` after
      two thirds of training (EDSR), or `constant`.
    base: learning rate after the warm-up.
    steps: number of steps of training.
    warmup_steps: number of steps of the warm-up.

  Raises:
    ValueError: the kind is unknown.
  """
  if kind == 'cosine':
    decay = optax.cosine_decay_schedule(base, max(steps - warmup_steps, 1))
  elif kind == 'exponential':
    # optax declares the length of a stair as int, but a fraction works.
    stair: Any = steps / _STAIRS
    decay = optax.exponential_decay(base, stair, _STAIR, staircase=True)
  elif kind == 'halved':
    after = 2 * steps // 3 - warmup_steps
    decay = optax.piecewise_constant_schedule(base, {after: 0.5})
  elif kind == 'constant':
    decay = optax.constant_schedule(base)
  else:
    raise ValueError(
      f'optimizer.schedule={kind!r} is unknown; allowed: cosine, exponential, '
      'halved, constant'
    )
  if not warmup_steps:
    return decay
  rise = optax.linear_schedule(0.0, base, warmup_steps)
  return optax.join_schedules([rise, decay], [warmup_steps])
