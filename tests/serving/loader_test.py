"""A served model runs where its inputs are, with the same bits everywhere."""

import jax
import numpy as np
import pytest

from fliqs_jax import serving
from tests import helpers
from tests.serving import cases

AUTO, EXPLICIT = jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit
X = helpers.random((16, 4))


@pytest.fixture(scope='module', name='exported')
def _exported(tmp_path_factory):
  out = tmp_path_factory.mktemp('exports') / 'out'

  def double(params, x):
    return dict(scores=x @ params['w'], twice=2 * x)

  return cases.written(out, double, X)


@pytest.fixture(name='served')
def _served(exported):
  return serving.load(exported)


def split(x, kind, *names):
  mesh = jax.make_mesh((8,), ('d',), axis_types=(kind,))
  spec = jax.sharding.PartitionSpec(*names)
  return jax.device_put(x, jax.sharding.NamedSharding(mesh, spec))


def test_a_model_runs_on_the_device_of_its_inputs(served):
  device = jax.devices()[3]
  outputs = served(jax.device_put(X, device))
  assert {y.device for y in outputs.values()} == {device}
  np.testing.assert_array_equal(outputs['twice'], 2 * X)
  np.testing.assert_array_equal(outputs['scores'], served(X)['scores'])


def test_operands_are_where_the_model_was_loaded(exported):
  device = jax.devices()[5]
  with jax.default_device(device):
    served = serving.load(exported)
  assert {x.device for x in served.operands} == {device}


@pytest.mark.parametrize('kind', [AUTO, EXPLICIT])
@pytest.mark.parametrize('names', [(), ('d',)])
def test_a_model_runs_on_inputs_that_are_split(served, kind, names):
  outputs = served(split(X, kind, *names))
  assert len(outputs['twice'].sharding.device_set) == 8
  assert outputs['twice'].addressable_shards[0].data.shape == (
    (2, 4) if names else (16, 4)
  )
  np.testing.assert_array_equal(outputs['twice'], 2 * X)
  np.testing.assert_array_equal(outputs['scores'], served(X)['scores'])


def test_slices_of_what_is_split_are_refused(exported, served):
  sliced = serving.load(exported, at_once=8)
  with pytest.raises(
    ValueError, match=r'input 0 is float32\[16@d,4\]: .* give 8 examples at a'
  ):
    sliced(split(X, EXPLICIT, 'd'))
  for x in (split(X, AUTO, 'd'), split(X, EXPLICIT), split(X[:8], EXPLICIT)):
    helpers.same(
      jax.tree.map(np.asarray, sliced(x)),
      jax.tree.map(np.asarray, served(X[: len(x)])),
    )
