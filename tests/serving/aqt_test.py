"""AQT: a codebase that threads its configs is searched and served by them."""

import dataclasses
import functools
from typing import Any
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fliqs_jax as fliqs
from fliqs_jax import export
from fliqs_jax.numerics import formats
from fliqs_jax.numerics import quantize
from fliqs_jax.serving import export_files
from fliqs_jax.serving import stored_layers
from tests import helpers

with warnings.catch_warnings():
  warnings.simplefilter('ignore')  # Of what aqt imports.
  from aqt.jax.v2 import aqt_dot_general
  from aqt.jax.v2 import utils as aqt_utils
  from aqt.jax.v2.flax import aqt_flax

  from fliqs_jax.serving import aqt_configs

# AQT asks for the type of arrays in a way that JAX will not have for long.
pytestmark = pytest.mark.filterwarnings(
  'ignore:Implicit conversion:DeprecationWarning'
)

X = helpers.random((16, 6))
PLAIN = nn.initializers.lecun_normal()


@dataclasses.dataclass(frozen=True)
class Quant:
  """What a codebase threads to its layers: one config, or one per layer."""

  config: Any = None
  mode: Any = aqt_utils.QuantMode.TRAIN

  def dot_general_cls(self):
    return functools.partial(
      aqt_flax.AqtDotGeneral, self.config, prng_name=None
    )

  def einsum(self):
    kept = aqt_flax.FreezerMode
    is_stored = self.mode != aqt_utils.QuantMode.TRAIN
    return aqt_flax.AqtEinsum(
      self.config,
      prng_name=None,
      rhs_quant_mode=self.mode,
      rhs_freeze_mode=kept.CALIBRATION_AND_VALUE if is_stored else kept.NONE,
      use_legacy_freezer=False,
    )


class Net(nn.Module):
  """A dense layer, an einsum with a raw parameter, and a head of two axes."""

  dense: Any = None
  einsum: Any = None

  @nn.compact
  def __call__(self, x, train=False):
    del train
    x = nn.relu(nn.Dense(8, dot_general_cls=self.dense)(x))
    w = self.param('mixed', PLAIN, (8, 2, 4))
    einsum = self.einsum.einsum() if self.einsum else jnp.einsum
    x = nn.relu(einsum('bi,ijk->bjk', x, w))
    return nn.DenseGeneral(
      3, axis=(-2, -1), dot_general_cls=self.dense, name='head'
    )(x)


class OwnNet(nn.Module):
  """The same network of this project's layers."""

  spec: Any

  @nn.compact
  def __call__(self, x):
    x = nn.relu(fliqs.QuantDense(8, spec=self.spec, name='Dense_0')(x))
    x = fliqs.QuantEinsum(
      (8, 2, 4), 'bi,ijk->bjk', use_bias=False, spec=self.spec, name='mixed'
    )(x)
    return fliqs.QuantDenseGeneral(
      3, axis=(-2, -1), spec=self.spec, name='head'
    )(nn.relu(x))


def threaded(config):
  quant = Quant(config)
  return Net(quant.dot_general_cls(), quant)


@pytest.fixture(scope='module')
def searched():
  model = fliqs.searchable(
    threaded(aqt_configs.searched()), fliqs.QuantSpec(('INT4', 'INT8'))
  )
  return model, fliqs.find_decisions(model, X[:1])


def test_decisions_have_the_names_of_parameters(searched):
  _, space = searched
  assert [d.name for d in space.decisions] == ['Dense_0', 'mixed', 'head']
  # 6 x 8, 8 x 2 x 4 and 2 x 4 x 3.
  assert [op.shape.macs for op in space.ops] == [48, 64, 24]


@pytest.mark.optimized
def test_values_are_those_of_own_layers_bit_for_bit(searched):
  model, space = searched
  own = OwnNet(model.spec)
  names = dict(Dense_0='INT4', mixed='INT8', head='INT4')
  choices = {d.name: d.one_hot(names[d.name]) for d in space.decisions}
  variables = {**helpers.init(model, X), 'arch': space.expand(choices)}
  learn = functools.partial(model.apply, mutable=['quant_stats'])
  y, stats = jax.jit(learn)(variables, X)
  params = dict(variables['params'])
  params['mixed'] = dict(kernel=params['mixed'])
  given = {
    **helpers.init(own, X),
    'params': params,
    'arch': variables['arch'],
  }
  learn = functools.partial(own.apply, mutable=['quant_stats'])
  expected, own_stats = jax.jit(learn)(given, X)
  np.testing.assert_array_equal(y, expected)
  jax.tree.map(
    np.testing.assert_array_equal,
    stats['quant_stats'],
    own_stats['quant_stats'],
  )


