"""The report of a run that found channels and kernels: what is said of them."""

import html
import json
import math
import re

from matplotlib import colors
from matplotlib import patches
import pytest

from fliqs_jax.numerics import formats
from fliqs_jax.report import allocation_figure
from fliqs_jax.report import architecture_figure
from fliqs_jax.report import figures
from fliqs_jax.report import finished_run
from fliqs_jax.report import policy_figure
from tests.report import finished


@pytest.fixture(scope='module', name='sized')
def _sized(tmp_path_factory):
  """The directory and the page of a run with sizes."""
  directory = tmp_path_factory.mktemp('sized')
  return directory, finished.page(directory, finished.sized_files())


def _read(directory, files):
  return finished_run.read(finished.write(directory, files))


def _row(page, path):
  """Returns the texts of a layer's cells in the table."""
  row = re.search(f'<td class=left>{path}</td>.*', page)[0]
  return [re.sub('<[^>]*>', '', cell) for cell in row.split('</td>')]


def test_a_search_of_sizes_has_two_pictures_more(sized):
  directory, page = sized
  assert {path.stem for path in directory.glob('*.png')} == {
    'architecture',
    'allocation',
    'policy',
    'policy_of_sizes',
    'curves',
    'cost_per_layer',
    'pareto',
  }
  # Each embedded in light and in dark.
  assert page.count('data:image/png;base64') == 14


@pytest.mark.usefixtures('empty_pictures')
def test_a_search_of_formats_has_none_of_it(tmp_path):
  page = finished.page(tmp_path, finished.files())
  table = page[page.index('<h2>Layers') :]
  assert not (tmp_path / 'policy_of_sizes.png').exists()
  assert not (tmp_path / 'allocation.png').exists()
  assert '<th>channels</th>' not in table
  assert '<th>kernel</th>' not in table


def test_the_page_counts_decisions_by_kind(sized):
  _, page = sized
  # Four quantized layers; two widths and a kernel.
  counts = 'over 7 decisions: 4 of formats, 2 of channels, 1 of kernels'
  assert counts in page


def test_the_table_has_channels_kernels_and_their_probabilities(sized):
  _, page = sized
  cells = _row(page, 'block/expand')
  assert '16 → 96 0.960' in cells  # Six times 16.
  assert '96 → 32 0.990' in _row(page, 'block/project')
  cells = _row(page, 'block/middle')
  assert '96 0.960' in cells
  assert '5×5 0.700' in cells
  assert page.count('<span class="warn open">') == 1
  assert cells[-2] == '1.000'  # Of the format, which is another decision.
  assert '1 of 7 decisions are unsettled' in page
  assert 'none of their formats or sizes' in page


def test_sizes_are_joined_to_their_decisions(tmp_path):
  run = _read(tmp_path, finished.sized_files())
  layers = {layer['path']: layer for layer in run.layers}
  middle = layers['block/middle']['sizes']
  assert middle['output_channels'] == finished_run.Size(
    count=96,
    decision='first/channels',
    label=16,
    options=(8, 16, 32),
    probability=0.96,
  )
  assert middle['output_channels'].share == 16 / 32
  assert layers['block/project']['sizes']['output_channels'].share == 1
  assert layers['stem']['sizes'] == {}
  # What decides about sizes says nothing of formats.
  chances = [layer['probabilities'] for layer in run.layers]
  assert chances == [{'weights': 1}] * 4 + [{}]


def test_sizes_come_after_formats_channels_first(tmp_path):
  run = _read(tmp_path, finished.sized_files())
  assert list(run.searched_sizes) == [
    'first/channels',
    'last/channels',
    'block/kernel',
  ]
  assert set(run.searched) == {*run.searched_formats, *run.searched_sizes}


@pytest.mark.slow
def test_a_probability_that_is_not_finite_is_a_dash(tmp_path):
  files = finished.sized_files()
  decisions = files['result.json']['decisions']
  decisions['first/channels']['probabilities'] = [0.1, math.nan, 0.1]
  page = finished.page(tmp_path, files)
  assert '16 → 96 –' in _row(page, 'block/expand')
  assert 'nan' not in re.sub('base64,[^"]*', '', page).lower()


@pytest.mark.usefixtures('empty_pictures')
@pytest.mark.slow
def test_sizes_of_an_unknown_decision_are_still_shown(tmp_path):
  files = finished.sized_files()
  for row in files['result.json']['layers']:
    row.pop('decided', None)
  page = finished.page(tmp_path, files)
  assert '16 → 96' in _row(page, 'block/expand')
  # Nobody knows what there was to pick from.
  assert not (tmp_path / 'allocation.png').exists()


