"""A sweep: what its file declares, and what its runs say together."""

import json

import numpy as np
import pytest

from fliqs_jax.sweep import __main__ as sweep_command
from fliqs_jax.sweep import collect
from fliqs_jax.sweep import figure
from fliqs_jax.sweep import pareto
from fliqs_jax.sweep import sweep_file

# ml_collections loads config files so.
pytestmark = pytest.mark.filterwarnings(
  'ignore:the load_module:DeprecationWarning'
)

_FILE = """
config: configs/digits.py
arguments: {steps: 60, seed: [0, 1]}
overrides: {quant.act_clip: 3.0}
runs:
- arguments: {space: [int_s], target: [1.5, 2]}
- arguments: {space: [INT4]}
"""


def _read(directory, text=_FILE):
  path = directory / 'some.yaml'
  path.write_text(text)
  return sweep_file.read(path)


def test_every_list_is_swept_and_runs_are_grids_of_their_own(tmp_path):
  planned = _read(tmp_path)
  assert planned.name == 'some'
  # 2 seeds x (1 space x 2 targets + 1 space).
  assert [run.name for run in planned.runs] == [
    'seed=0,space=int_s,target=1.5',
    'seed=0,space=int_s,target=2',
    'seed=1,space=int_s,target=1.5',
    'seed=1,space=int_s,target=2',
    'seed=0,space=INT4',
    'seed=1,space=INT4',
  ]
  assert planned.runs[0].flags == [
    '--config=configs/digits.py:steps=60,seed=0,space=int_s,target=1.5',
    '--config.quant.act_clip=3.0',
  ]


def test_a_config_is_what_the_run_itself_will_see(tmp_path):
  config = sweep_file.config(_read(tmp_path).runs[1])
  assert config['train']['steps'] == 60
  assert config['cost']['target'] == 2.0
  assert config['quant']['act_clip'] == '3.0'  # Text may name a rule.


def test_a_longer_list_renames_no_run(tmp_path):
  before = {run.name for run in _read(tmp_path).runs}
  longer = _FILE.replace('[1.5, 2]', '[1, 1.5, 2]').replace(
    '[0, 1]', '[0, 1, 2]'
  )
  assert before < {run.name for run in _read(tmp_path, longer).runs}


def test_a_path_as_a_value_makes_no_directories(tmp_path):
  text = 'config: configs/digits.py\narguments: {arch: [a/b.json]}'
  (run,) = _read(tmp_path, text).runs
  assert run.name == 'arch=a_b.json'
  assert run.config == 'configs/digits.py:arch=a/b.json'


def test_booleans_are_written_as_configs_read_them(tmp_path):
  text = 'config: configs/digits.py\narguments: {nas: [true, false]}'
  assert [run.name for run in _read(tmp_path, text).runs] == [
    'nas=true',
    'nas=false',
  ]


_DIGITS = 'config: configs/digits.py\n'


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('a: [', 'while parsing'),
    ('a: ' + 9999 * '[' + 9999 * ']', 'it is nested too deeply'),
    (9999 * '{', 'it is nested too deeply'),
    ('- 1', 'must be a mapping with `config: FILE`'),
    ('config: no.py', "there is no config file 'no.py'"),
    (_DIGITS + 'argument: {}', "unknown key 'argument' of a sweep; allowed: "),
    (_DIGITS + 'arguments: [1]', '`arguments` must be a mapping'),
    (_DIGITS + 'arguments: {sed: 1}', "unknown config argument 'sed'"),
    (_DIGITS + 'arguments: {seed: [0, x]}', "seed='x' must be of type int"),
    (_DIGITS + 'arguments: {seed: []}', 'arguments.seed is an empty list'),
    (_DIGITS + 'arguments: {seed: 1, seed: 2}', "'seed' is given twice"),
    (_DIGITS + 'arguments: {seed: [[1]]}', 'arguments.seed: [1] must be'),
    (_DIGITS + 'arguments: {seed: null}', 'arguments.seed: None must be'),
    (_DIGITS + 'arguments: {arch: "a,b"}', 'holds a comma'),
    (_DIGITS + 'overrides: {cost.tarjet: 1}', 'no such key: '),
    (_DIGITS + 'overrides: {train.steps: 0}', 'train.steps=0 must be'),
    (
      _DIGITS + 'overrides: {search.preset: paper}',
      '--config.search.preset=paper changes this key alone and leaves '
      'cost.bound, quant.act_threshold, search.',
    ),
    (
      _DIGITS + 'arguments: {preset: paper}\noverrides: {train.steps: 99}',
      '--config.train.steps=99 changes this key alone and leaves '
      'search.learning_rate as made for another value: give it as an argument, '
      '--config=configs/digits.py:steps=99, or override these keys, too',
    ),
    (_DIGITS + 'runs: []', '`runs` must be a list of at least one'),
    (_DIGITS + 'runs: [1]', 'an item of `runs` must be a mapping, not 1'),
    (
      _DIGITS + 'runs: [{arguments: {seed: 0}}, {arguments: {seed: 1}}]',
      "two runs are called 'run'; write what they differ in as a list",
    ),
  ],
)
def test_a_file_that_cannot_be_is_refused_in_one_line(tmp_path, text, message):
  with pytest.raises(ValueError, match='some.yaml') as error:
    _read(tmp_path, text)
  assert message in str(error.value)
  assert '\n' not in str(error.value)


