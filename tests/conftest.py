"""All tests: warnings are errors, no implicit rank promotion, 8 devices."""

import jax

jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_numpy_rank_promotion', 'raise')
