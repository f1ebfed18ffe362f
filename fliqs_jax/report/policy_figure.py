"""Figure of the probabilities of a policy over the steps, by decision."""

from collections.abc import Mapping, Sequence
import math
from typing import Any

from matplotlib import figure as figure_lib
from matplotlib import patches
from matplotlib import patheffects
import numpy as np

from fliqs_jax.report import figures


def policy(
  history: Sequence[Mapping[str, Any]],
  decisions: Mapping[str, Mapping[str, Any]],
  tint: Mapping[str, str],
) -> figure_lib.Figure:
  """Draws the probabilities of each decision's options over the steps.

  Args:
    history: rows with `step` and `policy`, {decision: probabilities [K]}.
    decisions: {name: mapping with `kind` and `options`}.
    tint: {format: colour}; sizes have other colours.
  """
  few = len(decisions) <= 12
  # As many panes in a row as there is space for their names.
  letters = max(map(len, decisions))
  across = min(6, max(4, int(figures.WIDTH / (letters * 0.0564 + 0.25))))
  across = min(len(decisions), 4 if few else across)
  down = math.ceil(len(decisions) / across)
  pane = figures.WIDTH / max(across, 3)
  figure = figure_lib.Figure((pane * across, (1.3 if few else 1.0) * down))
  figure.subplots_adjust(0, 0, 1, 1, 0.1, 0.36)
  grid = figure.subplots(down, across, squeeze=False).flat
  # More points than pixels would only cost time.
  stride = max(1, math.ceil(len(history) / 120))
  rows = [*history[:-1:stride], history[-1]]
  steps = [row['step'] for row in rows]
  tints = _tints(decisions, tint)
  for i, ((name, decision), axes) in enumerate(zip(decisions.items(), grid)):
    bands = np.array([row['policy'][name] for row in rows], float).T
    axes.stackplot(steps, bands, colors=tints[name], linewidth=0)
    axes.set(xlim=(steps[0], steps[-1]), ylim=(0, 1), yticks=(0, 0.5, 1))
    title = figures.fit(name, pane - 0.15, 7)
    axes.set_title(title, fontsize=7, loc='left', pad=3)
    axes.locator_params('x', nbins=3)
    axes.tick_params(
      length=2,
      labelleft=i % across == 0,
      labelbottom=i + across >= len(decisions),
    )
    last = bands[:, -1]
    best = int(last.argmax())
    colour = tints[name][best]
    axes.text(
      0.96,
      min(0.9, max(0.1, last[:best].sum() + last[best] / 2)),
      f'{_label(decision, best)} {last[best]:.2f}',
      transform=axes.get_yaxis_transform(),
      ha='right',
      va='center_baseline',
      fontsize=7,
      color=figures.ink_on(colour),
      # The outline makes the text readable on a narrow band.
      path_effects=[patheffects.withStroke(linewidth=2.5, foreground=colour)],
    )
  for axes in grid:  # The unused panes.
    axes.set_axis_off()
  for k, handles in enumerate(_keys(decisions, tint)):
    figures.key(figure, handles, lift=0.22 + 0.2 * k)
  return figure


def _of_kind(
  decisions: Mapping[str, Mapping[str, Any]], kind: str
) -> list[Mapping[str, Any]]:
  return [d for d in decisions.values() if d['kind'] == kind]


def _kernels(decisions: Mapping[str, Mapping[str, Any]]) -> dict[int, str]:
  sizes = (size for d in _of_kind(decisions, 'kernel') for size in d['options'])
  return figures.kernel_palette(sizes)


def _tints(
  decisions: Mapping[str, Mapping[str, Any]], tint: Mapping[str, str]
) -> dict[str, list[str]]:
  """Returns {decision: colours of its options}."""
  kernels = _kernels(decisions)
  result = {}
  for name, decision in decisions.items():
    options = decision['options']
    # Decisions have different numbers of channels, so a shade shows the rank.
    by_rank = dict(zip(sorted(options), figures.shades(len(options))))
    scale = {'format': tint, 'kernel': kernels}.get(decision['kind'], by_rank)
    result[name] = [scale[option] for option in options]
  return result


def _label(decision: Mapping[str, Any], option: int) -> str:
  name = decision['options'][option]
  return f'{name}×{name}' if decision['kind'] == 'kernel' else str(name)


def _keys(
  decisions: Mapping[str, Mapping[str, Any]], tint: Mapping[str, str]
) -> list[list[patches.Patch]]:
  """Returns the legends of formats, of kernels and of channels."""
  used = {n for d in _of_kind(decisions, 'format') for n in d['options']}
  keys = [[patches.Patch(color=tint[n], label=n) for n in tint if n in used]]
  keys.append(
    [
      patches.Patch(color=colour, label=f'{size}×{size}')
      for size, colour in _kernels(decisions).items()
    ]
  )
  counts = [len(d['options']) for d in _of_kind(decisions, 'channels')]
  if counts:
    labels = ['fewest channels', *[''] * (max(counts) - 2), 'most channels']
    keys.append(
      [
        patches.Patch(color=colour, label=label)
        for colour, label in zip(figures.shades(max(counts)), labels)
      ]
    )
  return [handles for handles in keys if handles]
