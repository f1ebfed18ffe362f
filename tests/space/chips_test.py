"""Chips: published tables, prices by hand, expected costs by enumeration."""

import csv
import functools
import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fliqs_jax as fliqs
from fliqs_jax.layers import quant_layers
from fliqs_jax.numerics import formats
from fliqs_jax.space import allocation
from fliqs_jax.space import cost_model
from fliqs_jax.space.chips import chip as chip_lib
from fliqs_jax.space.chips import chip_file
from fliqs_jax.space.chips import prices
from tests import helpers
from tests.space import cases

INT4, INT5, INT8, E2M1, E4M3, BF16 = map(
  formats.parse, ('INT4', 'INT5', 'INT8', 'E2M1', 'E4M3', 'BF16')
)


def _conv(inputs, outputs, kernel, stride, size, kind='conv'):
  """The numbers of a convolution with a result of size x size pixels."""
  weights = inputs * outputs * kernel**2
  return prices.Counts(
    kind,
    macs=weights * size**2,
    weights=weights,
    channels=outputs,
    inputs=inputs * (size * stride) ** 2,
    outputs=outputs * size**2,
    window=(kernel, kernel),
    strides=(stride, stride),
  )


def _price(kind, op, weights, activations=None):
  return prices.price(_read(kind), op, weights, activations or weights)


_read = functools.cache(chip_file.read)


def _resnet18():
  """The layers of HAWQ-V3's table: no first and no last one."""
  layers, inputs, size = [], 64, 56
  for width, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
    size //= stride
    layers += [_conv(inputs, width, 3, stride, size)]
    layers += [_conv(width, width, 3, 1, size)] * 3
    if stride > 1:
      layers += [_conv(inputs, width, 1, stride, size)]
    inputs = width
  return layers


def _resnet50():
  """Lists for the layers of HAWQ-V3's table, and its four projections."""
  layers, projections, inputs, size = [], [], 64, 56
  for width, stride, blocks in (
    (64, 1, 3),
    (128, 2, 4),
    (256, 2, 6),
    (512, 2, 3),
  ):
    size //= stride
    projections.append(_conv(inputs, 4 * width, 1, stride, size))
    for block in range(blocks):
      stride = 1 if block else stride
      layers += [
        _conv(inputs, width, 1, stride, size),
        _conv(width, width, 3, 1, size),
        _conv(width, 4 * width, 1, 1, size),
      ]
      inputs = 4 * width
  return layers, projections


@pytest.mark.parametrize('name', chip_file.names())
def test_each_shipped_file_has_its_figures_and_prices_integers(name):
  sections = 0
  for section in chip_lib.SECTIONS:
    try:
      chip = chip_file.read(f'{section}:{name}')
    except ValueError:
      continue
    sections += 1
    for figures in [x.figures for x in (*chip.rates, *chip.layers)]:
      assert figures.confidence in chip_lib.CONFIDENCES
      assert figures.source
      assert figures.date
    op = _conv(64, 64, 3, 1, 56)
    by_bits = [prices.price(chip, op, f, f).value for f in (INT4, INT5, INT8)]
    assert 0 < by_bits[0] <= by_bits[1] <= by_bits[2]
  assert sections == 1


def test_the_measured_layers_sum_to_what_hawq_v3_publishes():
  # design: milliseconds of 8 images on a T4, INT4 and INT8.
  layers, projections = _resnet50()
  for name, ops, sums in (
    ('t4_resnet18', _resnet18(), (3.1487, 5.3437)),
    ('t4_resnet50', layers + projections, (7.6599, 11.8654)),
  ):
    for numeric_format, expected in zip((INT4, INT8), sums):
      prices = [_price(f'latency:{name}', op, numeric_format) for op in ops]
      assert {price.confidence for price in prices} == {'measured'}
      total = sum(price.value for price in prices)
      assert total == pytest.approx(expected, abs=1e-4)


