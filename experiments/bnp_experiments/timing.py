"""Times of a training step of several methods, measured side by side."""

from collections.abc import Mapping, Sequence
import functools
import time

import jax
import numpy as np

from bnp_experiments import training
from bnp_experiments.methods import SGD

_ROUNDS = 25
_SECONDS_A_SAMPLE = 0.05
_MAX_STEPS = 5000


def step_times(
  setups: dict[training.Setup, float], examples: training.Examples
) -> dict[training.Setup, list[float]]:
  """Measure the time of a training step, in rounds of all setups in turn.

  Other work on the machine affects all setups of a round alike: compare them within a round.

  Args:
    setups: The setups, with the learning rate of each.
    examples: The training examples.

  Returns:
    For each setup, the seconds of a step, one number for each round.
  """
  samplers = {setup: _Sampler(setup, rate, examples) for setup, rate in setups.items()}
  rounds = [{s: sampler.sample() for s, sampler in samplers.items()} for _ in range(_ROUNDS)]
  return {setup: [seconds[setup] for seconds in rounds] for setup in setups}


def relative_to_sgd(seconds: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
  """Return the times of each method, by its name, divided by those of SGD in the same round."""
  return {
    name: [time / sgd for time, sgd in zip(times, seconds[SGD.name], strict=True)]
    for name, times in seconds.items()
  }


class _Sampler:
  """Measures the training steps of one setup."""

  def __init__(self, setup: training.Setup, rate: float, examples: training.Examples) -> None:
    lanes = training.make_lanes([0], [rate])
    # A single run without the axis of lanes, as in a user's program; a stack of one is slower.
    self._state = jax.tree.map(lambda x: x[0], training.init(setup, lanes, examples.images))
    order = np.arange(_MAX_STEPS * setup.batch_size, dtype=np.int32) % len(examples.images)
    if isinstance(examples.images, jax.Array):
      take_steps = jax.jit(functools.partial(training.take_steps, setup), donate_argnums=0)
      order = jax.device_put(order)
    else:
      take_steps = functools.partial(training.take_steps_in_turn, setup)
    self._take_steps = take_steps
    self._run = (lanes.lane(0), order)
    self._examples = examples
    self._steps = 1
    self.sample()
    # The program is compiled now. A second sample determines the number of steps of the others.
    self._steps = 5
    self._steps = min(_MAX_STEPS, max(1, round(_SECONDS_A_SAMPLE / self.sample())))

  def sample(self) -> float:
    """Return the seconds of a step, over one sample of steps."""
    start = time.perf_counter()
    steps = training.Steps(1, 0, self._steps)
    self._state, loss = self._take_steps(self._state, *self._run, steps, self._examples)
    loss.block_until_ready()
    return (time.perf_counter() - start) / self._steps
