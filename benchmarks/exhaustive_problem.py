"""A problem so small that every assignment of formats can be trained.

A perceptron of five quantized layers on scikit-learn's digits, each layer at
INT2, INT3, INT4 or INT8: 1024 assignments.
"""

from collections.abc import Callable, Mapping
import dataclasses
import functools
import io
import itertools
import pathlib
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import exhaustive_data
import fliqs_jax as fliqs
from fliqs_jax.models import mlp
from fliqs_jax.runtime import files
from fliqs_jax.search import controller as controller_lib
from fliqs_jax.search import schedules
from fliqs_jax.search import train_state
from fliqs_jax.search import train_step
from fliqs_jax.space import allocation
from fliqs_jax.space import search_space
from fliqs_jax.tasks import classification

_SETTLE = 20  # Batches, `train.settle_batches` of the recipes.
_ACT_START = 0.15  # `quant.act_start` of configs/digits.py.
# So many networks are trained at once; more do not fit a core's cache.
_AT_ONCE = 64


@dataclasses.dataclass(frozen=True)
class Problem:
  """The network, its training, and its L decisions of K formats.

  Attributes:
    steps: length of training.
    hidden: widths of the L - 1 hidden layers.
    menu: [K] formats of every layer, the dearest last.
    batch: training images a step.
    valid_batch: validation images a step.
    learning_rate: Adam's at the start; it falls along a cosine to zero.
  """

  steps: int = 350
  hidden: tuple[int, ...] = (24, 16, 8, 12)
  menu: tuple[str, ...] = ('INT2', 'INT3', 'INT4', 'INT8')
  batch: int = 64
  valid_batch: int = 128
  learning_rate: float = 3e-3

  @functools.cached_property
  def model(self) -> mlp.MLP:
    """The network."""
    return self.network('sampled')

  def network(self, mix: str) -> mlp.MLP:
    """Returns the network with a `mix` of `QuantSpec`; same parameters."""
    spec = fliqs.QuantSpec(formats=self.menu, mix=mix)
    dense = fliqs.with_spec(fliqs.QuantDense, spec)
    return mlp.MLP(10, hidden=self.hidden, dense=dense)

  @property
  def image(self) -> np.ndarray:
    """One input of the network."""
    return np.zeros((1, *self.model.input_shape), np.float32)

  @functools.cached_property
  def space(self) -> search_space.SearchSpace:
    """The decisions, one for each layer."""
    return fliqs.find_decisions(self.model, self.image, train=False)

  @functools.cached_property
  def optimizer(self) -> optax.GradientTransformation:
    """The optimizer of the weights."""
    return optax.adam(
      optax.cosine_decay_schedule(self.learning_rate, self.steps)
    )

  @functools.cached_property
  def assignments(self) -> np.ndarray:
    """[N, L] int: every assignment, as indices into the menu."""
    layers = len(self.space.decisions)
    return np.array([*itertools.product(range(len(self.menu)), repeat=layers)])

  @functools.cached_property
  def costs(self) -> np.ndarray:
    """[N] bit operations of every assignment, over those of uniform INT4."""
    costs = jax.vmap(self.cost)(self.choices(self.assignments))
    return np.asarray(costs, np.float64)

  @functools.cached_property
  def cost(self) -> Callable[[Mapping[str, Any]], jax.Array]:
    """{decision: [K]} -> bit operations, over those of uniform INT4."""
    cost = self.space.cost('bops')
    return self.space.relative_cost(cost, fliqs.uniform_cost(cost, 'INT4'))

  def budget(self, target: float) -> fliqs.Budget:
    """Returns the budget of a multiple of the cost of uniform INT4."""
    cost = self.space.cost('bops')
    return fliqs.Budget(cost, target * fliqs.uniform_cost(cost, 'INT4'))

  def within(self, target: float) -> np.ndarray:
    """Returns which assignments, bool [N], are within a budget."""
    return self.costs <= target * (1 + allocation.TOLERANCE)

  def uniform(self, option: int) -> int:
    """Returns the number of the assignment with one option everywhere."""
    return int(np.flatnonzero((self.assignments == option).all(axis=1))[0])

  def choices(self, assignments: Any) -> dict[str, jax.Array]:
    """Returns {decision: [..., K]} of indices [..., L] into the menu."""
    one_hots = jax.nn.one_hot(jnp.asarray(assignments), len(self.menu))
    names = [d.name for d in self.space.decisions]
    return {name: one_hots[..., i, :] for i, name in enumerate(names)}

  def numbers(self, choices: Mapping[str, Any]) -> np.ndarray:
    """Returns the numbers [...] of assignments {decision: [..., K]}."""
    numbers = np.zeros((), int)
    for decision in self.space.decisions:
      numbers = numbers * len(self.menu) + np.argmax(choices[decision.name], -1)
    return numbers

  def phases(self, start: float, freeze: float) -> schedules.Phases:
    """Returns the phases of a run, whose search may start late or never."""
    return fliqs.phases(self.steps, _ACT_START, start, freeze)

  def streams(self, seeds: int) -> exhaustive_data.Stream:
    """Returns the streams of the first seeds, with leaves [seeds, ...]."""
    return exhaustive_data.streams(
      seeds, self.steps, _SETTLE, self.batch, self.valid_batch
    )

  def start(
    self, controller: controller_lib.Controller, stream: exhaustive_data.Stream
  ) -> train_state.TrainState:
    """Returns the state before the first step."""
    return fliqs.create_state(
      self.model,
      self.space,
      self.optimizer,
      controller,
      stream.key,
      self.image,
      train=False,
    )

  def step(
    self,
    controller: controller_lib.Controller,
    phases: schedules.Phases,
    quality: str = 'cross_entropy',
    mix: str = 'sampled',
  ) -> train_step.Step:
    """Returns the search step."""
    return fliqs.search_step(
      self.network(mix).apply,
      classification.loss(0.0),
      classification.QUALITIES[quality],
      self.space,
      controller,
      self.optimizer,
      phases,
    )

  def train(
    self,
    step: train_step.Step,
    state: train_state.TrainState,
    stream: exhaustive_data.Stream,
    first: int | jax.Array,
    end: int | jax.Array,
  ) -> train_state.TrainState:
    """Returns the state after the steps `first` to `end` - 1."""

    def one(i, state):
      train, valid = stream.train[i], stream.valid[i]
      return step(
        state,
        exhaustive_data.rows_of('train', train),
        exhaustive_data.rows_of('valid', valid),
      )[0]

    return lax.fori_loop(first, end, one, state)

  def alone(
    self,
    choices: Mapping[str, Any],
    stream: exhaustive_data.Stream,
    end: int | None = None,
  ) -> train_state.TrainState:
    """Returns the state of a network that is trained without a search.

    Args:
      choices: {decision: [K] one-hot}.
      stream: batches of one seed.
      end: the step before which training stops; None: the last.
    """
    fixed = controller_lib.Controller(
      init=lambda logits: choices,
      propose=lambda state, key, i: jax.tree.map(lambda a: a[None], state),
      update=lambda state, archs, qualities, i: (state, {}),
      samples=1,
      judges=False,
    )
    step = self.step(fixed, self.phases(_ACT_START, 1.0))
    state = self.start(fixed, stream)
    return self.train(
      step, state, stream, 0, self.steps if end is None else end
    )

  def test_loss(
    self,
    state: train_state.TrainState,
    choices: Mapping[str, Any],
    stream: exhaustive_data.Stream,
  ) -> jax.Array:
    """Returns the cross-entropy [], nats, of the test split; settled first."""
    settle = train_step.settle_step(self.model.apply)
    arch = self.space.expand(choices)

    def one(model_state, rows):
      batch = exhaustive_data.rows_of('train', rows)
      return settle(state.params, model_state, arch, batch, state.key), None

    rows = stream.train[self.steps :]
    settled = lax.scan(one, state.model_state, rows)[0]
    test = exhaustive_data.rows_of('test', slice(None))
    variables = {'params': state.params, 'arch': arch, **settled}
    logits = self.model.apply(variables, test['image'], train=False)
    return -classification.minus_cross_entropy(logits, test)

  def table(self, directory: pathlib.Path, seeds: int) -> np.ndarray:
    """Returns the test loss [seeds, N] of every assignment, trained alone.

    A file holds one seed, so that a run which was stopped goes on.

    Args:
      directory: where the files are, and where missing ones are written.
      seeds: number of seeds.
    """

    @jax.jit
    def losses(assignments, stream):
      def one(choices):
        return self.test_loss(self.alone(choices, stream), choices, stream)

      return lax.map(one, self.choices(assignments), batch_size=_AT_ONCE)

    streams = self.streams(seeds)

    def of_seed(seed):
      path = directory / f'every-{self.steps}-{seed}.npy'
      if not path.exists():
        stream = jax.tree.map(lambda x: x[seed], streams)
        content = io.BytesIO()
        np.save(content, losses(self.assignments, stream))
        files.write_bytes(path, content.getvalue())
      return np.load(path)

    directory.mkdir(parents=True, exist_ok=True)
    return np.stack([of_seed(seed) for seed in range(seeds)])
