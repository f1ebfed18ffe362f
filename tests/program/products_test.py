"""Products of programs as authors write them: names, shapes, reasons."""

import jax
from jax import ad_checkpoint
from jax import lax
import jax.numpy as jnp
import pytest

from fliqs_jax.program import products as products_lib
from fliqs_jax.program import searchable as searchable_lib
from fliqs_jax.space import discovery
from fliqs_jax.space import quant_spec

X = jax.ShapeDtypeStruct((4, 8), jnp.float32)
# [4, 8] times [8, 8].
MACS = 4 * 8 * 8


def array(*shape):
  return jax.ShapeDtypeStruct(shape, jnp.float32)


def square(*names):
  """Returns params of 8 x 8 matrices."""
  return {name: jnp.zeros((8, 8)) for name in names}


def found(f, params, *inputs):
  """Returns {path: product} of a function, in the order of the program."""
  params = jax.tree.map(lambda p: jnp.zeros(p.shape, p.dtype), params)
  model = searchable_lib.searchable(
    f, params=params, attention=True, embed=True
  )
  _, parts = model.parts_of(*inputs)
  result = {part.product.path: part.product for part in parts}
  assert len(result) == len(parts)
  return result


def layers(products):
  return {path: product.layer for path, product in products.items()}


def test_names_are_those_of_the_parameters_without_their_usual_parts():
  def f(v, x):
    x = x @ v['block']['dense']['kernel'] @ v['block']['kernel']
    return x @ v['w'] @ v['block']['two']['left'] @ v['block']['two']['right']

  params = dict(
    block=dict(
      dense=square('kernel'), two=square('left', 'right'), **square('kernel')
    ),
    **square('w'),
  )
  assert list(found(f, params, X)) == [
    'block/dense',
    'block',
    'w',
    'block/two/left',
    'block/two/right',
  ]


def test_parameters_whose_short_names_are_equal_keep_their_paths():
  def f(v, x):
    return x @ v['a']['kernel'] @ v['a']['w']

  products = found(f, dict(a=square('kernel', 'w')), X)
  assert list(products) == ['a', 'params/a/w']


@pytest.mark.parametrize(
  'name', ['mean', 'variance', 'clip', 'ratio', 'format', 'weights', 'active']
)
def test_parameters_called_as_what_a_layer_has_leave_it_room(name):
  # The layer `enc` would have enc/mean in quant_stats, where the other one has
  # a tree.
  def f(v, x):
    return x @ v['enc']['kernel'] @ v['enc'][name]

  params = dict(enc=square('kernel', name))
  assert list(found(f, params, X)) == ['params/enc/kernel', f'enc/{name}']
  spec = quant_spec.QuantSpec('int_s', mode='separate')
  model = searchable_lib.searchable(f, spec, params=params)
  space = discovery.find(model, X)
  variables = model.init(None, X)
  x = jnp.zeros(X.shape)
  model.apply({**variables, 'arch': space.expand(space.dearest())}, x)


def test_each_branch_of_a_cond_has_its_products():
  def f(v, x):
    return lax.cond(
      x.sum() > 0, lambda x: x @ v['a'], lambda x: (x @ v['b']) @ v['a'], x
    )

  products = found(f, square('a', 'b'), X)
  # The branch of False is the first.
  assert layers(products) == {'b': 'b', 'a': 'a', 'a#2': 'a'}
  assert all(product.macs == MACS for product in products.values())


def test_a_loop_of_unknown_length_is_named_and_left():
  def f(v, x):
    def body(carry):
      return jnp.tanh(carry[0] @ v['a']), carry[1] + 1

    return lax.while_loop(lambda c: c[1] < 3, body, (x, 0))[0] @ v['b']

  products = found(f, square('a', 'b'), X)
  assert products['a'].reason.startswith('it is in a while loop')
  assert products['a'].all_macs == MACS  # Of one iteration: all that is known.
  assert not products['b'].reason


def test_what_an_index_selects_from_a_stack_is_named_with_the_way_out():
  def f(v, x):
    return lax.fori_loop(0, 3, lambda i, x: jnp.tanh(x @ v['a'][i]), x)

  (product,) = found(f, dict(a=array(3, 8, 8)), X).values()
  assert product.reason.endswith('scan over the stack instead')
  assert product.all_macs == 3 * MACS


