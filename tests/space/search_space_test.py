"""Decisions found by tracing a model, and the rules that shape them."""

import copy
import math
import pickle

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fliqs_jax as fliqs
from fliqs_jax import models
from fliqs_jax.layers import quant_layers
from fliqs_jax.numerics import formats
from fliqs_jax.space import discovery
from fliqs_jax.space import quant_spec
from tests import helpers

INPUT = jax.ShapeDtypeStruct((1, 6, 6, 4), jnp.float32)


class Branch(nn.Module):
  spec: quant_spec.QuantSpec

  @nn.compact
  def __call__(self, x):
    x = quant_layers.QuantConv(4, (3, 3), spec=self.spec, name='second')(x)
    return quant_layers.QuantConv(4, (1, 1), spec=self.spec, name='first')(x)


class Net(nn.Module):
  """Layers that are called neither in alphabetical order nor as set up."""

  spec: quant_spec.QuantSpec

  def setup(self):
    self.head = quant_layers.QuantDense(3, spec=self.spec)
    self.branch_a = Branch(self.spec)
    self.branch_b = Branch(self.spec)
    self.stem = quant_layers.QuantConv(4, (3, 3), spec=self.spec)

  def __call__(self, x):
    x = self.branch_b(self.branch_a(self.stem(x)))
    return self.head(nn.relu(x).mean(axis=(1, 2)))


LAYERS = [
  'stem',
  'branch_a/second',
  'branch_a/first',
  'branch_b/second',
  'branch_b/first',
  'head',
]


def find(spec=None, **rules):
  """Returns what `Net` leaves open under the rules of a spec."""
  spec = spec or quant_spec.QuantSpec(**rules)
  return discovery.find(Net(spec), INPUT, spec=spec)


def names(space):
  return [decision.name for decision in space.decisions]


def menus(space):
  return {d.name: [str(fmt) for fmt in d.menu] for d in space.decisions}


def test_decisions_are_in_the_order_of_calls():
  space = find()
  assert names(space) == LAYERS
  assert [op.path for op in space.ops] == LAYERS
  assert set(map(tuple, menus(space).values())) == {('INT4', 'INT8', 'BF16')}
  assert [d.leaves for d in space.decisions] == [
    (f'{layer}/format',) for layer in LAYERS
  ]


def test_separate_layers_have_two_decisions():
  space = find(mode='separate')
  assert names(space) == [
    f'{layer}/{side}' for layer in LAYERS for side in ('weights', 'activations')
  ]
  assert [d.leaves for d in space.decisions] == [(n,) for n in names(space)]


@pytest.mark.parametrize('mode', ['weights', 'activations'])
def test_one_side_alone_goes_by_the_name_of_the_layer(mode):
  space = find(mode=mode)
  assert names(space) == LAYERS
  assert [d.leaves for d in space.decisions] == [
    (f'{layer}/{mode}',) for layer in LAYERS
  ]


def test_excluded_layers_are_ops_without_a_decision():
  space = find(exclude=('stem', 'branch_*/first'))
  assert names(space) == ['branch_a/second', 'branch_b/second', 'head']
  assert [op.path for op in space.ops] == LAYERS
  excluded = {op.path for op in space.ops if op.shape.weight_menu is None}
  assert excluded == {'stem', 'branch_a/first', 'branch_b/first'}


def test_a_star_crosses_slashes():
  assert names(find(exclude=('*first',))) == [
    layer for layer in LAYERS if not layer.endswith('first')
  ]


def test_layers_may_have_menus_of_their_own():
  space = find(menus=(('branch_a/*', 'fp_s'), ('head', 'int8')))
  assert menus(space) == {
    'stem': ['INT4', 'INT8', 'BF16'],
    'branch_a/second': ['E2M1', 'E4M3', 'BF16'],
    'branch_a/first': ['E2M1', 'E4M3', 'BF16'],
    'branch_b/second': ['INT4', 'INT8', 'BF16'],
    'branch_b/first': ['INT4', 'INT8', 'BF16'],
    'head': ['INT8'],
  }


