"""Analyses without training, against expected figures and exact integrals."""

import csv

import numpy as np
import pytest

from fliqs_jax import analysis
from fliqs_jax.analyses import best_clip
from fliqs_jax.analyses import finding as finding_lib
from fliqs_jax.analyses import studies
from fliqs_jax.analyses import switching_error
from fliqs_jax.analyses import synthetic


@pytest.mark.parametrize('distribution', ['gaussian', 'laplacian'])
def test_switching_errors_are_those_of_the_design(distribution):
  # A tenth of the analysis' tensors: the mean of 100 is known to a percent.
  x = synthetic.tensors(distribution, 0, 100, 1000)
  np.testing.assert_allclose(
    switching_error.errors(x),
    switching_error.EXPECTED[distribution],
    rtol=switching_error.ACCEPTED,
  )


def test_a_switching_error_by_hand():
  # Threshold 7: INT4 has a step of 1, INT2 of 7. 3 becomes 3 and 0, 4 becomes 4
  # and 7: differences 0, 3 and 3, and none of a format with itself.
  x = np.array([[7.0, 3.0, 4.0]])
  errors = switching_error.errors(x, bits=(2, 4), other='INT4')
  np.testing.assert_allclose(errors, [np.sqrt(6), 0], atol=1e-12)


def test_an_exponential_is_fitted_exactly():
  bits = np.arange(2, 8)
  fitted = switching_error.fitted(bits, 3 * np.exp(-0.7 * bits) + 0.05)
  np.testing.assert_allclose(fitted, [3, 0.7, 0.05], rtol=1e-4)


def test_outliers_have_their_rate_and_three_times_the_largest_magnitude():
  clean = synthetic.tensors('gaussian', 0, 20, 1000)
  x = synthetic.tensors('gaussian', 100, 20, 1000)
  np.testing.assert_allclose(clean.std(axis=1), 1)
  changed = x != clean
  assert list(changed.sum(axis=1)) == [10] * 20
  for before, after, places in zip(clean, x, changed):
    np.testing.assert_allclose(np.abs(after[places]), 3 * np.abs(before).max())
  assert 60 < (x[changed] > 0).sum() < 140  # Of 200 signs, half.
  # One in 10,000 is one in each tenth tensor of 1000 values.
  x = synthetic.tensors('gaussian', 10_000, 20, 1000)
  assert list((x != clean).sum(axis=1).nonzero()[0]) == [0, 10]


def _exact(distribution, bits):
  """Returns the best clip of a distribution of deviation 1, by integration."""
  x = np.linspace(0, 14, 140_001)
  density = dict(gaussian=np.exp(-(x**2) / 2), laplacian=np.exp(-(2**0.5) * x))
  levels = 2 ** (bits - 1) - 1

  def error(clip):
    q = np.rint(np.minimum(x, clip) * levels / clip) * clip / levels
    return np.trapezoid((q - x) ** 2 * density[distribution], x)

  clips = 0.05 * np.arange(5, 181)
  return clips[np.argmin([error(clip) for clip in clips])]


@pytest.mark.parametrize('distribution', ['gaussian', 'laplacian'])
def test_best_clips_are_those_of_the_distribution(distribution):
  x = synthetic.tensors(distribution, 0, 100, 10_000)
  candidates = best_clip.thresholds(x)
  best = candidates[best_clip.squared_errors(x, candidates).argmin(axis=1)]
  exact = [_exact(distribution, bits) for bits in range(2, 9)]
  # The minimum of many bits is flat, and hangs on few values of the sample.
  np.testing.assert_allclose(best, exact, atol=0.051 + 0.01 * exact[-1])
  # The design's figures of few bits; those of many were of a single tensor.
  expected = best_clip.EXPECTED[distribution]
  np.testing.assert_allclose(best[:4], expected[:4], rtol=0.04)


def test_the_page_says_what_is_exact():
  text = ' '.join(best_clip.analyse().text)
  gaussian, laplacian = (_exact(d, 8) for d in best_clip.EXPECTED)
  assert f'{gaussian:.1f} (Gaussian) and {laplacian:.1f} (Laplacian)' in text


def test_the_command_writes_a_table_a_picture_and_a_page(tmp_path, capsys):
  assert analysis.main(['best_clip', f'--out={tmp_path / "new"}']) == 0
  printed = capsys.readouterr().out
  assert '| gaussian | none | expected | 1.20 |' in printed
  assert '- laplacian, INT2 to INT5: at most 0.' in printed
  with (tmp_path / 'new/best_clip.csv').open() as file:
    rows = list(csv.DictReader(file))
  # Two distributions, each with five rates and the expected figures.
  assert len(rows) == 2 * 6
  assert rows[0]['source'] == 'expected'
  picture = (tmp_path / 'new/best_clip.png').read_bytes()
  assert picture.startswith(b'\x89PNG')
  page = (tmp_path / 'new/best_clip.html').read_text()
  assert '://' not in page
  assert '<td>1.95</td>' in page


def test_a_cell_is_empty_where_a_number_is_missing():
  columns = [
    finding_lib.Column('a', 'A', '+.1f', error='e', scale=100),
    finding_lib.Column('b', 'B'),
  ]
  rows = [dict(a=0.5, e=0.01, b='x'), dict(a=-0.5), dict(b=None)]
  finding = finding_lib.Finding('', (), columns, rows, (), lambda: None, '')
  assert finding.cells() == [
    ['A', 'B'],
    ['+50.0 ± 1.0', 'x'],
    ['-50.0', ''],
    ['', ''],
  ]


def test_an_unknown_analysis_is_one_line(tmp_path, capsys):
  assert analysis.main(['luck', f'--out={tmp_path}']) == 2
  error = capsys.readouterr().err
  assert "unknown analysis 'luck'; allowed: switching_error, best_clip" in error
  assert error.count('\n') == 1


def test_a_file_is_no_directory_before_anything_is_computed(
  tmp_path, capsys, monkeypatch
):
  monkeypatch.setitem(analysis.COMPUTED, 'best_clip', lambda: 1 / 0)
  file = tmp_path / 'file'
  file.touch()
  assert analysis.main(['best_clip', f'--out={file}']) == 2
  error = capsys.readouterr().err
  assert f"File exists: '{file}'; check the path" in error


def test_help_lists_every_analysis(capsys):
  with pytest.raises(SystemExit):
    analysis.main(['--help'])
  printed = capsys.readouterr().out
  assert '  best_clip         Best clip (A.8): the threshold of' in printed
  assert '  entropy           Weight and schedule of the entropy' in printed
  for name in (*analysis.COMPUTED, *analysis.FINISHED, *studies.STUDIES):
    assert f'\n  {name} ' in printed
