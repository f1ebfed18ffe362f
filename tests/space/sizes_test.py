"""Sizes that may be open: what is refused, and how many decisions there are."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fliqs_jax import models
from fliqs_jax.layers import channel_masks
from fliqs_jax.layers import quant_layers
from fliqs_jax.space import decisions as decisions_lib
from fliqs_jax.space import discovery
from fliqs_jax.space import quant_spec
from fliqs_jax.space import search_space
from fliqs_jax.space import sizes

# Section 6, and A.13.
FLIQNAS = sizes.Sizes(widths=(0.5, 1.0, 1.5, 2.0), kernels=(3, 5, 7))
RECOMMENDER = sizes.Sizes(widths=(0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2))


def test_without_anything_open_sizes_are_the_published_ones():
  channels = sizes.Sizes().channels('a', 24)
  assert (channels.decision, channels.counts) == (None, (24,))
  kernel = sizes.Sizes().kernel('a', 5)
  assert (kernel.decision, kernel.labels) == (None, (5,))
  assert not kernel.has_branches
  assert not kernel.is_masked


def test_channels_are_multiples_of_the_published_number():
  channels = sizes.Sizes(widths=(0.5, 1.0, 1.5)).channels('a', 5)
  assert channels.decision == 'a/channels'
  assert channels.labels == channels.counts == (2, 5, 7)
  assert channels.size == 7
  assert channels.labels[channels.published] == 5
  assert channels.shares == (2 / 7, 5 / 7, 1)


def test_what_follows_channels_picks_by_the_same_labels():
  channels = sizes.Sizes(widths=(1, 2)).channels('a', 4)
  expanded = channels.scaled(lambda count: 6 * count)
  assert expanded.decision == channels.decision
  assert expanded.labels == (4, 8)
  assert expanded.counts == (24, 48)


def test_the_narrowest_tensor_has_one_channel():
  # 4 / 4 is 1, the least that is allowed; below it there is nothing left.
  channels = sizes.Sizes(widths=(0.25, 1.0)).channels('a', 4)
  assert channels.counts == (1, 4)


@pytest.mark.parametrize('weights', [sizes.BRANCHES, sizes.MASKED])
def test_a_kernel_may_have_branches_or_be_masked(weights):
  kernel = sizes.Sizes(kernels=(3, 5, 7), kernel_weights=weights).kernel('a', 4)
  assert kernel.decision == 'a/kernel'
  assert kernel.labels[kernel.published] == 3  # The nearest, the first of two.
  assert kernel.shares == (9 / 49, 25 / 49, 1)
  assert kernel.has_branches == (weights == sizes.BRANCHES)
  assert kernel.is_masked == (weights == sizes.MASKED)


def test_sizes_are_hashable_however_they_are_written():
  # Flax compares and hashes the fields of a network.
  as_lists = sizes.Sizes([0.5, 1.0], [3, 5], found={'b/kernel': 3, 'a': 4})
  as_tuples = sizes.Sizes((0.5, 1.0), (3, 5), found={'a': 4, 'b/kernel': 3})
  assert as_lists == as_tuples
  assert hash(as_lists) == hash(as_tuples)


def test_found_sizes_leave_nothing_open():
  found = sizes.Sizes(found={'a/channels': 6, 'a/kernel': 5})
  assert found.channels('a', 4).labels == (6,)
  assert found.kernel('a', 3).labels == (5,)
  # An arch.json of a network all of whose kernels are as published.
  found = sizes.Sizes(found={'a/channels': 6})
  assert found.kernel('a', 3).decision is None
  assert sizes.Sizes(found={}) == sizes.Sizes()


@pytest.mark.parametrize('is_served', [False, True])
def test_only_a_network_that_is_served_has_no_leaves(is_served):
  found = {'a/channels': 6, 'a/kernel': 5}
  found = sizes.Sizes(found=found, is_served=is_served)
  assert found.channels('a', 4).has_leaf != is_served
  assert found.kernel('a', 3).has_leaf != is_served


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    (dict(widths=(1.0, 0.5)), r'sizes.widths=\(1.0, 0.5\) .* rising'),
    (dict(widths=(0.5, 0.5)), 'sizes.widths=.* different'),
    (dict(widths=(0.0, 1.0)), 'sizes.widths=.* positive'),
    (dict(kernels=(5, 3)), 'sizes.kernels=.* rising'),
    (dict(kernels=(3, 4)), r'sizes.kernels=\(3, 4\) must be odd'),
    (dict(kernels=(3, 4.5)), 'sizes.kernels=.* must be odd'),
    (dict(kernel_weights='shared'), "'shared' .* branches, masked"),
  ],
)
def test_sizes_that_cannot_be_are_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    sizes.Sizes(**fields)


@pytest.mark.parametrize(
  ('widths', 'counts'),
  [((0.1, 1.0), r'\(0, 5\)'), ((1.0, 1.1), r'\(5, 5\)')],
)
def test_widths_that_round_to_nothing_or_twice_the_same(widths, counts):
  with pytest.raises(ValueError, match=rf'of 5 .*{counts} in a/channels'):
    sizes.Sizes(widths=widths).channels('a', 5)


@pytest.mark.parametrize(
  ('found', 'message'),
  [
    ({'b/channels': 4}, 'lack a/channels'),
    ({'a/channels': 4, 'b/kernel': 3}, 'lack a/kernel'),
    ({'a/channels': 0}, 'a/channels=0, .* at least 1'),
    ({'a/channels': 4.0}, 'a/channels=4.0'),
    ({'a/channels': True}, 'a/channels=True'),
    ({'a/channels': None}, 'a/channels=None'),
    ({'a/channels': '4'}, "a/channels='4'"),
    ({'a/channels': 4, 'a/kernel': 4}, 'a/kernel=4, which must be odd'),
  ],
)
def test_sizes_of_an_arch_json_that_cannot_be(found, message):
  found = sizes.Sizes(found=found)
  with pytest.raises(ValueError, match=f'sizes of arch.json .*{message}'):
    found.channels('a', 4), found.kernel('a', 3)


@pytest.mark.parametrize('name', ['deit_ti16', 'inceptionv3'])
def test_a_network_without_sizes_refuses_them(name):
  spec = quant_spec.QuantSpec()
  config = models.published(name)
  models.build(config, 10, spec, sizes.Sizes(found={}))
  for given in (
    sizes.Sizes(widths=(1, 2)),
    sizes.Sizes(kernels=(3, 5)),
    sizes.Sizes(found={'stage0/channels': 8}),
  ):
    with pytest.raises(ValueError, match=f'model {name} has no sizes'):
      models.build(config, 10, spec, given)


@functools.cache
def space_of(name, open_sizes):
  spec = quant_spec.QuantSpec('int_s')
  model = models.build(models.published(name), 1000, spec, open_sizes)
  example = model.input_shape
  if isinstance(example, tuple):
    example = jax.ShapeDtypeStruct(example, jnp.float32)
  x = jax.tree.map(
    lambda s: jax.ShapeDtypeStruct((1, *s.shape), s.dtype), example
  )
  return discovery.find(model, x, spec=spec, train=False)


@pytest.mark.slow
@pytest.mark.parametrize(
  ('name', 'open_sizes', 'formats', 'channels', 'kernels'),
  [
    # 7 stages; a depthwise layer in each of 17 blocks.
    ('mobilenetv2', FLIQNAS, 53, 7, 17),
    ('efficientnet_b0', FLIQNAS, 50, 7, 16),
    # 4 stages and the inner channels of 8 or 16 blocks.
    ('resnet18', FLIQNAS, 22, 4 + 8, 0),
    ('resnet50', FLIQNAS, 54, 4 + 16, 0),
    # 3 stages of 3 blocks.
    ('resnet_cifar', FLIQNAS, 22, 3 + 9, 0),
    # Rank and width of 4 layers.
    ('recommender', RECOMMENDER, 9, 8, 0),
    ('mlp', FLIQNAS, 3, 2, 0),
  ],
)
def test_how_many_decisions_there_are(
  name, open_sizes, formats, channels, kernels
):
  space = space_of(name, open_sizes)
  kinds = [d.kind for d in space.decisions]
  assert kinds.count('format') == formats
  assert kinds.count('channels') == channels
  assert kinds.count('kernel') == kernels
  assert len(kinds) == formats + channels + kernels
  expected = formats * math.log10(3) + kernels * math.log10(3)
  expected += channels * math.log10(len(open_sizes.widths))
  assert space.size == pytest.approx(expected)
  if name == 'mobilenetv2':
    # Of the paper's "230 tunable values, over 10^100" one per layer, per stage
    # and per depthwise layer.
    assert len(kinds) == 77
    assert round(space.size, 1) == 37.6


@pytest.mark.slow
@pytest.mark.parametrize(
  ('name', 'open_sizes'),
  [
    ('mobilenetv2', FLIQNAS),
    ('efficientnet_b0', FLIQNAS),
    ('resnet18', FLIQNAS),
    ('recommender', RECOMMENDER),
  ],
)
@pytest.mark.parametrize('kind', ['bops', 'size'])
def test_the_published_sizes_cost_what_the_published_network_does(
  name, open_sizes, kind
):
  plain, opened = space_of(name, sizes.Sizes()), space_of(name, open_sizes)
  expected = plain.cost(kind)(plain.uniform('INT8'))
  cost = opened.cost(kind)(opened.uniform('INT8'))
  # Shares of what is allocated are float32.
  assert float(cost) == pytest.approx(float(expected), rel=1e-6)


INPUTS = sizes.Channels('a/channels', (2, 4, 6), (2, 4, 6))
OUTPUTS = sizes.Channels('b/channels', (3, 5, 8), (3, 5, 8))
BRANCHES = sizes.Kernel('c/kernel', (3, 5), sizes.BRANCHES)
MASKED = sizes.Kernel('c/kernel', (3, 5), sizes.MASKED)


def conv(kernel, **fields):
  return sizes.between(quant_layers.QuantConv, INPUTS, OUTPUTS, kernel)(
    **fields
  )


class TwoLayers(nn.Module):
  first: sizes.Channels
  second: sizes.Channels

  @nn.compact
  def __call__(self, x):
    x = sizes.between(quant_layers.QuantDense, INPUTS, self.first)(
      name='first'
    )(x)
    return sizes.between(quant_layers.QuantDense, self.second, OUTPUTS)(
      name='second'
    )(x)


def refused(layer, *shape):
  x = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
  discovery.find(layer, x)


@pytest.mark.parametrize(
  ('layer', 'shape', 'message'),
  [
    (conv(MASKED), (2, 9, 6), 'map of 2x9 .* kernel of 5 .*'),
    (conv(MASKED, padding=1), (9, 9, 6), 'padding='),
    (
      conv(BRANCHES, kernel_dilation=2),
      (9, 9, 6),
      'neither dilation nor mask',
    ),
    (conv(MASKED, strides=4), (8, 8, 6), 'stride of 4 .* kernel of 3'),
    (
      sizes.between(quant_layers.QuantDense, INPUTS, OUTPUTS)(),
      (5,),
      'a/channels .* 6 channels, .* takes 5',
    ),
    (channel_masks.Mask(INPUTS), (5,), 'a/channels .* 6 channels, .* has 5'),
    (
      channel_masks.BatchNorm(True, channels=INPUTS),
      (5,),
      'a/channels .* has 5',
    ),
    (
      channel_masks.Dense(8, input_channels=INPUTS, output_channels=OUTPUTS),
      (6,),
      'one decision, but they follow a/channels and b/channels',
    ),
    (
      TwoLayers(OUTPUTS, sizes.Channels('b/channels', (4, 8), (4, 8))),
      (6,),
      r'\(4, 8\), but shares the decision b/channels .* \(3, 5, 8\)',
    ),
  ],
)
def test_sizes_that_do_not_fit_are_refused(layer, shape, message):
  with pytest.raises(ValueError, match=message):
    refused(layer, *shape)


def test_branches_together_are_all_in_use_and_nothing_else_changes():
  kernel = decisions_lib.SizeDecision(
    'k', ('a/kernel',), sizes.Kernel('k', (3, 5))
  )
  width = decisions_lib.SizeDecision(
    'w', ('a/output_channels',), sizes.Channels('w', (8, 16), (8, 16))
  )
  space = search_space.SearchSpace((), (kernel, width), (), 0)
  choices = {'k': np.array([0.0, 1.0]), 'w': np.array([1.0, 0.0])}
  apart = space.with_branches(choices, False)
  together = space.with_branches(choices, True)
  np.testing.assert_array_equal(apart['k'], [0, 1])
  np.testing.assert_array_equal(together['k'], [0.5, 0.5])
  np.testing.assert_array_equal(together['w'], choices['w'])
