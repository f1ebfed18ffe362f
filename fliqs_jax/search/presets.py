"""Presets of the search: controllers with their config keys."""

from collections.abc import Callable, Mapping, Sequence
import math
from typing import Any, NamedTuple

from fliqs_jax.runtime import replicas as replicas_lib
from fliqs_jax.search import controller as controller_lib
from fliqs_jax.search import schedules
from fliqs_jax.search.controllers import reinforce
from fliqs_jax.search.controllers import relaxed
from fliqs_jax.search.controllers import scored

# The start of the search, a fraction of training (A.4).
_START = 0.25
# When options are scored: at this step, but within these fractions of training.
_SCORED_AT, _SCORED_FIRST, _SCORED_LAST = 300, 0.2, 0.375
# When options are scored if sizes are among them: the weights of a network that
# is cut out of the largest one need longer than those of other formats.
_START_OF_SIZES = _SCORED_FIRST
# Of Adam on the importances; DQSS's is not published.
_DQSS_RATE = 1e-2
# The steps for which A.4 gives its learning rate.
_PAPER_STEPS, _PAPER_RATE = 30_200, 4.6e-3


class Preset(NamedTuple):
  """A row of `PRESETS`.

  Attributes:
    controller: (relative_cost, phases, *, gamma, learning_rate,
      entropy_weight, caps, replicas) -> `Controller`; with `leave_one_out`
      where the preset has it.
    keys: steps of training -> the `search` section of a config but `preset`:
      `start`, `freeze`, `gamma`, `quality`, `learning_rate`,
      `entropy_schedule`, `entropy_beta`, `scores`, `scorings`.
    has_leave_one_out: whether the preset allows `parallel.leave_one_out`.
    unused: keys that the preset does not read, so that no other value than its
      own is allowed.
    mix: what the layers compute in the training step, a `QuantSpec.mix`; all
      else is done by sampled layers. A relaxed one needs sizes to be fixed.
  """

  controller: Callable[..., controller_lib.Controller]
  keys: Callable[[int], dict[str, Any]]
  has_leave_one_out: bool = False
  unused: tuple[str, ...] = ()
  mix: str = 'sampled'


_SCORES = ('scores', 'scorings')
_POLICY_GRADIENT = (
  'gamma',
  'learning_rate',
  'entropy_schedule',
  'entropy_beta',
)
_NOT_RELAXED = ('gamma', 'entropy_schedule', 'entropy_beta', *_SCORES)


def _paper_keys(steps: int) -> dict[str, Any]:
  return dict(
    start=_START,
    freeze=1.0,
    gamma=-0.1,
    quality='accuracy',
    learning_rate=_PAPER_RATE * math.sqrt(_PAPER_STEPS / max(steps, 1)),
    entropy_schedule='cosine',
    entropy_beta=0.5,
    scores='',
    scorings=0,
  )


def _default_keys(steps: int) -> dict[str, Any]:
  return dict(
    start=_START,
    freeze=0.95,
    gamma=-0.3,
    quality='cross_entropy',
    learning_rate=1 / math.sqrt(max((1 - _START) * steps, 1)),
    entropy_schedule='cosine',
    entropy_beta=0.1,
    scores='',
    scorings=0,
  )


def _sensitivity_keys(steps: int) -> dict[str, Any]:
  return dict(
    # Scores need some steps, and the weights need time for what they decide.
    start=min(max(_SCORED_AT / max(steps, 1), _SCORED_FIRST), _SCORED_LAST),
    freeze=0.5,
    gamma=0.0,
    quality='cross_entropy',
    learning_rate=0.0,
    entropy_schedule='off',
    entropy_beta=0.0,
    scores='fisher',
    scorings=1,
  )


def _relaxed_keys(steps: int) -> dict[str, Any]:
  return dict(
    start=_START,
    freeze=0.75,
    gamma=0.0,
    quality='cross_entropy',
    learning_rate=2 / math.sqrt(max((1 - _START) * steps, 1)),
    entropy_schedule='off',
    entropy_beta=0.0,
    scores='',
    scorings=0,
  )


def _dqss_keys(steps: int) -> dict[str, Any]:
  return _relaxed_keys(steps) | dict(learning_rate=_DQSS_RATE)


# The names of `search.preset`. `paper` is the published controller (A.4; gamma
# is not published), `default` the better one of its kind; `sensitivity` scores
# each format a few times and solves the budget exactly; `edmips`, `dnas` and
# `dqss` train mixtures of formats. WORKSPACE.md has the source of each number.
# Another preset is another row.
PRESETS: dict[str, Preset] = {
  'paper': Preset(
    reinforce.paper, _paper_keys, has_leave_one_out=True, unused=_SCORES
  ),
  'default': Preset(reinforce.default, _default_keys, unused=_SCORES),
  'sensitivity': Preset(
    scored.controller, _sensitivity_keys, unused=_POLICY_GRADIENT
  ),
  'edmips': Preset(
    relaxed.controller, _relaxed_keys, unused=_NOT_RELAXED, mix='composite'
  ),
  'dnas': Preset(
    relaxed.controller, _relaxed_keys, unused=_NOT_RELAXED, mix='branched'
  ),
  'dqss': Preset(
    relaxed.controller, _dqss_keys, unused=_NOT_RELAXED, mix='composite'
  ),
}


