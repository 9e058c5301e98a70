"""How long a training step takes, method against method."""

import functools
import time

import jax
import jax.numpy as jnp

from bnp_optax.experiments import training
from bnp_optax.experiments.methods import Method
from bnp_optax.experiments.models import MLP

_ROUNDS = 25
_SECONDS_A_SAMPLE = 0.05
_MAX_STEPS = 5000


def step_times(
  network: MLP,
  methods: dict[Method, float],
  batch_size: int,
  images: jax.Array,
  labels: jax.Array,
) -> dict[Method, list[float]]:
  """Measures the time of a training step of one network, in rounds of all methods in turn.

  In turn, so that whatever else the machine does meets all of them alike: compare the methods
  within a round.

  Args:
    network: The network, without norm.
    methods: The methods and the learning rate of each.
    batch_size: Images in a step.
    images: The training images.
    labels: Their labels.

  Returns:
    For each method, the seconds a step took, one number a round.
  """
  samplers = {
    method: _Sampler(network.clone(norm=method.norm), method, rate, batch_size, images, labels)
    for method, rate in methods.items()
  }
  rounds = [{m: sampler.sample() for m, sampler in samplers.items()} for _ in range(_ROUNDS)]
  return {method: [seconds[method] for seconds in rounds] for method in methods}


class _Sampler:
  """Times the training steps of one method."""

  def __init__(
    self,
    model: MLP,
    method: Method,
    rate: float,
    batch_size: int,
    images: jax.Array,
    labels: jax.Array,
  ) -> None:
    lanes = training.make_lanes([0], [rate])
    # One run by itself, as a user has it: stacks of one lane are slower than none.
    self._state = jax.tree.map(lambda x: x[0], training.init(model, method, lanes, images))
    rows = jnp.arange(_MAX_STEPS * batch_size, dtype=jnp.int32) % len(images)
    steps = functools.partial(training.take_steps, model, method, batch_size)
    self._take_steps = jax.jit(steps, donate_argnums=0)
    self._data = (lanes.rates[0], rows)
    self._images = (images, labels)
    self._steps = 1
    self.sample()
    # Once more, now that the program is compiled, to see how many steps make a sample.
    self._steps = 20
    self._steps = min(_MAX_STEPS, max(1, round(_SECONDS_A_SAMPLE / self.sample())))

  def sample(self) -> float:
    """Seconds a step, over one sample of steps."""
    start = time.perf_counter()
    self._state, loss = self._take_steps(self._state, *self._data, 0, self._steps, *self._images)
    loss.block_until_ready()
    return (time.perf_counter() - start) / self._steps