def test_a_scan_over_a_stack_has_weights_of_each_iteration():
  def f(v, x):
    return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, v['a'])[0]

  (product,) = found(f, dict(a=array(3, 8, 8)), X).values()
  assert product.stack == (3,)
  assert (product.macs, product.weights, product.channels) == (MACS, 64, 8)
  assert product.iterations() == ['a/@0', 'a/@1', 'a/@2']


def test_a_scan_of_scans_numbers_the_outer_iterations_first():
  def f(v, x):
    def inner(x, w):
      return jnp.tanh(x @ w), None

    return lax.scan(lambda x, w: (lax.scan(inner, x, w)[0], None), x, v['a'])[0]

  (product,) = found(f, dict(a=array(2, 3, 8, 8)), X).values()
  assert product.stack == (2, 3)
  assert product.all_macs == 6 * MACS
  assert len(product.iterations()) == 6


def test_a_recurrence_in_a_stack_calls_the_weights_of_its_layer():
  def f(v, x):
    def layer(x, w):
      def time(h, x):
        h = jnp.tanh(h @ w['h'] + x @ w['x'])
        return h, h

      return lax.scan(time, x[0], x)[1], None

    return lax.scan(layer, x, v)[0]

  params = dict(h=array(2, 8, 8), x=array(2, 8, 8))
  products = found(f, params, array(5, 4, 8))
  assert list(products) == ['h', 'x']
  for product in products.values():
    assert (product.stack, product.calls) == ((2,), 5)
    assert product.all_macs == 2 * 5 * MACS


def test_weights_that_a_scan_carries_along_are_its_constants():
  def f(v, x):
    def body(carry, _):
      x, w = carry
      return (jnp.tanh(x @ w), w), None

    return lax.scan(body, (x, v['a']), None, length=3)[0][0]

  (product,) = found(f, square('a'), X).values()
  assert (product.side, product.stack, product.calls) == (1, (), 3)


def test_weights_that_a_scan_changes_are_activations():
  def f(v, x):
    def body(w, x):
      return w + x.T @ x, x @ w

    return lax.scan(body, v['a'], x)[1]

  products = found(f, square('a'), array(3, 4, 8))
  assert {p.kind for p in products.values()} == {'attend'}


def test_experts_under_vmap_are_slices_of_a_stack():
  def f(v, x):
    return jax.vmap(lambda w, x: x @ w)(v['a'], x)

  (product,) = found(f, dict(a=array(3, 8, 8)), array(3, 4, 8)).values()
  assert (product.stack, product.slices) == ((3,), (3,))
  assert (product.macs, product.weights, product.channels) == (MACS, 64, 8)


def test_experts_of_one_input_are_one_wide_matrix():
  def f(v, x):
    return jax.vmap(lambda w: x @ w)(v['a'])

  (product,) = found(f, dict(a=array(3, 8, 8)), X).values()
  assert product.stack == ()
  assert (product.macs, product.weights) == (3 * MACS, 3 * 64)
  assert product.channels == 3 * 8


@jax.custom_vjp
def multiplied(x, w):
  return x @ w


multiplied.defvjp(
  lambda x, w: (x @ w, (x, w)), lambda xw, g: (g @ xw[1].T, xw[0].T @ g)
)


@jax.custom_vjp
def stopped(x):
  return 1 * x


stopped.defvjp(lambda x: (1 * x, None), lambda _, g: (0 * g,))


def test_a_product_with_its_own_gradient_is_named_and_left():
  products = found(
    lambda v, x: multiplied(x, v['a']) @ v['b'], square('a', 'b'), X
  )
  assert 'custom_vjp' in products['a'].reason
  assert not products['b'].reason


def test_an_own_gradient_without_a_product_is_left_alone():
  products = found(
    lambda v, x: stopped(x @ v['a']) @ v['b'], square('a', 'b'), X
  )
  assert list(products) == ['a', 'b']
  assert not any(product.reason for product in products.values())


def test_a_gradient_inside_of_a_function_has_products_of_the_same_layers():
  def f(v, x):
    def energy(x):
      return jnp.tanh(jnp.tanh(x @ v['a']) @ v['b']).sum()

    return jax.grad(energy)(x)

  products = found(f, square('a', 'b'), X)
  assert layers(products) == {'a': 'a', 'b': 'b', 'b#2': 'b', 'a#2': 'a'}


