"""Steps of training, evaluation and settling: pure functions.

The order of a fused search step is that of TuNAS: the weights learn from the
training batch, then the new weights are judged on the validation batch with the
same architecture, and the policy learns from that. The weights never learn from
the validation batch, the controller never from the test split.
"""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import optax

from fliqs_jax import data
from fliqs_jax.layers import operands as operands_lib
from fliqs_jax.runtime import replicas as replicas_lib
from fliqs_jax.search import controller as controller_lib
from fliqs_jax.search import gradients as gradients_lib
from fliqs_jax.search import objectives
from fliqs_jax.search import optimizers
from fliqs_jax.search import schedules
from fliqs_jax.search import train_state
from fliqs_jax.space import quant_spec
from fliqs_jax.space import search_space

Apply = gradients_lib.Apply
ModelState = gradients_lib.ModelState
Batch, Metrics = objectives.Batch, objectives.Metrics
Step = Callable[
  [train_state.TrainState, Batch, Batch],
  tuple[train_state.TrainState, Metrics],
]


def search_step(
  apply: Apply,
  loss: objectives.Loss,
  quality: objectives.Quality,
  space: search_space.SearchSpace,
  controller: controller_lib.Controller,
  optimizer: optax.GradientTransformation,
  phases: schedules.Phases,
  *,
  mix: Callable[[jax.Array, Batch], Batch] | None = None,
  ema_decay: float = 0.0,
  accumulate: int = 1,
  frozen: bool = False,
  teacher: Callable[[Mapping[str, Any], Any], Any] | None = None,
  replicas: replicas_lib.Replicas = replicas_lib.ONE,
) -> Step:
  """Returns the step `(state, train_batch, valid_batch) -> (state, metrics)`.

  The weights learn with an architecture that the controller proposes; the
  updated weights are judged on the validation batch, and the controller learns
  from the qualities (Figure 2a; Eq. 1, 3). A controller that differentiates
  learns from the gradient of the training loss instead.

  Args:
    apply: the model's `apply`, called with (variables, inputs, train=...).
    loss: (outputs, training batch) -> (loss [], {name: metric []}).
    quality: (outputs, validation batch) -> quality []; more is better.
    space: the model's decisions. If none is open, nothing is judged.
    controller: the controller that proposes architectures and learns; if it
      judges them, its `samples` must divide the number of validation examples.
    optimizer: the optimizer of the weights.
    phases: the steps at which activation quantization and the search start.
    mix: (key, training batch) -> training batch, made by `augment.mixing`; None
      does not mix.
    ema_decay: decay of the running mean of the parameters; above 0 if the state
      was created with `keep_average`, else 0.
    accumulate: number of parts of the training batch, which are taken one after
      another to save memory; must divide the batch. Running statistics see each
      part.
    frozen: whether weights and running statistics stay as they are, and only
      the controller learns; the model is then called with train=False.
    teacher: (variables, inputs) -> labels that replace those of the training
      batch; None: the batch's own.
    replicas: the copies of this step, if it runs inside `jax.shard_map`; the
      same as the controller's.

  Returns:
    A pure function of a `TrainState` and two batches, which returns the next
    state and {name: metric []}. A batch is a dict of `label`, an array [B, ...]
    or a dict of all that the loss reads, and of the model's inputs [B, ...], of
    any other names but `example_mask`. Jit the function with the state donated.

  Raises:
    ValueError: the controller learns from mixtures, of which the model computes
      none, or `ema_decay` is out of range; from the function, when it is
      traced: `ema_decay` does not fit the state, the batch cannot be cut into
      parts, the loss or the quality is not one number, or the optimizer needs
      more than the loss.
  """
  _check_mix(apply, controller)
  if not 0 <= ema_decay < 1:
    raise ValueError(
      f'ema_decay={ema_decay} must be from 0, for no mean, to below 1'
    )

  def step(
    state: train_state.TrainState, train_batch: Batch, valid_batch: Batch
  ) -> tuple[train_state.TrainState, dict[str, jax.Array]]:
    keeps_average = bool(jax.tree.leaves(state.average))
    if bool(ema_decay) != keeps_average:
      raise ValueError(
        f'search_step has ema_decay={ema_decay}, but the state was created '
        f'with keep_average={keeps_average}; a mean of the weights needs '
        'a decay above 0 and keep_average=True, no mean neither'
      )
    key = replicas.key(jax.random.fold_in(state.key, state.step))
    arch_key, dropout_key = jax.random.split(key)
    proposed = controller.propose(state.search_state, arch_key, state.step)
    chosen = space.with_branches(
      _trained(controller, space, phases, state, proposed),
      jax.random.bernoulli(
        jax.random.fold_in(arch_key, 1), phases.branch_probability(state.step)
      ),
    )
    model_state = in_phase(state.model_state, state.step >= phases.act_start)
    if mix is not None:
      train_batch = mix(jax.random.fold_in(dropout_key, 1), train_batch)
    if teacher is not None:
      labels = teacher(
        {'params': state.params, **model_state}, data.model_inputs(train_batch)
      )
      train_batch = {**train_batch, 'label': labels}

    (gradients, of_choices), model_state, value, metrics = replicas.mean(
      gradients_lib.gradients(
        apply,
        loss,
        state.params,
        chosen,
        model_state,
        train_batch,
        dropout_key,
        expand=space.expand,
        differentiates=controller.differentiates,
        accumulate=accumulate,
        frozen=frozen,
      )
    )
    metrics['grad_norm'] = optax.tree.norm(gradients)
    params, opt_state = state.params, state.opt_state
    if not frozen:
      params, opt_state = optimizers.updated(
        optimizer, gradients, opt_state, params, value
      )
    average = state.average
    if ema_decay:
      average = optimizers.averaged(average, params, ema_decay, state.step)

    search_state = state.search_state
    if not space.is_fixed:
      signal = of_choices
      if controller.judges:
        variables = {'params': params, **model_state}
        signal = _judge(apply, quality, space, variables, proposed, valid_batch)
      search_state, search_metrics = controller.update(
        search_state, proposed, signal, state.step
      )
      metrics |= replicas.mean(search_metrics)
    state = dataclasses.replace(
      state,
      step=state.step + 1,
      params=params,
      average=average,
      opt_state=opt_state,
      model_state=model_state,
      search_state=search_state,
    )
    return state, metrics

  return step


