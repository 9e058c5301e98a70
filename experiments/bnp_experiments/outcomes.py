"""What came out of an experiment, one value for each method and batch size."""

from collections.abc import Mapping, Sequence
import dataclasses

import numpy as np

from bnp_experiments.methods import Method

# With room for the rounding of a difference of two accuracies.
_POINT = 0.01 + 1e-9


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What one method reached at one batch size.

  Attributes:
    method: The method.
    batch_size: The batch size.
    rates: The learning rates there were to choose from.
    validation_accuracy: What each of them reached on the held-out images; empty if there was
      nothing to choose.
    rate: The learning rate chosen.
    steps: Steps of an epoch.
    train_loss: Mean training loss of each epoch, `[epochs, seeds]`; NaN where it diverged.
    test_accuracy: Test accuracy after each epoch, `[epochs, seeds]`.
    seconds: Time of a step, one number for each round of measuring.
    relative_times: The same over that of plain SGD.
    conditioning: The condition numbers that `unit_conditioning.trace` gives; empty if they were not
      measured.
    variant: Which variant of the method was chosen; empty if it has none.
    decays: After which epochs the learning rate was divided by ten.
  """

  method: Method
  batch_size: int
  rates: tuple[float, ...]
  validation_accuracy: np.ndarray
  rate: float
  steps: int
  train_loss: np.ndarray
  test_accuracy: np.ndarray
  seconds: np.ndarray
  relative_times: np.ndarray
  conditioning: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
  variant: str = ""
  decays: tuple[int, ...] = ()

  @property
  def at_edge(self) -> bool:
    """Whether the chosen rate is the lowest or the highest that there was to choose from."""
    return len(self.rates) > 1 and self.rate in (min(self.rates), max(self.rates))

  @property
  def final(self) -> np.ndarray:
    """Test accuracy after the last epoch, of each seed."""
    return self.test_accuracy[-1]

  @property
  def early(self) -> np.ndarray:
    """Mean test accuracy over the first third of the epochs, of each seed.

    Of those before the first decay of the learning rate alone.
    """
    third = -(-len(self.test_accuracy) // 3)
    return self.test_accuracy[: min((*self.decays, third))].mean(axis=0)

  @property
  def gain(self) -> np.ndarray:
    """How much test accuracy each seed gains from the first decay of the learning rate on."""
    before = min((*self.decays, len(self.test_accuracy)))
    return self.final - self.test_accuracy[before - 1]

  def first_epoch(self, accuracy: float) -> float:
    """The epoch after which the mean over the seeds reaches an accuracy; infinite if none."""
    reached = self.test_accuracy.mean(axis=1) >= accuracy
    return float(np.argmax(reached)) + 1 if reached.any() else np.inf


def find(outcomes: Sequence[Outcome], method: str, batch_size: int | None) -> Outcome | None:
  """The outcome of a method, if it was run; `batch_size` may be None where there is only one."""
  for outcome in outcomes:
    if outcome.method.name == method and batch_size in (None, outcome.batch_size):
      return outcome
  return None


def plateau(rates: Sequence[float], accuracy: np.ndarray) -> tuple[float, float]:
  """Between which learning rates a method does as well as at its best, to within a point.

  Nothing is said of what lies between two rates that were tried.

  Args:
    rates: The rates that were tried, in rising order.
    accuracy: What each of them reached.

  Returns:
    The lowest and the highest rate of the unbroken run of rates around the best one whose accuracy
    is at most one point below its.
  """
  best = int(np.argmax(accuracy))
  below = np.flatnonzero(accuracy < accuracy[best] - _POINT)
  low = below[below < best].max(initial=-1) + 1
  high = below[below > best].min(initial=len(rates)) - 1
  return float(rates[low]), float(rates[high])


def percent(values: np.ndarray) -> str:
  """Mean and range of accuracies, in percent."""
  if len(values) == 1:
    return f"{100 * values[0]:.1f}"
  return f"{100 * values.mean():.1f} ({100 * values.min():.1f}–{100 * values.max():.1f})"
