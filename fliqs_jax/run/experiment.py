"""Parts of a run, built from a config; refuses a config that cannot work."""

from collections.abc import Callable, Mapping
import dataclasses
import functools
import types
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import optax

from fliqs_jax import data
from fliqs_jax import models
from fliqs_jax.run import budgets as budgets_lib
from fliqs_jax.run.configs import checks
from fliqs_jax.run.configs import config as config_lib
from fliqs_jax.runtime import devices as devices_lib
from fliqs_jax.search import controller as controller_lib
from fliqs_jax.search import optimizers
from fliqs_jax.search import presets
from fliqs_jax.search import schedules
from fliqs_jax.search import train_state
from fliqs_jax.search import train_step
from fliqs_jax.space import allocation
from fliqs_jax.space import arch_file
from fliqs_jax.space import cost_model
from fliqs_jax.space import discovery
from fliqs_jax.space import quant_spec
from fliqs_jax.space import search_space
from fliqs_jax.space import sizes as sizes_lib
from fliqs_jax.tasks import fitting


@dataclasses.dataclass(frozen=True)
class Experiment:
  """Parts of a run; they do not change while it runs.

  Attributes:
    config: the config that `build` got.
    streams: batches of the train, validation and test splits.
    spec: the formats that each layer may use.
    model: the network.
    step_model: network of the training step, with the same parameters; its
      layers are relaxed ones for some presets.
    teacher_model: the network without formats, whose outputs may be labels or
      what scores compare with.
    space: the decisions and ops of the network.
    cost: the cost model of the network.
    target: the cost target C_T, in the cost's unit.
    caps: limits of other costs (`cost.caps`).
    reported: costs that are reported besides (`cost.reported`).
    phases: first step of each phase of training.
    controller: the controller that proposes architectures and updates the
      policy.
    optimizer: optimizer of the weights.
    task: module with the loss, the qualities and the test metrics.
    mix: `(key, training batch) -> training batch`; None if batches stay as they
      are.
  """

  config: ml_collections.ConfigDict
  streams: data.Streams
  spec: quant_spec.QuantSpec
  model: nn.Module
  step_model: nn.Module
  teacher_model: nn.Module
  space: search_space.SearchSpace
  cost: cost_model.Cost
  target: float
  caps: tuple[allocation.Budget, ...]
  reported: tuple[cost_model.Cost, ...]
  phases: schedules.Phases
  controller: controller_lib.Controller
  optimizer: optax.GradientTransformation
  task: types.ModuleType
  mix: Callable | None

  def initial_state(self) -> train_state.TrainState:
    """Returns the state before the first step; a pure function."""
    example = jax.tree.map(
      lambda spec: jnp.zeros(spec.shape, spec.dtype),
      fitting.example(self.streams),
    )
    return train_state.create(
      self.model,
      self.space,
      self.optimizer,
      self.controller,
      jax.random.key(self.config.seed),
      example,
      keep_average=self.config.optimizer.ema_decay > 0,
      train=False,
    )

  @property
  def loss(self) -> Callable:
    """The training loss, `(outputs, batch) -> (scalar, metrics)`."""
    return self.task.loss(self.config.train.label_smoothing)

  @property
  def quality(self) -> Callable:
    """The quality that the search maximizes, `(outputs, batch) -> scalar`."""
    return self.task.QUALITIES[self.config.search.quality]

  def search_step(self) -> Callable:
    """Returns the fused step, to be compiled by `devices.Devices.compile`."""
    return train_step.search_step(
      self.step_model.apply,
      self.loss,
      self.quality,
      self.space,
      self.controller,
      self.optimizer,
      self.phases,
      mix=self.mix,
      ema_decay=self.config.optimizer.ema_decay,
      accumulate=self.config.parallel.accumulate,
      frozen=self.config.train.frozen,
      teacher=self._labels if self.config.train.teacher else None,
      replicas=devices_lib.replicas(self.config.parallel),
    )

  @property
  def reference(self) -> Callable[..., Any] | None:
    """What scores compare with, `sensitivity.scorer`; None: the dearest."""
    return self.teacher_model.apply if self.spec.has_strategies else None

  def _labels(self, variables: Mapping[str, Any], inputs: Any) -> Any:
    """Returns the labels that the network without formats gives to inputs."""
    outputs = self.teacher_model.apply(variables, inputs, train=False)
    return self.task.labels_of(outputs)

  @property
  def binding(self) -> dict[str, Any]:
    """What checkpoints are bound to, for `config.check_binding`."""
    assigned = {}
    if self.config.quant.arch:
      assigned = self.space.assignment(self.space.only())
    chips = {
      cost.kind: cost.rules.chip.digest
      for cost in (self.cost, *(cap.cost for cap in self.caps))
      if cost.rules.chip is not None
    }
    return config_lib.binding(self.config, assigned, chips)

  @property
  def is_relaxed(self) -> bool:
    """Whether the weights train on a mixture of formats."""
    mix = presets.PRESETS[self.config.search.preset].mix
    return mix != 'sampled' and not self.space.is_fixed

  @property
  def is_scored(self) -> bool:
    """Whether options are scored and the budget is solved from the scores."""
    return self.config.search.scorings > 0 and not self.space.is_fixed

  @property
  def calibrations(self) -> tuple[int, ...]:
    """The steps before which strategies find their thresholds.

    They do so, too, when an architecture was allocated, and at the end.
    """
    if not self.spec.has_strategies:
      return ()
    phases = self.phases
    fixed = (phases.freeze,) if self.space.is_fixed else ()
    return (phases.act_start, phases.search_start, *fixed)

  @property
  def allocations(self) -> tuple[int, ...]:
    """The steps before which an architecture is put into the policy."""
    if self.space.is_fixed:
      return ()
    if self.is_scored:
      return self.phases.scorings(self.config.search.scorings)
    return (self.phases.freeze,)

  def allocate(self, scores: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the architecture of the least scores at `cost.bound`.

    Args:
      scores: {decision: [K]}, more is worse.

    Raises:
      ValueError: a score is not finite, or no architecture is within the bound.
    """
    budget = allocation.Budget(self.cost, self.target)
    bound = self.config.cost.bound
    return budgets_lib.solved(self.space, scores, budget, self.caps, bound)

  def selected(self, policy: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the architecture that is served, {decision: [K] one-hot}.

    The likeliest one of those within the caps, and within the budget if
    `cost.bound='at_most'`.

    Args:
      policy: {decision: [K]} logits, on the host.
    """
    if self.space.is_fixed:
      return allocation.likeliest(self.space, policy)
    budgets = [*self.caps]
    if self.config.cost.bound == budgets_lib.AT_MOST:
      budgets.append(allocation.Budget(self.cost, self.target))
    return allocation.likeliest(self.space, policy, budgets)

  def cost_of(self, choices: Mapping[str, Any]) -> Any:
    """Returns the cost of {decision: [K]}, in the cost's unit."""
    return self.cost(choices)


def build(
  config: ml_collections.ConfigDict,
  arch: Mapping[str, Any] | None = None,
  *,
  process_index: int = 0,
  process_count: int = 1,
  read: bool = True,
) -> Experiment:
  """Returns the parts of the run that a config describes.

  Args:
    config: config from a file in `configs/`.
    arch: content of the arch.json that `quant.arch` names; None: it is read.
    process_index: index of this process; its streams give this process's rows
      of each batch.
    process_count: number of processes.
    read: whether the data are there; if not, the streams are empty, and what
      depends on examples is not checked.

  Raises:
    ValueError: the config cannot work; the message names key and value.
  """
  config_lib.check(config)
  checks.search(config.search, config.train.steps)
  devices_lib.check(config.parallel)
  phases = schedules.phases(
    config.train.steps,
    config.quant.act_start,
    config.search.start,
    config.search.freeze,
  )
  optimizer = _optimizer(config, phases.steps)
  task = fitting.of(config)
  checks.frozen(config)
  fitting.check_scores(config, 'search.scores', config.search.scores)
  if arch is None and config.quant.arch:
    arch = arch_file.read(config.quant.arch)
  checks.formats(config)
  spec = _spec(config.quant, arch)
  streams = (
    data.make_streams(
      config.data,
      config.seed,
      process_index=process_index,
      process_count=process_count,
    )
    if read
    else data.unread_streams(config.data)
  )
  mix = fitting.mixing(config, streams)
  sizes = _sizes(config.sizes, arch)
  build_model = functools.partial(
    models.build,
    config.model,
    streams.num_classes,
    sizes=sizes,
    dtype=config.train.dtype,
  )
  model = build_model(spec)
  fitting.check_inputs(config, model, streams)
  example = fitting.example(streams)
  traced = discovery.trace(model, example, train=False)
  fitting.check_task(config, task, traced.outputs, streams)
  if read:
    fitting.check_classes(config, task, streams)
  space = discovery.space_of(traced, spec)
  if arch is not None:
    space.check_sizes(arch['sizes'])
  if space.open_sizes and space.is_fixed:
    # Budgets are multiples of its cost, as in the search that found the sizes.
    published = build_model(spec, sizes=models.AS_PUBLISHED)
    space = dataclasses.replace(
      space,
      published=discovery.find(published, example, spec=spec, train=False),
    )
  with checks.named('cost.kind', config.cost.kind):
    cost = space.cost(config.cost.kind)
  checks.sizes(config, space)
  caps = budgets_lib.caps(config.cost, space)
  target = budgets_lib.target(config.cost, cost, space, caps)
  controller = _controller(config, space, cost, target, caps, phases)
  mixing = presets.PRESETS[config.search.preset].mix
  return Experiment(
    config=config,
    streams=streams,
    spec=spec,
    model=model,
    step_model=build_model(dataclasses.replace(spec, mix=mixing)),
    teacher_model=build_model(quant_spec.QuantSpec(exclude=('*',))),
    space=space,
    cost=cost,
    target=target,
    caps=caps,
    reported=budgets_lib.reported(config.cost, space),
    phases=phases,
    controller=controller,
    optimizer=optimizer,
    task=task,
    mix=mix,
  )


def _sizes(
  keys: ml_collections.ConfigDict, arch: Mapping[str, Any] | None
) -> sizes_lib.Sizes:
  if arch is None:
    return sizes_lib.Sizes(keys.widths, keys.kernels, keys.kernel_weights)
  if keys.widths or keys.kernels:
    raise ValueError(
      'quant.arch fixes every size, so sizes.widths and sizes.kernels must be '
      'empty: set both to ()'
    )
  return sizes_lib.Sizes(found=arch['sizes'])


def _spec(
  quant: ml_collections.ConfigDict, arch: Mapping[str, Any] | None
) -> quant_spec.QuantSpec:
  assigned = None if arch is None else arch_file.assignment(arch)
  mode = quant.mode if arch is None else arch['mode']
  if quant.act_clip == 'profiled' and not quant.act_start:
    raise ValueError(
      "quant.act_clip='profiled' profiles the activations before they are "
      'quantized: set quant.act_start above 0'
    )
  return quant_spec.QuantSpec(
    formats=quant.formats,
    mode=mode,
    exclude=tuple(quant.exclude),
    menus=tuple(quant.menus),
    groups=tuple(quant.groups),
    strategies=tuple(quant.strategies),
    weight_clip=_clip(quant.weight_clip),
    act_clip=_clip(quant.act_clip),
    act_threshold=quant.act_threshold,
    assignment=assigned,
  )


def _clip(value: str | float) -> str | float:
  """Returns a rule of clipping; a number may be text, as overrides are."""
  try:
    return float(value)
  except ValueError:
    return value


def _controller(config, space, cost, target, caps, phases):
  keys = config.search
  controller = presets.make(
    keys.preset,
    space.relative_cost(cost, target),
    phases,
    caps=[space.relative_cost(cap.cost, cap.target) for cap in caps],
    gamma=keys.gamma,
    learning_rate=keys.learning_rate,
    entropy_schedule=keys.entropy_schedule,
    entropy_beta=keys.entropy_beta,
    replicas=devices_lib.replicas(config.parallel),
    leave_one_out=config.parallel.leave_one_out,
  )
  if controller.judges and config.data.valid_batch_size % controller.samples:
    raise ValueError(
      f'data.valid_batch_size={config.data.valid_batch_size} must be a '
      f'multiple of {controller.samples}, the number of architectures that '
      f'search.preset={keys.preset!r} judges in each step'
    )
  return controller


def _optimizer(config, steps: int) -> optax.GradientTransformation:
  keys = config.optimizer
  rate = schedules.learning_rate(
    keys.schedule, keys.learning_rate, steps, round(keys.warmup * steps)
  )
  if keys.ema_decay == 1:
    raise ValueError(
      'optimizer.ema_decay=1 must be below 1: otherwise the averaged weights '
      'keep their initial values'
    )
  return optimizers.make(keys.name, rate, keys.momentum, keys.weight_decay)
