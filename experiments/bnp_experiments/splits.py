"""The training, held-out and test examples of an experiment."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from sklearn.model_selection import train_test_split

from bnp_experiments.data import DataSet
from bnp_experiments.experiment import Experiment
from bnp_experiments.training import Examples

_HELD_OUT = 0.1


class Splits(NamedTuple):
  """The examples of an experiment.

  Attributes:
    fit: The training examples.
    held_out: The training examples that select the learning rates; nothing trains on them.
    test: The test examples.
  """

  fit: Examples
  held_out: Examples
  test: Examples


def make_splits(experiment: Experiment, dataset: DataSet) -> Splits:
  """Hold out a tenth of the training examples, class by class with a fixed seed.

  Raises:
    UsageError: There are fewer examples than the largest batch needs.
  """
  train = _sample(dataset.y_train, experiment.images)
  fit, held_out = _split(train, dataset.y_train[train], _HELD_OUT)
  test = _sample(dataset.y_test, experiment.test_images)
  experiment.check_fits(len(fit))
  return Splits(
    Examples(dataset.x_train.take(fit, axis=0), dataset.y_train[fit]),
    Examples(dataset.x_train.take(held_out, axis=0), dataset.y_train[held_out]),
    Examples(dataset.x_test.take(test, axis=0), dataset.y_test[test]),
  )


def _sample(labels: np.ndarray, count: int | None) -> np.ndarray:
  """Draw the indices of `count` examples, class by class with a fixed seed; all for None."""
  indices = np.arange(len(labels))
  if count is None or count >= len(indices):
    return indices
  return np.sort(_split(indices, labels, len(indices) - count)[0])


def _split(indices: np.ndarray, labels: np.ndarray, second: float) -> Sequence[Any]:
  """Split indices in two. `second` is the size of the second part: an int, or a fraction."""
  count = second if isinstance(second, int) else round(second * len(indices))
  # Class by class, if each class fits into both parts. The labels of a text are characters.
  by_class = labels.ndim == 1 and len(np.unique(labels)) <= min(count, len(indices) - count)
  return train_test_split(
    indices, test_size=second, stratify=labels if by_class else None, random_state=0
  )
