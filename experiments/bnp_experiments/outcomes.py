"""The outcomes of an experiment: one value for each method and batch size."""

from collections.abc import Mapping, Sequence
import dataclasses

import numpy as np

from bnp_experiments.methods import Method

# One point of accuracy, plus a tolerance for the rounding of a difference.
_POINT = 0.01 + 1e-9


@dataclasses.dataclass(frozen=True)
class Outcome:
  """The results of one method at one batch size.

  Attributes:
    method: The method.
    batch_size: The batch size.
    rates: The learning rates to choose from.
    validation_accuracy: Accuracy of each of them on the held-out images; empty if no choice was
      necessary.
    rate: The chosen learning rate.
    steps: Steps per epoch.
    train_loss: Mean training loss of each epoch, `[epochs, seeds]`; NaN where it diverged.
    test_accuracy: Test accuracy after each epoch, `[epochs, seeds]`.
    seconds: Time of a step, one number for each round of measuring.
    relative_times: The same times divided by those of plain SGD.
    conditioning: The condition numbers that `unit_conditioning.trace` returns, `[seeds,
      measurements]`; empty if they were not measured.
    variant: Label of the chosen variant of the method; empty if it has none.
    decays: The epochs after which the learning rate was divided by ten.
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
    """Whether the chosen rate is the lowest or the highest one of several."""
    return len(self.rates) > 1 and self.rate in (min(self.rates), max(self.rates))

  @property
  def final(self) -> np.ndarray:
    """Test accuracy of each seed after the last epoch."""
    return self.test_accuracy[-1]

  @property
  def early(self) -> np.ndarray:
    """Mean test accuracy of each seed over the first third of the epochs.

    Epochs after the first decay of the learning rate are left out.
    """
    third = -(-len(self.test_accuracy) // 3)
    return self.test_accuracy[: min((*self.decays, third))].mean(axis=0)

  @property
  def gain(self) -> np.ndarray:
    """Test accuracy that each seed gains after the first decay of the learning rate."""
    before = min((*self.decays, len(self.test_accuracy)))
    return self.final - self.test_accuracy[before - 1]

  def first_epoch(self, accuracy: float) -> float:
    """Return the epoch after which the mean over the seeds reaches an accuracy, or infinity."""
    reached = self.test_accuracy.mean(axis=1) >= accuracy
    return float(np.argmax(reached)) + 1 if reached.any() else np.inf


def find(outcomes: Sequence[Outcome], method: str, batch_size: int | None) -> Outcome | None:
  """Return the outcome of a method, or None if it was not run.

  Args:
    outcomes: The outcomes of an experiment.
    method: Name of the method.
    batch_size: The batch size; None for the first one.

  Returns:
    The outcome, or None.
  """
  for outcome in outcomes:
    if outcome.method.name == method and batch_size in (None, outcome.batch_size):
      return outcome
  return None


def plateau(rates: Sequence[float], accuracy: np.ndarray) -> tuple[float, float]:
  """Return the range of learning rates at which a method is within one point of its best accuracy.

  Accuracies between two rates of the grid are unknown and not considered.

  Args:
    rates: The rates of the grid, in ascending order.
    accuracy: The accuracy at each of them.

  Returns:
    The lowest and the highest of the consecutive rates around the best one whose accuracy is at
    most one point lower.
  """
  best = int(np.argmax(accuracy))
  below = np.flatnonzero(accuracy < accuracy[best] - _POINT)
  low = below[below < best].max(initial=-1) + 1
  high = below[below > best].min(initial=len(rates)) - 1
  return float(rates[low]), float(rates[high])


def percent(values: np.ndarray) -> str:
  """Format the mean and the range of accuracies, in percent."""
  if len(values) == 1:
    return f"{100 * values[0]:.1f}"
  return f"{100 * values.mean():.1f} ({100 * values.min():.1f}–{100 * values.max():.1f})"
