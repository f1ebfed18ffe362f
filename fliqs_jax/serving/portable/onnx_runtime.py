"""Outputs of an ONNX model in ONNX Runtime.

On x86 without VNNI, such as a CPU with AVX2 alone, its products of uint8 and
int8 have sums of 16 bits, which saturate, unless an option of the session
forbids it.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnxruntime

from fliqs_jax.serving import differences

# docs/serving.md tells users to set it.
_EXACT_SUMS = 'session.x64quantprecision', '1'


def session(model: str | bytes) -> onnxruntime.InferenceSession:
  """Returns a session on the CPU whose sums of integers are exact.

  Args:
    model: bytes of a model, or the path of its file.
  """
  options = onnxruntime.SessionOptions()
  options.log_severity_level = 3  # Errors; it tells of what it leaves out.
  options.add_session_config_entry(*_EXACT_SUMS)
  return onnxruntime.InferenceSession(
    model, options, providers=['CPUExecutionProvider']
  )


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
  given = {f'inputs/{i}': np.asarray(x) for i, x in enumerate(inputs)}
  try:
    running = session(model)
    read = {x.name: given[x.name] for x in running.get_inputs()}
    outputs = running.run([*expected], read)
  except Exception as error:  # Its classes have no common name.
    raise ValueError(f'{what} cannot be computed: {error}') from error
  served = dict(zip(expected, outputs))
  return differences.checked(what, inputs, served, expected, 'mean_difference')
