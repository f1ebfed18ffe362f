"""Clipping thresholds of each format, as multiples of the std (A.2, A.8).

A quantizer clips at `multiple * std` and puts that threshold on the format's
largest value. The std is the tensor's as measured, outliers included. Small
formats need a harder clip than large ones ("Switchable Clipping", section 3),
so there is one multiple per format: the one of least mean squared error.

The table is computed on the tensors of A.8, each divided by its std. It has one
multiple for three outlier rates: none, 1:10000 and 1:1000. The other two rates
of A.8 are printed but left out. At 1:100 the outliers hold 59 % (Gaussian) or
81 % (Laplacian) of the variance and at 1:10 over 94 %: the std measures the
outliers and not the tensor, and the best clip does little but cover them (3.1
std at 1:10 for INT2 and INT8 alike). All five rates would put INT4 at 3.8 and
5.8 std instead of 2.7 and 4.0, and hardly change INT8 (11.1 and 17.4 instead of
11.7 and 18.8).

Table 10b decides between the two. It sweeps the multiple on a ResNet-18, is
best at 3 (68.02) and loses 0.8 points at 5. It does not name the format, but
68.02 is near the paper's INT4 (67.32) and far from its INT8 (70.60), and the
accuracies follow the INT4 error of Gaussian tensors at the three rates we keep
(correlation -0.99), not that at all five (-0.79), nor an INT8 error at any. So
we read "3 to 4 std" as a 4-bit number. More bits can afford to cover the
outliers, and the table does: 12 std and more at INT8. That would cost a tensor
without outliers, whose best INT5 and INT8 are 2.9 and 3.9 std, a threefold and
an eightfold error. So no threshold lies beyond the largest magnitude
(`layers.grids`).
"""

from collections.abc import Sequence
import functools
import json
import math
import numbers
import pathlib

import numpy as np

from fliqs_jax.numerics import formats

DISTRIBUTIONS = ('gaussian', 'laplacian')
ALL_RATES = (0.0, 1e-4, 1e-3, 1e-2, 1e-1)
TABLE_RATES = ALL_RATES[:3]

# 100 tensors, as in A.8. With 10,000 values each has one outlier at the lowest
# rate.
_TENSORS, _VALUES, _SEED = 100, 10_000, 0
# Candidate multiples are powers of 1.01, the same ones for every sample; none
# is below a quarter of the std. Both are our choices.
_RATIO, _LEAST_MULTIPLE = 1.01, 0.25
# `profiled_multiples` takes the first minimum within 10 % of the deepest one.
_TOLERANCE = 1.1
TABLE_PATH = pathlib.Path(__file__).with_name('clipping_table.json')


def multiples(
  name: str | float, menu: Sequence[formats.NumericFormat]
) -> tuple[float, ...]:
  """Returns the clip of each format in `menu`, as a multiple of the std.

  Args:
    name: `absmax` for no clipping (the multiple is inf), `gaussian` or
      `laplacian` for the table, or a positive number, the multiple of every
      format (Table 4: 4).
    menu: [K] formats. The multiple of an unscaled one (BF16) is inf, and so is
      that of one with a strategy, whose threshold has nothing to do with it.

  Raises:
    ValueError: the name is another one, or the table lacks a format.
  """
  is_number = isinstance(name, numbers.Real) and not isinstance(name, bool)
  if name in DISTRIBUTIONS:
    by_format = _table()[name]
  elif name == 'absmax':
    by_format = {fmt.name: math.inf for fmt in menu}
  elif is_number and 0 < name < math.inf:
    by_format = {fmt.name: float(name) for fmt in menu}
  else:
    raise ValueError(
      f'unknown clipping {name!r}; allowed: absmax, '
      f'{", ".join(DISTRIBUTIONS)}, or a positive number of standard deviations'
    )
  clipped = [fmt for fmt in menu if fmt.scaled and not fmt.strategy]
  for fmt in clipped:
    if fmt.name not in by_format:
      raise ValueError(
        f'clipping {name!r} has no multiple for the format {fmt}; it has: '
        f'{", ".join(by_format)}'
      )
  return tuple(by_format[f.name] if f in clipped else math.inf for f in menu)


