"""Models of every library in one form, that of linen modules."""

from flax import nnx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fliqs_jax.program import models
from fliqs_jax.program import searchable as searchable_lib
from fliqs_jax.space import discovery
from fliqs_jax.space import quant_spec
from tests import helpers

X = helpers.random((4, 8))
KEY = jax.random.key(0)


class Norm(nnx.Module):
  """Its statistics and its random stream change."""

  def __init__(self, rngs):
    self.dense = nnx.Linear(8, 3, rngs=rngs)
    self.norm = nnx.BatchNorm(3, momentum=0.5, rngs=rngs)
    self.dropout = nnx.Dropout(0.5, rngs=rngs)

  def __call__(self, x):
    return self.dropout(self.norm(self.dense(x)))


def test_the_variables_of_an_nnx_module_are_its_own():
  module = Norm(nnx.Rngs(0))
  model = models.adapted(module, None)
  variables = model.init(KEY, X)
  assert sorted(variables) == ['nnx_state', 'params']
  assert sorted(variables['params']) == ['dense', 'norm']
  helpers.same(variables['params']['dense']['kernel'], module.dense.kernel[...])
  # They are copies, which a training loop may donate.
  jax.tree.map(lambda x: x.delete(), variables['params'])
  assert np.isfinite(module.dense.kernel[...]).all()


@pytest.mark.parametrize('has_state', [False, True])
@pytest.mark.parametrize('takes_key', [False, True])
def test_haiku_functions_with_and_without_a_key(has_state, takes_key):
  haiku = pytest.importorskip('haiku')
  transform = haiku.transform_with_state if has_state else haiku.transform
  transformed = transform(lambda x: haiku.Linear(3, name='head')(x))
  if not takes_key:
    transformed = haiku.without_apply_rng(transformed)
  model = searchable_lib.searchable(transformed)
  x = helpers.random((4, 8))
  variables = model.init(jax.random.key(0), x)
  w = variables['params']['head']['w']
  at = {**variables, 'arch': {'head': {'format': jnp.eye(3)[2]}}}
  y = model.apply(at, x)  # BF16, before a batch was seen: weights alone round.
  np.testing.assert_allclose(y, x @ w, rtol=0.02, atol=0.02)


def test_an_nnx_module_changes_as_it_does_without_us():
  model = searchable_lib.searchable(Norm(nnx.Rngs(0)))
  variables = model.init(KEY, X, train=True)
  names = ['nnx_state', 'quant_stats']
  y, changed = jax.jit(lambda v: model.apply(v, X, train=True, mutable=names))(
    variables
  )
  assert sorted(changed) == names
  before, after = variables['nnx_state'], changed['nnx_state']
  # Before any statistics nothing is quantized but the weights, whose mean over
  # four examples moves the running mean of zero half way.
  assert not np.allclose(after['norm']['mean'], 0)
  counts = [
    jax.tree.leaves(state['dropout']['rngs']['count'])
    for state in (before, after)
  ]
  assert int(counts[1][0]) == int(counts[0][0]) + 1
  assert np.any(np.asarray(y) == 0)  # Half of the outputs are dropped.
  evaluated = jax.jit(lambda v: model.apply(v, X, train=False))(
    {**variables, **changed}
  )
  assert not np.any(np.asarray(evaluated) == 0)


def random_scale(params, x, train, key):
  keep = jax.random.bernoulli(key, 0.5, x.shape) if train else 1.0
  return jnp.where(keep, x, 0.0) @ params['w']


def test_a_function_is_told_whether_it_trains_and_given_a_key():
  params = dict(w=np.eye(8, dtype=np.float32))
  model = models.adapted(random_scale, params)
  variables = model.init(KEY)
  y = model.apply(variables, X, train=True, rngs=dict(dropout=KEY))
  np.testing.assert_array_equal(
    y, np.where(jax.random.bernoulli(KEY, 0.5, X.shape), X, 0)
  )
  np.testing.assert_array_equal(model.apply(variables, X, train=False), X)
  # By position, too.
  np.testing.assert_array_equal(model.apply(variables, X, False, KEY), X)


def test_arguments_that_a_function_lacks_are_left_out():
  params = dict(w=np.eye(8, dtype=np.float32))
  model = models.adapted(lambda v, x: x @ v['w'], params)
  y = model.apply(model.init(KEY), X, train=True, rngs=dict(dropout=KEY))
  np.testing.assert_array_equal(y, X)


def test_what_is_no_floating_point_array_is_a_constant():
  def f(v, x):
    return v['act'](x @ v['w'])[:, : v['n']]

  w = np.eye(8, dtype=np.float32)
  params = dict(act=jnp.tanh, w=w, n=3, nothing=None, table=np.arange(3))
  model = models.adapted(f, params)
  variables = model.init(KEY)
  assert len(jax.tree.leaves(variables)) == 1
  helpers.close(model.apply(variables, X), np.tanh(X)[:, :3])
  # The whole tree is as good as its arrays.
  helpers.close(model.apply(dict(params=params), X), np.tanh(X)[:, :3])
  with pytest.raises(ValueError, match='params have 0 arrays.*with 1'):
    model.apply(dict(params={}), X)


