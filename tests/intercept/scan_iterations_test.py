"""Steps of a scanned layer, apart and together again."""

import jax
import numpy as np
import pytest

from fliqs_jax.intercept import carried_variables
from fliqs_jax.intercept import scan_iterations
from tests import helpers


@pytest.mark.parametrize('step', [(3, 4), (1, 4), (3, 1, 2), (1, 1, 1)])
@pytest.mark.parametrize(
  'scans',
  [
    [(2, 0)],
    [(2, 1)],
    [(1, 1)],
    [(3, 0), (2, 0)],
    [(3, 2), (2, 1)],
    [(2, 0), (1, 0)],
    [(1, 0), (2, 1)],
    [(1, 1), (1, 0)],
  ],
)
def test_a_parameter_is_stacked_as_its_transforms_do(step, scans):
  # Each scan, from within, stacks so many steps along an axis.
  expected = helpers.random((*(n for n, _ in reversed(scans)), *step))
  lead = np.zeros(carried_variables.PAD)
  for i, (n, axis) in enumerate(scans):
    # What is not stacked yet are the first axes.
    left = len(scans) - i - 1
    expected = np.moveaxis(expected, left, left + axis)
    lead = np.stack([lead] * n, axis)
  # Steps are numbered along the axes where they end up.
  places = [i for i, n in enumerate(lead.shape) if n > 1]
  rows = np.moveaxis(expected, places, range(len(places)))
  steps = rows.reshape((-1, *step))
  found = scan_iterations.parameter(list(steps), lead.shape, expected.shape)
  np.testing.assert_array_equal(found, expected)


# As strings, @10 and @11 come before @2.
TWELVE = np.arange(12, dtype=np.float32)
STACKED = (12, *carried_variables.PAD)


def test_what_twelve_iterations_multiply_comes_apart_in_their_order():
  recorded = {
    'values': np.broadcast_to(TWELVE[:, None, None, None, None], STACKED),
    carried_variables.LAYOUT: np.zeros((*STACKED, *carried_variables.TAIL)),
  }
  variables = {
    'params': {'body': {'up': {carried_variables.OPERANDS: recorded}}}
  }
  layer = scan_iterations.with_operands(variables)['operands']['body']['up']
  assert layer.pop('leading_shape')[0].shape == STACKED
  values = {name: float(one['values'][0].item()) for name, one in layer.items()}
  assert values == {f'@{i}': i for i in range(12)}


def test_twelve_iterations_are_put_together_in_their_order():
  rows = np.stack([TWELVE, -TWELVE], axis=1)
  together = scan_iterations.together(list(rows), STACKED)
  np.testing.assert_array_equal(together.reshape(12, 2), rows)
  parameter = scan_iterations.parameter(
    list(rows), (1, *STACKED[:1], *STACKED[2:]), (2, 12)
  )
  np.testing.assert_array_equal(parameter, rows.T)


@pytest.mark.parametrize('is_carried', [False, True])
def test_decisions_of_twelve_iterations_survive_a_tree_map(is_carried):
  # A tree map sorts the keys of a dict as strings.
  leaf = np.stack([TWELVE, -TWELVE], axis=1)
  if is_carried:
    inside = {
      'arch': {'format': leaf.reshape((*STACKED, 2))},
      carried_variables.LAYOUT: np.zeros((*STACKED, *carried_variables.TAIL)),
    }
    inside = {'params': {'up': {carried_variables.NAME: inside}}}
  else:
    inside = {'arch': {'up': {'format': leaf}}}
  outside, _ = carried_variables.split(inside)
  decisions = outside['arch']['up']
  assert {name: one['format'].tolist() for name, one in decisions.items()} == {
    f'@{i}': [i, -i] for i in range(12)
  }
  back = carried_variables.merge(jax.tree.map(lambda x: x, outside))
  if is_carried:
    back = back['params']['up'][carried_variables.NAME]['arch']['format']
  else:
    back = back['arch']['up']['format']
  np.testing.assert_array_equal(np.reshape(back, (12, 2)), leaf)
