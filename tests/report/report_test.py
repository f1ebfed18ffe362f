"""The report of a finished run: whole, in order, safe, and clear on errors."""

import base64
import collections
import html
import json
import math
import re
import subprocess
import sys

import pytest

from fliqs_jax.numerics import formats
from fliqs_jax.report import __main__ as report_command
from fliqs_jax.report import architecture_figure
from fliqs_jax.report import figures
from fliqs_jax.report import finished_run
from fliqs_jax.report import report
from tests.report import finished

_FILES = ('config.json', 'arch.json', 'result.json', 'history.jsonl')


@pytest.fixture(scope='module', name='plain')
def _plain(tmp_path_factory):
  """The directory and the page of a plain run."""
  directory = tmp_path_factory.mktemp('plain')
  return directory, finished.page(directory, finished.files())


def test_every_picture_is_beside_the_page_and_embedded_in_it(plain):
  directory, page = plain
  sources = re.findall('(?:src|srcset)="data:image/png;base64,([^"]*)"', page)
  embedded = {base64.b64decode(source) for source in sources}
  for name in ('architecture', 'policy', 'curves', 'cost_per_layer', 'pareto'):
    content = (directory / f'{name}.png').read_bytes()
    assert content.startswith(b'\x89PNG')
    assert content in embedded
  assert len(embedded) == 10  # Five pictures, light and dark.
  assert not list(directory.glob('*.tmp')) + list(directory.glob('.*.tmp'))


def test_the_page_asks_nothing_of_the_network(plain):
  _, page = plain
  assert '://' not in page
  assert '<script' not in page
  assert '@import' not in page


@pytest.mark.usefixtures('empty_pictures')
def test_layers_are_listed_in_model_order(tmp_path):
  # Not in the order of the alphabet, nor in that of result.json.
  files = finished.files()
  files['result.json']['layers'].reverse()
  page = finished.page(tmp_path, files)
  table = page[page.index('<h2>Layers') :]
  paths = re.findall('<td class=left>([^<]*)</td>', table)
  assert paths[:5] == list(finished.FOUND)


def test_the_page_leads_with_accuracy_and_cost_against_the_target(plain):
  _, page = plain
  lead = page[: page.index('<h2>')]
  assert '97.22%' in lead
  # 0.8 of a target of 0.9 is 1 - 8/9 = 11.1% below.
  assert '11.1% below the target of 0.900' in lead


def test_text_from_the_files_is_escaped(tmp_path):
  name = '<script>alert("x")</script>$_{'
  files = finished.files({name: ('INT4', 'INT4'), 'head': ('INT8', 'INT8')})
  files['result.json']['warnings'] = ['<b>loud</b>']
  files['config.json']['model']['name'] = '<i>net</i>'
  files['arch.json']['cost']['unit'] = '<u>'
  files['result.json']['found']['unit'] = '<u>'
  page = finished.page(tmp_path, files)
  for text in ('<script', '<b>', '<i>', '<u>'):
    assert text not in page
  assert html.escape(name) in page


@pytest.mark.parametrize('name', _FILES)
def test_a_missing_file_is_named(tmp_path, name):
  workdir = finished.write(tmp_path, finished.files())
  (tmp_path / name).unlink()
  with pytest.raises(FileNotFoundError, match=f'{re.escape(name)} is missing'):
    report.write_report(workdir)
  assert not (tmp_path / 'report.html').exists()


def test_a_damaged_line_of_the_history_is_named(tmp_path):
  workdir = finished.write(tmp_path, finished.files())
  with open(tmp_path / 'history.jsonl', 'a') as file:
    file.write('{"step": 80, "lo')
  with pytest.raises(ValueError, match='history.jsonl line 4 is not JSON'):
    report.write_report(workdir)


@pytest.mark.parametrize('name', _FILES)
def test_a_file_that_is_no_text_is_named(tmp_path, name):
  workdir = finished.write(tmp_path, finished.files())
  path = tmp_path / name
  path.write_bytes(path.read_bytes().replace(b'"', b'"\xff', 1))
  with pytest.raises(ValueError, match=f'{re.escape(str(path))} is damaged: '):
    report.write_report(workdir)


def test_a_damaged_format_is_named_with_file_and_place(tmp_path):
  for name, change, where in (
    (
      'arch.json',
      lambda c: c['layers']['stem'].update(weights='BF1v'),
      "arch.json is damaged, layer 'stem'",
    ),
    (
      'result.json',
      lambda c: c['layers'][0].update(activations='BF1v'),
      "result.json is damaged, layer 'stem'",
    ),
    (
      'result.json',
      lambda c: c['decisions']['stem'].update(options=['INT4', 'BF1v', 'BF16']),
      "result.json is damaged, decision 'stem'",
    ),
  ):
    files = finished.files()
    change(files[name])
    workdir = finished.write(tmp_path, files)
    with pytest.raises(ValueError, match=f"{where}: unknown format 'BF1v'"):
      report.write_report(workdir)


