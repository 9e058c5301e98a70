"""The actions of the command line: run an experiment, draw it, report on all of them."""

import pathlib
import sys

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from bnp_experiments import data, figures, protocol, report
from bnp_experiments.checkpoints import Checkpoints
from bnp_experiments.errors import ExperimentError, UsageError
from bnp_experiments.experiment import Experiment
from bnp_experiments.results import FILE, Results, open_results, read_results, writing_to
from bnp_experiments.trainer import Trainer


def run(experiment: Experiment, folder: pathlib.Path) -> None:
  """Run the missing parts of an experiment, and show all results.

  Args:
    experiment: The experiment.
    folder: The folder of its results.

  Raises:
    ExperimentError: The experiment cannot be run.
  """
  experiment.check()
  dataset = data.load(experiment.dataset)
  console = Console()
  with open_results(folder, ["bnp-optax", *sys.argv[1:]]) as results:
    checkpoints = Checkpoints(folder / "checkpoints")
    progress = _progress(console)
    trainer = Trainer(experiment, dataset, results, checkpoints, progress)
    with progress:
      protocol.run(trainer)
    _show(report.with_recorded(experiment, results), results, folder, console)


def draw(experiment: Experiment, folder: pathlib.Path) -> None:
  """Show the results of an experiment so far.

  Args:
    experiment: The experiment.
    folder: The folder of its results.

  Raises:
    ExperimentError: There are no results.
  """
  _show(experiment, read_results(folder), folder, Console())


def report_claims(folder: pathlib.Path) -> None:
  """Show the verdict on each claim, and the learning rates beside the paper's.

  Args:
    folder: The folder of the results of all experiments.

  Raises:
    UsageError: There are none.
  """
  if not list(folder.glob(f"*/{FILE}")):
    raise UsageError(
      f"no results in {folder}: run an experiment first, or give the folder that holds the folders "
      "of the results"
    )
  console = Console()
  for name, tabulate in (("claims", report.claims), ("rates", report.rates)):
    table, markdown = tabulate(folder)
    console.print(table)
    with writing_to(folder):
      (folder / f"{name}.md").write_text(markdown)


def _show(experiment: Experiment, results: Results, folder: pathlib.Path, console: Console) -> None:
  gathered = report.outcomes(experiment, results)
  if not gathered:
    raise ExperimentError(
      f"{folder} has no complete results of {experiment.name} with these settings: "
      f"{report.caption(experiment)}"
    )
  tables = {experiment.name: report.tables(experiment, gathered)}
  if experiment.picture == "batch_sizes":
    tables[f"{experiment.name}-plateaus"] = report.plateaus(experiment, gathered)
  for table, _ in tables.values():
    console.print(table)
  with writing_to(folder):
    for name, (_, markdown) in tables.items():
      (folder / f"{name}.md").write_text(markdown)
    for picture in figures.draw(experiment, gathered, folder):
      console.print(f"picture: {picture}", soft_wrap=True)


def _progress(console: Console) -> Progress:
  return Progress(
    TextColumn("{task.description}"),
    BarColumn(),
    TaskProgressColumn(),
    TimeRemainingColumn(),
    console=console,
    speed_estimate_period=300,
    transient=True,
  )
