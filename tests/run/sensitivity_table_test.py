"""Sensitivity tables of a trained run, and the budgets solved from them."""

import contextlib
import csv
import dataclasses
import io
import json
import math

import numpy as np
import pytest

from fliqs_jax import assign
from fliqs_jax import sensitivity as sensitivity_command
from fliqs_jax.run import evaluation
from fliqs_jax.run import experiment as experiment_lib
from fliqs_jax.run import sensitivity_table
from fliqs_jax.run import train
from fliqs_jax.runtime import files
from fliqs_jax.search import sensitivity
from fliqs_jax.space import allocation
from tests import tiny


@pytest.fixture(scope='module', name='trained')
def _trained(tmp_path_factory):
  """Returns the workdir of a run, the run, and its table, by the command."""
  workdir = tmp_path_factory.mktemp('tiny')
  train.train_and_evaluate(tiny.get_config('steps=20'), str(workdir))
  out = workdir / 'table'
  printed = io.StringIO()
  with contextlib.redirect_stdout(printed):
    flags = [str(workdir), '--batches=2', f'--out={out}']
    assert sensitivity_command.main(flags) == 0
  assert printed.getvalue().startswith('| decision | INT4 | INT8 | BF16 |')
  assert (out / 'sensitivity.png').read_bytes().startswith(b'\x89PNG')
  table = json.loads((out / 'sensitivity.json').read_text())
  return workdir, evaluation.restore(str(workdir)), table


def test_a_table_has_a_score_for_every_option_and_none_at_the_anchor(trained):
  _, run, table = trained
  assert table['negative'] == 0  # A Fisher score is a mean of squares.
  decisions = run.experiment.space.decisions
  assert list(table['decisions']) == [d.name for d in decisions]
  for d in decisions:
    row = table['decisions'][d.name]
    assert row['options'] == list(d.labels)
    assert row['anchor'] == 'BF16'
    assert row['scores'][row['options'].index('BF16')] == 0
    assert len(row['scores']) == 3
    assert min(row['scores'][:2]) > 0
  assert table['costs']['average_bits'] == dict(
    unit='bits', cheapest=pytest.approx(4), dearest=pytest.approx(16)
  )


def test_the_hessian_scores_the_network_of_a_config(trained):
  _, run, _ = trained
  table = sensitivity_table.measure(run, 'hessian', batches=1)
  for row in table['decisions'].values():
    int4, int8, bf16 = np.abs(row['scores'])
    # Steps of INT8 are 18 times finer than those of INT4, squares 300 times.
    assert int4 > 50 * int8 > 0
    assert bf16 == 0


def test_errors_of_operands_score_the_network_of_a_config(trained):
  _, run, _ = trained
  table = sensitivity_table.measure(run, 'error', batches=1)
  for row in table['decisions'].values():
    int4, int8, bf16 = row['scores']
    assert int4 > 2 * int8 > 0  # What is clipped does not depend on bits.
    assert bf16 == 0


def test_a_table_that_was_written_is_read_again(trained, tmp_path):
  _, run, table = trained
  files.write_json(tmp_path / 'table.json', table)
  assert sensitivity_table.read(tmp_path / 'table.json', run) == table


@pytest.mark.parametrize(
  ('name', 'message'),
  [
    ('space', 'measured with another model or other menus;'),
    ('data', 'measured with other data;'),
    ('weights', 'measured with other weights;'),
  ],
)
def test_a_table_of_another_run_is_refused(trained, tmp_path, name, message):
  _, run, table = trained
  other = table | dict(hashes=table['hashes'] | {name: '0' * 16})
  files.write_json(tmp_path / 'table.json', other)
  with pytest.raises(ValueError, match=message):
    sensitivity_table.read(tmp_path / 'table.json', run)


def test_hashes_follow_weights_and_data(trained):
  _, run, table = trained
  own = table['hashes']
  params = run.state.average
  layer = sorted(params)[0]
  kernel = params[layer]['kernel']
  other = run._replace(
    state=run.state.replace(
      average={
        **params,
        layer: {**params[layer], 'kernel': kernel.at[0, 0].add(1.0)},
      }
    )
  )
  hashes = sensitivity_table.hashes(other)
  assert {name for name in own if own[name] != hashes[name]} == {'weights'}
  for key, value, changed in (
    ('batch_size', 60, {'data'}),
    ('data_dir', '/elsewhere', set()),  # The same data, on another machine.
  ):
    config = run.experiment.config.copy_and_resolve_references()
    with config.unlocked():
      config.data[key] = value
    hashes = sensitivity_table.hashes(
      run._replace(
        experiment=dataclasses.replace(run.experiment, config=config)
      )
    )
    assert {name for name in own if own[name] != hashes[name]} == changed, key


