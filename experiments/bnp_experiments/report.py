"""The outcomes of experiments, gathered from their records and formatted as tables."""

import collections
import dataclasses
import pathlib

import numpy as np
from rich.table import Table

from bnp_experiments import selection
from bnp_experiments.catalogue import EXPERIMENTS
from bnp_experiments.claims import TRAINS, Claim, Judgement
from bnp_experiments.experiment import SCALES, Experiment
from bnp_experiments.methods import SGD, Method
from bnp_experiments.outcomes import Outcome, find, percent, plateau
from bnp_experiments.results import FILE, Results, read_results


def outcomes(experiment: Experiment, results: Results) -> list[Outcome]:
  """Gather the completed outcomes of an experiment from its records."""
  gathered = []
  for batch_size in experiment.batch_sizes:
    times = results.find(**experiment.time_settings(batch_size))
    measured = times[-1] if times else {"seconds": {}, "relative_to_sgd": {}}
    for method in experiment.methods:
      chosen = selection.chosen(experiment, results, method, batch_size)
      if chosen is None:
        continue
      variant, choice = chosen
      epochs = results.find(**experiment.epoch_settings(variant, batch_size, choice["rate"]))
      epochs = epochs[: experiment.length]
      if len(epochs) < experiment.length:
        continue
      gathered.append(
        Outcome(
          method=method,
          batch_size=batch_size,
          rates=experiment.rates,
          validation_accuracy=np.array(choice["validation_accuracy"], float),
          rate=choice["rate"],
          steps=epochs[0].get("steps", 0),
          train_loss=np.array([epoch["train_loss"] for epoch in epochs], float),
          test_accuracy=np.array([epoch["test_accuracy"] for epoch in epochs], float),
          seconds=np.array(measured["seconds"].get(method.name, []), float),
          relative_times=np.array(measured["relative_to_sgd"].get(method.name, []), float),
          conditioning=_conditioning(experiment, results, variant, batch_size, choice["rate"]),
          variant=variant.label if method.variants else "",
          decays=experiment.decays,
        )
      )
  return gathered


def with_recorded(experiment: Experiment, results: Results) -> Experiment:
  """Return an experiment with the other methods and batch sizes that have outcomes.

  Those of the experiment itself stay, whether they have outcomes or not. The others are those of
  the catalogue.
  """
  entry = EXPERIMENTS[experiment.name].at(experiment.scale)
  named = {method.name for method in entry.methods}
  methods = (*entry.methods, *(m for m in experiment.methods if m.name not in named))
  sizes = tuple(dict.fromkeys((*entry.batch_sizes, *experiment.batch_sizes)))
  whole = dataclasses.replace(experiment, methods=methods, batch_sizes=sizes)
  found = outcomes(whole, results)
  names = {m.name for m in experiment.methods} | {outcome.method.name for outcome in found}
  kept = {*experiment.batch_sizes, *(outcome.batch_size for outcome in found)}
  return dataclasses.replace(
    experiment,
    methods=tuple(method for method in methods if method.name in names),
    batch_sizes=tuple(size for size in sizes if size in kept),
  )


def _conditioning(
  experiment: Experiment, results: Results, method: Method, batch_size: int, rate: float
) -> dict[str, np.ndarray]:
  settings = experiment.conditioning_settings(method, batch_size, rate)
  records = [r for s in experiment.seed_list for r in results.find(**settings, seed=s)]
  names = [name for name, x in records[0].items() if isinstance(x, list)] if records else []
  return {name: np.array([record[name] for record in records], float) for name in names}


