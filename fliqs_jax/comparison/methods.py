"""Methods of a comparison: what each trains, and how it gets its formats.

All of them end in a value of `arch`. A search preset finds it while it trains;
the others know it before, and train a fixed network.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from fliqs_jax.run import experiment as experiment_lib
from fliqs_jax.run import sensitivity_table
from fliqs_jax.search import presets
from fliqs_jax.search import sensitivity
from fliqs_jax.space import baselines

# One format everywhere, each format of the menus; it has no target.
UNIFORM = 'uniform'


class Assigned(NamedTuple):
  """A method that knows the architecture before it trains.

  Attributes:
    choose: (experiment at a target, seed, scores or None) -> {decision: [K]
      one-hot}.
    has_target: whether the architecture depends on the target.
    has_scores: whether it needs the scores of a network that was trained at the
      dearest formats.
  """

  choose: Callable[
    [experiment_lib.Experiment, int, sensitivity.Scores | None],
    dict[str, np.ndarray],
  ]
  has_target: bool = True
  has_scores: bool = False


def _manual(
  experiment: experiment_lib.Experiment, seed: int, scores: Any
) -> dict[str, np.ndarray]:
  del seed, scores
  return baselines.manual(experiment.space)


def _random(
  experiment: experiment_lib.Experiment, seed: int, scores: Any
) -> dict[str, np.ndarray]:
  del scores
  return baselines.random_at_cost(
    experiment.space,
    experiment.cost,
    experiment.target,
    np.random.default_rng(seed),
    experiment.caps,
  )


def _allocated(method: str) -> Callable[..., dict[str, np.ndarray]]:
  def choose(
    experiment: experiment_lib.Experiment, seed: int, scores: Any
  ) -> dict[str, np.ndarray]:
    del seed
    return sensitivity_table.allocate(experiment, scores, method).choices

  return choose


# Another method is another row here, or in `presets.PRESETS`.
ASSIGNED: dict[str, Assigned] = {
  'manual': Assigned(_manual, has_target=False),
  'random': Assigned(_random),
  'greedy': Assigned(_allocated('greedy'), has_scores=True),
  'ilp': Assigned(_allocated('exact'), has_scores=True),
}


def check(names: list[str]) -> None:
  """Checks names of methods.

  Raises:
    ValueError: a name is unknown or repeated, or there is none.
  """
  allowed = (UNIFORM, *ASSIGNED, *presets.PRESETS)
  if unknown := [name for name in names if name not in allowed]:
    raise ValueError(
      f'--methods={",".join(names)}: unknown {", ".join(map(repr, unknown))}; '
      f'allowed: {", ".join(allowed)}'
    )
  if not names or len(set(names)) < len(names):
    raise ValueError(
      f'--methods={",".join(names)} must name at least one method, each once'
    )