@pytest.mark.parametrize(
  ('weights_of', 'shapes', 'stored'),
  [
    (lambda v: [v['a'] @ v['b']], dict(a=(8, 2), b=(2, 8)), 1),
    (
      lambda v: [v['w'] + v['a'] @ v['b']],
      dict(w=(8, 8), a=(8, 2), b=(2, 8)),
      1,
    ),
    (lambda v: [v['w'][:, :8], v['w'][:, 8:]] * 2, dict(w=(8, 16)), 4),
    (
      lambda v: [jnp.concatenate([v['q'], v['k']], 1), v['q'][:, :4].T],
      dict(q=(8, 4), k=(8, 4)),
      1.5,
    ),
  ],
  ids=['low_rank', 'low_rank_update', 'parts_twice', 'joined_and_alone'],
)
def test_what_is_stored_is_counted_not_what_it_is_made_of(
  weights_of, shapes, stored
):
  def f(v, x):
    for weights in weights_of(v):
      x = x @ weights if weights.shape[0] == x.shape[1] else x[:, :4] @ weights
    return x + v['bias'][None]

  params = {name: jnp.zeros(shape) for name, shape in shapes.items()}
  params['bias'] = jnp.zeros(8)
  model = searchable_lib.searchable(
    f, quant_spec.QuantSpec('int_s'), params=params
  )
  space = discovery.find(model, X)
  found = 1e6 * space.cost('size')(space.uniform('INT4'))
  # 64 weights of 4 bits and 8 scales, of half a matrix [4, 8] 32 weights; the
  # activations of each have a scale, the bias has 32 bits.
  ops = len(space.ops)
  weights = 64 * stored * 4 + 8 * ops * 32
  assert found == pytest.approx(weights + 32 * ops + 8 * 32, rel=1e-6)


def test_a_low_rank_update_is_part_of_the_weights():
  def f(v, x):
    return x @ (v['w'] + v['down'] @ v['up'])

  params = dict(w=array(8, 8), down=array(8, 2), up=array(2, 8))
  (product,) = found(f, params, X).values()
  assert product.layer == 'w'  # The largest of the three.
  assert product.leaves == {'params/w', 'params/down', 'params/up'}
  assert product.is_stored


def test_a_low_rank_update_beside_the_weights_is_two_layers_more():
  def f(v, x):
    return x @ v['w'] + (x @ v['down']) @ v['up']

  params = dict(w=array(8, 8), down=array(8, 2), up=array(2, 8))
  products = found(f, params, X)
  assert {path: p.macs for path, p in products.items()} == dict(
    w=MACS, down=4 * 8 * 2, up=4 * 2 * 8
  )


def test_a_norm_by_power_iteration_is_part_of_the_weights():
  def f(v, x):
    def power(_, u):
      return v['w'].T @ (v['w'] @ u)

    return x @ (v['w'] / jnp.linalg.norm(lax.fori_loop(0, 3, power, v['u'])))

  (product,) = found(f, dict(w=array(8, 8), u=array(8)), X).values()
  assert (product.layer, product.macs, product.reason) == ('w', MACS, '')


def test_fused_matrices_are_one_layer():
  def f(v, x):
    return x @ jnp.concatenate([v['q'], v['k'], v['v']], axis=1)

  (product,) = found(f, square('q', 'k', 'v'), X).values()
  assert (product.macs, product.channels) == (3 * MACS, 24)
  assert product.leaves == {'params/q', 'params/k', 'params/v'}


def test_parts_of_one_matrix_are_layers_of_their_own():
  def f(v, x):
    return jnp.tanh(x @ v['w'][:, :4]) @ v['w'][:4]

  products = found(f, square('w'), X)
  assert layers(products) == {'w': 'w', 'w#2': 'w#2'}
  assert [p.weights for p in products.values()] == [32, 32]


def test_a_matrix_and_its_transpose_are_one_layer():
  def f(v, x):
    return jnp.tanh(x @ v['w']) @ v['w'].T

  products = found(f, dict(w=array(8, 6)), X)
  assert layers(products) == {'w': 'w', 'w#2': 'w'}
  # Each use has a scale for each of its outputs.
  assert [p.channels for p in products.values()] == [6, 8]


