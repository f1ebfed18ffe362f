"""Search of any JAX model, without a change to the model's code.

`Searchable.apply` traces the model to a jaxpr and runs it with quantized
products in the place of its own. So whatever the model is written with, its
parameters keep their names, shapes and values.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any, NamedTuple

from flax import core
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fliqs_jax.layers import ratios
from fliqs_jax.program import equations
from fliqs_jax.program import finder
from fliqs_jax.program import models
from fliqs_jax.program import naming
from fliqs_jax.program import parts as parts_lib
from fliqs_jax.program import products as products_lib
from fliqs_jax.program import quantized
from fliqs_jax.program import rewrite
from fliqs_jax.space import ops as ops_lib
from fliqs_jax.space import quant_spec

STACKS = ('separate', 'shared')
# Collections of the search; `operands` and `act_inputs` are only noted.
_ARCH, _STATS, _COST = 'arch', 'quant_stats', 'cost'
_NOTES = {'operands': 'operands', 'act_inputs': 'inputs'}
OWN = frozenset((_ARCH, _STATS, _COST, ratios.COLLECTION, *_NOTES))


def searchable(
  model: Any,
  spec: quant_spec.QuantSpec | None = None,
  *,
  params: Any = None,
  embed: bool = False,
  attention: bool = False,
  stacks: str = 'separate',
) -> 'Searchable':
  """Makes a model searchable.

  Args:
    model: a linen module that is not bound to variables, an NNX module, a
      transformed Haiku function, an Equinox module, or a pure function
      `f(params, *inputs)`.
    spec: the formats that its products may use; patterns match the paths that
      `coverage` lists.
    params: parameters of a function, a tree with arrays; only for a function.
    embed: whether tables of which rows are looked up are quantized.
    attention: whether products of two activations are quantized; the two of
      attention are `qk` and `av` below their path.
    stacks: `separate`: each iteration of a scan and each slice of a batch axis
      of the weights has its own decision; `shared`: all share one. Groups of
      the spec join decisions further.

  Returns:
    A model for `find_decisions`, `create_state` and a training loop.

  Raises:
    ValueError: `model` is none of these, or an option is unknown.
  """
  if stacks not in STACKS:
    raise ValueError(
      f'stacks={stacks!r} is unknown; allowed: {", ".join(STACKS)}'
    )
  spec = spec or quant_spec.QuantSpec()
  if not isinstance(spec, quant_spec.QuantSpec):
    raise ValueError(
      f'spec={spec!r} is no QuantSpec; give QuantSpec(formats={spec!r}), say'
    )
  return Searchable(
    models.adapted(model, params), spec, embed, attention, stacks
  )


class Traced(NamedTuple):
  """A call of a model as a program.

  Attributes:
    program: the closed jaxpr; its arguments are the arrays of variables and
      arguments, in the order of `operands`.
    operands: the values of its arguments.
    parts: its products.
    outputs: structure of its results: outputs and changed collections.
  """

  program: Any
  operands: list[Any]
  parts: tuple[parts_lib.Part, ...]
  outputs: Any


@dataclasses.dataclass(frozen=True)
class Searchable:
  """A model with decisions; `init` and `apply` are as linen's.

  Besides the model's own collections there are `arch`, {path of a layer:
  one-hot vectors}, and `quant_stats`, {path of a product: statistics}.

  Attributes:
    model: the original model, in the form of a linen module.
    spec: the formats that its products may use.
    embed: whether tables that are looked up are quantized.
    attention: whether products of two activations are quantized.
    stacks: `separate` or `shared`: decisions of iterations and slices.
    fast_forms: whether products without formats run in the forms of
      `float_ops`, too, as layers of `quant_layers` do. Otherwise they stay
      exactly as they are.
    known: shapes of the model's own variables; None: those that its `init`
      makes in the same call. Some models make them in training only.
  """

  model: Any
  spec: quant_spec.QuantSpec
  embed: bool
  attention: bool
  stacks: str
  fast_forms: bool = False
  known: Any = dataclasses.field(default=None, compare=False, repr=False)

  def init(self, rngs: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Returns the variables; `params` are those of the model's own `init`.

    Args:
      rngs: a key, or a dict of keys.
      *args: positional arguments of the model's call.
      **kwargs: keyword arguments of the model's call, static.

    Raises:
      ValueError: the model cannot be called so, or a rule of the spec does not
        fit it.
    """
    variables = self._init(rngs, *args, **kwargs)
    if not isinstance(rngs, Mapping):
      rngs = dict(params=rngs)
    return self.prepare(variables, *args, rngs=rngs, **kwargs)

  def prepare(
    self, variables: Mapping[str, Any], *args: Any, rngs: Any = None, **kwargs
  ) -> dict[str, Any]:
    """Returns the variables of a trained model with those of the search.

    Args:
      variables: `params` and the model's other collections.
      *args: positional arguments of the model's call.
      rngs: {name: key} of a model that draws random numbers.
      **kwargs: keyword arguments of the model's call, static.

    Returns:
      The same with `arch`, the first format of each menu, and `quant_stats`
      before the first batch.

    Raises:
      ValueError: the model cannot be called so, or a rule of the spec does not
        fit it.
    """
    variables = dict(core.unfreeze(variables))
    if isinstance(self.model, models.PureFunction) and 'params' in variables:
      variables['params'] = models.float_arrays(variables['params'])
    parts = self.parts(variables, rngs, *args, **kwargs)
    arch, stats = {}, {}
    rule = self._rule(parts)
    for part in parts:
      leaves = part.leaves
      for path in part.product.iterations() if leaves else ():
        for leaf, menu in leaves.items():
          arch[products_lib.join(path, leaf)] = jnp.eye(len(menu))[0]
      if leaves and (first := rule.first_statistics(part.product)):
        stats[part.product.path] = jax.tree.map(jnp.asarray, first)
    collections = {_ARCH: products_lib.nested(arch)}
    if stats:
      collections[_STATS] = products_lib.nested(stats)
    return variables | (collections if arch else {})

  def apply(
    self,
    variables: Mapping[str, Any],
    *args: Any,
    mutable: Any = False,
    rngs: Any = None,
    **kwargs: Any,
  ) -> Any:
    """Applies the model with the formats that `arch` selects.

    Args:
      variables: `params` and the other collections of `init`; `arch` is
        `space.expand(choices)`.
      *args: positional arguments of the model's call.
      mutable: False, True, or the names of the collections that may change.
        With `quant_stats` among them, the running statistics are updated; with
        `operands`, the scales and stored weights of each product are noted
        there, and with `act_inputs` its activations. With `calibration`,
        strategies find their thresholds, and nothing is put there.
      rngs: {name: typed PRNG key []} of a model that draws random numbers.
      **kwargs: keyword arguments of the model's call, static or arrays.

    Returns:
      The model's outputs; with `mutable`, also the changed collections.

    Raises:
      ValueError: the model cannot be called so, or the variables lack entries
        of `arch` or `quant_stats`.
    """
    variables = core.unfreeze(variables)
    wanted = _names(mutable, variables)
    traced = self.trace(
      {k: v for k, v in variables.items() if k not in OWN},
      args,
      kwargs,
      rngs,
      [name for name in wanted if name not in OWN],
    )
    notes = ''.join(_NOTES[name] for name in wanted if name in _NOTES)
    replaced = self.replaced(traced.parts)
    rule = self._rule(
      replaced, _STATS in wanted, notes, ratios.COLLECTION in wanted
    )
    given, stats = self._state(replaced, variables, rule)
    run = rewrite.Rewriter(
      [part.product for part in replaced], rule, every_branch=bool(notes)
    )
    # Custom derivatives under vmap reject NumPy arrays.
    operands = [jnp.asarray(x) for x in traced.operands]
    results, stats, noted = run(traced.program, operands, given, stats)
    outputs, changed = jax.tree.unflatten(traced.outputs, results)
    if mutable is False:
      return outputs
    changed = dict(changed)
    if _STATS in wanted and _STATS in variables:
      # This call may lack products that another one has.
      kept = products_lib.flattened(variables[_STATS])
      learnt = products_lib.flattened(products_lib.nested(stats))
      changed[_STATS] = products_lib.nested(kept | learnt)
    for name in wanted:
      if name in _NOTES:
        changed[name] = products_lib.nested(noted)
    return outputs, changed

  def replaced(self, parts: tuple[parts_lib.Part, ...]) -> list[parts_lib.Part]:
    """Returns the products that do not stay as they are."""
    return [
      part
      for part in parts
      if not part.reason
      or (
        self.fast_forms
        and part.product.kind not in ('attend', 'embed')
        and not part.product.reason
      )
    ]

  def ops(
    self, *args: Any, **kwargs: Any
  ) -> tuple[tuple[ops_lib.Op, ...], int, int]:
    """Returns the ops of a call, one per iteration, and numbers of parameters.

    Args:
      *args: positional arguments of the model's call, arrays or shapes.
      **kwargs: keyword arguments of the model's call, static.

    Returns:
      The ops, the number of all parameters, and of those that the ops' weights
      are made of.
    """
    variables, parts = self.parts_of(*args, **kwargs)
    refused = [part for part in parts if part.product.reason]
    if parts and len(refused) == len(parts):
      raise ValueError(
        'the model has no product that could be quantized: '
        + '; '.join(f'{p.product.path}: {p.reason}' for p in refused[:5])
      )
    ops, used = [], frozenset()
    for part in parts:
      product = part.product
      if product.kind == 'embed' and part.reason:
        continue  # It multiplies nothing.
      used |= product.leaves
      ops += part.ops(self.stacks == 'shared')
    sizes = {
      products_lib.join('params', path): int(np.prod(leaf.shape))
      for path, leaf in products_lib.named(variables.get('params', {})).items()
    }
    in_weights = sum(size for path, size in sizes.items() if path in used)
    return tuple(ops), sum(sizes.values()), in_weights

  def parts_of(
    self, *args: Any, **kwargs: Any
  ) -> tuple[dict[str, Any], tuple[parts_lib.Part, ...]]:
    """Returns the shapes of the variables, and the products of a call.

    Args:
      *args: positional arguments of the model's call, arrays or shapes.
      **kwargs: keyword arguments of the model's call, static.
    """
    key = jax.random.key(0)
    arrays, filled = models.split_arrays(args)

    def init(*arrays: Any) -> dict[str, Any]:
      return self._init(key, *filled(arrays), **kwargs)

    variables = self.known or jax.eval_shape(init, *arrays)
    traced = equations.pure(
      lambda: self._traced(variables, dict(params=key), *args, **kwargs)
    )
    return variables, traced.parts

  def parts(
    self, variables: Mapping[str, Any], rngs: Any, *args: Any, **kwargs: Any
  ) -> tuple[parts_lib.Part, ...]:
    """Returns the products of a call whose collections may all change."""
    return self._traced(variables, rngs, *args, **kwargs).parts

  def trace(
    self,
    variables: Mapping[str, Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    rngs: Any,
    mutable: list[str],
  ) -> Traced:
    """Returns a call of the model as a program.

    Args:
      variables: the model's own collections.
      args: positional arguments of the call; what is no array is static.
      kwargs: keyword arguments of the call; what is no array is static.
      rngs: {name: key} or None.
      mutable: names of the model's collections that may change.
    """
    if isinstance(self.model, nn.Module):
      kwargs = models.accepted(self.model, args, kwargs)
    arrays, filled = models.split_arrays((variables, args, kwargs, rngs))

    def call(*arrays: Any) -> Any:
      variables, args, kwargs, rngs = filled(arrays)
      random = {} if rngs is None else dict(rngs=rngs)
      result = self.model.apply(
        variables, *args, mutable=mutable or False, **random, **kwargs
      )
      outputs, changed = result if mutable else (result, {})
      return outputs, core.unfreeze(changed)

    program, shapes = equations.program(call, arrays)
    names = products_lib.paths(_only_arrays(variables))
    naming.check(names)
    root = type(self.model).__name__
    found = finder.find(program, names, root)
    return Traced(
      program,
      arrays,
      parts_lib.allowed(
        found, self.spec, embed=self.embed, attention=self.attention
      ),
      jax.tree.structure(shapes),
    )

  def _traced(self, variables: Any, rngs: Any, *args: Any, **kwargs: Any):
    names = [name for name in variables if name != 'params']
    return self.trace(variables, args, kwargs, rngs, names)

  def _init(self, rngs: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    if isinstance(self.model, nn.Module):
      kwargs = models.accepted(self.model, args, kwargs)
      kwargs['mutable'] = core.DenyList('intermediates')
    return dict(core.unfreeze(self.model.init(rngs, *args, **kwargs)))

  def _rule(
    self,
    parts: Any,
    learns: bool = False,
    notes: str = '',
    calibrates: bool = False,
  ) -> quantized.Quantized:
    choices = {part.product.path: part.choices for part in parts}
    return quantized.Quantized(self.spec, choices, learns, notes, calibrates)

  def _state(
    self,
    parts: list[parts_lib.Part],
    variables: Mapping[str, Any],
    rule: quantized.Quantized,
  ) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the formats and the statistics of each product."""
    arch = products_lib.flattened(variables.get(_ARCH, {}))
    flat = products_lib.flattened(variables.get(_STATS, {}))
    is_relaxed = self.spec.mix != 'sampled'
    given, stats = {}, {}
    for part in parts:
      path = part.product.path
      given[path] = part.one_hots(arch, is_relaxed)
      if own := rule.statistics(part.product, flat):
        stats[path] = own
    return given, stats


def check_made(model: Any) -> None:
  """Raises ValueError if `searchable` has not made the model."""
  if not isinstance(model, Searchable):
    raise ValueError(
      f'{type(model).__name__} was not made by searchable; pass the model that '
      'searchable returned'
    )


def _only_arrays(tree: Any) -> Any:
  return jax.tree.map(lambda x: x if models.is_array(x) else None, tree)


def _names(mutable: Any, variables: Mapping[str, Any]) -> tuple[str, ...]:
  """Returns the names of the collections that may change."""
  if isinstance(mutable, core.DenyList):
    raise ValueError(
      'mutable: name the collections that may change; a DenyList would also '
      'let params and arch change'
    )
  if mutable is False:
    return ()
  if mutable is True:
    return tuple(variables)
  return (mutable,) if isinstance(mutable, str) else tuple(mutable)