def test_the_search_step_learns(searched):
  model, space = searched

  def loss(outputs, batch):
    error = jnp.mean((outputs - batch['label']) ** 2)
    return error, dict(loss=error)

  batch = dict(image=X, label=X[:, :3])
  phases = fliqs.phases(20, act_start=0.15, search_start=0.375, freeze=0.5)
  cost = space.cost('bops')
  controller = fliqs.make_controller(
    'default',
    space.relative_cost(cost, fliqs.uniform_cost(cost, 'INT4')),
    phases,
  )
  optimizer = optax.sgd(0.3)
  state = fliqs.create_state(
    model, space, optimizer, controller, jax.random.key(1), X[:1]
  )
  step = jax.jit(
    fliqs.search_step(
      model.apply,
      loss,
      lambda outputs, batch: -loss(outputs, batch)[0],
      space,
      controller,
      optimizer,
      phases,
    )
  )
  losses = []
  for _ in range(20):
    state, metrics = step(state, batch, batch)
    losses.append(jax.device_get(metrics))
  losses = [row['loss'] for row in losses]
  assert np.isfinite(losses).all()
  assert losses[-1] < 0.8 * losses[0]
  assert step._cache_size() == 1


def test_scanned_layers_have_a_decision_in_each_iteration():
  dense = Quant(aqt_configs.searched()).dot_general_cls()

  class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
      return x + nn.Dense(6, dot_general_cls=dense)(x), None

  stack = nn.scan(
    nn.remat(Block),
    variable_axes=dict(params=0),
    split_rngs=dict(params=True),
    length=2,
  )

  class Stack(nn.Module):
    @nn.compact
    def __call__(self, x):
      return stack(name='stack')(x, None)[0]

  space = fliqs.find_decisions(fliqs.searchable(Stack()), X)
  names = [d.name for d in space.decisions]
  assert names == ['stack/Dense_0/@0', 'stack/Dense_0/@1']


def test_a_config_of_aqt_itself_is_named_and_stays():
  dense = Quant(aqt_dot_general.dot_general_make(8, 8)).dot_general_cls()
  model = fliqs.searchable(Net(dense))
  found = fliqs.coverage(model, X)
  reasons = {layer.path: layer.reason for layer in found.layers}
  own_rules = 'it is inside custom_vjp_call, which has its own rules'
  assert reasons == dict(Dense_0=own_rules, mixed='', head=own_rules)


@pytest.mark.optimized
def test_a_traced_format_is_one_program_and_that_of_own_layers():
  menu = formats.menu(['INT4', 'INT8', 'E4M3', 'BF16'])
  threshold, w = jnp.float32(2.0), helpers.random((6, 8), 1)
  w[0, 0] = 100.0  # The largest of its channel keeps its gradient.

  def by_aqt(x, w, one_hot):
    grid = quantize.select(menu, one_hot)
    scale = quantize.scale_of(threshold, grid)
    config = aqt_configs.config(
      aqt_configs.Operand(grid, scale), aqt_configs.Operand(grid)
    )
    layer = nn.Dense(8, use_bias=False, dot_general=config)
    run = jax.checkpoint(lambda x, w: layer.apply(dict(params=w), x))
    return run(x, dict(kernel=w))

  def by_own(x, w, one_hot):
    grid = quantize.select(menu, one_hot)
    q = quantize.quantize(w, grid, jnp.abs(w).max(axis=0, keepdims=True))
    x = quantize.quantize(x, grid, threshold)
    return quantize.rescale(x.values @ q.values, x.scale, q.scale)

  def with_gradients(product):
    def run(x, w, one_hot):
      y, pull = jax.vjp(lambda x, w: product(x, w, one_hot), x, w)
      return y, pull(jnp.cos(y))

    return jax.jit(run)

  theirs, own = with_gradients(by_aqt), with_gradients(by_own)
  for one_hot in np.eye(len(menu), dtype=np.float32):
    y, gradients = theirs(X, w, one_hot)
    expected, expected_gradients = own(X, w, one_hot)
    np.testing.assert_array_equal(y, expected)
    jax.tree.map(
      functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5),
      gradients,
      expected_gradients,
    )
    assert gradients[1][0, 0]
  assert theirs._cache_size() == 1


