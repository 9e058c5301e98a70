"""What came out: the records of an experiment gathered, and shown as a table."""

import dataclasses

import numpy as np
from rich.table import Table

from bnp_optax.experiments.experiment import Experiment
from bnp_optax.experiments.methods import SGD, Method
from bnp_optax.experiments.results import Results


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What one method reached at one batch size.

  Attributes:
    method: The method.
    batch_size: The batch size.
    rate: The learning rate chosen for it.
    at_edge: Whether this is the lowest or highest rate there was to choose from.
    train_loss: Mean training loss of each epoch, `[epochs, seeds]`; NaN where it diverged.
    test_accuracy: Test accuracy after each epoch, `[epochs, seeds]`.
    relative_times: Time of a step over that of plain SGD, one for each round of measuring.
  """

  method: Method
  batch_size: int
  rate: float
  at_edge: bool
  train_loss: np.ndarray
  test_accuracy: np.ndarray
  relative_times: np.ndarray


def outcomes(experiment: Experiment, results: Results) -> list[Outcome]:
  """Gathers the outcomes of an experiment that is complete, from its records alone."""
  gathered = []
  for batch_size in experiment.batch_sizes:
    (times,) = results.find(**experiment.time_settings(batch_size))
    for method in experiment.methods:
      (chosen,) = results.find(**experiment.rate_settings(method, batch_size))
      epochs = results.find(**experiment.epoch_settings(method, batch_size, chosen["rate"]))
      epochs = epochs[: experiment.length]
      gathered.append(
        Outcome(
          method,
          batch_size,
          chosen["rate"],
          chosen["at_edge"],
          np.array([epoch["train_loss"] for epoch in epochs], float),
          np.array([epoch["test_accuracy"] for epoch in epochs], float),
          np.array(times["relative_to_sgd"][method.name]),
        )
      )
  return gathered


def tables(experiment: Experiment, gathered: list[Outcome]) -> tuple[Table, str]:
  """Shows the outcomes, one row a method and one column a batch size.

  Args:
    experiment: What was run.
    gathered: What came out.

  Returns:
    The table for the terminal, and the same table in Markdown.
  """
  cells = {(outcome.method, outcome.batch_size): outcome for outcome in gathered}
  columns = ["method", *(f"batch size {batch_size}" for batch_size in experiment.batch_sizes)]
  table = Table(*columns, title=caption(experiment), caption=_NOTE, caption_justify="left")
  markdown = [f"| {' | '.join(columns)} |", "| --- " + "| --: " * (len(columns) - 1) + "|"]
  for method in experiment.methods:
    texts = [_cell(cells[method, batch_size]) for batch_size in experiment.batch_sizes]
    table.add_row(method.label, *("\n".join(lines) for lines in texts), end_section=True)
    markdown.append(f"| {method.label} | {' | '.join('<br>'.join(lines) for lines in texts)} |")
  return table, "\n".join([caption(experiment), "", *markdown, "", _NOTE, ""])


def caption(experiment: Experiment) -> str:
  """The setting of an experiment, in one line."""
  runs = "1 seed" if experiment.seeds == 1 else f"{experiment.seeds} seeds"
  epochs = "1 epoch" if experiment.length == 1 else f"{experiment.length} epochs"
  return f"{experiment.dataset}, {experiment.network.title}, {epochs}, {runs}"


_NOTE = (
  "Test accuracy in % after the last epoch: mean (range) over the seeds. Learning rate chosen on "
  "held-out training images; * is at an edge of the grid. Time of a step relative to plain SGD: "
  "median (quartiles)."
)


def _cell(outcome: Outcome) -> list[str]:
  last = 100 * outcome.test_accuracy[-1]
  low, middle, high = np.percentile(outcome.relative_times, [25, 50, 75])
  diverged = "" if np.isfinite(outcome.train_loss[-1]).all() else " diverged"
  return [
    f"{last.mean():.1f} ({last.min():.1f}–{last.max():.1f}){diverged}",
    f"rate {outcome.rate:g}{'*' if outcome.at_edge else ''}",
    f"{middle:.2f}x" + (f" ({low:.2f}–{high:.2f})" if outcome.method != SGD else ""),
  ]
