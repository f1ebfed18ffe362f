"""Functions of training progress: phases, entropy weight, learning rates."""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

# Of the exponential schedule of learning rates.
_STAIRS, _STAIR = 150, 0.97

ENTROPY = ('cosine', 'linear', 'constant', 'off')


@dataclasses.dataclass(frozen=True)
class Phases:
  """The steps at which a run changes its ways (Figure 2a).

  Attributes:
    steps: length of training.
    act_start: first step with quantized activations.
    search_start: first step whose architecture the policy samples, and that
      updates the policy; before it, architectures are uniformly random.
    freeze: first step from which the policy is its argmax and learns no more.
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
    """Returns how likely all branches learn together: 1 to 0 (A.4)."""
    return jnp.clip(1.0 - step / max(self.search_start, 1), 0.0, 1.0)

  @property
  def search_steps(self) -> int:
    """Steps from the start of the search to the end of training."""
    return self.steps - self.search_start


def phases(
  steps: int, act_start: float, search_start: float, freeze: float
) -> Phases:
  """Returns the phases of a run from fractions of training.

  Args:
    steps: length of training.
    act_start: when activation quantization begins, in [0, 1].
    search_start: when the policy begins to learn, in [0, 1].
    freeze: when the policy is replaced by its argmax, in [0, 1]; 1: never.

  Raises:
    ValueError: a fraction outside of [0, 1], `search_start` before `act_start`,
      or no step between `search_start` and `freeze`.
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
    kind: `cosine` (Eq. 9), `linear`, `constant` or `off`.
    beta: its value at the end.

  Raises:
    ValueError: for another kind, or a negative beta.
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
    kind: `cosine` to zero, `exponential` in 150 stairs of 0.97 (EfficientNet's
      2.4 epochs each, of the paper's 360), or `constant`.
    base: rate after warm-up.
    steps: length of training.
    warmup_steps: length of the warm-up.

  Raises:
    ValueError: for another kind.
  """
  if kind == 'cosine':
    decay = optax.cosine_decay_schedule(base, max(steps - warmup_steps, 1))
  elif kind == 'exponential':
    # optax types the length of a stair as whole; a fraction works.
    stair: Any = steps / _STAIRS
    decay = optax.exponential_decay(base, stair, _STAIR, staircase=True)
  elif kind == 'constant':
    decay = optax.constant_schedule(base)
  else:
    raise ValueError(
      f'optimizer.schedule={kind!r} is unknown; allowed: cosine, exponential, '
      'constant'
    )
  if not warmup_steps:
    return decay
  rise = optax.linear_schedule(0.0, base, warmup_steps)
  return optax.join_schedules([rise, decay], [warmup_steps])
