"""The command line, `bnp-optax`."""

import argparse
from collections.abc import Collection
import dataclasses
import os
import pathlib
import shlex
import sys
from typing import TYPE_CHECKING, Any, NoReturn

from bnp_experiments import __version__, data
from bnp_experiments.errors import ExperimentError, UsageError

if TYPE_CHECKING:
  from bnp_experiments.experiment import Experiment

_RESULTS = pathlib.Path("bnp_optax_results")
_SCALES = ("smoke", "laptop", "paper")


def main() -> int:
  """Run the command line and return its exit status."""
  try:
    arguments = _parser().parse_args()
    arguments.action(arguments)
    # A closed pipe is found when the output is written, which must happen here.
    sys.stdout.flush()
  except ExperimentError as error:
    print(f"bnp-optax: {error}", file=sys.stderr)
    return 2 if isinstance(error, UsageError) else 1
  except KeyboardInterrupt:
    again = shlex.join(["bnp-optax", *sys.argv[1:]])
    print(f"bnp-optax: stopped; to resume, run again: {again}", file=sys.stderr)
    return 130
  except BrokenPipeError:
    # The reader of a pipe, such as `head`, has ended. The interpreter flushes once more at its end.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 141
  return 0


class _Parser(argparse.ArgumentParser):
  """A parser whose errors are one line."""

  def error(self, message: str) -> NoReturn:
    raise UsageError(f"{message} ({self.prog} --help lists the options)")


def _parser() -> _Parser:
  parser = _Parser(
    prog="bnp-optax",
    description="Experiments with Batch Normalization Preconditioning.",
    allow_abbrev=False,
  )
  parser.add_argument("--version", action="version", version=f"bnp-optax {__version__}")
  commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
  for name, action, text in (
    ("run", _run, "run an experiment or resume a stopped one, and show its table and picture"),
    ("figure", _figure, "show the table and the picture of the results so far"),
  ):
    command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
    command.set_defaults(action=action)
    _add_choice(command)
  text = "show the verdict on each claim, by the results in a folder"
  command = commands.add_parser("report", help=text, description=text)
  command.set_defaults(action=_report)
  command.add_argument(
    "folder",
    metavar="FOLDER",
    nargs="?",
    type=pathlib.Path,
    default=_RESULTS,
    help=f"folder that holds the folders of the results (default: {_RESULTS})",
  )
  text = "list the experiments"
  commands.add_parser("list", help=text, description=text).set_defaults(action=_list)
  return parser


def _add_choice(command: argparse.ArgumentParser) -> None:
  """Add the options that choose an experiment and change its defaults."""
  add = command.add_argument
  add("experiment", metavar="EXPERIMENT", help="its name; `bnp-optax list` shows all")
  add(
    "--scale",
    choices=_SCALES,
    default="laptop",
    help="smoke takes seconds to minutes, laptop (the default) minutes to an hour on two cores; "
    "paper is the paper's own setting, for a GPU or TPU",
  )
  add("--dataset", metavar="NAME", help=", ".join(data.NAMES))
  add("--epochs", type=int, metavar="INT", help="number of epochs")
  add("--seeds", type=int, metavar="INT", help="number of runs of each method")
  add("--batch-sizes", type=int, nargs="+", metavar="INT", help="the batch sizes to compare")
  add(
    "--methods",
    nargs="+",
    metavar="NAME",
    help="the methods to compare, such as sgd or bnp; bnp has the paper's start and bnp_debias the "
    "library's default, which is that of all methods of quickstart",
  )
  add(
    "--out",
    type=pathlib.Path,
    metavar="FOLDER",
    help=f"folder of the results (default: {_RESULTS}/EXPERIMENT-DATASET-SCALE)",
  )


def _list(arguments: argparse.Namespace) -> None:
  del arguments
  from bnp_experiments import step_time
  from bnp_experiments.catalogue import EXPERIMENTS

  for experiment in EXPERIMENTS.values():
    print(f"{experiment.name:16} {experiment.title}")
  print(f"{step_time.NAME:16} {step_time.TITLE}")


def _resolve(arguments: argparse.Namespace) -> "tuple[Experiment, pathlib.Path]":
  """Return the chosen experiment and the folder of its results."""
  from bnp_experiments import step_time
  from bnp_experiments.catalogue import EXPERIMENTS
  from bnp_experiments.methods import METHODS
  from bnp_experiments.models import CNN, MLP

  _check_known(arguments.experiment, (*EXPERIMENTS, step_time.NAME))
  chosen = EXPERIMENTS[arguments.experiment].at(arguments.scale)
  changes: dict[str, Any] = {
    name: value
    for name in ("dataset", "epochs", "seeds")
    if (value := getattr(arguments, name)) is not None
  }
  if arguments.batch_sizes is not None:
    changes["batch_sizes"] = tuple(dict.fromkeys(arguments.batch_sizes))
  if arguments.methods is not None:
    known = {method.name: method for method in chosen.methods}
    # The methods of other networks have settings of their own, such as weight decay.
    if isinstance(chosen.network, CNN | MLP):
      known = METHODS | known
    for name in arguments.methods:
      _check_known(name, known)
    changes["methods"] = tuple(known[name] for name in dict.fromkeys(arguments.methods))
  chosen = dataclasses.replace(chosen, **changes)
  return chosen, arguments.out or _RESULTS / chosen.folder


def _step_time_folder(arguments: argparse.Namespace) -> pathlib.Path | None:
  """Return the folder of the results of step-time; None if another experiment is chosen."""
  from bnp_experiments.step_time import NAME

  if arguments.experiment != NAME:
    return None
  for field in ("dataset", "epochs", "seeds", "batch_sizes", "methods"):
    if getattr(arguments, field) is not None:
      option = field.replace("_", "-")
      raise UsageError(f"{NAME} takes --scale and --out alone, found --{option}")
  return arguments.out or _RESULTS / f"{NAME}-{arguments.scale}"


def recorded(folder: pathlib.Path) -> "tuple[Experiment, str] | None":
  """Return the experiment that the results in a folder belong to.

  Args:
    folder: The folder of its results.

  Returns:
    The experiment with the settings of its last run there and with all methods and batch sizes that
    have outcomes, and the command of that run; None if the results belong to no experiment of the
    catalogue.
  """
  from bnp_experiments import report
  from bnp_experiments.catalogue import EXPERIMENTS
  from bnp_experiments.results import read_results

  results = read_results(folder)
  commands = [record["command"] for record in results.find(kind="run")]
  if not commands or commands[-1][:2] != ["bnp-optax", "run"]:
    return None
  arguments = _parser().parse_args(commands[-1][1:])
  if arguments.experiment not in EXPERIMENTS:
    return None
  return report.with_recorded(_resolve(arguments)[0], results), shlex.join(commands[-1])


def _check_known(name: str, known: Collection[str]) -> None:
  if name not in known:
    raise UsageError(f"there is no {name!r}: choose from {', '.join(known)}")


def _run(arguments: argparse.Namespace) -> None:
  from bnp_experiments import session, step_time

  if folder := _step_time_folder(arguments):
    step_time.run(arguments.scale, folder)
  else:
    session.run(*_resolve(arguments))


def _figure(arguments: argparse.Namespace) -> None:
  from bnp_experiments import session, step_time

  if folder := _step_time_folder(arguments):
    step_time.draw(arguments.scale, folder)
  else:
    session.draw(*_resolve(arguments))


def _report(arguments: argparse.Namespace) -> None:
  from bnp_experiments import session

  session.report_claims(arguments.folder)


if __name__ == "__main__":
  sys.exit(main())
