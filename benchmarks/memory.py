"""The accuracy of BNP in long runs at batch size 1, with a short and a long memory.

Measures: the training loss and the accuracy on held-out images after each of 20 epochs of the fully
connected network of the paper on CIFAR-10, at batch size 1, with the default start of the running
statistics: Adam inside `bnp` at the rate 0.001 and SGD at 0.1, for each `decay` and seed. One decay
is better than another if every run of it ends above every run of the other; otherwise they are
within the spread.
Command: `python benchmarks/memory.py run`, ten minutes a run on one CPU core, and
`python benchmarks/memory.py report`. A run that is in the records is not repeated. Needs
`bnp_experiments` and CIFAR-10.
Quoted by: docs/tuning.md, "The memory of the running statistics".
"""

import argparse
from collections.abc import Iterator
import dataclasses
import itertools
import json
import pathlib

from bnp_experiments import data, methods, training
from bnp_experiments.catalogue import EXPERIMENTS
from bnp_experiments.evaluation import evaluate
from bnp_experiments.splits import Splits, make_splits
import jax
import numpy as np
import optax

import bnp_optax

RECORDS = pathlib.Path(__file__).parent / "records" / "memory.jsonl"
EXPERIMENT = EXPERIMENTS["fig4-right-fc"]
OPTIMIZERS = {"Adam": (optax.adam, 0.001), "SGD": (optax.sgd, 0.1)}
EPOCHS, BATCH_SIZE = 20, 1


@dataclasses.dataclass(frozen=True)
class WithDecay(methods.Method):
  """An optimizer inside `bnp` with a decay of the running statistics."""

  decay: float = 0.99

  def make_optimizer(
    self, rate: methods.Rate, layers: bnp_optax.Layers
  ) -> optax.GradientTransformationExtraArgs:
    """Return the optimizer for a learning rate and the layers of a network."""
    return bnp_optax.bnp(self.optimizer(rate), decay=self.decay, layers=layers)


def train(splits: Splits, name: str, decay: float, seed: int) -> Iterator[dict[str, float]]:
  """Yield the training loss and the held-out accuracy, in %, after each epoch."""
  optimizer, rate = OPTIMIZERS[name]
  method = WithDecay(f"{name}, decay {decay:g}", "", "", "", optimizer, decay=decay)
  setup = EXPERIMENT.setup(method, BATCH_SIZE, len(splits.fit.labels), 10)
  lanes = training.make_lanes([seed], [rate])
  state = training.init(setup, lanes, splits.fit.images)
  for epoch in range(1, EPOCHS + 1):
    state, loss = training.train_epoch(
      *(setup, state, lanes, epoch, splits.fit), on_steps=lambda steps: None
    )
    accuracy = float(evaluate(setup, state, *splits.held_out).accuracy[0])
    yield {"epoch": epoch, "loss": round(float(loss[0]), 4), "accuracy": round(100 * accuracy, 2)}


def run(optimizers: list[str], decays: list[float], seeds: list[int]) -> None:
  """Append the records of the runs that are missing."""
  done = {(r["optimizer"], r["decay"], r["seed"]) for r in read(RECORDS)}
  splits = make_splits(EXPERIMENT, data.load(EXPERIMENT.dataset))
  splits = splits._replace(fit=jax.device_put(splits.fit))
  versions = {"jax": jax.__version__, "bnp_optax": bnp_optax.__version__}
  for seed, name, decay in itertools.product(seeds, optimizers, decays):
    if (name, decay, seed) in done:
      continue
    epochs = []
    for record in train(splits, name, decay, seed):
      epochs.append(record)
      print(f"{name}, decay {decay:g}, seed {seed}: {record}", flush=True)
    run = {"optimizer": name, "decay": decay, "seed": seed, "epochs": epochs, "versions": versions}
    with RECORDS.open("a") as file:
      file.write(json.dumps(run) + "\n")


def read(path: pathlib.Path) -> list[dict]:
  """Return the records in a file; none if it does not exist."""
  return [json.loads(x) for x in path.read_text().splitlines()] if path.exists() else []


def report(path: pathlib.Path) -> None:
  """Print the table of the page: mean (range) over the seeds after some epochs."""
  records = read(path)
  shown = (1, 5, 10, 15, 20)
  print("| optimizer, `decay` | after epoch | " + " | ".join(map(str, shown)) + " |")
  print("| --- | --- |" + " --: |" * len(shown))
  for name, decay in sorted({(r["optimizer"], r["decay"]) for r in records}):
    runs = [r["epochs"] for r in records if (r["optimizer"], r["decay"]) == (name, decay)]
    for key, what, digits in (("accuracy", "held-out images, %", 1), ("loss", "training loss", 2)):
      values = np.array([[run[epoch - 1][key] for run in runs] for epoch in shown])
      cells = [f"{v.mean():.{digits}f} ({v.min():.{digits}f}–{v.max():.{digits}f})" for v in values]
      print(f"| {name}, {decay:g} | {what} | {' | '.join(cells)} |")


def main() -> None:
  """Read the command line."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("command", choices=("run", "report"))
  parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=[*OPTIMIZERS])
  parser.add_argument("--decays", type=float, nargs="+", default=[0.99, 0.999])
  parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
  options = parser.parse_args()
  if options.command == "run":
    run(options.optimizers, options.decays, options.seeds)
  else:
    report(RECORDS)


if __name__ == "__main__":
  main()