def test_every_measured_layer_is_in_the_table_that_all_share():
  table = pathlib.Path(__file__).with_name('hawq_v3.csv')
  rows = csv.DictReader(table.read_text(encoding='utf-8').splitlines())
  macs = {int(float(row['macs'])) for row in rows}
  chip = chip_file.read('latency:t4')
  assert {layer.key.macs for layer in chip.layers} == macs


@pytest.mark.parametrize(
  ('chip', 'int4', 'ends_at_8', 'found'),
  [('2080ti', 1.338, 1.334, 1.303), ('a6000', 1.234, 1.228, 1.213)],
)
def test_table_3_is_reproduced_to_one_percent(chip, int4, ends_at_8, found):
  layers, projections = _resnet50()
  ends = [
    _conv(3, 64, 7, 2, 112),
    _conv(2048, 1000, 1, 1, 1, 'dense')._replace(window=(), strides=()),
  ]

  def time(ops, numeric_format):
    kind = f'latency:{chip}'
    return sum(_price(kind, op, numeric_format).value for op in ops)

  inner = layers + projections
  assert time(inner, INT8) / time(inner, INT4) == pytest.approx(int4, abs=5e-4)
  int8 = time(inner + ends, INT8)
  first_and_last = time(ends, INT8) + time(inner, INT4)
  assert int8 / first_and_last == pytest.approx(ends_at_8, rel=0.01)
  # The paper's FLIQS-S has its projections at 8 bits, too (Figure 8).
  fliqs_s = time(projections, INT8) + time(layers, INT4)
  assert time(inner, INT8) / fliqs_s == pytest.approx(found, rel=0.01)


def test_table_2_is_reproduced():
  def block(*bits):
    return sum(
      _price('lut:ultrascale', op, formats.parse(f'INT{b}')).value
      for b, op in zip(bits, (_conv(64, 128, 3, 2, 28),) * 3)
    )

  for bits, luts in ((4, 42.8), (5, 44.8), (6, 48.3), (7, 54.9), (8, 67.6)):
    assert block(bits, bits, bits) == pytest.approx(luts, abs=0.05)
  assert block(5, 5, 6) == pytest.approx(45.9, abs=0.1)
  assert block(5, 6, 6) == pytest.approx(47.1, abs=0.1)


def test_a_lane_of_look_up_tables_has_the_size_of_finns_formula():
  op = _conv(64, 64, 3, 1, 56)
  lanes = op.macs / 1e6
  for bits, luts in ((4, 40), (5, 50), (6, 60), (7, 98), (8, 112)):
    price = _price('lut:finn', op, formats.parse(f'INT{bits}'))
    assert price.value == pytest.approx(lanes * luts / 1e3)
  # 4 weights x 8 activations: (2 ceil(12 / 6) - 1) 12 + 2 12 = 60.
  mixed = _price('lut:finn', op, INT4, INT8).value
  assert mixed == pytest.approx(lanes * 60 / 1e3)


def test_energy_is_that_of_the_products_and_of_the_traffic():
  op = _conv(64, 64, 3, 1, 56)
  # INT8: .0029948 x 64 + .0010417 x 8 = .2 pJ, and .1 for the addition.
  bytes_ = op.weights + 2 * op.inputs
  expected = (op.macs * 0.3 + bytes_ * 12.5) / 1e6
  int8 = _price('energy:45nm', op, INT8).value
  assert int8 == pytest.approx(expected, rel=1e-3)
  # At equal bits an integer is cheaper than a float.
  assert _price('energy:45nm', op, INT4).value < (
    _price('energy:45nm', op, E2M1).value
  )
  assert int8 < _price('energy:45nm', op, E4M3).value


def test_a_roofline_is_the_longer_of_computing_and_traffic():
  wide = _conv(512, 512, 3, 1, 28)  # 1.8 G multiply-accumulates.
  assert _price('latency:h100', wide, INT8).value == pytest.approx(
    2 * wide.macs / 1978.9e12 * 1e3
  )
  dense = _conv(4096, 4096, 1, 1, 1, 'dense')  # 16.8 M weights, each used once.
  traffic = (4096 * 4096 + 2 * 4096) / 3.35e12 * 1e3
  assert _price('latency:h100', dense, INT8).value == pytest.approx(traffic)
  assert _price('latency:h100', dense, INT4).value == pytest.approx(traffic / 2)


