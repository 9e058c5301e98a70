"""The selection of learning rates and variants by trial runs, judged on held-out examples."""

from typing import Any

import numpy as np

from bnp_experiments import selection, training
from bnp_experiments.evaluation import evaluate
from bnp_experiments.methods import Method
from bnp_experiments.results import Record
from bnp_experiments.trainer import Trainer

_SEED = 0


def select(trainer: Trainer, method: Method, batch_size: int) -> tuple[Method, float]:
  """Select the variant of a method and its learning rate; run the trials that are missing."""
  for variant in method.variants or (method,):
    if len(trainer.experiment.rates) > 1 or method.variants:
      _select_rate(trainer, variant, batch_size)
  selected = selection.chosen(trainer.experiment, trainer.results, method, batch_size)
  assert selected is not None
  return selected[0], selected[1]["rate"]


def epochs_left(trainer: Trainer, method: Method, batch_size: int) -> int:
  """Return the number of epochs of all trials that are missing, summed over lanes."""
  experiment, results = trainer.experiment, trainer.results
  left = 0
  for variant in method.variants or (method,):
    if results.find(**experiment.rate_settings(variant, batch_size)):
      continue
    for rates in _stacks(trainer, variant, batch_size):
      done = results.find(**_settings(trainer, variant, batch_size, rates))
      if not (done and done[-1]["ended"]):
        epochs = experiment.selection_length - len(done)
        left += _lane_count(trainer, variant, batch_size) * epochs
  return left


def _select_rate(trainer: Trainer, method: Method, batch_size: int) -> None:
  rates = trainer.experiment.rates
  settings = trainer.experiment.rate_settings(method, batch_size)
  if trainer.results.find(**settings):
    return
  trainer.describe(f"{method.label}, batch size {batch_size}, choosing the rate")
  tried = [
    _try_rates(trainer, method, batch_size, stack) for stack in _stacks(trainer, method, batch_size)
  ]
  accuracy, loss, diverged = (np.concatenate(parts) for parts in zip(*tried, strict=True))
  held_out = len(trainer.splits.held_out.labels)
  rate = rates[selection.winner(accuracy, loss, diverged, held_out)]
  trainer.results.append(
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


def _lane_count(trainer: Trainer, method: Method, batch_size: int) -> int:
  """Return the number of rates that are tried together."""
  # With as many lanes as there are seeds, the tested runs use the same compiled program.
  return trainer.experiment.seeds if trainer.setup(method, batch_size).stacked else 1


def _stacks(trainer: Trainer, method: Method, batch_size: int) -> list[tuple[float, ...]]:
  rates, size = trainer.experiment.rates, _lane_count(trainer, method, batch_size)
  return [rates[start : start + size] for start in range(0, len(rates), size)]


def _settings(
  trainer: Trainer, method: Method, batch_size: int, rates: tuple[float, ...]
) -> dict[str, Any]:
  settings = trainer.experiment.rate_settings(method, batch_size)
  lanes = _lane_count(trainer, method, batch_size)
  return settings | {"kind": "trial", "rates": list(rates), "lanes": lanes}


def _try_rates(
  trainer: Trainer, method: Method, batch_size: int, rates: tuple[float, ...]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Return accuracy and loss on the held-out examples, and divergence, of each rate."""
  count = _lane_count(trainer, method, batch_size)
  padded = rates + rates[-1:] * (count - len(rates))
  settings = _settings(trainer, method, batch_size, rates)
  done = trainer.results.find(**settings)
  if not (done and done[-1]["ended"]):
    lanes = training.make_lanes([_SEED] * count, padded)
    _run_trial(trainer, trainer.setup(method, batch_size), settings, lanes, done)
    done = trainer.results.find(**settings)
  tried = slice(len(rates))
  return (
    np.array(done[-1]["accuracy"], float)[tried],
    np.array(done[-1]["loss"], float)[tried],
    np.array(done[-1]["diverged"])[tried],
  )


def _run_trial(
  trainer: Trainer,
  setup: training.Setup,
  settings: dict[str, Any],
  lanes: training.Lanes,
  done: list[Record],
) -> None:
  diverged = np.zeros(len(lanes.seeds), bool) | (done[-1]["diverged"] if done else False)
  length = trainer.experiment.selection_length
  for epoch, state, loss in trainer.epochs(setup, settings, lanes, length, len(done)):
    diverged |= ~np.isfinite(loss)
    # Once all lanes have diverged, further epochs give no information.
    ended = epoch == length or bool(diverged.all())
    outcome = {}
    if ended:
      evaluation = evaluate(setup, state, *trainer.splits.held_out)
      diverged |= ~np.isfinite(evaluation.loss)
      outcome = {"accuracy": evaluation.accuracy.tolist(), "loss": evaluation.loss.tolist()}
    if epoch > len(done):
      outcome |= {"epoch": epoch, "ended": ended, "diverged": diverged.tolist()}
      trainer.results.append(settings | outcome)
    if ended:
      trainer.advance(setup.batch_size, (length - epoch) * len(lanes.seeds) * setup.steps)
      return