def test_files_that_are_no_table_are_refused(trained, tmp_path):
  _, run, table = trained
  with pytest.raises(ValueError, match='lacking.json cannot be read: No such'):
    sensitivity_table.read(tmp_path / 'lacking.json', run)
  bad = tmp_path / 'bad.json'
  unhashed = json.dumps(table | {'hashes': 1})
  for text in ('[', '[' * 10**5, '[]', '{"hashes": {}}', unhashed):
    bad.write_text(text)
    with pytest.raises(ValueError, match='bad.json is no sensitivity.json'):
      sensitivity_table.read(bad, run)
  name = next(iter(table['decisions']))
  row = table['decisions'][name] | dict(scores=[float('nan'), 1.0, 0.0])
  bad.write_text(
    json.dumps(table | dict(decisions=table['decisions'] | {name: row}))
  )
  with pytest.raises(ValueError, match=f'scores of {name} must be finite'):
    sensitivity_table.read(bad, run)


def test_scores_that_are_not_finite_name_the_layer(trained):
  _, run, _ = trained
  layer = sorted(run.state.average)[0]
  broken = {
    **run.state.average,
    layer: {
      name: np.full_like(x, np.nan)
      for name, x in run.state.average[layer].items()
    },
  }
  run = run._replace(state=run.state.replace(average=broken))
  with pytest.raises(ValueError, match='the scores of .* must be finite'):
    sensitivity_table.measure(run, 'fisher', batches=2)


def test_a_run_without_a_choice_and_wrong_flags_are_refused(trained):
  _, run, _ = trained
  with pytest.raises(ValueError, match='--scores=fish is unknown; allowed: l'):
    sensitivity_table.measure(run, 'fish')
  with pytest.raises(ValueError, match='--batches=0 must be at least 1'):
    sensitivity_table.measure(run, batches=0)
  uniform = experiment_lib.build(tiny.get_config('space=INT8'))
  with pytest.raises(ValueError, match='every decision .* has one option'):
    sensitivity_table.measure(run._replace(experiment=uniform))


def test_every_target_costs_at_most_that_and_scores_no_more_than_less(trained):
  _, run, table = trained
  raw = sensitivity_table.raw_scores(table)
  for method in sensitivity_table.METHODS:
    points = sensitivity_table.front(run.experiment, raw, 7, method)
    least, most = allocation.bounds(run.experiment.space, run.experiment.cost)
    targets = [point.target for point in points]
    np.testing.assert_allclose(
      np.diff(np.log(targets)), np.log(most / least) / 6, rtol=1e-6
    )
    for point in points:
      assert point.cost <= point.target * (1 + 1e-6)
    np.testing.assert_allclose(points[0].cost, least, rtol=1e-6)
    np.testing.assert_allclose(points[-1].cost, most, rtol=1e-6)
    assert points[-1].score == 0
    scores = [point.score for point in points]
    assert scores == sorted(scores, reverse=True)
    regular, _ = sensitivity.regular(run.experiment.space, raw)
    assert scores[0] == pytest.approx(sum(row[0] for row in regular.values()))


def test_scores_below_zero_count_as_zero(trained):
  _, run, table = trained
  raw = sensitivity_table.raw_scores(table)
  name = next(iter(raw))
  raw[name] = np.asarray([-1.0, 2.0, 0.0])
  experiment = sensitivity_table.at_target(run.experiment, 1.0, 'INT4')
  point = sensitivity_table.allocate(experiment, raw)
  regular, count = sensitivity.regular(experiment.space, raw)
  assert count == 1
  assert point.score == pytest.approx(
    sum(values[0] for values in regular.values())
  )