def test_a_call_that_does_not_fit_a_function_is_refused():
  model = models.adapted(lambda v, x, *, scale: scale * x, dict(w=np.ones(2)))
  for args, message in (((X,), "missing .*'scale'"), ((X, X), 'too many')):
    with pytest.raises(ValueError, match=rf'called as \(v, x, \*.*{message}'):
      model.apply(model.init(KEY), *args)


class Pair(nn.Module):
  """Its names do not change when its class is wrapped."""

  @nn.compact
  def __call__(self, x, train):
    x = nn.BatchNorm(use_running_average=not train)(nn.Dense(8)(x))
    return dict(y=nn.Dense(3)(x), sizes=(x.sum(), None))


def test_outputs_keep_their_structure():
  model = searchable_lib.searchable(Pair())
  variables = jax.eval_shape(lambda x: model.init(KEY, x, train=False), X)
  y = jax.eval_shape(lambda v: model.apply(v, X, train=False), variables)
  assert y['y'].shape == (4, 3)
  assert y['sizes'][1] is None


def test_a_function_that_returns_no_array_is_an_error():
  params = dict(w=np.eye(8, dtype=np.float32))
  nothing = searchable_lib.searchable(lambda v, x: None, params=params)
  with pytest.raises(ValueError, match='returns no array'):
    discovery.find(nothing, X)
  text = searchable_lib.searchable(lambda v, x: 'text', params=params)
  with pytest.raises(ValueError, match='no array or tree of arrays'):
    discovery.find(text, X)


def test_an_axis_name_that_nothing_binds_is_an_error_that_says_how():
  params = dict(w=np.eye(8, dtype=np.float32))

  def f(v, x):
    return jax.lax.pmean(x @ v['w'], 'batch')

  model = searchable_lib.searchable(f, params=params)
  with pytest.raises(ValueError, match='axis name that nothing binds'):
    discovery.find(model, X)
  bound = searchable_lib.searchable(
    lambda v, x: jax.vmap(lambda x: f(v, x), axis_name='batch')(x),
    params=params,
  )
  assert [d.name for d in discovery.find(bound, X).decisions] == ['w']


def test_a_function_that_keeps_values_is_an_error():
  kept = []

  def f(v, x):
    kept.append(x @ v['w'])
    return kept[-1]

  params = dict(w=np.eye(8, dtype=np.float32))
  model = searchable_lib.searchable(f, params=params)
  with pytest.raises(ValueError, match='not pure'):
    discovery.find(model, X)


@pytest.mark.parametrize(
  'rules',
  [
    dict(menus=(('loop', 'INT8'),)),
    dict(groups=(('both', 'loop'),)),
    dict(assignment={'loop': ('INT8', 'INT8'), 'head': ('INT8', 'INT8')}),
  ],
  ids=lambda rules: next(iter(rules)),
)
def test_a_rule_for_a_product_that_must_stay_is_an_error(rules):
  def f(params, x):
    def body(carry):
      return jnp.tanh(carry[0] @ params['loop']['w']), carry[1] - 1

    x, _ = jax.lax.while_loop(lambda carry: carry[1] > 0, body, (x, 3))
    return x @ params['head']['w']

  params = dict(loop=dict(w=jnp.eye(8)), head=dict(w=jnp.ones((8, 2))))
  spec = quant_spec.QuantSpec(('INT4', 'INT8'), **rules)
  model = searchable_lib.searchable(f, spec, params=params)
  with pytest.raises(ValueError, match='asks for formats of loop.*while loop'):
    discovery.find(model, X)
  # A glob that happens to match it does not ask for it.
  spec = quant_spec.QuantSpec('INT4', menus=(('*', 'INT8'),))
  model = searchable_lib.searchable(f, spec, params=params)
  assert [d.name for d in discovery.find(model, X).decisions] == ['head']


def test_statistics_of_products_that_a_call_lacks_are_kept():
  def f(params, x, train=False):
    if train:
      x = jnp.tanh(x @ params['train']['w'])
    return x @ params['head']['w']

  params = dict(train=dict(w=jnp.eye(8)), head=dict(w=jnp.ones((8, 2))))
  spec = quant_spec.QuantSpec(('INT4', 'INT8'))
  model = searchable_lib.searchable(f, spec, params=params)
  variables = model.init(KEY, X, train=True)
  _, changed = model.apply(variables, X, mutable=['quant_stats'])
  stats = changed['quant_stats']
  assert int(stats['head']['count']) == 1
  assert int(stats['train']['count']) == 0
