"""Parameters of a trained network, from which a run starts (`--init_from`).

A checkpoint is the workdir of a finished run, a safetensors file, a directory
that Orbax wrote, or a model.json of TensorFlow.js (`rdn.published`). It holds
`params` and perhaps other collections of the network, such as `batch_stats`, or
the parameters themselves. Names of a safetensors file are paths, joined by
slashes or dots.
"""

import dataclasses
from typing import Any

from flax import traverse_util
import jax

from fliqs_jax.models import rdn
from fliqs_jax.run import evaluation
from fliqs_jax.runtime import array_files
from fliqs_jax.runtime import files
from fliqs_jax.runtime import workdir as workdir_lib
from fliqs_jax.search import train_state
from fliqs_jax.serving import export_files


def load(path: str) -> dict[str, Any]:
  """Returns {collection: tree} of a checkpoint, `params` among them.

  Args:
    path: path of the checkpoint.

  Raises:
    ValueError: it is none of the four kinds, or cannot be read.
  """
  place = files.at_home(path)
  if not place.exists():
    raise ValueError(
      f'--init_from={path} does not exist; name the workdir of a finished run, '
      'a .safetensors file, a directory that Orbax wrote or a model.json'
    )
  if (place / workdir_lib.CONFIG).exists():
    state = evaluation.restore(str(place)).state
    others = {k: v for k, v in state.model_state.items() if k != 'quant_stats'}
    return dict(params=state.served_params, **others)
  if place.suffix == '.json':
    tree: Any = rdn.published(place)
  elif place.is_file():
    flat = export_files.safetensors_of(place)
    tree = traverse_util.unflatten_dict(
      {tuple(name.replace('.', '/').split('/')): x for name, x in flat.items()}
    )
  else:
    tree = array_files.read_tree(place)
  return dict(tree) if 'params' in tree else dict(params=tree)


def started(state: train_state.TrainState, path: str) -> train_state.TrainState:
  """Returns the state before the first step, with the network of a checkpoint.

  Args:
    state: the state with new parameters, on the devices.
    path: path of the checkpoint.

  Raises:
    ValueError: `load` refuses the path, or the network is another one: the
      message names parameters that are missing, surplus or of another shape.
  """
  given = load(path)
  own = {'params': state.params, **state.model_state}
  if unknown := sorted(set(given) - set(own)):
    raise ValueError(
      f'--init_from={path} has the collections {", ".join(unknown)}, which the '
      f'network lacks; it has {", ".join(own)}'
    )

  def placed(name: str) -> Any:
    if name not in given:
      return own[name]
    try:
      new = train_state.replaced(name, own[name], given[name])
    except ValueError as error:
      raise ValueError(f'--init_from={path}: {error}') from None
    return jax.tree.map(
      lambda x, old: jax.device_put(x, old.sharding), new, own[name]
    )

  collections = {name: placed(name) for name in own}
  params = collections.pop('params')
  average = train_state.first_average(params) if state.average else {}
  return dataclasses.replace(
    state, params=params, average=average, model_state=collections
  )