def test_means_spreads_and_fronts_are_those_by_hand():
  points = pareto.points(
    [
      ({'space': 'a', 'seed': '0'}, (0.90, 1.0)),
      ({'space': 'a', 'seed': '1'}, (0.94, 3.0)),
      ({'space': 'b', 'seed': '0'}, (0.91, 2.0)),
      ({'space': 'c', 'seed': '0'}, (0.95, 4.0)),
      ({'space': 'c', 'seed': '1'}, None),
      ({'space': 'd', 'seed': '0'}, None),
    ]
  )
  assert [p.settings['space'] for p in points] == ['a', 'b', 'c']
  a, b, c = points
  assert a.value == pytest.approx(0.92)
  assert a.cost == 2.0
  # Of two numbers: their difference by the root of two.
  assert a.value_spread == pytest.approx(0.04 / 2**0.5)
  assert a.cost_spread == pytest.approx(2 / 2**0.5)
  assert b.value_spread is None
  # At equal cost b is worse than a; c is dearer and better.
  assert (a.front, b.front, c.front) == (True, False, True)
  assert (c.planned, len(c.values)) == (2, 1)


@pytest.mark.parametrize(
  ('metric', 'values', 'middle', 'spread'),
  [('accuracy', (0.70, 0.74), 72.0, 4.0), ('PSNR', (30.0, 31.0), 30.5, 1.0)],
)
def test_bars_are_in_the_unit_of_the_axis(metric, values, middle, spread):
  runs = [
    ({'space': 'a', 'seed': str(seed)}, (value, 2.0))
    for seed, value in enumerate(values)
  ]
  axes = figure.draw(pareto.points(runs), metric, 'GBOPs').axes[0]
  ends = [
    segment[:, 1]
    for bars in axes.collections
    for segment in bars.get_segments()
    if len(segment) and segment[0, 0] == segment[-1, 0]
  ]
  # A percentage or decibels; of two numbers: their difference by the root of 2.
  reach = spread / 2**0.5
  np.testing.assert_allclose(ends, [[middle - reach, middle + reach]])


def test_equal_points_are_both_on_the_front():
  runs = [({'space': name}, (0.9, 1.0)) for name in 'ab']
  assert [p.front for p in pareto.points(runs)] == [True, True]


def _finish(out, run, value=0.9, cost=1.0, **more):
  workdir = out / run.name
  workdir.mkdir(parents=True)
  config = sweep_file.config(run)
  (workdir / 'config.json').write_text(json.dumps(config))
  found = dict(accuracy=value, cost=cost, unit='GBOPs', gbops=2 * cost)
  result = dict(metric='accuracy', found=found, warnings=[]) | more
  (workdir / 'result.json').write_text(json.dumps(result))
  return workdir


def test_whatever_is_not_finished_is_listed(tmp_path):
  planned = _read(tmp_path)
  out = tmp_path / 'out'
  finished, other, cut, damaged, no_number, _ = planned.runs
  _finish(out, finished, warnings=['x', 'y'])
  workdir = _finish(out, other)
  config = json.loads((workdir / 'config.json').read_text())
  config['train']['steps'] = 7
  config['data']['data_dir'] = '/elsewhere'  # The same data, on a cluster.
  (workdir / 'config.json').write_text(json.dumps(config))
  workdir = _finish(out, cut)
  (workdir / 'result.json').unlink()
  (workdir / 'history.jsonl').write_text('{"step": 5}\n{"step": 10}\n{"ste')
  (_finish(out, damaged) / 'result.json').write_text('{"metric"')
  _finish(out, no_number, value=None)
  summary = collect.collect(planned, out)
  states = {run['name']: (run['state'], run['detail']) for run in summary.runs}
  assert states[finished.name] == ('finished', '')
  assert states[other.name] == ('of another config', 'train.steps: 7 -> 60')
  assert states[cut.name] == ('unfinished', 'logged up to step 10 of 60')
  assert states[damaged.name][0] == 'damaged'
  assert states[no_number.name][0] == 'damaged'
  text = collect.markdown(summary)
  assert '5 of 6 runs are missing' in text
  for run in summary.missing:
    assert f'- {run["name"]}: {run["state"]}' in text
  collect.write(summary, out)
  page = (out / 'sweep.html').read_text()
  for name in states:
    assert name in page
  kept = json.loads((out / 'sweep.json').read_text())
  assert len(kept['runs']) == 6
  assert kept['points'][0]['warnings'] == 2


