"""The command line, `bnp-optax`."""

import dataclasses
import pathlib
import shlex
import sys
from typing import Annotated, Any

import tyro

from bnp_optax.experiments.errors import ExperimentError, UsageError


def _option(metavar: str) -> Any:
  return tyro.conf.arg(metavar=metavar, help_behavior_hint="")


def main() -> int:
  """Runs the command line, and returns the status to exit with."""
  try:
    tyro.extras.subcommand_cli_from_dict(
      {"run": _run, "list": _list},
      prog="bnp-optax",
      description="Experiments with Batch Normalization Preconditioning.",
    )
  except ExperimentError as error:
    print(f"bnp-optax: {error}", file=sys.stderr)
    return 2 if isinstance(error, UsageError) else 1
  except KeyboardInterrupt:
    again = shlex.join(["bnp-optax", *sys.argv[1:]])
    print(f"bnp-optax: stopped; to go on from here, run again: {again}", file=sys.stderr)
    return 130
  return 0


def _list() -> None:
  """Lists the experiments."""
  from bnp_optax.experiments.registry import EXPERIMENTS

  for experiment in EXPERIMENTS.values():
    print(f"{experiment.name:12} {experiment.title}")


def _run(
  experiment: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="EXPERIMENT")],
  dataset: Annotated[str | None, _option("NAME")] = None,
  epochs: Annotated[int | None, _option("INT")] = None,
  seeds: Annotated[int | None, _option("INT")] = None,
  batch_sizes: Annotated[tuple[int, ...] | None, _option("INT ...")] = None,
  methods: Annotated[tuple[str, ...] | None, _option("NAME ...")] = None,
  out: Annotated[pathlib.Path | None, _option("FOLDER")] = None,
) -> None:
  """Runs an experiment, or goes on with one that was stopped, and shows its table and picture.

  What is not given is as the experiment has it.

  Args:
    experiment: Its name; `bnp-optax list` shows them all.
    dataset: digits, mnist, fashion_mnist, cifar10 or cifar100.
    epochs: How long to train. By itself, 15 epochs on the digits and 3 on the others.
    seeds: How many runs of each method.
    batch_sizes: The batch sizes to compare at.
    methods: The methods to compare, such as sgd, batchnorm, layernorm, bnp.
    out: Folder of the results. By itself, bnp_optax_results/EXPERIMENT-DATASET.
  """
  from bnp_optax.experiments.methods import METHODS
  from bnp_optax.experiments.registry import EXPERIMENTS

  for name, known in [(experiment, EXPERIMENTS), *((name, METHODS) for name in methods or ())]:
    if name not in known:
      raise UsageError(f"there is no {name!r}: choose from {', '.join(known)}")
  changes: dict[str, Any] = {"dataset": dataset, "epochs": epochs, "seeds": seeds}
  if batch_sizes is not None:
    changes["batch_sizes"] = tuple(dict.fromkeys(batch_sizes))
  if methods is not None:
    changes["methods"] = tuple(METHODS[name] for name in dict.fromkeys(methods))
  given = {field: value for field, value in changes.items() if value is not None}
  chosen = dataclasses.replace(EXPERIMENTS[experiment], **given)

  from bnp_optax.experiments.session import perform

  perform(chosen, out or pathlib.Path("bnp_optax_results") / f"{chosen.name}-{chosen.dataset}")


if __name__ == "__main__":
  sys.exit(main())
