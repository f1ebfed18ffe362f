"""Best clip (A.8): the threshold of least error, for each number of bits."""

from collections.abc import Mapping, Sequence
import functools
from typing import Any

from matplotlib import figure as figure_lib
import numpy as np

from fliqs_jax.analyses import finding as finding_lib
from fliqs_jax.analyses import synthetic
from fliqs_jax.numerics import clipping
from fliqs_jax.numerics import formats
from fliqs_jax.report import figures

# A.8 says 100 tensors; of 10,000 values each, one is an outlier at the lowest
# rate.
_TENSORS, _VALUES = 100, 10_000
_BITS = (2, 3, 4, 5, 6, 7, 8)
_STEP = 0.05
# Computed for this design by another program, without outliers.
EXPECTED = {
  'gaussian': (1.2, 1.95, 2.5, 2.95, 3.35, 3.7, 4.1),
  'laplacian': (1.4, 2.45, 3.35, 4.2, 4.95, 5.5, 6.0),
}


def thresholds(x: np.ndarray) -> np.ndarray:
  """Returns the [M] candidates, up to the largest magnitude."""
  return _STEP * np.arange(5, np.ceil(np.abs(x).max() / _STEP) + 1)


def squared_errors(x: np.ndarray, candidates: np.ndarray) -> np.ndarray:
  """Returns the [K, M] mean squared errors of INT2 to INT8.

  Args:
    x: [T, N] tensors.
    candidates: [M] thresholds in the units of `x`.
  """
  menu = [formats.parse(f'INT{k}') for k in _BITS]
  return clipping.squared_errors(x, menu, candidates)


def analyse() -> finding_lib.Finding:
  """Returns the best clip of each distribution, rate and number of bits."""
  rows, clean = [], {}
  for distribution, expected in EXPECTED.items():
    rows.append(synthetic.row(distribution, 0, 'expected', _BITS, expected))
    for outliers in synthetic.OUTLIERS:
      x = synthetic.tensors(distribution, outliers, _TENSORS, _VALUES)
      candidates = thresholds(x)
      errors = squared_errors(x, candidates)
      best = candidates[errors.argmin(axis=1)]
      best = [round(float(clip), 2) for clip in best]
      rows.append(
        synthetic.row(distribution, outliers, 'measured', _BITS, best)
      )
      if not outliers:
        clean[distribution] = candidates, errors
  return finding_lib.Finding(
    title='Best clip',
    text=(
      'The clipping threshold of least mean squared error (A.8, Figure 4a), of '
      f'{_TENSORS} tensors of {_VALUES:,} values, in steps of {_STEP}. The '
      'unit is the standard deviation of the tensor without its outliers, so '
      'that it means the same at every rate; A.8 leaves this open.',
      'The expected figures of many bits are those of a single tensor: they '
      'depend on its few largest values. The exact best clips of INT8 are 3.9 '
      '(Gaussian) and 7.0 (Laplacian).',
    ),
    columns=synthetic.columns(_BITS, '.2f'),
    rows=rows,
    verdicts=_verdicts(rows),
    draw=functools.partial(draw, clean),
    caption='Root mean squared error over the threshold, without outliers; a '
    'dot is the best clip, a circle the expected one.',
  )


def _verdicts(rows: Sequence[Mapping[str, Any]]) -> list[str]:
  lines = []
  for distribution in EXPECTED:
    expected, measured, *_ = (
      row for row in rows if row['distribution'] == distribution
    )
    for few, many in ((2, 5), (6, 8)):
      names = [f'INT{k}' for k in range(few, many + 1)]
      apart = max(abs(measured[name] - expected[name]) for name in names)
      lines.append(
        f'{distribution}, INT{few} to INT{many}: at most {apart:.2f} from the '
        'expected figures'
      )
  return lines


def draw(
  clean: Mapping[str, tuple[np.ndarray, np.ndarray]],
) -> figure_lib.Figure:
  """Draws the errors over the thresholds, a pane for each distribution.

  Args:
    clean: {distribution: [M] thresholds, [K, M] mean squared errors}.
  """
  figure = figure_lib.Figure((figures.WIDTH * 0.8, 3.2))
  grid = figure.subplots(1, len(clean), sharey=True)
  tint = figures.palette(f'INT{k}' for k in _BITS)
  for axes, (distribution, (candidates, errors)) in zip(grid, clean.items()):
    rms = np.sqrt(errors)
    for k, curve, expected in zip(_BITS, rms, EXPECTED[distribution]):
      colour = tint[f'INT{k}']
      axes.plot(candidates, curve, color=colour, lw=1.2, label=f'INT{k}')
      best = curve.argmin()
      axes.plot(candidates[best], curve[best], 'o', ms=4, color=colour)
      there = np.interp(expected, candidates, curve)
      ring = dict(ms=8, mfc='none', mew=0.8, color=figures.GREY)
      axes.plot(expected, there, 'o', **ring)
    axes.set_title(distribution, fontsize=8.5, loc='left')
    axes.set(xlabel='threshold, standard deviations', yscale='log')
    axes.yaxis.set_major_formatter('{x:g}')
    axes.tick_params(length=2, which='both')
  grid[0].set(ylabel='rms error, standard deviations')
  grid[-1].legend(frameon=False, loc='center left', bbox_to_anchor=(1.01, 0.5))
  return figure
