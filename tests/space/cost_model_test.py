"""Costs, by hand count, by enumeration, and by the paper's own numbers."""

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fliqs_jax import models
from fliqs_jax.layers import quant_layers
from fliqs_jax.numerics import entropy_coding
from fliqs_jax.numerics import formats
from fliqs_jax.space import allocation
from fliqs_jax.space import cost_model
from fliqs_jax.space import discovery
from fliqs_jax.space import quant_spec
from tests import helpers
from tests.space import cases

BITS = {'INT4': 4, 'INT5': 5, 'INT8': 8, 'E2M1': 4, 'E4M3': 8, 'BF16': 16}


# {layer: (MACs, weights, output channels)}, by hand.
COUNTS = {
  'conv': (4 * 4 * 6 * (3 * 3 * 4), 3 * 3 * 4 * 6, 6),
  'depthwise': (4 * 4 * 6 * (3 * 3), 3 * 3 * 6, 6),
  'head': (6 * 5, 6 * 5, 5),
}
BIASES = 6 + 6 + 5
WEIGHTS = 216 + 54 + 30

RULES = {
  'tied': dict(mode='tied'),
  'weights': dict(mode='weights'),
  'activations': dict(mode='activations'),
  'separate': dict(mode='separate'),
  'menus': dict(mode='tied', menus=(('head', ('E2M1', 'E4M3')),)),
  'excluded': dict(mode='separate', exclude=('conv',)),
  'grouped': dict(
    mode='tied', groups=(('body', 'conv'), ('body', 'depthwise'))
  ),
  'grouped_separate': dict(mode='separate', groups=(('all', '*'),)),
}


def cost_by_hand(kind, assignment):
  """Returns the cost of {layer: (weights, activations)}; None: unquantized."""
  total = {'bops': 0, 'size': 32 * BIASES, 'average_bits': 0}
  total['compressed_bytes'] = 4 * BIASES
  for layer, (weights, activations) in assignment.items():
    macs, count, channels = COUNTS[layer]
    weight_bits = BITS[weights or 'BF16']
    total['bops'] += weight_bits * BITS[activations or 'BF16'] * macs
    total['size'] += weight_bits * count
    coded = entropy_coding.expected(
      formats.parse(weights or 'BF16'), count // channels
    )
    total['compressed_bytes'] += coded * count / 8
    if weights not in (None, 'BF16'):
      total['size'] += 32 * channels
      total['compressed_bytes'] += 4 * channels
    if activations not in (None, 'BF16'):
      total['size'] += 32
      total['compressed_bytes'] += 4
    total['average_bits'] += weight_bits * count
  unit = {'bops': 1e9, 'size': 1e6, 'average_bits': WEIGHTS}
  unit['compressed_bytes'] = 1
  return total[kind] / unit[kind]


@functools.cache
def net_space(rules_id):
  spec = quant_spec.QuantSpec('int_s', **RULES[rules_id])
  return discovery.find(cases.Net(spec), cases.INPUT, spec=spec)


@functools.cache
def enumerated(rules_id, kind):
  """Returns all architectures' indices [A, D] and their costs by hand [A]."""
  space = net_space(rules_id)
  indices, costs = [], []
  for architecture in helpers.architectures(space):
    indices.append(list(architecture.values()))
    costs.append(
      cost_by_hand(
        kind, space.assignment(helpers.one_hots(space, architecture))
      )
    )
  return np.array(indices), np.array(costs)


EVERY_COST = pytest.mark.parametrize(
  ('rules_id', 'kind'), list(itertools.product(RULES, cost_model.KINDS))
)