@pytest.fixture(scope='module')
def found(tmp_path_factory):
  """A found network of the codebase, its evaluation, and its configs."""
  spec = fliqs.QuantSpec(('INT3', 'INT4', 'INT8', 'E2M1'), mode='separate')
  model = fliqs.searchable(threaded(aqt_configs.searched()), spec)
  space = fliqs.find_decisions(model, X)
  choices = space.choices(
    dict(
      Dense_0=('INT4', 'INT8'), mixed=('INT8', 'INT3'), head=('E2M1', 'INT8')
    )
  )
  variables = helpers.init(model, X)
  variables |= dict(arch=space.expand(choices))
  learn = jax.jit(
    functools.partial(model.apply, mutable=['quant_stats']),
    compiler_options=helpers.FAST,
  )
  variables |= learn(variables, 0.7 * X)[1]
  out = tmp_path_factory.mktemp('exports') / 'out'
  export.export_model(model, variables, choices, X, out=out)
  evaluated = jax.jit(model.apply)(variables, X)
  params = dict(params=variables['params'])
  return params, evaluated, aqt_configs.read(out)


def served(configs, mode):
  modes = dict(
    convert=aqt_utils.QuantMode.CONVERT, serve=aqt_utils.QuantMode.SERVE
  )
  dense = aqt_configs.dot_general_cls(
    {path: configs[path] for path in ('Dense_0', 'head')}, mode
  )
  return Net(dense, Quant(configs['mixed'], modes[mode]))


def converted(found):
  params, _, configs = found
  by_path = {path: configs[path] for path in ('Dense_0', 'head')}
  return aqt_configs.converted(served(configs, 'convert'), by_path, params, X)


def test_convert_stores_weights_in_types_of_few_bits(found):
  leaves = jax.tree_util.tree_leaves_with_path(converted(found)['aqt'])
  types = {
    jax.tree_util.keystr(path).split("'")[1]: leaf.dtype.name
    for path, leaf in leaves
    if 'qrhs' in jax.tree_util.keystr(path) and leaf.size > 8
  }
  assert types == dict(Dense_0='int4', AqtEinsum_0='int8', head='float4_e2m1fn')


@pytest.mark.optimized
def test_serving_is_the_evaluation_of_the_search_bit_for_bit(found):
  _, evaluated, configs = found
  variables = converted(found)
  # What is served are the stored weights, not those of `params`.
  params = dict(variables['params'])
  for name in ('Dense_0', 'head'):
    params[name] = params[name] | dict(kernel=0 * params[name]['kernel'])
  params['mixed'] = 0 * params['mixed']
  variables |= dict(params=params)
  model = served(configs, 'serve')
  np.testing.assert_array_equal(jax.jit(model.apply)(variables, X), evaluated)
  # Two layers multiply integers; the head has weights of E2M1.
  program = str(jax.make_jaxpr(model.apply)(variables, X))
  assert program.count('preferred_element_type=int32') == 2


def test_a_path_that_the_model_lacks_is_named(found):
  params, _, configs = found
  with pytest.raises(ValueError, match='no layer mixed of the model'):
    aqt_configs.converted(served(configs, 'convert'), configs, params, X)


def test_an_unknown_mode_is_named():
  with pytest.raises(ValueError, match="mode='train' is unknown"):
    aqt_configs.dot_general_cls({}, 'train')


def test_what_aqt_cannot_hold_is_named(monkeypatch):
  def layer(weights, shape=(4, 4)):
    return stored_layers.Layer(
      formats.parse(weights), formats.parse('INT8'), shape
    )

  layers = {
    'wide': layer('E4M3'),
    'body/@0': layer('INT4'),
    'body/@1': layer('INT4'),
    'qk': layer('INT8', ()),
    'twice': layer('INT8'),
    'twice#2': layer('INT8'),
  }
  tensors = {
    f'scales/twice/{side}': np.ones(()) for side in ('weights', 'activations')
  }
  content = export_files.Content({}, layers, tensors)
  monkeypatch.setattr(export_files, 'read', lambda directory: content)
  with pytest.raises(ValueError, match='AQT cannot hold') as error:
    aqt_configs.read('served/a')
  for path in ('wide: E4M3', 'body: each iteration', 'qk: ', 'twice#2: '):
    assert path in str(error.value)
