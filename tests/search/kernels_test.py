"""Kernels of a search step: XLA on CPU compiles equal ones once."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest

from fliqs_jax.layers import quant_layers
from fliqs_jax.search import presets
from fliqs_jax.search import schedules
from fliqs_jax.search import train_state
from fliqs_jax.search import train_step
from fliqs_jax.space import cost_model
from fliqs_jax.space import discovery
from fliqs_jax.space import quant_spec
from fliqs_jax.tasks import classification

_SPEC = quant_spec.QuantSpec(formats='int_s')


class _EqualLayers(nn.Module):
  """Layers of the same shape, one after another."""

  layers: int

  @nn.compact
  def __call__(self, x, train=False):
    del train
    for i in range(self.layers):
      x = quant_layers.QuantDense(16, spec=_SPEC, name=f'layer{i}')(x)
      x = nn.tanh(x)
    return x


def _different_kernels(layers):
  """Returns the fused computations of a compiled step, each once."""
  model = _EqualLayers(layers)
  images = jnp.zeros((8, 16))
  space = discovery.find(model, images, spec=_SPEC)
  cost = space.cost('bops')
  phases = schedules.phases(100, 0.0, 0.2, 0.8)
  target = cost_model.uniform(cost, 'INT4')
  search = presets.make(
    'sensitivity', space.relative_cost(cost, target), phases
  )
  optimizer = optax.sgd(0.1)
  state = train_state.create(
    model, space, optimizer, search, jax.random.key(0), images
  )
  step = train_step.search_step(
    model.apply,
    classification.loss(0.0),
    classification.minus_cross_entropy,
    space,
    search,
    optimizer,
    phases,
  )
  batch = dict(image=images, label=jnp.zeros(8, jnp.int32))
  text = jax.jit(step).lower(state, batch, batch).compile().as_text()
  return {
    _with_numbers_as_names(part.partition('{\n')[2])
    for part in text.split('\n\n')
    if part.startswith('%fused_computation')
  }


def _with_numbers_as_names(body):
  """Returns a computation without what differs between equal ones."""
  order = {}

  def number(name):
    return order.setdefault(name[0], f'%{len(order)}')

  body = re.sub(r', metadata=\{.*?\}', '', body)
  return re.sub(r'%[\w.\-]+', number, body)


@pytest.mark.optimized
def test_more_equal_layers_need_no_more_kernels():
  # From a few layers on, what sums over all of them is cut in equal parts. One
  # more for each layer would be four more.
  few, many = (len(_different_kernels(n)) for n in (8, 12))
  assert few > 20
  assert many < few + 4
