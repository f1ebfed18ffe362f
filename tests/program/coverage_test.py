"""Coverage: which products are searched, which are not and why."""

from flax import nnx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fliqs_jax.layers import quant_layers
from fliqs_jax.program import coverage
from fliqs_jax.program import searchable as searchable_lib
from fliqs_jax.search import presets
from fliqs_jax.search import schedules
from fliqs_jax.search import train_state
from fliqs_jax.search import train_step
from fliqs_jax.space import discovery
from fliqs_jax.space import quant_spec
from tests import helpers

X = jax.ShapeDtypeStruct((2, 8), jnp.float32)
SEQUENCE = jax.ShapeDtypeStruct((2, 5, 8), jnp.float32)


class Own(nn.Dense):
  """A subclass that multiplies itself."""

  @nn.compact
  def __call__(self, inputs):
    shape = (inputs.shape[-1], self.features)
    return inputs @ self.param('kernel', self.kernel_init, shape)


class Patchwork(nn.Module):
  """Products of many origins."""

  @nn.compact
  def __call__(self, x):
    x = nn.Dense(8, name='dense')(x)
    x = nn.Dense(8, name='first')(x) @ self.param(
      'raw', nn.initializers.ones, (8, 8)
    )
    x = nn.MultiHeadDotProductAttention(2, name='attention')(x)
    x = nn.RNN(nn.OptimizedLSTMCell(8))(x)
    tokens = (x[..., 0] > 0).astype(jnp.int32)
    x = x + nn.Embed(3, 8, name='embed')(tokens)
    x = nn.Dense(4, param_dtype=jnp.complex64, name='complex')(x).real
    return Own(4, name='own')(x)


def covered_by(spec=None, **kwargs):
  model = searchable_lib.searchable(Patchwork(), spec, **kwargs)
  return coverage.coverage(model, SEQUENCE)


def test_every_product_has_formats_or_a_reason():
  covered = covered_by(quant_spec.QuantSpec(exclude=('first',)))
  by_path = {layer.path: layer for layer in covered.layers}
  # Four gates, from the input and from the state.
  gates = [path for path in by_path if path.startswith('OptimizedLSTMCell')]
  assert sorted(set(by_path) - set(gates)) == sorted(
    ['dense', 'first', 'raw', 'embed', 'complex', 'own']
    + [
      f'attention/{name}'
      for name in ('query', 'key', 'value', 'out', 'qk', 'av')
    ]
  )
  for layer in covered.layers:
    assert bool(layer.formats) != bool(layer.reason)
  reasons = {path: layer.reason for path, layer in by_path.items()}
  assert {path for path, reason in reasons.items() if reason} == {
    'first',
    'embed',
    'complex',
    'attention/qk',
    'attention/av',
  }
  assert reasons['first'] == "quant.exclude 'first'"
  assert reasons['embed'].startswith('embed=True')
  assert reasons['attention/qk'].startswith('attention=True')
  assert reasons['complex'] == 'it multiplies complex64 by complex64'
  assert by_path['dense'].formats == ('INT4', 'INT8', 'BF16')
  # 2 x 5 rows by 8 x 8 weights.
  assert (by_path['dense'].macs, by_path['dense'].weights) == (640, 64)
  # Parameters of these products stay as they are, and the biases of attention,
  # which have an axis of heads.
  missed = {missed.path: missed.reason for missed in covered.missed}
  assert {p: why for p, why in missed.items() if not p.endswith('bias')} == {
    'first/kernel': reasons['first'],
    'embed/embedding': reasons['embed'],
    'complex/kernel': reasons['complex'],
  }


def test_the_gates_of_a_cell_are_products_of_each_iteration():
  gates = [
    layer
    for layer in covered_by().layers
    if layer.path.startswith('OptimizedLSTMCell')
  ]
  # Linen multiplies all gates of the input, and all of the state, at once: 5
  # times 2 examples by 8 x 32 weights.
  assert sum(layer.macs for layer in gates) == 2 * 5 * 2 * 8 * 32
  assert sum(layer.weights for layer in gates) == 2 * 8 * 32


def test_choices_make_more_covered():
  covered = covered_by(embed=True, attention=True)
  assert 'embed/embedding' not in {missed.path for missed in covered.missed}
  kinds = {layer.path: layer.kind for layer in covered.layers if layer.formats}
  assert kinds['embed'] == 'embed'
  assert kinds['attention/qk'] == 'attend'
  assert covered.share > covered_by().share > 0


def test_a_parameter_that_no_product_reads_is_named():
  class Scaled(nn.Module):
    @nn.compact
    def __call__(self, x):
      scale = self.param('scale', nn.initializers.ones, (1, 8))
      return nn.Dense(8, name='dense')(x * scale)

  covered = coverage.coverage(searchable_lib.searchable(Scaled()), X)
  assert [(missed.path, missed.reason) for missed in covered.missed] == [
    ('scale', 'no product multiplies an input by it')
  ]


