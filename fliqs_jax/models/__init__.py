"""Networks by name. Plain Flax: conv and dense layers come in as arguments."""

from collections.abc import Mapping
import dataclasses
from typing import Any

import flax.linen as nn

from fliqs_jax import layers
from fliqs_jax import quant_spec
from fliqs_jax.models import mlp
from fliqs_jax.models import mobilenet_v2
from fliqs_jax.models import resnet_cifar

MODELS: dict[str, type[nn.Module]] = {
  'mlp': mlp.MLP,
  'mobilenetv2': mobilenet_v2.MobileNetV2,
  'resnet_cifar': resnet_cifar.ResNetCifar,
}

# What `build` itself gives a model; not keys of a config.
_GIVEN = ('conv', 'dense', 'num_classes', 'parent', 'name')


def published(name: str) -> dict[str, Any]:
  """Returns the `model` section of a config for a network as published.

  Raises:
    ValueError: unknown name.
  """
  keys = {
    field.name: field.default for field in dataclasses.fields(_class(name))
  }
  return dict(name=name) | {k: v for k, v in keys.items() if k not in _GIVEN}


def _class(name: str) -> type[nn.Module]:
  if name not in MODELS:
    raise ValueError(f'model {name!r} is unknown; allowed: {", ".join(MODELS)}')
  return MODELS[name]


def build(
  config: Mapping[str, Any], num_classes: int, spec: quant_spec.QuantSpec
) -> nn.Module:
  """Returns the network that a config names, with quantized layers.

  Args:
    config: `name`, one of MODELS, and values for every other field of that
      network.
    num_classes: size of its output.
    spec: which formats its layers may use.

  Raises:
    ValueError: unknown name, unknown or missing keys.
  """
  keys = dict(config)
  name = keys.pop('name', None)
  model_class = _class(name)
  expected = published(name)
  if sorted(config) != sorted(expected):
    raise ValueError(
      f'the keys of model {name} are {", ".join(expected)}; got '
      f'{", ".join(config)}'
    )
  given = dict(num_classes=num_classes)
  for kind, layer in (('conv', layers.QuantConv), ('dense', layers.QuantDense)):
    if kind in model_class.__dataclass_fields__:
      given[kind] = layers.with_spec(layer, spec)
  return model_class(**keys, **given)