def tables(experiment: Experiment, gathered: list[Outcome]) -> tuple[Table, str]:
  """Tabulate the final test accuracies, with a line per method and a column per batch size.

  Args:
    experiment: The experiment.
    gathered: Its outcomes.

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


def plateaus(experiment: Experiment, gathered: list[Outcome]) -> tuple[Table, str]:
  """Tabulate the width of the range of learning rates at which a method is near its best.

  Args:
    experiment: The experiment.
    gathered: Its outcomes.

  Returns:
    The table for the terminal, and the same table in Markdown, both with an explanatory note.
  """
  cells = {(outcome.method, outcome.batch_size): outcome for outcome in gathered}
  columns = ("method", *(f"batch size {batch_size}" for batch_size in experiment.batch_sizes))
  lines = [
    (method.label, *(_decades(cells.get((method, size))) for size in experiment.batch_sizes))
    for method in experiment.methods
  ]
  shown, markdown = table(columns, lines)
  note = (
    "Decades of the learning rate: from the lowest to the highest rate of the unbroken run of "
    f"grid rates, of {len(experiment.rates)} from {min(experiment.rates):g} to "
    f"{max(experiment.rates):g}, that are within one point of the best accuracy on held-out "
    f"images. ≥ where that run ends at an edge of the grid. One seed, "
    f"{count(experiment.selection_length, 'epoch')}."
  )
  shown.title, shown.caption, shown.caption_justify = caption(experiment), note, "left"
  return shown, "\n".join([caption(experiment), "", markdown, note, ""])


def claims(folder: pathlib.Path) -> tuple[Table, str]:
  """Tabulate the verdict on each claim, by the results at the largest scale that has its methods.

  Args:
    folder: The folder of the results of all experiments.

  Returns:
    The table for the terminal, with the number of each verdict as its title, and the same table in
    Markdown.
  """
  lines = []
  for experiment in EXPERIMENTS.values():
    recorded = _recorded(experiment, folder)
    name = f"{experiment.name} ({experiment.place})" if experiment.place else experiment.name
    for claim in experiment.claims:
      setting, judgement = _judge(claim, recorded)
      lines.append((name, setting, claim.text, judgement.measured, judgement.verdict))
  columns = ("experiment", "setting", "claim", "measured, % of test images", "verdict")
  shown, markdown = table(columns, lines)
  counts = collections.Counter(verdict for *_, verdict in lines).most_common()
  summary = ", ".join(f"{verdict}: {number}" for verdict, number in counts)
  shown.title, shown.title_justify = f"{count(len(lines), 'claim')}. {summary}", "left"
  return shown, markdown


def _judge(claim: Claim, recorded: list[tuple[Experiment, list[Outcome]]]) -> tuple[str, Judgement]:
  """Return the setting and the verdict of the largest scale that has the methods of a claim."""
  judged = [
    (caption(shown) if gathered else "no results", claim.judge(gathered))
    for shown, gathered in recorded
  ]
  return next((each for each in judged if each[1].verdict != "not run"), judged[0])


def rates(folder: pathlib.Path) -> tuple[Table, str]:
  """Tabulate the learning rates of the paper's Tables 2 and 3 beside those chosen here.

  Args:
    folder: The folder of the results of all experiments.

  Returns:
    The table for the terminal, and the same table in Markdown.
  """
  lines = []
  for experiment in EXPERIMENTS.values():
    recorded = _recorded(experiment, folder)
    for method in experiment.methods:
      each = (find(gathered, method.name, None) for _, gathered in recorded)
      found = next(filter(None, each), None)
      if method.name in experiment.paper_rates and found and len(found.rates) > 1:
        theirs = f"{experiment.paper_rates[method.name]:g}"
        name = f"{experiment.name} ({experiment.place})"
        lines.append((name, method.label, theirs, _rate(found)))
  return table(("experiment", "method", "rate in the paper", "rate chosen here"), lines)


def _recorded(
  experiment: Experiment, folder: pathlib.Path
) -> list[tuple[Experiment, list[Outcome]]]:
  """Return the experiment and its outcomes at each scale that has some, the largest one first."""
  recorded = []
  for shown in map(experiment.at, reversed(SCALES)):
    if (folder / shown.folder / FILE).exists():
      results = read_results(folder / shown.folder)
      seeds = {len(record["seeds"]) for record in results.find(kind="epoch")}
      # A run may have another number of seeds than the catalogue.
      for number in (shown.seeds, *sorted(seeds - {shown.seeds}, reverse=True)):
        chosen = dataclasses.replace(shown, seeds=number)
        recorded.append((chosen, outcomes(chosen, results)))
  # A run without complete results must not hide a complete one at a smaller scale.
  return [(shown, gathered) for shown, gathered in recorded if gathered] or [(experiment, [])]


def table(columns: tuple[str, ...], lines: list[tuple[str, ...]]) -> tuple[Table, str]:
  """Return a table for the terminal, and the same table in Markdown."""
  shown = Table(*columns)
  markdown = [f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"]
  for cells in lines:
    shown.add_row(*cells)
    markdown.append(f"| {' | '.join(cells)} |")
  return shown, "\n".join([*markdown, ""])


def caption(experiment: Experiment) -> str:
  """Describe the setting of an experiment in one line."""
  runs, epochs = count(experiment.seeds, "seed"), count(experiment.length, "epoch")
  images = "" if experiment.images is None else f" ({experiment.images:,} training images)"
  return f"{experiment.dataset}{images}, {experiment.network.title}, {epochs}, {runs}"


def count(number: int, thing: str) -> str:
  """Format a number of things, such as "1 epoch" and "3 epochs"."""
  return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def _note(experiment: Experiment) -> str:
  note = "Test accuracy in % after the last epoch: mean (range) over the seeds."
  if len(experiment.rates) > 1:
    note += " Learning rate chosen on held-out training images; * is at an edge of the grid."
  if experiment.timed:
    note += " Time of a step relative to plain SGD: median (quartiles)."
  return note


def _rate(outcome: Outcome) -> str:
  return f"{outcome.rate:g}{'*' if outcome.at_edge else ''}"


def _decades(outcome: Outcome | None) -> str:
  if outcome is None:
    return "not run"
  if outcome.validation_accuracy.max() <= TRAINS:
    return "does not train"
  low, high = plateau(outcome.rates, outcome.validation_accuracy)
  at_edge = low == min(outcome.rates) or high == max(outcome.rates)
  return f"{'≥ ' if at_edge else ''}{np.log10(high / low):.1f}"


def _cell(outcome: Outcome | None) -> list[str]:
  if outcome is None:
    return ["not run"]
  diverged = "" if np.isfinite(outcome.train_loss[-1]).all() else " diverged"
  lines = [
    percent(outcome.final) + diverged,
    f"rate {_rate(outcome)}{', ' * bool(outcome.variant)}{outcome.variant}",
  ]
  if len(outcome.relative_times):
    low, middle, high = np.percentile(outcome.relative_times, [25, 50, 75])
    quartiles = f" ({low:.2f}–{high:.2f})" if outcome.method != SGD else ""
    lines.append(f"{middle:.2f}x" + quartiles)
  return lines
