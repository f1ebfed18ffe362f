"""The file of a chip that a user measures: its layers, and what reads it."""

import functools
import shlex

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fliqs_jax as fliqs
from fliqs_jax import profile_chip
from fliqs_jax.layers import quant_layers
from fliqs_jax.runtime import files
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


class _Twins(nn.Module):
  """Layers of one shape with different menus, and one of another shape."""

  @nn.compact
  def __call__(self, x):
    for name, menu in (
      ('excluded', 'BF16'),
      ('open', 'INT4+INT8'),
      ('fixed', 'INT8'),
    ):
      x = quant_layers.QuantDense(
        6, spec=quant_spec.QuantSpec(menu), name=name
      )(x)
    return quant_layers.QuantDense(2, spec=quant_spec.QuantSpec('INT4'))(x)


def test_a_shape_is_timed_once_at_the_menus_of_all_its_layers(monkeypatch):
  space = fliqs.find_decisions(
    _Twins(), jax.ShapeDtypeStruct((1, 6), jnp.float32)
  )
  timed = []

  def seconds(functions, x, rounds):
    timed.append((*functions, x.shape, rounds))
    return {name: i * 1e-3 for i, name in enumerate(functions, 1)}

  monkeypatch.setattr(profile_chip, 'served', lambda layer, shape, name: name)
  monkeypatch.setattr(profile_chip, 'seconds', seconds)
  rows, skipped = profile_chip.profile(space.ops, (), 4, 3)
  assert not skipped
  shape = (4, 1, 6)
  assert timed == [('BF16', 'INT4', 'INT8', shape, 3), ('INT4', shape, 3)]
  assert [row['times'] for row in rows] == [
    dict(BF16=1.0, INT4=2.0, INT8=3.0),
    dict(INT4=1.0),
  ]


def test_a_measured_file_prices_its_layers_and_others(tmp_path, capsys):
  path = tmp_path / 'mine.yaml'
  flags = ['--config=tests/tiny.py:space=int_s', f'--out={path}']
  flags += ['--rounds=1', '--batch=2', '--config.quant.groups=()']
  assert profile_chip.main(flags) == 0
  assert f'cost.kind=latency:{path}' in capsys.readouterr().out
  # The same command, in a shell, measures it again.
  _, _, *again = shlex.split(files.read_yaml(path)['source'])
  assert again == ['fliqs_jax.profile_chip', *flags]
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
    ('--formats=INT8,INT4:kl', 'INT4:kl has a strategy, which does not'),
    ('--config=nothing.py', "no config file 'nothing.py'"),
    ('--config.cost.what=1', 'no such key'),
    ('--speed=1', "unknown flag '--speed=1'"),
    ('--out=no/x.yaml', '--out=no/x.yaml: there is no such directory'),
    ('--out=tests', '--out=tests is a directory; name a file in it'),
  ],
)
def test_a_mistake_is_one_line(tmp_path, capsys, monkeypatch, flag, message):
  monkeypatch.setattr(profile_chip, 'profile', None)  # Nothing is timed.
  flags = ['--config=tests/tiny.py', f'--out={tmp_path / "x.yaml"}', flag]
  assert profile_chip.main(flags) == 2
  assert message in capsys.readouterr().err
