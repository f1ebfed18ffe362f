"""Methods that choose assignments of the exhaustive problem.

A method is a function (problem, targets [T], streams of S seeds) -> `Selected`;
targets are budgets in multiples of the cost of uniform INT4.
"""

from collections.abc import Callable
import functools
import itertools
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from benchmarks import exhaustive_data
from benchmarks import exhaustive_problem
import fliqs_jax as fliqs
from fliqs_jax.search import policy as policy_lib
from fliqs_jax.search import presets
from fliqs_jax.search import sensitivity
from fliqs_jax.search.controllers import scored
from fliqs_jax.space import allocation
from fliqs_jax.tasks import classification

# Validation batches of a scoring, as in a run.
_SCORED_BATCHES = 8
# Assignments that are judged at once. With all of them scores would be wrong:
# where one-hot labels are broadcast to more than 2**15 rows, XLA on a CPU (JAX
# 0.10.2) gives other numbers than the same operations one by one.
_AT_ONCE = 64
# `random` uses at least this share of the budget.
_USED = 0.9


class Selected(NamedTuple):
  """What a method selects and serves, for T targets and S seeds.

  Attributes:
    numbers: [T, S] int, rows of `Problem.assignments`.
    served: [T, S] test loss with the weights of the search; None: the selected
      network is trained from scratch.
    compute: matrix products of examples over those of training without a
      search; a backward pass counts twice, quantization is not counted.
  """

  numbers: np.ndarray
  served: np.ndarray | None
  compute: float


Method = Callable[
  [exhaustive_problem.Problem, np.ndarray, exhaustive_data.Stream], Selected
]


def searched(
  problem: exhaustive_problem.Problem,
  targets: np.ndarray,
  streams: exhaustive_data.Stream,
  *,
  preset: str,
  **overrides: Any,
) -> Selected:
  """Searches with a preset, as a run does with `cost.bound='at_most'`.

  Args:
    problem: the network and its training.
    targets: [T] budgets.
    streams: the S seeds.
    preset: key of `presets.PRESETS`.
    **overrides: keys of the `search` section of a config in place of the
      preset's own: `start`, `freeze`, `scores`, `scorings`.
  """
  keys = presets.search_keys(preset, problem.steps) | overrides
  phases = problem.phases(keys['start'], keys['freeze'])
  mix = presets.PRESETS[preset].mix

  def controller(target):
    return fliqs.make_controller(
      preset, lambda choices: problem.cost(choices) / target, phases
    )

  def start(target, stream):
    return problem.start(controller(target), stream)

  def train(target, stream, state, first, end):
    step = problem.step(controller(target), phases, keys['quality'], mix)
    return problem.train(step, state, stream, first, end)

  def serve(target, stream, state):
    del target
    choices = fliqs.argmax(state.search_state.policy)
    return choices, problem.test_loss(state, choices, stream)

  scorings = keys['scorings']
  points = phases.scorings(scorings) if scorings else (phases.freeze,)
  score = _scorer(problem, keys['scores']) if scorings else None
  train_all = _for_all(train, 1)
  states = _for_all(start, 0)(targets, streams)
  states = train_all(targets, streams, states, 0, points[0])
  for first, end in itertools.pairwise((*points, problem.steps)):
    states = _allocated(problem, targets, streams, states, first, score)
    states = train_all(targets, streams, states, first, end)
  choices, served = jax.device_get(_for_all(serve, 1)(targets, streams, states))
  judged = problem.steps if controller(1.0).judges else 0
  batches = judged + scorings * _SCORED_BATCHES * _networks(problem)
  examples = batches * problem.valid_batch / (problem.steps * problem.batch)
  passes = len(problem.menu) if mix == 'branched' else 1
  return Selected(problem.numbers(choices), served, passes + examples / 3)


def after_training(
  problem: exhaustive_problem.Problem,
  targets: np.ndarray,
  streams: exhaustive_data.Stream,
  *,
  scores: str,
) -> Selected:
  """Scores the formats of a network trained at the dearest one.

  Args:
    problem: the network and its training.
    targets: [T] budgets.
    streams: the S seeds.
    scores: key of `sensitivity.METRICS`.
  """
  dearest = problem.choices(problem.assignments[-1])
  train = jax.jit(jax.vmap(lambda stream: problem.alone(dearest, stream)))
  trained = train(streams)
  score = _scorer(problem, scores)
  variables = jax.device_get({'params': trained.params, **trained.model_state})
  numbers = []
  for seed, rows in enumerate(streams.valid):
    raw = score(_at(variables, seed), _batches(rows, problem.steps))
    each, _ = sensitivity.regular(problem.space, raw)
    solved = [
      allocation.solve(problem.space, each, [problem.budget(target)])
      for target in targets
    ]
    numbers.append([int(problem.numbers(choices)) for choices in solved])
  return Selected(np.array(numbers).T, None, 2.0)


