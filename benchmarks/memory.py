"""The accuracy of BNP in long runs at small batches, with a short and a long memory.

Measures: the training loss and the accuracy on held-out images after each of 20 epochs of the fully
connected network of the paper on CIFAR-10, or of 5 epochs of its convolutional network: Adam inside
`bnp` at the rate 0.001 and SGD at 0.1 (CNN 0.03), for each batch size, `decay` and seed. The decay
"auto" is the default, None. One decay is better than another if every run of it ends above every
run of the other; otherwise they are within the spread.
Command: `python benchmarks/memory.py run`, ten minutes a run on one CPU core at batch size 1, and
`python benchmarks/memory.py report`. A run that is in the records is not repeated. Needs
`bnp_experiments` and CIFAR-10.
Quoted by: docs/tuning.md, "The memory of the running statistics".
"""

import argparse
from collections.abc import Iterable, Iterator
import dataclasses
import itertools
import json
import pathlib
from typing import NamedTuple

from bnp_experiments import data, methods, training
from bnp_experiments.catalogue import EXPERIMENTS
from bnp_experiments.evaluation import evaluate
from bnp_experiments.splits import Splits, make_splits
import jax
import numpy as np
import optax

import bnp_optax

RECORDS = pathlib.Path(__file__).parent / "records" / "memory.jsonl"
EXPERIMENT = {"FC": EXPERIMENTS["fig4-right-fc"], "CNN": EXPERIMENTS["fig4-right-cnn"]}
OPTIMIZERS = {"Adam": optax.adam, "SGD": optax.sgd}
RATES = {"FC": {"Adam": 0.001, "SGD": 0.1}, "CNN": {"Adam": 0.001, "SGD": 0.03}}
AUTO = "auto"
SHOWN = {"FC": (1, 5, 10, 15, 20), "CNN": (1, 2, 3, 4, 5)}
COLUMNS = (("accuracy", "held-out images, %", 1), ("loss", "training loss", 2))


class Run(NamedTuple):
  """One run."""

  network: str
  batch_size: int
  optimizer: str
  decay: float | str
  seed: int


@dataclasses.dataclass(frozen=True)
class WithDecay(methods.Method):
  """An optimizer inside `bnp` with a decay of the running statistics."""

  decay: float | None = None

  def make_optimizer(
    self, rate: methods.Rate, layers: bnp_optax.Layers
  ) -> optax.GradientTransformationExtraArgs:
    """Return the optimizer for a learning rate and the layers of a network."""
    return bnp_optax.bnp(self.optimizer(rate), self.decay, layers=layers)


def train(splits: Splits, run: Run) -> Iterator[dict[str, float]]:
  """Yield the training loss and the held-out accuracy, in %, after each epoch."""
  optimizer, rate = OPTIMIZERS[run.optimizer], RATES[run.network][run.optimizer]
  decay = None if run.decay == AUTO else float(run.decay)
  method = WithDecay(run.optimizer, "", "", "", optimizer, decay=decay)
  setup = EXPERIMENT[run.network].setup(method, run.batch_size, len(splits.fit.labels), 10)
  lanes = training.make_lanes([run.seed], [rate])
  state = training.init(setup, lanes, splits.fit.images)
  for epoch in range(1, SHOWN[run.network][-1] + 1):
    state, loss = training.train_epoch(
      *(setup, state, lanes, epoch, splits.fit), on_steps=lambda steps: None
    )
    accuracy = float(evaluate(setup, state, *splits.held_out).accuracy[0])
    yield {"epoch": epoch, "loss": round(float(loss[0]), 4), "accuracy": round(100 * accuracy, 2)}


def run(runs: Iterable[Run]) -> None:
  """Append the records of the runs that are missing."""
  done = {_run_of(r) for r in read(RECORDS)}
  splits = make_splits(EXPERIMENT["FC"], data.load(EXPERIMENT["FC"].dataset))
  splits = splits._replace(fit=jax.device_put(splits.fit))
  versions = {"jax": jax.__version__, "bnp_optax": bnp_optax.__version__}
  for one in runs:
    if one in done:
      continue
    epochs = []
    for record in train(splits, one):
      epochs.append(record)
      print(*one, record, flush=True)
    with RECORDS.open("a") as file:
      file.write(json.dumps({**one._asdict(), "epochs": epochs, "versions": versions}) + "\n")


def _run_of(record: dict) -> Run:
  return Run(*(record[field] for field in Run._fields))


def read(path: pathlib.Path) -> list[dict]:
  """Return the records in a file; none if it does not exist."""
  return [json.loads(x) for x in path.read_text().splitlines()] if path.exists() else []


def report(path: pathlib.Path) -> None:
  """Print the tables of the page: mean (range) over the seeds after some epochs."""
  records = read(path)
  for network, shown in SHOWN.items():
    print(f"| {network}: batch size, optimizer, `decay` | | " + " | ".join(map(str, shown)) + " |")
    print("| --- | --- |" + " --: |" * len(shown))
    for setting in sorted({_run_of(r)[:4] for r in records if r["network"] == network}, key=str):
      runs = [r["epochs"] for r in records if _run_of(r)[:4] == setting]
      for key, what, digits in COLUMNS:
        values = np.array([[run[epoch - 1][key] for run in runs] for epoch in shown])
        cells = [
          f"{v.mean():.{digits}f} ({v.min():.{digits}f}–{v.max():.{digits}f})" for v in values
        ]
        print(f"| {', '.join(map(str, setting[1:]))} | {what} | {' | '.join(cells)} |")


def main() -> None:
  """Read the command line."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("command", choices=("run", "report"))
  parser.add_argument("--networks", nargs="+", choices=EXPERIMENT, default=["FC"])
  parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1])
  parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=[*OPTIMIZERS])
  parser.add_argument("--decays", nargs="+", default=["0.99", AUTO])
  parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
  options = parser.parse_args()
  if options.command == "run":
    decays = [x if x == AUTO else float(x) for x in options.decays]
    settings = (options.networks, options.batch_sizes, options.optimizers, decays)
    run(Run(*setting, seed) for seed in options.seeds for setting in itertools.product(*settings))
  else:
    report(RECORDS)


if __name__ == "__main__":
  main()
