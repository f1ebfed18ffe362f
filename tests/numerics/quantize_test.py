"""The quantizer: exact values, straight-through gradient, one program for all.

The oracle spells out every code of a format as a fraction and knows nothing of
how the quantizer works. Every test covers all formats there are.
"""

from fractions import Fraction
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from fliqs_jax.numerics import clipping
from fliqs_jax.numerics import formats
from fliqs_jax.numerics import quantize

pytestmark = pytest.mark.optimized

INTEGERS = [f'INT{bits}' for bits in range(2, 9)]
FLOATS = [f'E{x}M{b - 1 - x}' for b in range(4, 9) for x in range(1, b)]
SCALED = INTEGERS + FLOATS
MENU = formats.menu([*SCALED, 'BF16'])
BF16_ROW = len(SCALED)
ONE_HOTS = np.eye(len(MENU), dtype=np.float32)

# The least magnitude at which ours and IEEE's bfloat16 are the same grid.
BF16_LEAST = 2.0**-119


@jax.jit
def round_traced(x):
  """Rounds x [F, N]: row f to the grid of format f, which is traced."""
  return jax.vmap(
    lambda one_hot, x: quantize.round_to_grid(x, quantize.select(MENU, one_hot))
  )(ONE_HOTS, x)


@jax.jit
def quantize_traced(x, thresholds, cotangents):
  """Returns quantized x [F, C, N] with thresholds [F, C, 1], and gradients."""

  def one_format(one_hot, x, threshold, cotangent):
    def values_and_scale(x, threshold):
      return quantize.quantize(x, quantize.select(MENU, one_hot), threshold)

    out, vjp = jax.vjp(values_and_scale, x, threshold)
    ones = jnp.ones_like(out.scale)
    return out, vjp(quantize.Quantized(cotangent, ones))

  return jax.vmap(one_format)(ONE_HOTS, x, thresholds, cotangents)


def magnitudes(name):
  """Returns a format's values >= 0 as fractions, in order of their codes."""
  if bits := re.fullmatch(r'INT(\d)', name):
    return [Fraction(i) for i in range(2 ** (int(bits[1]) - 1))]
  exponent_bits, mantissa_bits = map(int, re.findall(r'\d', name))
  bias = 2 ** (exponent_bits - 1) - 1
  values = []
  for code in range(2 ** (exponent_bits + mantissa_bits)):
    exponent, mantissa = divmod(code, 2**mantissa_bits)
    implicit_one = int(exponent > 0)  # Without it: zero and the subnormals.
    significand = implicit_one + Fraction(mantissa, 2**mantissa_bits)
    values.append(significand * Fraction(2) ** (max(exponent, 1) - bias))
  return values


def midpoints(name):
  values = magnitudes(name)
  return [(a + b) / 2 for a, b in zip(values, values[1:])]


def exact(fractions):
  """Returns fractions as float64, which must hold them without rounding."""
  array = np.array([float(f) for f in fractions])
  assert all(Fraction(a) == f for a, f in zip(array.tolist(), fractions))
  return array


@np.errstate(invalid='ignore')  # Signalling NaNs are among the inputs.
def nearest(name, x):
  """Returns x [N] float32 rounded to the format, by comparing magnitudes."""
  values, middle = exact(magnitudes(name)), exact(midpoints(name))
  magnitude = np.abs(x.astype(np.float64))
  code = np.searchsorted(middle, magnitude)  # How many midpoints lie below.
  is_tie = np.isin(magnitude, middle)
  # A tie goes to the even code: the last bit of the mantissa, or of the
  # integer. Without mantissa bits to be even it goes up, but never from zero.
  goes_up = code >= 1 if name.endswith('M0') else code % 2 == 1
  rounded = values[np.minimum(code + (is_tie & goes_up), len(values) - 1)]
  rounded = np.where(np.isnan(x), np.nan, rounded)
  return np.copysign(rounded, x).astype(np.float32)