def judged_whole(
  problem: exhaustive_problem.Problem,
  targets: np.ndarray,
  streams: exhaustive_data.Stream,
) -> Selected:
  """Judges every assignment where `sensitivity` adds up scores of layers.

  Args:
    problem: the network and its training.
    targets: [T] budgets.
    streams: the S seeds.
  """
  keys = presets.search_keys('sensitivity', problem.steps)
  metric = sensitivity.METRICS[keys['scores']](classification.loss(0.0))
  end = problem.phases(keys['start'], keys['freeze']).search_start
  choices = problem.choices(problem.assignments)
  dearest = problem.choices(problem.assignments[-1])

  def outputs(variables, arch, batch):
    everything = {**variables, 'arch': problem.space.expand(arch)}
    return problem.model.apply(everything, batch['image'], train=False)

  @jax.jit
  def scores(variables, batch):
    reference = outputs(variables, dearest, batch)
    return lax.map(
      lambda arch: metric(outputs(variables, arch, batch), reference, batch),
      choices,
      batch_size=_AT_ONCE,
    )

  train = jax.jit(jax.vmap(lambda stream: problem.alone(dearest, stream, end)))
  states = train(streams)
  numbers = []
  for seed, rows in enumerate(streams.valid):
    state = _at(states, seed)
    variables = {'params': state.params, **state.model_state}
    seen = [scores(variables, batch) for batch in _batches(rows, end)]
    mean = np.mean(seen, axis=0)
    numbers.append(
      [
        int(np.argmin(np.where(problem.within(target), mean, np.inf)))
        for target in targets
      ]
    )
  examples = len(problem.assignments) * _SCORED_BATCHES * problem.valid_batch
  compute = 1 + examples / (3 * problem.steps * problem.batch)
  return Selected(np.array(numbers).T, None, compute)


def at_random(
  problem: exhaustive_problem.Problem,
  targets: np.ndarray,
  streams: exhaustive_data.Stream,
) -> Selected:
  """Draws assignments that use most of the budget.

  Args:
    problem: the network and its training.
    targets: [T] budgets.
    streams: the S seeds.
  """
  rng = np.random.default_rng(0)
  numbers = []
  for target in targets:
    fit = problem.within(target) & (problem.costs > _USED * target)
    numbers.append(rng.choice(np.flatnonzero(fit), len(streams.valid)))
  return Selected(np.stack(numbers), None, 1.0)


# Another method is another row.
METHODS: dict[str, Method] = {
  'random': at_random,
  'judged': judged_whole,
  'two_trainings': functools.partial(after_training, scores='loss'),
  **{
    name: functools.partial(searched, preset=name) for name in presets.PRESETS
  },
}


def _for_all(function, states):
  """Jits a function of (target, stream, states, numbers), for all T and S."""

  def for_all(targets, streams, *args):
    rest = (None,) * (len(args) - states)
    over_seeds = jax.vmap(function, (None, 0) + (0,) * states + rest)
    over_all = jax.vmap(over_seeds, (0, None) + (0,) * states + rest)
    return over_all(jnp.asarray(targets, jnp.float32), streams, *args)

  return jax.jit(for_all)


def _at(tree, *index):
  return jax.tree.map(lambda x: x[index], tree)


def _networks(problem):
  """Returns how many networks are judged on each batch of a scoring."""
  return 1 + sum(len(d.labels) - 1 for d in problem.space.decisions)


def _scorer(problem: exhaustive_problem.Problem, scores: str) -> Any:
  metric = sensitivity.METRICS[scores](classification.loss(0.0))
  return sensitivity.scorer(problem.model.apply, metric, problem.space)


def _batches(rows: np.ndarray, step: int) -> list[dict[str, jax.Array]]:
  """Returns the validation batches of a scoring.

  Args:
    rows: [steps, V] rows of the validation split.
    step: number of the step.
  """
  used = np.roll(rows, -step, axis=0)[:_SCORED_BATCHES]
  return [exhaustive_data.rows_of('valid', batch) for batch in used]


def _allocated(problem, targets, streams, states, step, score):
  """Returns the states with an architecture within budget in each policy."""
  host = jax.device_get(states.replace(key=None, opt_state=None))

  def allocate(target, state, rows):
    budgets, search = [problem.budget(target)], state.search_state
    if score is None:
      best = allocation.likeliest(problem.space, search.policy, budgets)
      return search.replace(policy=policy_lib.settled(best))
    batches = _batches(rows, step)
    return scored.score_and_solve(
      state, score, problem.space, batches, budgets
    ).search_state

  searches = [
    [allocate(t, _at(host, i, j), s) for j, s in enumerate(streams.valid)]
    for i, t in enumerate(targets)
  ]

  def stack(*leaves):
    return jnp.stack(leaves)

  over_seeds = [jax.tree.map(stack, *of_seeds) for of_seeds in searches]
  return states.replace(search_state=jax.tree.map(stack, *over_seeds))
