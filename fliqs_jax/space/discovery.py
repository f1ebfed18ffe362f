"""Finds the decisions and ops of a model by tracing it."""

from collections.abc import Callable, Iterator, Mapping
import dataclasses
import fnmatch
import math
import types
from typing import Any

from flax import traverse_util
import flax.linen as nn
import jax

from fliqs_jax.space import decisions as decisions_lib
from fliqs_jax.space import ops as ops_lib
from fliqs_jax.space import quant_spec
from fliqs_jax.space import search_space
from fliqs_jax.space import sizes as sizes_lib


def find(
  model: nn.Module,
  *args: Any,
  spec: quant_spec.QuantSpec | None = None,
  **kwargs: Any,
) -> search_space.SearchSpace:
  """Finds a model's decisions by tracing its `init`; allocates nothing.

  Args:
    model: a model of this project's layers, or one that `searchable` made.
    *args: inputs of the model's call, arrays or `jax.ShapeDtypeStruct`. MACs
      are counted for exactly this input, so its batch size should be 1.
    spec: the spec that the layers were given; its patterns are checked and its
      groups joined. None: the model's own `spec`, if it has one.
    **kwargs: keyword arguments of the model's call, static.

  Returns:
    The search space: a decision for each layer and each size that is open, in
    the order of calls, and the model's ops with their MACs and weights.

  Raises:
    ValueError: it is no such model, it has no quantizable layer, or `spec` does
      not fit it.
  """
  if spec is None and isinstance(
    own := getattr(model, 'spec', None), quant_spec.QuantSpec
  ):
    spec = own
  if hasattr(model, 'ops'):  # Its products are known without its layers.
    ops, params, weight_params = model.ops(*args, **kwargs)
    return _space(ops, spec, params, weight_params=weight_params)
  return space_of(trace(model, *args, **kwargs), spec)


@dataclasses.dataclass(frozen=True)
class Traced:
  """What the trace of a model's `init` has shown.

  Attributes:
    outputs: the shapes of the model's outputs.
    variables: its collections, with shapes in place of arrays.
    calls: the path of each module, in the order of calls.
  """

  outputs: Any
  variables: Mapping[str, Any]
  calls: list[str]


def trace(model: nn.Module, *args: Any, **kwargs: Any) -> Traced:
  """Traces a model's `init`; allocates nothing.

  Args:
    model: a model of this project's layers.
    *args: as of `find`.
    **kwargs: as of `find`.

  Raises:
    ValueError: it is no linen module, or modules that `nn.jit` treats as equal
      have different formats.
  """
  if not isinstance(model, nn.Module):
    raise ValueError(
      f"{type(model).__name__} is no linen module of this project's layers and "
      'was not made by searchable; pass the model that searchable returned'
    )
  calls: list[str] = []

  def note_order(
    call: Callable[..., Any], call_args: Any, call_kwargs: Any, context: Any
  ) -> Any:
    calls.append('/'.join(context.module.path))
    return call(*call_args, **call_kwargs)

  def init(*args: Any) -> Any:
    with nn.intercept_methods(note_order):
      return model.init_with_output(jax.random.key(0), *args, **kwargs)

  outputs, variables = jax.eval_shape(init, *args)
  cost = variables.get('cost', {})
  callers = {_caller(path, sown) for path, sown in _sown_ops(cost)}
  if not callers <= set(calls):
    # nn.jit has traced the first of several equal modules and repeated the
    # result for the others; without jit each of them is traced.
    calls.clear()
    with jax.disable_jit():
      _, each = jax.eval_shape(init, *args)
    if each['cost'] != cost:
      raise ValueError(
        'the spec has a rule for some of several modules that nn.jit treats as '
        'equal, so that all would have the formats of the first; write the '
        'rule for all of these modules, or remove nn.jit'
      )
  return Traced(outputs, variables, calls)


def space_of(
  traced: Traced, spec: quant_spec.QuantSpec | None
) -> search_space.SearchSpace:
  """Returns the search space of a traced model; `find` says what is checked."""
  variables, calls = traced.variables, traced.calls
  params = sum(
    math.prod(p.shape) for p in jax.tree.leaves(variables.get('params', {}))
  )
  cost = variables.get('cost', {})
  picked = _picked(variables.get('sizes', {}), calls)
  return _space(_ops(cost, calls), spec, params, picked, _others(cost))


def _space(
  ops: tuple[ops_lib.Op, ...],
  spec: quant_spec.QuantSpec | None,
  params: int,
  picked: Mapping[str, sizes_lib.Channels | sizes_lib.Kernel] = (
    types.MappingProxyType({})
  ),
  others: Mapping[str, ops_lib.PerChannel] = types.MappingProxyType({}),
  weight_params: int | None = None,
) -> search_space.SearchSpace:
  """Returns the search space of a model's ops, after checking the spec."""
  if not ops:
    raise ValueError(
      'the model has no layer that could be quantized; build it with '
      'QuantConv, QuantDense, QuantDenseGeneral or QuantEinsum, or make it '
      'searchable'
    )
  if spec is not None:
    spec.check(
      dict.fromkeys(op.layer for op in ops),
      dict.fromkeys(op.path for op in ops if op.stack),
    )
  return search_space.SearchSpace(
    formats=_format_decisions(ops, spec),
    open_sizes=_size_decisions(picked),
    ops=ops,
    params=params,
    others=dict(others),
    weight_params=weight_params,
  )


