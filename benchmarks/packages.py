"""Searches and serves models from their own packages, unedited.

python -m benchmarks.packages [--model=GPT-2,BERT]

Needs the extra `foreign`: transformers 4.57, the last with Flax models,
diffusers and jraph. Networks are small and have random weights: this shows that
they work, not how well. For each model:

  covered   share of the multiply-accumulates that have formats, with products
            of attention and look-ups
  compared  the program with every product at BF16 is the model, up to rounding
            (`check_model`, which raises otherwise)
  loss      mean squared difference to one before and after 8 steps, in which
            INT4 and INT8 take turns, of one compiled program
  served    whether the exported model, on inputs that it has not seen, gives
            the outputs of the search's evaluation bit for bit
"""

import argparse
from collections.abc import Callable
import pathlib
import tempfile
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import fliqs_jax as fliqs
from fliqs_jax import serving

_TOKENS = np.arange(16, dtype=np.int32).reshape(2, 8)
_MASK = np.ones_like(_TOKENS)
_PLACES = np.broadcast_to(np.arange(8, dtype=np.int32), (2, 8))
_HIDDEN = dict(vocab_size=50, hidden_size=16, intermediate_size=32)
_DEEP = dict(num_hidden_layers=2, num_attention_heads=2)

# A model: module, its variables, inputs of a call.
Model = tuple[Any, dict[str, Any], tuple[Any, ...]]


def _normal(*shape: int) -> np.ndarray:
  return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def _transformers(name: str, config: str, *inputs: Any, **options: Any):
  """Returns a function that makes a model of transformers."""

  def make() -> Model:
    import transformers

    model = getattr(transformers, f'Flax{name}')(
      getattr(transformers, config)(**options), input_shape=inputs[0].shape
    )
    variables = model.params
    if 'params' not in variables:
      variables = dict(params=variables)
    return model.module, variables, inputs

  return make


def _unet() -> Model:
  import diffusers

  model = diffusers.FlaxUNet2DConditionModel(
    sample_size=8,
    down_block_types=('CrossAttnDownBlock2D', 'DownBlock2D'),
    up_block_types=('UpBlock2D', 'CrossAttnUpBlock2D'),
    block_out_channels=(32, 32),
    layers_per_block=1,
    attention_head_dim=2,
    cross_attention_dim=16,
  )
  # Diffusers takes an array of NumPy for one number.
  inputs = _normal(2, 4, 8, 8), jnp.array([1, 5]), _normal(2, 8, 16)
  params = model.init_weights(jax.random.key(0))
  return model, dict(params=params), inputs


def _graph_network() -> Model:
  import jraph

  class Net(nn.Module):
    """A graph network whose updates are dense layers."""

    @nn.compact
    def __call__(self, graph):
      """Returns the graph after one round of messages."""
      edge, node, every = (
        jraph.concatenated_args(nn.Dense(width, name=name))
        for name, width in (('edge', 8), ('node', 8), ('globals', 4))
      )
      return jraph.GraphNetwork(edge, node, every)(graph)

  graph = jraph.GraphsTuple(
    nodes=_normal(6, 8),
    edges=_normal(9, 4),
    senders=np.arange(9) % 6,
    receivers=np.arange(9) // 2,
    n_node=np.array([6]),
    n_edge=np.array([9]),
    globals=_normal(1, 3),
  )
  net = Net()
  return net, net.init(jax.random.key(0), graph), (graph,)


