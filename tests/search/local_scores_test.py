"""Scores that layers have by themselves, worked out by hand."""

import functools

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest

import fliqs_jax as fliqs
from fliqs_jax.search import local_scores
from fliqs_jax.space import decisions as decisions_lib
from fliqs_jax.space import search_space
from fliqs_jax.space import sizes as sizes_lib


def _column(dense):
  class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train):
      return dense(1, use_bias=False, name='head')(x)

  return Net()


def _squares(outputs, batch):
  return jnp.mean((outputs[:, 0] - batch['label']) ** 2), {}


def _quantized(spec):
  model = _column(functools.partial(fliqs.QuantDense, spec=spec))
  space = fliqs.find_decisions(model, np.ones((1, 2)), spec=spec, train=False)
  return model, space


def _hessian_scorer(spec):
  model, space = _quantized(spec)
  return local_scores.hessian(
    model.apply, _column(nn.Dense).apply, _squares, space
  )


def test_hessian_is_the_trace_times_the_error_of_the_weights():
  # The mean over 2 examples of (x w - t)^2 has the Hessian X'X = diag(4, 1) for
  # x = (2, 0), (0, 1): every draw of v . H v is 5, whatever its signs, so the
  # mean over 2 weights is 2.5. The scale is 1 / the largest integer.
  weights = np.asarray([[0.7], [-1.0]], np.float32)
  batch = dict(image=np.diag([2.0, 1.0]).astype(np.float32), label=np.ones(2))
  menu = ('INT2', 'INT4', 'INT8')
  score = _hessian_scorer(fliqs.QuantSpec(menu, mode='weights'))
  scores = score({'params': {'head': {'kernel': weights}}}, [batch])
  # 0.7 becomes 1 / 1, 5 / 7 and 89 / 127; -1 stays.
  squares = (0.7 - np.asarray([1, 5 / 7, 89 / 127])) ** 2
  np.testing.assert_allclose(
    scores['head'], 2.5 * (squares - squares[2]), rtol=1e-3, atol=1e-9
  )


def test_hessian_refuses_decisions_that_set_no_weights():
  spec = fliqs.QuantSpec('int_s', mode='separate')
  with pytest.raises(
    ValueError, match='hessian sees weights alone, but head/a'
  ):
    _hessian_scorer(spec)


@pytest.mark.parametrize('mode', ['tied', 'separate'])
def test_errors_are_relative_and_add_up_over_operands(mode):
  weights = np.asarray([[0.7], [-1.0]], np.float32)
  inputs = np.asarray([[2.0, 0.3], [1.1, -0.4]], np.float32)
  # Thresholds are the largest magnitudes, 1 and 2. INT2 has the grid -1, 0, 1
  # times these; INT4 rounds to sevenths of 1 and of 2.
  of_weights = np.asarray([0.3**2, (0.7 - 5 / 7) ** 2]) / (0.7**2 + 1)
  of_inputs = np.asarray(
    [
      0.3**2 + 0.9**2 + 0.4**2,
      (0.3 - 2 / 7) ** 2 + (1.1 - 8 / 7) ** 2 + (0.4 - 2 / 7) ** 2,
    ]
  ) / np.sum(inputs.astype(np.float64) ** 2)
  spec = fliqs.QuantSpec(('INT2', 'INT4'), mode=mode, act_clip=100.0)
  model, space = _quantized(spec)
  params = {'head': {'kernel': weights}}
  arch = space.expand(space.dearest())
  _, statistics = model.apply(
    {'params': params, 'arch': arch}, inputs, True, mutable=['quant_stats']
  )
  score = local_scores.error(model.apply, space)
  scores = score({'params': params, **statistics}, [dict(image=inputs)] * 2)
  expected = {'head/weights': of_weights, 'head/activations': of_inputs}
  if mode == 'tied':
    expected = {'head': of_weights + of_inputs}
  assert scores.keys() == expected.keys()
  for name, errors in expected.items():
    np.testing.assert_allclose(scores[name], errors - errors[1], rtol=1e-4)


def test_errors_refuse_sizes():
  channels = sizes_lib.Channels('net/channels', (2, 4), (2, 4))
  size = decisions_lib.SizeDecision('net/channels', ('net/width',), channels)
  space = search_space.SearchSpace((), (size,), ops=(), params=1)
  with pytest.raises(ValueError, match='error sees formats alone, but net/ch'):
    local_scores.error(lambda *args: None, space)
