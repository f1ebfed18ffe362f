"""Tasks by the name in `config.task`: losses, qualities and test metrics.

A task is a module with `METRIC`, `UNIT` (of the metric: '%' of a fraction of 1,
or 'dB'), `LEAST_CLASSES` (of how many classes the test split must have
examples), `output_shape`, `loss`, `QUALITIES`, `labels_of` (what the outputs of
a teacher are as labels), `measure` and `summarize`; `classification` is an
example.
"""

from fliqs_jax.tasks import classification
from fliqs_jax.tasks import click_through
from fliqs_jax.tasks import super_resolution

TASKS = {
  'classification': classification,
  'click_through': click_through,
  'super_resolution': super_resolution,
}
