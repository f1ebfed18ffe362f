"""Products of a model with the formats that a spec allows them, or why none."""

from collections.abc import Mapping, Sequence
import fnmatch
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fliqs_jax.numerics import one_hot as one_hot_lib
from fliqs_jax.program import products as products_lib
from fliqs_jax.space import ops as ops_lib
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

  def ops(self, shared: bool) -> list[ops_lib.Op]:
    """Returns what each iteration and slice costs.

    Args:
      shared: whether iterations and slices share their decisions.
    """
    product, choices = self.product, self.choices
    shape = ops_lib.OpShape(
      kind=product.kind,
      macs=product.macs * product.calls,
      weights=product.weights,
      channels=product.channels,
      inputs=product.inputs * product.calls,
      outputs=product.outputs * product.calls,
      weight_menu=choices.weights,
      act_menu=choices.activations,
      tied=choices.tied,
      window=product.window,
      strides=product.strides,
    )
    is_stacked = bool(product.stack)
    layer = product.layer if is_stacked else ''
    return [
      ops_lib.Op(path, shape, layer, is_stacked and shared)
      for path in product.iterations()
    ]

  def one_hots(
    self, arch: Mapping[str, Any], is_relaxed: bool
  ) -> dict[str, jax.Array]:
    """Returns {leaf: one-hot vectors [*stack, K]} of iterations and slices.

    Args:
      arch: {path in `arch`: one-hot vector [K]}.
      is_relaxed: whether vectors may be means of several formats.

    Raises:
      ValueError: one is lacking, or is no such vector.
    """
    return {
      leaf: self._one_hots(leaf, len(menu), arch, is_relaxed and len(menu) > 1)
      for leaf, menu in self.leaves.items()
    }

  def _one_hots(
    self, leaf: str, options: int, arch: Mapping[str, Any], is_mean: bool
  ) -> jax.Array:
    rows = []
    for path in self.product.iterations():
      name = products_lib.join(path, leaf)
      if name not in arch:
        raise ValueError(
          f'the variables lack arch/{name}: pass '
          'arch=space.expand(choices), where space is what find_decisions '
          'returned for this model'
        )
      one_hot_lib.check(name, arch[name], options, is_mean)
      rows.append(jnp.asarray(arch[name]))
    if not self.product.stack:
      return rows[0]
    return jnp.stack(rows).reshape((*self.product.stack, options))


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