def hard_cases(name):
  """Returns values, midpoints, both +-1 ulp, random and special numbers [N]."""
  points = exact([*magnitudes(name), *midpoints(name)]).astype(np.float32)
  ulps = [np.nextafter(points, end, dtype=np.float32) for end in (-1, np.inf)]
  rng = np.random.default_rng(len(name) + int(points[-1]) % 1000)
  largest = float(magnitudes(name)[-1])
  smallest = float(magnitudes(name)[1])
  random = np.exp2(
    rng.uniform(np.log2(smallest) - 3, np.log2(largest) + 1, 4000)
  )
  special = [0.0, 1e-45, 1e-38, 2 * largest, 3.4e38, np.inf]
  x = np.concatenate(
    [points, *ulps, random, largest * rng.random(2000), special]
  ).astype(np.float32)
  return np.concatenate([x, -x, [np.nan, -np.nan]]).astype(np.float32)


def hard_cases_of_all():
  """Returns [F, N] with the scaled formats' cases, and zeros for BF16."""
  rows = [hard_cases(name) for name in SCALED]
  x = np.zeros((len(MENU), max(map(len, rows))), np.float32)
  for row, cases in zip(x, rows):
    row[: len(cases)] = cases
  return x


def assert_same(actual, expected):
  """Asserts equal values, NaNs and signs, that of zero included."""
  actual, expected = np.asarray(actual), np.asarray(expected)
  assert actual.dtype == expected.dtype == np.float32
  np.testing.assert_array_equal(actual, expected)
  numbers = ~np.isnan(expected)
  np.testing.assert_array_equal(
    np.signbit(actual[numbers]), np.signbit(expected[numbers])
  )


def gaussian(seed, channels=64, values=48):
  """Returns [F, C, N]; the channels' scales span ten decades."""
  rng = np.random.default_rng(seed)
  scales = 10.0 ** rng.uniform(-5, 5, (len(MENU), channels, 1))
  x = scales * rng.standard_normal((len(MENU), channels, values))
  return x.astype(np.float32)


def test_the_oracle_knows_e2m1():
  # OCP Microscaling Formats 1.0, Table 4 (FP4).
  expected = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
  assert [float(v) for v in magnitudes('E2M1')] == expected
  x = np.array([0.25, 0.75, 1.25, -2.5, 3.5, 5.0, 9.0, -0.2], np.float32)
  assert_same(
    nearest('E2M1', x),
    # Ties to the even code: 0, 1, 1, 2, 4, 4.
    np.array([0, 1, 1, -2, 4, 4, 6, -0.0], np.float32),
  )


def test_rounding_is_exact_with_the_format_traced():
  x = hard_cases_of_all()
  rounded = round_traced(x)
  for name, row, result in zip(SCALED, x, rounded):
    assert_same(result, nearest(name, row))


def test_rounding_is_exact_with_the_format_known_when_compiling():
  x = hard_cases_of_all()

  @jax.jit
  def round_static(x):
    return [
      quantize.round_to_grid(row, quantize.grid_of(fmt))
      for row, fmt in zip(x, MENU)
    ]

  for name, row, result in zip(SCALED, x, round_static(x)):
    assert_same(result, nearest(name, row))


def test_rounding_is_exact_without_jit():
  x = hard_cases_of_all()
  for name, fmt, row, one_hot in zip(SCALED, MENU, x, ONE_HOTS):
    expected = nearest(name, row)
    row = jnp.asarray(row)
    assert_same(quantize.round_to_grid(row, quantize.grid_of(fmt)), expected)
    selected = quantize.select(MENU, jnp.asarray(one_hot))
    assert_same(quantize.round_to_grid(row, selected), expected)


def test_rounding_is_exact_for_every_bfloat16_input():
  x = np.arange(2**16, dtype=np.uint16).view(ml_dtypes.bfloat16)
  rounded = round_traced(np.tile(x, (len(MENU), 1)))
  for name, result in zip(SCALED, rounded):
    assert_same(result, nearest(name, x.astype(np.float32)))


def test_rounding_twice_is_rounding_once():
  once = round_traced(hard_cases_of_all())
  assert_same(round_traced(once), once)


def test_a_tie_without_mantissa_bits_goes_to_the_larger_magnitude():
  # E3M0 holds 0 and 2**-2 ... 2**4; midpoints of the normal range are 1.5 *
  # 2**e. IEEE 754-2019 4.3.1 has ties go up where neither neighbour is even.
  fmt = formats.parse('E3M0')
  x = np.array([0.375, 0.75, 1.5, 3, 6, -12, 0.125, -0.125], np.float32)
  rounded = quantize.round_to_grid(jnp.asarray(x), quantize.grid_of(fmt))
  expected = np.array([0.5, 1, 2, 4, 8, -16, 0, -0.0], np.float32)
  assert_same(rounded, expected)


