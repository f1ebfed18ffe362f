"""Served program of a model: it needs no module, and no code of this package.

The model is traced once more with stored weights in the place of what its
products multiplied; what only made those weights is left out. Two functions
remain: `unpack(tensors) -> operands`, which a server runs once, and
`run(operands, *inputs) -> outputs`.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fliqs_jax.program import equations
from fliqs_jax.program import products as products_lib
from fliqs_jax.program import rewrite
from fliqs_jax.program import searchable as searchable_lib
from fliqs_jax.serving import served_products
from fliqs_jax.serving import stored_products


@dataclasses.dataclass(frozen=True)
class ProgramModel:
  """A model at one architecture, with stored products.

  Attributes:
    model: the searched model.
    variables: its own collections.
    call: keyword arguments of its call, static.
    stored: its stored products.
    inputs: example inputs: positional arguments, and random keys or None.
    used: paths of the variables that the served program reads as they are.
  """

  model: searchable_lib.Searchable
  variables: Mapping[str, Any]
  call: Mapping[str, Any]
  stored: stored_products.Stored
  inputs: tuple[tuple[Any, ...], Any]
  used: tuple[str, ...]

  @property
  def tensors(self) -> dict[str, np.ndarray]:
    """{name: tensor} of all that is stored."""
    kept = {
      f'variables/{name}': np.asarray(raw(leaf))
      for name, leaf in products_lib.named(self.variables).items()
      if name in self.used
    }
    return self.stored.tensors | kept

  def unpack(self, tensors: Mapping[str, Any], unsigned: bool) -> Any:
    """Returns the operands of `run` from stored tensors.

    Args:
      tensors: {name: tensor}, traced or not.
      unsigned: whether products run in the unsigned form of `int8_ops`.
    """
    variables = {name: tensors[f'variables/{name}'] for name in self.used}
    return self.stored.unpacked(tensors, unsigned), variables

  def run(
    self,
    operands: Any,
    *inputs: Any,
    kind: type[served_products.Served] = served_products.Served,
  ) -> list[Any]:
    """Returns the leaves of the model's outputs.

    Args:
      operands: the result of `unpack`.
      *inputs: the leaves of the model's inputs; of keys, their uint32 data.
      kind: the class of the rule of products.
    """
    given, kept = operands
    leaves, treedef = jax.tree.flatten(self.variables)
    # Variables that nothing reads have no influence, whatever they are.
    variables = [
      typed(kept[name], leaf) if name in kept else jnp.zeros_like(leaf)
      for name, leaf in zip(products_lib.named(self.variables), leaves)
    ]
    examples, structure = jax.tree.flatten(self.inputs)
    args, rngs = structure.unflatten(map(typed, inputs, examples))
    return _served(
      self.model,
      self.stored.rule(kind),
      given,
      treedef.unflatten(variables),
      args,
      rngs,
      self.call,
    )


def make(
  model: searchable_lib.Searchable,
  variables: Mapping[str, Any],
  call: Mapping[str, Any],
  stored: stored_products.Stored,
  args: tuple[Any, ...],
  rngs: Any,
) -> ProgramModel:
  """Returns the served program of a model.

  Args:
    model: the searched model.
    variables: its own collections.
    call: keyword arguments of its call, static.
    stored: its stored products at one architecture.
    args: example inputs.
    rngs: {name: key} of a model that draws random numbers, or None.
  """
  given = jax.eval_shape(
    lambda tensors: stored.unpacked(tensors, unsigned=False), stored.tensors
  )

  def run(variables: Any, given: Any) -> list[Any]:
    return _served(model, stored.rule(), given, variables, args, rngs, call)

  needed = equations.needed(jax.make_jaxpr(run)(variables, given))
  used = tuple(
    name for name, read in zip(products_lib.named(variables), needed) if read
  )
  return ProgramModel(model, variables, call, stored, (args, rngs), used)


def _served(
  model: searchable_lib.Searchable,
  rule: served_products.Served,
  given: Mapping[str, Any],
  variables: Mapping[str, Any],
  args: tuple[Any, ...],
  rngs: Any,
  call: Mapping[str, Any],
) -> list[Any]:
  """Returns the leaves of the outputs of the served program."""
  traced = model.trace(variables, args, call, rngs, [])
  replaced = [part.product for part in model.replaced(traced.parts)]
  rewriter = rewrite.Rewriter(replaced, rule, shared=rule.shared)
  return rewriter(traced.program, traced.operands, given, {})[0]


def raw(leaf: Any) -> Any:
  """Returns an array as it is stored: of typed keys, their uint32 data."""
  return jax.random.key_data(leaf) if is_key(leaf) else leaf


def typed(data: Any, leaf: Any) -> Any:
  """Returns stored data as an array of the type of `leaf`."""
  if not is_key(leaf):
    return data
  return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))


def is_key(leaf: Any) -> bool:
  """Returns whether an array is one of typed PRNG keys."""
  return hasattr(leaf, 'dtype') and jnp.issubdtype(
    leaf.dtype, jax.dtypes.prng_key
  )
