"""The picture of a sensitivity table: cells, columns and panes."""

import numpy as np
import pytest

from fliqs_jax.report import figures
from fliqs_jax.report import sensitivity_figure

_MENU = ['INT8', 'INT2', 'BF16', 'E4M3', 'INT4']


def _formats(count):
  return {
    f'stage{i}/conv': dict(
      kind='format',
      options=_MENU,
      anchor='BF16',
      scores=[1e-4, 1.0, 0, -2, 0.1],
    )
    for i in range(count)
  }


def test_columns_go_from_few_bits_to_many():
  columns = sensitivity_figure.columns(_formats(2))
  # E4M3 has 3 bits of mantissa, INT8 more.
  assert columns == ['INT2', 'INT4', 'E4M3', 'INT8', 'BF16']


@pytest.mark.parametrize(('count', 'rows'), [(10, [10]), (60, [30, 30])])
def test_every_score_is_in_its_cell(count, rows):
  figure = sensitivity_figure.sensitivity(_formats(count), 'fisher')
  *panes, bar = figure.axes
  assert [len(axes.get_yticks()) for axes in panes] == rows
  assert bar.get_title(loc='left') == 'fisher'
  for axes in panes:
    texts = {t.get_position(): t.get_text() for t in axes.texts}
    assert [texts[x, 0] for x in range(5)] == [
      '1.0e+00',
      '1.0e-01',
      '-2.0e+00',
      '1.0e-04',
      '•',
    ]
    shades = axes.images[0].get_array()
    # The negative score and the anchor have no shade.
    np.testing.assert_array_equal(
      shades.mask[0], [False, False, True, False, True]
    )


def test_sizes_are_a_pane_of_their_own():
  decisions = _formats(1) | {
    'stage/channels': dict(
      kind='channels', options=[16, 8], anchor=16, scores=[0, 0.5]
    )
  }
  figure = sensitivity_figure.sensitivity(decisions, 'loss')
  *_, sizes, _ = figure.axes
  assert [t.get_text() for t in sizes.texts] == ['16: •', '8: 5.0e-01']
  assert [t.get_position()[0] for t in sizes.texts] == [1, 0]


def test_a_table_of_zeros_is_drawn():
  decisions = {
    'a': dict(
      kind='format', options=['INT4', 'INT8'], anchor='INT8', scores=[0, 0]
    )
  }
  images = figures.pngs(lambda: sensitivity_figure.sensitivity(decisions, 'kl'))
  for image in images:
    assert image.startswith(b'\x89PNG')
