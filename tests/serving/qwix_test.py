"""Qwix: the rules of an assignment, and models of both kinds that take them."""

import warnings

from flax import nnx
import flax.linen as nn
import jax
import numpy as np
import pytest

import fliqs_jax as fliqs
from fliqs_jax import models
from fliqs_jax.numerics import formats
from fliqs_jax.serving import qwix_rules
from fliqs_jax.serving import stored_layers


@pytest.fixture(scope='module')
def qwix():
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')  # Of flax, for what qwix imports.
    return pytest.importorskip('qwix')


def layer(weights, activations, shape=(4, 4)):
  names = (weights, activations)
  return stored_layers.Layer(*(n and formats.parse(n) for n in names), shape)


def test_rules_say_the_assignment_and_what_they_cannot():
  layers = {
    'stage0/conv': layer('INT4', 'INT8'),
    'stage0/conv1': layer('E2M1', 'E4M3'),
    'head': layer('BF16', 'BF16'),
    'odd': layer(None, 'INT8'),
  }
  rules, missing = qwix_rules.rules(layers)
  assert rules == [
    dict(module_path='stage0/conv', weight_qtype='int4', act_qtype='int8'),
    dict(module_path='stage0/conv1', weight_qtype='float4_e2m1fn'),
  ]
  assert missing == [
    'stage0/conv1: activations E4M3',
    'odd: activations INT8 alone',
  ]


def test_rules_of_scanned_layers_and_of_attention():
  rules, missing = qwix_rules.rules(
    {
      'up/@0': layer('INT4', 'INT4'),
      'up/@1': layer('INT4', 'INT4'),
      'down/@0': layer('INT4', 'INT4'),
      'down/@1': layer('INT8', 'INT8'),
      'qk': layer('INT8', 'INT8', ()),
    }
  )
  assert rules == [
    dict(module_path='up', weight_qtype='int4', act_qtype='int4')
  ]
  assert missing == [
    'down: a layer of several formats',
    'qk: a product of two activations',
  ]


def test_a_module_that_is_used_twice_has_one_rule():
  rules, missing = qwix_rules.rules(
    {
      'dense': layer('INT4', 'INT4'),
      'table': layer('INT8', None),  # A look-up.
      'dense#2': layer('INT4', 'INT4'),
      'table#2': layer('INT8', 'INT8'),  # The head.
    }
  )
  assert rules == [
    dict(module_path='dense', weight_qtype='int4', act_qtype='int4'),
    dict(module_path='table', weight_qtype='int8', act_qtype='int8'),
  ]
  assert not missing


def test_a_linen_model_takes_the_rules(qwix):
  rules, _ = qwix_rules.rules(
    {'hidden0': layer('INT4', 'INT8'), 'head': layer('INT5', 'INT5')}
  )
  config = dict(name='mlp', hidden=(16,))
  model = models.construct(config, 10, dense=nn.Dense)
  provider = qwix.PtqProvider([qwix.QuantizationRule(**r) for r in rules])
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    model = qwix.quantize_model(model, provider)
    variables = model.init(
      jax.random.key(0), np.ones((2, 8, 8, 1), np.float32), train=False
    )
  types = {
    path: layer['kernel'].array.qtype
    for path, layer in variables['params'].items()
  }
  assert types == {'hidden0': 'int4', 'head': 'int5'}


class Block(nnx.Module):
  def __init__(self, rngs):
    self.up = nnx.Linear(6, 8, rngs=rngs)
    self.down = nnx.Linear(8, 6, rngs=rngs)

  def __call__(self, x):
    return x + self.down(jax.nn.relu(self.up(x)))


class NnxNet(nnx.Module):
  """A table that is also the head, a convolution, a list, a second use."""

  def __init__(self, rngs):
    self.table = nnx.Embed(5, 6, rngs=rngs)
    self.conv = nnx.Conv(6, 6, (3,), rngs=rngs)
    self.blocks = nnx.List([Block(rngs), Block(rngs)])

  def __call__(self, tokens):
    x = self.conv(self.table(tokens))
    for block in (*self.blocks, self.blocks[0]):
      x = block(x)
    return self.table.attend(x)


def test_an_nnx_model_takes_the_rules(qwix):
  net, tokens = NnxNet(nnx.Rngs(0)), np.array([[1, 2, 3, 0]])
  found = fliqs.coverage(fliqs.searchable(net, embed=True), tokens)
  names = {
    'table': 'INT8',
    'conv': 'INT8',  # XLA on a CPU has no convolution of int4.
    'blocks/0/up': 'INT5',
    'blocks/0/down': 'INT6',
    'blocks/1/up': 'INT7',
    'blocks/1/down': 'INT3',
  }
  layers = {}
  for one in found.layers:
    name = names[one.path.partition('#')[0]]
    layers[one.path] = layer(name, None if one.kind == 'embed' else name)
  assert len(layers) == len(names) + 3  # The head, and a block again.
  rules, missing = qwix_rules.rules(layers)
  assert not missing
  provider = qwix.PtqProvider([qwix.QuantizationRule(**r) for r in rules])
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    net = qwix.quantize_model(net, provider, tokens)
    assert np.isfinite(net(tokens)).all()
  assert not provider.get_unused_rules()
  types = {
    '/'.join(map(str, path)): module.kernel.array.qtype
    for path, module in nnx.iter_modules(net)
    if hasattr(module, 'kernel')
  }
  del names['table']  # Qwix quantizes it in each call.
  assert types == {path: name.lower() for path, name in names.items()}