def test_a_size_that_follows_no_listed_decision_is_refused(tmp_path):
  files = finished.sized_files()
  del files['result.json']['decisions']['block/kernel']
  with pytest.raises(ValueError, match="middle' follows .* 'block/kernel'"):
    _read(tmp_path, files)


def test_a_result_of_another_version_is_refused(tmp_path):
  files = finished.files()
  decision = files['result.json']['decisions']['stem']
  decision['formats'] = decision.pop('options')
  with pytest.raises(ValueError, match="result.json .* 'stem'"):
    _read(tmp_path, files)


@pytest.mark.slow
def test_the_names_of_sizes_are_escaped(tmp_path):
  text = json.dumps(finished.sized_files()).replace(
    'block/kernel', '<script>/kernel'
  )
  page = finished.page(tmp_path, json.loads(text))
  assert '<script' not in page
  assert html.escape('<script>/kernel') in page


@pytest.mark.usefixtures('empty_pictures')
def test_found_sizes_that_are_trained_again_are_no_search(tmp_path):
  files = finished.sized_files()
  result, sizes = files['result.json'], files['arch.json']['sizes']
  for name, decision in result['decisions'].items():
    best = max(decision['probabilities'])
    at = decision['probabilities'].index(best)
    decision |= {'options': [decision['options'][at]], 'probabilities': [1.0]}
    if name in sizes:
      assert decision['options'] == [sizes[name]]
  page = finished.page(tmp_path, files)
  assert 'Training with fixed formats and sizes' in page
  assert 'every decision of this run has one option' in page
  assert '16 → 96' in _row(page, 'block/expand')
  assert not (tmp_path / 'allocation.png').exists()


@pytest.mark.usefixtures('empty_pictures')
@pytest.mark.slow
def test_a_search_of_sizes_alone_has_no_policy_of_formats(tmp_path):
  files = finished.sized_files()
  for decision in files['result.json']['decisions'].values():
    if decision['kind'] == 'format':
      best = decision['probabilities'].index(1.0)
      decision |= {
        'options': [decision['options'][best]],
        'probabilities': [1.0],
      }
  page = finished.page(tmp_path, files)
  assert 'over 3 decisions: 2 of channels, 1 of kernels' in page
  assert 'none of their sizes a probability' in page
  assert (tmp_path / 'policy_of_sizes.png').exists()
  assert not (tmp_path / 'policy.png').exists()


@pytest.mark.usefixtures('empty_pictures')
@pytest.mark.slow
@pytest.mark.parametrize('mode', ['weights', 'activations', 'separate'])
def test_every_mode_has_a_page(tmp_path, mode):
  files = finished.sized_files()
  files['arch.json']['mode'] = mode
  unused = {'weights': 'activations', 'activations': 'weights'}.get(mode)
  for path, layer in files['arch.json']['layers'].items():
    if unused:
      layer[unused] = None
    elif path == 'stem':
      layer['activations'] = 'INT4'
  run = _read(tmp_path, files)
  panes = allocation_figure.panes(run.layers)
  assert {side for _, _, side in panes} == (
    {'weights', 'activations'} if mode == 'separate' else {mode}
  )
  page = finished.page(tmp_path, files)
  assert '5×5 0.700' in _row(page, 'block/middle')


def _drawn(run):
  tint = figures.palette(['INT4', 'INT8', 'BF16'])
  return architecture_figure.architecture(run.layers, tint).axes[0]


def test_a_cell_is_filled_up_to_the_share_of_its_channels(tmp_path):
  axes = _drawn(_read(tmp_path, finished.sized_files()))
  tints = set(figures.palette(['INT4', 'INT8', 'BF16']).values())
  boxes = [p for p in axes.patches if isinstance(p, patches.FancyBboxPatch)]
  heights = [
    box.get_height()
    for box in boxes
    if colors.to_hex(box.get_facecolor()) in tints
  ]
  # 16 of at most 32 in two layers, 32 of 32 in the third; nothing decides about
  # the stem, whose cell is full.
  full, *others = heights
  assert others == pytest.approx([full / 2, full / 2, full])


