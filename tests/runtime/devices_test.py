"""One step on many devices: the same result, or copies that stay in step."""

import dataclasses
import functools
import itertools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np
import pytest

import fliqs_jax as fliqs
from fliqs_jax.run import experiment as experiment_lib
from fliqs_jax.runtime import devices as devices_lib
from fliqs_jax.runtime import replicas as replicas_lib
from fliqs_jax.search import policy as policy_lib
from fliqs_jax.search import presets
from fliqs_jax.search import schedules
from fliqs_jax.search import train_step
from tests import tiny


@pytest.fixture(autouse=True)
def _all_devices():
  with jax.default_device(None):
    yield


def _config(arg='', preset='default', **keys):
  config = tiny.get_config(arg)
  with config.unlocked(), config.ignore_type():
    config.search.preset = preset
    config.search.start = 0.0
    config.quant.act_start = 0.0
    config.train.mixup = config.train.cutmix = 0.0
    for key, value in keys.items():
      config.parallel[key] = value
  return config


def _devices(count, config):
  mesh = devices_lib.one_device(config).mesh
  mesh = jax.sharding.Mesh(
    np.asarray(jax.devices()[:count]), mesh.axis_names, mesh.axis_types
  )
  keys = config.parallel
  return devices_lib.Devices(mesh, keys.mode, keys.shard_params)


def _after(config, count, steps):
  """Returns state and metrics of each step, taken on so many devices."""
  return _steps(experiment_lib.build(config), count, steps)


def _steps(experiment, count, steps):
  devices = _devices(count, experiment.config)
  state = devices.create(experiment.initial_state)
  streams = experiment.streams
  batches = zip(devices.feed(streams.train(0)), devices.feed(streams.valid(0)))
  step, metrics = None, []
  for batch in itertools.islice(batches, steps):
    step = step or devices.compile(experiment.search_step(), state, *batch)
    state, new = step(state, *batch)
    metrics.append(jax.device_get(new))
  return state, metrics


def _assert_close(a, b, **tolerance):
  a, b = (jax.device_get((x.params, x.model_state)) for x in (a, b))
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


@pytest.mark.parametrize(
  ('shape', 'spec'),
  [
    ((128, 128), ('data',)),  # 2**14 elements, the least; the first of two.
    ((127, 128), ()),
    ((16, 2048), (None, 'data')),  # The longest axis ...
    ((8, 4097), ('data',)),  # ... of those that 8 divides.
    ((3, 3, 4096), (None, None, 'data')),
    ((129, 257), ()),
  ],
)
def test_large_parameters_are_split_along_an_axis_that_divides(shape, spec):
  devices = _devices(8, _config(shard_params=True))
  found = devices._spread(jax.ShapeDtypeStruct(shape, jnp.float32))
  assert found.spec == PartitionSpec(*spec)


@functools.cache
def _alone():
  return _after(_config(), 1, 8)


@pytest.mark.slow
@pytest.mark.parametrize('count', [2, 4, 8])
def test_pjit_on_many_devices_is_the_run_of_one(count):
  one, metrics_of_one = _alone()
  many, metrics = _after(_config(), count, 8)
  # The order of sums differs, nothing else.
  _assert_close(one, many, rtol=2e-4, atol=2e-5)
  policies = (x.search_state.policy for x in (one, many))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3),
    *map(jax.device_get, policies),
  )
  for a, b in zip(metrics_of_one, metrics):
    assert a['sampled_cost'] == b['sampled_cost']  # The same architectures.
    np.testing.assert_allclose(a['loss'], b['loss'], rtol=1e-5)


class _Net(nn.Module):
  """The least network with a convolution and a batch norm."""

  conv: Any
  input_shape = (8, 8, 1)

  @nn.compact
  def __call__(self, x, train):
    x = self.conv(4, (3, 3), name='conv')(x)
    x = nn.BatchNorm(not train, momentum=0.9)(x)
    return nn.relu(x).mean((1, 2)) @ jnp.ones((4, 10))