def _flat(tree: Mapping[str, Any]) -> dict[str, Any]:
  return traverse_util.flatten_dict(tree, sep='/')


def _sown_ops(cost: Mapping[str, Any]) -> Iterator[tuple[str, tuple[Any, ...]]]:
  """Yields the path of every op's layer, and the shapes of its calls."""
  for path, sown in _flat(cost).items():
    layer, _, name = path.rpartition('/')
    if name == 'ops':
      yield layer, sown


def _caller(path: str, sown: tuple[Any, ...]) -> str:
  """Returns the path of the module whose call has sown an op's cost."""
  # The products of an attention are named after it.
  shape = getattr(sown[0], 'shape', sown[0])
  return path.rpartition('/')[0] if shape.kind == 'attend' else path


def _ops(cost: Mapping[str, Any], calls: list[str]) -> tuple[ops_lib.Op, ...]:
  order = {path: i for i, path in reversed(list(enumerate(calls)))}
  ops: list[tuple[int, ops_lib.Op]] = []
  for path, sown in _sown_ops(cost):
    place = order[_caller(path, sown)]
    for shape in sown:  # A shared layer is counted once per call.
      if isinstance(shape, ops_lib.Stacked):
        ops += [
          (
            place,
            ops_lib.Op(f'{path}/@{i}', shape.shape, path, shape.shared),
          )
          for i in range(shape.length)
        ]
      else:
        ops.append((place, ops_lib.Op(path, shape)))
  return tuple(op for _, op in sorted(ops, key=lambda placed: placed[0]))


def _format_decisions(
  ops: tuple[ops_lib.Op, ...], spec: quant_spec.QuantSpec | None
) -> tuple[decisions_lib.FormatDecision, ...]:
  decisions: dict[str, decisions_lib.FormatDecision] = {}
  owners: dict[str, str] = {}  # {leaf: its decision}.
  groups = spec.groups if spec else ()
  paths = [op.path for op in ops]
  for op in ops:
    menus = op.shape.format_leaves()
    for leaf, menu in menus.items():
      name = op.stack if op.shared else op.path
      for group, pattern in groups:
        if any(fnmatch.fnmatchcase(p, pattern) for p in {op.path, op.layer}):
          name = group
          if group in paths:
            raise ValueError(
              f'quant.groups[{group}]: a layer has that path; rename the group'
            )
      if len(menus) > 1:
        name = f'{name}/{leaf}'
      # A table and the head that shares it have other leaves beside this one,
      # so that one name has a side and the other none.
      name = owners.setdefault(op.leaf(leaf), name)
      new = decisions_lib.FormatDecision(name, (), menu)
      known = decisions.get(name, new)
      if known.menu != menu:
        raise ValueError(
          f'quant.groups[{name}]: {op.path} may use '
          f'{", ".join(new.labels)}, but {known.leaves[0]} '
          f'{", ".join(known.labels)}; layers that share a decision need the '
          'same menu'
        )
      path = op.leaf(leaf)
      if path not in known.leaves:
        known = dataclasses.replace(known, leaves=(*known.leaves, path))
      decisions[name] = known
  return tuple(decisions.values())


def _others(cost: Mapping[str, Any]) -> dict[str, ops_lib.PerChannel]:
  """Returns {path of a leaf: parameters that follow it}."""
  return {
    '/'.join((path.rpartition('/')[0], other.leaf)): other
    for path, (other, *_) in _flat(cost).items()
    if path.rpartition('/')[2] == 'others'
  }


def _picked(
  recorded: Mapping[str, Any], calls: list[str]
) -> dict[str, sizes_lib.Channels | sizes_lib.Kernel]:
  """Returns {path of a leaf: what it picks from}, in order of calls."""
  order = {path: i for i, path in reversed(list(enumerate(calls)))}
  found = {path: first for path, (first, *_) in _flat(recorded).items()}
  return dict(
    sorted(found.items(), key=lambda item: order[item[0].rpartition('/')[0]])
  )


def _size_decisions(
  picked: Mapping[str, sizes_lib.Channels | sizes_lib.Kernel],
) -> tuple[decisions_lib.SizeDecision, ...]:
  decisions: dict[str, decisions_lib.SizeDecision] = {}
  for leaf, size in picked.items():
    if size.decision is None:
      continue
    new = decisions_lib.SizeDecision(size.decision, (), size)
    known = decisions.get(size.decision, new)
    if known.labels != new.labels:
      raise ValueError(
        f'{leaf} picks from {size.labels}, but shares the decision '
        f'{size.decision} with {known.leaves[0]}, which picks from '
        f'{known.labels}'
      )
    decisions[size.decision] = dataclasses.replace(
      known, leaves=(*known.leaves, leaf)
    )
  return tuple(decisions.values())
