r"""Searches the formats of a language model, in a training loop of one's own.

The text is Python's language reference from `pydoc`. Loss, dropout, optimizer
and cost are code of this file: the package proposes architectures and learns
from their qualities. The example exports the resulting model in low bits, each
iteration of the scanned blocks in its own formats, and evaluates the served
model.

python -m examples.search_text OUT

It takes a minute on a CPU; expect the loss of the test text to fall from 4.9 to
below 2.7 nats per character, at 5 bits per weight.
"""

from pydoc_data import topics
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from examples import char_transformer
import fliqs_jax as fliqs
from fliqs_jax import serving

STEPS = 300
BITS = 5.0  # Target: average bits of the weights whose formats are searched.
LENGTH = 32


def text() -> list[np.ndarray]:
  """Returns train, valid and test, int32 [characters]."""
  characters = '\n'.join(topics.topics[k] for k in sorted(topics.topics))
  codes = np.frombuffer(characters.encode('ascii', 'replace'), np.uint8)
  ends = [len(codes) * 8 // 10, len(codes) * 9 // 10]
  return np.split(codes.astype(np.int32), ends)


def batch(codes: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
  """Returns random pieces of the text, int32 [size, LENGTH + 1]."""
  starts = rng.integers(len(codes) - LENGTH, size=(size, 1))
  return codes[starts + np.arange(LENGTH + 1)]


class State(NamedTuple):
  """Everything that a step changes."""

  step: jax.Array
  params: Any
  opt_state: Any
  quant_stats: Any
  search_state: Any


def bits_per_weight(space: fliqs.SearchSpace):
  """Returns {decision: [K]} -> average bits [], a cost in plain Python."""
  weights = {
    d.name: sum(
      op.shape.weights
      for op in space.ops
      if any(op.leaf(leaf.rpartition('/')[2]) == leaf for leaf in d.leaves)
    )
    for d in space.decisions
  }
  bits = {d.name: np.float32([f.bits for f in d.menu]) for d in space.decisions}
  total = sum(weights.values())

  def cost(choices):
    return sum(
      weights[name] / total * jnp.sum(bits[name] * leaf)
      for name, leaf in choices.items()
    )

  return cost


def search(out: str, steps: int = STEPS) -> dict[str, Any]:
  """Trains, searches, exports to a new directory; returns the results."""
  train, valid, test = text()
  rng = np.random.default_rng(0)
  tokens = batch(train, 1, rng)[:, :-1]

  spec = fliqs.QuantSpec(
    formats='int_s', groups=(('qkv', 'blocks/attention/[qkv]*'),)
  )
  model = fliqs.searchable(char_transformer.CharTransformer(), spec, embed=True)
  space = fliqs.find_decisions(model, tokens, deterministic=True)
  cost = bits_per_weight(space)
  phases = fliqs.phases(steps, act_start=0.15, search_start=0.25, freeze=0.9)
  controller = fliqs.make_controller(
    'default', lambda choices: cost(choices) / BITS, phases
  )
  optimizer = optax.adamw(optax.cosine_decay_schedule(1e-2, steps))

  def loss(params, quant_stats, arch, pieces, **kwargs):
    variables = dict(params=params, quant_stats=quant_stats, arch=arch)
    outputs = model.apply(variables, pieces[:, :-1], **kwargs)
    logits, changed = outputs if 'mutable' in kwargs else (outputs, None)
    return optax.softmax_cross_entropy_with_integer_labels(
      logits, pieces[:, 1:]
    ).mean(), changed

  @jax.jit
  def step(state, train_pieces, valid_pieces):
    keys = jax.random.split(jax.random.fold_in(jax.random.key(1), state.step))
    # The proposed architectures, each leaf [samples, K].
    proposed = controller.propose(state.search_state, keys[0], state.step)
    quant_stats = fliqs.set_activation_quantization(
      state.quant_stats, state.step >= phases.act_start
    )
    # The weights learn with the first of them.
    (value, changed), gradients = jax.value_and_grad(loss, has_aux=True)(
      state.params,
      quant_stats,
      space.expand(jax.tree.map(lambda a: a[0], proposed)),
      train_pieces,
      deterministic=False,
      rngs={'dropout': keys[1]},
      mutable=['quant_stats'],
    )
    updates, opt_state = optimizer.update(
      gradients, state.opt_state, state.params
    )
    params = optax.apply_updates(state.params, updates)
    # All of them are judged with the new weights on the validation text.
    qualities = jax.lax.map(
      lambda choices: (
        -loss(
          params,
          changed['quant_stats'],
          space.expand(choices),
          valid_pieces,
          deterministic=True,
        )[0]
      ),
      proposed,
    )
    search_state, metrics = controller.update(
      state.search_state, proposed, qualities, state.step
    )
    metrics['loss'] = value
    state = State(
      state.step + 1, params, opt_state, changed['quant_stats'], search_state
    )
    return state, metrics

  variables = jax.jit(lambda key: model.init(key, tokens, deterministic=True))(
    jax.random.key(0)
  )
  state = State(
    step=jnp.zeros((), jnp.int32),
    params=variables['params'],
    opt_state=optimizer.init(variables['params']),
    quant_stats=variables['quant_stats'],
    search_state=controller.init(space.zeros()),
  )
  history = []
  for _ in range(steps):
    state, metrics = step(state, batch(train, 16, rng), batch(valid, 16, rng))
    history.append(metrics['loss'])

  choices = fliqs.argmax(state.search_state.policy)
  pieces = batch(test, 64, rng)
  exported = fliqs.export_model(
    model,
    dict(params=state.params, quant_stats=state.quant_stats),
    choices,
    pieces[:8, :-1],
    out=out,
    deterministic=True,
  )
  served = serving.load(out)
  test_loss = optax.softmax_cross_entropy_with_integer_labels(
    served(pieces[:, :-1]), pieces[:, 1:]
  ).mean()
  return dict(
    coverage=fliqs.coverage(model, tokens, deterministic=True),
    exported=exported,
    params=state.params,
    losses=np.asarray(history),
    test_loss=float(test_loss),
    assignment=space.assignment(choices),
    bits=float(cost(choices)),
  )


if __name__ == '__main__':
  if len(sys.argv) != 2:
    sys.exit('usage: python -m examples.search_text OUT')
  result = search(sys.argv[1])
  print(result['coverage'])
  for layer, formats in result['assignment'].items():
    print(f'{layer:26} {formats[0]}')
  print(
    f'{result["test_loss"]:.2f} nats per character of the test text at '
    f'{result["bits"]:.2f} bits per weight, in '
    f'{result["exported"]["bytes"]["stored"]:,} bytes'
  )
