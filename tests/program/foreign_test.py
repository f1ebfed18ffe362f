"""Models as other libraries and papers have them, searched without a change.

Each is excluded (identical), differentiated, counted by hand and run with two
architectures on one compilation.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

from flax import nnx
import flax.linen as nn
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import pytest

import fliqs_jax as fliqs
from fliqs_jax.program import coverage
from fliqs_jax.program import searchable as searchable_lib
from tests import helpers

BATCH, TIME, WIDTH = 2, 4, 8
IMAGES = helpers.random((BATCH, 8, 8, 3))
SEQUENCE = helpers.random((BATCH, TIME, WIDTH))
TOKENS = np.array([[1, 2, 3, 10], [0, 5, 5, 7]])
# Projections of an attention with its output, and its two products.
PROJECTIONS = 4 * BATCH * TIME * WIDTH * WIDTH
ATTENDED = 2 * BATCH * TIME * TIME * WIDTH


@dataclasses.dataclass(frozen=True)
class Foreign:
  """A model and what is known of it.

  Attributes:
    model: what `searchable` takes.
    inputs: of a call.
    macs: multiply-accumulates of the call, counted by hand.
    native: (variables, *inputs) -> outputs, compiled, as its author calls it.
    params: of a function.
    kwargs: of a call.
    init_kwargs: of the first call, where they are others.
  """

  model: Any
  inputs: tuple[Any, ...]
  macs: int
  native: Callable[..., Any]
  params: Any = None
  kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
  init_kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)


def linen(module, inputs, macs, **kwargs):
  def native(variables, *inputs):
    return module.apply(variables, *inputs, **kwargs)

  return Foreign(module, (inputs,), macs, jax.jit(native), kwargs=kwargs)


def function(f, params, inputs, macs):
  def native(variables, *inputs):
    return f(variables['params'], *inputs)

  return Foreign(f, inputs, macs, jax.jit(native), params)


def matrices(**shapes):
  return {
    name: helpers.random(shape, i) / np.sqrt(np.float32(shape[-2]))
    for i, (name, shape) in enumerate(shapes.items())
  }


class StandardisedConv(nn.Conv):
  """Its kernel has mean 0 and variance 1 for each output."""

  def param(self, name, *args, **kwargs):
    value = super().param(name, *args, **kwargs)
    if name != 'kernel':
      return value
    value = value - value.mean(axis=(0, 1, 2), keepdims=True)
    return value / (value.std(axis=(0, 1, 2), keepdims=True) + 1e-5)


class StandardisedResNet(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = StandardisedConv(8, (3, 3), name='root')(x)
    y = nn.relu(nn.GroupNorm(2, name='norm')(x))
    skip = StandardisedConv(8, (1, 1), 2, name='skip')(y)
    y = StandardisedConv(8, (3, 3), 2, name='conv')(y)
    return nn.Dense(5, name='head')((skip + y).mean((1, 2)))


def standardised_resnet():
  # 64 pixels, then 16; taps x inputs x outputs.
  macs = 64 * 9 * 3 * 8 + 16 * (8 * 8 + 9 * 8 * 8) + 8 * 5
  return linen(StandardisedResNet(), IMAGES, BATCH * macs)


class DecoderBlock(nn.Module):
  @nn.compact
  def __call__(self, x, _):
    dtype = jnp.bfloat16
    mask = nn.make_causal_mask(x[..., 0])
    y = nn.LayerNorm(dtype=dtype)(x)
    attention = nn.MultiHeadDotProductAttention
    x = x + attention(2, dtype=dtype, name='attention')(y, mask=mask)
    y = nn.Dense(16, dtype=dtype, name='up')(nn.LayerNorm(dtype=dtype)(x))
    return x + nn.Dense(WIDTH, dtype=dtype, name='down')(nn.gelu(y)), None


class LanguageModel(nn.Module):
  """Scanned, rematerialised, in bfloat16, with a tied head."""

  @nn.compact
  def __call__(self, tokens):
    embed = nn.Embed(11, WIDTH, dtype=jnp.bfloat16, name='embed')
    stack = nn.scan(
      nn.remat(DecoderBlock),
      variable_axes={'params': 0},
      split_rngs={'params': True},
      length=2,
    )
    x, _ = stack(name='stack')(embed(tokens), None)
    return embed.attend(x)


def language_model():
  mlp = 2 * BATCH * TIME * WIDTH * 16
  macs = 2 * (PROJECTIONS + ATTENDED + mlp) + BATCH * TIME * WIDTH * 11
  return linen(LanguageModel(), TOKENS, macs)


class EncoderDecoder(nn.Module):
  """As T5: attention by relative positions, one table, a tied head."""

  @nn.compact
  def __call__(self, source, target):
    embed = nn.Embed(11, WIDTH, name='embed')
    places = np.arange(TIME)
    distances = places[None] - places[:, None] + TIME
    bias = nn.Embed(2 * TIME, 2, name='bias')(distances).transpose(2, 0, 1)

    def attend(name, x, memory, bias):
      def heads(side, x):
        layer = nn.DenseGeneral((2, 4), use_bias=False, name=f'{name}_{side}')
        return layer(nn.RMSNorm(name=f'{name}_{side}_norm')(x))

      q, k, v = heads('q', x), heads('k', memory), heads('v', memory)
      y = nn.dot_product_attention(q, k, v, bias=bias)
      out = nn.DenseGeneral(WIDTH, (-2, -1), use_bias=False, name=f'{name}_out')
      return x + out(y)

    x = embed(source)
    x = attend('encoder', x, x, bias[None])
    causal = jnp.where(distances <= TIME, 0.0, -1e9)
    y = embed(target)
    y = attend('decoder', y, y, bias[None] + causal[None, None])
    y = attend('cross', y, x, None)
    return embed.attend(y / np.float32(np.sqrt(WIDTH)))


def encoder_decoder():
  module, inputs = EncoderDecoder(), (TOKENS, TOKENS[:, ::-1])
  macs = 3 * (PROJECTIONS + ATTENDED) + BATCH * TIME * WIDTH * 11
  native = jax.jit(lambda variables, *x: module.apply(variables, *x))
  return Foreign(module, inputs, macs, native)


class GatedDecoder(nn.Module):
  """It multiplies by itself; one head of keys for two of queries."""

  @nn.compact
  def __call__(self, x):
    def weights(name, *shape):
      return self.param(name, nn.initializers.lecun_normal(), shape)

    def norm(x):
      return x * lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6)

    y = norm(x)
    q = jnp.einsum('btd,ndh->btnh', y, weights('q', 2, WIDTH, 4))
    k, v = jnp.einsum('bsd,cdh->cbsh', y, weights('kv', 2, WIDTH, 4))
    scores = jax.nn.softmax(jnp.einsum('btnh,bsh->btns', q, k))
    y = jnp.einsum('btns,bsh->btnh', scores, v)
    x = x + jnp.einsum('btnh,nhd->btd', y, weights('out', 2, 4, WIDTH))
    gate, y = weights('gate', 2, WIDTH, 16), norm(x)
    y = nn.gelu(jnp.dot(y, gate[0])) * jnp.dot(y, gate[1])
    return x + jnp.dot(y, weights('down', 16, WIDTH))


def gated_decoder():
  tokens = BATCH * TIME
  projections = tokens * WIDTH * (2 * 4 + 2 * 4 + 2 * 4)
  products = 2 * tokens * 2 * TIME * 4
  macs = projections + products + 3 * tokens * WIDTH * 16
  return linen(GatedDecoder(), SEQUENCE, macs)


class NnxCnn(nnx.Module):
  def __init__(self, rngs):
    self.conv = nnx.Conv(3, 8, (3, 3), rngs=rngs)
    self.norm = nnx.BatchNorm(8, rngs=rngs)
    self.head = nnx.Linear(8, 5, rngs=rngs)

  def __call__(self, x):
    return self.head(nnx.relu(self.norm(self.conv(x))).mean((1, 2)))


def of_nnx(module, inputs, macs):
  module.eval()
  graph, state = nnx.split(module)
  compiled = jax.jit(lambda state, *inputs: nnx.merge(graph, state)(*inputs))

  def native(variables, *inputs):
    del variables  # They are those that the module was made with.
    return compiled(state, *inputs)

  return Foreign(module, (inputs,), macs, native, kwargs=dict(train=False))


def nnx_cnn():
  macs = BATCH * (64 * 9 * 3 * 8 + 8 * 5)
  return of_nnx(NnxCnn(nnx.Rngs(0)), IMAGES, macs)


class NnxBlock(nnx.Module):
  def __init__(self, rngs):
    self.attention = nnx.MultiHeadAttention(2, WIDTH, decode=False, rngs=rngs)
    self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
    self.mlp = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

  def __call__(self, x):
    return x + nnx.gelu(self.mlp(self.attention(self.norm(x))))


class NnxTransformer(nnx.Module):
  """Its layers are made under vmap and scanned."""

  def __init__(self, rngs):
    axes = nnx.StateAxes({nnx.RngState: 0, ...: 0})
    split = nnx.split_rngs(splits=2)
    self.blocks = split(nnx.vmap(NnxBlock, in_axes=0, out_axes=axes))(rngs)
    self.head = nnx.Linear(WIDTH, 3, rngs=rngs)

  def __call__(self, x):
    run = nnx.scan(
      lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry
    )
    return self.head(run(x, self.blocks))


def nnx_transformer():
  mlp = BATCH * TIME * WIDTH * WIDTH
  macs = 2 * (PROJECTIONS + ATTENDED + mlp) + BATCH * TIME * WIDTH * 3
  return of_nnx(NnxTransformer(nnx.Rngs(0)), SEQUENCE, macs)


def equinox_mlp():
  equinox = pytest.importorskip('equinox')
  mlp = equinox.nn.MLP(WIDTH, 3, 16, 1, key=jax.random.key(0))

  def native(variables, x):
    del variables
    return equinox.filter_jit(mlp)(x)

  x = SEQUENCE[0, 0]
  return Foreign(mlp, (x,), WIDTH * 16 + 16 * 3, native)


def equinox_attention():
  equinox = pytest.importorskip('equinox')
  keys = jax.random.split(jax.random.key(0))
  params = dict(
    attention=equinox.nn.MultiheadAttention(2, WIDTH, key=keys[0]),
    mlp=equinox.nn.MLP(WIDTH, 3, 16, 1, key=keys[1]),
  )

  def one(params, x):
    return jax.vmap(params['mlp'])(params['attention'](x, x, x))

  def f(params, x):
    return jax.vmap(lambda x: one(params, x))(x)

  def native(variables, x):
    del variables
    return equinox.filter_jit(f)(params, x)

  mlp = BATCH * TIME * (WIDTH * 16 + 16 * 3)
  return Foreign(f, (SEQUENCE,), PROJECTIONS + ATTENDED + mlp, native, params)


def haiku_cnn():
  haiku = pytest.importorskip('haiku')

  def network(x, is_training):
    x = haiku.Conv2D(8, 3)(x)
    x = haiku.BatchNorm(True, True, 0.9)(x, is_training)
    return haiku.Linear(5)(jax.nn.relu(x).mean((1, 2)))

  transformed = haiku.transform_with_state(network)
  kwargs = dict(is_training=False)
  init_kwargs = dict(is_training=True)  # Otherwise Haiku makes no averages.

  def native(variables, x):
    params, state = variables['params'], variables['state']
    return transformed.apply(params, state, None, x, **kwargs)[0]

  macs = BATCH * (64 * 9 * 3 * 8 + 8 * 5)
  return Foreign(
    transformed, (IMAGES,), macs, jax.jit(native), None, kwargs, init_kwargs
  )


class Lstm(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.RNN(nn.OptimizedLSTMCell(WIDTH), name='rnn')(x)
    return nn.Dense(3, name='head')(x[:, -1])


def lstm():
  # Four gates, of the input and of the state.
  macs = BATCH * (TIME * 2 * WIDTH * 4 * WIDTH + WIDTH * 3)
  return linen(Lstm(), SEQUENCE, macs)


def graph_network():
  edges, nodes = 6, 4

  def f(v, x, senders, receivers):
    pairs = jnp.concatenate([x[senders], x[receivers]], axis=1)
    messages = jax.nn.relu(pairs @ v['message'])
    sums = jax.ops.segment_sum(messages, receivers, nodes)
    x = jnp.tanh(jnp.concatenate([x, sums], axis=1) @ v['update'])
    return x.mean(0) @ v['readout']

  params = matrices(
    message=(2 * WIDTH, WIDTH), update=(2 * WIDTH, WIDTH), readout=(WIDTH, 3)
  )
  inputs = (
    helpers.random((nodes, WIDTH)),
    np.array([0, 1, 2, 3, 0, 2]),
    np.array([1, 2, 3, 0, 2, 1]),
  )
  macs = (edges + nodes) * 2 * WIDTH * WIDTH + WIDTH * 3
  return function(f, params, inputs, macs)


class UNet(nn.Module):
  @nn.compact
  def __call__(self, x):
    first = nn.silu(nn.Conv(4, (3, 3), name='in')(x))
    y = nn.silu(nn.Conv(WIDTH, (3, 3), 2, name='down')(first))
    flat = y.reshape((BATCH, 16, WIDTH))
    flat = nn.MultiHeadDotProductAttention(2, name='attention')(flat)
    y = nn.ConvTranspose(4, (2, 2), (2, 2), name='up')(
      y + flat.reshape(y.shape)
    )
    return nn.Conv(3, (3, 3), name='out')(jnp.concatenate([first, y], axis=-1))


def unet():
  convs = 64 * 9 * 3 * 4 + 16 * 9 * 4 * 8 + 64 * 9 * 8 * 3
  transposed = 16 * 4 * 8 * 4  # Each of 16 pixels meets all 2 x 2 taps.
  attention = 4 * 16 * 8 * 8 + 2 * 16 * 16 * 8
  return linen(UNet(), IMAGES, BATCH * (convs + transposed + attention))


def experts_by_einsum():
  def f(v, x):
    gates = jax.nn.softmax(x @ v['router'])
    chosen = gates * jax.nn.one_hot(gates.argmax(-1), 3)
    each = chosen.T[:, :, None] * x[None]
    y = jax.nn.relu(jnp.einsum('ebd,edf->ebf', each, v['up']))
    return jnp.einsum('ebf,efd->ebd', y, v['down']).sum(0)

  params = matrices(router=(WIDTH, 3), up=(3, WIDTH, 16), down=(3, 16, WIDTH))
  macs = TIME * WIDTH * 3 + 2 * 3 * TIME * WIDTH * 16
  return function(f, params, (SEQUENCE[0],), macs)


def experts_by_ragged_dot():
  def f(v, x):
    gates = jax.nn.softmax(x @ v['router'])
    chosen = gates.argmax(-1)
    order = jnp.argsort(chosen)
    sizes = jnp.bincount(chosen, length=3)
    y = jax.nn.relu(lax.ragged_dot(x[order], v['up'], sizes))
    y = lax.ragged_dot(y, v['down'], sizes)
    return y[jnp.argsort(order)] * gates.max(-1, keepdims=True)

  params = matrices(router=(WIDTH, 3), up=(3, WIDTH, 16), down=(3, 16, WIDTH))
  # Each row meets one expert.
  macs = TIME * WIDTH * 3 + 2 * TIME * WIDTH * 16
  return function(f, params, (SEQUENCE[0],), macs)


def low_rank_update():
  def f(v, x):
    x = jnp.tanh(x @ (v['w'] + v['a'] @ v['b']))
    return x @ v['head'] + (x @ v['c']) @ v['d']

  params = matrices(
    w=(8, 8), a=(8, 2), b=(2, 8), head=(8, 8), c=(8, 2), d=(2, 8)
  )
  # The first update is added to the weights: once, not for each input.
  macs = TIME * (8 * 8 + 8 * 8 + 2 * 8 * 2)
  return function(f, params, (SEQUENCE[0],), macs)


SLOW, OPTIMIZED = pytest.mark.slow, pytest.mark.optimized
# Compiled as users do: a scanned stack in bfloat16, a convolution with batch
# norm, sums over segments, and a ragged product.
MODELS = [
  pytest.param(standardised_resnet, marks=SLOW),
  pytest.param(language_model, marks=[SLOW, OPTIMIZED]),
  pytest.param(encoder_decoder, marks=SLOW),
  gated_decoder,
  nnx_cnn,
  pytest.param(nnx_transformer, marks=SLOW),
  equinox_mlp,
  pytest.param(equinox_attention, marks=SLOW),
  pytest.param(haiku_cnn, marks=[SLOW, OPTIMIZED]),
  pytest.param(lstm, marks=SLOW),
  pytest.param(graph_network, marks=OPTIMIZED),
  pytest.param(unet, marks=SLOW),
  experts_by_einsum,
  pytest.param(experts_by_ragged_dot, marks=OPTIMIZED),
  low_rank_update,
]


@pytest.mark.parametrize('build', MODELS)
def test_a_foreign_model_is_searched_as_it_is(build):
  foreign = build()
  kwargs = foreign.kwargs
  first = kwargs | foreign.init_kwargs

  def searchable(spec):
    return searchable_lib.searchable(
      foreign.model, spec, params=foreign.params, embed=True, attention=True
    )

  model = searchable(fliqs.QuantSpec(('int4', 'int8')))
  covered = coverage.coverage(model, *foreign.inputs, **first)
  assert sum(layer.macs for layer in covered.layers) == foreign.macs
  assert covered.share == 1
  variables = helpers.init(model, *foreign.inputs, **first)
  excluded = searchable(fliqs.QuantSpec(exclude=('*',)))
  own = {k: v for k, v in variables.items() if k not in searchable_lib.OWN}
  expected = foreign.native(own, *foreign.inputs)
  actual = jax.jit(lambda v, *x: excluded.apply(v, *x, **kwargs))(
    own, *foreign.inputs
  )
  helpers.same(actual, expected)

  space = fliqs.find_decisions(model, *foreign.inputs, **first)
  traces = []

  def step(variables, inputs):
    traces.append(1)

    def loss(params):
      y, changed = model.apply(
        {**variables, 'params': params},
        *inputs,
        mutable=['quant_stats'],
        **kwargs,
      )
      return jnp.sum(jnp.sin(y.astype(jnp.float32))), (y, changed)

    return jax.grad(loss, has_aux=True)(variables['params'])

  compiled = jax.jit(step, compiler_options=helpers.FAST)
  errors = []
  for name in ('INT4', 'INT8'):
    variables['arch'] = space.expand(space.uniform(name))
    gradients, (y, changed) = compiled(variables, foreign.inputs)
    for gradient in jax.tree.leaves(gradients):
      assert np.isfinite(np.float32(gradient)).all()
    variables |= changed
    assert y.dtype == expected.dtype
    errors.append(np.linalg.norm(np.float32(y) - np.float32(expected)))
  assert len(traces) == 1
  # Statistics have learnt from both batches, and wide formats are near the
  # original.
  counts = {
    int(np.max(leaf))
    for path, leaf in jax.tree_util.tree_leaves_with_path(
      variables['quant_stats']
    )
    if path[-1].key == 'count'
  }
  assert counts <= {2, 2 * TIME}  # An LSTM has several iterations.
  assert errors[1] < errors[0]
  assert errors[1] < 0.15 * np.linalg.norm(np.float32(expected))
