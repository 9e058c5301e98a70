"""The accuracy of BNP with a short and a long memory of the running statistics, at small batches.

Measures: the training loss and the accuracy on held-out images after each epoch, for 20 epochs of
the fully connected network of the paper on CIFAR-10, for each batch size, `decay` and seed: Adam
inside `bnp` at the rate 0.001, and SGD at 0.1. `stream` measures the accuracy on the drifting
stream of `examples/online_learning.py`, where each image occurs once, with the rate that the script
chooses. One decay is better than another if every run of it ends above every run of the other;
otherwise they are within the spread.
Command: `python benchmarks/memory.py run`, ten minutes a run on one CPU core at batch size 1, and
less at larger ones; `python benchmarks/memory.py stream`, one minute a decay; and `python
benchmarks/memory.py report`. What is in the records is not repeated. Needs `bnp_experiments`,
CIFAR-10 and MNIST.
The records with the decay "of each layer" are of revision a928252, in which the decay of a layer
with n inputs was at least 1 - 2 rows / n; it is not in the library. Those at batch size 6 are of
revision 5aa7837, which differs in the rounding of the trainer.
Quoted by: docs/tuning.md, "The memory of the running statistics".
"""

import argparse
from collections.abc import Iterable, Iterator
import functools
import itertools
import pathlib
import runpy
from typing import NamedTuple

from bnp_experiments import data, methods, training
from bnp_experiments.catalogue import EXPERIMENTS
from bnp_experiments.evaluation import evaluate
from bnp_experiments.splits import Splits, make_splits
import jax
import numpy as np
import optax
from tables import append, head, mean_and_range, read, row

import bnp_optax

RECORDS = pathlib.Path(__file__).parent / "records" / "memory.jsonl"
STREAM_RECORDS = RECORDS.with_name("memory_stream.jsonl")
EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"
EXPERIMENT = EXPERIMENTS["fig4-right-fc"]
OPTIMIZERS = {"Adam": (optax.adam, 0.001), "SGD": (optax.sgd, 0.1)}
SHOWN = {"first": 1, "tenth": 10, "last": 20}
COLUMNS = [
  f"{what}, {when} epoch" for what in ("held-out images, %", "training loss") for when in SHOWN
]


class Run(NamedTuple):
  """One run."""

  batch_size: int
  optimizer: str
  decay: float | str
  seed: int


def train(splits: Splits, run: Run) -> Iterator[dict[str, float]]:
  """Yield the training loss and the held-out accuracy, in %, after each epoch."""
  optimizer, rate = OPTIMIZERS[run.optimizer]
  decay = (("decay", float(run.decay)),)
  method = methods.Method(
    run.optimizer, "", "", "", optimizer, "around", debias=True, bnp_arguments=decay
  )
  setup = EXPERIMENT.setup(method, run.batch_size, len(splits.fit.labels), 10)
  lanes = training.make_lanes([run.seed], [rate])
  state = training.init(setup, lanes, splits.fit.images)
  for epoch in range(1, SHOWN["last"] + 1):
    state, loss = training.train_epoch(setup, state, lanes, epoch, splits.fit)
    accuracy = float(evaluate(setup, state, *splits.held_out).accuracy[0])
    yield {"epoch": epoch, "loss": round(float(loss[0]), 4), "accuracy": round(100 * accuracy, 2)}


def run(runs: Iterable[Run]) -> None:
  """Append the records of the runs that are missing."""
  done = {_run_of(r) for r in read(RECORDS)}
  splits = make_splits(EXPERIMENT, data.load(EXPERIMENT.dataset))
  splits = splits._replace(fit=jax.device_put(splits.fit))
  versions = {"jax": jax.__version__, "bnp_optax": bnp_optax.__version__}
  for one in runs:
    if one in done:
      continue
    epochs = []
    for record in train(splits, one):
      epochs.append(record)
      print(*one, record, flush=True)
    append(RECORDS, {**one._asdict(), "epochs": epochs, "versions": versions})


def _run_of(record: dict) -> Run:
  return Run(*(record[field] for field in Run._fields))


def stream(decays: list[float]) -> None:
  """Append the records of the stream that are missing."""
  online = runpy.run_path(str(EXAMPLES / "online_learning.py"))
  load = online["load"]
  images = load("train-images-idx3-ubyte.gz", online["IMAGES_SHA256"]).reshape(-1, 784)
  labels = load("train-labels-idx1-ubyte.gz", online["LABELS_SHA256"]).astype(np.int32)
  optimizers = {
    "BNP": lambda decay, rate: optax.chain(bnp_optax.scale_by_bnp(decay), optax.sgd(rate)),
    "bnp(Adam)": lambda decay, rate: bnp_optax.bnp(optax.adam(rate), decay),
  }
  done = {record["method"] for record in read(STREAM_RECORDS)}
  for decay, (name, make) in itertools.product(decays, optimizers.items()):
    method = online["Method"](f"{name}, {decay:g}", "", "", functools.partial(make, decay))
    if method.label not in done:
      record = online["measure"](method, images, labels)
      print(online["table"]([record]).splitlines()[-1], flush=True)
      append(STREAM_RECORDS, record)


def report(path: pathlib.Path) -> None:
  """Print the tables of the page: mean (range) over the seeds."""
  records = read(path)
  print(head(["batch size, optimizer, `decay`", *COLUMNS], "l"))
  for setting in sorted({_run_of(r)[:3] for r in records}, key=str):
    runs = [r["epochs"] for r in records if _run_of(r)[:3] == setting]
    cells = []
    for (key, digits), epoch in itertools.product((("accuracy", 1), ("loss", 2)), SHOWN.values()):
      cells.append(mean_and_range(np.array([run[epoch - 1][key] for run in runs]), digits))
    print(row([", ".join(map(str, setting)), *cells]))
  table = runpy.run_path(str(EXAMPLES / "online_learning.py"))["table"]
  print(table(sorted(read(STREAM_RECORDS), key=lambda record: record["method"])), end="")


def main() -> None:
  """Read the command line."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("command", choices=("run", "stream", "report"))
  parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1])
  parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=[*OPTIMIZERS])
  parser.add_argument("--decays", type=float, nargs="+", default=[0.99, 0.999])
  parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
  options = parser.parse_args()
  if options.command == "run":
    settings = options.batch_sizes, options.optimizers, options.decays
    run(Run(*setting, seed) for seed in options.seeds for setting in itertools.product(*settings))
  elif options.command == "stream":
    stream(options.decays)
  else:
    report(RECORDS)


if __name__ == "__main__":
  main()