def profiled_multiples(
  x: np.ndarray, std: float, menu: Sequence[formats.NumericFormat]
) -> np.ndarray:
  """Returns the multiples of `std` that quantize the sample `x` best.

  The candidates reach up to twice the largest magnitude. Beyond it an integer
  only gets coarser, and a float repeats itself: at twice the threshold each
  value has an exponent one lower on the same grid, until it underflows. For the
  same reason the error of a float with enough exponents has a minimum in every
  octave, all about equally deep. We take the first one within 10 % (0.4 dB) of
  the deepest; with the deepest itself E4M3 would change by half an octave
  between two seeds. An integer has one minimum, unless many values coincide.

  Args:
    x: [...] sample of the tensor's values; about 1e5 values are enough.
    std: the standard deviation that the quantizer will multiply, in the units
      of `x`.
    menu: [K] formats.

  Returns:
    [K] multiples of `std`; inf for a format that is not scaled.

  Raises:
    ValueError: `std` or the sample's largest magnitude is not positive and
      finite.
  """
  if not 0 < std < math.inf:
    raise ValueError(f'std={std} must be positive and finite')
  normalised = np.asarray(x, np.float64) / std
  largest = np.abs(normalised).max(initial=0)
  if not 0 < largest < math.inf:
    raise ValueError(
      f'cannot profile a sample whose largest magnitude is {largest * std}; it '
      'must be positive and finite'
    )
  first, last = (
    math.ceil(math.log(bound, _RATIO))
    for bound in (min(_LEAST_MULTIPLE, largest), 2 * largest)
  )
  candidates = _RATIO ** np.arange(first, last + 1)
  scaled = [fmt for fmt in menu if fmt.scaled]
  errors = squared_errors(normalised, scaled, candidates)
  best = iter(candidates[_first_minimum(errors)])
  return np.array([next(best) if fmt.scaled else np.inf for fmt in menu])


def squared_errors(
  x: np.ndarray,
  menu: Sequence[formats.NumericFormat],
  thresholds: np.ndarray,
) -> np.ndarray:
  """Returns the [K, M] mean squared errors of `x` in K formats, M thresholds.

  The result equals `mean((quantize(x, fmt, threshold) - x)**2)`, but does not
  need every value for every threshold. All n magnitudes between two
  neighbouring midpoints of the grid become the same q, with an error of
  `sum(x**2) - 2 q sum(x) + n q**2`. On sorted magnitudes these sums are
  differences of running sums.

  Args:
    x: [...] values.
    menu: [K] scaled formats.
    thresholds: [M] clipping thresholds sigma_t, in the units of `x`.
  """
  magnitudes = np.sort(np.abs(x), axis=None).astype(np.float64)
  sums = np.concatenate([[0.0], np.cumsum(magnitudes)])
  errors = np.empty((len(menu), len(thresholds)))
  for row, fmt in zip(errors, menu):
    grid = _magnitudes(fmt) / fmt.max_value * thresholds[:, None]  # [M, levels]
    ends = np.zeros((len(grid), grid.shape[1] + 1), np.int64)
    ends[:, -1] = magnitudes.size
    # On a midpoint both neighbours are equally wrong: no tie rule is needed.
    ends[:, 1:-1] = np.searchsorted(
      magnitudes, (grid[:, 1:] + grid[:, :-1]) / 2
    )
    row[:] = np.sum(
      grid * (grid * np.diff(ends) - 2 * np.diff(sums[ends])), axis=1
    )
  # Rounding can leave a sum of squares just below zero.
  total = np.dot(magnitudes, magnitudes)
  return np.maximum((errors + total) / magnitudes.size, 0)


