"""Checks of a config before anything is trained; each names key and value."""

from collections.abc import Iterator
import contextlib
from typing import Any

import ml_collections

from fliqs_jax.numerics import formats as formats_lib
from fliqs_jax.search import presets
from fliqs_jax.search import sensitivity
from fliqs_jax.space import cost_model
from fliqs_jax.space import search_space
from fliqs_jax.space import sizes as sizes_lib


@contextlib.contextmanager
def named(key: str, value: Any) -> Iterator[None]:
  """Names the key in an error of what it holds."""
  try:
    yield
  except ValueError as error:
    raise ValueError(f'{key}={value!r}: {error}') from None


def formats(config: ml_collections.ConfigDict) -> None:
  """Raises ValueError if a name is no format."""
  with named('quant.formats', config.quant.formats):
    formats_lib.menu(config.quant.formats)
  with named('quant.menus', config.quant.menus):
    for _, menu in config.quant.menus:
      formats_lib.menu(menu)
  with named('references', config.references):
    for name in config.references:
      formats_lib.parse(name)


def frozen(config: ml_collections.ConfigDict) -> None:
  """Raises ValueError if weights cannot stay as they are."""
  if config.train.frozen and not config.init_from:
    raise ValueError(
      'train.frozen=True keeps the weights as they are, so there must be '
      'trained ones: name a checkpoint with --init_from'
    )
  if config.train.frozen and config.quant.act_start:
    raise ValueError(
      f'quant.act_start={config.quant.act_start} must be 0 with train.frozen: '
      'a trained network needs no steps without quantized activations'
    )
  if config.train.teacher and not config.train.frozen:
    raise ValueError(
      'train.teacher=True learns from the same network without formats, whose '
      'weights must not move: set train.frozen=True, too'
    )


def search(keys: ml_collections.ConfigDict, steps: int) -> None:
  """Raises ValueError if the `search` section sets what nothing reads."""
  presets.check_keys(keys, steps)
  if keys.scorings and keys.scores not in sensitivity.METRICS:
    raise ValueError(
      f'search.scores={keys.scores!r} is unknown; allowed: '
      f'{", ".join(sensitivity.METRICS)}'
    )


def sizes(
  config: ml_collections.ConfigDict, space: search_space.SearchSpace
) -> None:
  """Raises ValueError if open sizes do not suit the rest of the config."""
  decided = {type(decision.size) for decision in space.open_sizes}
  for key, size in (
    ('widths', sizes_lib.Channels),
    ('kernels', sizes_lib.Kernel),
  ):
    if config.sizes[key] and size not in decided:
      raise ValueError(
        f'sizes.{key}={config.sizes[key]}: the network {config.model.name} has '
        f'no such sizes to search; set sizes.{key} to ()'
      )
  open_sizes = any(len(decision.labels) > 1 for decision in space.open_sizes)
  preset = config.search.preset
  if open_sizes and presets.PRESETS[preset].mix != 'sampled':
    raise ValueError(
      f'search.preset={preset!r} trains a mean over formats, and sizes have no '
      'mean: set sizes.widths and sizes.kernels to (), or use search.preset='
      "'default'"
    )
  menus = [decision.menu for decision in space.formats]
  if open_sizes and any(map(formats_lib.has_strategies, menus)):
    raise ValueError(
      'the strategies of quant.strategies or quant.formats find thresholds in '
      'all channels, and this config searches sizes: use no strategies, or set '
      'sizes.widths and sizes.kernels to ()'
    )
  kind = config.cost.kind
  if open_sizes and cost_model.kind_of(kind).is_per_weight:
    raise ValueError(
      f'cost.kind={kind!r} does not depend on sizes, and this config '
      "searches sizes; use cost.kind='bops' or 'size'"
    )
