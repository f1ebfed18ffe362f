"""FLIQS in JAX: one-shot search for the numeric format of every layer.

These are the names that a Flax user needs to build a model with our layers and
to run the fused search step in a training loop of their own; README.md has an
example. All other names are in the modules.
"""

from fliqs_jax.layers.operands import set_activation_quantization
from fliqs_jax.layers.quant_layers import QuantConv
from fliqs_jax.layers.quant_layers import QuantDense
from fliqs_jax.layers.quant_layers import QuantDenseGeneral
from fliqs_jax.layers.quant_layers import QuantEinsum
from fliqs_jax.layers.quant_layers import with_spec
from fliqs_jax.numerics.formats import NumericFormat
from fliqs_jax.program.coverage import coverage
from fliqs_jax.program.guard import check as check_model
from fliqs_jax.program.products import as_weights
from fliqs_jax.program.searchable import searchable
from fliqs_jax.search.controllers.scored import score_and_solve
from fliqs_jax.search.policy import argmax
from fliqs_jax.search.presets import make as make_controller
from fliqs_jax.search.schedules import phases
from fliqs_jax.search.sensitivity import fisher
from fliqs_jax.search.sensitivity import scorer as make_scorer
from fliqs_jax.search.train_state import create as create_state
from fliqs_jax.search.train_step import eval_step
from fliqs_jax.search.train_step import search_step
from fliqs_jax.serving.export_model import export_model
from fliqs_jax.serving.post_training import allocate
from fliqs_jax.space.allocation import Budget
from fliqs_jax.space.allocation import likeliest
from fliqs_jax.space.cost_model import uniform as uniform_cost
from fliqs_jax.space.discovery import find as find_decisions
from fliqs_jax.space.quant_spec import QuantSpec
from fliqs_jax.space.search_space import SearchSpace

__version__ = '0.2.0'

__all__ = [
  'Budget',
  'NumericFormat',
  'QuantConv',
  'QuantDense',
  'QuantDenseGeneral',
  'QuantEinsum',
  'QuantSpec',
  'SearchSpace',
  'allocate',
  'argmax',
  'as_weights',
  'check_model',
  'coverage',
  'create_state',
  'eval_step',
  'export_model',
  'fisher',
  'find_decisions',
  'likeliest',
  'make_controller',
  'make_scorer',
  'phases',
  'score_and_solve',
  'search_step',
  'searchable',
  'set_activation_quantization',
  'uniform_cost',
  'with_spec',
]