def test_nan_stays_infinity_saturates_and_minus_zero_keeps_its_sign():
  x = np.array([np.nan, np.inf, -np.inf, -0.0, 0.0], np.float32)
  rounded = round_traced(np.tile(x, (len(MENU), 1)))
  for fmt, row in zip(MENU, rounded):
    largest = fmt.max_value
    assert_same(row, np.array([np.nan, largest, -largest, -0.0, 0], np.float32))


def test_every_grid_value_is_exact_in_bfloat16():
  for name in SCALED:
    values = exact(magnitudes(name))
    as_bf16 = values.astype(ml_dtypes.bfloat16).astype(np.float64)
    np.testing.assert_array_equal(as_bf16, values)


@pytest.mark.parametrize(
  ('name', 'dtype'),
  [
    ('E2M1', ml_dtypes.float4_e2m1fn),
    ('E2M3', ml_dtypes.float6_e2m3fn),
    ('E3M2', ml_dtypes.float6_e3m2fn),
    ('E3M4', ml_dtypes.float8_e3m4),
    ('E4M3', ml_dtypes.float8_e4m3),
    ('E4M3', ml_dtypes.float8_e4m3fn),
    ('E5M2', ml_dtypes.float8_e5m2),
  ],
)
def test_floats_agree_with_ml_dtypes_within_its_range(name, dtype):
  # Some spend their topmost codes on infinities and NaN; ours do not.
  x = hard_cases(name)
  x = x[np.abs(x) <= float(ml_dtypes.finfo(dtype).max)]
  row = SCALED.index(name)
  rounded = round_traced(np.tile(x, (len(MENU), 1)))[row]
  assert_same(rounded, x.astype(dtype).astype(np.float32))


@pytest.mark.parametrize(
  ('name', 'dtype'),
  [('INT4', ml_dtypes.int4), ('INT8', np.int8)],
)
def test_integers_agree_with_numpy_and_fit_their_storage_type(name, dtype):
  x = hard_cases(name)
  x = x[~np.isnan(x)]
  rounded = quantize.round_to_grid(
    jnp.asarray(x), quantize.grid_of(formats.parse(name))
  )
  largest = ml_dtypes.iinfo(dtype).max
  expected = np.rint(np.clip(x, -largest, largest)).astype(np.float32)
  assert_same(rounded, expected)
  stored = np.asarray(rounded).astype(dtype).astype(np.float32)
  np.testing.assert_array_equal(stored, rounded)


def test_integers_agree_with_aqt():
  numerics = pytest.importorskip('aqt.jax.v2.numerics.int_numerics')
  for bits in range(4, 9):
    theirs = numerics.IntSymmetric(
      bits=bits,
      preserve_zero=True,
      preserve_max_val=True,
      clip=True,
      clip_gradient=True,
      round=True,
      noise_fn=None,
    )
    fmt = formats.parse(f'INT{bits}')
    assert theirs.get_quant_bound() == fmt.max_value
    x = hard_cases(fmt.name)
    x = jnp.asarray(x[~np.isnan(x)])
    expected, _ = theirs.vjp_fwd(x, None)
    rounded = quantize.round_to_grid(x, quantize.grid_of(fmt))
    np.testing.assert_array_equal(rounded, expected)


def test_bf16_is_a_cast_to_bfloat16_with_a_scale_of_one():
  rng = np.random.default_rng(0)
  x = np.exp2(rng.uniform(-119, 127.9, 50_000)).astype(np.float32)
  # Every bfloat16, the midpoints between them, and their neighbours.
  codes = np.arange(2**15, dtype=np.uint16).view(ml_dtypes.bfloat16)
  codes = codes.astype(np.float32).view(np.uint32)
  near = [(codes + i).view(np.float32) for i in (0, 1, 0x7FFF, 0x8000, 0x8001)]
  x = np.concatenate([x, *near])
  x = np.concatenate([x, -x])
  largest = formats.BF16.max_value
  in_range = (np.abs(x) >= BF16_LEAST) & (np.abs(x) <= largest)
  x = np.where(in_range | (x == 0) | np.isnan(x), x, np.float32(1.5))
  with np.errstate(invalid='ignore'):
    expected = x.astype(ml_dtypes.bfloat16).astype(np.float32)
  grid = quantize.grid_of(formats.BF16)
  # The threshold is ignored, whatever it is.
  for threshold in (0.0, 1.0, np.inf, np.nan):
    values, scale = quantize.quantize(
      jnp.asarray(x), grid, jnp.float32(threshold)
    )
    assert_same(values, expected)
    assert scale == 1


