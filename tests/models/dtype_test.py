"""Networks that compute in bfloat16: what TPU and GPU are asked to multiply."""

import collections
import re

import jax
import jax.numpy as jnp
import pytest

from fliqs_jax import models
from fliqs_jax.space import quant_spec

# Every kind of layer, at few channels.
NETWORKS = {
  'mlp': {},
  'resnet_cifar': dict(depth=8, filters=4),
  'resnet10': dict(width=1 / 8),
  'mobilenetv2': dict(width=1 / 8, depth=0.1),
  'inceptionv3': dict(width=1 / 16, modules=(1, 1, 1)),
  'efficientnet_b0': dict(width=1 / 8, depth=0.1),
  'deit_ti16': dict(width=0.25, depth=2),
  'recommender': dict(buckets=8, hidden=(32,), ranks=(8,)),
  'edsr': dict(blocks=1, channels=8),
  'espcn': {},
  'rdn': {},
}

_PRODUCT = re.compile(
  r'stablehlo\.(?:dot_general|convolution)\b.*: '
  r'\(tensor<(?:\d+x)*(\w+)>, tensor<(?:\d+x)*(\w+)>\) -> '
)


def step(name):
  """Returns a step of a network in bfloat16, its arguments, and its logits."""
  model = models.build(
    models.published(name) | NETWORKS[name],
    10,
    quant_spec.QuantSpec('int_l'),
    dtype='bfloat16',
  )
  inputs = model.input_shape
  if isinstance(inputs, tuple):
    inputs = jax.ShapeDtypeStruct(inputs, jnp.float32)
  inputs = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct((2, *leaf.shape), leaf.dtype), inputs
  )
  key = jax.random.key(0)
  variables = jax.eval_shape(
    lambda x: model.init(dict(params=key, dropout=key), x, train=True), inputs
  )
  params = variables.pop('params')

  def loss(params, others, x):
    logits, _ = model.apply(
      dict(others, params=params),
      x,
      train=True,
      mutable=['batch_stats', 'quant_stats'],
      rngs=dict(dropout=key),
    )
    return jnp.sum(logits**2), logits

  return jax.grad(loss, has_aux=True), (params, variables, inputs)


@pytest.mark.parametrize('name', NETWORKS)
def test_every_product_of_a_step_is_of_bfloat16(name, monkeypatch):
  # On CPU some products have another form.
  monkeypatch.setattr(jax, 'default_backend', lambda: 'tpu')
  function, arguments = step(name)
  traced = jax.jit(function).trace(*arguments)
  gradients, logits = traced.out_info
  assert logits.dtype == jnp.float32
  assert {leaf.dtype for leaf in jax.tree.leaves(gradients)} == {logits.dtype}
  for platform in ('tpu', 'cuda'):
    # A callback of the host would raise: it is lowered for its own backend.
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    pairs = collections.Counter(map(tuple, _PRODUCT.findall(text)))
    products = sum(
      text.count(f'stablehlo.{op}') for op in ('dot_general', 'convolution')
    )
    assert sum(pairs.values()) == products > 0
    # JAX's attention has float32 logits; in each of two blocks their gradient
    # meets queries and keys.
    attention = 4 if name == 'deit_ti16' else 0
    assert pairs.pop(('f32', 'bf16'), 0) == attention
    assert set(pairs) == {('bf16', 'bf16')}
