"""Thresholds of DQSS's candidates against plain NumPy, written in loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fliqs_jax.numerics import formats
from fliqs_jax.numerics import quantize
from fliqs_jax.numerics import strategies

_kl = jax.jit(strategies.kl, static_argnums=1)
_admm = jax.jit(strategies.admm, static_argnums=(2, 3))


def _activations(seed=0):
  """Activations [256, 64] behind a ReLU, with outliers."""
  rng = np.random.default_rng(seed)
  x = np.maximum(rng.laplace(size=(256, 64)), 0)
  x.ravel()[rng.choice(x.size, 40, replace=False)] *= 6
  return x.astype(np.float32)


def _plain_kl(x, bits, bins=2048):
  """TensorRT's calibration as MNN and ncnn write it; returns the threshold."""
  magnitudes = np.abs(x).ravel().astype(np.float64)
  largest = magnitudes.max()
  histogram = np.zeros(bins)
  # Division and product in float32: a float64 would put some into another bin.
  places = np.float32(magnitudes) / np.float32(largest) * np.float32(bins)
  for place in places[magnitudes > 0].astype(int):
    histogram[min(place, bins - 1)] += 1
  groups = 2 ** (bits - 1)
  best, best_bins = np.inf, None
  for kept in range(groups, bins):
    reference = histogram[:kept].copy()
    reference[-1] += histogram[kept:].sum()
    width = kept / groups
    expanded = np.zeros(kept)
    for g in range(groups):
      start, end = g * width, (g + 1) * width
      j = np.arange(int(start), min(int(np.ceil(end)), kept))
      share = np.minimum(end, j + 1) - np.maximum(start, j)
      counts = histogram[j]
      filled = share * (counts > 0)
      if filled.sum() > 0:
        expanded[j] += filled * (share * counts).sum() / filled.sum()
    p, q = reference / reference.sum(), expanded / expanded.sum()
    terms = np.where(
      q > 0,
      p * np.log(np.where(q > 0, p / np.where(q > 0, q, 1), 1) + (p == 0)),
      1.0,
    )
    divergence = terms[p > 0].sum()
    if divergence < best:
      best, best_bins = divergence, kept
  return (best_bins + 0.5) * largest / bins


def _plain_admm(x, most, divisor):
  scale = np.abs(x).max() / (divisor * most)
  for _ in range(300):
    q = np.clip(np.round(x / scale), -most, most)
    after = (q * x).sum() / ((q * q).sum() + 1e-9)
    if abs(after - scale) <= 1e-6 * scale:
      return after * most
    scale = after
  return scale * most


def _plain_quantized(x, threshold, most):
  scale = threshold / most
  return np.clip(np.round(x / scale), -most, most) * scale


def _cosines(y, exact):
  """Cosine of each row of [N, M] arrays."""
  norms = np.linalg.norm(y, axis=1) * np.linalg.norm(exact, axis=1)
  return (y * exact).sum(1) / np.where(norms > 0, norms, 1)


def _first_best(scores):
  """Number of the first score that is the best one, but for rounding."""
  return int(np.argmax(np.array(scores) >= max(scores) - 1e-6))


def _plain_eq(x, w, most, x_start, w_start):
  """EasyQuant of a dense layer: x [N, T, C], w [C, D]; returns thresholds."""
  exact = x @ w
  x_threshold, w_threshold, before = x_start, w_start, -np.inf
  multiples = np.linspace(0.5, 2, 100)
  for _ in range(3):
    x_q = _plain_quantized(x, x_threshold, most)
    new = np.empty_like(w_start)
    for c in range(w.shape[1]):
      scores = []
      for m in multiples:
        y = x_q @ _plain_quantized(w[:, c], m * w_start[c], most)
        scores.append(_cosines(y, exact[:, :, c]).mean())
      new[c] = multiples[_first_best(scores)] * w_start[c]
    w_q = _plain_quantized(w, new, most)
    scores = []
    for m in multiples:
      y = _plain_quantized(x, m * x_start, most) @ w_q
      scores.append(
        _cosines(y.reshape(len(y), -1), exact.reshape(len(y), -1)).mean()
      )
    if max(scores) <= before + 1e-6:
      break
    before, w_threshold = max(scores), new
    x_threshold = multiples[_first_best(scores)] * x_start
  return x_threshold, w_threshold


@pytest.mark.parametrize('bits', [4, 8])
def test_kl_is_the_calibration_of_the_tools_that_it_comes_from(bits):
  x = _activations()
  ratio = _kl(x, formats.parse(f'INT{bits}'))
  assert float(ratio) * x.max() == pytest.approx(_plain_kl(x, bits), rel=1e-3)
  assert 0.02 < float(ratio) < 0.9  # It clips, or the comparison says nothing.


