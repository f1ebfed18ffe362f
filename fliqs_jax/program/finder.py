"""Finds the products of a program, and where their operands come from.

A value comes from the variables alone (it is a weight, whatever was done to it:
cast, transposed, standardised), from the inputs, or from neither.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import math
from typing import Any

from jax.extend import core
import jax.numpy as jnp

from fliqs_jax.program import contractions
from fliqs_jax.program import equations
from fliqs_jax.program import naming
from fliqs_jax.program import products as products_lib

# Primitives that move numbers, mask them or drop some of them out.
_SAME_NUMBERS = (
  'broadcast_in_dim',
  'convert_element_type',
  'copy',
  'mul',
  'reshape',
  'select_n',
  'squeeze',
  'transpose',
)


@dataclasses.dataclass(frozen=True)
class Origin:
  """Where a value comes from.

  Attributes:
    leaves: paths of the variables that it is made of, since the last product.
    varies: whether it depends on the inputs.
    scans: places of the scans of which it is the slice of one iteration.
    marked: whether it is marked as weights.
    selected: whether an input selects it from the variables.
    softmax: which part of a softmax it is: `exp`, of what depends on the
      inputs, or `div`, an `exp` that was divided. Masks and factors keep it.
      Empty: none.
  """

  leaves: frozenset[str] = frozenset()
  varies: bool = False
  scans: frozenset[products_lib.Place] = frozenset()
  marked: bool = False
  selected: bool = False
  softmax: str = ''

  @property
  def is_weight(self) -> bool:
    """Whether a product has it as weights."""
    return self.marked or (bool(self.leaves) and not self.varies)


_INPUT, _CONSTANT = Origin(varies=True), Origin()


def find(
  program: Any, names: Sequence[str], root: str = ''
) -> tuple[products_lib.Product, ...]:
  """Returns every product of a program, in the order of the program.

  Args:
    program: a closed jaxpr, whose first arguments are the variables.
    names: paths of the variables.
    root: name of the model's class, with which names of places begin.
  """
  jaxpr = program.jaxpr
  sizes = {
    name: math.prod(v.aval.shape) for name, v in zip(names, jaxpr.invars)
  }
  finder = _Finder(sizes, root)
  origins = [Origin(frozenset([name])) for name in names]
  origins += [_INPUT] * (len(jaxpr.invars) - len(names))
  finder.walk(jaxpr, origins, _Here())
  return tuple(naming.named(finder.found, sizes))


@dataclasses.dataclass(frozen=True)
class _Here:
  """Where the walk is.

  Attributes:
    place: place of the equation.
    names: names of the scopes that hold it.
    scans: (place, length) of the loops that hold it; None: length unknown.
    stacks: places of those whose iterations have weights of their own.
    refusal: why nothing here can be quantized.
  """

  place: products_lib.Place = ()
  names: str = ''
  scans: tuple[tuple[products_lib.Place, int | None], ...] = ()
  stacks: frozenset[products_lib.Place] = frozenset()
  refusal: str = ''


class _Finder:
  """Walks over a program and notes its products."""

  def __init__(self, sizes: Mapping[str, int], root: str):
    self.sizes = sizes
    self.root = root
    self.found: list[naming.Found] = []

  def walk(self, jaxpr: Any, origins: Sequence[Origin], here: _Here) -> Any:
    """Notes the products of a jaxpr; returns where its results come from."""
    known = dict.fromkeys(jaxpr.constvars, _CONSTANT)
    known.update(zip(jaxpr.invars, origins, strict=True))

    def read(atom: Any) -> Origin:
      return _CONSTANT if isinstance(atom, core.Literal) else known[atom]

    for i, eqn in enumerate(jaxpr.eqns):
      there = dataclasses.replace(
        here,
        place=(*here.place, i),
        names=f'{here.names}/{eqn.source_info.name_stack}',
      )
      results = self._equation(eqn, [read(v) for v in eqn.invars], there)
      known.update(zip(eqn.outvars, results, strict=True))
    return [read(v) for v in jaxpr.outvars]

  def _equation(
    self, eqn: core.JaxprEqn, origins: list[Origin], here: _Here
  ) -> list[Origin]:
    name = equations.name(eqn)
    joined = dataclasses.replace(
      _join(origins), softmax=_part_of_softmax(name, origins)
    )
    results = [joined] * len(eqn.outvars)
    if contraction := contractions.of(eqn):
      self._product(eqn, contraction, origins, here)
      return [_INPUT if joined.varies else joined]
    if equations.marker(eqn) == products_lib.WEIGHTS:
      return [dataclasses.replace(origins[0], marked=True)]
    if _selects(eqn, origins):
      if _is_lookup(eqn):
        self._lookup(eqn, origins, here)
        return [_INPUT]
      return [dataclasses.replace(origins[0], varies=True, selected=True)]
    if equations.is_call(eqn):
      return self.walk(equations.body(eqn).jaxpr, origins, here)
    if not joined.varies:
      pass  # It is computed once, at export, with all products inside it.
    elif name == 'scan':
      return self._scan(eqn, origins, here)
    elif name == 'while':
      self._while(eqn, origins, here)
    elif name == 'cond':
      each = [
        self.walk(
          branch.jaxpr,
          origins[1:],
          dataclasses.replace(here, place=(*here.place, i)),
        )
        for i, branch in enumerate(equations.branches(eqn))
      ]
      return [_join([origins[0], *same]) for same in zip(*each)]
    else:
      self._inside(eqn, origins, here)
    return results

  def _inside(
    self, eqn: core.JaxprEqn, origins: list[Origin], here: _Here
  ) -> None:
    """Notes products that stay as they are."""
    name = equations.name(eqn)
    there = dataclasses.replace(
      here,
      refusal=here.refusal or f'it is inside {name}, which has its own rules',
    )
    for body in equations.inside(eqn):
      inputs = body.jaxpr.invars
      same = len(inputs) == len(origins)
      self.walk(
        body.jaxpr, origins if same else [_join(origins)] * len(inputs), there
      )

  def _scan(
    self, eqn: core.JaxprEqn, origins: list[Origin], here: _Here
  ) -> list[Origin]:
    scan = equations.scan(eqn)
    body, after = scan.body.jaxpr, scan.consts + scan.carries
    if not scan.length:  # Its body never runs.
      stacked = len(eqn.outvars) - scan.carries
      return [*origins[scan.consts : after], *[_join(origins)] * stacked]
    inside = list(origins)
    for i in range(scan.consts, after):
      # A carried value that no iteration changes is a constant.
      if body.outvars[i - scan.consts] is not body.invars[i]:
        inside[i] = _INPUT
    stacks = here.stacks
    for i in range(after, len(inside)):
      if not inside[i].varies:
        # Of a constant, too: what it selects or scales differs by iteration.
        scans = inside[i].scans | {here.place}
        inside[i] = dataclasses.replace(inside[i], scans=scans)
      if inside[i].is_weight:
        stacks |= {here.place}
    there = dataclasses.replace(
      here, scans=(*here.scans, (here.place, scan.length)), stacks=stacks
    )
    results = self.walk(body, inside, there)
    return [
      dataclasses.replace(origin, scans=origin.scans - {here.place})
      if i < scan.carries or not origin.is_weight
      else _INPUT
      for i, origin in enumerate(results)
    ]

  def _while(
    self, eqn: core.JaxprEqn, origins: list[Origin], here: _Here
  ) -> None:
    loop = equations.while_loop(eqn)
    first, second = loop.condition_consts, loop.body_consts
    carried = [_INPUT] * (len(origins) - first - second)
    there = dataclasses.replace(
      here,
      scans=(*here.scans, (here.place, None)),
      refusal=here.refusal
      or 'it is in a while loop, whose number of iterations is unknown',
    )
    self.walk(loop.condition.jaxpr, origins[:first] + carried, there)
    self.walk(loop.body.jaxpr, origins[first : first + second] + carried, there)

  def _product(
    self,
    eqn: core.JaxprEqn,
    contraction: contractions.Contraction,
    origins: list[Origin],
    here: _Here,
  ) -> None:
    if not any(origin.varies for origin in origins):
      return  # It is computed once, at export.
    if not all(v.aval.size for v in (*eqn.invars[:2], *eqn.outvars)):
      return  # It multiplies nothing.
    pair = origins[:2]
    weights = [i for i, origin in enumerate(pair) if origin.is_weight]
    side = weights[0] if len(weights) == 1 else None
    dtypes = tuple(v.aval.dtype for v in eqn.invars[:2])
    reason = contraction.refusal(side)
    if not all(jnp.issubdtype(dtype, jnp.floating) for dtype in dtypes):
      reason = f'it multiplies {dtypes[0]} by {dtypes[1]}'
    elif side is None and any(origin.selected for origin in pair):
      reason = (
        'an input selects its weights from a stack: scan over the stack instead'
      )
    elif side is None and not all(origin.varies for origin in pair):
      reason = (
        'one operand is a constant of the function: pass it as a parameter'
      )
    kind = contraction.kind if side is not None else 'attend'
    slices = contraction.slices() if side is not None else ()
    scans, size, channels = here.stacks, 0, 1
    if side is not None:
      scans = pair[side].scans
      size = eqn.invars[side].aval.size // math.prod(slices)
      shape = contraction.shapes[side]
      summed = contraction.summed(side) if not reason else ()
      channels = size // math.prod(shape[i] for i in summed)
    self._note(
      here,
      origin=pair[side] if side is not None else _INPUT,
      kind=kind,
      side=side,
      macs=contraction.macs // math.prod(slices),
      weights=size,
      channels=channels,
      inputs=sum(v.aval.size for i, v in enumerate(eqn.invars[:2]) if i != side)
      // math.prod(slices),
      outputs=contraction.results // math.prod(slices),
      window=contraction.window,
      strides=contraction.strides,
      scans=scans,
      slices=slices,
      softmax=frozenset(
        i for i, origin in enumerate(pair) if origin.softmax == 'div'
      ),
      has_integer_form=side is not None and contraction.has_integer_form,
      reason=reason,
    )

  def _lookup(
    self, eqn: core.JaxprEqn, origins: list[Origin], here: _Here
  ) -> None:
    table = eqn.invars[0].aval
    if not table.size:
      return
    self._note(
      here,
      origin=origins[0],
      kind='embed',
      side=0,
      macs=0,
      weights=table.size,
      channels=table.shape[0],
      inputs=0,
      outputs=eqn.outvars[0].aval.size,
      window=(),
      strides=(),
      scans=origins[0].scans,
      slices=(),
      softmax=frozenset(),
      has_integer_form=False,
      reason='',
    )

  def _note(
    self,
    here: _Here,
    *,
    origin: Origin,
    scans: frozenset[products_lib.Place],
    reason: str,
    **shape: Any,
  ) -> None:
    own = tuple((place, n) for place, n in here.scans if place in scans)
    calls = [n for place, n in here.scans if place not in scans]
    # Of several, as of a standardised or a low-rank weight, the largest.
    leaf = max(sorted(origin.leaves), key=self.sizes.__getitem__, default='')
    product = products_lib.Product(
      place=here.place,
      path='',
      layer='',
      leaves=origin.leaves,
      is_stored=bool(leaf) and not origin.varies,
      scans=own,
      calls=math.prod(n for n in calls if n),
      reason=here.refusal or reason,
      **shape,
    )
    self.found.append(
      naming.Found(product, leaf, naming.scope(here.names, self.root))
    )


def _selects(eqn: core.JaxprEqn, origins: Sequence[Origin]) -> bool:
  """Returns whether an input selects a part of weights."""
  if equations.name(eqn) not in ('gather', 'dynamic_slice'):
    return False
  return origins[0].is_weight and any(o.varies for o in origins[1:])


def _is_lookup(eqn: core.JaxprEqn) -> bool:
  """Returns whether an equation takes whole rows of a matrix."""
  if equations.name(eqn) != 'gather':
    return False
  shape = eqn.invars[0].aval.shape
  return len(shape) == 2 and eqn.params['slice_sizes'] == (1, shape[1])


def _join(origins: Sequence[Origin]) -> Origin:
  """Returns where a value comes from that is made of several others."""
  varying = [origin for origin in origins if origin.varies]
  return Origin(
    leaves=frozenset().union(*(origin.leaves for origin in origins)),
    varies=bool(varying),
    scans=frozenset().union(*(origin.scans for origin in origins)),
    marked=any(origin.marked for origin in origins),
    selected=bool(varying) and all(origin.selected for origin in varying),
  )


def _part_of_softmax(name: str, origins: Sequence[Origin]) -> str:
  """Returns `Origin.softmax` of the result of an equation."""
  if name in ('exp', 'exp2') and origins[0].varies:
    return 'exp'
  if name == 'div' and origins[0].softmax:
    return 'div'
  if name in _SAME_NUMBERS:
    return next((o.softmax for o in origins if o.softmax), '')
  return ''
