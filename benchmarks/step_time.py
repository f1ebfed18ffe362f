r"""Measures a search step: time, memory and compilation, as ratios.

python -m benchmarks.step_time [--network=resnet18,deit_ti16] [--step=stock,3]

The benchmark compares training steps of one network and batch, of which each
differs from another in one point:

  stock    training without this package: the network of plain `nn.Conv` and
           `nn.Dense`, forward, backward and update
  train    plain training with our layers, unquantized: only the computation of
           products differs
  float    our fused step (training batch forward and backward, update, judging
           on the validation batch, controller), without quantization
  int8     the fused step at uniform INT8: menus of one format
  uniform  training at uniform INT8: as int8, without judging
  scored   the fused step of the preset `sensitivity` with three formats, which
           judges nothing, at an allocated architecture
  program  as scored, with the network of plain `nn.Conv` and `nn.Dense`, which
           `searchable` rewrites
  3        the fused step with three formats (int_s) in every layer
  16       the fused step with sixteen formats (fp_l) in every layer
  widths   as 3, with channels of 0.5 or 1 times the published ones
  sizes    as widths, with kernels of 3 or 5; for networks whose maps are large
           enough: mobilenetv2_flat

`float` and `int8` judge their one architecture as often as the search step
judges, so that only quantization differs. All steps are compiled first and then
run interleaved in one process. A number is the median over rounds of a ratio
within a round, with the quartiles. Memory is XLA's own analysis of the compiled
step's temporaries. If the device counts its memory, its peak after the first
run of each step is beside it. The peak never decreases: it includes the earlier
steps, whose states are kept, and the trials of XLA's compilation.

Compilation is timed twice, tracing included, in CPU seconds of the process:
with an empty persistent compilation cache, and again from that cache with JAX's
own caches cleared, as in the second run of a program.
"""

import argparse
from collections.abc import Callable, Mapping
import contextlib
import dataclasses
import functools
import statistics
import tempfile
import time
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from fliqs_jax import models
from fliqs_jax.layers import quant_layers
from fliqs_jax.numerics import formats
from fliqs_jax.program import searchable as searchable_lib
from fliqs_jax.search import presets
from fliqs_jax.search import schedules
from fliqs_jax.search import train_state
from fliqs_jax.search import train_step
from fliqs_jax.search.controllers import scored
from fliqs_jax.space import cost_model
from fliqs_jax.space import decisions as decisions_lib
from fliqs_jax.space import discovery
from fliqs_jax.space import quant_spec
from fliqs_jax.space import sizes as sizes_lib
from fliqs_jax.tasks import classification

# {network: (fields that differ from the published ones, pixels, batch size)}.
NETWORKS = {
  'resnet_cifar': (dict(), 32, 64),
  'resnet18': (dict(), 64, 16),
  'mobilenetv2': (dict(), 64, 64),
  # Patches of 8 pixels instead of 16 give 65 tokens instead of 17.
  'deit_ti16': (dict(patch=8), 64, 16),
  'efficientnet_b0': (dict(), 64, 32),
  # Its last maps are 8x8.
  'mobilenetv2_flat': (
    dict(name='mobilenetv2', strides=(2, 1, 2, 2, 1, 1, 1, 1)),
    64,
    8,
  ),
  'inceptionv3': (dict(), 80, 8),
  'mlp': (dict(hidden=(512, 512, 512)), 16, 256),
}

STEPS = {
  'stock': None,
  'train': dict(exclude=('*',), judged=False),
  'float': dict(exclude=('*',)),
  'int8': dict(formats='INT8'),
  'uniform': dict(formats='INT8', judged=False),
  'scored': dict(formats='int_s', preset='sensitivity'),
  'program': dict(formats='int_s', preset='sensitivity', is_ours=False),
  '3': dict(formats='int_s'),
  '16': dict(formats='fp_l'),
  'widths': dict(formats='int_s', sizes=sizes_lib.Sizes(widths=(0.5, 1.0))),
  'sizes': dict(
    formats='int_s', sizes=sizes_lib.Sizes(widths=(0.5, 1.0), kernels=(3, 5))
  ),
}

_LOSS = classification.loss(0.1)
_OPTIMIZER = optax.sgd(0.01, momentum=0.9)


