"""Settings for every test: eight devices, and no silent promotion of dtypes or ranks."""

import os

os.environ["XLA_FLAGS"] = (
  os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import hypothesis
import jax
import pytest

# Most tests compile much and compute little; those of exactness ask for `optimized` programs.
jax.config.update("jax_disable_most_optimizations", True)

# The budget of a test run. By hand: pytest --hypothesis-profile=thorough --hypothesis-seed=0
hypothesis.settings.register_profile("default", max_examples=10, deadline=None, derandomize=True)
hypothesis.settings.register_profile(
  "thorough", max_examples=500, deadline=None, phases=[hypothesis.Phase.generate]
)
hypothesis.settings.load_profile("default")


@pytest.fixture(autouse=True, scope="module")
def strict_promotion():
  """No dtype and no rank is promoted unseen, in tests; examples in docstrings run as users do."""
  with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
    yield


@pytest.fixture(scope="module")
def optimized():
  """Compiles as users do, with all of XLA's optimizations."""
  jax.config.update("jax_disable_most_optimizations", False)
  yield
  jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="module")
def standard_promotion():
  """For tests of Optax's own optimizers: Adam's bias correction promotes int32 to float."""
  with jax.numpy_dtype_promotion("standard"):
    yield


@pytest.fixture(scope="module")
def x64():
  """Runs the tests of a module in double precision."""
  with jax.enable_x64(True):
    yield
