"""How long a training step takes, method against method."""

import functools
import time
from typing import Any

import jax
import numpy as np

from bnp_experiments import training

_ROUNDS = 25
_SECONDS_A_SAMPLE = 0.05
_MAX_STEPS = 5000


def step_times(
  setups: dict[training.Setup, float], images: Any, labels: Any
) -> dict[training.Setup, list[float]]:
  """Measures the time of a training step, in rounds of all setups in turn.

  In turn, so that whatever else the machine does meets all of them alike: compare them within a
  round.

  Args:
    setups: What to measure, and the learning rate of each.
    images: The training images.
    labels: Their labels.

  Returns:
    For each setup, the seconds a step took, one number a round.
  """
  samplers = {setup: _Sampler(setup, rate, images, labels) for setup, rate in setups.items()}
  rounds = [{s: sampler.sample() for s, sampler in samplers.items()} for _ in range(_ROUNDS)]
  return {setup: [seconds[setup] for seconds in rounds] for setup in setups}


class _Sampler:
  """Times the training steps of one setup."""

  def __init__(self, setup: training.Setup, rate: float, images: Any, labels: Any) -> None:
    lanes = training.make_lanes([0], [rate])
    # One run by itself, as a user has it: stacks of one lane are slower than none.
    self._state = jax.tree.map(lambda x: x[0], training.init(setup, lanes, images))
    rows = np.arange(_MAX_STEPS * setup.batch_size, dtype=np.int32) % len(images)
    if setup.stacked:
      take_steps = jax.jit(functools.partial(training.take_steps, setup), donate_argnums=0)
      rows = jax.device_put(rows)
    else:
      take_steps = functools.partial(training.take_steps_in_turn, setup)
    self._take_steps = take_steps
    self._run = (lanes.seeds[0], lanes.rates[0], rows)
    self._images = (images, labels)
    self._steps = 1
    self.sample()
    # Once more, now that the program is compiled, to see how many steps make a sample.
    self._steps = 5
    self._steps = min(_MAX_STEPS, max(1, round(_SECONDS_A_SAMPLE / self.sample())))

  def sample(self) -> float:
    """Seconds a step, over one sample of steps."""
    start = time.perf_counter()
    self._state, loss = self._take_steps(self._state, *self._run, 1, 0, self._steps, *self._images)
    loss.block_until_ready()
    return (time.perf_counter() - start) / self._steps
