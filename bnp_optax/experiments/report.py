"""What came out: the records of an experiment gathered, and shown as tables."""

from collections.abc import Iterator
import pathlib

import numpy as np
from rich.table import Table

from bnp_optax.experiments.experiment import SCALES, Experiment
from bnp_optax.experiments.methods import SGD
from bnp_optax.experiments.outcomes import Outcome, percent
from bnp_optax.experiments.registry import EXPERIMENTS
from bnp_optax.experiments.results import FILE, Record, Results, read_results


def outcomes(experiment: Experiment, results: Results) -> list[Outcome]:
  """Gathers what has been completed of an experiment, from its records alone."""
  gathered = []
  for batch_size in experiment.batch_sizes:
    times = results.find(**experiment.time_settings(batch_size))
    measured = times[-1] if times else {"seconds": {}, "relative_to_sgd": {}}
    for method in experiment.methods:
      chosen: Record = {"rate": min(experiment.rates), "validation_accuracy": []}
      if len(experiment.rates) > 1:
        records = results.find(**experiment.rate_settings(method, batch_size))
        if not records:
          continue
        chosen = records[0]
      epochs = results.find(**experiment.epoch_settings(method, batch_size, chosen["rate"]))
      epochs = epochs[: experiment.length]
      if len(epochs) < experiment.length:
        continue
      gathered.append(
        Outcome(
          method,
          batch_size,
          experiment.rates,
          np.array(chosen["validation_accuracy"], float),
          chosen["rate"],
          epochs[0].get("steps", 0),
          np.array([epoch["train_loss"] for epoch in epochs], float),
          np.array([epoch["test_accuracy"] for epoch in epochs], float),
          np.array(measured["seconds"].get(method.name, []), float),
          np.array(measured["relative_to_sgd"].get(method.name, []), float),
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
  table = Table(
    *columns, title=caption(experiment), caption=_note(experiment), caption_justify="left"
  )
  markdown = [f"| {' | '.join(columns)} |", "| --- " + "| --: " * (len(columns) - 1) + "|"]
  for method in experiment.methods:
    texts = [_cell(cells.get((method, batch_size))) for batch_size in experiment.batch_sizes]
    table.add_row(method.label, *("\n".join(lines) for lines in texts), end_section=True)
    markdown.append(f"| {method.label} | {' | '.join('<br>'.join(lines) for lines in texts)} |")
  return table, "\n".join([caption(experiment), "", *markdown, "", _note(experiment), ""])


def claims(folder: pathlib.Path) -> tuple[Table, str]:
  """Says of each claim whether it holds.

  Args:
    folder: The folder of the results of all experiments.

  Returns:
    The table for the terminal, and the same table in Markdown.
  """
  columns = ("experiment", "claim", "measured", "verdict")
  table = Table(*columns)
  markdown = [f"| {' | '.join(columns)} |", "| --- | --- | --- | --- |"]
  for experiment in EXPERIMENTS.values():
    for row in _judged(experiment, folder):
      table.add_row(*row)
      markdown.append(f"| {' | '.join(row)} |")
  return table, "\n".join([*markdown, ""])


def _judged(experiment: Experiment, folder: pathlib.Path) -> Iterator[tuple[str, str, str, str]]:
  """One row for each claim, by the results at the largest scale that there are results of."""
  shown, gathered = experiment, None
  for scale in SCALES:
    if (folder / experiment.at(scale).folder / FILE).exists():
      shown = experiment.at(scale)
      gathered = outcomes(shown, read_results(folder / shown.folder))
  setting = "no results" if gathered is None else caption(shown)
  for claim in shown.claims:
    judgement = claim.judge(gathered or [])
    name = f"{shown.name}, {shown.place}" if shown.place else shown.name
    yield f"{name} ({setting})", claim.text, judgement.measured, judgement.verdict


def caption(experiment: Experiment) -> str:
  """The setting of an experiment, in one line."""
  runs, epochs = count(experiment.seeds, "seed"), count(experiment.length, "epoch")
  images = "" if experiment.images is None else f" ({experiment.images:,} training images)"
  return f"{experiment.dataset}{images}, {experiment.network.title}, {epochs}, {runs}"


def count(number: int, thing: str) -> str:
  """Such as "1 epoch" and "3 epochs"."""
  return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def _note(experiment: Experiment) -> str:
  note = "Test accuracy in % after the last epoch: mean (range) over the seeds."
  if len(experiment.rates) > 1:
    note += " Learning rate chosen on held-out training images; * is at an edge of the grid."
  if experiment.timed:
    note += " Time of a step relative to plain SGD: median (quartiles)."
  return note


def _cell(outcome: Outcome | None) -> list[str]:
  if outcome is None:
    return ["not run"]
  diverged = "" if np.isfinite(outcome.train_loss[-1]).all() else " diverged"
  lines = [
    percent(outcome.final) + diverged,
    f"rate {outcome.rate:g}{'*' if outcome.at_edge else ''}",
  ]
  if len(outcome.relative_times):
    low, middle, high = np.percentile(outcome.relative_times, [25, 50, 75])
    quartiles = f" ({low:.2f}–{high:.2f})" if outcome.method != SGD else ""
    lines.append(f"{middle:.2f}x" + quartiles)
  return lines
