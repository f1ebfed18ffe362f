"""Files of an export, written completely or not at all, read and checked.

  manifest.json          description of the layers, and of the other files
  weights.safetensors    every tensor of the served model
  reference.safetensors  example inputs, and the outputs of the search's
                         evaluation for them
  *.stablehlo, *.onnx    the served model as programs (`portable`)
  qwix.json              the assignment as Qwix rules (`qwix_rules`)

Invariants:
  * A directory with a manifest.json is complete: all files are written to a
    directory beside it, which is renamed at the end.
  * A checksum covers every byte of every file, also of the manifest.
"""

from collections.abc import Iterator, Mapping
import contextlib
import hashlib
import json
import math
import os
import pathlib
import shutil
from typing import Any, NamedTuple

import numpy as np
import safetensors
import safetensors.numpy

from fliqs_jax.numerics import entropy_coding
from fliqs_jax.numerics import formats
from fliqs_jax.numerics import packing
from fliqs_jax.runtime import files
from fliqs_jax.serving import stored_layers

SCHEMA = 3
MANIFEST = 'manifest.json'
WEIGHTS = 'weights.safetensors'
REFERENCE = 'reference.safetensors'

# The types of safetensors, and numpy's names of them.
_DTYPES = {
  'BOOL': 'bool',
  'F64': 'float64',
  'F32': 'float32',
  'F16': 'float16',
  'BF16': 'bfloat16',
  'I64': 'int64',
  'I32': 'int32',
  'I16': 'int16',
  'I8': 'int8',
  'U64': 'uint64',
  'U32': 'uint32',
  'U16': 'uint16',
  'U8': 'uint8',
}


class Content(NamedTuple):
  """Content of an export.

  Attributes:
    manifest: content of manifest.json.
    layers: {layer path: description of the stored layer}.
    tensors: {name: tensor} of the served model.
  """

  manifest: dict[str, Any]
  layers: dict[str, stored_layers.Layer]
  tensors: dict[str, np.ndarray]


def check_free(directory: str | os.PathLike[str]) -> pathlib.Path:
  """Returns the path of a directory that may be written.

  Raises:
    ValueError: the directory is not empty, or cannot be used.
  """
  path = pathlib.Path(directory)
  try:
    if path.exists() and any(path.iterdir()):
      raise ValueError(
        f'--out={directory} is not empty; choose an empty directory, or one '
        'that does not exist yet'
      )
    path.parent.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise ValueError(
      f'--out={directory} cannot be used: {error.strerror}'
    ) from None
  return path


