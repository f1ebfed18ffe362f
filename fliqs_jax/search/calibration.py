"""Thresholds from the activations of a network.

Clipping multiples, at the end of phase one, are the alternative to the
pre-computed table ("Switchable Clipping", section 3): for each format of a
layer, the multiple of the standard deviation with which the threshold quantizes
the layer's own activations best. Strategies are those of DQSS.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import logging
import math
from typing import Any

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from fliqs_jax import data
from fliqs_jax.layers import ratios
from fliqs_jax.numerics import clipping
from fliqs_jax.numerics import formats
from fliqs_jax.numerics import strategies
from fliqs_jax.space import search_space

_LOG = logging.getLogger(__name__)

# A sample of this size determines a multiple to about 1 %.
_VALUES = 100_000


def profiled_clips(
  apply: Any,
  space: search_space.SearchSpace,
  variables: Mapping[str, Any],
  images: Iterable[Any],
  rule: str,
  jit: Callable[..., Any] = jax.jit,
) -> dict[str, Any]:
  """Returns `quant_stats` with every `clip` [K] replaced by a profiled one.

  A layer whose activations were all zero keeps its multiples, with a warning.

  Args:
    apply: the model's `apply`.
    space: the model's decisions.
    variables: params, arch and the other collections; `quant_stats` must hold
      statistics of at least one batch.
    images: batches [N, H, W, C]; ten are enough (Table 10c).
    rule: how thresholds are made of statistics, `QuantSpec.act_threshold`.
    jit: `jax.jit`; of a run `Devices.jit_everywhere`, since the batches may be
      split over the devices of several processes.

  Raises:
    ValueError: a layer's activations are not finite.
  """

  def sampled(variables: Mapping[str, Any], images: Any) -> Any:
    _, sown = apply(variables, images, train=False, mutable=['act_inputs'])
    return jax.tree.map(_some, sown)

  forward = jit(sampled)
  seen: dict[str, list[np.ndarray]] = {}
  for batch in images:
    sown: dict[str, Any] = traverse_util.flatten_dict(
      forward(variables, batch)['act_inputs'], sep='/'
    )
    for path, values in sown.items():
      layer = path.removesuffix('x').rstrip('/')
      seen.setdefault(layer, []).extend(np.ravel(v) for v in values)
  stats: dict[str, Any] = traverse_util.flatten_dict(
    variables['quant_stats'], sep='/'
  )
  menus = {op.path: op.shape.act_menu or () for op in space.ops}
  for layer, parts in seen.items():
    prefix = f'{layer}/' if layer else ''
    values = _some(np.concatenate(parts))
    mean = abs(float(stats[f'{prefix}mean'])) if rule == 'magnitude' else 0.0
    std = float(np.sqrt(stats[f'{prefix}variance']))
    if not values.any() or not mean + std:
      _LOG.warning(
        'quant.act_clip=profiled: the activations of layer %s are all %s: it '
        'keeps the clipping of the table',
        layer,
        'equal' if values.any() else 'zero',
      )
      continue
    try:
      clip = _multiples(values, mean, std, menus[layer])
    except ValueError as error:
      raise ValueError(
        f'quant.act_clip=profiled: layer {layer}: {error}'
      ) from None
    stats[f'{prefix}clip'] = jnp.asarray(clip, jnp.float32)
  return traverse_util.unflatten_dict(stats, sep='/')


def warn_of_few(
  apply: Any,
  space: search_space.SearchSpace,
  variables: Mapping[str, Any],
  batch: Any,
) -> None:
  """Logs which operands are too small for the strategy `kl`, if any.

  Args:
    apply: the model's `apply`.
    space: the model's decisions.
    variables: its collections.
    batch: the batch in which thresholds are found.
  """

  def inputs(variables: Any) -> Any:
    _, sown = apply(
      variables, data.model_inputs(batch), train=False, mutable=['act_inputs']
    )
    return sown['act_inputs']

  flat = traverse_util.flatten_dict(jax.eval_shape(inputs, variables), sep='/')
  sizes = {
    path.removesuffix('x').rstrip('/'): sum(x.size for x in jax.tree.leaves(x))
    for path, x in flat.items()
  }
  names = []
  for path, shape in ((op.path, op.shape) for op in space.ops):
    for side, menu, size in (
      ('activations', shape.act_menu, sizes.get(path, math.inf)),
      ('weights', shape.weight_menu, shape.weights // shape.channels),
    ):
      is_kl = any(fmt.strategy == 'kl' for fmt in menu or ())
      if is_kl and size < strategies.LEAST_VALUES:
        names.append(f'{side} of {path}')
  if names:
    _LOG.warning(
      'kl needs at least %d numbers that share a threshold, and is max_abs '
      'where there are fewer: %s',
      strategies.LEAST_VALUES,
      ', '.join(names),
    )


def strategy_step(apply: Any) -> Callable[..., Any]:
  """Returns `(params, model_state, arch, batch) -> model_state`.

  In the inputs of each layer, in order, strategies find their thresholds for
  its activations and its weights; the layers before have theirs already.

  Args:
    apply: the model's `apply`, called with (variables, inputs, train=False).
  """

  def step(
    params: Any, model_state: Mapping[str, Any], arch: Any, batch: Any
  ) -> Mapping[str, Any]:
    _, changed = apply(
      {'params': params, 'arch': arch, **model_state},
      data.model_inputs(batch),
      train=False,
      mutable=['quant_stats', ratios.COLLECTION],
    )
    return {**model_state, 'quant_stats': changed['quant_stats']}

  return step


def _multiples(
  values: np.ndarray,
  mean: float,
  std: float,
  menu: Sequence[formats.NumericFormat],
) -> np.ndarray:
  """Returns the [K] multiples of `std` that, added to `mean`, fit values best.

  Where all values are equal, the mean alone is their threshold.
  """
  unit = float(np.hypot(mean, std))
  thresholds = unit * clipping.profiled_multiples(values, unit, menu)
  beyond = np.maximum(thresholds - mean, 0)
  # A strategy needs no multiple.
  beyond[[bool(fmt.strategy) for fmt in menu]] = np.inf
  return np.divide(beyond, std) if std else np.where(beyond < np.inf, 0, beyond)


def _some(values: Any) -> Any:
  """Returns evenly spaced values, about `_VALUES` of them."""
  return values.reshape(-1)[:: -(-values.size // _VALUES)]