@EVERY_COST
def test_the_cost_of_an_architecture_is_the_count_by_hand(rules_id, kind):
  space = net_space(rules_id)
  cost = space.cost(kind)
  indices, by_hand = enumerated(rules_id, kind)
  # 3 to 729 of them; a few dozen will do.
  for row in range(0, len(indices), max(1, len(indices) // 40)):
    chosen = dict(zip([d.name for d in space.decisions], indices[row]))
    choices = helpers.one_hots(space, chosen)
    assert cost(choices) == pytest.approx(by_hand[row], rel=1e-6)
    leaves = space.leaves(choices)
    parts = sum(cost.of_op(op, leaves) for op in cost.ops)
    assert cost.constant + parts == cost(choices)


@EVERY_COST
def test_the_expected_cost_is_the_mean_over_all_architectures(rules_id, kind):
  space = net_space(rules_id)
  rng = np.random.default_rng(0)
  policy = {
    d.name: rng.dirichlet(np.ones(len(d.labels))) for d in space.decisions
  }
  indices, by_hand = enumerated(rules_id, kind)
  # Decisions are independent: an architecture's probability is their product.
  probabilities = np.prod(
    [p[column] for p, column in zip(policy.values(), indices.T)], axis=0
  )
  assert probabilities.sum() == pytest.approx(1)
  expected = np.sum(probabilities * by_hand)
  actual = space.cost(kind)(policy)
  assert actual == pytest.approx(expected, rel=1e-6)


@EVERY_COST
def test_the_bounds_are_those_of_the_enumeration(rules_id, kind):
  _, by_hand = enumerated(rules_id, kind)
  space = net_space(rules_id)
  bounds = allocation.bounds(space, space.cost(kind))
  assert bounds == pytest.approx((by_hand.min(), by_hand.max()), rel=1e-6)


def test_the_gradient_of_the_expected_cost_is_exact():
  space = net_space('separate')
  cost = space.cost('bops')
  policy = {d.name: jnp.full(3, 1 / 3) for d in space.decisions}
  gradient = jax.jit(jax.grad(lambda p: cost(p)))(policy)
  # Bilinear: d/dp(format) is the layer's cost with that format chosen. The
  # other side has (4 + 8 + 16) / 3 bits on average.
  macs = COUNTS['conv'][0]
  np.testing.assert_allclose(
    gradient['conv/weights'],
    np.array([4, 8, 16]) * (28 / 3) * macs / 1e9,
    rtol=1e-5,
  )


def test_a_tied_decision_is_not_two_independent_ones():
  # E[b**2] = (16 + 64 + 256) / 3 = 112, E[b]**2 = (28 / 3)**2 = 87.1.
  tied, separate = (
    net_space(rules).cost('bops')(
      {d.name: np.full(3, 1 / 3) for d in net_space(rules).decisions}
    )
    for rules in ('tied', 'separate')
  )
  macs = sum(macs for macs, _, _ in COUNTS.values())
  assert tied == pytest.approx(112 * macs / 1e9)
  assert separate == pytest.approx((28 / 3) ** 2 * macs / 1e9)


@pytest.mark.parametrize('kind', cost_model.KINDS)
@pytest.mark.parametrize('name', ['BF16', 'INT8', 'INT5'])
def test_a_uniform_cost_needs_no_menu_and_leaves_excluded_layers_alone(
  kind, name
):
  # INT5 is on no menu.
  for rules_id in RULES:
    weights = None if rules_id == 'activations' else name
    activations = None if rules_id == 'weights' else name
    assignment = dict.fromkeys(COUNTS, (weights, activations))
    if rules_id == 'excluded':
      assignment['conv'] = (None, None)
    actual = cost_model.uniform(net_space(rules_id).cost(kind), name.lower())
    assert actual == pytest.approx(cost_by_hand(kind, assignment), rel=1e-6)


def test_macs_of_a_grouped_dilated_strided_convolution():
  layer = quant_layers.QuantConv(
    6,
    (3, 5),
    strides=(2, 3),
    kernel_dilation=(2, 1),
    feature_group_count=2,
    padding='VALID',
    spec=quant_spec.QuantSpec(['INT4', 'BF16']),
  )
  space = discovery.find(
    layer, jax.ShapeDtypeStruct((1, 15, 12, 8), jnp.float32)
  )
  (op,) = space.ops
  # The dilated kernel spans 5 x 5: (15 - 5) // 2 + 1 = 6 rows and
  # (12 - 5) // 3 + 1 = 3 columns of 6 outputs, each a sum over 3 * 5 positions
  # of 8 / 2 channels.
  assert op.shape.macs == 6 * 3 * 6 * (3 * 5 * 4) == 6480
  assert op.shape.weights == 3 * 5 * 4 * 6 == 360
  size = space.cost('size')
  # Megabits: weights, a float32 scale for each of 6 channels and one for the
  # activations, a float32 bias for each channel.
  int4 = 360 * 4 + 6 * 32 + 32 + 6 * 32
  bf16 = 360 * 16 + 6 * 32  # No scales.
  (name,) = (decision.name for decision in space.decisions)
  assert size({name: np.array([1.0, 0.0])}) == pytest.approx(int4 / 1e6)
  assert size({name: np.array([0.0, 1.0])}) == pytest.approx(bf16 / 1e6)
  bounds = allocation.bounds(space, size)
  assert bounds == pytest.approx((int4 / 1e6, bf16 / 1e6))
  assert list(space.leaves({name: 0})) == ['format']


def test_macs_count_every_position_of_the_input():
  layer = quant_layers.QuantDense(5)
  (op,) = discovery.find(
    layer, jax.ShapeDtypeStruct((1, 10, 8), jnp.float32)
  ).ops
  assert op.shape.macs == 10 * 8 * 5
  assert (op.shape.kind, op.shape.weights, op.shape.channels) == (
    'dense',
    40,
    5,
  )


def test_where_scales_outweigh_the_weights_more_bits_may_be_smaller():
  space = discovery.find(
    quant_layers.QuantDense(10), jax.ShapeDtypeStruct((1, 2), jnp.float32)
  )
  # 20 weights, 10 scales, one scale of the activations, 10 biases:
  sizes = {
    'INT4': 20 * 4 + 11 * 32 + 10 * 32,  # 752
    'INT8': 20 * 8 + 11 * 32 + 10 * 32,  # 832
    'BF16': 20 * 16 + 10 * 32,  # 640: the smallest.
  }
  bounds = allocation.bounds(space, space.cost('size'))
  assert bounds == pytest.approx((sizes['BF16'] / 1e6, sizes['INT8'] / 1e6))


def test_a_shared_layer_works_twice_but_is_stored_once():
  class Shared(nn.Module):
    @nn.compact
    def __call__(self, x):
      shared = quant_layers.QuantDense(8, name='shared')
      x = shared(nn.relu(shared(x)))
      return quant_layers.QuantDense(3, name='head')(x)

  space = discovery.find(Shared(), jax.ShapeDtypeStruct((1, 8), jnp.float32))
  int4 = space.uniform('INT4')
  bops = 4 * 4 * (2 * 8 * 8 + 8 * 3)
  assert space.cost('bops')(int4) == pytest.approx(bops / 1e9)
  # Weights; scales of 8 + 3 channels and of 2 layers' activations; biases.
  size = 4 * (64 + 24) + 32 * (8 + 3 + 2) + 32 * (8 + 3)
  assert space.cost('size')(int4) == pytest.approx(size / 1e6)
  mixed = {'shared': int4['shared']}
  mixed['head'] = np.array([0.0, 0.0, 1.0])
  average = (4 * 64 + 16 * 24) / (64 + 24)
  assert space.cost('average_bits')(mixed) == pytest.approx(average)


def test_an_unknown_kind_is_an_error_that_lists_the_kinds():
  with pytest.raises(
    ValueError,
    match="cost.kind='flops' .*: bops, size, compressed_bytes, average_bits",
  ):
    cost_model.make('flops', (), 0, {}, {})


def _mobilenet_macs():
  """Returns the MACs of MobileNetV2 at 224, by its Table 2 and by hand."""
  macs, size = 112**2 * 32 * (9 * 3), 112
  channels = 32
  for t, c, n, s in [
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
  ]:
    for block in range(n):
      expanded = t * channels
      if t > 1:
        macs += size**2 * expanded * channels
      size //= s if block == 0 else 1
      macs += size**2 * expanded * 9
      macs += size**2 * c * expanded
      channels = c
  return macs + 7**2 * 1280 * 320 + 1280 * 1000


def test_uniform_mobilenets_cost_what_the_paper_says():
  spec = quant_spec.QuantSpec()
  model = models.build(models.published('mobilenetv2'), 1000, spec)
  image = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
  space = discovery.find(model, image, spec=spec, train=False)
  # A stem, one block of 2 layers, 16 of 3, a top, a head; 17 depthwise.
  assert len(space.ops) == 1 + 2 + 16 * 3 + 1 + 1 == 53
  assert sum('depthwise' in op.path for op in space.ops) == 17
  macs = sum(op.shape.macs for op in space.ops)
  assert macs == _mobilenet_macs() == 300_774_272
  # Figures 17 and 23, width 1.0: bits**2 * MACs, first and last layer included.
  cost = space.cost('bops')
  for names, gbops in [
    (['BF16'], '77.00'),
    (['INT8', 'E4M3'], '19.25'),
    (['INT4', 'E2M1'], '4.81'),
  ]:
    for name in names:
      assert f'{cost_model.uniform(cost, name):.2f}' == gbops
