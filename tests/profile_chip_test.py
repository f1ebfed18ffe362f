"""The file of a chip that a user measures: its layers, and what reads it."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fliqs_jax as fliqs
from fliqs_jax import profile_chip
from fliqs_jax.layers import quant_layers
from fliqs_jax.space import quant_spec
from fliqs_jax.space.chips import chip_file
from fliqs_jax.space.chips import prices
from tests import helpers

pytestmark = pytest.mark.filterwarnings(  # Of ml_collections.
  'ignore:the load_module:DeprecationWarning'
)


class _Net(nn.Module):
  """Each kind of layer that can be timed, with strides and groups."""

  @nn.compact
  def __call__(self, x):
    spec = quant_spec.QuantSpec('INT8')
    conv = functools.partial(quant_layers.QuantConv, spec=spec)
    x = conv(8, (3, 3), strides=2, name='stem')(x)
    x = conv(16, (3, 3), feature_group_count=8, name='multiplied')(x)
    x = conv(16, (3, 3), feature_group_count=4, name='grouped')(x)
    x = conv(6, (1, 1), strides=(2, 1), name='pointwise')(x)
    x = conv(6, (3, 3), feature_group_count=6, name='depthwise')(x)
    dense = functools.partial(quant_layers.QuantDense, spec=spec)
    x = dense(5, name='mixed')(x.reshape((1, -1, 6)))
    return dense(3, name='head')(x.mean(axis=1))


def test_a_layer_that_is_timed_alone_is_the_layer_of_the_network():
  space = fliqs.find_decisions(
    _Net(), jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32)
  )
  assert len(space.ops) == 7
  for op in space.ops:
    layer, shape = profile_chip.layer_of(op.shape)
    alone = fliqs.find_decisions(
      fliqs.searchable(layer, quant_spec.QuantSpec('INT8')),
      jax.ShapeDtypeStruct(shape, jnp.float32),
    )
    (found,) = alone.ops
    expected = prices.counts(op.shape, {})
    assert prices.counts(found.shape, {}) == expected, op.path


@pytest.mark.parametrize('name', ['INT8', 'INT4', 'BF16'])
def test_a_layer_that_is_timed_computes_what_it_shall(name):
  layer = nn.Dense(8)
  x = helpers.random((32, 16), seed=1)
  served = profile_chip.served(layer, x.shape, name)
  y = served(x)
  params = layer.init(jax.random.key(1), x)
  expected = layer.apply(params, x)
  steps = {'INT8': 254, 'INT4': 14, 'BF16': 256}[name]
  # Sixteen products; each operand is off by half a step of its range.
  assert np.abs(y - expected).max() < 16 / steps
  assert np.abs(y - expected).max() > 0


def test_a_measured_file_prices_its_layers_and_others(tmp_path, capsys):
  path = tmp_path / 'mine.yaml'
  status = profile_chip.main(
    [
      '--config=tests/tiny.py:space=int_s',
      f'--out={path}',
      '--rounds=1',
      '--batch=2',
    ]
  )
  assert status == 0
  assert f'cost.kind=latency:{path}' in capsys.readouterr().out
  chip = chip_file.read(f'latency:{path}')
  assert chip.batch == 2
  assert [sorted(map(str, x.times)) for x in chip.layers] == [
    ['BF16', 'INT4', 'INT8']
  ] * 2
  # 8 x 8 pixels to 16 units to 10 classes.
  assert [layer.key[1:3] for layer in chip.layers] == [(64, 16), (16, 10)]
  space = fliqs.find_decisions(
    quant_layers.QuantDense(10, spec=quant_spec.QuantSpec('INT8')),
    jax.ShapeDtypeStruct((1, 16), jnp.float32),
  )
  measured = {str(f): t for f, t in chip.layers[1].times.items()}
  cost = float(space.cost(f'latency:{path}')(space.only()))
  assert cost == pytest.approx(min(measured['INT8'], measured['BF16']))


@pytest.mark.parametrize(
  ('flag', 'message'),
  [
    ('--batch=0', '--batch=0 must be at least 1'),
    ('--rounds=0', '--rounds=0 must be at least 1'),
    ('--formats=INT9', "unknown format 'INT9'"),
    ('--config=nothing.py', "no config file 'nothing.py'"),
    ('--config.cost.what=1', 'no such key'),
    ('--speed=1', "unknown flag '--speed=1'"),
    ('--out=no/x.yaml', '--out=no/x.yaml: there is no such directory'),
  ],
)
def test_a_mistake_is_one_line(tmp_path, capsys, flag, message):
  flags = ['--config=tests/tiny.py', f'--out={tmp_path / "x.yaml"}', flag]
  assert profile_chip.main(flags) == 2
  assert message in capsys.readouterr().err
