"""Fronts: curves and their pairs in a sweep, several sweeps, shipped sweeps."""

import json
import pathlib

import pytest

from fliqs_jax.sweep import __main__ as sweep_command
from fliqs_jax.sweep import collect
from fliqs_jax.sweep import pareto
from fliqs_jax.sweep import sweep_file

# ml_collections loads config files so.
pytestmark = pytest.mark.filterwarnings(
  'ignore:the load_module:DeprecationWarning'
)

_FILE = """
config: configs/digits.py
arguments: {seed: [0, 1]}
runs:
- arguments: {space: [int_s], target: [1.5, 2]}
- arguments: {space: [INT4, INT8]}
"""


@pytest.mark.parametrize(
  ('settings', 'series'),
  [
    (dict(space='int_l', target='2'), dict(space='int_l')),
    (dict(space='INT4'), dict(space='uniform integers')),
    (dict(space='E2M1'), dict(space='uniform floats')),
    (dict(space='BF16'), dict(space='BF16')),
    # Over sizes each format is a curve of its own, as in Figure 5.
    (dict(space='INT4', width='2'), dict(space='INT4')),
    (
      dict(space='fp_l', variant='b2', mode='tied'),
      dict(space='fp_l', mode='tied'),
    ),
  ],
)
def test_a_curve_joins_targets_formats_or_sizes(settings, series):
  assert pareto.series(settings) == series


def _finish(out, sweep, ahead):
  """Writes made-up results: a seed is worth a point, a factor of 2 five.

  Uniform integers: 80 % at a cost of 1 and 90 % at 4.

  Args:
    out: directory of the runs.
    sweep: the runs.
    ahead: how much the searches are better than uniform integers.
  """
  uniform = dict(INT4=(0.80, 1.0), INT8=(0.90, 4.0))
  searched = {'1.5': (0.80 + ahead, 1.0), '2': (0.85 + ahead, 2.0)}
  for run in sweep.runs:
    found = uniform.get(run.swept['space']) or searched[run.swept['target']]
    value, cost = found[0] + 0.01 * int(run.swept['seed']), found[1]
    workdir = out / run.name
    workdir.mkdir(parents=True)
    config = sweep_file.config(run)
    (workdir / 'config.json').write_text(json.dumps(config))
    found = dict(accuracy=value, cost=cost, unit='GBOPs', gbops=cost)
    result = dict(metric='accuracy', found=found, warnings=[])
    (workdir / 'result.json').write_text(json.dumps(result))


def _sweep(directory, name='some'):
  path = directory / f'{name}.yaml'
  path.write_text(_FILE)
  return path, sweep_file.read(path)


def test_each_pair_of_curves_has_one_number(tmp_path):
  _, sweep = _sweep(tmp_path)
  _finish(tmp_path, sweep, 0.03)
  summary = collect.collect(sweep, tmp_path)
  apart = summary.pairs['int_s', 'uniform integers']
  assert apart.value == pytest.approx(0.03)
  assert apart.error == pytest.approx(0, abs=1e-9)
  other = summary.pairs['uniform integers', 'int_s']
  assert other.value == pytest.approx(-0.03)
  assert '| int_s |  | +3.00 ± 0.00 |' in collect.markdown(summary)
  collect.write(summary, tmp_path)
  assert '>+3.00 ± 0.00<' in (tmp_path / 'sweep.html').read_text()
  kept = json.loads((tmp_path / 'sweep.json').read_text())
  assert [pair['curve'] for pair in kept['pairs']] == [
    'int_s',
    'uniform integers',
  ]


def test_several_sweeps_are_one_page_and_each_is_compared_alone(
  tmp_path, capsys
):
  files = []
  for name, ahead in (('one', 0.03), ('two', -0.02)):
    path, sweep = _sweep(tmp_path, name)
    files.append(str(path))
    _finish(tmp_path / 'out' / name, sweep, ahead)
  assert sweep_command.main([*files, f'--out={tmp_path / "out"}']) == 0
  printed = capsys.readouterr().out
  assert '| one, int_s |  | +3.00 ± 0.00 |' in printed
  assert '| two, int_s |  | -2.00 ± 0.00 |' in printed
  kept = json.loads((tmp_path / 'out/sweep.json').read_text())
  assert len(kept['runs']) == 2 * 8
  assert len(kept['pairs']) == 2 * 2  # None of one sweep with the other.
  page = (tmp_path / 'out/sweep.html').read_text()
  assert 'href="two/seed%3D0%2Cspace%3DINT4/' in page


def test_two_sweeps_of_one_name_are_refused(tmp_path, capsys):
  path, _ = _sweep(tmp_path)
  assert sweep_command.main([str(path), str(path), f'--out={tmp_path}']) == 2
  error = capsys.readouterr().err
  assert 'have the same name: some, some' in error
  assert error.count('\n') == 1


_SHIPPED = sorted(pathlib.Path('configs/sweeps').glob('*.yaml'))


def test_shipped_sweeps_have_the_papers_operating_points():
  # Figures 15 to 20, FLIQS-L with the cosine schedule over INT4 (GBOPs) at the
  # smallest and at the largest size: 9.30 / 7.78, 120.8 / 113.1, and so on.
  ends = dict(
    resnet18=(9.30 / 7.78, 120.8 / 113.1),
    resnet50=(21.03 / 16.84, 282 / 257.9),
    mobilenetv2=(1.02 / 0.595, 22.31 / 18.20),
    inceptionv3=(4.31 / 3.04, 119.9 / 108.0),
    efficientnet=(7.42 / 6.16, 187.1 / 70.25),
    deit=(21.47 / 20.29, 273.2 / 269.8),
  )
  for name, (small, large) in ends.items():
    sweep = sweep_file.read(f'configs/sweeps/{name}_fronts.yaml')
    targets = [
      sweep_file.load(run).cost.target
      for run in sweep.runs
      if (run.swept['space'], run.swept['seed']) == ('int_l', '0')
    ]
    assert targets[0] == pytest.approx(small, abs=0.006)
    assert targets[-1] == pytest.approx(large, abs=0.006)


@pytest.mark.parametrize('path', _SHIPPED, ids=lambda path: path.stem)
def test_the_comment_of_a_shipped_sweep_counts_its_runs(path):
  runs = sweep_file.read(path).runs
  assert f' {len(runs)} runs' in path.read_text()
  assert {run.swept['seed'] for run in runs} == {'0', '1', '2'}