def test_a_table_and_its_tied_head_are_one_layer():
  def f(v, i):
    return jnp.tanh(v['e'][i]) @ v['e'].T

  indices = jax.ShapeDtypeStruct((4,), jnp.int32)
  products = found(f, dict(e=array(11, 8)), indices)
  assert layers(products) == {'e': 'e', 'e#2': 'e'}
  assert {path: (p.kind, p.macs) for path, p in products.items()} == {
    'e': ('embed', 0),
    'e#2': ('dense', 4 * 8 * 11),
  }
  # Both have a scale for each row of the table.
  assert [p.channels for p in products.values()] == [11, 11]


def test_rows_of_a_ragged_product_meet_one_matrix_each():
  def f(v, x):
    return lax.ragged_dot(x, v['a'], jnp.array([1, 1, 2]))

  (product,) = found(f, dict(a=array(3, 8, 5)), X).values()
  assert (product.kind, product.macs) == ('dense', 4 * 8 * 5)
  assert (product.weights, product.channels) == (3 * 8 * 5, 3 * 5)
  assert not product.has_integer_form


def test_axes_that_an_einsum_keeps_of_both_are_slices():
  def f(v, x):
    return jnp.einsum('hdk,bhd->hkb', v['a'], x)

  (product,) = found(f, dict(a=array(2, 4, 8)), array(3, 2, 4)).values()
  assert (product.side, product.slices) == (0, (2,))
  assert (product.macs, product.weights, product.channels) == (96, 32, 8)


def test_inputs_of_a_transposed_convolution_meet_each_tap():
  def f(v, x):
    numbers = ('NHWC', 'HWIO', 'NHWC')
    return lax.conv_transpose(x, v['a'], (2, 2), 'SAME', None, numbers)

  products = found(f, dict(a=array(3, 3, 4, 5)), array(2, 6, 6, 4))
  assert products['a'].kind == 'conv'
  # 2 x 36 pixels of 4 channels, 3 x 3 taps, 5 outputs.
  assert products['a'].macs == 2 * 36 * 4 * 9 * 5


def test_channels_of_a_grouped_convolution_come_first_if_it_says_so():
  def f(v, x):
    return lax.conv_general_dilated(
      x, v['a'], (1, 1), 'SAME', feature_group_count=2
    )

  products = found(f, dict(a=array(6, 2, 3, 3)), array(2, 4, 5, 5))
  # 2 x 25 pixels of 6 channels, each of 2 channels and 3 x 3 taps.
  assert products['a'].macs == 2 * 25 * 6 * 2 * 9
  assert (products['a'].kind, products['a'].channels) == ('conv', 6)


@pytest.mark.parametrize(
  ('kernel', 'groups', 'kind'),
  [
    ((3, 3, 1, 8), 4, 'depthwise'),
    ((1, 1, 4, 8), 1, 'pointwise'),
    ((1, 3, 4, 8), 1, 'conv'),
  ],
)
def test_convolutions_have_the_kinds_of_layers(kernel, groups, kind):
  def f(v, x):
    return lax.conv_general_dilated(
      x,
      v['a'],
      (1, 1),
      'SAME',
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
      feature_group_count=groups,
    )

  (product,) = found(f, dict(a=array(*kernel)), array(2, 5, 5, 4)).values()
  assert product.kind == kind


KEY = jax.random.key(0)


def test_weights_mixed_with_random_numbers_look_like_activations():
  def f(v, x, key):
    return x @ (v['w'] * jax.random.bernoulli(key, 0.9, (8, 8)))

  (product,) = found(f, square('w'), X, KEY).values()
  assert (product.kind, product.side, product.path) == (
    'attend',
    None,
    'product',
  )


def test_a_marker_says_what_are_weights():
  def f(v, x, key):
    w = v['w'] * jax.random.bernoulli(key, 0.9, (8, 8))
    return x @ ad_checkpoint.checkpoint_name(w, products_lib.WEIGHTS)

  (product,) = found(f, square('w'), X, KEY).values()
  assert (product.kind, product.side, product.path) == ('dense', 1, 'w')
  assert not product.is_stored  # They differ from call to call.


def test_weights_that_a_network_makes_are_activations():
  def f(v, x):
    return jnp.einsum('bi,bij->bj', x, (x @ v['w']).reshape(4, 8, 8))

  products = found(f, dict(w=array(8, 64)), X)
  assert {path: (p.kind, p.all_macs) for path, p in products.items()} == {
    'w': ('dense', 4 * 8 * 64),
    'product': ('attend', 4 * 8 * 8),
  }


