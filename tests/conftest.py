"""Eight virtual CPU devices for every test, and compiled programs kept between runs; both before JAX starts."""
import os
import pathlib

os.environ['JAX_PLATFORMS'] = 'cpu'
# In the environment, so that the processes that tests start share it.
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(pathlib.Path(__file__).parents[1] / '.pytest_cache' / 'jax'))

import jax  # noqa: E402  it reads the environment when it is imported

jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)
