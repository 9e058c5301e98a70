"""Settings for every test: eight devices, and no silent promotion of dtypes or ranks."""

import gc
import os

import hypothesis
import jax
import pytest

from tests import compiling, problems

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {compiling.FLAGS}"

# Most tests compile much and compute little; those of exactness use compiling.AS_USERS_DO.
jax.config.update("jax_disable_most_optimizations", True)

# Traces make many objects that live on. With the default threshold, they are scanned too often.
gc.set_threshold(100_000, 20, 50)

# The budget of a test run. By hand: pytest --hypothesis-profile=thorough --hypothesis-seed=0
hypothesis.settings.register_profile("default", max_examples=10, deadline=None, derandomize=True)
hypothesis.settings.register_profile(
  "thorough",
  max_examples=500,
  deadline=None,
  derandomize=False,  # Otherwise inherited from the default, and no seed would count.
  phases=[hypothesis.Phase.generate],
)
hypothesis.settings.load_profile("default")


@pytest.fixture(autouse=True, scope="module")
def strict_promotion():
  """Make every promotion of a dtype or a rank an error in tests, but not in docstring examples."""
  with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
    yield


@pytest.fixture
def standard_promotion():
  """Allow promotion for Optax's own optimizers: Adam's bias correction promotes int32 to float.

  The fixture ends with the test. Otherwise, the tests after it would pass or fail by their order.
  """
  with jax.numpy_dtype_promotion("standard"):
    yield


@pytest.fixture(scope="module")
def x64():
  """Run the tests of a module in double precision."""
  with jax.enable_x64(True):
    yield


@pytest.fixture(scope="module")
def mlp():
  """The parameters of `problems.MLP`, and the gradients and statistics of a batch."""
  params, batch = problems.make(problems.MLP(), (8, 5))
  return params, *problems.grads_and_stats(problems.MLP(), params, batch)
