"""The protocol of an experiment, which is the same for every method.

1. A tenth of the training images, drawn class by class with a fixed seed, is held out: nothing
   trains on it.
2. The learning rate of each method at each batch size is selected on the held-out images. Each rate
   of the grid gets one run from seed 0, as long as the tested runs, or shorter where the experiment
   says so. `selection` defines the winner. If a method has variants, each of them is tried with
   each rate.
3. The runs with the selected rate have the seeds 1, 2, 3, ... and are tested after each epoch.
4. If the experiment asks for it, the time of a training step is measured, all methods in turn.

The test images select nothing.
"""

import numpy as np

from bnp_experiments import selection, timing, training, trials, unit_conditioning
from bnp_experiments.evaluation import evaluate
from bnp_experiments.methods import SGD, Method
from bnp_experiments.trainer import Trainer, work

_SGD_RATE_FOR_TIMING = 0.01


def run(trainer: Trainer) -> None:
  """Run the missing parts of an experiment."""
  experiment = trainer.experiment
  cells = [(batch, method) for batch in experiment.batch_sizes for method in experiment.methods]
  trainer.start(sum(_work_left(trainer, method, batch_size) for batch_size, method in cells))
  rates = {}
  for batch_size, method in cells:
    variant, rates[method, batch_size] = trials.select(trainer, method, batch_size)
    _train_and_test(trainer, variant, batch_size, rates[method, batch_size])
    if experiment.picture == "conditioning":
      _measure_conditioning(trainer, variant, batch_size, rates[method, batch_size])
  if experiment.timed:
    for batch_size in experiment.batch_sizes:
      _time_steps(trainer, batch_size, {m: rates[m, batch_size] for m in experiment.timed_methods})


def _train_and_test(trainer: Trainer, method: Method, batch_size: int, rate: float) -> None:
  settings = trainer.experiment.epoch_settings(method, batch_size, rate)
  length, done = trainer.experiment.length, len(trainer.results.find(**settings))
  if done >= length:
    return
  setup = trainer.setup(method, batch_size)
  seeds = trainer.experiment.seed_list
  lanes = training.make_lanes(seeds, [rate] * len(seeds))
  where = f"{method.label}, batch size {batch_size}"
  trainer.describe(f"{where}, epoch {done + 1}")
  for epoch, state, loss in trainer.epochs(setup, settings, lanes, length, done):
    # A run that was killed between the record and the checkpoint repeats this epoch.
    if epoch > done:
      accuracy = evaluate(setup, state, *trainer.splits.test).accuracy
      trainer.results.append(
        settings
        | {"epoch": epoch, "steps": setup.steps}
        | {"train_loss": loss.tolist(), "test_accuracy": accuracy.tolist()}
      )
    trainer.describe(f"{where}, epoch {epoch + 1}")
  last = trainer.results.find(**settings, epoch=length)[0]
  trainer.print(
    f"batch size {batch_size:<4} {method.label:20} learning rate {rate:<7g} "
    f"test accuracy {np.mean(last['test_accuracy']):.1%}"
  )


def _time_steps(trainer: Trainer, batch_size: int, rates: dict[Method, float]) -> None:
  settings = trainer.experiment.time_settings(batch_size)
  if not rates or trainer.results.find(**settings):
    return
  trainer.describe(f"timing, batch size {batch_size}")
  rates = {SGD: _SGD_RATE_FOR_TIMING} | rates
  setups = {trainer.setup(method, batch_size): rate for method, rate in rates.items()}
  times = timing.step_times(setups, trainer.splits.fit)
  seconds = {setup.method.name: times for setup, times in times.items()}
  relative = timing.relative_to_sgd(seconds)
  trainer.results.append(settings | {"seconds": seconds, "relative_to_sgd": relative})


def _measure_conditioning(trainer: Trainer, method: Method, batch_size: int, rate: float) -> None:
  for seed in trainer.experiment.seed_list:
    settings = trainer.experiment.conditioning_settings(method, batch_size, rate) | {"seed": seed}
    if not trainer.results.find(**settings):
      trainer.describe(f"{method.label}, batch size {batch_size}, condition numbers, seed {seed}")
      setup, epochs = trainer.setup(method, batch_size), trainer.experiment.length
      measured = unit_conditioning.trace(setup, rate, epochs, trainer.splits.fit, seed)
      trainer.results.append(settings | measured)


def _work_left(trainer: Trainer, method: Method, batch_size: int) -> int:
  experiment, results = trainer.experiment, trainer.results
  epochs = experiment.seeds * experiment.length
  if selected := selection.chosen(experiment, results, method, batch_size):
    settings = experiment.epoch_settings(selected[0], batch_size, selected[1]["rate"])
    epochs -= experiment.seeds * min(experiment.length, len(results.find(**settings)))
  else:
    epochs += trials.epochs_left(trainer, method, batch_size)
  return work(batch_size, epochs * (len(trainer.splits.fit.labels) // batch_size))
