"""Relaxed layers: means over the menu, of the operands or of the results."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fliqs_jax.layers import quant_layers
from fliqs_jax.numerics import formats
from fliqs_jax.program import searchable
from fliqs_jax.space import quant_spec
from tests import helpers

TIED = quant_spec.QuantSpec(('INT2', 'INT4', 'BF16'))
SEPARATE = dataclasses.replace(TIED, mode='separate')
ONE_HOTS = np.eye(3, dtype=np.float32)
P = np.float32([0.2, 0.5, 0.3])
Q = np.float32([0.6, 0.1, 0.3])


def _intercepted(model):
  return lambda spec: searchable.searchable(model, spec, attention=True)


# {kind: spec -> a layer; the shape of its input}.
LAYERS = {
  'conv': (
    lambda spec: quant_layers.QuantConv(3, (3, 3), spec=spec),
    (2, 4, 5, 2),
  ),
  'dense': (lambda spec: quant_layers.QuantDense(4, spec=spec), (3, 5)),
  'einsum': (
    lambda spec: quant_layers.QuantEinsum((5, 4), 'bc,cd->bd', spec=spec),
    (3, 5),
  ),
  'transposed conv': (_intercepted(nn.ConvTranspose(3, (2, 2))), (1, 3, 3, 2)),
  'attention': (
    _intercepted(nn.MultiHeadDotProductAttention(2)),
    (1, 3, 4),
  ),
}


@functools.cache
def _case(kind, mode='tied'):
  """Returns (mix, {leaf: p}) -> y of one layer, and its leaves' names.

  All leaves of one name have the same value.
  """
  make, shape = LAYERS[kind]
  spec = dataclasses.replace(TIED, mode=mode)
  x = helpers.random(shape)
  sampled = make(spec)
  variables = dict(helpers.init(sampled, x))
  # The moments of the input, so that activations are quantized.
  _, changed = jax.jit(
    functools.partial(sampled.apply, mutable=['quant_stats'])
  )(variables, x)
  variables |= changed

  @functools.cache
  def compiled(mix):
    layer = make(dataclasses.replace(spec, mix=mix))

    @jax.jit
    def apply(leaves):
      arch = jax.tree_util.tree_map_with_path(
        lambda path, _: leaves[path[-1].key], variables['arch']
      )
      return layer.apply({**variables, 'arch': arch}, x)

    return apply

  return lambda mix, **leaves: compiled(mix)(leaves)


def _near(actual, expected):
  scale = np.abs(expected).max()
  np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-6 * scale)


@pytest.mark.parametrize('mix', ['composite', 'branched'])
@pytest.mark.parametrize('kind', LAYERS)
def test_at_a_one_hot_a_relaxed_layer_is_the_sampled_one_bit_for_bit(kind, mix):
  y = _case(kind)
  for one_hot in ONE_HOTS:
    np.testing.assert_array_equal(
      y(mix, format=one_hot), y('sampled', format=one_hot)
    )


@pytest.mark.parametrize('mix', ['composite', 'branched'])
@pytest.mark.parametrize('kind', ['conv', 'dense', 'einsum'])
def test_two_decisions_give_the_mean_over_all_pairs(kind, mix):
  # The op is linear in each operand, so both kinds of layer agree.
  y = _case(kind, 'separate')
  expected = sum(
    p * q * np.asarray(y('sampled', weights=w, activations=a))
    for p, w in zip(P, ONE_HOTS)
    for q, a in zip(Q, ONE_HOTS)
  )
  _near(y(mix, weights=P, activations=Q), expected)


@pytest.mark.parametrize('kind', ['conv', 'dense', 'transposed conv'])
def test_a_branched_layer_gives_the_mean_of_the_results(kind):
  y = _case(kind)
  each = [np.asarray(y('sampled', format=one_hot)) for one_hot in ONE_HOTS]
  _near(y('branched', format=P), np.tensordot(P, each, 1))
  # And dE/dp_k is <g, y_k>.
  g = helpers.random(each[0].shape, seed=1)
  gradient = jax.grad(lambda p: jnp.sum(g * y('branched', format=p)))(P)
  # Biases are in every result, and the mean has them once.
  assert not np.any(_bias_of(kind))
  np.testing.assert_allclose(
    gradient, [np.sum(g * one) for one in each], rtol=1e-4
  )


def _bias_of(kind):
  make, shape = LAYERS[kind]
  return helpers.init(make(TIED), helpers.random(shape))['params']['bias']


@pytest.mark.parametrize('kind', ['dense', 'einsum', 'transposed conv'])
def test_a_composite_layer_multiplies_the_means(kind):
  # One decision for both: the pairs of unlike formats count, too. Linen's own
  # op in `QuantEinsum` can only be given means; a program has none of its own.
  tied, separate = _case(kind), _case(kind, 'separate')
  expected = separate('composite', weights=P, activations=P)
  _near(tied('composite', format=P), expected)
  is_one_op = kind == 'einsum'
  branched = tied('branched', format=P)
  assert np.allclose(branched, expected, atol=1e-4) == is_one_op


def test_a_branched_attention_gives_the_mean_of_its_products():
  class Attention(nn.Module):
    """Scores of two tokens, which the intercepted product computes."""

    @nn.compact
    def __call__(self, x):
      return nn.MultiHeadDotProductAttention(1, name='a')(x)

  spec = dataclasses.replace(TIED, exclude=('*/query', '*/key', '*/value'))
  spec = dataclasses.replace(spec, exclude=(*spec.exclude, '*/out', '*/qk'))
  x = helpers.random((1, 3, 4))
  outputs = {}
  sampled = searchable.searchable(Attention(), spec, attention=True)
  variables = dict(helpers.init(sampled, x))
  _, changed = jax.jit(
    functools.partial(sampled.apply, mutable=['quant_stats'])
  )(variables, x)
  variables |= changed
  for mix, p in [('branched', P), *(('sampled', e) for e in ONE_HOTS)]:
    model = searchable.searchable(
      Attention(), dataclasses.replace(spec, mix=mix), attention=True
    )
    arch = {'a': {'av': {'format': p}}}
    outputs[mix, tuple(p)] = jax.jit(model.apply)(
      {**variables, 'arch': arch}, x
    )
  each = [np.asarray(outputs['sampled', tuple(e)]) for e in ONE_HOTS]
  _near(outputs['branched', tuple(P)], np.tensordot(P, each, 1))
  assert not np.allclose(each[0], each[1], atol=1e-3)


def test_a_mixture_sees_each_batch_once():
  x = helpers.random((3, 5))
  for mix in ('composite', 'branched'):
    spec = dataclasses.replace(TIED, mix=mix)
    layer = quant_layers.QuantDense(4, spec=spec)
    variables = {**helpers.init(layer, x), 'arch': {'format': P}}
    apply = functools.partial(layer.apply, mutable=['quant_stats'])
    _, changed = jax.jit(apply)(variables, x)
    assert changed['quant_stats']['count'] == 1


def test_a_menu_of_one_format_and_a_sampled_layer_take_no_mixture():
  x = helpers.random((3, 5))
  fixed = quant_spec.QuantSpec('INT4', mix='composite')
  layer = quant_layers.QuantDense(4, spec=fixed)
  variables = helpers.init(layer, x)
  assert 'scan' not in str(jax.make_jaxpr(layer.apply)(variables, x))
  sampled = quant_layers.QuantDense(4, spec=TIED)
  variables = helpers.init(sampled, x)
  with pytest.raises(ValueError, match='exactly one entry'):
    sampled.apply({**variables, 'arch': {'format': P}}, x)


def test_an_unknown_mix_is_refused():
  with pytest.raises(ValueError, match="mix='soft' is unknown; allowed: sam"):
    quant_spec.QuantSpec(formats.menu('int_s'), mix='soft')
