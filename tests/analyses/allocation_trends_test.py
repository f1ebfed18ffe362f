"""Allocation trends, of made-up finished runs."""

import pytest

from fliqs_jax import analysis
from fliqs_jax.analyses import allocation_trends
from tests.report import finished


def _write(workdir, found):
  workdir.mkdir(parents=True)
  finished.write(workdir, finished.files(found))


def test_rank_correlations_by_hand():
  # Ranks 1, 2.5, 2.5, 4 against 4, 2.5, 2.5, 1: exactly opposite.
  assert allocation_trends.correlation([1, 2, 2, 9], [8, 4, 4, 2]) == (
    pytest.approx(-1)
  )
  assert allocation_trends.correlation([1, 2, 3], [4, 4, 4]) is None


def test_bits_fall_with_the_position(tmp_path):
  # Four quantized layers of five: 8, 4, 4, 8 bits, and 16, 8, 8, 4 bits.
  names = [path for path in finished.FOUND if path != 'head']
  for i, formats in enumerate(
    (('INT8', 'INT4', 'INT4', 'INT8'), ('BF16', 'INT8', 'INT8', 'INT4'))
  ):
    found = {n: (f, f) for n, f in zip(names, formats)} | dict(
      head=(None, None)
    )
    _write(tmp_path / f'run{i}', found)
  # A part of a run is no run of its own.
  _write(tmp_path / 'run0/retrained', finished.FOUND)
  finding = allocation_trends.analyse(tmp_path)
  rows = {row['trend']: row for row in finding.rows}
  position = rows['position of the others']
  # The first layer is left out, and the head is not quantized. Ranks of bits
  # 1.5, 1.5, 3 and 2.5, 2.5, 1 against 1, 2, 3: covariance 1.5 and -1.5,
  # variances 1.5 and 2.
  assert position['runs'] == 2
  assert position['correlation'] == pytest.approx(0)
  # Half the distance of two numbers.
  assert position['error'] == pytest.approx(1.5 / 3**0.5)
  # 1 0 0 0 of ranks 3.5 1.5 1.5 3.5, and of 4 2.5 2.5 1: covariances 1 and
  # 1.5, variances .75 and 4, .75 and 4.5.
  first = (1 / 3**0.5 + 1.5 / (0.75 * 4.5) ** 0.5) / 2
  assert rows['first or last']['correlation'] == pytest.approx(first)
  assert rows['channels']['runs'] == 0  # No size is open.
  assert rows['MACs']['runs'] == 0  # All layers have as many.
  assert finding.verdicts == [
    'first or last: as in the paper',
    'position of the others: no trend beyond two standard errors',
  ]


def test_the_command_draws_the_layers(tmp_path, capsys):
  _write(tmp_path / 'runs/a', finished.FOUND)
  flags = [f'--runs={tmp_path / "runs"}', f'--out={tmp_path / "out"}']
  assert analysis.main(['allocation_trends', *flags]) == 0
  assert '| first or last | 1 | +' in capsys.readouterr().out
  picture = tmp_path / 'out/allocation_trends.png'
  assert picture.read_bytes().startswith(b'\x89PNG')


def test_uniform_networks_are_no_searches(tmp_path):
  files = finished.files()
  for decision in files['result.json']['decisions'].values():
    decision['options'] = decision['options'][:1]
  finished.write(tmp_path, files)
  with pytest.raises(ValueError, match='holds no finished search'):
    allocation_trends.analyse(tmp_path)
