"""What is found, what is missed and why, and what is refused."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fliqs_jax.intercept import coverage
from fliqs_jax.intercept import searchable as searchable_lib
from fliqs_jax.layers import quant_layers
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
  """Everything that can be missed."""

  @nn.compact
  def __call__(self, x):
    x = nn.Dense(8, name='dense')(x)
    x = nn.Dense(8, name='first')(x) @ self.param(
      'raw', nn.initializers.ones, (8, 8)
    )
    x = nn.MultiHeadDotProductAttention(2, name='attention')(x)
    x = nn.RNN(nn.OptimizedLSTMCell(8))(x)
    tokens = jnp.zeros(x.shape[:2], jnp.int32)
    x = x + nn.Embed(3, 8, name='embed')(tokens)
    x = nn.Dense(4, param_dtype=jnp.complex64, name='complex')(x).real
    return Own(4, name='own')(x)


def covered_by(spec=None, **kwargs):
  model = searchable_lib.searchable(Patchwork(), spec, **kwargs)
  return coverage.coverage(model, SEQUENCE)


def test_nothing_is_missed_silently():
  spec = quant_spec.QuantSpec(exclude=('first',))
  covered = covered_by(spec)
  reasons = {missed.path: missed.reason for missed in covered.missed}
  gates = [path for path in reasons if path.startswith('OptimizedLSTMCell')]
  # Four gates, from the input and from the state.
  assert len(gates) == 8
  assert set(reasons) - set(gates) == {
    'raw',
    'embed/embedding',
    'own/kernel',
    'complex/kernel',
  }
  for gate in gates:
    assert reasons[gate].startswith('DenseParams of OptimizedLSTMCell')
  assert reasons['raw'].startswith('Patchwork multiplies it')
  assert reasons['embed/embedding'].startswith('embed=True')
  assert reasons['complex/kernel'].endswith('in real floats')
  assert reasons['own/kernel'].startswith('Own does not run')
  by_path = {layer.path: layer for layer in covered.layers}
  assert by_path['first'].reason == "quant.exclude 'first'"
  assert not by_path['first'].formats
  assert by_path['dense'].formats == ('INT4', 'INT8', 'BF16')
  # 2 x 5 rows by 8 x 8 weights.
  assert (by_path['dense'].macs, by_path['dense'].weights) == (640, 64)
  assert covered.products == ('attention',)


def test_choices_make_more_covered():
  covered = covered_by(embed=True, attention=True)
  assert 'embed/embedding' not in {missed.path for missed in covered.missed}
  assert not covered.products
  kinds = {layer.path: layer.kind for layer in covered.layers}
  assert kinds['embed'] == 'Embed'
  assert kinds['attention/qk'] == 'attention product'
  assert covered.share > covered_by().share > 0


def test_coverage_prints_as_a_table():
  lines = str(covered_by(quant_spec.QuantSpec(exclude=('first',)))).split('\n')
  assert lines[0].split() == [
    'layer',
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
  assert [layer.path for layer in covered.layers] == ['a/dense', 'b/dense']
  assert [missed.path for missed in covered.missed] == ['a/w', 'b/w']
  for missed in covered.missed:
    assert missed.reason.startswith('Raw multiplies')


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
  variables = model.init(
    jax.random.key(0), 1.0 * helpers.random((2, 8)), 1, train=False
  )
  with pytest.raises(ValueError, match="missing a required.*'train'"):
    model.apply(variables, X, X)
  assert discovery.find(model, X, X, train=False).size > 0


def _custom_op(*args, **kwargs):
  return jax.lax.dot_general(*args, **kwargs)


def _promote(*arrays, dtype):
  del dtype
  return arrays


def _attention(query, key, value):
  return query + key + value


@pytest.mark.parametrize(
  ('layer', 'reason'),
  [
    (nn.Dense(3, dot_general=_custom_op), 'field dot_general is set'),
    (
      nn.Dense(3, dot_general_cls=lambda: _custom_op),
      'field dot_general_cls is set',
    ),
    (nn.Conv(3, (1,), promote_dtype=_promote), 'field promote_dtype is set'),
    (
      nn.ConvTranspose(3, (1,), preferred_element_type=jnp.float32),
      'field preferred_element_type is set',
    ),
    (
      nn.MultiHeadDotProductAttention(2, attention_fn=_attention),
      'attention_fn has no argument',
    ),
    (
      nn.MultiHeadDotProductAttention(2, precision='highest'),
      'precision is set',
    ),
  ],
)
def test_a_layer_that_cannot_be_quantized_is_named_with_the_reason(
  layer, reason
):
  class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
      return layer.clone(name='odd', parent=self)(nn.Dense(8, name='even')(x))

  model = searchable_lib.searchable(Model(), attention=True)
  with pytest.raises(ValueError, match=f'odd.*{reason}.*quant.exclude'):
    discovery.find(model, SEQUENCE)
  excluded = searchable_lib.searchable(
    Model(), quant_spec.QuantSpec(exclude=('odd*',)), attention=True
  )
  space = discovery.find(excluded, SEQUENCE)
  assert [d.name for d in space.decisions] == ['even']


def test_a_model_of_quantized_layers_is_not_quantized_twice():
  model = searchable_lib.searchable(nn.Sequential([quant_layers.QuantDense(3)]))
  with pytest.raises(ValueError, match='layers_0 is a QuantDense.*twice'):
    discovery.find(model, X)


@pytest.mark.parametrize(
  ('model', 'kwargs', 'message'),
  [
    (lambda x: x, {}, 'not a linen module'),
    (nn.Dense(3).bind({}), {}, 'is bound'),
    (nn.Dense(3), dict(stacks='one'), "stacks='one' is unknown; allowed"),
    (
      nn.Dense(3),
      dict(spec=quant_spec.QuantSpec(act_clip='profiled'), attention=True),
      'profiled',
    ),
  ],
)
def test_what_cannot_be_searched_is_refused_at_once(model, kwargs, message):
  with pytest.raises(ValueError, match=message):
    searchable_lib.searchable(model, **kwargs)


def test_a_model_without_layers_is_an_error():
  with pytest.raises(ValueError, match='no layer that could be quantized'):
    discovery.find(searchable_lib.searchable(nn.LayerNorm()), X)


def test_which_collections_change_is_said_by_name():
  model = searchable_lib.searchable(nn.Dense(3))
  variables = model.init(jax.random.key(0), helpers.random((2, 8)))
  with pytest.raises(ValueError, match='DenyList'):
    model.apply(
      variables, helpers.random((2, 8)), mutable=nn.DenyList(('params',))
    )
  _, changed = model.apply(
    variables, helpers.random((2, 8)), mutable='quant_stats'
  )
  assert list(changed) == ['quant_stats']
  _, changed = model.apply(variables, helpers.random((2, 8)), mutable=True)
  assert 'quant_stats' in changed


def test_an_nnx_model_is_refused_with_a_reason():
  from flax import nnx

  with pytest.raises(ValueError, match='NNX'):
    searchable_lib.searchable(nnx.Linear(8, 3, rngs=nnx.Rngs(0)))
  bridged = nnx.bridge.to_linen(nnx.Linear, 8, 3)
  with pytest.raises(ValueError, match='wraps an NNX model by nnx.bridge'):
    discovery.find(searchable_lib.searchable(bridged), X)


def test_what_an_nnx_part_holds_is_reported():
  from flax import nnx

  class Mixed(nn.Module):
    @nn.compact
    def __call__(self, x):
      return nnx.bridge.to_linen(nnx.Linear, 8, 3, name='nnx')(nn.Dense(8)(x))

  covered = coverage.coverage(searchable_lib.searchable(Mixed()), X)
  (missed,) = covered.missed
  assert missed.path == 'nnx/kernel'
  assert missed.reason.startswith('its module is an NNX module')


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