@dataclasses.dataclass(frozen=True)
class Problem:
  """A training problem.

  Attributes:
    model: section `model` of a config.
    pixels: height and width of an image.
    batch: number of images in a training batch and in a validation batch.
    dtype: type in which layers and norms compute, as in `models.construct`.
    classes: number of outputs of the network.
  """

  model: Mapping[str, Any]
  pixels: int
  batch: int
  dtype: Any = None
  classes: int = 10

  def network(self, conv, dense, sizes=models.AS_PUBLISHED) -> nn.Module:
    """Returns the network of these layers."""
    return models.construct(
      self.model,
      self.classes,
      sizes=sizes,
      dtype=self.dtype,
      conv=conv,
      dense=dense,
    )


@dataclasses.dataclass
class Compiled:
  """A compiled step with its state, times in seconds and memory in MB.

  `instructions` are those of the HLO module that XLA made of it.
  """

  step: Callable
  state: Any
  compile_seconds: float
  cached_seconds: float
  temporary_mb: float
  instructions: int
  peak_mb: float | None = None


def _stock(problem: Problem, image, convert) -> tuple[Callable, Any]:
  """Returns a plain training step and its state."""
  model = convert(problem.network(nn.Conv, nn.Dense))
  init = jax.jit(functools.partial(model.init, train=False))
  variables = dict(init(jax.random.key(0), image))
  params = variables.pop('params')

  def step(state, batch, unused_batch):
    params, model_state, opt_state, key = state
    key, dropout_key = jax.random.split(key)

    def train_loss(params):
      outputs, new_model_state = model.apply(
        {'params': params, **model_state},
        batch['image'],
        train=True,
        mutable=list(model_state),
        rngs={'dropout': dropout_key},
      )
      value, metrics = _LOSS(outputs, batch)
      return value, (new_model_state, metrics)

    (_, (model_state, metrics)), gradients = jax.value_and_grad(
      train_loss, has_aux=True
    )(params)
    updates, opt_state = _OPTIMIZER.update(gradients, opt_state, params)
    params = optax.apply_updates(params, updates)
    return (params, model_state, opt_state, key), metrics

  return step, (params, variables, _OPTIMIZER.init(params), jax.random.key(1))


def _ours(
  problem: Problem,
  image,
  judged=True,
  sizes=models.AS_PUBLISHED,
  preset='default',
  is_ours=True,
  **quant,
) -> tuple[Callable, Any]:
  """Returns the fused step and its state."""
  spec = quant_spec.QuantSpec(**quant, act_clip=4.0)
  if is_ours:
    model = problem.network(
      quant_layers.with_spec(quant_layers.QuantConv, spec),
      quant_layers.with_spec(quant_layers.QuantDense, spec),
      sizes,
    )
  else:
    stock = problem.network(nn.Conv, nn.Dense)
    model = searchable_lib.searchable(stock, spec)
  space = discovery.find(model, image, spec=spec, train=False)
  apply = model.apply
  if space.is_fixed and judged:
    # A decision without effect, so that this step also judges.
    idle = decisions_lib.FormatDecision(
      'idle', ('idle',), formats.menu('int_s')
    )
    space = dataclasses.replace(space, formats=(*space.formats, idle))
    apply = functools.partial(_apply_idle, model)
  cost = space.cost('bops')
  target = cost_model.uniform(cost, 'INT8')
  phases = schedules.phases(1000, 0.0, 0.0, 1.0)
  search = presets.make(preset, space.relative_cost(cost, target), phases)
  state = jax.jit(
    lambda key: train_state.create(
      model, space, _OPTIMIZER, search, key, image, train=False
    )
  )(jax.random.key(0))
  if preset == 'sensitivity':
    allocated = scored.allocated(space.uniform('INT8'), space.zeros())
    state = dataclasses.replace(state, search_state=allocated)
  step = train_step.search_step(
    apply,
    _LOSS,
    classification.minus_cross_entropy,
    space,
    search,
    _OPTIMIZER,
    phases,
  )
  return step, state


def _apply_idle(model, variables, x, **kwargs):
  """Applies the model so that XLA does not see that architectures are equal.

  Otherwise XLA would judge one of them and use the result four times.
  """
  return model.apply(
    variables, x + 0.0 * variables['arch']['idle'][0], **kwargs
  )


def batch_of(problem: Problem) -> dict[str, np.ndarray]:
  """Returns a random batch: `image` [N, H, W, 3] float32, `label` [N] int32."""
  rng = np.random.default_rng(0)
  shape = (problem.batch, problem.pixels, problem.pixels, 3)
  return dict(
    image=rng.standard_normal(shape, np.float32),
    label=rng.integers(0, problem.classes, problem.batch).astype(np.int32),
  )


