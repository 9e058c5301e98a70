"""The command line, `bnp-optax`."""

from collections.abc import Collection
import dataclasses
import pathlib
import shlex
import sys
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from bnp_experiments.errors import ExperimentError, UsageError

if TYPE_CHECKING:
  from bnp_experiments.experiment import Experiment


def _option(metavar: str) -> Any:
  return tyro.conf.arg(metavar=metavar, help_behavior_hint="")


def main() -> int:
  """Run the command line and return its exit status."""
  try:
    tyro.extras.subcommand_cli_from_dict(
      {"run": _run, "figure": _figure, "report": _report, "list": _list},
      prog="bnp-optax",
      description="Experiments with Batch Normalization Preconditioning.",
    )
  except ExperimentError as error:
    print(f"bnp-optax: {error}", file=sys.stderr)
    return 2 if isinstance(error, UsageError) else 1
  except KeyboardInterrupt:
    again = shlex.join(["bnp-optax", *sys.argv[1:]])
    print(f"bnp-optax: stopped; to resume, run again: {again}", file=sys.stderr)
    return 130
  return 0


def _list() -> None:
  """List the experiments."""
  from bnp_experiments import step_time
  from bnp_experiments.catalogue import EXPERIMENTS

  for experiment in EXPERIMENTS.values():
    print(f"{experiment.name:16} {experiment.title}")
  print(f"{step_time.NAME:16} {step_time.TITLE}")


@dataclasses.dataclass(frozen=True)
class _Choice:
  """The choice of an experiment, with changes of its defaults at a scale.

  Attributes:
    experiment: Name of the experiment; `bnp-optax list` shows all.
    scale: smoke (seconds), laptop (minutes to an hour on two CPU cores), or paper.
    dataset: digits, mnist, fashion_mnist, cifar10 or cifar100.
    epochs: Number of epochs. Default: 15 on the digits and 3 on the others.
    seeds: Number of runs of each method.
    batch_sizes: The batch sizes to compare.
    methods: The methods to compare, such as sgd, batchnorm, layernorm, bnp.
    out: Folder of the results. Default: bnp_optax_results/EXPERIMENT-DATASET-SCALE.
  """

  experiment: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="EXPERIMENT")]
  scale: Annotated[Literal["smoke", "laptop", "paper"], _option("SCALE")] = "laptop"
  dataset: Annotated[str | None, _option("NAME")] = None
  epochs: Annotated[int | None, _option("INT")] = None
  seeds: Annotated[int | None, _option("INT")] = None
  batch_sizes: Annotated[tuple[int, ...] | None, _option("INT ...")] = None
  methods: Annotated[tuple[str, ...] | None, _option("NAME ...")] = None
  out: Annotated[pathlib.Path | None, _option("FOLDER")] = None

  def resolve(self) -> "tuple[Experiment, pathlib.Path]":
    """Return the chosen experiment and the folder of its results."""
    from bnp_experiments import step_time
    from bnp_experiments.catalogue import EXPERIMENTS
    from bnp_experiments.methods import METHODS

    _known(self.experiment, (*EXPERIMENTS, step_time.NAME))
    chosen = EXPERIMENTS[self.experiment].at(self.scale)
    changes: dict[str, Any] = {
      name: value
      for name in ("dataset", "epochs", "seeds")
      if (value := getattr(self, name)) is not None
    }
    if self.batch_sizes is not None:
      changes["batch_sizes"] = tuple(dict.fromkeys(self.batch_sizes))
    if self.methods is not None:
      known = METHODS | {method.name: method for method in chosen.methods}
      for name in self.methods:
        _known(name, known)
      changes["methods"] = tuple(known[name] for name in dict.fromkeys(self.methods))
    chosen = dataclasses.replace(chosen, **changes)
    return chosen, self.out or pathlib.Path("bnp_optax_results") / chosen.folder

  def step_time_folder(self) -> pathlib.Path | None:
    """Return the folder of the results of step-time; None if another experiment is chosen."""
    from bnp_experiments.step_time import NAME

    if self.experiment != NAME:
      return None
    for field in ("dataset", "epochs", "seeds", "batch_sizes", "methods"):
      if getattr(self, field) is not None:
        option = field.replace("_", "-")
        raise UsageError(f"{NAME} takes --scale and --out alone, found --{option}")
    return self.out or pathlib.Path("bnp_optax_results") / f"{NAME}-{self.scale}"


def recorded(folder: pathlib.Path) -> "tuple[Experiment, str] | None":
  """Return the experiment that the results in a folder belong to.

  Args:
    folder: The folder of its results.

  Returns:
    The experiment with the settings of its last run there, and the command of that run; None if the
    results belong to no experiment of the catalogue.
  """
  from bnp_experiments.catalogue import EXPERIMENTS
  from bnp_experiments.results import read_results

  commands = [record["command"] for record in read_results(folder).find(kind="run")]
  if not commands or commands[-1][:2] != ["bnp-optax", "run"]:
    return None
  choice = tyro.cli(_Choice, args=commands[-1][2:])
  if choice.experiment not in EXPERIMENTS:
    return None
  return choice.resolve()[0], shlex.join(commands[-1])


def _known(name: str, known: Collection[str]) -> None:
  if name not in known:
    raise UsageError(f"there is no {name!r}: choose from {', '.join(known)}")


def _run(choice: Annotated[_Choice, tyro.conf.arg(name="")]) -> None:
  """Run an experiment or resume a stopped one, and show its table and picture."""
  from bnp_experiments import session, step_time

  if folder := choice.step_time_folder():
    return step_time.run(choice.scale, folder)
  experiment, folder = choice.resolve()
  return session.run(experiment, folder)


def _figure(choice: Annotated[_Choice, tyro.conf.arg(name="")]) -> None:
  """Show the table and the picture of the results so far."""
  from bnp_experiments import session, step_time

  if folder := choice.step_time_folder():
    return step_time.draw(choice.scale, folder)
  experiment, folder = choice.resolve()
  return session.draw(experiment, folder)


def _report(
  folder: Annotated[pathlib.Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")] = (
    pathlib.Path("bnp_optax_results")
  ),
) -> None:
  """Show the verdict on each claim, by the results in a folder.

  Args:
    folder: The folder that holds the folders of the results.
  """
  from bnp_experiments import session

  session.report_claims(folder)


if __name__ == "__main__":
  sys.exit(main())
