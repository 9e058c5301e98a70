"""How an experiment is run, the same way for every method.

1. A tenth of the training images, drawn class by class with a fixed seed, is held out: nothing
   trains on it.
2. The learning rate of each method at each batch size is chosen on the held-out images. Each rate
   of the grid gets one run from seed 0, as long as the runs that the rate is for. Of the rates
   within one standard error of the best accuracy, the one with the lowest loss wins, because so
   small a difference in accuracy is chance. A run that diverged loses to every other.
3. The runs with the chosen rate have the seeds 1, 2, 3, ... and are tested after each epoch.
4. The time of a training step is measured, all methods in turn.

The test images choose nothing.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import Progress
from sklearn.model_selection import train_test_split

from bnp_optax.experiments import timing, training
from bnp_optax.experiments.checkpoints import Checkpoints
from bnp_optax.experiments.data import DataSet
from bnp_optax.experiments.experiment import Experiment
from bnp_optax.experiments.methods import SGD, Method
from bnp_optax.experiments.results import Results

_HELD_OUT = 0.1
_SELECTION_SEED = 0
_SGD_RATE_FOR_TIMING = 0.01


class _Labelled(NamedTuple):
  images: jax.Array
  labels: jax.Array


class Run:
  """One experiment on its data set: does what has not been done yet."""

  def __init__(
    self,
    experiment: Experiment,
    dataset: DataSet,
    results: Results,
    checkpoints: Checkpoints,
    progress: Progress,
  ) -> None:
    """Holds out the images that choose the learning rates.

    Args:
      experiment: What to do.
      dataset: The data set of that experiment.
      results: What has been done; the rest is added.
      checkpoints: Where the training runs keep their state.
      progress: Shows how far the work is.

    Raises:
      UsageError: There are fewer images than the largest batch needs.
    """
    rows = np.arange(len(dataset.y_train))
    fit, held_out = train_test_split(
      rows, test_size=_HELD_OUT, stratify=dataset.y_train, random_state=0
    )
    experiment.check_fits(len(fit))
    self._experiment = experiment
    self._network = experiment.network.clone(classes=dataset.classes)
    self._fit = _on_device(dataset.x_train[fit], dataset.y_train[fit])
    self._held_out = _on_device(dataset.x_train[held_out], dataset.y_train[held_out])
    self._test = _on_device(dataset.x_test, dataset.y_test)
    self._results = results
    self._checkpoints = checkpoints
    self._progress = progress
    self._task = progress.add_task("starting", total=None)

  def __call__(self) -> None:
    """Does what has not been done yet."""
    experiment = self._experiment
    cells = [(batch, method) for batch in experiment.batch_sizes for method in experiment.methods]
    work = sum(self._work_left(method, batch_size) for batch_size, method in cells)
    self._progress.update(self._task, total=work)
    rates = {}
    for batch_size, method in cells:
      rates[method, batch_size] = self._choose_rate(method, batch_size)
      self._train(method, batch_size, rates[method, batch_size])
    for batch_size in experiment.batch_sizes:
      self._time_steps(batch_size, {m: rates[m, batch_size] for m in experiment.methods})

  def _choose_rate(self, method: Method, batch_size: int) -> float:
    settings = self._experiment.rate_settings(method, batch_size)
    if records := self._results.find(**settings):
      return records[0]["rate"]
    self._describe(method, batch_size, "choosing the rate")
    rates, size = self._experiment.rates, self._experiment.seeds
    stacks = [rates[start : start + size] for start in range(0, len(rates), size)]
    tried = [self._try_rates(method, batch_size, stack) for stack in stacks]
    accuracy, loss, diverged = (np.concatenate(parts) for parts in zip(*tried, strict=True))
    rate = rates[_winner(accuracy, loss, diverged, len(self._held_out.labels))]
    self._results.append(
      settings
      | {
        "validation_accuracy": accuracy.tolist(),
        "validation_loss": loss.tolist(),
        "diverged": diverged.tolist(),
        "rate": rate,
        "at_edge": rate in (min(rates), max(rates)),
      }
    )
    return rate

  def _try_rates(
    self, method: Method, batch_size: int, rates: tuple[float, ...]
  ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Accuracy and loss on the held-out images, and whether training diverged, of each rate."""
    # As many lanes as there are seeds: one compiled program serves here and in `_train`.
    lanes_count = self._experiment.seeds
    padded = rates + rates[-1:] * (lanes_count - len(rates))
    model = self._network.clone(norm=method.norm)
    lanes = training.make_lanes([_SELECTION_SEED] * lanes_count, padded)
    state = training.init(model, method, lanes, self._fit.images)
    diverged = np.zeros(lanes_count, bool)
    for epoch in range(1, self._experiment.length + 1):
      state, train_loss = training.train_epoch(
        *(model, method, batch_size, state, lanes, epoch, *self._fit),
        on_steps=lambda steps: self._worked(batch_size, steps),
      )
      diverged |= ~np.isfinite(train_loss)
    accuracy, loss = training.evaluate(model, state, *self._held_out)
    diverged |= ~np.isfinite(loss)
    tried = slice(len(rates))
    return accuracy[tried], loss[tried], diverged[tried]

  def _train(self, method: Method, batch_size: int, rate: float) -> None:
    settings = self._experiment.epoch_settings(method, batch_size, rate)
    done = len(self._results.find(**settings))
    if done >= self._experiment.length:
      return
    model = self._network.clone(norm=method.norm)
    seeds = self._experiment.seed_list
    lanes = training.make_lanes(seeds, [rate] * len(seeds))
    state = training.init(model, method, lanes, self._fit.images)
    kept, state = self._checkpoints.restore(settings, done, state)
    for epoch in range(kept + 1, self._experiment.length + 1):
      self._describe(method, batch_size, f"epoch {epoch}")
      state, loss = training.train_epoch(
        *(model, method, batch_size, state, lanes, epoch, *self._fit),
        on_steps=lambda steps: self._worked(batch_size, steps),
      )
      # Killed after the record and before the checkpoint, a run does this epoch once more.
      if epoch > done:
        accuracy = training.evaluate(model, state, *self._test).accuracy
        outcome = {"train_loss": loss.tolist(), "test_accuracy": accuracy.tolist()}
        self._results.append(settings | {"epoch": epoch} | outcome)
      self._checkpoints.save(settings, epoch, state)
    last = self._results.find(**settings, epoch=self._experiment.length)[0]
    self._progress.console.print(
      f"batch size {batch_size:<4} {method.label:20} learning rate {rate:<7g} "
      f"test accuracy {np.mean(last['test_accuracy']):.1%}",
      highlight=False,
    )

  def _time_steps(self, batch_size: int, rates: dict[Method, float]) -> None:
    settings = self._experiment.time_settings(batch_size)
    if self._results.find(**settings):
      return
    self._progress.update(self._task, description=f"timing, batch size {batch_size}")
    rates = {SGD: _SGD_RATE_FOR_TIMING} | rates
    seconds = timing.step_times(self._network, rates, batch_size, *self._fit)
    relative = {
      method.name: [time / sgd for time, sgd in zip(times, seconds[SGD], strict=True)]
      for method, times in seconds.items()
    }
    seconds = {method.name: times for method, times in seconds.items()}
    self._results.append(settings | {"seconds": seconds, "relative_to_sgd": relative})

  def _describe(self, method: Method, batch_size: int, doing: str) -> None:
    text = f"{method.label}, batch size {batch_size}, {doing}"
    self._progress.update(self._task, description=text)

  def _worked(self, batch_size: int, steps: int) -> None:
    self._progress.update(self._task, advance=_work(batch_size, steps))

  def _work_left(self, method: Method, batch_size: int) -> int:
    experiment = self._experiment
    epochs = experiment.length
    if chosen := self._results.find(**experiment.rate_settings(method, batch_size)):
      settings = experiment.epoch_settings(method, batch_size, chosen[0]["rate"])
      epochs -= min(epochs, len(self._results.find(**settings)))
    else:
      epochs += epochs * -(-len(experiment.rates) // experiment.seeds)
    return _work(batch_size, epochs * (len(self._fit.images) // batch_size))


def _winner(accuracy: np.ndarray, loss: np.ndarray, diverged: np.ndarray, images: int) -> int:
  """Which of the rates wins; they stand in rising order."""
  running = ~diverged if not diverged.all() else diverged
  best = accuracy[running].max()
  standard_error = np.sqrt(best * (1 - best) / images)
  contenders = running & (accuracy >= best - standard_error)
  return int(np.argmin(np.where(contenders, loss, np.inf)))


def _work(batch_size: int, steps: int) -> int:
  """What steps cost, as far as the time that is left can be told beforehand.

  A step costs something for each image, and something for reading and writing the weights.
  """
  return steps * (batch_size + 4)


def _on_device(images: np.ndarray, labels: np.ndarray) -> _Labelled:
  return _Labelled(jnp.asarray(images), jnp.asarray(labels))
