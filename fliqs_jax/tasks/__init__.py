"""Tasks: what is learnt and how it is judged, by name of `config.task`.

A task is a module with `METRIC`, `output_shape`, `loss`, `QUALITIES`, `measure`
and `summarize`; `classification` is the model of one.
"""

from fliqs_jax.tasks import classification
from fliqs_jax.tasks import click_through

TASKS = {
  'classification': classification,
  'click_through': click_through,
}
