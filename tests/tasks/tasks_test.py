"""The two tasks: losses, qualities and metrics, against definitions."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn import metrics as sklearn_metrics

from fliqs_jax.tasks import classification
from fliqs_jax.tasks import click_through

_RNG = np.random.default_rng(0)
LOGITS = jnp.asarray(_RNG.normal(size=(6, 3)), jnp.float32)
LABELS = jnp.array([0, 1, 2, 2, 1, 0])


def test_labels_as_distributions_give_the_loss_of_classes():
  loss = classification.loss(0.1)
  classes = loss(LOGITS, {'label': LABELS})
  soft = loss(LOGITS, {'label': jax.nn.one_hot(LABELS, 3)})
  assert classes[0] == soft[0]
  assert classes[1]['accuracy'] == soft[1]['accuracy']


def test_a_mixed_label_s_loss_is_the_mix_of_losses():
  loss = classification.loss(0.0)
  one, other = jax.nn.one_hot(LABELS, 3), jax.nn.one_hot(LABELS[::-1], 3)
  mixed, _ = loss(LOGITS, {'label': 0.3 * one + 0.7 * other})
  # Cross-entropy is linear in the label.
  expected = 0.3 * loss(LOGITS, {'label': one})[0]
  expected += 0.7 * loss(LOGITS, {'label': other})[0]
  np.testing.assert_allclose(mixed, expected, rtol=1e-6)


# Probabilities of 3/4 and 1/4: right, wrong, right, and a row that fills up.
_ODDS = jnp.log(jnp.array([[3.0, 1.0], [3.0, 1.0], [1.0, 3.0], [1.0, 3.0]]))
_CLASSES = jnp.array([0, 1, 1, 1])
_RIGHT, _WRONG = np.log(4 / 3), np.log(4)


def test_padding_does_not_count_in_the_test_metrics():
  sums = classification.measure(
    _ODDS, {'label': _CLASSES, 'example_mask': jnp.array([1.0, 1.0, 1.0, 0.0])}
  )
  summary = classification.summarize(jax.device_get(sums))
  assert summary['examples'] == 3
  assert summary['accuracy'] == pytest.approx(2 / 3)
  assert summary['loss'] == pytest.approx((2 * _RIGHT + _WRONG) / 3, rel=1e-6)


def test_qualities_and_the_smoothed_loss_by_hand():
  batch = {'label': _CLASSES}
  assert classification.accuracy(_ODDS, batch) == 0.75
  mean = (3 * _RIGHT + _WRONG) / 4
  assert classification.minus_cross_entropy(_ODDS, batch) == pytest.approx(
    -mean, rel=1e-6
  )
  # Of 0.2, half goes to each of two classes: 0.9 and 0.1. Two rows are right.
  loss, metrics = classification.loss(0.2)(
    _ODDS[:3:2], {'label': _CLASSES[:3:2]}
  )
  assert loss == pytest.approx(0.9 * _RIGHT + 0.1 * _WRONG, rel=1e-6)
  assert metrics['accuracy'] == 1.0


def _clicks(size, rounded=False):
  logits = _RNG.normal(size=size)
  labels = _RNG.uniform(size=size) < 1 / (1 + np.exp(-logits))
  logits = np.round(logits) if rounded else logits
  return jnp.asarray(logits, jnp.float32), jnp.asarray(labels, jnp.int32)


@pytest.mark.parametrize('rounded', [False, True], ids=['apart', 'with ties'])
def test_auc_of_a_batch_is_scikit_learn_s(rounded):
  logits, labels = _clicks(500, rounded)
  expected = sklearn_metrics.roc_auc_score(labels, logits)
  found = click_through.auc(logits, {'label': labels})
  assert float(found) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize('label', [0, 1])
def test_auc_without_a_pair_is_a_half(label):
  labels = jnp.full(4, label)
  assert click_through.auc(jnp.arange(4.0), {'label': labels}) == 0.5


def _summary(logits, labels, batch_size):
  totals = {}
  for i in range(0, len(logits), batch_size):
    part = slice(i, i + batch_size)
    padding = batch_size - len(logits[part])
    batch = {
      'label': jnp.pad(labels[part], (0, padding), constant_values=1),
      'example_mask': jnp.pad(jnp.ones(len(logits[part])), (0, padding)),
    }
    sums = click_through.measure(jnp.pad(logits[part], (0, padding)), batch)
    for name, value in sums.items():
      totals[name] = totals.get(name, 0.0) + np.asarray(value, np.float64)
  return click_through.summarize(totals)


def test_auc_of_a_split_is_scikit_learn_s_to_the_width_of_a_bin():
  logits, labels = _clicks(3001)
  summary = _summary(logits, labels, 512)
  expected = sklearn_metrics.roc_auc_score(labels, logits)
  # 3001 examples on 65,536 bins: few pairs share one.
  assert summary['AUC'] == pytest.approx(expected, abs=2e-5)
  assert summary['examples'] == 3001
  expected = sklearn_metrics.log_loss(labels, jax.nn.sigmoid(logits))
  assert summary['loss'] == pytest.approx(expected, rel=1e-5)


def test_auc_of_a_split_does_not_depend_on_its_batches():
  logits, labels = _clicks(300)
  assert (
    _summary(logits, labels, 7)['AUC'] == _summary(logits, labels, 300)['AUC']
  )


def test_certain_probabilities_stay_in_the_last_bin():
  logits, labels = jnp.array([100.0, -100.0]), jnp.array([1, 0])
  assert _summary(logits, labels, 2)['AUC'] == 1.0


def test_smoothed_clicks_pull_towards_a_half():
  batch = {'label': jnp.array([1, 0])}
  logits = jnp.array([2.0, -2.0])
  value, _ = click_through.loss(0.2)(logits, batch)
  # -0.9 ln sigmoid(2) - 0.1 ln sigmoid(-2), for both.
  expected = 0.9 * np.log1p(np.exp(-2)) + 0.1 * np.log1p(np.exp(2))
  assert float(value) == pytest.approx(expected, rel=1e-6)


def test_clicks_need_two_classes():
  with pytest.raises(ValueError, match='two classes, not 3'):
    click_through.output_shape(types.SimpleNamespace(num_classes=3))
