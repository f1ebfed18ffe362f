"""Error of activations by the rule of their threshold, on trained networks.

python -m benchmarks.thresholds WORKDIR ...

For each layer of a finished run whose formats are BF16, the input on one test
batch is quantized with the multiple k of `act_clip` and these thresholds:

  deviation   k x std, as in the paper
  rms         k x root mean square
  magnitude   |mean| + k x std, at most the largest magnitude: ours
  largest     the largest magnitude

The table has the relative error (root mean square of the error over that of the
input): its geometric mean over the layers, and the worst layer.
"""

import argparse

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from fliqs_jax import data
from fliqs_jax.numerics import clipping
from fliqs_jax.numerics import formats
from fliqs_jax.numerics import quantize
from fliqs_jax.run import evaluation

CLIPS = 4.0, 'gaussian', 'laplacian'
FORMATS = 'INT4', 'INT8', 'E2M1', 'E4M3'


def thresholds(x: np.ndarray, multiple: float) -> dict[str, float]:
  """Returns {rule: threshold} of an input [...], in its units."""
  mean, std, largest = abs(x.mean()), x.std(), np.abs(x).max()
  return dict(
    deviation=multiple * std,
    rms=multiple * np.sqrt(np.mean(x**2)),
    magnitude=min(mean + multiple * std, largest),
    largest=largest,
  )


def error(x: np.ndarray, name: str, threshold: float) -> float:
  """Returns the relative error of x [...] in a format at a threshold."""
  grid = quantize.grid_of(formats.parse(name))
  q = quantize.quantize(jnp.asarray(x), grid, jnp.float32(threshold))
  wrong = np.asarray(q.values * q.scale, np.float64) - x
  return float(np.linalg.norm(wrong) / np.linalg.norm(x))


def inputs(workdir: str) -> dict[str, np.ndarray]:
  """Returns {layer: its input [...] on one batch} of a finished run."""
  run = evaluation.restore(workdir)
  experiment, state = run.experiment, run.state
  batch = data.model_inputs(next(iter(experiment.streams.test())))
  variables = dict(
    state.model_state,
    params=state.served_params,
    arch=experiment.space.expand(experiment.space.uniform('BF16')),
  )
  _, sown = jax.jit(
    lambda v, x: experiment.model.apply(
      v, x, train=False, mutable=['act_inputs']
    )
  )(variables, batch)
  flat = traverse_util.flatten_dict(sown['act_inputs'], sep='/')
  found = {
    path.removesuffix('/x'): np.asarray(x[0]) for path, x in flat.items()
  }
  return {path: x for path, x in found.items() if x.any()}


def main() -> None:
  """Prints a table for each workdir."""
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('workdirs', nargs='+')
  for workdir in parser.parse_args().workdirs:
    seen = inputs(workdir)
    print(f'\n{workdir}, {len(seen)} layers\n')
    print('| multiple | rule |', ' | '.join(FORMATS), '|')
    print('|---|---|', '---|' * len(FORMATS), sep='')
    for clip in CLIPS:
      for rule in thresholds(np.ones(1), 1.0):
        cells = []
        for name in FORMATS:
          (multiple,) = clipping.multiples(clip, formats.menu(name))
          errors = [
            error(x, name, thresholds(x, multiple)[rule]) for x in seen.values()
          ]
          mean = np.exp(np.mean(np.log(np.maximum(errors, 1e-9))))
          cells.append(f'{mean:.4f} ({max(errors):.3f})')
        print(f'| {clip} | {rule} |', ' | '.join(cells), '|')


if __name__ == '__main__':
  main()
