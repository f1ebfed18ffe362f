"""Runs a program with other operations in the place of its products.

An interpreter of jaxprs. Each product that is replaced is `given` values (its
formats, or what is stored of it), has `statistics`, which the run may change,
and may `note` values, such as what it multiplies. Through scans these travel as
further xs, carried values and ys.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
from jax import lax
from jax.extend import core
import jax.numpy as jnp

from fliqs_jax.program import equations
from fliqs_jax.program import products as products_lib

# (equation, product, operands, given, statistics) -> (float32 result,
# statistics, what is noted).
Rule = Callable[..., tuple[jax.Array, Any, Any]]
Values = Mapping[str, Any]  # {path of a product: values}

# Primitives that change the arrangement of a tensor, not its numbers.
_ARRANGE = frozenset(
  (
    'broadcast_in_dim',
    'concatenate',
    'copy',
    'dynamic_slice',
    'expand_dims',
    'reshape',
    'rev',
    'slice',
    'squeeze',
    'transpose',
  )
)


class Rewriter:
  """A program with some of its products replaced.

  Attributes:
    products: the products that are replaced.
    rule: what they are replaced by.
    every_branch: whether both branches of a `cond` run, so that each product
      notes its values.
    shared: what becomes of floats that a replaced product and another equation
      read; None: they stay.
  """

  def __init__(
    self,
    products: Iterable[products_lib.Product],
    rule: Rule,
    every_branch: bool = False,
    shared: Callable[[jax.Array], jax.Array] | None = None,
  ):
    self.products = {product.place: product for product in products}
    # {place of an equation: the products inside of it}.
    self.inside: dict[products_lib.Place, list[products_lib.Product]] = {}
    for place, product in self.products.items():
      for n in range(1, len(place)):
        self.inside.setdefault(place[:n], []).append(product)
    self.rule = rule
    self.every_branch = every_branch
    self.shared = shared

  def __call__(
    self,
    program: Any,
    operands: Sequence[Any],
    given: Values,
    statistics: Values,
  ) -> tuple[list[Any], dict[str, Any], dict[str, Any]]:
    """Returns the results, the statistics and what was noted.

    Args:
      program: a closed jaxpr.
      operands: values of its arguments.
      given: what the rule gets of each product.
      statistics: those of each product that has any.
    """
    body = equations.Body(program.jaxpr, program.consts)
    return self._run(body, operands, {}, given, statistics, ())

  def _run(self, body, operands, before, given, statistics, place) -> Any:
    values: dict[core.Var, Any] = {}
    values.update(zip(body.jaxpr.constvars, body.consts, strict=True))
    values.update(zip(body.jaxpr.invars, operands, strict=True))
    wide = _Wide(values, {body.jaxpr.invars[i]: x for i, x in before.items()})
    statistics, noted = dict(statistics), {}
    shared = self._shared(body.jaxpr, place) if self.shared else frozenset()
    for i, eqn in enumerate(body.jaxpr.eqns):
      at = (*place, i)
      with equations.context(eqn):
        if product := self.products.get(at):
          y, state, note = self.rule(
            eqn,
            product,
            wide.operands(eqn, product.side),
            given[product.path],
            statistics.get(product.path),
          )
          statistics |= {product.path: state} if state else {}
          noted |= {} if note is None else {product.path: note}
          results = [wide.rounded(eqn, y)]
        elif at in self.inside:
          results, state, note = self._call(
            eqn, wide.operands(eqn), wide.before(eqn), given, statistics, at
          )
          statistics |= state
          noted |= note
        else:
          results = wide.followed(eqn, equations.bind(eqn, wide.operands(eqn)))
      results = [
        self.shared(x) if v in shared else x
        for v, x in zip(eqn.outvars, results, strict=True)
      ]
      values.update(zip(eqn.outvars, results, strict=True))
    return [_read(values, v) for v in body.jaxpr.outvars], statistics, noted

  def _shared(self, jaxpr: Any, place: products_lib.Place) -> set[core.Var]:
    """Returns the floats that a product and another equation read."""
    readers: dict[core.Var, set[int]] = {}
    by_products = set()
    for i, eqn in enumerate(jaxpr.eqns):
      at = (*place, i)
      for v in eqn.invars:
        if isinstance(v, core.Literal) or not _is_float(v):
          continue
        readers.setdefault(v, set()).add(i)
        if at in self.products or at in self.inside:
          by_products.add(v)
    return {v for v in by_products if len(readers[v]) > 1}

  def _call(self, eqn, operands, before, given, statistics, place) -> Any:
    match equations.name(eqn):
      case 'scan':
        call = self._scan
      case 'cond':
        call = self._cond
      case _:
        call = self._once
    return call(eqn, operands, before, given, statistics, place)

  def _once(self, eqn, operands, before, given, statistics, place) -> Any:
    body = equations.body(eqn)

    def run(operands, before, given, statistics):
      return self._run(body, operands, before, given, statistics, place)

    paths = [product.path for product in self.inside[place]]
    results, statistics, noted = equations.rerun(eqn, run)(
      equations.constrained(eqn, 'in_shardings', operands),
      before,
      _of(paths, given),
      _of(paths, statistics),
    )
    results = equations.constrained(eqn, 'out_shardings', results)
    return results, statistics, noted

  def _scan(self, eqn, operands, before, given, statistics, place) -> Any:
    scan = equations.scan(eqn)
    after = scan.consts + scan.carries
    consts, carried = operands[: scan.consts], operands[scan.consts : after]
    fixed = {i: x for i, x in before.items() if i < scan.consts}
    sliced = {i: x for i, x in before.items() if i >= after}
    inside = self.inside[place]
    apart = [p.path for p in inside if place in dict(p.scans)]
    shared = [p.path for p in inside if place not in dict(p.scans)]

    def iteration(carry, xs):
      (carried, state), (xs, sliced, own_given, own_state) = carry, xs
      results, new, noted = self._run(
        scan.body,
        [*consts, *carried, *xs],
        fixed | sliced,
        _of(shared, given) | own_given,
        state | own_state,
        place,
      )
      carried, ys = results[: scan.carries], results[scan.carries :]
      return (carried, _of(shared, new)), (ys, _of(apart, new), noted)

    (carried, state), (ys, own_state, noted) = lax.scan(
      iteration,
      (carried, _of(shared, statistics)),
      (operands[after:], sliced, _of(apart, given), _of(apart, statistics)),
      **scan.options,
    )
    # All iterations multiply the same weights at the same scales.
    noted |= jax.tree.map(lambda x: x[0], _of(shared, noted))
    return [*carried, *ys], state | own_state, noted

  def _cond(self, eqn, operands, before, given, statistics, place) -> Any:
    index, *operands = operands
    before = {i - 1: x for i, x in before.items()}
    paths = [product.path for product in self.inside[place]]
    given, statistics = _of(paths, given), _of(paths, statistics)
    branches = [
      self._branch(body, (*place, i))
      for i, body in enumerate(equations.branches(eqn))
    ]
    if not self.every_branch:
      results, state, _ = lax.switch(
        index, branches, operands, before, given, statistics
      )
      return results, state, {}
    each = [branch(operands, before, given, statistics) for branch in branches]
    results = [
      lax.select_n(index, *same)
      for same in zip(*(results for results, _, _ in each))
    ]
    noted = {}
    for _, _, note in each:
      noted |= note
    return results, statistics, noted

  def _branch(self, body, place) -> Callable[..., Any]:
    def run(operands, before, given, statistics):
      results, statistics, noted = self._run(
        body, operands, before, given, statistics, place
      )
      return results, statistics, noted if self.every_branch else {}

    return run


class _Wide:
  """Values of a wider type than the program has, where products need them.

  Weights are quantized as they were before a cast to a narrower type. A bias is
  added to the float32 sums before they are rounded, as in a fused kernel.
  """

  def __init__(self, values: dict[core.Var, Any], wide: dict[core.Var, Any]):
    self.values = values
    self.wide = wide
    self.sums: set[core.Var] = set()

  def operands(self, eqn: core.JaxprEqn, weights: int | None = None) -> Any:
    """Returns the operands of an equation, the weights as before a cast."""
    return [
      self._wide(v) if i == weights else _read(self.values, v)
      for i, v in enumerate(eqn.invars)
    ]

  def before(self, eqn: core.JaxprEqn) -> dict[int, Any]:
    """Returns {number of an operand: its value before a cast} of a call."""
    return {
      i: self.wide[v]
      for i, v in enumerate(eqn.invars)
      if not isinstance(v, core.Literal) and v in self.wide
    }

  def rounded(self, eqn: core.JaxprEqn, y: jax.Array) -> jax.Array:
    """Returns the float32 result of a product in the program's type."""
    (out,) = eqn.outvars
    if out.aval.dtype != y.dtype:
      self.wide[out] = y
      self.sums.add(out)
    return y.astype(out.aval.dtype)

  def followed(self, eqn: core.JaxprEqn, results: list[Any]) -> list[Any]:
    """Returns the results of an equation; biases are added before rounding."""
    name = equations.name(eqn)
    variables = [v for v in eqn.invars if not isinstance(v, core.Literal)]
    if name == 'convert_element_type' and variables:
      (out,), before = eqn.outvars, variables[0].aval.dtype
      both_floats = all(
        jnp.issubdtype(dtype, jnp.floating)
        for dtype in (before, out.aval.dtype)
      )
      if both_floats and before.itemsize > out.aval.dtype.itemsize:
        self.wide[out] = self._wide(variables[0])
    elif name in _ARRANGE and self.wide.keys() & variables:
      (out,) = eqn.outvars
      wide = [self._wide(v) for v in eqn.invars]
      if name == 'concatenate':  # Of which some may be narrow.
        wide = [jnp.asarray(x, jnp.float32) for x in wide]
      (self.wide[out],) = equations.bind(eqn, wide)
      if self.sums.intersection(variables):
        self.sums.add(out)
    elif name == 'add' and self.sums.intersection(variables):
      (out,) = eqn.outvars
      lhs, rhs = (jnp.asarray(self._wide(v), jnp.float32) for v in eqn.invars)
      return [(lhs + rhs).astype(out.aval.dtype)]
    return results

  def _wide(self, atom: Any) -> Any:
    if not isinstance(atom, core.Literal) and atom in self.wide:
      return self.wide[atom]
    return _read(self.values, atom)


def _is_float(v: core.Var) -> bool:
  return jnp.issubdtype(v.aval.dtype, jnp.floating)


def _read(values: Mapping[core.Var, Any], atom: Any) -> Any:
  return atom.val if isinstance(atom, core.Literal) else values[atom]


def _of(paths: Iterable[str], values: Values) -> dict[str, Any]:
  return {path: values[path] for path in paths if path in values}
