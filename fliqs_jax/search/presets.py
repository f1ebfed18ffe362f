"""The two presets of the search: the `search` section of a config."""

import math
from typing import Any


def search_keys(
  preset: str, steps: int, gamma: float | None = None
) -> dict[str, Any]:
  """Returns the `search` section of a config for one of the two presets.

  `paper` is the published controller (A.4; gamma is not published), `default`
  the better one; WORKSPACE.md tells where each number comes from.

  Args:
    preset: `paper` or `default`.
    steps: length of training; both presets scale their learning rate by it.
    gamma: weight of the cost in units of the quality; None: the preset's.

  Raises:
    ValueError: for another preset.
  """
  start = 0.25
  if preset == 'paper':
    keys = dict(
      freeze=1.0,
      gamma=-0.1,
      quality='accuracy',
      learning_rate=4.6e-3 * math.sqrt(30_200 / max(steps, 1)),
      entropy_schedule='cosine',
      entropy_beta=0.5,
    )
  elif preset == 'default':
    keys = dict(
      freeze=0.95,
      gamma=-0.3,
      quality='cross_entropy',
      learning_rate=1 / math.sqrt(max((1 - start) * steps, 1)),
      entropy_schedule='cosine',
      entropy_beta=0.1,
    )
  else:
    raise ValueError(
      f'search.preset={preset!r} is unknown; allowed: paper, default'
    )
  keys = dict(preset=preset, start=start) | keys
  return keys if gamma is None else keys | dict(gamma=gamma)
