"""Formats for a trained network, without any training.

Activations of the given batches set the thresholds, sensitivities say what each
option of each layer costs in quality, and the budget is solved exactly.
"""

from collections.abc import Callable, Iterable, Mapping
import dataclasses
from typing import Any, NamedTuple

import jax
import numpy as np

from fliqs_jax import data
from fliqs_jax.program import searchable as searchable_lib
from fliqs_jax.search import calibration
from fliqs_jax.search import sensitivity
from fliqs_jax.search import train_step
from fliqs_jax.space import allocation
from fliqs_jax.space import cost_model
from fliqs_jax.space import discovery
from fliqs_jax.space import quant_spec
from fliqs_jax.space import search_space


class Allocated(NamedTuple):
  """An architecture of a trained network; `export_model` takes it.

  Attributes:
    model: the searchable model.
    variables: the network's collections, with the statistics of activations.
    choices: {decision: [K] one-hot}.
    space: the decisions.
    scores: {decision: [K]} the loss of quality by each option.
    cost: cost of the choices, in the unit of the cost.
    target: the largest cost that was allowed.
  """

  model: searchable_lib.Searchable
  variables: dict[str, Any]
  choices: dict[str, np.ndarray]
  space: search_space.SearchSpace
  scores: sensitivity.Scores
  cost: float
  target: float


def allocate(
  model: Any,
  variables: Any,
  batches: Iterable[Mapping[str, Any]],
  target: float,
  *,
  spec: quant_spec.QuantSpec | None = None,
  loss: Callable[..., Any] | None = None,
  cost: str = 'bops',
  relative_to: str = 'INT4',
) -> Allocated:
  """Returns the best formats for a trained network within a budget.

  Args:
    model: a model that `searchable` made, or what `searchable` takes.
    variables: its collections; of a function f(params, inputs), its params.
    batches: some eight batches, dicts of arrays: of inputs [B, ...] and, if
      there is a loss, of what it reads, such as `label`. The model is called
      with its one input, or with a dict of all if there are several. Strategies
      find their thresholds in the first batch; give it 32 examples or more.
    target: the largest cost, as a multiple of that of uniform `relative_to`.
    spec: the formats, if `model` is not searchable yet.
    loss: (outputs, batch) -> (loss [], metrics), a mean over examples: options
      are scored by the change of an example's loss (`fisher`). None: outputs
      are logits, and the divergence of their softmax scores (`kl`).
    cost: kind of the cost, as `cost.kind` of a config.
    relative_to: name of the format that the target is a multiple of.

  Returns:
    The architecture, and what `export_model` needs with it.

  Raises:
    ValueError: the target is no finite number above 0, there is no batch, an
      entry of one is no array of numbers, the model cannot be called with its
      inputs, the spec asks for profiled thresholds, a score is not finite, or
      no architecture is within the budget.
  """
  allocation.check_target(target)
  batches = list(batches)
  if not batches:
    raise ValueError('batches: allocate needs at least one batch; give eight')
  if not isinstance(model, searchable_lib.Searchable):
    is_function = not hasattr(model, 'init') and not _has_arrays(model)
    params = variables if is_function else None
    model = searchable_lib.searchable(model, spec, params=params)
    variables = dict(params=variables) if is_function else variables
  elif spec is not None:
    raise ValueError('spec: the model is searchable and has its own; leave it')
  if model.spec.act_clip == 'profiled':
    raise ValueError(
      "act_clip='profiled': allocate profiles no activations; give "
      "'laplacian', 'gaussian', 'absmax' or a number"
    )
  examples = [data.model_inputs(batch) for batch in batches]
  for batch in batches:
    _check_arrays(batch)
  one = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct((1, *np.shape(x)[1:]), x.dtype), examples[0]
  )
  space = discovery.find(model, one, train=False)
  total = space.cost(cost)
  limit = target * cost_model.uniform(total, relative_to)
  variables = model.prepare(variables, examples[0], train=False)
  variables = _observed(model, space, variables, examples)
  reference, calibrated = None, _calibrated(model, space, batches[0])
  if model.spec.has_strategies:
    plain = quant_spec.QuantSpec(exclude=('*',))
    reference = dataclasses.replace(model, spec=plain).apply
    variables = calibrated(variables, space.dearest())
    calibration.warn_of_few(model.apply, space, variables, batches[0])
  metric = sensitivity.fisher(loss) if loss else sensitivity.kl(_no_loss)
  score = sensitivity.scorer(model.apply, metric, space, reference=reference)
  scores, _ = sensitivity.regular(space, score(variables, batches))
  choices = allocation.solve(space, scores, [allocation.Budget(total, limit)])
  if model.spec.has_strategies:
    variables = calibrated(variables, choices)
  del variables['arch']
  return Allocated(
    model, variables, choices, space, scores, float(total(choices)), limit
  )


def _check_arrays(batch: Mapping[str, Any]) -> None:
  for name, entry in batch.items():
    for leaf in jax.tree.leaves(entry):
      is_array = isinstance(leaf, jax.Array) or (
        # JAX has no texts, times or objects.
        isinstance(leaf, np.ndarray) and leaf.dtype.kind not in 'MOSUm'
      )
      if not is_array:
        raise ValueError(
          f'batches: {name!r} holds '
          f'{getattr(leaf, "dtype", type(leaf).__name__)}; give arrays of '
          'numbers [B, ...], and leave out what nothing reads'
        )


def _has_arrays(model: Any) -> bool:
  return any(hasattr(leaf, 'dtype') for leaf in jax.tree.leaves(model))


def _no_loss(outputs: Any, batch: Any) -> Any:
  raise NotImplementedError


def _calibrated(
  model: searchable_lib.Searchable,
  space: search_space.SearchSpace,
  batch: Mapping[str, Any],
) -> Callable[[dict[str, Any], Mapping[str, Any]], dict[str, Any]]:
  """Returns the function that finds the thresholds of strategies.

  It takes variables and the architecture {decision: [K]} that the layers before
  have, and returns the variables with both.
  """
  find = jax.jit(calibration.strategy_step(model.apply))

  def found(
    variables: dict[str, Any], choices: Mapping[str, Any]
  ) -> dict[str, Any]:
    arch = space.expand(choices)
    own = {k: v for k, v in variables.items() if k not in ('params', 'arch')}
    changed = find(variables['params'], own, arch, batch)
    return {**variables, **changed, 'arch': arch}

  return found


def _observed(
  model: searchable_lib.Searchable,
  space: search_space.SearchSpace,
  variables: dict[str, Any],
  examples: list[Any],
) -> dict[str, Any]:
  """Returns the variables with statistics of the network's activations."""
  if 'quant_stats' not in variables:
    return variables
  variables = {**variables, 'arch': space.expand(space.dearest())}

  @jax.jit
  def observe(variables: Any, inputs: Any) -> Any:
    _, changed = model.apply(
      variables, inputs, train=False, mutable=['quant_stats']
    )
    return {**variables, **changed}

  floats = train_step.in_phase(variables, False)
  for inputs in examples:
    floats = observe(floats, inputs)
  return dict(train_step.in_phase(floats, True))
