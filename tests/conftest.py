"""All tests: warnings are errors, no implicit rank promotion, 8 devices.

Runs use one of them; a test that wants all says `jax.default_device(None)`.
"""

import jax

jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_numpy_rank_promotion', 'raise')
jax.config.update('jax_default_device', jax.devices()[0])
