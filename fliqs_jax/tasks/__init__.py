"""Tasks by the name in `config.task`: losses, qualities and test metrics.

A task is a module with `METRIC`, `LEAST_CLASSES` (of how many classes the test
split must have examples), `output_shape`, `loss`, `QUALITIES`, `measure` and
`summarize`; `classification` is an example.
"""

from fliqs_jax.tasks import classification
from fliqs_jax.tasks import click_through

TASKS = {
  'classification': classification,
  'click_through': click_through,
}
