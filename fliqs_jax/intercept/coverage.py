"""Coverage report: which layers and parameters are searched, and why not."""

import dataclasses
import fnmatch
from typing import Any

from flax import traverse_util
import flax.linen as nn
import jax

from fliqs_jax.intercept import layer_calls
from fliqs_jax.intercept import searchable as searchable_lib
from fliqs_jax.space import discovery

_NORMS = (nn.BatchNorm, nn.GroupNorm, nn.InstanceNorm, nn.LayerNorm, nn.RMSNorm)


@dataclasses.dataclass(frozen=True)
class Layer:
  """One layer, or one product of attention.

  Attributes:
    path: path of the layer; the patterns of a spec match it.
    kind: name of its class, or `attention product`.
    iterations: number of copies that a scan or vmap stacks; 1 without.
    macs: multiply-accumulates of all iterations and calls.
    weights: number of weights of all iterations.
    formats: names of the formats that the layer may have, on the side with the
      larger menu; empty if it stays unquantized.
    reason: why the layer stays unquantized; empty if it has formats.
  """

  path: str
  kind: str
  iterations: int
  macs: int
  weights: int
  formats: tuple[str, ...]
  reason: str


@dataclasses.dataclass(frozen=True)
class Missed:
  """A parameter of rank two or more that no quantized op reads.

  Attributes:
    path: path of the parameter.
    shape: shape of the parameter.
    reason: why no quantized op reads it.
  """

  path: str
  shape: tuple[int, ...]
  reason: str


@dataclasses.dataclass(frozen=True)
class Coverage:
  """Coverage of a model; `str` makes a table of it.

  Attributes:
    layers: the layers in the order of their calls.
    missed: parameters of rank two or more that no quantized op reads.
    products: paths of the attention layers whose products stay unquantized.
    params: number of all parameters.
  """

  layers: tuple[Layer, ...]
  missed: tuple[Missed, ...]
  products: tuple[str, ...]
  params: int

  @property
  def share(self) -> float:
    """Share of the parameters that have formats to choose from, 0 to 1."""
    searched = sum(layer.weights for layer in self.layers if layer.formats)
    return searched / max(self.params, 1)

  def __str__(self) -> str:
    rows = [('layer', 'kind', 'iterations', 'MACs', 'weights', 'formats')]
    rows += [
      (
        layer.path or '(the model)',
        layer.kind,
        str(layer.iterations),
        f'{layer.macs:,}',
        f'{layer.weights:,}',
        ' '.join(layer.formats) or f'none: {layer.reason}',
      )
      for layer in self.layers
    ]
    lines = _table(rows)
    lines.append(
      f'{self.share:.1%} of {self.params:,} parameters are searched.'
    )
    if self.missed:
      lines += ['', 'Parameters of rank two or more that stay unquantized:']
      lines += _table(
        [(m.path, 'x'.join(map(str, m.shape)), m.reason) for m in self.missed]
      )
    if self.products:
      lines += ['', 'Products of attention that stay unquantized:']
      lines += [
        f'{path or "(the model)"}  attention=True quantizes them'
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
  """Reports which layers and parameters of a model are searched, and why not.

  The model is traced, so no parameter is allocated.

  Args:
    model: a model that `searchable` made.
    *args: positional arguments of the model's call, arrays or
      `jax.ShapeDtypeStruct`.
    **kwargs: keyword arguments of the call, static.

  Returns:
    The coverage; `print` shows it as a table of layers and of parameters.

  Raises:
    ValueError: `find_decisions` refuses the model or the call.
  """
  space = discovery.find(model, *args, **kwargs)
  variables, classes = _traced(model.model, *args, **kwargs)
  layers = _layers(model, space, classes)
  params = traverse_util.flatten_dict(
    nn.meta.unbox(variables.get('params', {})), sep='/'
  )
  read = {
    f'{layer.path}/{name}'.lstrip('/')
    for layer in layers
    for name in (*layer_calls.WEIGHTS, 'bias')
  }
  missed = tuple(
    Missed(path, tuple(p.shape), _reason(path, classes))
    for path, p in params.items()
    if len(p.shape) > 1 and path not in read
  )
  products = tuple(
    path
    for path, module_class in classes.items()
    if issubclass(module_class, nn.MultiHeadDotProductAttention)
    and not model.attention
  )
  return Coverage(layers, missed, products, space.params)


def _traced(module: nn.Module, *args, **kwargs):
  """Returns the shapes of a module's variables, and {path: submodule class}."""
  classes: dict[str, type[nn.Module]] = {}

  def note(call, call_args, call_kwargs, context):
    # A transformed class is called several times, nested; the innermost class
    # is the original one, and the transform's own call is a lambda.
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
    # nn.jit has traced only the first of several equal modules.
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
    iterations = {op.path: op for op in same}
    if shape.kind == 'attend':
      kind = 'attention product'
    else:
      kind = classes[path].__name__
    layers.append(
      Layer(
        path=path,
        kind=kind,
        iterations=len(iterations),
        macs=sum(op.shape.macs for op in same),
        weights=sum(op.shape.weights for op in iterations.values()),
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
    return 'its module is never called'
  names = known[0].__name__
  if known[0].__module__.startswith('flax.') and len(known) > 1:
    # It may hold parameters for another module: DenseParams does for an LSTM.
    names += f' of {known[1].__name__}'
  if issubclass(known[0], nn.Embed):
    return 'embed=True quantizes nn.Embed'
  if issubclass(known[0], _NORMS):
    return f'stacked {name} of {known[0].__name__}: no op contracts it'
  if any(c.__name__ == 'ToLinen' for k in known for c in k.__mro__):
    return 'its module is an NNX module, whose layers linen does not see'
  if issubclass(known[0], tuple(layer_calls.LAYERS)):
    return f"{names} does not run its linen class's __call__ in real floats"
  return f'{names} multiplies it outside of any linen layer'
