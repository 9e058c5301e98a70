"""The selection of the learning rate and the variant of a method from the trials."""

import numpy as np

from bnp_experiments.experiment import Experiment
from bnp_experiments.methods import Method
from bnp_experiments.results import Record, Results


def winner(accuracy: np.ndarray, loss: np.ndarray, diverged: np.ndarray, images: int) -> int:
  """Return the run with the lowest loss among those within a standard error of the best accuracy.

  A smaller difference in accuracy is not significant. A run that diverged loses to every other. Of
  equal runs, the first wins, which has the lower rate.

  Args:
    accuracy: Accuracy of each run on the held-out images.
    loss: Loss of each run on them.
    diverged: Whether each run diverged.
    images: Number of held-out images.

  Returns:
    The index of the run.
  """
  running = ~diverged if not diverged.all() else diverged
  best = accuracy[running].max()
  standard_error = np.sqrt(best * (1 - best) / images)
  contenders = running & (accuracy >= best - standard_error)
  return int(np.argmin(np.where(contenders, loss, np.inf)))


def chosen(
  experiment: Experiment, results: Results, method: Method, batch_size: int
) -> tuple[Method, Record] | None:
  """Return the selected variant of a method at a batch size; None if trials are missing.

  Args:
    experiment: The experiment.
    results: Its records so far.
    method: One of its methods.
    batch_size: One of its batch sizes.

  Returns:
    The method, or its selected variant, and the record of its trials, whose `rate` is the selected
    rate.
  """
  if len(experiment.rates) == 1 and not method.variants:
    rate = experiment.paper_rates.get(method.name, experiment.rates[0])
    return method, {"rate": rate, "validation_accuracy": []}
  candidates = []
  for variant in method.variants or (method,):
    records = results.find(**experiment.rate_settings(variant, batch_size))
    if not records:
      return None
    candidates.append((variant, records[0]))
  if len(candidates) == 1:
    return candidates[0]
  best = [record["rates"].index(record["rate"]) for _, record in candidates]
  accuracy, loss, diverged = (
    np.array([record[kind][i] for (_, record), i in zip(candidates, best, strict=True)], dtype)
    for kind, dtype in (
      ("validation_accuracy", float),
      ("validation_loss", float),
      ("diverged", bool),
    )
  )
  images = candidates[0][1]["held_out"]
  return candidates[winner(accuracy, loss, diverged, images)]
