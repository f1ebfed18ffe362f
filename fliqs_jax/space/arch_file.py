"""Content of arch.json, the architecture that a run selected."""

from collections.abc import Mapping
import pathlib
from typing import Any

from fliqs_jax.runtime import files


def read(path: str | pathlib.Path) -> dict[str, Any]:
  """Returns the content of an arch.json.

  Args:
    path: path of the file.

  Raises:
    ValueError: the file cannot be read, or is no arch.json.
  """
  try:
    content = files.read_json(files.at_home(path))
    layers, _ = content['layers'], content['mode']
    for sides in layers.values():
      sides['weights'], sides['activations']
    dict(content['sizes'])
  except OSError as error:
    raise ValueError(f'{path} cannot be read: {error.strerror}') from None
  except (ValueError, KeyError, TypeError, AttributeError):
    raise ValueError(
      f'{path} is no arch.json: it must have "mode", "sizes" and "layers", '
      'each layer with "weights" and "activations"; use that of a run'
    ) from None
  return content


def assignment(content: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
  """Returns {layer: (weights, activations)}, names of formats or None.

  Args:
    content: result of `read`.
  """
  return {
    path: (sides['weights'], sides['activations'])
    for path, sides in content['layers'].items()
  }
