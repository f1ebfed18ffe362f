"""Differences between served outputs and those of the search."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from fliqs_jax.serving import served_program

# Largest difference of an output, relative to the largest output. Other
# hardware adds floats in another order, which may round a value that lies
# between two grid points to the other one.
_TOLERANCE = 0.05


def checked(
  what: str,
  inputs: list[Any],
  served: Mapping[str, Any],
  expected: Mapping[str, Any],
  measure: str = 'max_difference',
) -> dict[str, Any]:
  """Returns the largest difference, after checking that it is one of rounding.

  Args:
    what: name of the served outputs, for the error.
    inputs: leaves of the inputs, examples on the first axis.
    served: {name: output} of the served model.
    expected: {name: output} of the search.
    measure: `max_difference`, or `mean_difference`, which may be small although
      few examples have a value that was rounded to the other grid point.

  Raises:
    ValueError: it is more than 5 % of the largest output, or shapes differ.
  """
  for name, reference in expected.items():
    if np.shape(served[name]) != np.shape(reference):
      raise ValueError(
        f'{what} have the shape {np.shape(served[name])} in {name}, but the '
        f'reference outputs have {np.shape(reference)}'
      )
  found = _difference(inputs, served, expected, measure)
  if not _share(found, measure) <= _TOLERANCE:  # Neither is NaN.
    raise ValueError(
      f'{what} differ from the reference outputs by '
      f'{found["max_difference"]:.3g}, on average by '
      f'{found["mean_difference"]:.3g}, in {found["output"]} (largest output '
      f'{found["largest_output"]:.3g})'
    )
  return found


def _difference(
  inputs: list[Any],
  served: Mapping[str, Any],
  expected: Mapping[str, Any],
  measure: str,
) -> dict[str, Any]:
  """Returns the largest difference among several outputs, by name."""
  each = []
  for name, reference in expected.items():
    x, y = (
      np.asarray(served_program.raw(a)) for a in (served[name], reference)
    )
    same = (x == y) | ((x != x) & (y != y))
    x, y = x.astype(np.float64), y.astype(np.float64)
    apart = np.abs(np.where(same, 0, x) - np.where(same, 0, y))
    largest = np.abs(y).max(initial=0, where=np.isfinite(y))
    each.append(
      dict(
        output=name,
        bit_equal=bool(same.all()),
        max_difference=float(apart.max(initial=0)),
        mean_difference=float(apart.mean()) if apart.size else 0.0,
        largest_output=float(largest),
      )
    )
  # NaN counts as the largest difference.
  worst = max(
    each, key=lambda one: np.nan_to_num(_share(one, measure), nan=np.inf)
  )
  first = inputs[0] if inputs else np.zeros(())
  return worst | dict(
    examples=len(first) if np.ndim(first) else 1,
    bit_equal=all(one['bit_equal'] for one in each),
  )


def _share(found: Mapping[str, Any], measure: str) -> float:
  return found[measure] / max(found['largest_output'], 1e-30)