def test_targets_of_another_cost(trained):
  _, run, table = trained
  raw = sensitivity_table.raw_scores(table)
  experiment = sensitivity_table.at_target(
    run.experiment, 6.0, kind='average_bits'
  )
  point = sensitivity_table.allocate(experiment, raw)
  assert experiment.cost.unit == 'bits'
  assert 4 < point.cost <= 6 * (1 + 1e-6)
  low = sensitivity_table.at_target(experiment, 1.0)
  with pytest.raises(ValueError, match='at most 1 bits allowed.*costs 4'):
    sensitivity_table.allocate(low, raw)
  for target in (0, -1.5, math.nan, math.inf):
    message = f'--target={target} must be a finite number above 0'
    with pytest.raises(ValueError, match=message):
      sensitivity_table.at_target(experiment, target)
  with pytest.raises(ValueError, match="'joules' is unknown"):
    sensitivity_table.at_target(experiment, 1.0, kind='joules')
  with pytest.raises(ValueError, match='--method=best is unknown; allowed: e'):
    sensitivity_table.allocate(experiment, raw, 'best')
  with pytest.raises(ValueError, match='--front=1 must be at least 2'):
    sensitivity_table.front(experiment, raw, 1)


def test_the_command_writes_an_arch_that_the_run_takes(
  trained, tmp_path, capsys
):
  workdir, run, _ = trained
  table = f'--table={workdir / "table" / "sensitivity.json"}'
  out = tmp_path / 'arch.json'
  flags = [str(workdir), table, '--target=2', f'--out={out}']
  assert assign.main(flags) == 0
  printed = json.loads(capsys.readouterr().out)
  assert printed['cost_over_target'] <= 1 + 1e-6
  assert printed['negative_scores'] == 0
  choices = evaluation.choose(run, str(out))
  cost = float(run.experiment.cost_of(choices))
  assert cost == pytest.approx(printed['cost'])
  uniform = float(run.experiment.cost_of(run.experiment.space.uniform('INT4')))
  content = json.loads(out.read_text())
  assert content['cost'] == dict(
    kind='bops', unit='GBOPs', value=cost, target=pytest.approx(2 * uniform)
  )


def test_formats_and_sizes_are_printed_in_tables_of_their_own():
  def decision(kind, options, scores):
    return dict(kind=kind, options=options, scores=scores)

  text = sensitivity_command.markdown(
    {
      'stem': decision('format', ['INT4', 'INT8'], [0.25, 0.0]),
      'stem/channels': decision('channels', [4, 8], [0.5, 0.0]),
      'head/channels': decision('channels', [8, 16], [1.5, 0.0]),
    }
  )
  assert text.splitlines() == [
    '| decision | INT4 | INT8 |',
    '| --- | --- | --- |',
    '| stem | 0.25 | 0 |',
    '',
    '| decision | 4 | 8 | 16 |',
    '| --- | --- | --- | --- |',
    '| stem/channels | 0.5 | 0 |  |',
    '| head/channels |  | 1.5 | 0 |',
  ]


def test_the_command_writes_a_front(trained, tmp_path, capsys):
  workdir, _, content = trained
  table = f'--table={workdir / "table" / "sensitivity.json"}'
  out = tmp_path / 'front.csv'
  flags = [str(workdir), table, '--front=3', f'--out={out}']
  assert assign.main(flags) == 0
  # A head, a rule and three budgets.
  assert len(capsys.readouterr().out.splitlines()) == 5
  head, *rows = csv.reader(out.read_text().splitlines())
  assert head[4:] == list(content['decisions'])
  assert rows[0][4:] == ['INT4'] * 2
  assert rows[-1][4:] == ['BF16'] * 2


def test_mistakes_of_the_command_line(trained, capsys):
  workdir, *_ = trained
  # The table is elsewhere.
  assert assign.main([str(workdir), '--target=2']) == 2
  assert 'sensitivity.json cannot be read' in capsys.readouterr().err
  assert sensitivity_command.main([str(workdir), '--scores=fish']) == 2
  assert '--scores=fish is unknown' in capsys.readouterr().err
  assert sensitivity_command.main([str(workdir), f'--out={__file__}']) == 2
  assert 'File exists' in capsys.readouterr().err
  for flags in ([], ['--target=2', '--front=3']):
    with pytest.raises(SystemExit):
      assign.main([str(workdir), *flags])
    assert 'give --target or --front' in capsys.readouterr().err