@pytest.mark.slow
def test_convolutions_and_batch_norm_see_the_batch_of_all_devices():
  config = _config()
  experiment = experiment_lib.build(config)
  model = _Net(fliqs.with_spec(fliqs.QuantConv, experiment.spec))
  space = fliqs.find_decisions(model, jnp.zeros((1, 8, 8, 1)), train=False)
  controller = presets.make(
    'paper', lambda tree: jnp.ones(()), experiment.phases
  )
  experiment = dataclasses.replace(
    experiment,
    model=model,
    step_model=model,
    space=space,
    controller=controller,
  )
  one, _ = _steps(experiment, 1, 2)
  many, _ = _steps(experiment, 4, 2)
  _assert_close(one, many, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_large_parameters_and_their_moments_are_split():
  def config(shard):
    config = _config(shard_params=shard)
    with config.unlocked():
      config.model.hidden = (512,)  # 64 x 512 weights: above the least size.
    return config

  split, _ = _after(config(True), 8, 3)
  whole, _ = _after(config(False), 8, 3)
  kernel = split.params['hidden0']['kernel']
  assert kernel.addressable_shards[0].data.shape == (64, 64)
  assert whole.params['hidden0']['kernel'].sharding.is_fully_replicated
  moments = [
    x for x in jax.tree.leaves(split.opt_state) if x.shape == kernel.shape
  ]
  assert moments
  for x in [*moments, split.average['hidden0']['kernel']]:
    assert x.sharding == kernel.sharding
  assert split.params['head']['kernel'].sharding.is_fully_replicated
  _assert_close(split, whole, rtol=2e-4, atol=2e-5)


@pytest.mark.slow
def test_accumulated_gradients_are_those_of_the_whole_batch():
  def config(parts):
    config = _config(accumulate=parts)
    with config.unlocked():
      # Else scales of the second part would know the first.
      config.quant.mode = 'weights'
    return config

  whole, metrics = _after(config(1), 2, 3)
  parts, metrics_of_parts = _after(config(4), 2, 3)
  _assert_close(whole, parts, rtol=2e-4, atol=2e-5)
  for a, b in zip(metrics, metrics_of_parts):
    np.testing.assert_allclose(a['loss'], b['loss'], rtol=1e-5)
    np.testing.assert_allclose(a['accuracy'], b['accuracy'], rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize('preset', ['default', 'paper'])
def test_replicas_stay_in_step_bit_by_bit(preset):
  state, _ = _after(_config(mode='pmap', preset=preset), 4, 8)
  for leaf in jax.tree.leaves(jax.tree.map(_plain, state)):
    copies = [np.asarray(shard.data) for shard in leaf.addressable_shards]
    assert len(copies) == 4
    for copy in copies[1:]:
      np.testing.assert_array_equal(copies[0], copy)


def _plain(x):
  is_key = jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
  return jax.random.key_data(x) if is_key else x


@pytest.mark.slow
def test_weights_learn_from_the_mean_over_replicas():
  """`pmap` against a loop over the replicas, each a step on its own rows."""
  config = _config(mode='pmap')
  with config.unlocked():
    config.optimizer.momentum = 0.0  # Updates are then linear in gradients.
  together, metrics = _after(config, 4, 1)

  experiment = experiment_lib.build(config)
  state = experiment.initial_state()
  batches = next(experiment.streams.train(0)), next(experiment.streams.valid(0))
  controller = presets.make(
    'default', lambda tree: jnp.ones(()), experiment.phases
  )

  @jax.jit
  def alone(i, state, *rows):
    step = train_step.search_step(
      experiment.model.apply,
      experiment.loss,
      experiment.quality,
      experiment.space,
      controller,
      experiment.optimizer,
      experiment.phases,
      ema_decay=config.optimizer.ema_decay,
      replicas=replicas_lib.Replicas(
        key=lambda key: jax.random.fold_in(key, i),
        mean=lambda tree: tree,
        others=None,
      ),
    )
    return step(state, *rows)

  params, losses, stats = [], [], []
  for i in range(4):
    rows = jax.tree.map(lambda x, i=i: x[16 * i : 16 * (i + 1)], batches)
    own, own_metrics = alone(i, state, *rows)
    params.append(own.params)
    stats.append(own.model_state['quant_stats'])
    losses.append(own_metrics['loss'])

  def mean(trees):
    return jax.tree.map(lambda *x: np.mean(x, axis=0), *trees)

  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
  jax.tree.map(close, mean(params), jax.device_get(together.params))
  jax.tree.map(
    close, mean(stats), jax.device_get(together.model_state['quant_stats'])
  )
  close(np.mean(losses), metrics[0]['loss'])


def _controller(**kwargs):
  phases = schedules.phases(100, 0.0, 0.0, 1.0)
  return presets.make(
    'paper', lambda tree: tree['a'] @ jnp.arange(1.0, 5.0), phases, **kwargs
  )


def test_every_replica_proposes_an_architecture_of_its_own():
  devices = _devices(8, _config(mode='pmap'))
  replicas = devices_lib.replicas(_config(mode='pmap').parallel)
  controller = _controller(replicas=replicas)
  state = controller.init(dict(a=jnp.zeros(4), b=jnp.zeros(4)))

  def propose(state, key):
    return controller.propose(state, replicas.key(key), jnp.asarray(0))

  proposed = jax.jit(
    jax.shard_map(
      propose,
      mesh=devices.mesh,
      in_specs=PartitionSpec(),
      out_specs=PartitionSpec(*devices.mesh.axis_names),
      check_vma=False,
    )
  )(state, jax.random.key(0))
  a, b = (np.argmax(jax.device_get(proposed[k]), -1) for k in ('a', 'b'))
  assert len(a) == len(b) == 8
  assert len(set(zip(a, b))) > 3  # Of 16; that few have a chance of 1e-4.


@pytest.mark.slow
@pytest.mark.parametrize('leave_one_out', [False, True])
def test_the_policy_learns_from_all_replicas(leave_one_out):
  """The update against its formula, over four replicas."""
  controller = _controller(
    replicas=replicas_lib.along('r'), leave_one_out=leave_one_out
  )
  state = controller.init(dict(a=jnp.zeros(4)))
  archs = dict(a=jnp.eye(4)[:, None])
  qualities = jnp.asarray([[0.1], [0.4], [0.2], [0.9]])
  states, _ = jax.vmap(
    lambda arch, q: controller.update(state, arch, q, jnp.asarray(10)),
    axis_name='r',
  )(archs, qualities)

  rewards = np.asarray(qualities)[:, 0] - 0.1 * np.arange(4)
  np.testing.assert_allclose(  # One update of a mean that began at 0.
    states.average, np.full(4, 0.05 * rewards.mean()), rtol=1e-5
  )
  baseline = np.full(4, rewards.mean())
  if leave_one_out:
    baseline = (rewards.sum() - rewards) / 3
  scores = np.eye(4) - 0.25  # Of log pi at the uniform policy.
  gradient = -np.mean((rewards - baseline)[:, None] * scores, axis=0)
  # Adam's second moment is that of the mean gradient.
  moment = policy_lib.unstack(states.opt_state[0].nu)['a']
  np.testing.assert_allclose(moment, np.tile(1e-3 * gradient**2, (4, 1)), 1e-4)


def test_a_policy_over_replicas_finds_the_best_of_a_bandit():
  phases = schedules.phases(400, 0.0, 0.0, 1.0)
  controller = presets.make(
    'paper',
    lambda tree: jnp.ones(()),
    phases,
    replicas=replicas_lib.along('r'),
    leave_one_out=True,
    entropy_schedule='off',
  )
  quality = jnp.asarray([0.1, 0.3, 0.6, 0.2])

  def one(state, key, step):
    arch = controller.propose(state, key, step)
    return controller.update(state, arch, arch['a'] @ quality, step)[0]

  def body(state, step):
    keys = jax.random.split(jax.random.fold_in(jax.random.key(0), step), 4)
    states = jax.vmap(one, in_axes=(None, 0, None), axis_name='r')(
      state, keys, step
    )
    return jax.tree.map(lambda x: x[0], states), None

  state = controller.init(dict(a=jnp.zeros(4)))
  state, _ = jax.jit(lambda s: jax.lax.scan(body, s, jnp.arange(400)))(state)
  assert policy_lib.probabilities(state.policy)['a'][2] > 0.95


@pytest.mark.parametrize(
  ('keys', 'message'),
  [
    (dict(mode='pmapp'), "parallel.mode='pmapp' is unknown.*pjit, pmap"),
    (dict(mode='pmap', shard_params=True), 'shard_params=True needs .*pjit'),
    (dict(leave_one_out=True), "only parallel.mode='pmap' has"),
    (dict(mode='pmap', leave_one_out=True), "search.preset='paper'"),
    (dict(accumulate=0), 'parallel.accumulate=0 must be a whole number from 1'),
  ],
)
def test_parallel_keys_that_cannot_work_are_refused(keys, message):
  with pytest.raises(ValueError, match=message):
    experiment_lib.build(_config(**keys))


@pytest.mark.parametrize(
  ('batches', 'keys', 'message'),
  [
    (
      dict(batch_size=60),
      {},
      r'data.batch_size=60 .* multiple of 8 \(8 devices\); .* 56, 64',
    ),
    (
      dict(batch_size=40),
      dict(accumulate=2),
      r'multiple of 16 \(8 devices, parallel.accumulate=2\); .* 32, 48',
    ),
    (
      dict(valid_batch_size=48),
      dict(mode='pmap'),
      r'valid_batch_size=48 .* 32 \(8 devices, 4 architectures.* 32, 64',
    ),
    (dict(test_batch_size=4), {}, r'test_batch_size=4 .*; the nearest: 8$'),
  ],
)
def test_batches_that_devices_cannot_share_name_the_nearest(
  batches, keys, message
):
  config = _config(**keys)
  with config.unlocked():
    config.data.update(batches)
  with pytest.raises(ValueError, match=message):
    devices_lib.all_devices(config, 4)


def test_leave_one_out_needs_others():
  config = _config(mode='pmap', preset='paper', leave_one_out=True)
  one_device = jax.default_device(jax.devices()[0])
  with one_device, pytest.raises(ValueError, match='needs several devices'):
    devices_lib.all_devices(config, 1)