def test_bf16_below_its_range_is_a_multiple_of_the_smallest_normal_float():
  smallest = np.float32(2.0**-126)
  multiples = np.arange(128, dtype=np.float32)
  x = np.concatenate([multiples, multiples + 0.25]) * smallest
  rounded = quantize.round_to_grid(
    jnp.asarray(x), quantize.grid_of(formats.BF16)
  )
  # A quarter of it is a denormal, which XLA may or may not flush; either way
  # it rounds to zero.
  assert_same(rounded, np.tile(multiples, 2) * smallest)


def test_values_lie_on_the_grid_and_the_largest_reaches_its_end():
  x = gaussian(seed=1)
  peaks = np.abs(x).max(axis=-1, keepdims=True)
  (values, scales), _ = quantize_traced(x, peaks, np.ones_like(x))
  values, scales = np.asarray(values), np.asarray(scales)
  for name, channels in zip(SCALED, values):
    grid = exact(magnitudes(name))
    assert np.isin(np.abs(channels), grid).all()
    assert (np.abs(channels).max(axis=-1) == grid[-1]).all()
  assert (scales[BF16_ROW] == 1).all()


def test_quantized_tensors_are_those_of_the_plain_definition():
  x = gaussian(seed=2)
  thresholds = np.abs(x).max(axis=-1, keepdims=True) * np.float32(0.7)
  (values, scales), _ = quantize_traced(x, thresholds, np.ones_like(x))
  dequantized = np.asarray(values) * np.asarray(scales)
  for row, fmt in enumerate(MENU[:BF16_ROW]):
    largest_step = 2.0 ** (
      np.floor(np.log2(fmt.max_value)) - fmt.mantissa_bits
    ) * (thresholds[row] / fmt.max_value)
    expected = np.stack(
      [
        clipping.quantize(channel.astype(np.float64), fmt, float(threshold[0]))
        for channel, threshold in zip(x[row], thresholds[row])
      ]
    )
    error = np.abs(dequantized[row] - expected)
    # In float32, x / scale may round across a midpoint: then one step apart.
    one_off = error > 1e-5 * thresholds[row]
    assert one_off.mean() < 1e-3
    assert (error <= 1.01 * largest_step).all()


def test_scales_are_the_same_in_numpy_jit_and_eager():
  rng = np.random.default_rng(3)
  x = gaussian(seed=3)
  exponents = rng.uniform(-20, 31, (*x.shape[:2], 1))
  thresholds = (10.0**exponents).astype(np.float32)
  (_, jitted), _ = quantize_traced(x, thresholds, np.ones_like(x))
  for row, fmt in enumerate(MENU[:BF16_ROW]):
    # One rounding of 1 / max_value, one of the product; within the bounds that
    # keep the scale a normal number.
    bounded = np.clip(thresholds[row], np.float32(1e-18), np.float32(1e30))
    expected = bounded * np.float32(1 / fmt.max_value)
    assert_same(jitted[row], expected)
    eager = quantize.quantize(
      jnp.asarray(x[row]), quantize.grid_of(fmt), jnp.asarray(thresholds[row])
    ).scale
    assert_same(eager, expected)
  assert (jitted[BF16_ROW] == 1).all()

  # XLA makes a product of a division by one number for all channels, but not of
  # a division of two numbers.
  @jax.jit
  def scale_of(one_hot, threshold):
    return quantize.quantize(
      threshold, quantize.select(MENU, one_hot), threshold
    ).scale

  for row, fmt in enumerate(MENU[:BF16_ROW]):
    for threshold in np.float32([0.1, 0.3, 0.7, 1.1, 1.3, 1.7, 1.9, 2.3]):
      expected = threshold * np.float32(1 / fmt.max_value)
      assert scale_of(ONE_HOTS[row], threshold) == expected