def write(
  directory: str | os.PathLike[str],
  manifest: Mapping[str, Any],
  layers: Mapping[str, stored_layers.Layer],
  tensors: Mapping[str, np.ndarray],
  others: Mapping[str, bytes],
) -> dict[str, Any]:
  """Writes an export completely or not at all.

  Args:
    directory: path of a directory that is empty or does not exist.
    manifest: the caller's entries of the manifest; `layers`, `tensors`,
      `files`, `bytes` and `checksum` are added.
    layers: {layer path: description of the stored layer}.
    tensors: {name: tensor} of the served model.
    others: {name: content} of further files.

  Returns:
    The manifest as written.

  Raises:
    ValueError: the directory is not free, or cannot be written.
  """
  path = check_free(directory)
  contents = {WEIGHTS: packed_file(tensors), **others}
  floats = 4 * sum(np.size(x) for x in tensors.values())
  stored = compressed = sum(x.nbytes for x in tensors.values())
  for name, layer in stored_layers.packed(layers).items():
    floats += 4 * (int(np.prod(layer.shape)) - np.size(tensors[name]))
    values = packing.decode(tensors[name], layer.weights, layer.shape)
    coded = math.ceil(entropy_coding.measured(np.asarray(values)) / 8)
    compressed += coded - tensors[name].nbytes
  scales = [x.nbytes for n, x in tensors.items() if n.startswith('scales/')]
  manifest = dict(
    schema=SCHEMA,
    **manifest,
    bytes=dict(
      float32=floats - sum(scales),
      stored=stored,
      compressed=compressed,
      weights_file=len(contents[WEIGHTS]),
    ),
    layers={
      path: _described(path, layer, tensors) for path, layer in layers.items()
    },
    tensors={name: _fingerprint(x) for name, x in sorted(tensors.items())},
    files={
      name: dict(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
      for name, data in contents.items()
    },
  )
  manifest['checksum'] = checksum(manifest)
  # Another name than the export's, so that an interrupted write leaves no
  # export; always the same name, so that the next write replaces it.
  partial = path.with_name(f'.{path.name}.partial')
  try:
    if partial.exists():
      shutil.rmtree(partial)
    partial.mkdir()
    for name, data in contents.items():
      files.write_bytes(partial / name, data)
    files.write_json(partial / MANIFEST, manifest)
    partial.replace(path)
    files.sync(path.parent)
  except OSError as error:
    raise ValueError(
      f'--out={directory} cannot be written: {error.strerror}'
    ) from None
  return manifest


def packed_file(tensors: Mapping[str, np.ndarray]) -> bytes:
  """Returns the content of a safetensors file.

  Raises:
    ValueError: a tensor has a dtype that a safetensors file cannot hold.
  """
  for name, x in tensors.items():
    if x.dtype.name not in _DTYPES.values():
      raise ValueError(
        f'{name} is of type {x.dtype}, which cannot be stored; allowed: '
        f'{", ".join(_DTYPES.values())}'
      )
  return safetensors.numpy.save(
    # safetensors saves the memory as it is, also of a transposed array.
    {name: np.array(x, order='C') for name, x in tensors.items()}
  )


def checksum(manifest: Mapping[str, Any]) -> str:
  """Returns the sha256 of a manifest's content, without its `checksum`."""
  content = {k: v for k, v in manifest.items() if k != 'checksum'}
  text = json.dumps(content, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()


def read_manifest(directory: str | os.PathLike[str]) -> dict[str, Any]:
  """Returns the manifest, after checking its checksum.

  Raises:
    ValueError: it is missing, damaged, edited or of another schema.
  """
  path = pathlib.Path(directory) / MANIFEST
  try:
    manifest = json.loads(path.read_bytes().decode())
  except OSError as error:
    raise ValueError(
      f'{directory} is no export: {path} cannot be read ({error.strerror}); '
      'name a directory that `export` wrote'
    ) from None
  except (ValueError, RecursionError) as error:
    raise ValueError(f'{path} is damaged: {error}; export again') from None
  if not isinstance(manifest, dict) or manifest.get('schema') != SCHEMA:
    raise ValueError(
      f'{path} is damaged, or not of schema {SCHEMA}; export again'
    )
  if manifest.get('checksum') != checksum(manifest):
    raise ValueError(
      f'{path} was edited or damaged: its checksum differs; export again'
    )
  return manifest


@contextlib.contextmanager
def refused(directory: str | os.PathLike[str]) -> Iterator[None]:
  """Refuses a manifest that lacks what is asked of it in the block.

  Its checksum is no signature: whoever edits it can write another.

  Raises:
    ValueError: a lookup in the manifest failed, or what was found there is
      something else.
  """
  try:
    yield
  except (
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    StopIteration,
    TypeError,
  ) as error:
    raise ValueError(
      f'{pathlib.Path(directory) / MANIFEST} lacks something, or has something '
      f'else in its place ({type(error).__name__}: {error}); export again'
    ) from error


def read(directory: str | os.PathLike[str]) -> Content:
  """Returns the content of an export; checks everything but the outputs.

  Raises:
    ValueError: a file, tensor or layer is missing, is damaged or differs from
      the manifest; the message names it.
  """
  manifest = read_manifest(directory)
  with refused(directory):
    for name in manifest['files']:
      read_file(directory, manifest, name)
    tensors = read_tensors(directory, manifest, WEIGHTS)
    layers = {
      path: stored_layers.Layer(
        *(entry[side] and formats.parse(entry[side]) for side in _SIDES),
        tuple(entry['shape']),
        entry['largest_sum'],
        entry['tensor'],
      )
      for path, entry in manifest['layers'].items()
    }
    _check_tensors(directory, manifest, tensors)
    _check_layers(directory, manifest, layers, tensors)
    return Content(manifest, layers, tensors)


_SIDES = ('weights', 'activations')


def read_file(
  directory: str | os.PathLike[str], manifest: Mapping[str, Any], name: str
) -> bytes:
  """Returns a file's bytes, after checking their number and checksum.

  Raises:
    ValueError: the file is missing, truncated or damaged.
  """
  path = pathlib.Path(directory) / name
  if path.name != name:
    raise ValueError(f'{directory}: {name!r} is no name of a file of an export')
  if name not in manifest['files']:
    raise ValueError(f'{directory} was exported without {name}; export again')
  expected = manifest['files'][name]
  try:
    data = path.read_bytes()
  except OSError as error:
    raise ValueError(
      f'{path} cannot be read: {error.strerror}; export again'
    ) from None
  if len(data) != expected['bytes']:
    raise ValueError(
      f'{path} has {len(data)} bytes instead of {expected["bytes"]}: it was '
      'truncated or edited; export again'
    )
  if hashlib.sha256(data).hexdigest() != expected['sha256']:
    raise ValueError(f'{path} is damaged: its checksum differs; export again')
  return data


def read_tensors(
  directory: str | os.PathLike[str], manifest: Mapping[str, Any], name: str
) -> dict[str, np.ndarray]:
  """Returns the tensors of a safetensors file that `read_file` checks.

  Raises:
    ValueError: the file is missing, damaged or no safetensors file.
  """
  try:
    return _tensors(read_file(directory, manifest, name))
  except (safetensors.SafetensorError, KeyError, TypeError) as error:
    path = pathlib.Path(directory) / name
    raise ValueError(
      f'{path} is no safetensors file: {error}; export again'
    ) from None


def safetensors_of(path: pathlib.Path) -> dict[str, np.ndarray]:
  """Returns {name: tensor} of a safetensors file, of any program.

  Raises:
    ValueError: it is no safetensors file, or has a type that NumPy lacks.
  """
  try:
    return _tensors(path.read_bytes())
  except (OSError, safetensors.SafetensorError, KeyError) as error:
    raise ValueError(
      f'{path} cannot be read as a safetensors file: {error}'
    ) from None


def _tensors(data: bytes) -> dict[str, np.ndarray]:
  return {
    key: np.frombuffer(bytes(x['data']), np.dtype(_DTYPES[x['dtype']])).reshape(
      x['shape']
    )
    for key, x in safetensors.deserialize(data)
  }


def _described(path, layer, tensors) -> dict[str, Any]:
  """Returns a layer's entry in the manifest."""
  entry = dict(
    weights=layer.weights and layer.weights.name,
    activations=layer.activations and layer.activations.name,
    shape=list(layer.shape),
    arithmetic=layer.arithmetic,
    largest_sum=layer.largest_sum,
    exact=layer.exact,
    tensor=layer.tensor,
  )
  for name, quantized in stored_layers.packed({path: layer}).items():
    how = packing.layout(quantized.weights)
    entry |= dict(
      dtype=how.dtype,
      bits=quantized.weights.bits,
      native=how.native,
      factor=how.factor,
      bytes=tensors[name].nbytes,
    )
  return entry


def _fingerprint(x: np.ndarray) -> dict[str, Any]:
  return dict(
    dtype=x.dtype.name,
    shape=list(x.shape),
    bytes=x.nbytes,
    sha256=hashlib.sha256(x.tobytes()).hexdigest(),
  )


def _check_tensors(directory, manifest, tensors) -> None:
  expected = manifest['tensors']
  if missing := sorted(set(expected) ^ set(tensors)):
    raise ValueError(
      f'{directory}: {WEIGHTS} and {MANIFEST} do not name the same tensors: '
      f'{", ".join(missing)}'
    )
  for name, entry in expected.items():
    if (stored := _fingerprint(tensors[name])) != entry:
      raise ValueError(
        f'{directory}: the tensor {name} is {stored}, but the manifest has '
        f'{entry}'
      )


def _check_layers(directory, manifest, layers, tensors) -> None:
  """Checks each layer's stored type and size against its format."""
  for path, layer in layers.items():
    if manifest['layers'][path] != _described(path, layer, tensors):
      raise ValueError(
        f"{directory}: the manifest's entry for the layer {path} contradicts "
        'its formats or its tensors'
      )
  for name, layer in stored_layers.packed(layers).items():
    how = packing.layout(layer.weights)
    expected = (how.dtype, packing.stored_shape(layer.weights, layer.shape))
    stored = (tensors[name].dtype.name, tensors[name].shape)
    if stored != expected:
      raise ValueError(
        f'{directory}: {name} is stored as {stored}, but {layer.weights} '
        f'weights of shape {layer.shape} are stored as {expected}'
      )
