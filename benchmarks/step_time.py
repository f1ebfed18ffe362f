r"""What a search step costs: time, memory and compilation, as ratios.

python -m benchmarks.step_time [--network=resnet18,deit_ti16] [--step=stock,3]

Compares, for one network and batch, training steps that differ in one thing:

  stock    what training costs without us: the same network of `nn.Conv` and
           `nn.Dense` as they come, forward, backward and update
  train    the same with our layers, unquantized: only how products are computed
           differs
  float    our fused step (training batch forward and backward, update, judging
           on the validation batch, controller), every layer left unquantized
  int8     uniform INT8: menus of one format, nothing to choose
  3        three formats (int_s) in every layer
  16       sixteen formats (fp_l) in every layer
  widths   three formats, and channels 0.5 or 1 times the published ones
  sizes    the same, and kernels of 3 or 5; of networks that have them, on maps
           that are large enough: mobilenetv2_flat

`float` and `int8` judge their one architecture as often as the search step
does, so that only quantization differs. All steps are compiled first and then
run interleaved in one process; a figure is the median over rounds of a ratio
within a round, with the quartiles. Memory is XLA's own analysis of the compiled
step.

Compilation is timed twice, tracing included: with an empty persistent
compilation cache, and again from that cache with JAX's own caches cleared,
which is what the second run of a program waits for.
"""

import argparse
from collections.abc import Callable
import dataclasses
import functools
import statistics
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fliqs_jax import classification
from fliqs_jax import controller
from fliqs_jax import cost_model
from fliqs_jax import decisions as decisions_lib
from fliqs_jax import formats
from fliqs_jax import models
from fliqs_jax import quant_spec
from fliqs_jax import schedules
from fliqs_jax import search_space
from fliqs_jax import sizes as sizes_lib
from fliqs_jax import train_state
from fliqs_jax import train_step

# Fields that are not as published, pixels, batch.
NETWORKS = {
  'resnet_cifar': (dict(), 32, 64),
  'resnet18': (dict(), 64, 16),
  'mobilenetv2': (dict(), 64, 64),
  # Patches of 8 and not 16, so that there are 65 tokens and not 17.
  'deit_ti16': (dict(patch=8), 64, 16),
  'efficientnet_b0': (dict(), 64, 32),
  # Its last maps are 8x8.
  'mobilenetv2_flat': (
    dict(name='mobilenetv2', strides=(2, 1, 2, 2, 1, 1, 1, 1)),
    64,
    8,
  ),
  'inceptionv3': (dict(), 80, 8),
}

STEPS = {
  'stock': None,
  'train': dict(exclude=('*',), judged=False),
  'float': dict(exclude=('*',)),
  'int8': dict(formats='INT8'),
  '3': dict(formats='int_s'),
  '16': dict(formats='fp_l'),
  'widths': dict(formats='int_s', sizes=sizes_lib.Sizes(widths=(0.5, 1.0))),
  'sizes': dict(
    formats='int_s', sizes=sizes_lib.Sizes(widths=(0.5, 1.0), kernels=(3, 5))
  ),
}

_CLASSES = 10
_LOSS = classification.loss(0.1)
_OPTIMIZER = optax.sgd(0.01, momentum=0.9)


@dataclasses.dataclass
class Compiled:
  """One step, ready to run."""

  step: Callable
  state: Any
  compile_seconds: float
  cached_seconds: float
  temporary_mb: float


