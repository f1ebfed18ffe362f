"""Steps of a scanned layer, apart and together again."""

import numpy as np
import pytest

from fliqs_jax.intercept import carried_variables
from fliqs_jax.intercept import scan_iterations
from tests.layers.quant_layers_test import random


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
  expected = random((*(n for n, _ in reversed(scans)), *step))
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