def test_a_group_is_one_decision_at_its_first_layer():
  space = find(
    exclude=('branch_a/first',),
    groups=(('convs', 'branch_*'), ('ends', 'stem'), ('ends', 'head')),
  )
  assert {d.name: d.leaves for d in space.decisions} == {
    'ends': ('stem/format', 'head/format'),
    'convs': (
      'branch_a/second/format',
      'branch_b/second/format',
      'branch_b/first/format',
    ),
  }
  assert names(space) == ['ends', 'convs']
  choices = helpers.random_choices(space)
  arch = space.expand(choices)
  assert arch['stem']['format'] is choices['ends']
  assert arch['head']['format'] is choices['ends']
  assert arch['branch_b']['first']['format'] is choices['convs']
  assert 'first' not in arch['branch_a']


def test_a_group_of_separate_layers_shares_each_side():
  space = find(mode='separate', groups=(('all', '*'),))
  assert {d.name: d.leaves for d in space.decisions} == {
    f'all/{side}': tuple(f'{layer}/{side}' for layer in LAYERS)
    for side in ('weights', 'activations')
  }


@pytest.mark.parametrize(
  ('rules', 'key'),
  [
    (dict(exclude=('stam',)), 'quant.exclude'),
    (dict(menus=(('stam', 'int8'),)), 'quant.menus'),
    (
      dict(groups=(('ends', 'head'), ('ends', 'stam'))),
      r'quant.groups\[ends\]',
    ),
  ],
)
def test_a_pattern_that_matches_no_layer_is_an_error_that_lists_them(
  rules, key
):
  listed = ', '.join(LAYERS)
  with pytest.raises(
    ValueError, match=f"{key}: the pattern 'stam' matches no layer.*{listed}"
  ):
    find(**rules)


@pytest.mark.parametrize(
  'rules',
  [
    dict(exclude=('head', 'h*')),
    dict(exclude=('head',), menus=(('h*', 'int8'),)),
    dict(menus=(('head', 'int8'), ('h*', 'int4'))),
    dict(groups=(('a', 'head'), ('b', 'h*'))),
  ],
)
def test_two_rules_for_one_layer_are_an_error_that_names_both(rules):
  with pytest.raises(
    ValueError, match=r"layer head is matched by both .*'head' and .*'h\*'"
  ):
    find(**rules)


def test_a_group_of_layers_with_different_menus_is_an_error():
  with pytest.raises(
    ValueError,
    match='head may use INT8, but stem/format INT4, INT8, BF16; .* same menu',
  ):
    find(menus=(('head', 'int8'),), groups=(('ends', 'stem'), ('ends', 'head')))


def test_a_group_with_the_name_of_a_layer_outside_it_is_an_error():
  # Else that layer would follow the group's decision, unasked.
  with pytest.raises(ValueError, match=r'quant.groups\[head\]'):
    find(groups=(('head', 'branch_*'),))


def test_an_unknown_mode_is_an_error():
  with pytest.raises(ValueError, match="quant.mode='both' is unknown; allowed"):
    quant_spec.QuantSpec(mode='both')


def test_an_unknown_rule_of_thresholds_is_refused():
  with pytest.raises(ValueError, match="quant.act_threshold='rms' is unknown"):
    quant_spec.QuantSpec(act_threshold='rms')


@pytest.mark.parametrize('key', ['weight_clip', 'act_clip'])
def test_an_unknown_clip_is_an_error_that_names_the_key(key):
  with pytest.raises(ValueError, match=f'quant.{key}: unknown clipping'):
    quant_spec.QuantSpec(**{key: 'student'})


def test_a_spec_is_hashable_however_it_is_written():
  # Flax compares and hashes the fields of a layer.
  as_lists = quant_spec.QuantSpec(
    ['int4', 'bf16'],
    exclude=['a'],
    menus=[['b', ['int8']]],
    groups=[['c', 'd']],
  )
  as_tuples = quant_spec.QuantSpec(
    ('INT4', 'BF16'),
    exclude=('a',),
    menus=(('b', 'INT8'),),
    groups=(('c', 'd'),),
  )
  assert as_lists == as_tuples
  assert hash(as_lists) == hash(as_tuples)