def quantize(
  x: np.ndarray, fmt: formats.NumericFormat, threshold: float | np.ndarray
) -> np.ndarray:
  """Returns `x` clipped at `threshold` and rounded to the grid (Eq. 10, 11).

  This is the slow and plain definition, ties to even, against which faster code
  is tested. It uses `frexp` and `ldexp` because they are exact.

  Args:
    x: [...] values.
    fmt: a scaled format.
    threshold: the clipping threshold sigma_t, in the units of `x`, of a shape
      that broadcasts to that of `x`; it is mapped to the format's largest
      value.
  """
  scale = threshold / fmt.max_value
  clipped = np.clip(x / scale, -fmt.max_value, fmt.max_value)
  # The fraction of frexp is in [.5, 1), so its exponent is one too large.
  exponent = np.maximum(np.frexp(clipped)[1] - 1, fmt.min_exponent)
  step = exponent - fmt.mantissa_bits
  return np.ldexp(np.rint(np.ldexp(clipped, -step)), step) * scale


def synthetic(distribution: str, outlier_rate: float) -> np.ndarray:
  """Returns the tensors of A.8, [100, 10000], each divided by its std.

  The outliers have three times the tensor's largest magnitude and a random
  sign. They come first: the values are independent, so the error does not
  depend on their position. The other values are the same at every rate.

  Args:
    distribution: `gaussian` or `laplacian`.
    outlier_rate: share of the values that become outliers, in [0, 1]; a
      multiple of 1e-4.
  """
  rng = np.random.default_rng(_SEED)
  draw = rng.standard_normal if distribution == 'gaussian' else rng.laplace
  x = draw(size=(_TENSORS, _VALUES))
  outliers = round(outlier_rate * _VALUES)
  signs = rng.choice([-1.0, 1.0], size=(_TENSORS, outliers))
  x[:, :outliers] = 3 * np.abs(x).max(axis=1, keepdims=True) * signs
  return x / x.std(axis=1, keepdims=True)


def best_multiples(
  distribution: str,
  menu: Sequence[formats.NumericFormat],
  rates: Sequence[float] = TABLE_RATES,
) -> np.ndarray:
  """Returns the best [K] multiples of K formats for synthetic tensors.

  Every tensor has a std of 1 and every rate as many tensors, so the error of
  the pooled values is the mean over rates of the error relative to the
  variance.

  Args:
    distribution: `gaussian` or `laplacian`.
    menu: [K] formats.
    rates: shares of outliers, in [0, 1].
  """
  pooled = np.stack([synthetic(distribution, rate) for rate in rates])
  return np.round(profiled_multiples(pooled, 1.0, menu), 3)


def table_formats() -> tuple[formats.NumericFormat, ...]:
  """Returns every scaled format there is: INT2..INT8, ExMy of 4 to 8 bits."""
  names = [f'INT{bits}' for bits in range(2, 9)]
  for bits in range(4, 9):
    names += [f'E{x}M{bits - 1 - x}' for x in range(1, bits)]
  return tuple(formats.parse(name) for name in names)


@functools.cache
def _table() -> dict[str, dict[str, float]]:
  return json.loads(TABLE_PATH.read_text('utf-8'))


def _magnitudes(fmt: formats.NumericFormat) -> np.ndarray:
  """Returns the non-negative values of the unscaled grid, in order."""
  exponents = np.arange(fmt.min_exponent, math.frexp(fmt.max_value)[1])
  significands = np.arange(2 ** (fmt.mantissa_bits + 1), dtype=np.float64)
  return np.unique(
    np.ldexp(significands, exponents[:, None] - fmt.mantissa_bits)
  )


def _first_minimum(errors: np.ndarray) -> np.ndarray:
  """Returns the index [K] of the first local minimum near the least one.

  Args:
    errors: [K, M] errors of K formats at M thresholds.
  """
  padded = np.pad(errors, ((0, 0), (1, 1)), constant_values=np.inf)
  is_minimum = (errors <= padded[:, :-2]) & (errors <= padded[:, 2:])
  is_near = errors <= _TOLERANCE * errors.min(axis=1, keepdims=True)
  return np.argmax(is_minimum & is_near, axis=1)