def test_rematerialised_and_compiled_parts_change_no_name():
  def inner(x, w):
    return jnp.sin(x @ w)

  def f(v, x):
    return jax.jit(inner)(jax.checkpoint(inner)(x, v['a']), v['b'])

  def plain(v, x):
    return inner(inner(x, v['a']), v['b'])

  products, expected = (found(g, square('a', 'b'), X) for g in (f, plain))
  for path, product in products.items():
    assert product.macs == expected[path].macs
  assert list(products) == list(expected) == ['a', 'b']


def test_the_products_of_attention_are_named_after_their_scope():
  def f(v, x):
    def attend(x):
      scores = (x @ v['q']) @ (x @ v['k']).T
      return jax.nn.softmax(scores) @ (x @ v['v'])

    with jax.named_scope('self'):
      x = attend(x)
    with jax.named_scope('cross'):
      return attend(x)

  products = found(f, square('q', 'k', 'v'), X)
  assert {
    path: p.all_macs for path, p in products.items() if p.kind == 'attend'
  } == dict.fromkeys(('self/qk', 'self/av', 'cross/qk', 'cross/av'), 4 * 4 * 8)


def test_products_of_activations_in_a_stack_are_of_their_iteration():
  def f(v, x):
    def layer(x, w):
      return jax.nn.softmax((x @ w) @ x.T) @ x, None

    return lax.scan(layer, x, v['w'])[0]

  products = found(f, dict(w=array(3, 8, 8)), X)
  assert {path: p.iterations() for path, p in products.items()} == {
    name: [f'{name}/@{i}' for i in range(3)] for name in ('w', 'qk', 'av')
  }
  assert products['qk'].all_macs == 3 * 4 * 4 * 8


def test_products_of_activations_in_a_recurrence_are_one():
  def f(v, x):
    return lax.scan(lambda c, x: (c, x @ x.T @ v['w']), 0, x)[1]

  products = found(f, dict(w=array(4, 8)), array(5, 4, 8))
  assert products['product'].iterations() == ['product']
  assert products['product'].calls == 5


def test_a_constant_of_the_function_is_named():
  w = jnp.ones((8, 8))
  products = found(lambda v, x: x @ w @ v['a'], square('a'), X)
  assert products['product'].reason.endswith('pass it as a parameter')
  assert not products['a'].reason


def test_a_product_of_integers_is_named():
  def f(v, x):
    counts = lax.dot(x.astype(jnp.int32), jnp.ones((8, 8), jnp.int32))
    return x @ v['a'] + counts

  products = found(f, square('a'), X)
  assert products['product'].reason == 'it multiplies int32 by int32'


def test_what_multiplies_nothing_is_no_product():
  def f(v, x):
    none = x[:, :0] @ v['rows'] + (x @ v['columns']).sum()
    never = lax.fori_loop(0, 0, lambda _, x: x @ v['a'], x)
    y, _ = lax.scan(lambda x, w: (x @ w, None), never + none, v['stack'])
    return y @ v['b']

  params = square('a', 'b') | dict(
    rows=array(0, 8), columns=array(8, 0), stack=array(0, 8, 8)
  )
  assert list(found(f, params, X)) == ['b']


@pytest.mark.parametrize(
  ('params', 'message'),
  [
    (
      {'a': {'b': jnp.ones(2)}, 'a/b': jnp.ones(2)},
      '2 variables .* params/a/b',
    ),
    ({'a#2': jnp.ones(2)}, 'params/a#2: a key must not end in #'),
  ],
)
def test_keys_that_make_two_names_one_are_refused(params, message):
  with pytest.raises(ValueError, match=message):
    found(lambda v, x: x, params, X)


def test_a_convolution_as_gradients_have_it_is_named():
  def f(v, x):
    def conv(x):
      return lax.conv(x, v['a'], (1, 1), 'SAME').sum()

    return (
      lax.conv(x, v['a'], (1, 1), 'SAME')
      + jax.grad(lambda w: lax.conv(x, w, (1, 1), 'SAME').sum())(v['a']).sum()
    )

  products = found(f, dict(a=array(4, 4, 3, 3)), array(2, 4, 5, 5))
  # The gradient of a kernel: a product of inputs by ones.
  gradient = [p for p in products.values() if p.kind == 'attend']
  assert not products['a'].reason
  assert [p.reason != '' for p in gradient] == [True]
