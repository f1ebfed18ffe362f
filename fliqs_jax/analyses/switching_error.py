"""Switching error (Figure 4a, Eq. 5): what a change of the format changes."""

from collections.abc import Mapping, Sequence
import functools
from typing import Any

from matplotlib import figure as figure_lib
import numpy as np
from scipy import optimize

from fliqs_jax.analyses import finding as finding_lib
from fliqs_jax.analyses import synthetic
from fliqs_jax.numerics import clipping
from fliqs_jax.numerics import formats
from fliqs_jax.report import figures

# A.8 says 1000 tensors. Of 1000 values each: without outliers the largest
# magnitude, and with it the error, grows with their number.
_TENSORS, _VALUES = 1000, 1000
_BITS = (2, 3, 4, 5, 6, 7)
_OTHER = 'INT8'
# Computed for this design by another program, without outliers.
EXPECTED = {
  'gaussian': (0.867, 0.331, 0.142, 0.0667, 0.0330, 0.0180),
  'laplacian': (0.896, 0.462, 0.214, 0.102, 0.0505, 0.0285),
}
ACCEPTED = 0.03  # Relative difference from the expected figures.


def errors(
  x: np.ndarray, bits: Sequence[int] = _BITS, other: str = _OTHER
) -> np.ndarray:
  """Returns the rms of Q(x; k) - Q(x; other) for each k, mean over tensors.

  Both formats have one threshold, the largest magnitude of the tensor.

  Args:
    x: [T, N] tensors.
    bits: [K] numbers of bits.
    other: name of the format that is switched to.

  Returns:
    [K] errors in the units of `x`.
  """
  threshold = np.abs(x).max(axis=1, keepdims=True)
  there = clipping.quantize(x, formats.parse(other), threshold)
  apart = (
    clipping.quantize(x, formats.parse(f'INT{k}'), threshold) - there
    for k in bits
  )
  return np.array([np.sqrt((d**2).mean(axis=1)).mean() for d in apart])


def fitted(bits: Sequence[int], values: np.ndarray) -> tuple[float, ...]:
  """Returns A, B, C of the best A exp(-B k) + C, of least squares.

  Args:
    bits: [K] numbers of bits k.
    values: [K] errors.
  """
  found, _ = optimize.curve_fit(_curve, bits, values, p0=(values[0], 1.0, 0.0))
  return tuple(float(number) for number in found)


def _curve(k, a, b, c):
  return a * np.exp(-b * np.asarray(k)) + c


def analyse() -> finding_lib.Finding:
  """Returns the error of each distribution, rate of outliers and format."""
  rows = []
  for distribution, expected in EXPECTED.items():
    rows.append(synthetic.row(distribution, 0, 'expected', _BITS, expected))
    for outliers in synthetic.OUTLIERS:
      x = synthetic.tensors(distribution, outliers, _TENSORS, _VALUES)
      measured = errors(x)
      row = synthetic.row(distribution, outliers, 'measured', _BITS, measured)
      rows.append(row | dict(zip('ABC', fitted(_BITS, measured))))
  return finding_lib.Finding(
    title='Switching error',
    text=(
      'The rms of Q(x; k) - Q(x; 8) under one threshold, the largest magnitude '
      'of the tensor, outliers included: what a step sees that changes a layer '
      f'from k bits to INT8 (Eq. 5, Figure 4a, A.8). Mean over {_TENSORS} '
      f'tensors of {_VALUES} values, in standard deviations of the tensor '
      'without its outliers; A exp(-B k) + C is fitted to it.',
      'With an outlier in each tensor, few bits round nearly everything else '
      'to zero: the error ends at one standard deviation, and is no '
      'exponential.',
    ),
    columns=[
      *synthetic.columns(_BITS, '.4f'),
      *(finding_lib.Column(name, name, '.3f') for name in 'ABC'),
    ],
    rows=rows,
    verdicts=_verdicts(rows),
    draw=functools.partial(draw, rows),
    caption='Switching error over the bits: dots are measured, curves the '
    'fitted A exp(-B k) + C, circles the expected figures without outliers.',
  )


def _of(
  rows: Sequence[Mapping[str, Any]], distribution: str, source: str
) -> list[Mapping[str, Any]]:
  return [
    row
    for row in rows
    if row['distribution'] == distribution and row['source'] == source
  ]


def _verdicts(rows: Sequence[Mapping[str, Any]]) -> list[str]:
  lines = []
  for distribution in EXPECTED:
    (expected,) = _of(rows, distribution, 'expected')
    measured = _of(rows, distribution, 'measured')[0]
    names = [f'INT{k}' for k in _BITS]
    apart = max(abs(measured[n] / expected[n] - 1) for n in names)
    lines.append(
      f'{distribution}: at most {apart:.1%} from the expected figures, '
      f'{"within" if apart <= ACCEPTED else "NOT within"} {ACCEPTED:.0%}'
    )
  return lines


def draw(rows: Sequence[Mapping[str, Any]]) -> figure_lib.Figure:
  """Draws the errors over the bits, a pane for each distribution."""
  figure = figure_lib.Figure((figures.WIDTH * 0.8, 3.0))
  grid = figure.subplots(1, len(EXPECTED), sharey=True)
  colours = figures.shades(len(synthetic.OUTLIERS))
  fine = np.linspace(_BITS[0], _BITS[-1], 100)
  for axes, distribution in zip(grid, EXPECTED):
    for row, colour in zip(_of(rows, distribution, 'measured'), colours):
      look = dict(
        color=colour, label=row['outliers'], mec=figures.GREY, mew=0.4
      )
      axes.plot(fine, _curve(fine, row['A'], row['B'], row['C']), color=colour)
      axes.plot(_BITS, [row[f'INT{k}'] for k in _BITS], 'o', ms=4, **look)
    (expected,) = _of(rows, distribution, 'expected')
    values = [expected[f'INT{k}'] for k in _BITS]
    ring = dict(ms=8, mfc='none', mew=0.8, label='expected')
    axes.plot(_BITS, values, 'o', color=figures.GREY, **ring)
    axes.set_title(distribution, fontsize=8.5, loc='left')
    axes.set(xlabel='bits k')
    axes.tick_params(length=2)
  grid[0].set(ylabel='switching error, standard deviations')
  grid[-1].legend(title='outliers', frameon=False)
  return figure