@pytest.mark.parametrize(
  ('rule', 'message'),
  [
    (dict(exclude='head'), "exclude='head' must be a tuple of texts"),
    (dict(exclude=None), 'exclude=None must be a tuple of texts'),
    (dict(strategies='kl'), "strategies='kl' must be a tuple of texts"),
    (dict(menus={'head': 'INT8'}), 'menus=.* must be a tuple of pairs'),
    (dict(groups=('a', '*')), 'groups=.* must be a tuple of pairs'),
    (dict(groups={'g': '*'}), 'groups=.* must be a tuple of pairs'),
    (dict(assignment={'a': 'INT4'}), "a has 'INT4'; it must be a pair"),
    (dict(formats=None), 'formats are None; give a named space'),
    (dict(formats=4), 'formats are 4; give a named space'),
  ],
)
def test_a_rule_of_another_type_is_refused(rule, message):
  with pytest.raises(ValueError, match=message):
    quant_spec.QuantSpec(**rule)


@pytest.mark.parametrize('mode', quant_spec.MODES)
def test_an_assignment_survives_the_way_through_names(mode):
  space = find(mode=mode, exclude=('stem',), menus=(('head', 'fp_l'),))
  choices = helpers.random_choices(space)
  assignment = space.assignment(choices)
  assert list(assignment) == LAYERS
  assert assignment['stem'] == (None, None)
  for path, sides in assignment.items():
    quantizes = [mode != 'activations', mode != 'weights']
    if path != 'stem':
      assert [side is not None for side in sides] == quantizes

  fixed = find(quant_spec.QuantSpec(mode=mode, assignment=assignment))
  assert fixed.is_fixed
  assert names(fixed) == names(space)
  # Each menu is the one format that was chosen.
  for open_decision, fixed_decision in zip(space.decisions, fixed.decisions):
    chosen = int(np.argmax(choices[open_decision.name]))
    assert fixed_decision.menu == (open_decision.menu[chosen],)
    assert fixed_decision.leaves == open_decision.leaves
  assert fixed.assignment(helpers.random_choices(fixed)) == assignment


def test_sides_apart_come_back_from_their_names():
  space = find(mode='separate', exclude=('stem',))
  sides = [
    ('INT4', 'INT8'),
    ('INT8', 'INT4'),
    ('BF16', 'INT4'),
    ('INT4', 'BF16'),
    ('INT8', 'INT8'),
  ]
  assignment = dict(zip(LAYERS, [(None, None), *sides]))
  choices = space.choices(assignment)
  # The menu is INT4, INT8, BF16.
  assert choices['branch_a/second/weights'].tolist() == [1, 0, 0]
  assert choices['branch_a/second/activations'].tolist() == [0, 1, 0]
  assert space.assignment(choices) == assignment


@pytest.mark.parametrize(
  ('missing', 'surplus'),
  [
    (('branch_a/second', 'head'), ('tail', 'neck')),
    (('head',), ()),
    ((), ('tail',)),
  ],
)
def test_an_assignment_that_does_not_fit_names_missing_and_surplus_layers(
  missing, surplus
):
  assignment = dict.fromkeys(LAYERS, ('INT4', 'INT4'))
  for layer in missing:
    del assignment[layer]
  assignment |= dict.fromkeys(surplus, ('INT4', 'INT4'))
  with pytest.raises(
    ValueError,
    match=f'misses: {", ".join(missing) or "none"}; '
    f'.* model lacks: {", ".join(surplus) or "none"}$',
  ):
    find(assignment=assignment)


def test_an_assignment_that_is_no_dict_is_refused():
  with pytest.raises(ValueError, match=r"assignment=\['stem'\] must be a dict"):
    quant_spec.QuantSpec(assignment=['stem'])


def test_an_assignment_leaves_no_room_for_other_rules():
  assignment = dict.fromkeys(LAYERS, ('INT4', 'INT4'))
  with pytest.raises(ValueError, match='must be empty'):
    find(assignment=assignment, exclude=('head',))