def test_the_table_has_means_and_spreads(tmp_path):
  planned = _read(tmp_path)
  values = dict(
    zip((run.name for run in planned.runs), (90, 94, 92, 96, 80, 80))
  )
  for run in planned.runs:
    cost = float(run.swept.get('target', 1))
    _finish(tmp_path / 'out', run, values[run.name] / 100, cost)
  assert collect.markdown(collect.collect(planned, tmp_path / 'out')) == (
    '| space | target | runs | test accuracy, % | cost, GBOPs | not dominated '
    '| warnings |\n'
    '| --- | --- | --- | --- | --- | --- | --- |\n'
    '| INT4 |  | 2 | 80.00 ± 0.00 | 1.000 ± 0.000 | * |  |\n'
    '| int_s | 1.5 | 2 | 91.00 ± 1.41 | 1.500 ± 0.000 | * |  |\n'
    '| int_s | 2 | 2 | 95.00 ± 1.41 | 2.000 ± 0.000 | * |  |'
  )
  by_gbops = collect.collect(planned, tmp_path / 'out', cost='gbops')
  assert [p.cost for p in by_gbops.points] == [2, 3, 4]


def test_the_page_asks_nothing_of_the_network_and_escapes(tmp_path):
  text = 'config: configs/digits.py\narguments: {arch: ["<b>"]}'
  planned = _read(tmp_path, text)
  _finish(tmp_path / 'out', planned.runs[0])
  collect.write(collect.collect(planned, tmp_path / 'out'), tmp_path / 'out')
  page = (tmp_path / 'out' / 'sweep.html').read_text()
  assert '<b>' not in page
  assert '&lt;b&gt;' in page
  assert '://' not in page
  assert '<script' not in page


def test_a_picture_of_one_run_can_be_drawn(tmp_path):
  planned = _read(tmp_path, 'config: configs/digits.py')
  _finish(tmp_path / 'out', planned.runs[0])
  summary = collect.collect(planned, tmp_path / 'out')
  collect.write(summary, tmp_path / 'out')
  assert (tmp_path / 'out' / 'pareto.png').read_bytes().startswith(b'\x89PNG')


def test_runs_of_two_units_are_not_compared(tmp_path):
  planned = _read(tmp_path)
  for i, run in enumerate(planned.runs):
    found = dict(accuracy=0.9, cost=1, unit=['Mb', 'GBOPs'][i % 2])
    _finish(tmp_path / 'out', run, found=found)
  with pytest.raises(ValueError, match='differ in their unit, GBOPs and Mb'):
    collect.collect(planned, tmp_path / 'out')


@pytest.mark.parametrize(
  ('out', 'message'),
  [
    ('nowhere', 'no run is finished in nowhere; the first of '),
    ('gs://bucket/s', 'is a bucket; fetch it first: gcloud storage rsync'),
  ],
)
def test_nothing_to_collect_is_one_line(tmp_path, capsys, out, message):
  _read(tmp_path)
  assert sweep_command.main([str(tmp_path / 'some.yaml'), f'--out={out}']) == 2
  error = capsys.readouterr().err
  assert message in error
  assert error.count('\n') == 1


@pytest.mark.parametrize(
  'overrides',
  [
    {},
    {'train.steps': '60'},  # As it is.
    {'train.steps': '99', 'search.learning_rate': '0.01'},  # Both on purpose.
    {'seed': '3'},  # Nothing else is made from it.
    {'optimizer.momentum': '0.8'},  # No argument.
  ],
)
def test_overrides_that_leave_nothing_behind_are_taken(overrides):
  config = 'tests/tiny.py:preset=paper,steps=60'
  sweep_file.load(sweep_file.Run('run', {}, config, overrides))
