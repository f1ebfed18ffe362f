"""Rules for Qwix that express an assignment, as far as Qwix has the types.

A rule holds the arguments of `qwix.QuantizationRule` as JSON: a regular
expression for the module's path, and Qwix's names of the types. Qwix computes
its own scales, so only the assignment carries over and not the numbers.
"""

from collections.abc import Mapping
import re
from typing import Any

from fliqs_jax.numerics import formats
from fliqs_jax.serving import stored_layers

# The formats of which Qwix has the same grid. Its float8 types end at 448 and
# 57344, while E4M3 and E5M2 end at 480 and 114688.
_TYPES = {
  **{f'INT{bits}': f'int{bits}' for bits in range(2, 9)},
  'E2M1': 'float4_e2m1fn',
}


def rules(
  layers: Mapping[str, stored_layers.Layer],
) -> tuple[list[dict[str, Any]], list[str]]:
  """Returns the rules, and a line for each side that they cannot express.

  BF16 and unquantized sides get no type: there Qwix keeps the model's dtype.
  """
  expressed, missing = [], []
  for path, iterations in stored_layers.by_product(layers).items():
    layer, *others = iterations
    if not layer.shape:
      missing.append(f'{path}: a product of two activations')
      continue
    if {(o.weights, o.activations) for o in others} - {
      (layer.weights, layer.activations)
    }:
      missing.append(f'{path}: a scanned layer of several formats')
      continue
    types = {}
    for key, side in (
      ('weight_qtype', 'weights'),
      ('act_qtype', 'activations'),
    ):
      numeric_format = getattr(layer, side)
      if numeric_format in (None, formats.BF16):
        continue
      if numeric_format.name in _TYPES:
        types[key] = _TYPES[numeric_format.name]
      else:
        missing.append(f'{path}: {side} {numeric_format}')
    # Qwix does not quantize activations alone.
    if 'act_qtype' in types and 'weight_qtype' not in types:
      missing.append(f'{path}: activations {layer.activations} alone')
    elif types:
      expressed.append(dict(module_path=re.escape(path), **types))
  return expressed, missing
