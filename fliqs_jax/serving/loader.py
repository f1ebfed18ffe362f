"""Loading of an export as programs: it needs no module.

served = serving.load(DIR)
logits = served(images)
"""

from collections.abc import Mapping, Sequence
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fliqs_jax.numerics import int8_ops
from fliqs_jax.serving import export_files
from fliqs_jax.serving import pytrees
from fliqs_jax.serving import served_program
from fliqs_jax.serving.portable import stablehlo

# On a CPU, slices of 16 take 1.0 (ResNet-20) to 1.25 (DeiT-Ti) times as long as
# those of 8, of which what lies between two operations stays in the cache.
# Slices of 4 take .8 to 1.13 times as long.
_AT_ONCE = 8


class Served:
  """A model that runs in low-bit arithmetic.

  Attributes:
    manifest: the export's manifest.
    operands: what its program reads beside the inputs, on JAX's default device;
      JAX copies them in each call to where the inputs are committed, if that is
      another one.
    at_once: number of examples that run together; None: all. Larger batches run
      in slices; then every input and output has the examples on its first axis.
      A program of one batch size needs slices of that size, of which the last
      one is filled up with its last example.
  """

  def __init__(
    self,
    content: export_files.Content,
    unpack: bytes,
    model: bytes,
    at_once: int | None = None,
  ):
    self.manifest = content.manifest
    self.at_once = at_once
    unpacked = jax.jit(stablehlo.deserialize(unpack).call)(content.tensors)
    # An exported program commits its results to a device; from the host, they
    # are free to follow the inputs.
    self.operands = jax.device_put(jax.device_get(unpacked))
    program = stablehlo.deserialize(model)
    self._expected = program.in_avals[len(unpacked) :]
    batch = content.manifest['program']['batch']
    if at_once is not None:
      _check_slices(at_once, self._expected, program.out_avals, batch)
    # Whoever asks for slices says that examples do not depend on each other.
    self._fixed = None if batch == 'any' or at_once is None else batch
    if self._fixed not in (None, at_once):
      raise ValueError(
        f'at_once={at_once}: the program takes {batch} examples at once, '
        f'because the model needs that as a number; use at_once={batch}'
      )
    self._run = jax.jit(program.call)
    self._orders: dict[Any, list[int]] = {}

  def __call__(self, *inputs: Any, rngs: Any = None) -> Any:
    """Returns the model's outputs for its inputs; compiles once per shape.

    Args:
      *inputs: arrays [N, ...] or pytrees of them, as in the model's call. Names
        count, not classes: a dict of its parts stands for a named tuple.
      rngs: {name: typed PRNG key []} if the export got such.

    Raises:
      ValueError: the inputs have another structure, type or shape than the
        example inputs, or cannot be cut into slices.
    """
    leaves, structure = jax.tree.flatten((inputs, rngs))
    leaves = [served_program.raw(x) for x in leaves]
    kind = structure, *((np.shape(x), jax.typeof(x)) for x in leaves)
    if kind not in self._orders:  # The checks take as long as a small model.
      order = self._order(inputs, rngs)
      self._check([leaves[i] for i in order])
      self._orders[kind] = order
    leaves = [leaves[i] for i in self._orders[kind]]
    step = self.at_once
    if step is None or self._is_slice(leaves[0], step):
      outputs = self._run(self.operands, *leaves)
    else:
      parts = [
        self._slice([x[i : i + step] for x in leaves])
        for i in range(0, len(leaves[0]), step)
      ]
      outputs = [jnp.concatenate(same) for same in zip(*parts)]
    return pytrees.build(self.manifest['outputs'], outputs)

  def _is_slice(self, x: Any, step: int) -> bool:
    """Returns whether the program takes an input as it is."""
    return (step if self._fixed else 1) <= len(x) <= step

  def _slice(self, leaves: list[Any]) -> list[Any]:
    """Returns the outputs for some examples, on the first axis of each leaf."""
    examples = len(leaves[0])
    missing = (self._fixed or examples) - examples
    filled = [
      jnp.concatenate([x, jnp.repeat(x[-1:], missing, axis=0)])
      if missing
      else x
      for x in leaves
    ]
    return [y[:examples] for y in self._run(self.operands, *filled)]

  def _order(self, inputs: Any, rngs: Any) -> list[int]:
    """Returns the place of each input of the program among the leaves."""
    given, expected = pytrees.describe((inputs, rngs)), self.manifest['inputs']
    if pytrees.shape(given) != pytrees.shape(expected):
      raise ValueError(
        'the inputs have another structure than those of the export: got '
        f'{pytrees.shape(given)}, expected {pytrees.shape(expected)}'
      )
    return pytrees.order(given, expected)

  def _check(self, leaves: list[Any]) -> None:
    for i, (x, expected) in enumerate(zip(leaves, self._expected)):
      # The size of the batch is a symbol, or that of the slices.
      sizes = expected.shape[1:] if self._fixed else expected.shape
      same = [
        n == expected_n or not isinstance(expected_n, int)
        for n, expected_n in zip(np.shape(x)[-len(sizes) :], sizes)
      ]
      dtype = jnp.result_type(x)
      is_like = np.ndim(x) == expected.ndim and dtype == expected.dtype
      if not (is_like and all(same)):
        raise ValueError(
          f'input {i} is {dtype}{list(np.shape(x))}, but the export takes '
          f'{expected.str_short()}{self._hint()}'
        )
      if 0 in np.shape(x) and 0 not in expected.shape:
        raise ValueError(
          f'input {i} is {dtype}{list(np.shape(x))}: it has no example'
        )
      step, split = self.at_once, jax.typeof(x).sharding.spec
      if step and not self._is_slice(x, step) and split[0] is not None:
        raise ValueError(
          f'input {i} is {jax.typeof(x).str_short()}: its examples are split '
          f'over devices, so that slices of at_once={step} cannot be cut; put '
          f'it on one device, or give {step} examples at a time'
        )

  def _hint(self) -> str:
    batch = self.manifest['program']['batch']
    if batch == 'any':
      return ''
    return (
      '; the model needs its batch size as a number, as of len(x): write '
      'x.shape[0] and export again, or, if examples do not depend on each '
      f'other, load with at_once={batch}'
    )


