"""Settings for every test: eight devices, and no silent promotion of dtypes or ranks."""

import os

os.environ["XLA_FLAGS"] = (
  os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import hypothesis
import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# The budget of a test run. By hand: pytest --hypothesis-profile=thorough --hypothesis-seed=0
hypothesis.settings.register_profile("default", max_examples=15, deadline=None, derandomize=True)
hypothesis.settings.register_profile("thorough", max_examples=500, deadline=None)
hypothesis.settings.load_profile("default")


@pytest.fixture(scope="module")
def x64():
  """Runs the tests of a module in double precision."""
  with jax.enable_x64(True):
    yield
