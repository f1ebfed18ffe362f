"""Crops of test pictures in the report: whose, in which order, how good."""

import numpy as np
import pytest

from fliqs_jax.report import picture_figure
from fliqs_jax.runtime import workdir as workdir_lib
from tests.report import finished

_RNG = np.random.default_rng(0)
LOW = _RNG.integers(0, 256, (2, 6, 6, 3), np.uint8)
TARGET = _RNG.integers(20, 230, (2, 12, 12, 3), np.uint8)


def _save(workdir, made, target=TARGET):
  workdir.mkdir(parents=True, exist_ok=True)
  np.savez(workdir / 'pictures.npz', low=LOW, made=made, target=target)


@pytest.fixture
def workdir(tmp_path):
  """A run that is 10 levels off, with three references and one without."""
  _save(tmp_path, TARGET + 10)
  for name, off in (('INT4', 20), ('INT8', 5), ('BF16', 0)):
    _save(tmp_path / f'uniform_{name}', TARGET + off)
  return tmp_path


def test_pictures_go_from_the_input_over_floats_to_the_target(workdir):
  shown = picture_figure.read(workdir, ['INT4', 'INT8', 'INT6', 'BF16'])
  assert list(shown) == ['bicubic', 'BF16', 'found', 'INT4', 'INT8', 'target']
  np.testing.assert_array_equal(shown['found'], TARGET + 10)
  np.testing.assert_array_equal(shown['INT8'], TARGET + 5)
  assert shown['bicubic'].shape == TARGET.shape


def test_a_network_that_saw_other_pictures_is_left_out(workdir):
  _save(workdir / workdir_lib.RETRAINED, TARGET, target=TARGET[::-1])
  assert 'retrained' not in picture_figure.read(workdir, ['retrained'])
  _save(workdir / workdir_lib.RETRAINED, TARGET)
  assert 'retrained' in picture_figure.read(workdir, ['retrained'])


def test_the_psnr_is_below_each_crop(workdir):
  shown = picture_figure.read(workdir, ['INT4'])
  axes = picture_figure.pictures(shown, 2).axes
  titles = [a.get_title() for a in axes[:4]]
  assert titles == ['bicubic', 'found', 'INT4', 'target']
  # 10 levels of grey are 10 x 219.859 / 256 of Y: 20 log10(255 / 8.588).
  assert axes[1].get_xlabel() == axes[5].get_xlabel() == '29.45 dB'
  assert axes[2].get_xlabel() == '23.43 dB'  # 6.02 less.
  assert axes[3].get_xlabel() == ''


def test_the_report_shows_pictures_if_the_run_has_them(workdir):
  contents = finished.files()
  contents['config.json']['data'] = dict(name='pictures', scale=2)
  page = finished.page(workdir, contents)
  assert '<h2>Pictures</h2>' in page
  assert (workdir / 'pictures.png').stat().st_size > 0
  (workdir / 'pictures.npz').unlink()
  assert '<h2>Pictures</h2>' not in finished.page(workdir, contents)


def test_a_damaged_file_is_named(workdir):
  path = workdir / 'pictures.npz'
  path.write_bytes(path.read_bytes()[:100])
  with pytest.raises(ValueError, match='pictures.npz is damaged: .*delete it'):
    picture_figure.read(workdir, [])
