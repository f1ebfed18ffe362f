"""Coverage report: which products are searched, which are not, and why."""

import dataclasses
from typing import Any

from fliqs_jax.program import parts as parts_lib
from fliqs_jax.program import products as products_lib
from fliqs_jax.program import searchable as searchable_lib
from fliqs_jax.space import discovery


@dataclasses.dataclass(frozen=True)
class Layer:
  """One product of a model, or one look-up of rows of a table.

  Attributes:
    path: path of the product; the patterns of a spec match that of its layer,
      which is the same without `#2`.
    kind: `conv`, `pointwise`, `depthwise`, `dense`, `attend` (of two
      activations) or `embed` (a look-up).
    iterations: number of copies that scans and batch axes stack; 1 without.
    macs: multiply-accumulates of all iterations and calls.
    weights: number of weights of all iterations.
    formats: names of the formats that the product may have, on the side with
      the larger menu; empty if it stays unquantized.
    reason: why it stays unquantized, at 16 bits in costs; empty if it has
      formats.
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
  """A parameter of rank two or more that no quantized product reads.

  Attributes:
    path: path of the parameter.
    shape: shape of the parameter.
    reason: why no quantized product reads it.
  """

  path: str
  shape: tuple[int, ...]
  reason: str


@dataclasses.dataclass(frozen=True)
class Coverage:
  """Coverage of a model; `str` makes a table of it.

  Attributes:
    layers: all products in the order of the program.
    missed: parameters of rank two or more that no quantized product reads.
    params: number of all parameters.
  """

  layers: tuple[Layer, ...]
  missed: tuple[Missed, ...]
  params: int

  @property
  def share(self) -> float:
    """Share of the multiply-accumulates that have formats, 0 to 1."""
    searched = sum(layer.macs for layer in self.layers if layer.formats)
    return searched / max(sum(layer.macs for layer in self.layers), 1)

  def __str__(self) -> str:
    rows = [('product', 'kind', 'iterations', 'MACs', 'weights', 'formats')]
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
    macs = sum(layer.macs for layer in self.layers)
    lines = _table(rows)
    lines.append(
      f'{self.share:.1%} of {macs:,} multiply-accumulates are searched; the '
      'others cost 16 bits.'
    )
    if self.missed:
      lines += ['', 'Parameters of rank two or more that stay unquantized:']
      lines += _table(
        [(m.path, 'x'.join(map(str, m.shape)), m.reason) for m in self.missed]
      )
    return '\n'.join(lines)


def _table(rows: list[tuple[str, ...]]) -> list[str]:
  widths = [max(map(len, column)) for column in zip(*rows)]
  return [
    '  '.join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()
    for row in rows
  ]


def coverage(
  model: searchable_lib.Searchable, *args: Any, **kwargs: Any
) -> Coverage:
  """Reports which products and parameters are searched, and why others are not.

  The model is traced, so no parameter is allocated.

  Args:
    model: a model that `searchable` made.
    *args: positional arguments of the model's call, arrays or
      `jax.ShapeDtypeStruct`.
    **kwargs: keyword arguments of the call, static.

  Returns:
    The coverage; `print` shows it as a table of products and of parameters.

  Raises:
    ValueError: the model was not made by `searchable`, or `find_decisions`
      refuses it or the call.
  """
  searchable_lib.check_made(model)
  space = discovery.find(model, *args, **kwargs)
  variables, parts = model.parts_of(*args, **kwargs)
  layers = tuple(_layer(part) for part in parts)
  read = {
    leaf: part.reason
    for part in reversed(parts)
    for leaf in part.product.leaves
  }
  read |= dict.fromkeys(
    (leaf for part in parts if not part.reason for leaf in part.product.leaves),
    '',
  )
  missed = [
    Missed(path, tuple(leaf.shape), reason)
    for path, leaf in products_lib.named(variables.get('params', {})).items()
    if len(leaf.shape) > 1
    and (reason := read.get(f'params/{path}', _UNREAD)) != ''
  ]
  return Coverage(layers, tuple(missed), space.params)


_UNREAD = 'no product multiplies an input by it'


def _layer(part: parts_lib.Part) -> Layer:
  product, choices, reason = part
  menus = [m for m in (choices.weights, choices.activations) if m is not None]
  formats = max(menus, key=len) if menus else ()
  iterations = len(product.iterations())
  return Layer(
    path=product.path,
    kind=product.kind,
    iterations=iterations,
    macs=product.all_macs,
    weights=product.weights * iterations,
    formats=tuple(str(f) for f in formats),
    reason=reason,
  )