@pytest.mark.parametrize(
  ('chip', 'pair', 'used'),
  [
    ('h100', (INT5, INT5), (INT8, INT8)),
    ('h100', (INT4, INT8), (INT8, INT8)),
    ('h100', (E2M1, E2M1), (E4M3, E4M3)),
    ('h100', (INT4, E4M3), (BF16, BF16)),
    ('tpu_v7', (INT8, INT8), (BF16, BF16)),
    ('tpu_v7', (E4M3, E4M3), (E4M3, E4M3)),
    ('tpu_v6e', (INT4, INT4), (INT4, INT4)),
    ('b200', (E2M1, E2M1), (E2M1, E2M1)),
    ('a100', (E4M3, E4M3), (BF16, BF16)),
  ],
)
def test_what_a_chip_does_not_multiply_costs_what_it_falls_back_to(
  chip, pair, used
):
  op = _conv(512, 512, 3, 1, 28)  # Computing takes longer than traffic.
  price = _price(f'latency:{chip}', op, *pair)
  assert (price.weights, price.activations) == used
  assert price.value == _price(f'latency:{chip}', op, *used).value


def test_a_layer_that_was_not_measured_lies_between_its_neighbours():
  small, large = _conv(64, 64, 3, 1, 56), _conv(64, 128, 3, 2, 28)
  between = _conv(64, 96, 3, 1, 35)
  prices = [_price('latency:t4', op, INT8) for op in (large, between, small)]
  assert [p.confidence for p in prices] == [
    'measured',
    'interpolated',
    'measured',
  ]
  # Layers of 57.8 M: .1918, .1913, .2112 ms; of 115.6 M: nine means.
  assert 0.18 < prices[1].value < 0.39
  # Far below the smallest layer a multiply-accumulate costs what it does there.
  tiny = _conv(64, 1, 3, 1, 1)
  tinier = tiny._replace(macs=tiny.macs / 2)
  assert _price('latency:t4', tiny, INT8).value == pytest.approx(
    2 * _price('latency:t4', tinier, INT8).value
  )


def _total(chip, space, choices):
  """The price of an architecture, op by op."""
  leaves = space.leaves(choices)
  return sum(
    prices.price(chip, *prices.chosen(op, leaves)).value for op in space.ops
  )


MENUS = {
  'tied': dict(mode='tied'),
  'separate': dict(mode='separate'),
  'excluded': dict(mode='separate', exclude=('conv',)),
  'grouped': dict(mode='separate', groups=(('all', '*'),)),
}


@pytest.mark.parametrize('rules', MENUS)
@pytest.mark.parametrize('kind', ['latency:tpu_v7', 'energy:45nm'])
def test_expected_costs_and_bounds_are_those_of_the_enumeration(rules, kind):
  spec = fliqs.QuantSpec(('INT4', 'E4M3', 'INT8'), **MENUS[rules])
  space = fliqs.find_decisions(cases.Net(spec), cases.INPUT, spec=spec)
  cost = space.cost(kind)
  chip = chip_file.read(kind)
  all_costs, chances = [], []
  rng = np.random.default_rng(0)
  policy = {
    d.name: rng.dirichlet(np.ones(len(d.labels))).astype(np.float32)
    for d in space.decisions
  }
  for architecture in helpers.architectures(space):
    choices = helpers.one_hots(space, architecture)
    by_hand = _total(chip, space, choices)
    assert float(cost(choices)) == pytest.approx(by_hand, rel=1e-5)
    all_costs.append(by_hand)
    chances.append(np.prod([policy[n][i] for n, i in architecture.items()]))
  expected = np.dot(all_costs, chances)
  assert float(jax.jit(lambda p: cost(p))(policy)) == pytest.approx(
    expected, rel=1e-5
  )
  bounds = allocation.bounds(space, cost)
  assert bounds == pytest.approx((min(all_costs), max(all_costs)), rel=1e-5)