MODELS: dict[str, Callable[[], Model]] = {
  'GPT-2': _transformers(
    'GPT2LMHeadModel',
    'GPT2Config',
    *(_TOKENS, _MASK, _PLACES),
    **dict(vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2),
  ),
  'BERT': _transformers(
    'BertForMaskedLM',
    'BertConfig',
    *(_TOKENS, _MASK, np.zeros_like(_TOKENS), _PLACES, None),
    **_HIDDEN,
    **_DEEP,
  ),
  'T5': _transformers(
    'T5ForConditionalGeneration',
    'T5Config',
    *(_TOKENS, _MASK, _TOKENS, _MASK),
    **dict(vocab_size=50, d_model=16, d_kv=8, d_ff=32),
    **dict(num_layers=2, num_heads=2),
  ),
  'Llama': _transformers(
    'LlamaForCausalLM',
    'LlamaConfig',
    *(_TOKENS, _MASK, _PLACES),
    max_position_embeddings=16,
    **_HIDDEN,
    **_DEEP,
  ),
  'Whisper': _transformers(
    'WhisperForConditionalGeneration',
    'WhisperConfig',
    *(_normal(2, 8, 32), _TOKENS, _MASK, _PLACES),
    **dict(vocab_size=50, d_model=16, num_mel_bins=8),
    **dict(encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=32),
    **dict(decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=32),
    **dict(max_source_positions=16, max_target_positions=16),
    **dict(pad_token_id=0, bos_token_id=1, eos_token_id=2),
    **dict(suppress_tokens=None, begin_suppress_tokens=None),
  ),
  'ViT': _transformers(
    'ViTForImageClassification',
    'ViTConfig',
    _normal(2, 16, 16, 3),
    **dict(hidden_size=16, intermediate_size=32),
    **dict(image_size=16, patch_size=8, num_labels=5),
    **_DEEP,
  ),
  'ResNet': _transformers(
    'ResNetForImageClassification',
    'ResNetConfig',
    _normal(2, 32, 32, 3),
    **dict(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]),
    **dict(num_labels=5, layer_type='basic'),
  ),
  'U-Net': _unet,
  'graph network': _graph_network,
}


def _restore_clip() -> None:
  """Gives `jnp.clip` back the arguments that T5 of transformers uses."""
  clip = jnp.clip

  def old(x, a_min=None, a_max=None, **bounds):
    return clip(x, a_min, a_max, **bounds)

  jnp.clip = old


def row(name: str) -> str:
  """Returns the line of a model in the table.

  Args:
    name: a key of `MODELS`.

  Raises:
    ValueError: the program is not the model, or cannot be exported.
  """
  module, variables, inputs = MODELS[name]()
  model = fliqs.searchable(
    module, fliqs.QuantSpec(('int4', 'int8')), attention=True, embed=True
  )
  covered = fliqs.coverage(model, *inputs)
  variables = {**model.init(jax.random.key(0), *inputs), **variables}
  fliqs.check_model(model, variables, *inputs)
  space = fliqs.find_decisions(model, *inputs)
  traces, losses = [], []

  @jax.jit
  def step(variables):
    traces.append(1)

    def loss(params):
      y, changed = model.apply(
        {**variables, 'params': params}, *inputs, mutable=['quant_stats']
      )
      leaves = [jnp.float32(leaf).ravel() for leaf in jax.tree.leaves(y)]
      return jnp.mean((jnp.concatenate(leaves) - 1) ** 2), changed

    (value, changed), gradients = jax.value_and_grad(loss, has_aux=True)(
      variables['params']
    )
    params = jax.tree.map(
      lambda p, g: p - 0.02 * g, variables['params'], gradients
    )
    return {**variables, 'params': params, **changed}, value

  for i in range(8):
    choices = space.uniform(('INT4', 'INT8')[i % 2])
    variables = {**variables, 'arch': space.expand(choices)}
    variables, value = step(variables)
    losses.append(float(value))
  assert len(traces) == 1
  with tempfile.TemporaryDirectory() as directory:
    out = pathlib.Path(directory) / 'export'
    fliqs.export_model(model, variables, choices, *inputs, out=out)
    served = serving.load(out)
    new = jax.tree.map(_other, inputs)
    evaluated = jax.jit(model.apply)(variables, *new)
    same = jax.tree.map(np.array_equal, evaluated, served(*new))
  macs = sum(layer.macs for layer in covered.layers)
  return (
    f'| {name} | {len(covered.layers)} | {macs:,} | {covered.share:.0%} | '
    f'{losses[0]:.3f} to {losses[-1]:.3f} | '
    f'{"equal" if all(jax.tree.leaves(same)) else "differs"} |'
  )


def _other(leaf: np.ndarray) -> np.ndarray:
  """Returns another input: larger numbers, or the examples in reverse order."""
  if np.issubdtype(leaf.dtype, np.floating):
    return 1.1 * leaf
  return leaf[::-1].copy() if len(leaf) == 2 else leaf


def main() -> None:
  """Prints a row for each model."""
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--model', default=','.join(MODELS))
  args = parser.parse_args()
  _restore_clip()
  print('| model | products | MACs | covered | loss | served |')
  print('|---|---|---|---|---|---|')
  for name in args.model.split(','):
    print(row(name), flush=True)


if __name__ == '__main__':
  main()