def test_kl_of_few_or_equal_values_is_the_largest_magnitude():
  int8 = formats.parse('INT8')
  assert _kl(jnp.linspace(-1, 3, 99), int8) == 1
  assert _kl(jnp.zeros(500), int8) == 1
  assert _kl(jnp.full(500, -2.0), int8) == 1


def test_kl_does_not_clip_few_different_numbers_at_the_first_of_them():
  # 100 magnitudes, which fill 100 of 2,048 bins. If only one of them is kept,
  # the histogram is merged without loss: the divergence is zero.
  x = jnp.round(100 * jnp.sin(jnp.arange(5000.0)))
  assert _kl(x, formats.parse('INT4')) > 0.5


def test_kl_does_not_keep_the_background_of_images_alone():
  # Half of the numbers are 0.02, the others lie between 0 and 4.
  rng = np.random.default_rng(0)
  x = np.float32(rng.uniform(0, 4, 20_000))
  x[:10_000] = 0.02
  assert _kl(jnp.asarray(x), formats.parse('INT4')) > 0.4


@pytest.mark.parametrize('bits', [4, 8])
def test_admm_converges_to_the_scale_of_the_plain_iteration(bits):
  most = 2 ** (bits - 1) - 1
  grid = quantize.grid_of(formats.parse(f'INT{bits}'))
  x = _activations().astype(np.float64)
  w = np.random.default_rng(1).normal(size=(64, 16))
  ratio = _admm(jnp.float32(x), grid, (0, 1), strategies.ACTIVATIONS_START)
  assert ratio.shape == (1, 1)
  assert float(ratio[0, 0]) * x.max() == pytest.approx(
    _plain_admm(x, most, 2.5), rel=1e-3
  )
  ratios = _admm(jnp.float32(w), grid, (0,), strategies.WEIGHTS_START)
  expected = [_plain_admm(column, most, 1.25) for column in w.T]
  np.testing.assert_allclose(ratios[0] * np.abs(w).max(0), expected, rtol=1e-3)


def test_admm_of_a_channel_of_zeros_is_the_largest_magnitude():
  x = jnp.stack([jnp.zeros(9), jnp.linspace(-1, 1, 9)], axis=1)
  ratios = _admm(x, quantize.grid_of(formats.parse('INT4')), (0,), 1.25)
  assert ratios[0, 0] == 1
  assert jnp.isfinite(ratios).all()


def _quantized(x, peak, fmt, ratio):
  return quantize.quantize(x, quantize.grid_of(fmt), ratio * peak)


@pytest.mark.parametrize('bits', [4, 8])
def test_eq_is_the_search_of_easyquant_channel_by_channel(bits):
  most, fmt = 2 ** (bits - 1) - 1, formats.parse(f'INT{bits}')
  rng = np.random.default_rng(2)
  x = _activations(3)[:60, :24].reshape(10, 6, 24)
  w = rng.normal(size=(24, 3)).astype(np.float32)
  w[0, 0] = 9.0  # An outlier, which a good threshold clips.
  peak_x, peak_w = x.max(), np.abs(w).max(0, keepdims=True)

  def product(a, b):
    y = jnp.einsum('ntc,cd->ntd', a.values, b.values)
    return y * a.scale * (b.scale[None] if b.scale.ndim else b.scale)

  ratio, ratios = jax.jit(
    lambda x, w: strategies.eq(
      product,
      x,
      w,
      (
        functools.partial(_quantized, x, peak_x, fmt),
        functools.partial(_quantized, w, peak_w, fmt),
      ),
      (jnp.float32(0.5), jnp.ones((1, 3))),
      has_examples=True,
    )
  )(x, w)
  expected_x, expected_w = _plain_eq(
    x.astype(np.float64), w.astype(np.float64), most, 0.5 * peak_x, peak_w[0]
  )
  assert float(ratio) * peak_x == pytest.approx(expected_x, rel=1e-3)
  np.testing.assert_allclose((ratios * peak_w)[0], expected_w, rtol=1e-3)


def test_no_strategy_is_always_the_best():
  # With outliers KL is the worst at 8 bits, the maximum at 4.
  x = _activations()
  errors = {}
  for bits in (4, 8):
    fmt = formats.parse(f'INT{bits}')
    grid = quantize.grid_of(fmt)
    ratios = dict(
      max_abs=1.0,
      kl=_kl(x, fmt),
      admm=_admm(x, grid, (0, 1), strategies.ACTIVATIONS_START)[0, 0],
    )
    for name, ratio in ratios.items():
      q = quantize.fake_quant(x, fmt.name, ratio * x.max())
      errors[bits, name] = float(jnp.mean((q - x) ** 2))
  assert errors[4, 'max_abs'] == max(v for k, v in errors.items() if k[0] == 4)
  assert errors[8, 'kl'] == max(v for k, v in errors.items() if k[0] == 8)