def test_open_sizes_are_priced_at_each_combination():
  space = cases.opened('branches')
  for kind in ('latency:h100', 'energy:45nm'):
    cost, chip = space.cost(kind), chip_file.read(kind)
    costs = []
    for architecture in helpers.architectures(space):
      choices = helpers.one_hots(space, architecture)
      by_hand = _total(chip, space, choices)
      costs.append(float(cost(choices)))
      assert costs[-1] == pytest.approx(by_hand, rel=1e-5)
    bounds = allocation.bounds(space, cost)
    assert bounds == pytest.approx((min(costs), max(costs)), rel=1e-5)


def test_numbers_of_an_op_follow_its_sizes():
  space = cases.opened('branches')
  for which in (0, -1):
    chosen = {d.name: range(len(d.labels))[which] for d in space.decisions}
    leaves = space.leaves(space.at(chosen))
    for op in space.ops:
      counts, *_ = prices.chosen(op, leaves)
      taps = int(np.prod(counts.window or (1,)))
      key = counts.key
      # Results x what each sums over, and the channels of the key.
      summed = taps * key.inputs
      assert counts.macs == pytest.approx(counts.outputs * summed)
      assert counts.weights == pytest.approx(key.outputs * summed)


_FILE = """
name: My chip
source: a test
date: 2026-11
confidence: assumed
latency:
  terabytes_per_second: 1
  rates:
  - {formats: INT8, teraops: 2}
  - {formats: BF16, teraops: 1}
"""


def _written(tmp_path, text):
  path = tmp_path / 'mine.yaml'
  path.write_text(text)
  return f'latency:{path}'


def test_a_new_chip_is_a_file(tmp_path, monkeypatch):
  kind = _written(tmp_path, _FILE)
  monkeypatch.setenv('HOME', str(tmp_path))
  assert chip_file.read('latency:~/mine.yaml').name == 'My chip'
  layer = quant_layers.QuantDense(8)
  space = fliqs.find_decisions(
    layer, jax.ShapeDtypeStruct((1, 1000, 16), jnp.float32)
  )
  # 1000 x 16 x 8 multiply-accumulates at 1 and .5 per picosecond, in ms.
  macs = 1000 * 16 * 8
  for name, teraops in (('INT8', 2), ('BF16', 1)):
    expected = 2 * macs / teraops / 1e12 * 1e3
    actual = fliqs.uniform_cost(space.cost(kind), name)
    assert actual == pytest.approx(expected)


def test_stored_bits_casts_and_batches_change_traffic(tmp_path):
  more = _FILE + '  batch: 4\n  cast_passes: 2\n  stored_bits: {INT4: 4}\n'
  more = more.replace('teraops: 2', 'teraops: 2000000')
  op = _conv(64, 64, 1, 1, 8)
  kind = _written(tmp_path, more)
  # Four inputs are written and read at 4 bits, weights are read; then both pass
  # twice at 8 bits, as INT4 runs as INT8.
  elements = op.weights + 4 * op.inputs
  moved = (op.weights + 2 * 4 * op.inputs) * 4 / 8
  expected = (moved + 2 * elements) / 1e12 * 1e3
  assert _price(kind, op, INT4).value == pytest.approx(expected)