@pytest.mark.parametrize(
  ('mode', 'sides'),
  [
    ('tied', ('INT4', 'INT8')),
    ('weights', ('INT4', 'INT8')),
    ('activations', ('INT4', 'INT8')),
  ],
)
def test_an_assignment_that_the_mode_cannot_say_is_an_error(mode, sides):
  with pytest.raises(ValueError, match=f"head .*INT.*quant.mode='{mode}'"):
    quant_spec.QuantSpec(mode=mode, assignment={'head': sides})


def test_an_unknown_format_in_an_assignment_is_an_error():
  with pytest.raises(ValueError, match="unknown format 'INT9'"):
    quant_spec.QuantSpec(assignment={'head': ('INT9', 'INT9')})


def test_the_size_counts_architectures():
  # 3 formats in 5 layers and 16 in one.
  space = find(menus=(('head', 'fp_l'),))
  assert space.size == pytest.approx(math.log10(3**5 * 16))
  assert not space.is_fixed
  assert {k: v.shape for k, v in space.zeros().items()} == {
    d.name: (len(d.labels),) for d in space.decisions
  }


def test_only_a_space_with_nothing_open_has_one_architecture():
  assignment = dict.fromkeys(LAYERS, ('INT4', 'INT4'))
  only = find(assignment=assignment).only()
  assert {k: v.tolist() for k, v in only.items()} == dict.fromkeys(LAYERS, [1])
  with pytest.raises(ValueError, match='open decisions'):
    find().only()


@pytest.mark.parametrize(
  'leaf',
  [
    [0.0, 1.0],  # Of another menu.
    [1.0, 0.0, 0.0, 0.0],
    [1.0, np.nan, 0.0],
    [0.0, 0.0, 0.0],  # A policy before the search: nothing is chosen.
    [0.4, 0.4, 0.2],
    2,  # The index of an option.
    ('INT8', 'INT8', 'INT4'),
  ],
)
def test_what_chooses_no_option_of_a_menu_is_refused(leaf):
  space = find()
  choices = space.uniform('INT8') | {'head': leaf}
  with pytest.raises(ValueError, match='choices: head is .* 3 finite numbers'):
    space.assignment(choices)
  with pytest.raises(ValueError, match='choices: head is'):
    space.sizes(choices)


def test_the_largest_number_of_a_policy_chooses():
  space = find()
  indices = {d.name: i % 3 for i, d in enumerate(space.decisions)}
  assert space.indices(space.at(indices)) == indices
  policy = {k: jnp.bfloat16(3 * v - 7) for k, v in space.at(indices).items()}
  assert space.indices(policy) == indices


def test_a_space_and_a_budget_are_copied_hashed_and_pickled():
  space = find()
  budget = fliqs.Budget(space.cost('size'), 2.0)
  for copied in (copy.deepcopy(space), pickle.loads(pickle.dumps(space))):
    assert copied == space
    assert hash(copied) == hash(space)
  again = pickle.loads(pickle.dumps(copy.deepcopy(budget)))
  assert again.cost(space.dearest()) == budget.cost(space.dearest())


def test_choices_need_just_the_sizes_that_are_open():
  space = find()
  assignment = dict.fromkeys(LAYERS, ('INT4', 'INT4'))
  assert list(space.choices(assignment)) == LAYERS
  with pytest.raises(ValueError, match=r'misses none and names a/channels'):
    space.choices(assignment, {'a/channels': 8})


def test_a_uniform_architecture_leaves_fixed_layers_as_they_are():
  space = find(menus=(('head', 'int5'),))
  assignment = space.assignment(space.uniform('INT8'))
  assert assignment.pop('head') == ('INT5', 'INT5')
  assert set(assignment.values()) == {('INT8', 'INT8')}
  with pytest.raises(ValueError, match='INT6 is not on the menu of stem: INT4'):
    space.uniform('INT6')