def compiled_step(
  problem: Problem,
  variant: Mapping[str, Any] | None,
  convert: Callable[[nn.Module], nn.Module] = lambda network: network,
) -> Compiled:
  """Compiles a step.

  Args:
    problem: the training problem.
    variant: a value of `STEPS`; None is plain training.
    convert: changes the network of plain training.
  """
  make = functools.partial(_stock, convert=convert)
  if variant is not None:
    make = functools.partial(_ours, **variant)
  step, state = make(problem, jnp.zeros((1, problem.pixels, problem.pixels, 3)))
  # The batch is on the device: its transfer is not measured.
  batch = jax.device_put(batch_of(problem))
  seconds = []
  for _ in range(2):
    jax.clear_caches()
    began = time.process_time()
    lowered = jax.jit(step, donate_argnums=0).lower(state, batch, batch)
    compiled = lowered.compile()
    seconds.append(time.process_time() - began)
  memory = compiled.memory_analysis()
  return Compiled(
    lambda state: compiled(state, batch, batch)[0],
    state,
    *seconds,
    memory.temp_size_in_bytes / 1e6,
    sum(' = ' in line for line in compiled.as_text().splitlines()),
  )


def _peak_mb() -> float | None:
  """Returns the peak of the device's memory so far; None if not counted."""
  counted = jax.devices()[0].memory_stats() or {}
  peak = counted.get('peak_bytes_in_use')
  return None if peak is None else peak / 1e6


def measure(
  problem: Problem, names: list[str], rounds: int, steps: int
) -> list[str]:
  """Compiles and times steps; returns the lines of a table.

  Args:
    problem: the training problem.
    names: names of the steps, keys of STEPS.
    rounds: number of interleaved samples of each step, at least 2.
    steps: number of steps in a sample.
  """
  variants = {name: compiled_step(problem, STEPS[name]) for name in names}
  seconds = {name: [] for name in names}
  for round_ in range(rounds + 1):
    for name, variant in variants.items():
      began = time.perf_counter()
      for _ in range(steps):
        variant.state = variant.step(variant.state)
      jax.block_until_ready(variant.state)
      if round_ > 0:  # The first round is slower: its memory is cold.
        seconds[name].append((time.perf_counter() - began) / steps)
      else:
        variant.peak_mb = _peak_mb()

  def ratio(over, under):
    if not {over, under} <= set(names):
      return ''
    ratios = [a / b for a, b in zip(seconds[over], seconds[under])]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f'{middle:.2f} ({low:.2f} to {high:.2f})'

  lines = [
    f'{problem.pixels}x{problem.pixels}, batch {problem.batch}, '
    f'{rounds} rounds of {steps} steps',
    '',
    '| step | stock / time | time / float | ms | temporaries MB | '
    'peak so far MB | compile CPU s | from cache CPU s | HLO instructions |',
    '|---|---|---|---|---|---|---|---|---|',
  ]
  for name, variant in variants.items():
    peak = '' if variant.peak_mb is None else f'{variant.peak_mb:.1f}'
    lines.append(
      f'| {name} | {ratio("stock", name)} | {ratio(name, "float")} | '
      f'{1e3 * statistics.median(seconds[name]):.1f} | '
      f'{variant.temporary_mb:.1f} | {peak} | '
      f'{variant.compile_seconds:.1f} | {variant.cached_seconds:.1f} | '
      f'{variant.instructions} |',
    )
  for name, base in (
    ('16', '3'),
    ('widths', '3'),
    ('sizes', '3'),
    ('scored', 'uniform'),
    ('program', 'scored'),
    ('3', 'uniform'),
  ):
    if paired := ratio(name, base):
      lines += ['', f'{name} / {base}: {paired}']
  return lines


@contextlib.contextmanager
def compilation_cache():
  """Gives XLA an empty persistent cache, which keeps every program."""
  with tempfile.TemporaryDirectory() as cache:
    jax.config.update('jax_compilation_cache_dir', cache)
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
    yield


def main() -> None:
  """Measures and prints a table per network."""
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--network', default='resnet18,mobilenetv2,deit_ti16')
  parser.add_argument('--step', default='stock,train,float,int8,3,16')
  parser.add_argument('--rounds', type=int, default=20)
  parser.add_argument('--steps', type=int, default=3)
  args = parser.parse_args()
  with compilation_cache():
    for network in args.network.split(','):
      fields, pixels, batch = NETWORKS[network]
      model = models.published(fields.get('name', network)) | fields
      problem = Problem(model, pixels, batch)
      lines = measure(problem, args.step.split(','), args.rounds, args.steps)
      print('', network, *lines, sep='\n', flush=True)


if __name__ == '__main__':
  main()