def test_numbers_above_a_cell_are_its_channels_and_its_kernel(tmp_path):
  axes = _drawn(_read(tmp_path, finished.sized_files()))
  above = {}
  for text in axes.texts:
    x, y = text.get_position()
    if re.fullmatch('[0-9]+(×[0-9]+)?', text.get_text()):
      above.setdefault(round(x, 3), []).append((y, text.get_text()))
  columns = [[text for _, text in sorted(above[x])] for x in sorted(above)]
  assert columns == [['96'], ['5×5', '96'], ['32']]


@pytest.mark.parametrize('pair', [('INT4', 'INT4'), ('INT4', 'INT8')])
def test_a_format_is_named_above_what_is_too_low_for_it(pair):
  size = finished_run.Size(8, 'x/channels', 8, (8, 128), 1.0)
  weights, activations = pair
  layer = {
    'path': 'conv',
    'weights': weights,
    'activations': activations,
    'sizes': {'output_channels': size},
  }
  axes = architecture_figure.architecture(
    [layer], figures.palette(['INT4', 'INT8'])
  ).axes[0]
  names = [t for t in axes.texts if t.get_fontweight() == 'bold']
  assert [text.get_text() for text in names] == sorted(set(pair))
  # The axis points down: a box begins at its top.
  ghost, *filled = axes.patches
  top = min(box.get_y() for box in filled)
  for text in names:
    assert ghost.get_y() < text.get_position()[1] < top


def test_no_size_has_the_colour_of_a_format():
  names = {name for space in formats.SPACES.values() for name in space}
  tints = set(figures.palette(names).values())
  for count in range(1, 9):
    shades = figures.shades(count)
    assert len(set(shades)) == count
    assert not tints & set(shades)


def test_a_kernel_has_one_colour_in_all_decisions():
  decisions = {
    'a/kernel': {'kind': 'kernel', 'options': [3, 5]},
    'b/kernel': {'kind': 'kernel', 'options': [5, 7]},
  }
  row = {'policy': {name: [0.5, 0.5] for name in decisions}}
  history = [row | {'step': 1}, row | {'step': 2}]
  figure = policy_figure.policy(history, decisions, {})
  colours = [
    [tuple(band.get_facecolor()[0]) for band in axes.collections]
    for axes in figure.axes
  ]
  assert colours[0][1] == colours[1][0]
  assert len({*colours[0], *colours[1]}) == 3


def test_layers_are_sorted_into_panes(tmp_path):
  run = _read(tmp_path, finished.sized_files())
  panes = {
    key: [layer['path'] for layer in part]
    for key, part in allocation_figure.panes(run.layers).items()
  }
  assert list(panes.items()) == [
    (
      ('output_channels', 'pointwise', 'weights'),
      ['block/expand', 'block/project'],
    ),
    (('output_channels', 'depthwise', 'weights'), ['block/middle']),
    (('kernel', 'depthwise', 'weights'), ['block/middle']),
  ]


def test_equal_bits_have_no_trend(tmp_path):
  files = finished.sized_files()
  for layer in files['arch.json']['layers'].values():
    layer |= {'weights': 'INT8', 'activations': 'INT8'}
  assert not allocation_figure.panes(_read(tmp_path, files).layers)


def test_every_layer_has_a_dot_of_its_own():
  sizes = [
    finished_run.Size(8 * i, 'x/channels', 8 * i, (8, 16), 1.0) for i in (1, 2)
  ]
  # 30 layers to each of four places: two widths, two formats.
  layers = [
    {
      'path': f'{i}',
      'kind': 'dense',
      'weights': name,
      'activations': name,
      'sizes': {'output_channels': size},
    }
    for i in range(30)
    for size in sizes
    for name in ('INT4', 'INT8')
  ]
  tint = figures.palette(['INT4', 'INT8'])
  axes = allocation_figure.allocation(layers, tint).axes[0]
  dots = [x for x in axes.lines if x.get_marker() == 'o']
  spots = {
    (*map(float, d.get_xdata()), *map(float, d.get_ydata())) for d in dots
  }
  assert len(spots) == 120
  for bits in (0, 1):
    column = [y for x, y in spots if abs(x - bits) < 0.5]
    # Half as many as the most, or the most: heaps around 50 % and 100 %.
    low, high = (sum(abs(y - at) < 25 for y in column) for at in (50, 100))
    assert (low, high) == (30, 30)
  # The mean of as many 50 as 100 %.
  (mean,) = (x for x in axes.lines if x.get_marker() == '_')
  assert list(mean.get_ydata()) == pytest.approx([75, 75])
