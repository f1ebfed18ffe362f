"""Jaxprs: how a call becomes one, and their control flow.

Only this file reads the parameters of `scan`, `cond`, `jit` and the like, which
are internal to JAX and differ between versions. Tests of this folder run on the
oldest and the newest version that setup.cfg allows.
"""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import gc
from typing import Any, NamedTuple, TypeVar

import jax
from jax import lax
from jax.extend import core
from jax.extend import source_info_util
from jax.interpreters import partial_eval

_Traced = TypeVar('_Traced', bound=Any)

# Calls that may be replaced by the equations that they call.
_CALLS = frozenset(('jit', 'pjit', 'closed_call', 'core_call'))
_REMAT = frozenset(('checkpoint', 'remat', 'remat2'))
_OWN_DERIVATIVE = 'custom_vjp_call'

# The name of the result of a product whose call has a derivative of its own
# that a search may replace, as the call of an AQT config has.
OPEN = 'fliqs open'


class Body(NamedTuple):
  """The equations inside of an equation.

  Attributes:
    jaxpr: the equations.
    consts: values of its `constvars`.
  """

  jaxpr: Any
  consts: Sequence[Any]


class Scan(NamedTuple):
  """A scan: operands are constants, then carried values, then xs.

  Attributes:
    body: equations of one iteration.
    consts: number of constants.
    carries: number of carried values.
    length: number of iterations.
    options: keyword arguments of `lax.scan` that are not operands.
  """

  body: Body
  consts: int
  carries: int
  length: int
  options: dict[str, Any]


class While(NamedTuple):
  """A loop of unknown length: operands of condition, of body, then carried."""

  condition: Body
  body: Body
  condition_consts: int
  body_consts: int


def name(eqn: core.JaxprEqn) -> str:
  """Returns the name of an equation's primitive."""
  return eqn.primitive.name


def is_call(eqn: core.JaxprEqn) -> bool:
  """Returns whether an equation runs other equations, once and as they are."""
  return name(eqn) in _CALLS or is_remat(eqn) or _is_open(eqn)


def is_remat(eqn: core.JaxprEqn) -> bool:
  """Returns whether an equation is `jax.checkpoint`."""
  return name(eqn) in _REMAT


def marker(eqn: core.JaxprEqn) -> str:
  """Returns the name that `checkpoint_name` gave a value; else nothing."""
  return eqn.params['name'] if name(eqn) == 'name' else ''


def body(eqn: core.JaxprEqn) -> Body:
  """Returns the equations of a call."""
  return next(inside(eqn))


def rerun(eqn: core.JaxprEqn, run: Callable[..., Any]) -> Callable[..., Any]:
  """Returns `run` as a call of an equation's kind: with its checkpoint policy.

  Args:
    eqn: a call.
    run: what replaces the equations of the call.
  """
  if not is_remat(eqn):
    return run
  policy, prevent_cse = eqn.params['policy'], eqn.params['prevent_cse']
  return jax.checkpoint(run, policy=policy, prevent_cse=prevent_cse)


def constrained(
  eqn: core.JaxprEqn, key: str, values: Sequence[Any]
) -> list[Any]:
  """Returns values with the shardings that an inner `jit` asked for.

  Args:
    eqn: a call whose body replaces it.
    key: `in_shardings` or `out_shardings`.
    values: operands or results of the call.
  """
  shardings = eqn.params.get(key) or [None] * len(values)
  return [
    lax.with_sharding_constraint(value, sharding)
    if isinstance(sharding, jax.sharding.Sharding)
    else value
    for value, sharding in zip(values, shardings, strict=True)
  ]


def scan(eqn: core.JaxprEqn) -> Scan:
  """Returns the parts of a scan."""
  params = eqn.params
  if 'num_consts' in params:  # Up to JAX 0.10.
    consts, carries = params['num_consts'], params['num_carry']
  else:
    first, second, _ = params['ft_in'].unpack()
    consts, carries = len(list(first)), len(list(second))
  options = {key: params[key] for key in ('length', 'reverse', 'unroll')}
  return Scan(
    _body(params['jaxpr']), consts, carries, params['length'], options
  )


def while_loop(eqn: core.JaxprEqn) -> While:
  """Returns the parts of a while loop."""
  params = eqn.params
  return While(
    _body(params['cond_jaxpr']),
    _body(params['body_jaxpr']),
    params['cond_nconsts'],
    params['body_nconsts'],
  )


def branches(eqn: core.JaxprEqn) -> list[Body]:
  """Returns the branches of a cond; its first operand is their index."""
  return [_body(branch) for branch in eqn.params['branches']]


