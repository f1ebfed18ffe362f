"""Rules for Qwix that express an assignment, as far as Qwix has the types.

A rule holds the arguments of `qwix.QuantizationRule` as JSON: a regular
expression for the module's path, and Qwix's names of the types. Qwix computes
its own scales, so only the assignment carries over and not the numbers.
"""

from collections.abc import Mapping
import re
from typing import Any

from fliqs_jax.numerics import formats
from fliqs_jax.program import products as products_lib
from fliqs_jax.serving import stored_layers

# The formats of which Qwix has the same grid. Its float8 types end at 448 and
# 57344, while E4M3 and E5M2 end at 480 and 114688.
_TYPES = {
  **{f'INT{bits}': f'int{bits}' for bits in range(2, 9)},
  'E2M1': 'float4_e2m1fn',
}

_KEYS, _SIDES = ('weight_qtype', 'act_qtype'), ('weights', 'activations')


def rules(
  layers: Mapping[str, stored_layers.Layer],
) -> tuple[list[dict[str, Any]], list[str]]:
  """Returns the rules, and a line for each side that they cannot express.

  Paths are those of the modules of a linen or NNX model: of a weight that a
  module uses twice, and of a table that is also the head, there is one rule.
  BF16 and unquantized sides get no type: there Qwix keeps the model's dtype.
  """
  modules: dict[str, list[list[stored_layers.Layer]]] = {}
  for path, iterations in stored_layers.by_product(layers).items():
    modules.setdefault(products_lib.first_use(path), []).append(iterations)
  expressed, missing = [], []
  for path, uses in modules.items():
    layers_of = [layer for use in uses for layer in use]
    weights = {layer.weights for layer in layers_of}
    activations = {layer.activations for layer in layers_of}
    if len(uses) > 1:  # A look-up has no activations; the table's head has.
      activations = (activations - {None}) or {None}
    if not all(layer.shape for layer in layers_of):
      missing.append(f'{path}: a product of two activations')
      continue
    if len(weights) > 1 or len(activations) > 1:
      missing.append(f'{path}: a layer of several formats')
      continue
    types = {}
    (pair,) = zip(weights, activations)
    for key, side, numeric_format in zip(_KEYS, _SIDES, pair):
      if numeric_format in (None, formats.BF16):
        continue
      if numeric_format.name in _TYPES:
        types[key] = _TYPES[numeric_format.name]
      else:
        missing.append(f'{path}: {side} {numeric_format}')
    # Qwix does not quantize activations alone.
    if 'act_qtype' in types and 'weight_qtype' not in types:
      missing.append(f'{path}: activations {pair[1]} alone')
    elif types:
      expressed.append(dict(module_path=re.escape(path), **types))
  return expressed, missing
