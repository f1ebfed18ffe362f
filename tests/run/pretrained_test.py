"""Runs that start from the parameters of a trained network."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy

from configs import digits
from fliqs_jax.run import experiment as experiment_lib
from fliqs_jax.run import pretrained


@pytest.fixture(scope='module')
def state():
  experiment = experiment_lib.build(digits.get_config('smoke'))
  shapes = jax.eval_shape(experiment.initial_state)
  key = jax.random.key(0)
  return jax.tree.map(
    lambda s: key if s.dtype == key.dtype else jnp.zeros(s.shape, s.dtype),
    shapes,
  )


def _other(state):
  """Returns collections whose every value is 1 more than that of the state."""
  own = dict(params=state.params, batch_stats=state.model_state['batch_stats'])
  return jax.tree.map(lambda x: np.asarray(x) + 1, own)


def _flat(tree, separator):
  return {
    jax.tree_util.keystr(path, simple=True, separator=separator): x
    for path, x in jax.tree_util.tree_leaves_with_path(tree)
  }


def _safetensors(separator):
  def write(tree, path):
    path = path.with_suffix('.safetensors')
    safetensors.numpy.save_file(_flat(tree, separator), path)
    return path

  return write


def _orbax(tree, path):
  with ocp.PyTreeCheckpointer() as checkpointer:
    checkpointer.save(path, tree)
  return path


_WRITERS = {
  'slashes': _safetensors('/'),
  'dots': _safetensors('.'),
  'orbax': _orbax,
}


@pytest.mark.parametrize('write', _WRITERS.values(), ids=_WRITERS)
def test_a_state_starts_with_the_collections_of_a_file(write, state, tmp_path):
  given = _other(state)
  path = write(given, tmp_path / 'trained')
  actual = pretrained.started(state, str(path))
  jax.tree.map(np.testing.assert_array_equal, actual.params, given['params'])
  for name, collection in state.model_state.items():
    jax.tree.map(
      np.testing.assert_array_equal,
      actual.model_state[name],
      given.get(name, collection),
    )
  assert int(actual.step) == 0


def test_parameters_alone_are_enough(state, tmp_path):
  given = _other(state)['params']
  path = _safetensors('/')(given, tmp_path / 'trained')
  actual = pretrained.started(state, str(path))
  jax.tree.map(np.testing.assert_array_equal, actual.params, given)
  assert actual.model_state['batch_stats'] == state.model_state['batch_stats']


def test_another_network_is_named_parameter_by_parameter(state, tmp_path):
  given = _flat(_other(state)['params'], '/')
  first, second, *_ = given
  given['head2/kernel'] = given.pop(first)
  path = tmp_path / 'a.safetensors'
  safetensors.numpy.save_file(given, path)
  with pytest.raises(ValueError, match=f'missing are {first}; .*head2/kernel'):
    pretrained.started(state, str(path))
  given[first] = given.pop('head2/kernel')
  given[second] = np.zeros((1, *given[second].shape), np.float32)
  safetensors.numpy.save_file(given, path)
  with pytest.raises(ValueError, match=f'{second} has the shape'):
    pretrained.started(state, str(path))
  # Codes of a quantized network are no values.
  given[second] = given[second][0].astype(np.int8)
  safetensors.numpy.save_file(given, path)
  with pytest.raises(
    ValueError, match=f'{second} has the type int8, but .*float'
  ):
    pretrained.started(state, str(path))
  given[second] = given[second].astype(np.float16)
  safetensors.numpy.save_file(given, path)
  pretrained.started(state, str(path))


def test_a_model_json_is_read_with_the_weights_beside_it(tmp_path):
  kernel = np.arange(6, dtype=np.float32).reshape(1, 2, 3)
  bias = np.float32([255, 0, -51])
  (tmp_path / 'a.bin').write_bytes(kernel.tobytes() + bias.tobytes())
  weights = [
    dict(name='SR/kernel', shape=[1, 2, 3], dtype='float32'),
    dict(name='SR/bias', shape=[3], dtype='float32'),
  ]
  group = dict(paths=['a.bin'], weights=weights)
  path = tmp_path / 'model.json'
  path.write_text(json.dumps(dict(weightsManifest=[group])))
  layer = pretrained.load(str(path))['params']['SR']
  np.testing.assert_array_equal(layer['kernel'], kernel)
  np.testing.assert_allclose(layer['bias'], [1, 0, -0.2])  # Of 0 .. 255.


def test_a_checkpoint_may_be_at_home(monkeypatch, tmp_path):
  monkeypatch.setenv('HOME', str(tmp_path))
  kernel = np.ones((2, 3), np.float32)
  safetensors.numpy.save_file(
    {'head.kernel': kernel}, tmp_path / 'a.safetensors'
  )
  loaded = pretrained.load('~/a.safetensors')['params']['head']
  np.testing.assert_array_equal(loaded['kernel'], kernel)


def test_what_is_no_checkpoint_is_refused(state, tmp_path):
  with pytest.raises(ValueError, match='does not exist'):
    pretrained.started(state, str(tmp_path / 'nothing'))
  (tmp_path / 'text').write_text('not tensors')
  with pytest.raises(ValueError, match='safetensors'):
    pretrained.started(state, str(tmp_path / 'text'))
  (tmp_path / 'folder').mkdir()
  with pytest.raises(ValueError, match='Orbax'):
    pretrained.started(state, str(tmp_path / 'folder'))