def test_a_config_without_a_phase_is_refused(tmp_path):
  files = finished.files()
  del files['config.json']['search']['freeze']
  with pytest.raises(ValueError, match='config.json lacks search.freeze'):
    finished.page(tmp_path, files)


def test_a_decision_over_an_unknown_layer_is_refused(tmp_path):
  files = finished.files()
  files['result.json']['decisions']['stem']['layers'] = ['step']
  with pytest.raises(ValueError, match="'stem' governs layer 'step'"):
    finished.page(tmp_path, files)


@pytest.mark.usefixtures('empty_pictures')
def test_a_run_with_fixed_formats_says_so_and_has_no_policy(tmp_path):
  found = dict.fromkeys(finished.FOUND, ('INT8', 'INT8'))
  files = finished.files(found, menu=('INT8',))
  files['result.json']['references'] = {}
  page = finished.page(tmp_path, files)
  assert 'Nothing was searched' in page
  assert 'unsettled' not in page
  assert not (tmp_path / 'policy.png').exists()
  assert not (tmp_path / 'pareto.png').exists()


def test_numbers_that_are_not_finite_are_left_out(tmp_path):
  files = finished.files()
  rows = files['history.jsonl']
  rows[0] |= {'reward': None, 'loss': math.nan, 'policy': None}
  rows[1] |= {'cost': math.inf, 'entropy': 10**400}
  del rows[2]['quality']
  found, references = (
    files['result.json'][key] for key in ('found', 'references')
  )
  found |= {'loss': None, 'cost_target': None}
  references['INT4'] |= {'accuracy': math.nan, 'size_bits': None}
  files['result.json']['layers'][0]['macs'] = None
  page = finished.page(tmp_path, files)
  assert 'no target' in page
  assert 'nan' not in re.sub('base64,[^"]*', '', page).lower()


def test_a_history_of_nothing_still_makes_a_page(tmp_path):
  files = finished.files() | {'history.jsonl': []}
  page = finished.page(tmp_path, files)
  assert 'too few policies' in page


@pytest.mark.usefixtures('empty_pictures')
def test_unsettled_decisions_are_marked(tmp_path):
  files = finished.files()
  files['result.json']['decisions']['stem']['probabilities'] = [0.2, 0.7, 0.1]
  page = finished.page(tmp_path, files)
  assert '1 of 4 decisions are unsettled' in page
  assert 'unsettled 0.700' in page


def test_scores_are_drawn_and_their_sum_is_beside_the_measured_loss(tmp_path):
  files = finished.files()
  result = files['result.json']
  scores = {'anchor': 'BF16', 'scores': [0.02, 0.001, 0.0]}
  decisions = dict.fromkeys(result['decisions'], scores)
  result['scored'] = {'metric': 'kl', 'sum': 0.0425, 'decisions': decisions}
  result['found']['loss'] = 0.13
  result['references']['BF16'] = result['references']['INT8'] | {'loss': 0.1}
  page = finished.page(tmp_path, files)
  assert 'The kl scores of the selected options sum to 0.0425' in page
  assert 'network is +0.030 from that of uniform BF16' in page
  assert (tmp_path / 'scores.png').read_bytes().startswith(b'\x89PNG')


def test_a_page_without_scores_has_no_section_of_them(plain):
  assert '<h2>Scores' not in plain[1]


def test_shares_are_of_the_found_and_of_the_uniform_cost(tmp_path):
  run = finished_run.read(finished.write(tmp_path, finished.files()))
  # 1e9 MACs each: 64, 16, 16, 64 and, not quantized, 256 GBOPs make 416; with
  # 8 bits 64, 64, 64, 64, and 256 as before make 512.
  expected = [(64, 64), (16, 64), (16, 64), (64, 64), (256, 256)]
  for layer, (found, uniform) in zip(run.layers, expected):
    assert layer['share'] == pytest.approx(found / 416)
    assert layer['reference_share'] == pytest.approx(uniform / 512)
    assert layer['macs_share'] == pytest.approx(1 / 5)


@pytest.mark.usefixtures('empty_pictures')
def test_separate_decisions_keep_their_sides(tmp_path):
  files = finished.files({'conv': ('INT4', 'INT8')}, mode='separate')
  files['result.json']['decisions']['conv/activations']['probabilities'] = [
    0.05,
    0.95,
    0,
  ]
  run = finished_run.read(finished.write(tmp_path, files))
  # The tallest of each decision: INT4 at 1, INT8 at 0.95.
  assert run.layers[0]['probabilities'] == {'weights': 1, 'activations': 0.95}
  assert '1.000 / 0.950' in finished.page(tmp_path, files)


def test_phases_are_marked_at_their_fraction_of_training(tmp_path):
  run = finished_run.read(finished.write(tmp_path, finished.files()))
  # 60 steps: 0.15, 0.25 and 0.95 of them.
  assert list(run.marks.values()) == [9, 15, 57]


