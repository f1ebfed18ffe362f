"""What of a model is searched, what is not, and why: nothing goes unsaid."""

import dataclasses
import fnmatch
from typing import Any

from flax import traverse_util
import flax.linen as nn
import jax

from fliqs_jax.intercept import searchable as searchable_lib
from fliqs_jax.space import discovery

_NORMS = (nn.BatchNorm, nn.GroupNorm, nn.InstanceNorm, nn.LayerNorm, nn.RMSNorm)


@dataclasses.dataclass(frozen=True)
class Layer:
  """One layer (or product of attention) that was found.

  Attributes:
    path: of the layer; patterns of a spec match it.
    kind: its class.
    steps: how many copies a scan or vmap stacks, 1 without.
    macs: multiply-accumulates, all steps and calls.
    weights: number of weights, all steps.
    formats: names of what may be chosen, most among its sides; empty if none.
    reason: why nothing may be chosen, or empty.
  """

  path: str
  kind: str
  steps: int
  macs: int
  weights: int
  formats: tuple[str, ...]
  reason: str


@dataclasses.dataclass(frozen=True)
class Missed:
  """A parameter of rank two or more that no quantized op touches.

  Attributes:
    path: of the parameter.
    shape: as stored.
    reason: why no op touches it.
  """

  path: str
  shape: tuple[int, ...]
  reason: str


@dataclasses.dataclass(frozen=True)
class Coverage:
  """What of a model is searched; `str` of it is a table.

  Attributes:
    layers: in the order of calls.
    missed: parameters of rank two or more without a quantized op.
    products: paths of attentions whose products are not quantized.
    params: number of all parameters.
  """

  layers: tuple[Layer, ...]
  missed: tuple[Missed, ...]
  products: tuple[str, ...]
  params: int

  @property
  def share(self) -> float:
    """Share of the parameters that have a choice of formats."""
    searched = sum(layer.weights for layer in self.layers if layer.formats)
    return searched / max(self.params, 1)

  def __str__(self) -> str:
    rows = [('layer', 'kind', 'steps', 'MACs', 'weights', 'formats')]
    rows += [
      (
        layer.path or '(the model)',
        layer.kind,
        str(layer.steps),
        f'{layer.macs:,}',
        f'{layer.weights:,}',
        ' '.join(layer.formats) or f'none: {layer.reason}',
      )
      for layer in self.layers
    ]
    lines = _table(rows)
    lines.append(
      f'{self.share:.1%} of {self.params:,} parameters have a choice.'
    )
    if self.missed:
      lines += ['', 'Parameters of rank two or more that stay as they are:']
      lines += _table(
        [(m.path, 'x'.join(map(str, m.shape)), m.reason) for m in self.missed]
      )
    if self.products:
      lines += ['', 'Products of attention that stay as they are:']
      lines += [
        f'{path or "(the model)"}  quantized by choice: attention=True'
        for path in self.products
      ]
    return '\n'.join(lines)


def _table(rows):
  widths = [max(map(len, column)) for column in zip(*rows)]
  return [
    '  '.join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()
    for row in rows
  ]


def coverage(
  model: searchable_lib.Searchable, *args: Any, **kwargs: Any
) -> Coverage:
  """Finds what of a model is searched, by tracing it; allocates nothing.

  Args:
    model: made by `searchable`.
    *args: what the model is called with, arrays or `jax.ShapeDtypeStruct`.
    **kwargs: more of the call, static.

  Raises:
    ValueError: as `find_decisions`.
  """
  space = discovery.find(model, *args, **kwargs)
  variables, classes = _traced(model.model, *args, **kwargs)
  layers = _layers(model, space, classes)
  params = traverse_util.flatten_dict(
    nn.meta.unbox(variables.get('params', {})), sep='/'
  )
  touched = {
    f'{layer.path}/{name}'.lstrip('/')
    for layer in layers
    for name in ('kernel', 'bias', 'embedding')
  }
  missed = tuple(
    Missed(path, tuple(p.shape), _reason(path, classes))
    for path, p in params.items()
    if len(p.shape) > 1 and path not in touched
  )
  products = tuple(
    path
    for path, module_class in classes.items()
    if issubclass(module_class, nn.MultiHeadDotProductAttention)
    and not model.attention
  )
  return Coverage(layers, missed, products, space.params)


def _traced(module: nn.Module, *args, **kwargs):
  """Returns the shapes of a module's variables, and {path: class} of all."""
  classes: dict[str, type[nn.Module]] = {}

  def note(call, call_args, call_kwargs, context):
    # Of the nested calls of a transformed class the innermost is the author's;
    # the transform itself shows as a lambda.
    if context.method_name != '<lambda>':
      classes['/'.join(context.module.path)] = type(context.module)
    return call(*call_args, **call_kwargs)

  def init(*args):
    with nn.intercept_methods(note):
      return module.init(jax.random.key(0), *args, **kwargs)

  variables = jax.eval_shape(init, *args)
  owners = {
    '/'.join(path[:-1])
    for path in traverse_util.flatten_dict(variables.get('params', {}))
  }
  if not owners <= set(classes):
    # nn.jit has traced the first of several equal modules alone.
    with jax.disable_jit():
      jax.eval_shape(init, *args)
  return variables, classes


def _layers(model, space, classes) -> tuple[Layer, ...]:
  ops: dict[str, list[Any]] = {}
  for op in space.ops:
    ops.setdefault(op.layer, []).append(op)
  layers = []
  for path, same in ops.items():
    shape = same[0].shape
    menus = [m for m in (shape.weight_menu, shape.act_menu) if m is not None]
    formats = max(menus, key=len) if menus else ()
    steps = {op.path: op for op in same}
    if shape.kind == 'attend':
      kind = 'attention product'
    else:
      kind = classes[path].__name__
    layers.append(
      Layer(
        path=path,
        kind=kind,
        steps=len(steps),
        macs=sum(op.shape.macs for op in same),
        weights=sum(op.shape.weights for op in steps.values()),
        formats=tuple(str(f) for f in formats),
        reason='' if formats else _why_not(model.spec, path),
      )
    )
  return tuple(layers)


def _why_not(spec, path) -> str:
  for pattern in spec.exclude:
    if fnmatch.fnmatchcase(path, pattern):
      return f'quant.exclude {pattern!r}'
  if spec.assignment is not None:
    return 'the assignment leaves it unquantized'
  return f'quant.mode={spec.mode!r}'


def _reason(path: str, classes: dict[str, type[nn.Module]]) -> str:
  *owner, name = path.split('/')
  known = [
    classes[where]
    for i in range(len(owner), -1, -1)
    if (where := '/'.join(owner[:i])) in classes
  ]
  if not known:
    return 'of no module that was called'
  names = known[0].__name__
  if known[0].__module__.startswith('flax.') and len(known) > 1:
    # It may hold parameters for another, as DenseParams does for an LSTM.
    names += f' of {known[1].__name__}'
  if issubclass(known[0], nn.Embed):
    return 'Embed is quantized by choice: embed=True'
  if issubclass(known[0], _NORMS):
    return f'{name} of {known[0].__name__}, stacked: nothing is contracted'
  if any(c.__name__ == 'ToLinen' for k in known for c in k.__mro__):
    return 'an NNX module, into which linen cannot see'
  if issubclass(known[0], (nn.Dense, nn.DenseGeneral, nn.Einsum, nn.Conv)):
    return f"{names} does not run its linen class's __call__ in real floats"
  return f'{names} multiplies on its own, outside of any layer'
