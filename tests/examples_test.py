"""The examples: models without a line of ours, searched in a few seconds."""

import ast
import json
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples import char_transformer
from examples import digits_cnn
from examples import search_digits
from examples import search_text
from fliqs_jax import export

pytestmark = pytest.mark.slow

_EXAMPLES = pathlib.Path(digits_cnn.__file__).parent


@pytest.fixture(autouse=True)
def _as_users_have_it():
  with jax.numpy_rank_promotion('allow'):
    yield


def _shapes(model, *args, **kwargs):
  init = jax.eval_shape(
    lambda key: model.init(key, *args, **kwargs), jax.random.key(0)
  )
  return jax.tree.map(jnp.shape, init['params'])


@pytest.mark.parametrize('name', ['digits_cnn', 'char_transformer'])
def test_the_models_know_nothing_of_us(name):
  tree = ast.parse((_EXAMPLES / f'{name}.py').read_text())
  imported = [
    alias.name
    for node in ast.walk(tree)
    if isinstance(node, ast.Import | ast.ImportFrom)
    for alias in node.names
  ]
  assert set(imported) <= {'flax.linen', 'jax', 'jax.numpy'}


def test_a_classifier_of_real_digits_is_searched_and_served(tmp_path):
  result = search_digits.search(tmp_path / 'out', steps=200)
  losses = result['losses']
  assert losses[-20:].mean() < 0.2 * losses[:5].mean()
  # Four decisions make coarse steps: one more bit in the second convolution,
  # with 58 % of the MACs, is (25 - 16) / 16 * 58 % / 1.5 = 22 %.
  assert abs(result['relative_cost'] - 1) < 0.22
  assert result['accuracy'] > 0.9
  assert sorted(result['assignment']) == [
    'Conv_0',
    'Conv_1',
    'Dense_0',
    'Dense_1',
  ]
  assert not result['coverage'].missed
  # Everything but batch norms and biases is an integer of at most 8 bits.
  exported = result['exported']
  assert exported['reference']['bit_equal']
  assert exported['bytes']['stored'] < exported['bytes']['float32'] / 3.5
  assert export.verify(tmp_path / 'out')['bit_equal']
  assert jax.tree.map(jnp.shape, result['params']) == _shapes(
    digits_cnn.DigitsCNN(), np.zeros((1, 8, 8, 1)), train=False
  )


def test_a_language_model_of_real_text_is_searched_and_served(tmp_path):
  result = search_text.search(tmp_path / 'out', steps=120)
  losses = result['losses']
  # ln 128 = 4.85 at first; characters drawn by their frequency have 3.1.
  assert losses[0] > 4.5
  assert losses[-20:].mean() < 3.0
  assert result['test_loss'] < 3.0
  assert abs(result['bits'] - search_text.BITS) < 0.5
  missed = {m.path for m in result['coverage'].missed}
  assert 'positions' in missed
  assert 'embed/embedding' not in missed
  model = char_transformer.CharTransformer()
  tokens = np.zeros((1, search_text.LENGTH), np.int32)
  assert jax.tree.map(jnp.shape, result['params']) == _shapes(
    model, tokens, deterministic=True
  )
  # The found parameters are the original's: it runs with them as it is.
  logits = model.apply({'params': result['params']}, tokens, deterministic=True)
  assert np.isfinite(logits).all()
  # Each step of a scanned layer is stored in its own format.
  exported = result['exported']
  reference = exported['reference']
  assert reference['max_difference'] <= 1e-4 * reference['largest_output']
  assert exported['bytes']['stored'] < exported['bytes']['float32'] / 3.5
  assert 'blocks/up/@2' in exported['layers']
  # Query, key and value share a decision.
  found = result['assignment']
  assert len({found[f'blocks/attention/{n}/@0'] for n in ('query', 'key')}) == 1


def test_the_notebook_ends_with_served_outputs_equal_to_the_searchs(
  tmp_path, monkeypatch
):
  # Its last cell compares them; here its cells run in order without Jupyter.
  monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path))
  notebook = json.loads((_EXAMPLES / 'own_model.ipynb').read_text())
  values = {}
  for cell in notebook['cells']:
    if cell['cell_type'] == 'code':
      exec(compile(''.join(cell['source']), 'own_model', 'exec'), values)
  assert values['logits'].shape == (397, 10)
  # Digits are easy: less than 90 % means that something does not learn.
  assert values['accuracy'] > 0.9
  assert 0.9 < float(values['relative_cost'](values['choices'])) < 1.1