def test_coverage_prints_as_a_table():
  covered = covered_by(quant_spec.QuantSpec(exclude=('first',)))
  lines = str(covered).split('\n')
  assert lines[0].split() == [
    'product',
    'kind',
    'iterations',
    'MACs',
    'weights',
    'formats',
  ]
  table = '\n'.join(lines)
  assert "none: quant.exclude 'first'" in table
  assert 'attention=True' in table
  assert '8x8' in table
  assert f'{covered.share:.1%} of' in table


class Jitted(nn.Module):
  @nn.compact
  def __call__(self, x):
    block = nn.jit(Raw)
    return block(name='b')(block(name='a')(x))


class Raw(nn.Module):
  @nn.compact
  def __call__(self, x):
    w = self.param('w', nn.initializers.ones, (8, 8))
    return nn.Dense(8, name='dense')(x @ w)


def test_what_jit_hides_is_covered():
  covered = coverage.coverage(searchable_lib.searchable(Jitted()), X)
  assert [layer.path for layer in covered.layers] == [
    'a',  # A parameter `w` has the name of its module.
    'a/dense',
    'b',
    'b/dense',
  ]
  assert covered.share == 1
  assert not covered.missed


def test_coverage_allocates_nothing():
  live = len(jax.live_arrays())
  model = searchable_lib.searchable(nn.Dense(10**6))
  x = jax.ShapeDtypeStruct((1, 10**6), jnp.float32)
  assert coverage.coverage(model, x).params == 10**12 + 10**6
  assert len(jax.live_arrays()) == live


class Needy(nn.Module):
  """Cannot be called with an input alone."""

  @nn.compact
  def __call__(self, x, mask, *, train):
    return nn.Dropout(0.5, deterministic=not train)(nn.Dense(3)(x * mask))


def test_a_call_that_lacks_arguments_is_an_error_that_names_them():
  model = searchable_lib.searchable(Needy())
  with pytest.raises(
    ValueError, match='Needy.*mask, \\*, train.*missing.*mask'
  ):
    discovery.find(model, X)
  with pytest.raises(ValueError, match="missing a required.*'train'"):
    discovery.find(model, X, X)
  with pytest.raises(ValueError, match="missing a required.*'train'"):
    model.apply({'params': {}}, X, X)
  assert discovery.find(model, X, X, train=False).size > 0


def _custom_op(*args, **kwargs):
  return jax.lax.dot_general(*args, **kwargs)


def _promote(*arrays, dtype):
  del dtype
  return arrays


def _attention(query, key, value, **kwargs):
  del kwargs
  return query + key + value


@pytest.mark.parametrize(
  'layer',
  [
    nn.Dense(3, dot_general=_custom_op),
    nn.Dense(3, dot_general_cls=lambda: _custom_op),
    nn.Conv(3, (1,), promote_dtype=_promote),
    nn.ConvTranspose(3, (1,), preferred_element_type=jnp.float32),
    nn.MultiHeadDotProductAttention(2, attention_fn=_attention),
    nn.MultiHeadDotProductAttention(2, precision='highest'),
  ],
)
def test_a_layer_with_hooks_of_its_own_is_searched(layer):
  class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
      return layer.clone(name='odd', parent=self)(nn.Dense(8, name='even')(x))

  model = searchable_lib.searchable(Model(), attention=True)
  covered = coverage.coverage(model, SEQUENCE)
  assert covered.share == 1
  assert {one.path.partition('/')[0] for one in covered.layers} == {
    'even',
    'odd',
  }


# For each class with weights: a layer and the shape of its input.
LAYERS = [
  (nn.Conv(3, (2,)), (1, 4, 2)),
  (nn.ConvLocal(3, (2,)), (1, 4, 2)),
  (nn.ConvTranspose(3, (2,)), (1, 4, 2)),
  (nn.Dense(3), (1, 2)),
  (nn.DenseGeneral((3, 2)), (1, 2)),
  (nn.Einsum((2, 3), 'ni,io->no'), (1, 2)),
  (nn.Embed(5, 3), (1, 4)),
]


@pytest.mark.parametrize(('layer', 'shape'), LAYERS)
def test_a_layer_of_each_class_is_searched_with_all_its_weights(layer, shape):
  dtype = jnp.int32 if isinstance(layer, nn.Embed) else jnp.float32
  inputs = jax.ShapeDtypeStruct(shape, dtype)
  model = searchable_lib.searchable(layer, embed=True)
  variables = jax.eval_shape(model.init, jax.random.key(0), inputs)
  name = 'embedding' if isinstance(layer, nn.Embed) else 'kernel'
  covered = coverage.coverage(model, inputs)
  (searched,) = [one for one in covered.layers if one.formats]
  assert searched.weights == variables['params'][name].size
  assert name not in {missed.path for missed in covered.missed}


