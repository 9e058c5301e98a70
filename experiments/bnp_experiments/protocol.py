"""How an experiment is run, the same way for every method.

1. A tenth of the training images, drawn class by class with a fixed seed, is held out: nothing
   trains on it.
2. The learning rate of each method at each batch size is chosen on the held-out images. Each rate
   of the grid gets one run from seed 0, as long as the runs that the rate is for, or shorter where
   the experiment says so. `selection` says which one wins. Where a method has variants, each of
   them is tried with each rate.
3. The runs with the chosen rate have the seeds 1, 2, 3, ... and are tested after each epoch.
4. The time of a training step is measured, if the experiment asks for it, all methods in turn.

The test images choose nothing.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.progress import Progress
from sklearn.model_selection import train_test_split

from bnp_experiments import selection, timing, training, unit_conditioning
from bnp_experiments.checkpoints import Checkpoints
from bnp_experiments.data import DataSet
from bnp_experiments.evaluation import evaluate
from bnp_experiments.experiment import Experiment
from bnp_experiments.methods import SGD, Method
from bnp_experiments.results import Record, Results

_HELD_OUT = 0.1
_SELECTION_SEED = 0
_SGD_RATE_FOR_TIMING = 0.01


class _Labelled(NamedTuple):
  images: Any
  labels: Any


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
    rows = _sample(dataset.y_train, experiment.images)
    fit, held_out = _split(rows, dataset.y_train[rows], _HELD_OUT)
    test = _sample(dataset.y_test, experiment.test_images)
    experiment.check_fits(len(fit))
    self._experiment = experiment
    self._classes = dataset.classes
    self._fit = _Labelled(dataset.x_train.take(fit, axis=0), dataset.y_train[fit])
    self._held_out = _Labelled(dataset.x_train.take(held_out, axis=0), dataset.y_train[held_out])
    self._test = _Labelled(dataset.x_test.take(test, axis=0), dataset.y_test[test])
    if self._setup(SGD, 1).stacked:
      self._fit, self._held_out, self._test = jax.device_put(
        (self._fit, self._held_out, self._test)
      )
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
      variant, rates[method, batch_size] = self._choose(method, batch_size)
      self._train(variant, batch_size, rates[method, batch_size])
      if experiment.picture == "conditioning":
        self._measure_conditioning(variant, batch_size, rates[method, batch_size])
    if experiment.timed:
      for batch_size in experiment.batch_sizes:
        self._time_steps(batch_size, {m: rates[m, batch_size] for m in experiment.methods})

  def _setup(self, method: Method, batch_size: int) -> training.Setup:
    return self._experiment.setup(method, batch_size, len(self._fit.labels), self._classes)

  def _choose(self, method: Method, batch_size: int) -> tuple[Method, float]:
    """The variant of a method and the learning rate that the held-out images choose."""
    for variant in method.variants or (method,):
      if len(self._experiment.rates) > 1 or method.variants:
        self._choose_rate(variant, batch_size)
    chosen = selection.chosen(self._experiment, self._results, method, batch_size)
    assert chosen is not None
    return chosen[0], chosen[1]["rate"]

  def _choose_rate(self, method: Method, batch_size: int) -> None:
    rates = self._experiment.rates
    settings = self._experiment.rate_settings(method, batch_size)
    if self._results.find(**settings):
      return
    self._describe(method, batch_size, "choosing the rate")
    tried = [
      self._try_rates(method, batch_size, stack) for stack in self._stacks(method, batch_size)
    ]
    accuracy, loss, diverged = (np.concatenate(parts) for parts in zip(*tried, strict=True))
    held_out = len(self._held_out.labels)
    rate = rates[selection.winner(accuracy, loss, diverged, held_out)]
    self._results.append(
      settings
      | {
        "validation_accuracy": accuracy.tolist(),
        "validation_loss": loss.tolist(),
        "diverged": diverged.tolist(),
        "rate": rate,
        "at_edge": rate in (min(rates), max(rates)),
        "held_out": held_out,
      }
    )

  def _lanes(self, method: Method, batch_size: int) -> int:
    """How many rates are tried together."""
    # With as many lanes as there are seeds, one compiled program serves here and in `_train`.
    return self._experiment.seeds if self._setup(method, batch_size).stacked else 1

  def _stacks(self, method: Method, batch_size: int) -> list[tuple[float, ...]]:
    rates, size = self._experiment.rates, self._lanes(method, batch_size)
    return [rates[start : start + size] for start in range(0, len(rates), size)]

  def _trial_settings(
    self, method: Method, batch_size: int, rates: tuple[float, ...]
  ) -> dict[str, Any]:
    settings = self._experiment.rate_settings(method, batch_size)
    lanes = self._lanes(method, batch_size)
    return settings | {"kind": "trial", "rates": list(rates), "lanes": lanes}

  def _try_rates(
    self, method: Method, batch_size: int, rates: tuple[float, ...]
  ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Accuracy and loss on the held-out images, and whether training diverged, of each rate."""
    count = self._lanes(method, batch_size)
    padded = rates + rates[-1:] * (count - len(rates))
    settings = self._trial_settings(method, batch_size, rates)
    done = self._results.find(**settings)
    if not (done and done[-1]["ended"]):
      lanes = training.make_lanes([_SELECTION_SEED] * count, padded)
      self._run_trial(self._setup(method, batch_size), settings, lanes, done)
      done = self._results.find(**settings)
    tried = slice(len(rates))
    return (
      np.array(done[-1]["accuracy"], float)[tried],
      np.array(done[-1]["loss"], float)[tried],
      np.array(done[-1]["diverged"])[tried],
    )

  def _run_trial(
    self,
    setup: training.Setup,
    settings: dict[str, Any],
    lanes: training.Lanes,
    done: list[Record],
  ) -> None:
    diverged = np.zeros(len(lanes.seeds), bool) | (done[-1]["diverged"] if done else False)
    length = self._experiment.selection_length
    for epoch, state, loss in self._epochs(setup, settings, lanes, length, len(done)):
      diverged |= ~np.isfinite(loss)
      # Where all have diverged, the rest of the epochs would tell nothing.
      ended = epoch == length or bool(diverged.all())
      outcome = {}
      if ended:
        evaluation = evaluate(setup, state, *self._held_out)
        diverged |= ~np.isfinite(evaluation.loss)
        outcome = {"accuracy": evaluation.accuracy.tolist(), "loss": evaluation.loss.tolist()}
      if epoch > len(done):
        outcome |= {"epoch": epoch, "ended": ended, "diverged": diverged.tolist()}
        self._results.append(settings | outcome)
      if ended:
        self._worked(setup.batch_size, (length - epoch) * len(lanes.seeds) * setup.steps)
        return

  def _epochs(
    self,
    setup: training.Setup,
    settings: dict[str, Any],
    lanes: training.Lanes,
    length: int,
    done: int,
  ) -> Iterator[tuple[int, training.LaneState, np.ndarray]]:
    """Trains, from where the newest checkpoint is, which must not be after `done` epochs."""
    state = training.init(setup, lanes, self._fit.images)
    kept, state = self._checkpoints.restore(settings, done, state)
    for epoch in range(kept + 1, length + 1):
      state, loss = training.train_epoch(
        *(setup, state, lanes, epoch, *self._fit),
        on_steps=lambda steps: self._worked(setup.batch_size, steps),
      )
      yield epoch, state, loss
      self._checkpoints.save(settings, epoch, state)

  def _train(self, method: Method, batch_size: int, rate: float) -> None:
    settings = self._experiment.epoch_settings(method, batch_size, rate)
    length, done = self._experiment.length, len(self._results.find(**settings))
    if done >= length:
      return
    setup = self._setup(method, batch_size)
    seeds = self._experiment.seed_list
    lanes = training.make_lanes(seeds, [rate] * len(seeds))
    self._describe(method, batch_size, f"epoch {done + 1}")
    for epoch, state, loss in self._epochs(setup, settings, lanes, length, done):
      # Killed after the record and before the checkpoint, a run does this epoch once more.
      if epoch > done:
        accuracy = evaluate(setup, state, *self._test).accuracy
        self._results.append(
          settings
          | {"epoch": epoch, "steps": setup.steps}
          | {"train_loss": loss.tolist(), "test_accuracy": accuracy.tolist()}
        )
      self._describe(method, batch_size, f"epoch {epoch + 1}")
    last = self._results.find(**settings, epoch=length)[0]
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
    setups = {self._setup(method, batch_size): rate for method, rate in rates.items()}
    times = timing.step_times(setups, *self._fit)
    seconds = {setup.method.name: times for setup, times in times.items()}
    relative = {
      name: [time / sgd for time, sgd in zip(times, seconds[SGD.name], strict=True)]
      for name, times in seconds.items()
    }
    self._results.append(settings | {"seconds": seconds, "relative_to_sgd": relative})

  def _measure_conditioning(self, method: Method, batch_size: int, rate: float) -> None:
    settings = self._experiment.conditioning_settings(method, batch_size, rate)
    if not self._results.find(**settings):
      self._describe(method, batch_size, "condition numbers")
      setup, epochs = self._setup(method, batch_size), self._experiment.length
      measured = unit_conditioning.trace(setup, rate, epochs, *self._fit)
      self._results.append(settings | measured)

  def _describe(self, method: Method, batch_size: int, doing: str) -> None:
    text = f"{method.label}, batch size {batch_size}, {doing}"
    self._progress.update(self._task, description=text)

  def _worked(self, batch_size: int, steps: int) -> None:
    self._progress.update(self._task, advance=_work(batch_size, steps))

  def _work_left(self, method: Method, batch_size: int) -> int:
    experiment = self._experiment
    epochs = experiment.seeds * experiment.length
    if chosen := selection.chosen(experiment, self._results, method, batch_size):
      settings = experiment.epoch_settings(chosen[0], batch_size, chosen[1]["rate"])
      epochs -= experiment.seeds * min(experiment.length, len(self._results.find(**settings)))
    else:
      epochs += sum(
        self._lanes(variant, batch_size) * self._trial_left(variant, batch_size, stack)
        for variant in method.variants or (method,)
        if not self._results.find(**experiment.rate_settings(variant, batch_size))
        for stack in self._stacks(variant, batch_size)
      )
    return _work(batch_size, epochs * (len(self._fit.labels) // batch_size))

  def _trial_left(self, method: Method, batch_size: int, rates: tuple[float, ...]) -> int:
    done = self._results.find(**self._trial_settings(method, batch_size, rates))
    return 0 if done and done[-1]["ended"] else self._experiment.selection_length - len(done)


def _work(batch_size: int, steps: int) -> int:
  """What steps cost, as far as the time that is left can be told beforehand.

  A step costs something for each image, and something for reading and writing the weights.
  """
  return steps * (batch_size + 4)


def _sample(labels: np.ndarray, count: int | None) -> np.ndarray:
  """So many rows, drawn class by class with a fixed seed; all, if there is no count."""
  rows = np.arange(len(labels))
  if count is None or count >= len(rows):
    return rows
  return np.sort(_split(rows, labels, len(rows) - count)[0])


def _split(rows: np.ndarray, labels: np.ndarray, second: float) -> Sequence[Any]:
  """Splits rows in two, of which the second has that many (an int), or that part of them."""
  count = second if isinstance(second, int) else round(second * len(rows))
  # Class by class, if each can have a row in both; the labels of a text are those of characters.
  by_class = labels.ndim == 1 and len(np.unique(labels)) <= min(count, len(rows) - count)
  return train_test_split(
    rows, test_size=second, stratify=labels if by_class else None, random_state=0
  )