def _stock(model_config, image) -> tuple[Callable, Any]:
  """Returns a plain training step and its state."""
  keys = {k: v for k, v in model_config.items() if k != 'name'}
  network = models.MODELS[model_config['name']]
  model = network.module(num_classes=_CLASSES, **keys, **network.fixed)
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
  model_config, image, judged=True, sizes=models.AS_PUBLISHED, **quant
) -> tuple[Callable, Any]:
  """Returns the fused step and its state."""
  spec = quant_spec.QuantSpec(**quant, act_clip=4.0)
  model = models.build(model_config, _CLASSES, spec, sizes)
  space = search_space.find(model, image, spec=spec, train=False)
  apply = model.apply
  if space.is_fixed and judged:
    # A decision that changes nothing, so that this step judges as well.
    idle = decisions_lib.Decision('idle', formats.menu('int_s'), ('idle',))
    space = dataclasses.replace(space, decisions=(*space.decisions, idle))
    apply = functools.partial(_apply_idle, model)
  cost = space.cost('bops')
  target = cost_model.uniform(cost, 'INT8')
  phases = schedules.phases(1000, 0.0, 0.0, 1.0)
  search = controller.make('default', space.relative_cost(cost, target), phases)
  state = jax.jit(
    lambda key: train_state.create(
      model, space, _OPTIMIZER, search, key, image, train=False
    )
  )(jax.random.key(0))
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
  """Applies the model; XLA cannot tell that architectures are equal.

  It would judge one of them and take the result four times.
  """
  return model.apply(
    variables, x + 0.0 * variables['arch']['idle'][0], **kwargs
  )


def _compile(network: str, variant) -> Compiled:
  fields, size, batch_size = NETWORKS[network]
  model_config = models.published(fields.get('name', network)) | fields
  image = jnp.zeros((1, size, size, 3))
  make = functools.partial(_ours, **variant) if variant else _stock
  step, state = make(model_config, image)
  rng = np.random.default_rng(0)
  batch = dict(
    image=rng.normal(size=(batch_size, size, size, 3)).astype(np.float32),
    label=rng.integers(0, _CLASSES, batch_size).astype(np.int32),
  )
  seconds = []
  for _ in range(2):
    jax.clear_caches()
    began = time.perf_counter()
    lowered = jax.jit(step, donate_argnums=0).lower(state, batch, batch)
    compiled = lowered.compile()
    seconds.append(time.perf_counter() - began)
  memory = compiled.memory_analysis()
  return Compiled(
    lambda state: compiled(state, batch, batch)[0],
    state,
    *seconds,
    memory.temp_size_in_bytes / 1e6,
  )


def _measure(network: str, names: list[str], rounds: int, steps: int) -> None:
  variants = {name: _compile(network, STEPS[name]) for name in names}
  seconds = {name: [] for name in names}
  for round_ in range(rounds + 1):
    for name, variant in variants.items():
      began = time.perf_counter()
      for _ in range(steps):
        variant.state = variant.step(variant.state)
      jax.block_until_ready(variant.state)
      if round_ > 0:  # The first touches cold memory.
        seconds[name].append((time.perf_counter() - began) / steps)

  def ratio(over, under):
    if not {over, under} <= set(names):
      return ''
    ratios = [a / b for a, b in zip(seconds[over], seconds[under])]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f'{middle:.2f} ({low:.2f} to {high:.2f})'

  _, size, batch_size = NETWORKS[network]
  print(
    f'\n{network}, {size}x{size}, batch {batch_size}, {rounds} rounds of '
    f'{steps} steps'
  )
  print(
    '| step | stock / time | time / float | ms | memory MB | compile s | '
    'from cache s |'
  )
  print('|---|---|---|---|---|---|---|')
  for name, variant in variants.items():
    print(
      f'| {name} | {ratio("stock", name)} | {ratio(name, "float")} | '
      f'{1e3 * statistics.median(seconds[name]):.1f} | '
      f'{variant.temporary_mb:.1f} | {variant.compile_seconds:.1f} | '
      f'{variant.cached_seconds:.1f} |',
    )
  for name in ('16', 'widths', 'sizes'):
    if paired := ratio(name, '3'):
      print(f'{name} / 3: {paired}')


def main() -> None:
  """Measures and prints a table per network."""
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--network', default='resnet18,mobilenetv2,deit_ti16')
  parser.add_argument('--step', default='stock,train,float,int8,3,16')
  parser.add_argument('--rounds', type=int, default=20)
  parser.add_argument('--steps', type=int, default=3)
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as cache:
    jax.config.update('jax_compilation_cache_dir', cache)
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
    for network in args.network.split(','):
      _measure(network, args.step.split(','), args.rounds, args.steps)


if __name__ == '__main__':
  main()
