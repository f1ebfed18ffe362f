"""Networks by name: plain Flax modules that take their layers as arguments."""

from collections.abc import Mapping
import dataclasses
import numbers
import sys
from typing import Any, NamedTuple

import flax.linen as nn

from fliqs_jax.layers import quant_layers
from fliqs_jax.models import deit
from fliqs_jax.models import edsr
from fliqs_jax.models import efficientnet
from fliqs_jax.models import espcn
from fliqs_jax.models import inception_v3
from fliqs_jax.models import mlp
from fliqs_jax.models import mobilenet_v2
from fliqs_jax.models import rdn
from fliqs_jax.models import recommender
from fliqs_jax.models import resnet
from fliqs_jax.models import resnet_cifar
from fliqs_jax.space import quant_spec
from fliqs_jax.space import sizes as sizes_lib


class Network(NamedTuple):
  """A named network.

  Attributes:
    module: the class of the network.
    fixed: {field: value} of the fields that the name decides, which are no keys
      of a config.
  """

  module: type[nn.Module]
  fixed: Mapping[str, Any] = {}


MODELS: dict[str, Network] = {
  'mlp': Network(mlp.MLP),
  'resnet_cifar': Network(resnet_cifar.ResNetCifar),
  **{
    f'resnet{d}': Network(resnet.ResNet, dict(depth=d)) for d in resnet.DEPTHS
  },
  'mobilenetv2': Network(mobilenet_v2.MobileNetV2),
  'inceptionv3': Network(inception_v3.InceptionV3),
  **{
    f'efficientnet_b{i}': Network(
      efficientnet.EfficientNet, dict(variant=f'b{i}')
    )
    for i in range(5)
  },
  'deit_ti16': Network(deit.DeiT, dict(hidden=192, heads=3)),
  'deit_s16': Network(deit.DeiT, dict(hidden=384, heads=6)),
  'deit_b16': Network(deit.DeiT, dict(hidden=768, heads=12)),
  'recommender': Network(recommender.Recommender),
  'edsr': Network(edsr.EDSR),
  'espcn': Network(espcn.ESPCN),
  'rdn': Network(rdn.RDN),
}

AS_PUBLISHED = sizes_lib.Sizes()  # Nothing is open.

# Fields that `build` sets, which are no keys of a config.
_GIVEN = ('conv', 'dense', 'dtype', 'num_classes', 'sizes', 'parent', 'name')


def published(name: str) -> dict[str, Any]:
  """Returns the `model` section of a config for a network as published.

  Args:
    name: name of the network, a key of `MODELS`.

  Raises:
    ValueError: the name is unknown.
  """
  network = _network(name)
  keys = {f.name: f.default for f in dataclasses.fields(network.module)}
  decided = (*_GIVEN, *network.fixed)
  return dict(name=name) | {k: v for k, v in keys.items() if k not in decided}


def has_classes(name: str) -> bool:
  """Returns whether a network has an output for each of several classes.

  Args:
    name: name of the network, a key of `MODELS`.

  Raises:
    ValueError: the name is unknown.
  """
  return 'num_classes' in _network(name).module.__dataclass_fields__


def unquantized(name: str) -> tuple[str, ...]:
  """Returns patterns of layers that the paper leaves at 16 bits.

  Args:
    name: name of the network, a key of `MODELS`.

  Raises:
    ValueError: the name is unknown.
  """
  return getattr(_network(name).module, 'unquantized', ())


def build(
  config: Mapping[str, Any],
  num_classes: int,
  spec: quant_spec.QuantSpec,
  sizes: sizes_lib.Sizes = AS_PUBLISHED,
  dtype: Any = None,
) -> nn.Module:
  """Returns the network that a config names, with searchable layers.

  Args:
    config: the `model` section of a config; `construct` describes it.
    num_classes: number of outputs of the network.
    spec: the formats that its layers may use, by rules on their paths.
    sizes: the open sizes of the network, or the selected ones.
    dtype: as in `construct`.

  Raises:
    ValueError: `construct` refuses the config or the sizes.
  """
  return construct(
    config,
    num_classes,
    sizes=sizes,
    dtype=dtype,
    conv=quant_layers.with_spec(quant_layers.QuantConv, spec),
    dense=quant_layers.with_spec(quant_layers.QuantDense, spec),
  )


def construct(
  config: Mapping[str, Any],
  num_classes: int,
  *,
  sizes: sizes_lib.Sizes = AS_PUBLISHED,
  dtype: Any = None,
  **constructors: Any,
) -> nn.Module:
  """Returns the network that a config names, of given layers.

  Args:
    config: `name`, a key of `MODELS`, and a value for every other field of
      that network.
    num_classes: number of outputs of the network.
    sizes: the open sizes of the network, or the selected ones.
    dtype: type in which layers and norms compute, float32 or bfloat16; None:
      that of the input. Parameters and the network's result are float32.
    **constructors: constructors of layers, `conv` and `dense`; those that the
      network does not take are ignored.

  Raises:
    ValueError: the name is unknown, keys are unknown or missing, or the network
      has no sizes that can be open.
  """
  keys = dict(config)
  name = keys.pop('name', None)
  network = _network(name)
  expected = published(name)
  if sorted(config) != sorted(expected):
    raise ValueError(
      f'the keys of model {name} are {", ".join(expected)}; got '
      f'{", ".join(config)}; give exactly the former'
    )
  fields = network.module.__dataclass_fields__
  for key, value in keys.items():
    if problem := _problem(value, fields[key].type):
      raise ValueError(f'model.{key}={value!r} {problem}')
  as_trained = dataclasses.replace(sizes, is_served=False)
  if as_trained != AS_PUBLISHED and 'sizes' not in fields:
    raise ValueError(
      f'model {name} has no sizes to search; set sizes.widths and '
      'sizes.kernels to ()'
    )
  given = dict(
    num_classes=num_classes, sizes=sizes, dtype=dtype, **constructors
  )
  given = {field: value for field, value in given.items() if field in fields}
  # The fields of a linen module must be hashable; a config.json has lists.
  keys = {k: tuple(v) if isinstance(v, list) else v for k, v in keys.items()}
  return network.module(**keys, **network.fixed, **given)


def _problem(value: Any, kind: Any) -> str:
  """Returns why a field of a network cannot have a value; '' if it can."""
  is_whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
  if kind is int:
    return '' if is_whole and value > 0 else 'must be a whole number above 0'
  if kind is float:
    if is_whole or isinstance(value, float):
      is_possible = 0 <= value <= sys.float_info.max
      return '' if is_possible else 'must be finite and not negative'
    return 'must be a number'
  items = value if isinstance(value, (tuple, list)) else [None]
  wrong = any(_problem(item, int) for item in items)
  return 'must be a list of whole numbers above 0' if wrong else ''


def _network(name: str | None) -> Network:
  if not isinstance(name, str) or name not in MODELS:
    raise ValueError(
      f'model.name={name!r} is unknown; allowed: {", ".join(MODELS)}'
    )
  return MODELS[name]