@pytest.mark.parametrize(
  ('model', 'kwargs', 'message'),
  [
    (lambda x: x, {}, 'needs its parameters'),
    (3, {}, 'int is no model'),
    (nn.Dense(3).bind({}), {}, 'is bound'),
    (nn.Dense(3), dict(stacks='one'), "stacks='one' is unknown; allowed"),
    (nn.Dense(3), dict(spec='int_l'), "spec='int_l' is no QuantSpec"),
    (nn.Dense(3), dict(params={}), 'Dense has its own; leave params out'),
  ],
)
def test_what_cannot_be_searched_is_refused_at_once(model, kwargs, message):
  with pytest.raises(ValueError, match=message):
    searchable_lib.searchable(model, **kwargs)


def test_only_what_searchable_made_is_covered():
  for report in (coverage.coverage, discovery.find):
    with pytest.raises(ValueError, match='function .*was not made by search'):
      report(lambda params, x: x, X)
  own = quant_layers.QuantDense(3)  # It has decisions, but no products.
  with pytest.raises(ValueError, match='QuantDense was not made by searchable'):
    coverage.coverage(own, X)


def test_a_model_without_products_is_an_error():
  with pytest.raises(ValueError, match='no layer that could be quantized'):
    discovery.find(searchable_lib.searchable(nn.LayerNorm()), X)


def test_which_collections_change_is_said_by_name():
  model = searchable_lib.searchable(nn.Dense(3))
  variables = helpers.init(model, helpers.random((2, 8)))

  def changed(mutable):
    return jax.eval_shape(
      lambda v, x: model.apply(v, x, mutable=mutable), variables, X
    )[1]

  with pytest.raises(ValueError, match='DenyList'):
    changed(nn.DenyList(('params',)))
  assert list(changed('quant_stats')) == ['quant_stats']
  assert 'quant_stats' in changed(True)


def test_an_nnx_part_of_a_linen_model_is_covered():
  class Mixed(nn.Module):
    @nn.compact
    def __call__(self, x):
      return nnx.bridge.to_linen(nnx.Linear, 8, 3, name='nnx')(nn.Dense(8)(x))

  covered = coverage.coverage(searchable_lib.searchable(Mixed()), X)
  assert [layer.path for layer in covered.layers] == ['Dense_0', 'nnx']
  assert covered.share == 1


class TwoHeads(nn.Module):
  """Several inputs by name, several outputs."""

  @nn.compact
  def __call__(self, left, right, *, deterministic):
    x = nn.tanh(
      nn.Dense(8, name='left')(left) * nn.Dense(8, name='right')(right)
    )
    x = nn.Dropout(0.1, deterministic=deterministic)(x)
    return nn.Dense(1, name='value')(x), nn.Dense(2, name='classes')(x)


@pytest.mark.slow
def test_the_fused_step_takes_any_call_loss_quality_and_cost():
  left, right = helpers.random((32, 4), 1), helpers.random((32, 4), 2)
  value = np.sum(left * right, axis=1, keepdims=True)
  batch = dict(left=left, right=right, label=value)
  model = searchable_lib.searchable(TwoHeads())

  def apply(variables, inputs, train, **kwargs):
    return model.apply(
      variables,
      inputs['left'],
      inputs['right'],
      deterministic=not train,
      **kwargs,
    )

  def loss(outputs, batch):
    regressed, logits = outputs
    error = jnp.mean((regressed - batch['label']) ** 2)
    wrong = optax.softmax_cross_entropy_with_integer_labels(
      logits, (batch['label'][:, 0] > 0).astype(jnp.int32)
    ).mean()
    return error + wrong, dict(loss=error + wrong, error=error)

  space = discovery.find(model, left[:1], right[:1], deterministic=True)
  steps = 40
  phases = schedules.phases(steps, 0.1, 0.2, 0.9)

  def relative_cost(choices):
    # Somebody's chip: INT4 costs 1, INT8 3, BF16 10 in every layer.
    return sum(
      jnp.sum(leaf * np.float32([1, 3, 10])) for leaf in choices.values()
    ) / (2 * len(choices))

  controller = presets.make('default', relative_cost, phases)
  optimizer = optax.adam(1e-2)
  state = train_state.create(
    model,
    space,
    optimizer,
    controller,
    jax.random.key(0),
    left[:1],
    right[:1],
    deterministic=True,
  )
  step = jax.jit(
    train_step.search_step(
      apply,
      loss,
      lambda outputs, batch: -loss(outputs, batch)[0],
      space,
      controller,
      optimizer,
      phases,
    )
  )
  history = []
  for _ in range(steps):
    state, metrics = step(state, batch, batch)
    history.append(metrics)
  assert history[-1]['loss'] < history[0]['loss']
  assert {'error', 'quality', 'cost'} <= set(history[-1])
  assert np.isfinite(history[-1]['quality'])
  assert state.model_state['quant_stats']['value']['count'] == steps
