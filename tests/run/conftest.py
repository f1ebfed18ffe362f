"""A finished run that the tests of this folder share; they do not change it."""

import pytest

from fliqs_jax.run import train
from tests import tiny


@pytest.fixture(scope='session')
def finished(tmp_path_factory):
  """A finished run: its workdir and its result."""
  workdir = tmp_path_factory.mktemp('finished')
  return workdir, train.train_and_evaluate(tiny.get_config(), workdir)


@pytest.fixture(autouse=True)
def _reports_have_empty_pictures(empty_pictures):
  """Those of single tests; the run `finished` has them all."""