@pytest.mark.parametrize(
  ('old', 'new', 'message'),
  [
    ('INT8, teraops: 2', 'INT9, teraops: 2', r'rates\[0\].formats: unknown'),
    ('teraops: 2}', 'ops: 2}', r'rates\[0\]\.(ops|teraops)'),
    ('teraops: 2}', 'teraops: -2}', 'must be a finite number above 0'),
    ('teraops: 2}', 'teraops: fast}', 'must be a finite number above 0'),
    (
      'teraops: 2}',
      f'teraops: 1{"0" * 400}}}',
      'must be a finite number above',
    ),
    ('terabytes_per_second: 1', 'batch: 1', 'terabytes_per_second is missing'),
    ('confidence: assumed', 'confidence: sure', 'must be one of datasheet'),
    ('date: 2026-11', 'day: 2026-11', 'date is missing'),
    ('name: My chip', 'name: My chip\nname: B', 'given twice'),
    ('latency:', 'latencies:', 'unknown key latencies'),
    ('latency:', 'energy:', "no section 'latency'"),
    ('rates:', 'speeds:', 'needs `rates`'),
    ('BF16, teraops: 1}', 'INT8:kl, teraops: 1}', 'without a strategy'),
    ('name: My chip', '- name', 'while parsing'),
    (_FILE, '- 1', 'a target must be a mapping'),
    ('{formats: BF16, teraops: 1}', '{teraops: 1}', 'weights is missing'),
    ('teraops: 1}', 'teraops: 1, ops: [gemm]}', 'list of some of pointwise'),
    (
      'teraops: 1}',
      'teraops: 1, ops: [conv, []]}',
      r"ops=\['conv', \[\]\] must",
    ),
    ('teraops: 1}', 'teraops: 1, ops: [conv, {}]}', r"ops=\['conv', {}\] must"),
    ('  rates:', '  macs_per_lane: 2\n  rates:', 'unknown key .*macs_per_lane'),
    (
      '  rates:',
      '  stored_bits: {INT4: 4.5}\n  rates:',
      'stored_bits.INT4=4.5 must be a whole number',
    ),
    (
      '  rates:',
      '  fixed: {share: 1.2, format: INT8}\n  rates:',
      'fixed.share=1.2 must be at most 1',
    ),
  ],
)
def test_a_wrong_file_is_refused_with_the_key(tmp_path, old, new, message):
  assert old in _FILE
  kind = _written(tmp_path, _FILE.replace(old, new))
  with pytest.raises(ValueError, match=message) as caught:
    chip_file.read(kind)
  assert 'mine.yaml' in str(caught.value)


@pytest.mark.parametrize(
  ('kind', 'message'),
  [
    ('latency:nothing', 'there is no file nothing; allowed: .*t4'),
    ('speed:t4', "'speed' is no section of a chip; allowed: latency"),
    ('energy:t4', "no section 'energy', only latency"),
    ('watts', "cost.kind='watts' is unknown; allowed: bops.*latency.*t4"),
  ],
)
def test_an_unknown_cost_is_refused(kind, message):
  with pytest.raises(ValueError, match=message):
    cost_model.kind_of(kind)


def test_a_format_without_a_price_is_refused_with_layer_and_chip():
  spec = fliqs.QuantSpec('int_s')  # INT4, INT8, BF16.
  space = fliqs.find_decisions(cases.Net(spec), cases.INPUT, spec=spec)
  with pytest.raises(ValueError, match='conv: latency:t4 has no price of BF16'):
    allocation.bounds(space, space.cost('latency:t4'))


def test_a_format_is_held_by_wider_ones_of_its_kind_and_by_bf16():
  names = ('INT4', 'INT8', 'E2M1', 'E3M2', 'E2M3', 'E4M3', 'E5M2', 'BF16')
  held = {
    'INT4': {'INT4', 'INT8', 'BF16'},
    'INT8': {'INT8', 'BF16'},
    'E2M1': {'E2M1', 'E3M2', 'E2M3', 'E4M3', 'E5M2', 'BF16'},
    'E3M2': {'E3M2', 'E4M3', 'E5M2', 'BF16'},
    'E2M3': {'E2M3', 'E4M3', 'BF16'},
    'E4M3': {'E4M3', 'BF16'},
    'E5M2': {'E5M2', 'BF16'},
    'BF16': {'BF16'},
  }
  for narrow, wide in itertools.product(names, names):
    actual = prices.holds(formats.parse(wide), formats.parse(narrow))
    assert actual == (wide in held[narrow]), (wide, narrow)
