"""What a loss and a quality may return."""

import re

import jax
import jax.numpy as jnp
import pytest

from fliqs_jax.search import objectives
from fliqs_jax.search import sensitivity

_ONE, _MANY = jnp.ones(()), jnp.ones((4, 1))


def test_a_loss_has_metrics_of_any_names():
  value, metrics = objectives.loss_of(lambda y, b: (y, {}), _ONE, {})
  assert (value, metrics) == (1.0, {})
  value, metrics = objectives.loss_of(lambda y, b: (y, dict(a=b)), _ONE, 3.0)
  assert (value, metrics) == (1.0, dict(a=3.0))


@pytest.mark.parametrize(
  ('result', 'message'),
  [
    (_ONE, 'must return the loss and a dict of metrics.*returned float32[]'),
    ((_ONE, _ONE), 'returned (float32[], float32[])'),
    ((_ONE, {}, {}), 'returned (float32[], dict, dict)'),
    (None, 'returned NoneType'),
    ((_MANY, {}), 'the mean over the examples; it is float32[4,1]'),
    ((None, {}), 'it is NoneType'),
  ],
)
def test_a_loss_that_is_no_loss_is_refused(result, message):
  pattern = '.*'.join(map(re.escape, message.split('.*')))
  with pytest.raises(ValueError, match=pattern):
    objectives.loss_of(lambda y, b: result, _ONE, {})


def test_a_quality_of_each_example_is_refused():
  # The controller would take it for that of many architectures.
  with pytest.raises(ValueError, match=r'quality.*one number.*float32\[4,1\]'):
    jax.eval_shape(
      lambda y: objectives.quality_of(lambda y, b: y, y, {}), _MANY
    )


@pytest.mark.parametrize('metric', [sensitivity.loss, sensitivity.fisher])
def test_scores_need_such_a_loss_too(metric):
  score = metric(lambda y, b: (y**2, {}))
  with pytest.raises(ValueError, match='one number'):
    score(_MANY, _MANY, dict(label=_MANY))
