"""Training steps of PyTorch, for a comparison: float, Brevitas, composite.

It needs torch and brevitas, which this project does not install. The networks
are those of `fliqs_jax.models`, `resnet_cifar` and `mlp`, with PyTorch's own
initial weights.
"""

from collections.abc import Callable, Sequence
from typing import Any

import brevitas.nn as brevitas_nn
from brevitas.quant import scaled_int
import numpy as np
import torch
from torch import nn
from torch.nn import functional

_BITS = (4, 8)  # Of int_s; the third option is the operand itself, its BF16.


class _Mean(nn.Module):
  """A mean over formats, weighted by a softmax, as in EdMIPS."""

  def __init__(self):
    super().__init__()
    self.logits = nn.Parameter(torch.zeros(len(_BITS) + 1))

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    """Returns sum_k p_k Q_k(x), [...] as x; gradients pass straight through."""
    p = torch.softmax(self.logits, 0)
    total = p[-1] * x
    for share, bits in zip(p, _BITS):
      scale = x.detach().abs().amax() / (2 ** (bits - 1) - 1)
      on_grid = torch.round(x / scale) * scale
      total = total + share * (x + (on_grid - x).detach())
    return total


class _CompositeConv(nn.Conv2d):
  def __init__(self, *args: Any, **kwargs: Any):
    super().__init__(*args, **kwargs)
    self.of_weights, self.of_inputs = _Mean(), _Mean()

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    return self._conv_forward(
      self.of_inputs(x), self.of_weights(self.weight), self.bias
    )


class _CompositeLinear(nn.Linear):
  def __init__(self, *args: Any, **kwargs: Any):
    super().__init__(*args, **kwargs)
    self.of_weights, self.of_inputs = _Mean(), _Mean()

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    return functional.linear(
      self.of_inputs(x), self.of_weights(self.weight), self.bias
    )


def _brevitas(kind: Any) -> Callable[..., nn.Module]:
  return lambda *args, **kwargs: kind(
    *args,
    weight_quant=scaled_int.Int8WeightPerChannelFloat,
    input_quant=scaled_int.Int8ActPerTensorFloat,
    **kwargs,
  )


# {row: constructors of convolutions and of dense layers}.
LAYERS: dict[str, tuple[Callable[..., nn.Module], ...]] = {
  'float': (nn.Conv2d, nn.Linear),
  'brevitas': (
    _brevitas(brevitas_nn.QuantConv2d),
    _brevitas(brevitas_nn.QuantLinear),
  ),
  'composite': (_CompositeConv, _CompositeLinear),
}


class _Block(nn.Module):
  def __init__(self, inputs: int, outputs: int, stride: int, conv: Any):
    super().__init__()
    self.conv0 = conv(inputs, outputs, 3, stride, 1, bias=False)
    self.conv1 = conv(outputs, outputs, 3, 1, 1, bias=False)
    self.norm0, self.norm1 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
    self.shortcut: nn.Module = nn.Identity()
    if inputs != outputs:
      self.shortcut = nn.Sequential(
        conv(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
      )

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    y = torch.relu(self.norm0(self.conv0(x)))
    return torch.relu(self.norm1(self.conv1(y)) + self.shortcut(x))


def resnet_cifar(conv: Any, dense: Any, classes: int) -> nn.Module:
  """Returns ResNet-20 for images [N, 3, H, W]."""
  parts = [conv(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
  inputs = 16
  for stage, outputs in enumerate((16, 32, 64)):
    for block in range(3):
      stride = 2 if stage and not block else 1
      parts.append(_Block(inputs, outputs, stride, conv))
      inputs = outputs
  head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), dense(inputs, classes)]
  return nn.Sequential(*parts, *head)


def mlp(
  dense: Any, classes: int, inputs: int, hidden: Sequence[int]
) -> nn.Module:
  """Returns a perceptron for images [N, ...] of so many numbers."""
  parts: list[nn.Module] = [nn.Flatten()]
  for features in hidden:
    parts += [dense(inputs, features), nn.ReLU()]
    inputs = features
  return nn.Sequential(*parts, dense(inputs, classes))


def step(
  network: nn.Module, images: np.ndarray, labels: np.ndarray
) -> Callable[[], None]:
  """Returns a training step: SGD with momentum on a batch.

  Args:
    network: network of images [N, C, H, W].
    images: [N, H, W, C] float32.
    labels: [N] int.
  """
  torch.set_num_threads(1)
  optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
  x = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
  y = torch.from_numpy(labels.astype(np.int64))

  def take() -> None:
    optimizer.zero_grad()
    functional.cross_entropy(network(x), y, label_smoothing=0.1).backward()
    optimizer.step()

  return take
