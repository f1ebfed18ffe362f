"""Clipping multiples from real activations, at the end of phase one.

They are the alternative to the pre-computed table ("Switchable Clipping",
section 3): for each format of a layer, the multiple of the standard deviation
that quantizes the layer's own activations best.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from fliqs_jax.numerics import clipping
from fliqs_jax.space import search_space

# A sample of this size determines a multiple to about 1 %.
_VALUES = 100_000


def profiled_clips(
  apply: Any,
  space: search_space.SearchSpace,
  variables: Mapping[str, Any],
  images: Iterable[Any],
  everywhere: jax.sharding.Sharding | None = None,
) -> dict[str, Any]:
  """Returns `quant_stats` with every `clip` [K] replaced by a profiled one.

  Args:
    apply: the model's `apply`.
    space: the model's decisions.
    variables: params, arch and the other collections; `quant_stats` must hold
      statistics of at least one batch.
    images: batches [N, H, W, C]; ten are enough (Table 10c).
    everywhere: the sharding of an array that all processes can read, needed if
      the batches are split over devices of several processes.

  Raises:
    ValueError: a layer's activations are all zero or not finite.
  """

  def sampled(variables: Mapping[str, Any], images: Any) -> Any:
    _, sown = apply(variables, images, train=False, mutable=['act_inputs'])
    return jax.tree.map(_some, sown)

  forward = jax.jit(sampled, out_shardings=everywhere)
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
    values = np.concatenate(parts)
    mean, square = stats[f'{prefix}mean'], stats[f'{prefix}mean_square']
    std = float(np.sqrt(max(square - mean**2, 0)))
    try:
      multiples = clipping.profiled_multiples(_some(values), std, menus[layer])
    except ValueError as error:
      raise ValueError(
        f'quant.act_clip=profiled: layer {layer}: {error}'
      ) from None
    stats[f'{prefix}clip'] = jnp.asarray(multiples, jnp.float32)
  return traverse_util.unflatten_dict(stats, sep='/')


def _some(values: Any) -> Any:
  """Returns evenly spaced values, about `_VALUES` of them."""
  return values.reshape(-1)[:: -(-values.size // _VALUES)]