def search_keys(
  preset: str,
  steps: int,
  gamma: float | None = None,
  sizes: bool = False,
  usual_gamma: float | None = None,
) -> dict[str, Any]:
  """Returns the `search` section of a config for a preset.

  Args:
    preset: `paper`, `default`, `sensitivity`, or another key of `PRESETS`.
    steps: number of steps of training, by which presets scale their learning
      rate.
    gamma: weight of the cost in units of the quality; None: the usual one.
    sizes: whether sizes are searched, too.
    usual_gamma: what presets that read a gamma get, if the quality is not
      theirs; None: the preset's.

  Raises:
    ValueError: the preset is unknown, or does not read the `gamma` given.
  """
  keys = dict(preset=preset) | _preset(preset).keys(steps)
  if gamma is None and 'gamma' not in _preset(preset).unused:
    gamma = usual_gamma
  if sizes and keys['scorings']:
    keys['start'] = _START_OF_SIZES
  keys = keys if gamma is None else keys | dict(gamma=gamma)
  check_keys(keys, steps)
  return keys


def check_keys(keys: Mapping[str, Any], steps: int) -> None:
  """Checks that the `search` section of a config sets only what is read.

  Args:
    keys: the section.
    steps: length of training.

  Raises:
    ValueError: unknown preset, or a key that the preset does not read has
      another value than the preset's own.
  """
  preset = _preset(keys['preset'])
  own = preset.keys(steps)
  for key in preset.unused:
    if keys[key] != own[key]:
      raise ValueError(
        f'search.{key}={keys[key]!r} would change nothing: '
        f'search.preset={keys["preset"]!r} does not read it; leave it at '
        f'{own[key]!r}'
      )


def make(
  preset: str,
  relative_cost: controller_lib.RelativeCost,
  phases: schedules.Phases,
  *,
  caps: Sequence[controller_lib.RelativeCost] = (),
  replicas: replicas_lib.Replicas = replicas_lib.ONE,
  leave_one_out: bool = False,
  **overrides: Any,
) -> controller_lib.Controller:
  """Returns the controller of a preset.

  Args:
    preset: `paper` (the published REINFORCE: Eq. 1, 3, 8; A.4), `default` (four
      architectures in each step, cost in closed form), `sensitivity` (scores of
      each option, budget solved exactly), `edmips`, `dnas` or `dqss` (the
      gradient of the loss; the step needs the `apply` of a model with the
      preset's `mix` in its spec), or another key of `PRESETS`.
    relative_cost: {decision: [K]} -> C / C_T [], the result of
      `SearchSpace.relative_cost`.
    phases: the steps at which the search starts and ends.
    caps: {decision: [K]} -> C / limit [] of other costs, which shall be at most
      1; `sensitivity` leaves them to what solves the budget.
    replicas: the copies of the step in which the controller works.
    leave_one_out: whether the baseline of `paper` is the mean reward of the
      other replicas at the same step.
    **overrides: values that replace those of `search_keys`: `gamma` (weight of
      the cost in units of the quality, negative), `learning_rate`,
      `entropy_schedule` and `entropy_beta` (Eq. 9).

  Returns:
    The controller: functions `init`, `propose` and `update`, and the number of
    architectures in each step, `samples`.

  Raises:
    ValueError: the preset or an override is unknown, or a value is not allowed.
  """
  allowed = ('gamma', 'learning_rate', 'entropy_schedule', 'entropy_beta')
  if unknown := sorted(set(overrides) - set(allowed)):
    raise ValueError(
      f'unknown search keys {", ".join(unknown)}; allowed: {", ".join(allowed)}'
    )
  keys = search_keys(preset, phases.steps) | overrides
  check_keys(keys, phases.steps)
  baseline: dict[str, bool] = {}
  if leave_one_out:
    if not _preset(preset).has_leave_one_out:
      raise ValueError(
        'parallel.leave_one_out=True replaces the running baseline of '
        f"search.preset='paper', but search.preset={preset!r} has none; set it "
        'to False'
      )
    baseline = dict(leave_one_out=True)
  return _preset(preset).controller(
    relative_cost,
    phases,
    caps=tuple(caps),
    replicas=replicas,
    **baseline,
    gamma=keys['gamma'],
    learning_rate=keys['learning_rate'],
    entropy_weight=schedules.entropy_weight(
      keys['entropy_schedule'], keys['entropy_beta']
    ),
  )


def _preset(name: str) -> Preset:
  if name not in PRESETS:
    raise ValueError(
      f'search.preset={name!r} is unknown; allowed: {", ".join(PRESETS)}'
    )
  return PRESETS[name]
