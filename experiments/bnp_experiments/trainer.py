"""A trainer: the training runs of one experiment, with checkpoints and progress."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from rich.progress import Progress

from bnp_experiments import training
from bnp_experiments.checkpoints import Checkpoints
from bnp_experiments.data import DataSet
from bnp_experiments.experiment import Experiment
from bnp_experiments.methods import SGD, Method
from bnp_experiments.results import Results
from bnp_experiments.splits import make_splits


class Trainer:
  """Trains the methods of one experiment on its data set.

  Attributes:
    experiment: The experiment.
    splits: Its examples.
    results: The records so far; new ones are appended.
  """

  def __init__(
    self,
    experiment: Experiment,
    dataset: DataSet,
    results: Results,
    checkpoints: Checkpoints,
    progress: Progress,
  ) -> None:
    """Split the examples.

    Args:
      experiment: The experiment.
      dataset: Its data set.
      results: The records so far; new ones are appended.
      checkpoints: Where the training runs keep their state.
      progress: Shows the progress.

    Raises:
      UsageError: There are fewer examples than the largest batch needs.
    """
    self.experiment = experiment
    self.splits = make_splits(experiment, dataset)
    self.results = results
    self._classes = dataset.classes
    # Files of images are read batch by batch. Several accelerators share each batch.
    accelerated = jax.default_backend() != "cpu" and jax.device_count() == 1
    if self.setup(SGD, 1).stacked or (accelerated and isinstance(dataset.x_train, np.ndarray)):
      self.splits = self.splits._replace(fit=jax.device_put(self.splits.fit))
    self._checkpoints = checkpoints
    self._progress = progress
    self._task = progress.add_task("starting", total=None)

  def setup(self, method: Method, batch_size: int) -> training.Setup:
    """Return the setup of a method at a batch size."""
    count = len(self.splits.fit.labels)
    return self.experiment.setup(method, batch_size, count, self._classes)

  def epochs(
    self,
    setup: training.Setup,
    settings: dict[str, Any],
    lanes: training.Lanes,
    length: int,
    done: int,
  ) -> Iterator[tuple[int, training.LaneState, np.ndarray]]:
    """Train, from the newest checkpoint that is not after `done` epochs.

    Args:
      setup: The setup of the training.
      settings: The settings that identify the runs.
      lanes: The runs.
      length: Number of epochs.
      done: Number of epochs that have records.

    Yields:
      The number of each epoch, and the state of the lanes and their training loss after it.
    """
    state = training.init(setup, lanes, self.splits.fit.images)
    kept, state = self._checkpoints.restore(settings, done, state)
    for epoch in range(kept + 1, length + 1):
      state, loss = training.train_epoch(
        *(setup, state, lanes, epoch, self.splits.fit),
        on_steps=lambda steps: self.advance(setup.batch_size, steps),
      )
      yield epoch, state, loss
      self._checkpoints.save(settings, epoch, state)

  def start(self, work: int) -> None:
    """Set the total work, in the units of `work`."""
    self._progress.update(self._task, total=work)

  def advance(self, batch_size: int, steps: int) -> None:
    """Count steps as done."""
    self._progress.update(self._task, advance=work(batch_size, steps))

  def describe(self, text: str) -> None:
    """Show the current activity."""
    self._progress.update(self._task, description=text)

  def print(self, line: str) -> None:
    """Print a line above the progress."""
    self._progress.console.print(line, highlight=False)


def work(batch_size: int, steps: int) -> int:
  """Return the approximate cost of steps: that of each image, and of reading the weights."""
  return steps * (batch_size + 4)
