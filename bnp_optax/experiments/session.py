"""One call of `bnp-optax run`: does the work, and shows the table and the picture."""

import pathlib
import sys

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from bnp_optax.experiments import data, figures, report
from bnp_optax.experiments.checkpoints import Checkpoints
from bnp_optax.experiments.experiment import Experiment
from bnp_optax.experiments.protocol import Run
from bnp_optax.experiments.results import open_results


def perform(experiment: Experiment, folder: pathlib.Path) -> None:
  """Runs what is missing of an experiment, and shows all of it.

  Args:
    experiment: What to run.
    folder: Where its results are, or shall be.

  Raises:
    ExperimentError: It cannot be run.
  """
  experiment.check()
  dataset = data.load(experiment.dataset)
  console = Console()
  with open_results(folder, ["bnp-optax", *sys.argv[1:]]) as results:
    checkpoints = Checkpoints(folder / "checkpoints")
    progress = Progress(
      TextColumn("{task.description}"),
      BarColumn(),
      TaskProgressColumn(),
      TimeRemainingColumn(),
      console=console,
      speed_estimate_period=300,
      transient=True,
    )
    run = Run(experiment, dataset, results, checkpoints, progress)
    with progress:
      run()
    gathered = report.outcomes(experiment, results)
  table, markdown = report.tables(experiment, gathered)
  picture = folder / f"{experiment.name}.png"
  figures.draw(experiment, gathered, picture)
  (folder / f"{experiment.name}.md").write_text(markdown)
  console.print(table)
  console.print(f"picture: {picture}", soft_wrap=True)
