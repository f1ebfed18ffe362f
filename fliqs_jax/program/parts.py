"""Products of a model with the formats that a spec allows them, or why none."""

from collections.abc import Sequence
import fnmatch
from typing import NamedTuple

from fliqs_jax.program import products as products_lib
from fliqs_jax.space import quant_spec

_NONE = quant_spec.Choices(None, None, False)


class Part(NamedTuple):
  """One product of a model, and the formats that it may use.

  Attributes:
    product: the product.
    choices: its formats.
    reason: why it has none; empty if it has some.
  """

  product: products_lib.Product
  choices: quant_spec.Choices
  reason: str

  @property
  def leaves(self) -> dict[str, quant_spec.Menu]:
    """{name of a leaf of `arch`: its menu}."""
    choices = self.choices
    if choices.tied and choices.weights is not None:
      return {'format': choices.weights}
    menus = {'weights': choices.weights, 'activations': choices.activations}
    return {side: menu for side, menu in menus.items() if menu is not None}


def allowed(
  products: Sequence[products_lib.Product],
  spec: quant_spec.QuantSpec,
  *,
  embed: bool,
  attention: bool,
) -> tuple[Part, ...]:
  """Returns the products with their formats.

  Args:
    products: all products of a program.
    spec: the rules.
    embed: whether tables that are looked up are quantized.
    attention: whether products of two activations are quantized.

  Raises:
    ValueError: a rule names a product that cannot be quantized.
  """
  looked_up = {p.layer for p in products if p.kind == 'embed'} if embed else ()

  def part(product: products_lib.Product) -> Part:
    if product.reason:
      if rule := _asking(spec, product.layer):
        raise ValueError(
          f'{rule} asks for formats of {product.layer}, which cannot be '
          f'quantized: {product.reason}; remove the rule, and the product '
          'stays at 16 bits'
        )
      return Part(product, _NONE, product.reason)
    if product.kind == 'embed' and not embed:
      reason = 'embed=True quantizes tables of which rows are looked up'
      return Part(product, _NONE, reason)
    if product.side is None and not attention:
      reason = 'attention=True quantizes products of two activations'
      return Part(product, _NONE, reason)
    choices = spec.choices(product.layer)
    if product.side is None:
      choices = _of_two_activations(spec.mode, choices)
    elif product.layer in looked_up:
      # The table has one format, whatever its rows are multiplied by.
      inputs = None if product.kind == 'embed' else choices.activations
      choices = quant_spec.Choices(choices.weights, inputs, False)
    if choices.weights is None and choices.activations is None:
      return Part(product, _NONE, _why_not(spec, product.layer))
    return Part(product, choices, '')

  return tuple(map(part, products))


def _of_two_activations(
  mode: str, choices: quant_spec.Choices
) -> quant_spec.Choices:
  """Returns the formats of a product whose operands are both activations."""
  if mode == 'weights':
    return quant_spec.Choices(None, None, False)
  if mode == 'activations':
    menu = choices.activations
    return quant_spec.Choices(menu, menu, menu is not None)
  return choices


def _asking(spec: quant_spec.QuantSpec, path: str) -> str:
  """Returns the rule that names a path, not by a glob, to give it formats."""
  if any(pattern == path for pattern, _ in spec.menus):
    return f'quant.menus[{path}]'
  for group, pattern in spec.groups:
    if pattern == path:
      return f'quant.groups[{group}]'
  if any(dict(spec.assignment or ()).get(path, ())):
    return 'quant.arch'
  return ''


def _why_not(spec: quant_spec.QuantSpec, path: str) -> str:
  for pattern in spec.exclude:
    if fnmatch.fnmatchcase(path, pattern):
      return f'quant.exclude {pattern!r}'
  if spec.assignment is not None:
    return 'the assignment leaves it unquantized'
  return f'quant.mode={spec.mode!r}'
