"""Crops of test pictures side by side, from the workdirs of networks."""

from collections.abc import Mapping, Sequence
import os
import pathlib
import zipfile

from matplotlib import figure as figure_lib
import numpy as np

from fliqs_jax.report import figures
from fliqs_jax.report import number_text
from fliqs_jax.runtime import workdir as workdir_lib
from fliqs_jax.tasks import super_resolution

_FLOAT = 'BF16'
_LINE = 0.22  # Inches, of a text.
_SIZE = 1.9  # Inches, the largest height of a crop.


def read(
  workdir: str | os.PathLike[str], references: Sequence[str]
) -> dict[str, np.ndarray]:
  """Returns pictures by title, in the order in which they are shown.

  Args:
    workdir: path of a run's workdir.
    references: names of the other networks, of which workdirs are inside.

  Returns:
    {title: uint8 [N, H, W, 3]}: the input enlarged, each network from floats to
    few bits, and last the target. {} if the run has no pictures.

  Raises:
    ValueError: a file is damaged; the message names it.
  """
  found = _stored(pathlib.Path(workdir))
  if not found:
    return {}
  target = found['target']
  networks = {'found': found['made']}
  for name in references:
    stored = _stored(pathlib.Path(workdir, workdir_lib.reference(name)))
    if stored and np.array_equal(stored['target'], target):
      networks[name] = stored['made']
  first = {k: networks.pop(k) for k in (_FLOAT,) if k in networks}
  low = found['low'].astype(np.float32) / 255
  enlarged = super_resolution.bicubic(low, target.shape)
  enlarged = np.asarray(super_resolution.quantized(enlarged), np.uint8)
  return dict(bicubic=enlarged, **first, **networks, target=target)


def _stored(workdir: pathlib.Path) -> dict[str, np.ndarray]:
  path = workdir / workdir_lib.PICTURES
  if not path.exists():
    return {}
  try:
    with path.open('rb') as file, np.load(file, allow_pickle=False) as stored:
      return {name: stored[name] for name in ('low', 'made', 'target')}
  except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
    raise ValueError(
      f'{path} is damaged: {error}; delete it, and the report has no pictures'
    ) from error


def pictures(shown: Mapping[str, np.ndarray], scale: int) -> figure_lib.Figure:
  """Draws a row for each picture, and the PSNR of the luma below each crop.

  Args:
    shown: {title: uint8 [N, H, W, 3]}; the last one is the target.
    scale: factor of enlargement, the width of the border that does not count.
  """
  *made, last = shown
  target = shown[last]
  across, down = len(shown), len(target)
  size = min(_SIZE, figures.WIDTH / across)
  height = down * size + (down - 1) * _LINE
  figure = figure_lib.Figure((size * across, height))
  figure.subplots_adjust(0, 0, 1, 1, wspace=0.03, hspace=_LINE / size)
  grid = figure.subplots(down, across, squeeze=False)
  inside = slice(scale, -scale)
  for column, name in enumerate(shown):
    grid[0, column].set_title(
      name, fontsize=8.5, fontweight='bold' if name == 'found' else 'normal'
    )
    values = _psnr(shown[name], target, inside) if name in made else None
    for row, axes in enumerate(grid[:, column]):
      axes.imshow(shown[name][row], interpolation='nearest')
      axes.set(xticks=[], yticks=[])
      axes.spines[:].set_visible(False)
      if values is not None:
        axes.set_xlabel(number_text.quality(values[row], 'PSNR'), labelpad=2)
  return figure


def _psnr(made: np.ndarray, target: np.ndarray, inside: slice) -> list[float]:
  both = [
    super_resolution.luma(x[:, inside, inside].astype(np.float32))
    for x in (made, target)
  ]
  return np.asarray(super_resolution.psnr(*both)).tolist()