def test_the_arch_found_is_the_one_the_model_reads():
  space = find(exclude=('head',), groups=(('convs', 'branch_*'),))
  arch = space.expand(space.uniform('INT8'))
  model = Net(quant_spec.QuantSpec(exclude=('head',)))
  variables = jax.eval_shape(model.init, jax.random.key(0), INPUT)
  assert jax.tree.map(np.shape, arch) == jax.tree.map(
    np.shape, variables['arch']
  )


def test_parameters_outside_quantized_layers_count():
  class Normed(nn.Module):
    @nn.compact
    def __call__(self, x):
      return quant_layers.QuantDense(3)(nn.LayerNorm()(x))

  space = discovery.find(Normed(), jax.ShapeDtypeStruct((1, 4), jnp.float32))
  # Scale and offset of 4 channels, kernel 4 x 3, bias 3.
  assert space.params == 8 + 12 + 3


def test_a_layer_may_be_the_whole_model():
  space = discovery.find(quant_layers.QuantDense(3), INPUT)
  assert list(space.expand(helpers.random_choices(space))) == ['format']


def test_a_model_without_quantizable_layers_is_an_error():
  with pytest.raises(ValueError, match='no layer that could be quantized'):
    discovery.find(nn.Dense(3), INPUT)


def test_a_shared_layer_is_two_ops_and_one_decision():
  class Shared(nn.Module):
    @nn.compact
    def __call__(self, x):
      dense = quant_layers.QuantDense(4, name='shared')
      x = quant_layers.QuantDense(4, name='between')(dense(x))
      return dense(x)

  space = discovery.find(Shared(), INPUT)
  assert sorted(op.path for op in space.ops) == ['between', 'shared', 'shared']
  assert names(space) == ['shared', 'between']
  assert space.decisions[0].leaves == ('shared/format',)


class Blocks(nn.Module):
  """Equal blocks under `nn.jit`, which traces the first of them only."""

  spec: quant_spec.QuantSpec

  @nn.compact
  def __call__(self, x):
    block = nn.jit(Branch)
    for name in ('c', 'b', 'a'):
      x = block(self.spec, name=name)(x)
    return x


def test_equal_blocks_under_jit_are_all_found():
  spec = quant_spec.QuantSpec()
  space = discovery.find(Blocks(spec), INPUT, spec=spec)
  assert names(space) == [
    f'{b}/{n}' for b in 'cba' for n in ('second', 'first')
  ]


@pytest.mark.parametrize(
  'rule', [dict(exclude=('b/*',)), dict(menus=(('b/*', 'fp_s'),))]
)
def test_a_rule_that_jit_would_ignore_is_an_error(rule):
  # Block b would be given the formats of block c: the trace is the same.
  spec = quant_spec.QuantSpec(**rule)
  with pytest.raises(ValueError, match=r'nn\.jit'):
    discovery.find(Blocks(spec), INPUT, spec=spec)


def test_finding_allocates_nothing():
  class Huge(nn.Module):
    @nn.compact
    def __call__(self, x):
      return quant_layers.QuantDense(10**6)(
        quant_layers.QuantConv(10**6, (9, 9))(x)
      )

  # Kernels of 300 terabytes, an input of 4 exabytes.
  shape = (1, 10**6, 10**6, 10**6)
  live = len(jax.live_arrays())
  space = discovery.find(Huge(), jax.ShapeDtypeStruct(shape, jnp.float32))
  assert len(jax.live_arrays()) == live
  assert space.params == 82 * 10**12 + 2 * 10**6


def test_mobilenet_at_224_is_found_from_shapes():
  spec = quant_spec.QuantSpec(exclude=('stem',))
  model = models.build(models.published('mobilenetv2'), 1000, spec)
  live = len(jax.live_arrays())
  image = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
  space = discovery.find(model, image, spec=spec, train=False)
  assert len(jax.live_arrays()) == live
  assert len(space.ops) == 53
  assert names(space)[:3] == [
    'stage0_block0/depthwise',
    'stage0_block0/project',
    'stage1_block0/expand',
  ]
  assert names(space)[-2:] == ['top', 'head']
  assert space.size == pytest.approx(52 * math.log10(3))
  assert all(formats.BF16 in decision.menu for decision in space.decisions)
