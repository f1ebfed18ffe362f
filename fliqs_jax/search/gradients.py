"""Gradients of the training loss, of a batch at once or in parts."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from fliqs_jax import data
from fliqs_jax.search import objectives

ModelState = Mapping[str, Any]
# A model's `apply`; linen has no stricter type, either.
Apply = Callable[..., Any]


def gradients(
  apply: Apply,
  loss: objectives.Loss,
  params: Any,
  choices: Any,
  model_state: ModelState,
  batch: objectives.Batch,
  key: jax.Array,
  *,
  expand: Callable[[Any], Any],
  differentiates: bool,
  accumulate: int,
  frozen: bool,
) -> tuple[Any, ModelState, Any, objectives.Metrics]:
  """Returns gradients, the collections after the batch, the loss and metrics.

  Args:
    apply: the model's `apply`.
    loss: (outputs, batch) -> (loss [], metrics).
    params: the parameters.
    choices: the architecture, {decision: [K]}.
    model_state: the model's other collections.
    batch: the training batch, entries [B, ...].
    key: PRNG key [] of what the model draws.
    expand: architecture -> the collection `arch`.
    differentiates: whether there is a gradient with respect to the choices.
    accumulate: number of parts of the batch that are taken one after another.
    frozen: whether there is none with respect to the parameters.

  Returns:
    The gradients with respect to the parameters and to the choices, None where
    there is none; the collections; the loss [] and {name: metric}, means over
    the parts.
  """
  arguments = (*((0,) * (not frozen)), *((1,) * differentiates))

  def of(
    model_state: ModelState, batch: objectives.Batch, key: jax.Array
  ) -> tuple[ModelState, tuple[Any, Any, objectives.Metrics]]:
    def train_loss(params: Any, choices: Any) -> tuple[jax.Array, Any]:
      outputs, changed = apply(
        {'params': params, 'arch': expand(choices), **model_state},
        data.model_inputs(batch),
        train=not frozen,
        mutable=[] if frozen else list(model_state),
        rngs={'dropout': key},
      )
      value, metrics = objectives.loss_of(loss, outputs, batch)
      return value, ({**model_state, **changed}, metrics)

    if not arguments:
      value, (changed, metrics) = train_loss(params, choices)
      return changed, ((None, None), value, metrics)
    (value, (changed, metrics)), found = jax.value_and_grad(
      train_loss, arguments, has_aux=True
    )(params, choices)
    by = dict(zip(arguments, found))
    return changed, ((by.get(0), by.get(1)), value, metrics)

  if accumulate == 1:
    changed, means = of(model_state, batch, key)
  else:
    changed, means = _over_parts(of, model_state, batch, key, accumulate)
  found, value, metrics = means
  return found, changed, value, metrics


def _over_parts(
  of: Callable[..., Any],
  model_state: ModelState,
  batch: objectives.Batch,
  key: jax.Array,
  accumulate: int,
) -> tuple[ModelState, Any]:
  """Returns the collections after all parts, and the means of other results."""

  def add(carry: Any, part: Any) -> tuple[Any, None]:
    changed, sums = carry
    changed, values = of(changed, *part)
    return (changed, jax.tree.map(jnp.add, sums, values)), None

  cut = parts(batch, accumulate)
  keys = jax.random.split(key, accumulate)
  first = jax.tree.map(lambda x: x[0], (cut, keys))
  _, shapes = jax.eval_shape(of, model_state, *first)
  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
  (changed, sums), _ = lax.scan(add, (model_state, zeros), (cut, keys))
  return changed, jax.tree.map(lambda x: x / accumulate, sums)


def parts(batch: objectives.Batch, n: int) -> objectives.Batch:
  """Returns the n equal parts of a batch: each entry [n, B / n, ...].

  Part i has the examples i, i + n, ..., so each device has rows of every part
  if a batch is split over devices.

  Raises:
    ValueError: the batch has no n equal parts, or an entry is one value for all
      examples.
  """
  for path, leaf in jax.tree.leaves_with_path(batch):
    if not jnp.ndim(leaf):
      raise ValueError(
        f'the batch cannot be cut into {n} parts, because '
        f'{jax.tree_util.keystr(path)} is one value for all examples; give one '
        'for each, [B, ...]'
      )

  def every(x: jax.Array) -> jax.Array:
    if n < 1 or len(x) % n:
      raise ValueError(
        f'a batch of {len(x)} examples has no {n} equal parts, one for each '
        'judged architecture or each step of accumulation; change its size or '
        'their number'
      )
    return jnp.moveaxis(x.reshape(-1, n, *x.shape[1:]), 1, 0)

  return jax.tree.map(every, batch)
