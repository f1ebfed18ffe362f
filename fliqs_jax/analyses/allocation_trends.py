"""Allocation trends (A.1, A.7): which layers of found networks get bits."""

from collections.abc import Callable, Mapping, Sequence
import functools
import math
import pathlib
import statistics
from typing import Any

from matplotlib import figure as figure_lib
from matplotlib import ticker
import numpy as np
from scipy import stats

from fliqs_jax.analyses import finding as finding_lib
from fliqs_jax.numerics import formats
from fliqs_jax.report import figures
from fliqs_jax.report import finished_run
from fliqs_jax.runtime import workdir as workdir_lib

_RING = dict(mec=figures.GREY, mew=0.4)
_BINS = 5


def _size(name: str) -> Callable[[Mapping[str, Any]], float]:
  def of(layer: Mapping[str, Any]) -> float:
    size = layer['sizes'].get(name)
    is_open = size is not None and len(size.options) > 1
    if not is_open:
      return math.nan
    return size.share if name == 'output_channels' else float(size.label)

  return of


# {property of a layer: (how it is found, what the paper says of bits over it)}.
TRENDS: dict[str, tuple[Callable[[Mapping[str, Any]], float], str]] = {
  'channels': (_size('output_channels'), 'falls (A.7)'),
  'kernel': (_size('kernel'), 'falls, less clearly (A.7)'),
  'first or last': (
    lambda layer: float(layer['position'] in (0, 1)),
    'rises (A.1)',
  ),
  'position of the others': (
    lambda layer: layer['position'] if 0 < layer['position'] < 1 else math.nan,
    'falls (A.1)',
  ),
  'MACs': (lambda layer: layer['macs'], 'falls: small layers get more (A.1)'),
  'depthwise': (
    lambda layer: float(layer['kind'] == 'depthwise'),
    'rises (A.1)',
  ),
}


def layers(workdir: pathlib.Path) -> list[dict[str, Any]]:
  """Returns the quantized layers of a finished run, with `bits`, `position`.

  Bits are the mean of weights and activations; the position is 0 for the first
  layer of the network and 1 for the last one.
  """
  rows = finished_run.read(workdir).layers
  last = max(len(rows) - 1, 1)
  found = []
  for i, row in enumerate(rows):
    sides = [row[side] for side in finished_run.SIDES if row[side]]
    if sides:
      bits = statistics.fmean(formats.parse(name).bits for name in sides)
      found.append(row | dict(bits=bits, position=i / last))
  return found


def searches(directory: pathlib.Path) -> list[pathlib.Path]:
  """Returns the workdirs of finished searches below a directory.

  Raises:
    ValueError: there is none.
  """
  found = []
  for path in sorted(directory.rglob(workdir_lib.RESULT)):
    beside = path.parent.name
    is_part = beside == workdir_lib.RETRAINED or beside.startswith('uniform_')
    if not is_part and finished_run.read(path.parent).searched_formats:
      found.append(path.parent)
  if not found:
    raise ValueError(
      f'--runs={directory} holds no finished search: a workdir of '
      f'fliqs_jax.main with {workdir_lib.RESULT} and open formats'
    )
  return found


def correlation(x: Sequence[float], y: Sequence[float]) -> float | None:
  """Returns Spearman's rank correlation; None if either is constant."""
  if len(set(x)) < 2 or len(set(y)) < 2:
    return None
  return float(np.corrcoef(stats.rankdata(x), stats.rankdata(y))[0, 1])


def analyse(directory: pathlib.Path) -> finding_lib.Finding:
  """Returns the rank correlations of bits with properties of layers.

  Args:
    directory: a directory with the workdirs of finished searches.

  Raises:
    ValueError: there is none.
  """
  networks = [layers(workdir) for workdir in searches(directory)]
  rows = []
  for name, (value, papers) in TRENDS.items():
    seen = []
    for network in networks:
      known = [x for x in network if math.isfinite(value(x))]
      seen.append(
        correlation([value(x) for x in known], [x['bits'] for x in known])
      )
    values = [one for one in seen if one is not None]
    row: dict[str, Any] = dict(trend=name, paper=papers, runs=len(values))
    if values:
      row |= dict(correlation=statistics.fmean(values))
    if len(values) > 1:
      spread = statistics.stdev(values)
      row |= dict(error=spread / math.sqrt(len(values)))
    rows.append(row)
  return finding_lib.Finding(
    title='Allocation trends',
    text=(
      f'Bits of the layers of {len(networks)} found networks. Spearman’s rank '
      'correlation of a layer’s bits with a property of it, mean over networks '
      'and standard error; a network counts where both vary. Layers that share '
      'a decision are not independent, and networks of one problem are alike.',
    ),
    columns=[
      finding_lib.Column('trend', 'bits over'),
      finding_lib.Column('runs', 'networks', 'd'),
      finding_lib.Column('correlation', 'rank correlation', '+.2f', 'error'),
      finding_lib.Column('paper', 'the paper'),
    ],
    rows=rows,
    verdicts=[_verdict(row) for row in rows if row['runs']],
    draw=functools.partial(draw, networks),
    caption='A dot is a layer of a found network, a line the mean.',
  )


def _verdict(row: Mapping[str, Any]) -> str:
  value, error = row['correlation'], row.get('error')
  sign = 1 if row['paper'].startswith('rises') else -1
  is_certain = error is not None and abs(value) > 2 * error
  if not is_certain:
    return f'{row["trend"]}: no trend beyond two standard errors'
  agrees = 'as' if sign * value > 0 else 'NOT as'
  return f'{row["trend"]}: {agrees} in the paper'


def draw(networks: Sequence[Sequence[Mapping[str, Any]]]) -> figure_lib.Figure:
  """Draws bits over each property that varies, a pane for each."""
  pooled = [layer for network in networks for layer in network]
  panes = {}
  for name, (value, _) in TRENDS.items():
    known = [(value(x), x) for x in pooled if math.isfinite(value(x))]
    if len({v for v, _ in known}) > 1:
      panes[name] = known
  figure = figure_lib.Figure((2.4 * max(len(panes), 1), 2.6))
  grid = figure.subplots(1, max(len(panes), 1), sharey=True, squeeze=False)[0]
  rng = np.random.default_rng(0)  # Dots beside each other can be told apart.
  for axes, (name, known) in zip(grid, panes.items()):
    at = np.array([v for v, _ in known])
    bits = np.array([layer['bits'] for _, layer in known])
    noise = rng.uniform(-0.12, 0.12, bits.size)
    axes.plot(at, bits + noise, 'o', ms=3, alpha=0.5, color='#4c8dc4', **_RING)
    axes.plot(*_means(at, bits), color='#dc5c4c', marker='_', ms=10, lw=1.2)
    axes.set(xlabel=name)
    if name == 'MACs':
      axes.set(xscale='log')
      axes.xaxis.set_major_formatter(ticker.EngFormatter())
      axes.xaxis.set_minor_formatter(ticker.NullFormatter())
    axes.tick_params(length=2)
  grid[0].set(ylabel='bits')
  return figure


def _means(at: np.ndarray, bits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns mean bits over each value, or over fifths of many values."""
  values, group = np.unique(at, return_inverse=True)
  if len(values) > 2 * _BINS:
    edges = np.quantile(at, np.linspace(0, 1, _BINS + 1)[1:-1])
    group = np.searchsorted(edges, at, side='right')
  groups = np.unique(group)
  return (
    np.array([at[group == g].mean() for g in groups]),
    np.array([bits[group == g].mean() for g in groups]),
  )