def _check_slices(
  at_once: int, inputs: Sequence[Any], outputs: Sequence[Any], batch: Any
) -> None:
  """Checks that slices of so many examples can be run and joined.

  Args:
    at_once: number of examples.
    inputs: their shapes; the first axis is a symbol if it is the examples'.
    outputs: those of the outputs.
    batch: number of examples that the program takes, or `any`.

  Raises:
    ValueError: the number is none, or something has no axis of examples.
  """
  if isinstance(at_once, bool) or not isinstance(at_once, int) or at_once < 1:
    raise ValueError(
      f'at_once={at_once!r} must be a whole number of at least 1, or None'
    )
  for name, avals in (('input', inputs), ('output', outputs)):
    for i, aval in enumerate(avals):
      first = aval.shape[0] if aval.shape else 0
      if isinstance(first, int) and first != batch:
        raise ValueError(
          f'at_once={at_once}: {name} {i}, {aval.str_short()}, has no axis of '
          'examples, so that slices cannot be joined; load without at_once'
        )


def load(
  directory: str | os.PathLike[str], at_once: int | None = None
) -> Served:
  """Returns the model that an export holds; its module is not needed.

  Args:
    directory: path of the export, which `export` got as `out`.
    at_once: number of examples that run together. None: 8 for the export of a
      run on a CPU, all otherwise. The results of integer layers do not depend
      on it; sums of floats may be rounded in another order. A program of one
      batch size takes any with that number.

  Raises:
    ValueError: files are missing, damaged or differ from the manifest, or
      at_once is not the program's batch size, no number of at least 1, or given
      where an input or output has no axis of examples.
  """
  content = export_files.read(directory)
  names = stablehlo.UNPACK, stablehlo.MODEL
  if int8_ops.prefers_unsigned():
    names = stablehlo.VNNI_UNPACK, stablehlo.VNNI_MODEL
  unpack, model = (
    export_files.read_file(directory, content.manifest, name) for name in names
  )
  with export_files.refused(directory):
    batch = content.manifest['program']['batch']
    # The outputs of a network have the batch's axis.
    is_network = 'task' in content.manifest
    on_cpu = jax.default_backend() == 'cpu'
    if at_once is None and is_network and (on_cpu or batch != 'any'):
      at_once = _AT_ONCE if batch == 'any' else batch
    return Served(content, unpack, model, at_once)


def reference(
  directory: str | os.PathLike[str], manifest: Mapping[str, Any]
) -> tuple[
  tuple[tuple[Any, ...], Any], list[np.ndarray], dict[str, np.ndarray]
]:
  """Returns the example inputs, their leaves, and {name: output} for them.

  The inputs are a tree (inputs, keys). The leaves are what the program takes,
  in its order: of keys, their uint32 data.

  Raises:
    ValueError: a file is missing or damaged.
  """
  arrays = export_files.read_tensors(
    directory, manifest, export_files.REFERENCE
  )
  outputs = {k: v for k, v in arrays.items() if k.startswith('outputs')}
  leaves = [arrays[f'inputs/{i}'] for i in range(len(manifest['keys']))]
  typed = [
    x if impl is None else jax.random.wrap_key_data(jnp.asarray(x), impl=impl)
    for x, impl in zip(leaves, manifest['keys'])
  ]
  return pytrees.build(manifest['inputs'], typed), leaves, outputs