def _trained(
  controller: controller_lib.Controller,
  space: search_space.SearchSpace,
  phases: schedules.Phases,
  state: train_state.TrainState,
  proposed: Any,
) -> Any:
  """Returns the architecture {decision: [K]} on which the weights train."""

  def first(options: jax.Array) -> jax.Array:
    # The one option of a menu is known: XLA computes with it as it compiles.
    return jnp.ones(1) if options.shape[-1] == 1 else options[0]

  trained = jax.tree.map(first, proposed)
  if controller.warm_up == 'proposed':
    return trained
  dearest = space.dearest()
  if controller.warm_up == 'dearest_formats':
    dearest = trained | {d.name: dearest[d.name] for d in space.formats}
  searching = state.step >= phases.search_start
  return jax.tree.map(
    lambda option, other: jnp.where(searching, option, other), trained, dearest
  )


def _check_mix(apply: Apply, controller: controller_lib.Controller) -> None:
  spec = getattr(getattr(apply, '__self__', None), 'spec', None)
  if (
    controller.differentiates
    and isinstance(spec, quant_spec.QuantSpec)
    and spec.mix == 'sampled'
  ):
    raise ValueError(
      'the controller learns from the mean over all formats, but the spec of '
      "the model has mix='sampled': give it mix='composite', for edmips and "
      "dqss, or 'branched', for dnas"
    )


def in_phase(model_state: ModelState, active: Any) -> ModelState:
  """Returns the collections with activation quantization on or off.

  Args:
    model_state: the model's collections, with or without `quant_stats`.
    active: bool [], traced or not.
  """
  if 'quant_stats' not in model_state:
    return model_state
  stats = operands_lib.set_activation_quantization(
    model_state['quant_stats'], active
  )
  return {**model_state, 'quant_stats': stats}


def _judge(
  apply: Apply,
  quality: objectives.Quality,
  space: search_space.SearchSpace,
  variables: Mapping[str, Any],
  proposed: Any,
  batch: Batch,
) -> jax.Array:
  """Returns the quality of every proposed architecture [M].

  All are judged on the same images, an M-th of the batch, so that the noise of
  the images cancels between them.
  """
  samples = len(jax.tree.leaves(proposed)[0])
  lengths = {
    name: jnp.shape(leaf)[:1]
    for name, leaf in batch.items()
    if not isinstance(leaf, Mapping)
  }
  if samples > 1 and len(set(lengths.values())) > 1:
    raise ValueError(
      'the validation batch cannot be cut into parts, because its arrays have '
      f'different first axes: {lengths}; use controller(samples=1), which '
      'judges on the whole batch, or a preset that judges nothing'
    )
  images = batch
  if samples > 1:
    images = jax.tree.map(lambda x: x[0], gradients_lib.parts(batch, samples))

  def judge(choices: Any) -> jax.Array:
    outputs = apply(
      {**variables, 'arch': space.expand(choices)},
      data.model_inputs(images),
      train=False,
    )
    return objectives.quality_of(quality, outputs, images)

  # A loop, so that the network is compiled once; a vmap over weights would turn
  # convolutions into grouped ones.
  return lax.map(judge, proposed)


def eval_step(
  apply: Apply, measure: Callable[[Any, Batch], Metrics]
) -> Callable[[Any, ModelState, Any, Batch], Metrics]:
  """Returns the step `(params, model_state, arch, batch) -> metrics`.

  Args:
    apply: the model's `apply`, called with (variables, inputs, train=False).
    measure: (outputs, batch) -> {name: sum over the batch's real examples}.

  Returns:
    A pure function of `params`, of `model_state` (the other collections), of
    `arch` (the result of `SearchSpace.expand`) and of a batch (a dict of the
    model's inputs [B, ...] and of what `measure` reads), which returns the sums
    of `measure`.
  """

  def step(
    params: Any, model_state: ModelState, arch: Any, batch: Batch
  ) -> Metrics:
    variables = {'params': params, 'arch': arch, **model_state}
    return measure(
      apply(variables, data.model_inputs(batch), train=False), batch
    )

  return step


def settle_step(
  apply: Apply, frozen: bool = False
) -> Callable[[Any, ModelState, Any, Batch, jax.Array], ModelState]:
  """Returns the step `(params, model_state, arch, batch, key) -> model_state`.

  It moves the running statistics of batch norm and of the activations towards
  those of one architecture. The weights do not change.

  Args:
    apply: the model's `apply`, called with (variables, inputs, train=True).
    frozen: whether only the statistics of activations move; the model is then
      called with train=False.
  """

  def step(
    params: Any,
    model_state: ModelState,
    arch: Any,
    batch: Batch,
    key: jax.Array,
  ) -> ModelState:
    moving = ('quant_stats',) if frozen else tuple(model_state)
    _, settled = apply(
      {'params': params, 'arch': arch, **model_state},
      data.model_inputs(batch),
      train=not frozen,
      mutable=[name for name in moving if name in model_state],
      rngs={'dropout': key},
    )
    return {**model_state, **settled}

  return step
