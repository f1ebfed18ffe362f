"""Outputs of an ONNX model in ONNX Runtime."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnxruntime

from fliqs_jax.serving import differences


def checked(
  what: str, model: bytes, inputs: list[Any], expected: Mapping[str, Any]
) -> dict[str, Any]:
  """Returns the difference between a model's outputs on the CPU and others.

  Args:
    what: name of the outputs, for the error.
    model: bytes of a model that `onnx_model` wrote.
    inputs: leaves of its inputs, of keys their uint32 data.
    expected: {name: output} of the search.

  Raises:
    ValueError: ONNX Runtime does not run the model, or the outputs differ by
      more than rounding can explain: on average by 5 % of the largest.
  """
  options = onnxruntime.SessionOptions()
  options.log_severity_level = 3  # Errors; it tells of what it leaves out.
  given = {f'inputs/{i}': np.asarray(x) for i, x in enumerate(inputs)}
  try:
    session = onnxruntime.InferenceSession(
      model, options, providers=['CPUExecutionProvider']
    )
    read = {x.name: given[x.name] for x in session.get_inputs()}
    outputs = session.run([*expected], read)
  except Exception as error:  # Its classes have no common name.
    raise ValueError(f'{what} cannot be computed: {error}') from error
  served = dict(zip(expected, outputs))
  return differences.checked(what, inputs, served, expected, 'mean_difference')