def _cells(found):
  """Returns the texts within the cells as (x, y, text), in drawing order."""
  layers = [
    {'path': path, 'weights': w, 'activations': a, 'sizes': {}}
    for path, (w, a) in found.items()
  ]
  tint = figures.palette([n for pair in found.values() for n in pair if n])
  figure = architecture_figure.architecture(layers, tint)
  return [
    (*text.get_position(), text.get_text())
    for text in figure.axes[0].texts
    if text.get_fontweight() == 'bold'
  ]


def test_the_architecture_wraps_without_losing_a_layer():
  menu = ('INT4', 'INT5', 'INT6', 'INT7', 'INT8')
  found = {f'block{i // 3}/conv{i % 3}': (menu[i % 5],) * 2 for i in range(97)}
  cells = _cells(found)
  assert [text for _, _, text in cells] == [menu[i % 5] for i in range(97)]
  # Read as a page is read, from the top and from the left.
  assert cells == sorted(cells, key=lambda cell: (cell[1], cell[0]))
  assert len({y for _, y, _ in cells}) > 1


def test_a_shortcut_is_raised_above_its_block():
  cells = _cells(finished.FOUND)
  raised = [text for _, y, text in cells if y == min(c[1] for c in cells)]
  assert raised == ['INT8']
  assert len(cells) == len(finished.FOUND)


def test_a_cell_is_halved_where_weights_and_activations_differ():
  cells = _cells({'a': ('INT4', 'INT8'), 'b': ('INT4', 'INT4')})
  (x0, y0, first), (x1, y1, second), (_, _, third) = cells
  assert (first, second, third) == ('INT4', 'INT8', 'INT4')
  assert x0 == x1
  assert y0 < y1  # The axis points down: weights are above.


def test_a_side_that_is_never_quantized_takes_no_half():
  cells = _cells({'a': ('INT4', None), 'b': ('INT8', None)})
  assert [text for _, _, text in cells] == ['INT4', 'INT8']


def test_all_formats_of_a_space_have_colours_of_their_own():
  names = {name for space in formats.SPACES.values() for name in space}
  assert len(set(figures.palette(names).values())) == len(names)


def test_the_command_prints_the_page(tmp_path, capsys):
  assert report_command.main([finished.write(tmp_path, finished.files())]) == 0
  assert capsys.readouterr().out.strip() == str(tmp_path / 'report.html')


def _replaced(tree, text):
  """Yields the tree with one key or value replaced by a text, at each place."""
  for key in list(tree) if isinstance(tree, dict) else range(len(tree)):
    value = tree[key]
    if isinstance(value, (dict, list)):
      yield from (_with(tree, key, new) for new in _replaced(value, text))
    else:
      yield _with(tree, key, text)
    if isinstance(tree, dict):
      yield {text if k == key else k: v for k, v in tree.items()}


def _with(tree, key, value):
  changed = tree.copy()
  changed[key] = value
  return changed


def test_no_text_of_a_file_becomes_html(tmp_path):
  files = json.loads(json.dumps(finished.sized_files()))
  files['result.json']['warnings'] = ['a warning']
  text, pages = '<script>', 0
  history = files.pop('history.jsonl')
  images = collections.defaultdict(lambda: (bytes(24), bytes(24)), policy=None)
  images['policy'] = images['']
  for changed in _replaced(files, text):
    if text in changed:
      continue  # The name of a file.
    finished.write(tmp_path, {**changed, 'history.jsonl': history})
    try:
      run = finished_run.read(tmp_path)
      names = [
        layer[side] for layer in run.layers for side in finished_run.SIDES
      ]
      page = report.page.render(run, images, dict.fromkeys(names, '#000000'))
    except (AttributeError, KeyError, TypeError, ValueError):
      continue  # Refused.
    assert text not in page, changed
    pages += 1
  assert pages > 100


@pytest.mark.parametrize('name', ['arch.json', 'result.json'])
@pytest.mark.parametrize('content', ['{}', '{"layers": [], "decisions": 1}'])
def test_a_file_without_its_keys_is_named(tmp_path, capsys, name, content):
  workdir = finished.write(tmp_path, finished.files())
  (tmp_path / name).write_text(content)
  assert report_command.main([workdir]) == 2
  line = capsys.readouterr().err
  assert line.startswith(f'{workdir}: a file lacks something')
  assert line.count('\n') == 1


def test_the_command_fails_with_one_line_that_names_the_file(tmp_path):
  done = subprocess.run(
    [sys.executable, '-m', 'fliqs_jax.report', str(tmp_path / 'nowhere')],
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 2
  assert 'config.json is missing' in done.stderr
  assert len(done.stderr.strip().splitlines()) == 1


def test_importing_the_package_does_not_import_matplotlib():
  code = 'import sys, fliqs_jax; sys.exit("matplotlib" in sys.modules)'
  subprocess.run([sys.executable, '-c', code], check=True)
