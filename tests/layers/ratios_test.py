"""Strategies in layers: thresholds are found, stored and used."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fliqs_jax as fliqs
from fliqs_jax.layers import quant_layers
from fliqs_jax.numerics import formats
from fliqs_jax.numerics import quantize
from fliqs_jax.numerics import strategies
from fliqs_jax.search import calibration

_ALL = ('max_abs', 'kl', 'eq', 'admm')


def _spec(strategies=_ALL, **options):
  return fliqs.QuantSpec(
    formats=('INT4',), strategies=strategies, mode='separate', **options
  )


class _Net(nn.Module):
  """Two convolutions and a head, of our layers or of linen's."""

  conv: object = nn.Conv
  dense: object = nn.Dense

  @nn.compact
  def __call__(self, x, train=False):
    del train
    x = nn.relu(self.conv(4, (3, 3), name='first')(x))
    x = nn.relu(self.conv(6, (3, 3), name='second')(x)).mean((1, 2))
    return self.dense(5, name='head')(x)


def _own(spec):
  return _Net(
    quant_layers.with_spec(quant_layers.QuantConv, spec),
    quant_layers.with_spec(quant_layers.QuantDense, spec),
  )


def _images():
  return jax.random.laplace(jax.random.key(0), (8, 6, 6, 4))


def _variables(model):
  variables = model.init(jax.random.key(1), _images())
  return jax.tree.map(jnp.asarray, dict(variables))


def _calibrated(model, variables, images=None):
  step = jax.jit(calibration.strategy_step(model.apply))
  state = {k: v for k, v in variables.items() if k not in ('params', 'arch')}
  images = _images() if images is None else images
  found = step(
    variables['params'], state, variables['arch'], dict(image=images)
  )
  return {**variables, **found}


@pytest.fixture(scope='module')
def found():
  """Variables of a network of our layers after a calibration."""
  model = _own(_spec())
  return _calibrated(model, _variables(model))


def test_thresholds_of_images_that_are_split_are_those_of_all(found):
  model, mesh = _own(_spec()), jax.make_mesh((4,), ('data',))
  with jax.set_mesh(mesh):
    images = jax.device_put(_images(), jax.sharding.PartitionSpec('data'))
    split = _calibrated(model, _variables(model), images)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5),
    jax.device_get(split['quant_stats']),
    found['quant_stats'],
  )


def test_thresholds_are_those_of_the_layers_own_input_and_weights(found):
  x, int4 = _images(), formats.parse('INT4')
  kernel = found['params']['first']['kernel']
  first = found['quant_stats']['first']
  np.testing.assert_allclose(first['largest'], jnp.abs(x).max(), rtol=1e-6)
  everything, start = (0, 1, 2, 3), strategies.ACTIVATIONS_START
  grid = quantize.grid_of(int4)
  fitted = strategies.admm(x, grid, everything, start).item()
  np.testing.assert_allclose(
    first['ratio'][jnp.array([0, 1, 3])],
    [1, strategies.kl(x, int4), fitted],
    rtol=1e-5,
  )
  admm = strategies.admm(kernel, grid, (0, 1, 2), strategies.WEIGHTS_START)
  np.testing.assert_allclose(first['weight_ratio'][3], admm.ravel(), rtol=1e-5)
  # 36 numbers to a channel are too few for a histogram.
  np.testing.assert_array_equal(first['weight_ratio'][1], np.ones(4))
  assert 0.1 < first['ratio'][2] < 0.9  # The other rules clip a Laplacian, too.


def test_a_layer_quantizes_at_the_threshold_of_the_chosen_strategy(found):
  outputs = jax.jit(_own(_spec()).apply)

  def chosen(number):
    one_hot = jax.tree.map(
      lambda leaf: jnp.eye(len(leaf))[number], found['arch']
    )
    return outputs({**found, 'arch': one_hot}, _images())

  exact = _Net().apply({'params': found['params']}, _images())
  max_abs, admm = (float(jnp.mean((chosen(i) - exact) ** 2)) for i in (0, 3))
  assert admm < 0.7 * max_abs


def test_one_product_of_mixtures_is_the_mean_of_all_products(found):
  # Efficient and branched convolutions are equal, because the product is linear
  # in each operand (DQSS, Eq. 10).
  model = _own(_spec(mix='composite'))

  @jax.jit
  def outputs(activations, weights):
    leaves = dict(activations=activations, weights=weights)
    _, seen = model.apply(
      {**found, 'arch': {**found['arch'], 'first': leaves}},
      _images(),
      capture_intermediates=True,
      mutable=['intermediates'],
    )
    return seen['intermediates']['first']['__call__'][0]

  p, q = jnp.array([0.1, 0.2, 0.3, 0.4]), jnp.array([0.4, 0.1, 0.3, 0.2])
  branched = sum(
    p[i] * q[j] * outputs(jnp.eye(4)[i], jnp.eye(4)[j])
    for i in range(4)
    for j in range(4)
  )
  efficient = outputs(p, q)
  scale = jnp.abs(branched).max()
  np.testing.assert_allclose(efficient / scale, branched / scale, atol=1e-6)


def test_calls_that_do_not_calibrate_change_no_ratio():
  model = _own(_spec())
  variables = _variables(model)
  for mutable in (['quant_stats'], True):
    _, changed = model.apply(variables, _images(), mutable=mutable)
    for stats in changed['quant_stats'].values():
      assert not stats['ratio'].any()
      assert not stats['weight_ratio'].any()
      assert stats['count'] == 1


def test_a_stock_network_has_the_thresholds_of_our_layers(found):
  spec = _spec()
  own, stock = _own(spec), fliqs.searchable(_Net(), spec)
  variables = stock.init(jax.random.key(1), _images())
  variables = {**variables, 'arch': found['arch'], 'params': found['params']}
  also = _calibrated(stock, variables)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5),
    dict(found['quant_stats']),
    dict(also['quant_stats']),
  )
  np.testing.assert_array_equal(
    jax.jit(own.apply)(found, _images()),
    jax.jit(stock.apply)(
      {**also, 'quant_stats': found['quant_stats']}, _images()
    ),
  )


@pytest.mark.parametrize(
  ('name', 'message'),
  [
    ('INT4:aciq', "unknown strategy in 'INT4:aciq'; allowed: max_abs, kl"),
    ('BF16:kl', 'BF16 has no threshold to choose'),
    ('E2M1:kl', 'kl merges a histogram into equal steps'),
    ('INT4:', "unknown strategy in 'INT4:'"),
  ],
)
def test_a_name_that_is_no_strategy_is_refused(name, message):
  with pytest.raises(ValueError, match=message):
    formats.parse(name)


def test_each_format_of_a_menu_gets_each_strategy():
  spec = fliqs.QuantSpec(
    formats=('INT4', 'INT8', 'BF16'), strategies=('kl', 'admm')
  )
  assert [f.name for f in spec.formats] == [
    'INT4:kl',
    'INT4:admm',
    'INT8:kl',
    'INT8:admm',
    'BF16',
  ]
  assert [f.bits for f in spec.formats] == [4, 4, 8, 8, 16]
  with pytest.raises(
    ValueError, match=r"quant.strategies=\('kl',\): 'E2M1:kl'"
  ):
    fliqs.QuantSpec(formats=('E2M1',), strategies=('kl',))