def inside(eqn: core.JaxprEqn) -> Iterator[Body]:
  """Yields the equations inside of an equation of any kind."""
  for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_body):
    if _is_body(value):
      yield _body(value)


def has_own_derivative(jaxpr: Any) -> bool:
  """Returns whether a program holds a `custom_vjp` call, at any depth."""
  return any(
    name(eqn) == _OWN_DERIVATIVE
    or any(has_own_derivative(body.jaxpr) for body in inside(eqn))
    for eqn in jaxpr.eqns
  )


def bind(eqn: core.JaxprEqn, operands: Sequence[Any]) -> list[Any]:
  """Returns the results of an equation for other operands."""
  params = eqn.primitive.get_bind_params(eqn.params)
  results = eqn.primitive.bind(*operands, **params)
  return list(results) if eqn.primitive.multiple_results else [results]


@contextlib.contextmanager
def context(eqn: core.JaxprEqn) -> Iterator[None]:
  """Runs what it holds in the context of an equation: its names and options."""
  stack = source_info_util.current_name_stack() + eqn.source_info.name_stack
  traceback = eqn.source_info.traceback
  with (
    source_info_util.user_context(traceback, name_stack=stack),
    eqn.ctx.manager,
  ):
    yield


def _is_open(eqn: core.JaxprEqn) -> bool:
  return name(eqn) == _OWN_DERIVATIVE and any(
    marker(inner) == OPEN for inner in body(eqn).jaxpr.eqns
  )


def _is_body(value: Any) -> bool:
  return hasattr(getattr(value, 'jaxpr', value), 'eqns')


def _body(value: Any) -> Body:
  return Body(getattr(value, 'jaxpr', value), getattr(value, 'consts', ()))


def needed(program: Any) -> list[bool]:
  """Returns which arguments of a closed jaxpr its results depend on."""
  outputs = [True] * len(program.jaxpr.outvars)
  return partial_eval.dce_jaxpr(program.jaxpr, outputs)[1]


def program(call: Any, arrays: list[Any]) -> tuple[Any, Any]:
  """Returns the jaxpr of a call, and the shapes of its results.

  Args:
    call: a function of arrays that returns a tree of arrays.
    arrays: its arguments, arrays or shapes.

  Raises:
    ValueError: the call cannot be a program; the message says what to do.
  """
  try:
    jaxpr, shapes = jax.make_jaxpr(call, return_shape=True)(*arrays)
  except NameError as error:
    if 'axis name' not in str(error):
      raise
    raise ValueError(
      f'the model uses an axis name that nothing binds ({error}); make a '
      'function searchable that binds it: f(params, x) = jax.vmap(model, '
      "axis_name='batch')(...), or call the model inside jax.shard_map"
    ) from error
  except TypeError as error:
    if 'valid JAX type' not in str(error):
      raise
    raise ValueError(
      'the model returns something that is no array or tree of arrays: '
      f'{error}; return arrays only'
    ) from error
  if not jax.tree.leaves(shapes[0]):
    raise ValueError('the model returns no array; return its outputs')
  return jaxpr, shapes


def pure(trace: Callable[[], _Traced]) -> _Traced:
  """Returns what `trace` returns, whose `program` is the jaxpr of a model.

  Raises:
    ValueError: the model keeps a value of the call; what holds it is named.
  """
  try:
    with _new_objects(), jax.checking_leaks():
      return trace()
  except Exception:
    # The model's own errors come without the check, too.
    traced = trace()
    # `nn.custom_vjp` keeps the module's variables for its derivative, which
    # the check takes for a leak.
    if not has_own_derivative(traced.program.jaxpr):
      raise ValueError(
        'the model is not pure: a value of the call is kept outside of it, in '
        'an attribute, a list or a global variable. Return it instead; of an '
        f'NNX module, keep it in an nnx.Variable. {_leak(trace)}'
      ) from None
    return traced


@contextlib.contextmanager
def _new_objects() -> Iterator[None]:
  """Hides the objects that there are from Python's collector of garbage.

  For each function that is traced, JAX's check of leaks collects garbage and
  looks at all objects. No tracer is among those of before, and without them the
  check takes a tenth of the time.
  """
  gc.freeze()
  try:
    yield
  finally:
    gc.unfreeze()


def _leak(trace: Callable[[], Any]) -> Exception | None:
  """Returns the error of a leak, which names what holds the value."""
  try:
    with jax.checking_leaks():
      trace()
  except Exception as error:  # JAX may fail to word it: of any type.
    return error
  return None
