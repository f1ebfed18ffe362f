"""Descriptions of a state: name, type, shape and digest of each leaf."""

from collections.abc import Collection, Mapping
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp


def named_leaves(tree: Any) -> dict[str, Any]:
  """Returns the leaves by path, `params/Dense_0/kernel`, in tree order.

  Raises:
    ValueError: two leaves have the same path, because of a slash in a key.
  """
  leaves = jax.tree.leaves_with_path(tree)
  named = {
    jax.tree_util.keystr(path, simple=True, separator='/'): leaf
    for path, leaf in leaves
  }
  if len(named) < len(leaves):
    raise ValueError(
      'two leaves of the state have the same path; is there a "/" in a key?'
    )
  return named


def is_key(leaf: Any) -> bool:
  """Returns whether an array, concrete or abstract, holds typed PRNG keys."""
  return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def plain(leaf: jax.Array) -> jax.Array:
  """Returns the data of typed PRNG keys, and any other array as it is."""
  return jax.random.key_data(leaf) if is_key(leaf) else leaf


def describe(leaf: Any) -> str:
  """Returns type and shape: `float32 [3, 4]`, or `key<fry> []`."""
  return f'{leaf.dtype} {list(leaf.shape)}'


def mismatch(
  stored: Mapping[str, str], wanted: Mapping[str, str]
) -> str | None:
  """Returns the first difference between two trees in one line, or None.

  Args:
    stored: description of each stored leaf, by name.
    wanted: description of each leaf of this run, by name.
  """
  if lacking := sorted(wanted.keys() - stored.keys()):
    return f'{some(lacking)} not in it'
  if foreign := sorted(stored.keys() - wanted.keys()):
    return f'{some(foreign)} in it, but not in this run'
  for name, description in wanted.items():
    if stored[name] != description:
      return (
        f'leaf {name} is {stored[name]} in it, but {description} in this run'
      )
  return None


def some(names: Collection[str]) -> str:
  """Returns the subject of a sentence: the first name and a count."""
  first = next(iter(names))
  if len(names) == 1:
    return f'leaf {first} is'
  return f'leaf {first} and {len(names) - 1} more are'


def digests(leaves: Mapping[str, jax.Array]) -> dict[str, int]:
  """Returns the `digest` of every leaf; only digests leave the device."""
  values = jax.device_get({name: digest(x) for name, x in leaves.items()})
  return {name: int(value) for name, value in values.items()}


# It is compiled once per shape, not once per state: a deep network repeats its
# shapes, and one program for 500 leaves took 2.5 times as long to compile.
@jax.jit
def digest(leaf: jax.Array) -> jax.Array:
  """Returns the sum, modulo 2**32, of words hashed with their positions.

  Invariants:
    * It depends on the bits of `leaf` and their order, but not on its shape,
      its sharding or the number of devices: the order of a sum modulo 2**32
      does not matter.
    * One changed element of up to 32 bits always changes it, because the hash
      of a word is a bijection. Other changes are missed once in 2**32.

  Args:
    leaf: [...] array of any dtype, or of typed PRNG keys.

  Returns:
    [] uint32.
  """
  data = plain(leaf)
  if data.dtype == jnp.bool_:
    data = data.astype(jnp.uint8)
  if jnp.issubdtype(data.dtype, jnp.complexfloating):
    data = jnp.stack([data.real, data.imag], axis=-1)
  info = jnp.finfo if jnp.issubdtype(data.dtype, jnp.floating) else jnp.iinfo
  bits = min(info(data.dtype).bits, 32)  # 64 bits become two words.
  words = lax.bitcast_convert_type(data, f'uint{bits}').astype(jnp.uint32)
  # `reshape(-1)` would gather a sharded leaf on every device.
  position, stride = jnp.zeros_like(words), 1
  for axis in reversed(range(words.ndim)):
    index = lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    position += index * jnp.uint32(stride % 2**32)
    stride *= words.shape[axis]
  return jnp.sum(_hash(words ^ _hash(position)), dtype=jnp.uint32)


def _hash(x: jax.Array) -> jax.Array:
  # The hash `lowbias32` of C. Wellons: a bijection of uint32 that mixes well.
  x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
  x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
  return x ^ (x >> 16)