def test_the_gradient_is_that_of_the_straight_through_estimator():
  x = gaussian(seed=4)
  peaks = np.abs(x).max(axis=-1, keepdims=True)
  thresholds = peaks * np.float32(0.5)
  rng = np.random.default_rng(4)
  cotangents = rng.standard_normal(x.shape).astype(np.float32)
  (values, scales), (dx, dthreshold) = quantize_traced(
    x, thresholds, cotangents
  )

  @jax.jit
  def reference(x):
    clipped = jnp.where(jnp.abs(x) <= thresholds, x, jnp.sign(x) * thresholds)
    clipped = jnp.concatenate([clipped[:BF16_ROW], x[BF16_ROW:]])
    dequantized = clipped + jax.lax.stop_gradient(values * scales - clipped)
    return jnp.sum(dequantized / scales * cotangents)

  np.testing.assert_allclose(dx, jax.grad(reference)(x), rtol=1e-6)
  # Eq. 11 clips, but the threshold is profiled, not learnt; nor is the scale.
  assert not np.any(dthreshold)
  # The mask, spelt out; BF16 does not clip.
  outside = np.abs(x) > thresholds
  outside[BF16_ROW] = False
  assert 0.1 < outside[:BF16_ROW].mean() < 0.9
  np.testing.assert_array_equal(dx == 0, outside)


def test_the_largest_element_of_an_absmax_threshold_keeps_its_gradient():
  # |x| * (1 / scale) <= max_value would be false, by one ulp, in a fifth of
  # the channels; here are 64 channels by 34 formats by 3 seeds of them.
  for seed in (5, 6, 7):
    x = gaussian(seed)
    peaks = np.abs(x).max(axis=-1, keepdims=True)
    _, (dx, _) = quantize_traced(x, peaks, np.ones_like(x))
    assert np.all(dx)


def test_tiny_zero_and_huge_thresholds_give_no_nan():
  x = gaussian(seed=8)
  x[..., :6] = [0, 1e-45, -1e-30, 1, -1e30, 3e38]
  thresholds = np.ones((*x.shape[:2], 1), np.float32)
  edges = [0, 1e-45, 1e-38, 1e-30, 1e-18, 1e18, 1e30, 1e38, 3.4e38, np.inf]
  thresholds[:, : len(edges), 0] = edges
  (values, scales), (dx, _) = quantize_traced(x, thresholds, np.ones_like(x))
  assert np.isfinite(values).all()
  assert np.isfinite(dx).all()
  # Were a scale denormal, XLA would make it zero and its inverse infinite.
  assert (np.asarray(scales) >= np.finfo(np.float32).tiny).all()
  assert np.isfinite(np.asarray(values) * np.asarray(scales)).all()


def test_one_compilation_serves_all_formats():
  traces = []

  @jax.jit
  def values(one_hot, x, threshold):
    traces.append(None)
    return quantize.quantize(x, quantize.select(MENU, one_hot), threshold)

  x = gaussian(seed=9)[0]
  seen = {np.asarray(values(h, x, 1.0).values).tobytes() for h in ONE_HOTS}
  assert len(traces) == 1
  # E1My is INT(y+2) in another unit: only their scales differ, by 2**(1-y),
  # so no two formats give the same values.
  assert len(seen) == len(MENU)


def test_fake_quant_is_values_times_scale():
  x = jnp.asarray(gaussian(seed=10)[0])
  threshold = jnp.abs(x).max(axis=-1, keepdims=True)
  q = quantize.quantize(x, quantize.grid_of(formats.parse('E3M2')), threshold)
  assert_same(
    quantize.fake_quant(x, 'e3m2', threshold),
    np.asarray(q.values) * np.asarray(q.scale),
  )


def test_unquantized_tensors_have_a_scale_of_one():
  x = jnp.asarray([1.1, np.nan, -0.0])
  q = quantize.unquantized(x)
  assert_same(q.values, x)
  assert q.scale == 1


def test_rescaling_multiplies_by_the_activations_scale_first():
  rng = np.random.default_rng(11)
  y, lhs, rhs = rng.uniform(0.5, 1, (3, 1000)).astype(np.float32)
  scaled = quantize.rescale(jnp.asarray(y), lhs[0], rhs)
  assert_same(scaled, y * lhs[0] * rhs)
  # The test can tell: the other order rounds differently somewhere.
  assert np.any(np.asarray(scaled) != y * (lhs[0] * rhs))
