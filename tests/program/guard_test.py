"""The comparison of a program at BF16 with the original model."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from fliqs_jax.program import contractions
from fliqs_jax.program import guard
from fliqs_jax.program import searchable as searchable_lib
from fliqs_jax.space import quant_spec
from tests import helpers

X = helpers.random((4, 8))


class Net(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.tanh(nn.Dense(6, name='first')(x))
    return nn.Dense(3, use_bias=False, name='second')(x)


MODEL = searchable_lib.searchable(Net(), quant_spec.QuantSpec('INT4'))
VARIABLES = MODEL.init(jax.random.key(0), X)


def test_products_at_bf16_are_the_original_up_to_rounding():
  apart = guard.check(MODEL, VARIABLES, X)
  assert list(apart) == ['first', 'second']
  # Two operands, each rounded by at most 2**-9; not exact, since BF16 rounds.
  assert all(0 < difference < 2**-7 for difference in apart.values())


def test_the_first_product_that_means_something_else_is_named(monkeypatch):
  right = contractions.Dot.floats

  def wrong(self, lhs, rhs):
    y = right(self, lhs, rhs)
    return y if y.shape[-1] == 6 else jnp.flip(y, axis=-1)

  monkeypatch.setattr(contractions.Dot, 'floats', wrong)
  with pytest.raises(ValueError, match='^second: at BF16 its result differs'):
    guard.check(MODEL, VARIABLES, X)


def test_a_result_whose_terms_cancel_is_not_taken_for_another_function():
  # All inputs are about 200 and the weights of an output add up to zero: BF16
  # rounds an input by up to .5, which is much of the result and little of 200.
  inputs, weights = 200 + X, helpers.random((8, 3), seed=1)
  params = dict(front=dict(w=weights - weights.mean(axis=0)))
  model = searchable_lib.searchable(
    lambda params, x: x @ params['front']['w'],
    quant_spec.QuantSpec('INT4'),
    params=params,
  )
  assert guard.check(model, model.init(None, inputs), inputs)['front'] < 2**-7


def test_an_excluded_product_is_not_compared(monkeypatch):
  monkeypatch.setattr(
    contractions.Dot, 'floats', lambda self, lhs, rhs: jnp.full((4, 6), 9.0)
  )
  spec = quant_spec.QuantSpec('INT4', exclude=('*',))
  assert guard.check(searchable_lib.searchable(Net(), spec), VARIABLES, X) == {}


@pytest.mark.parametrize('bad', [jnp.nan, jnp.inf])
def test_numbers_that_are_not_finite_are_told_from_another_function(bad):
  with pytest.raises(ValueError, match='^first: its result is not finite'):
    guard.check(MODEL, VARIABLES, jnp.asarray(X).at[0, 0].set(bad))
