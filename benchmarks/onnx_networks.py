"""Networks in ONNX as ONNX Runtime likes them, quantized by its own tool.

Written by hand with its fused operations: convolutions in NCHW with batch norm
folded into them, Relu, LayerNormalization, Gelu. `static` is its static
quantization: int8 weights per channel, uint8 activations, QDQ.
"""

from collections.abc import Callable, Iterator, Mapping
import pathlib
import tempfile
from typing import Any

import numpy as np
import onnx
from onnx import helper
from onnx import numpy_helper
from onnxruntime import quantization
from onnxruntime.quantization import shape_inference

_OPSET, _IR_VERSION = 21, 10
Tree = Mapping[str, Any]


class _Graph:
  """Nodes and constants; a value is its name."""

  def __init__(self):
    self.nodes: list[Any] = []
    self.constants: list[Any] = []

  def __call__(self, op: str, *inputs: Any, **attributes: Any) -> str:
    name = f'{op}{len(self.nodes)}'
    names = [x if isinstance(x, str) else self._constant(x) for x in inputs]
    self.nodes.append(
      helper.make_node(op, names, [name], name=name, **attributes)
    )
    return name

  def _constant(self, x: Any) -> str:
    name = f'constant{len(self.constants)}'
    self.constants.append(numpy_helper.from_array(np.asarray(x), name))
    return name

  def model(self, pixels: int, output: str) -> bytes:
    """Returns the model `inputs/0` [N, pixels, pixels, 3] -> `outputs`."""
    self.nodes.append(helper.make_node('Identity', [output], ['outputs']))
    shape = ['batch', pixels, pixels, 3]
    given, result = (
      helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, sizes)
      for name, sizes in (('inputs/0', shape), ('outputs', ['batch', None]))
    )
    graph = helper.make_graph(
      self.nodes, 'network', [given], [result], self.constants
    )
    model = helper.make_model(
      graph,
      opset_imports=[helper.make_opsetid('', _OPSET)],
      ir_version=_IR_VERSION,
    )
    onnx.checker.check_model(model)
    return model.SerializeToString()


def resnet_cifar(variables: Tree, pixels: int) -> bytes:
  """Returns `models.resnet_cifar`."""
  graph, params = _Graph(), variables['params']

  def conv(x, tree, stats, layer, norm, strides=1):
    kernel, scale = np.asarray(tree[layer]['kernel']), tree[norm]
    factor = scale['scale'] / np.sqrt(stats[norm]['var'] + 1e-5)
    total = max(kernel.shape[0] - strides, 0)  # Padding of `SAME`.
    return graph(
      'Conv',
      x,
      np.transpose(kernel * factor, (3, 2, 0, 1)),
      np.asarray(scale['bias'] - stats[norm]['mean'] * factor),
      strides=[strides] * 2,
      pads=[total // 2] * 2 + [total - total // 2] * 2,
    )

  x = graph('Transpose', 'inputs/0', perm=[0, 3, 1, 2])
  stats = variables['batch_stats']
  x = graph('Relu', conv(x, params, stats, 'stem', 'stem_norm'))
  for name in sorted(name for name in params if 'block' in name):
    block, own = params[name], stats[name]
    strides, shortcut = 1, x
    if 'shortcut' in block:
      strides = 2
      shortcut = conv(x, block, own, 'shortcut', 'shortcut_norm', 2)
    y = graph('Relu', conv(x, block, own, 'conv0', 'norm0', strides))
    y = conv(y, block, own, 'conv1', 'norm1')
    x = graph('Relu', graph('Add', y, shortcut))
  x = graph('Flatten', graph('GlobalAveragePool', x))
  head = params['head']
  return graph.model(pixels, graph('Gemm', x, head['kernel'], head['bias']))


def deit(variables: Tree, pixels: int) -> bytes:
  """Returns `models.deit` with heads of 64 channels."""
  graph, params = _Graph(), variables['params']

  def dense(x, tree):
    return graph('Add', graph('MatMul', x, tree['kernel']), tree['bias'])

  def norm(x, tree):
    return graph(
      'LayerNormalization', x, tree['scale'], tree['bias'], epsilon=1e-6
    )

  def heads(x, perm):
    x = graph('Reshape', x, np.asarray([0, 0, -1, 64]))
    return graph('Transpose', x, perm=perm)

  first = params['patch_embedding']
  kernel = np.transpose(first['kernel'], (3, 2, 0, 1))
  hidden, _, patch, _ = kernel.shape
  x = graph('Transpose', 'inputs/0', perm=[0, 3, 1, 2])
  x = graph('Conv', x, kernel, first['bias'], strides=[patch] * 2)
  x = graph('Reshape', x, np.asarray([0, hidden, -1]))
  x = graph('Transpose', x, perm=[0, 2, 1])
  count = graph('Slice', graph('Shape', x), *map(np.asarray, ([0], [1])))
  shape = graph('Concat', count, np.asarray([1, hidden]), axis=0)
  token = graph('Expand', params['class_token'], shape)
  x = graph('Concat', token, x, axis=1)
  x = graph('Add', x, params['position'])
  for i in range(sum('block' in name for name in params)):
    block = params[f'block{i}']
    y = norm(x, block['norm0'])
    q, k, v = (
      heads(dense(y, block[name]), perm)
      for name, perm in (
        ('query', [0, 2, 1, 3]),
        ('key', [0, 2, 3, 1]),
        ('value', [0, 2, 1, 3]),
      )
    )
    weights = graph('MatMul', q, k)
    weights = graph('Mul', weights, np.float32(64**-0.5))
    y = graph('MatMul', graph('Softmax', weights, axis=-1), v)
    y = graph('Transpose', y, perm=[0, 2, 1, 3])
    y = graph('Reshape', y, np.asarray([0, 0, hidden]))
    x = graph('Add', x, dense(y, block['out']))
    y = graph('Gelu', dense(norm(x, block['norm1']), block['mlp0']))
    x = graph('Add', x, dense(y, block['mlp1']))
  x = graph('Gather', norm(x, params['norm']), np.asarray(0), axis=1)
  return graph.model(pixels, dense(x, params['head']))


# {name in `models`: (variables, pixels) -> model}.
NETWORKS: dict[str, Callable[[Tree, int], bytes]] = dict(
  resnet_cifar=resnet_cifar, deit_ti16=deit
)


class _Images(quantization.CalibrationDataReader):
  def __init__(self, pixels: int):
    rng = np.random.default_rng(1)
    shape = (2, pixels, pixels, 3)
    self._batches: Iterator[Any] = iter(
      [{'inputs/0': rng.standard_normal(shape, np.float32)} for _ in range(4)]
    )

  def get_next(self) -> Any:
    return next(self._batches, None)


def static(model: bytes, pixels: int) -> bytes:
  """Returns a model, quantized for random images by ONNX Runtime's tool."""
  with tempfile.TemporaryDirectory() as directory:
    paths = [pathlib.Path(directory) / f'{i}.onnx' for i in range(3)]
    paths[0].write_bytes(model)
    shape_inference.quant_pre_process(paths[0], paths[1])
    quantization.quantize_static(
      paths[1],
      paths[2],
      _Images(pixels),
      quant_format=quantization.QuantFormat.QDQ,
      activation_type=quantization.QuantType.QUInt8,
      weight_type=quantization.QuantType.QInt8,
      per_channel=True,
    )
    return paths[2].read_bytes()
