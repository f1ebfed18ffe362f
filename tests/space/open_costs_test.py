"""What open sizes cost: by hand, in expectation, and once they are found."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fliqs_jax import models
from fliqs_jax.space import allocation
from fliqs_jax.space import cost_model
from fliqs_jax.space import discovery
from fliqs_jax.space import quant_spec
from fliqs_jax.space import sizes
from tests import helpers
from tests.space import cases


def by_hand(kind, first, last, kernel, outer, expand, square):
  """Returns the cost of an architecture, counted on paper.

  Args:
    kind: of the cost.
    first: channels of the stem.
    last: channels of the projection and of the dense layer.
    kernel: of the depthwise layer.
    outer: bits of stem and projection.
    expand: bits of the expansion.
    square: bits of the dense layer.
  """
  hidden, squeezed, pixels = 6 * first, first // 2, 3 * 3
  # Weights, how often each is used, bits, channels.
  counts = [
    (3 * 3 * 3 * first, pixels, outer, first),
    (first * hidden, pixels, expand, hidden),
    (kernel**2 * hidden, pixels, 8, hidden),
    (hidden * last, pixels, outer, last),
    (last * last, 1, square, last),
    (last * 3, 1, 4, 3),
  ]
  if kind == 'bops':
    return sum(w * uses * bits**2 for w, uses, bits, _ in counts) / 1e9
  # A float32 scale for each channel and for the activations; not of BF16.
  bits = sum(
    w * bits + (32 * (channels + 1) if bits < 16 else 0)
    for w, _, bits, channels in counts
  )
  params = 2 * first + 2 * hidden + last  # Batch norm: the last has no scale.
  params += hidden + last + 3  # Biases.
  params += hidden * squeezed + squeezed + squeezed * hidden + hidden
  return (bits + 32 * params) / 1e6


@pytest.mark.parametrize('kernel_weights', [sizes.BRANCHES, sizes.MASKED])
def test_every_architecture_costs_what_it_does_by_hand(kernel_weights):
  space = cases.opened(kernel_weights)
  menus = {d.name: d.menu for d in space.formats}
  menus |= {d.name: d.labels for d in space.open_sizes}
  assert list(menus) == [
    'outer',
    'expand',
    'depthwise',
    'square',
    'head',
    'first/channels',
    'middle/kernel',
    'last/channels',
  ]
  for kind in ('bops', 'size'):
    cost = space.cost(kind)
    costs = []
    for indices in helpers.architectures(space):
      picked = {name: menus[name][i] for name, i in indices.items()}
      expected = by_hand(
        kind,
        picked['first/channels'],
        picked['last/channels'],
        picked['middle/kernel'],
        picked['outer'].bits,
        picked['expand'].bits,
        picked['square'].bits,
      )
      costs.append(float(cost(helpers.one_hots(space, indices))))
      # Shares of what is allocated are float32.
      assert costs[-1] == pytest.approx(expected, rel=1e-6)
    assert len(costs) == 2**6
    bounds = allocation.bounds(space, cost)
    assert bounds == pytest.approx((min(costs), max(costs)))


@pytest.mark.parametrize('kind', ['bops', 'size'])
@pytest.mark.parametrize('seed', range(3))
def test_the_expected_cost_is_the_sum_over_all_architectures(kind, seed):
  space = cases.opened(sizes.BRANCHES)
  cost = space.cost(kind)
  rng = np.random.default_rng(seed)
  policy = {
    d.name: rng.dirichlet(np.ones(len(d.labels))).astype(np.float32)
    for d in space.decisions
  }
  expected = total = 0.0
  for indices in helpers.architectures(space):
    probability = math.prod(float(policy[n][i]) for n, i in indices.items())
    expected += probability * float(cost(helpers.one_hots(space, indices)))
    total += probability
  assert total == pytest.approx(1, rel=1e-6)
  # Two decisions in place of the one on both sides of a layer would cost less:
  # E[c]^2 < E[c^2].
  assert float(cost(policy)) == pytest.approx(expected, rel=1e-6)


def test_the_found_network_costs_what_its_architecture_does():
  space = cases.opened(sizes.BRANCHES)
  for indices in helpers.architectures(space):
    if any(indices[name] for name in ('outer', 'expand', 'square')):
      continue
    choices = helpers.one_hots(space, indices)
    found = cases.find(sizes.Sizes(found=space.sizes(choices)))
    assert found.params < space.params
    # Formats are open still: the first of each menu, and the last.
    for pick in (0, -1):
      for decision in space.decisions:
        if decision.kind == 'format':
          size = len(decision.labels)
          choices[decision.name] = np.eye(size, dtype=np.float32)[pick]
      small = {
        d.name: choices[d.name] if d.kind == 'format' else np.ones(1)
        for d in found.decisions
      }
      for kind in ('bops', 'size'):
        expected = float(found.cost(kind)(small))
        actual = float(space.cost(kind)(choices))
        assert actual == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize('kernel_weights', [sizes.BRANCHES, sizes.MASKED])
def test_uniform_of_open_sizes_is_that_of_the_published_network(kernel_weights):
  """MobileNetV2 at 224x224: 300 774 272 MACs, 3 504 872 parameters."""
  spec = quant_spec.QuantSpec(('INT4', 'INT8'))
  network = models.published('mobilenetv2')
  for open_sizes in (
    sizes.Sizes(),
    sizes.Sizes((0.5, 1, 2), (3, 5, 7), kernel_weights),
  ):
    model = models.build(network, 1000, spec, open_sizes)
    image = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    space = discovery.find(model, image, spec=spec, train=False)
    bops, size = space.cost('bops'), space.cost('size')
    # 4 x 4 bits: 300.774 M x 16 = 4.8124 GBOPs.
    assert cost_model.uniform(bops, 'INT4') == pytest.approx(4.8124, abs=5e-5)
    # 3 469 760 weights of 4 bits, a float32 scale for each of 17 056 + 1000
    # channels and 53 inputs, 34 112 + 1000 parameters of norms and bias.
    bits = 3_469_760 * 4 + (18_056 + 53 + 35_112) * 32
    assert bits / 1e6 == pytest.approx(15.5821, abs=5e-5)
    assert cost_model.uniform(size, 'INT4') == pytest.approx(bits / 1e6, 1e-6)
    choices = space.uniform('INT4')
    assert float(bops(choices)) == pytest.approx(4.8124, abs=5e-5)
    assert float(size(choices)) == pytest.approx(bits / 1e6, rel=1e-6)
