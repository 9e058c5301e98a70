"""Compare settings of BNP over networks, batch sizes and optimizers, to select the defaults.

Each cell is a network, a batch size and an optimizer. The networks are FC 100-100-100 and
CNN 32-64-32 of the paper, a vision transformer and a language model, the last two with and without
LayerNorm. In each cell every setting trains with seven learning rates and three seeds. The accuracy
of a setting in a cell is the mean over the seeds at its best rate, on held-out examples.

The settings of BNP are the paper's start of the running statistics; `debias`; `debias` with
`lag_guard=2`; and `debias` with a bound on the step in z, `optax.adaptive_grad_clip(0.03)`. The
optimizer alone is measured in a part of the cells.

The rule for the defaults, written before the runs: the default is the one of the first three
settings with the highest mean over all cells, unless it is below the paper's start in some cell by
more than the range over the seeds of the paper's start there. A bound on the step is a part of the
inner optimizer and cannot be a default.

Variants of `debias` do not compete for the default: a decay of 0.9, 0.95 and 0.999, a linear
warm-up of the learning rate over the first tenth of the steps, and `scale_layers=False` (q = 1).

The images are 18,000 of CIFAR-10 to train on and 2,000 held out; the text is Python's language
reference, of which the last tenth is held out. A learning rate is constant. `run` does not use the
test images. `test` trains FC and CNN with SGD and Adam from five other seeds, alone and with BNP's
defaults, with the learning rates that `run` selected, and computes the accuracy on the test images
of CIFAR-10.

Commands: `python benchmarks/defaults.py pack examples.npz` on a machine with CIFAR-10; on the
accelerator `python benchmarks/defaults.py run benchmarks/records/defaults.jsonl --examples
examples.npz --workers 12`; then `test` in place of `run`, and `python benchmarks/defaults.py report
benchmarks/records/defaults.jsonl`. `run` and `test` continue where they stopped. Needs
`bnp_experiments`.
Quoted by: docs/experiments/start.md.
"""

import argparse
from collections.abc import Callable
import contextlib
import functools
import itertools
import json
import math
import multiprocessing
import os
import pathlib
import time
from typing import Any

from bnp_experiments.models import find_layers
from bnp_experiments.training import as_inputs
from common import training_step
from defaults_report import best_rates, figure, key_of, report
from grid import (
  PROGRAMS,
  RATES,
  SEEDS,
  Cell,
  Lane,
  as_batch,
  cells,
  count_steps,
  examples,
  make_optimizer,
  model_and_parameters,
  order,
  pack,
)
import jax
import jax.numpy as jnp
import numpy as np
from tables import append, read

TEST_SEEDS = (4, 5, 6, 7, 8)
TESTED = list(itertools.product(("fc", "cnn"), (60, 1, 512), ("sgd", "adam"), ("alone", "debias")))
# Bounds the memory: the lanes of convolutional networks and transformers train in parts.
EXAMPLES_AT_ONCE = 2_000
_EVALUATED_AT_ONCE = 50
# More programs at once would only take turns on the device. The other workers compile meanwhile.
_PROGRAMS_AT_ONCE = 5
_turns: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()


def make_run(cell: Cell, model: Any, layers: Any) -> Callable[..., Any]:
  """Return a function that trains one lane and computes its accuracy on the held-out examples."""

  def run(lane: Lane, parameters: Any, orders: Any, data: tuple[Any, Any, Any, Any]) -> Any:
    params = jax.tree.map(lambda x: x[lane.seed], parameters)
    tx = make_optimizer(cell, lane, layers)
    take_step = training_step(model, tx, train=True)

    def step(carry: Any, indices: Any) -> tuple[Any, None]:
      return take_step(carry, as_batch(data[0][indices], data[1][indices])), None

    (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), orders[lane.seed])

    def count_right(batch: tuple[Any, Any]) -> Any:
      logits = model.apply({"params": params}, as_inputs(batch[0]), train=False)
      right = jnp.argmax(logits, axis=-1) == batch[1]
      return jnp.mean(right & jnp.all(jnp.isfinite(logits), axis=-1))

    count = len(data[2]) // _EVALUATED_AT_ONCE
    batches = jax.tree.map(
      lambda x: x[: count * _EVALUATED_AT_ONCE].reshape(count, _EVALUATED_AT_ONCE, *x.shape[1:]),
      data[2:],
    )
    return jnp.mean(jax.lax.map(count_right, batches))

  return run


def measure(path: pathlib.Path, cell: Cell) -> list[dict[str, Any]]:
  """Train all lanes of a cell; return one record for each of its settings."""
  start = time.perf_counter()
  data = examples(path, cell.network)
  model, parameters = model_and_parameters(path, cell.network)
  run = make_run(cell, model, find_layers(model, as_inputs(data[0][:1])))
  orders = np.stack([order(seed, len(data[0]), cell) for seed in SEEDS])
  lanes = _lanes(cell)
  at_once = _lanes_at_once(cell, len(lanes.seed))

  @jax.jit
  def run_all(lanes: Lane, parameters: Any, orders: Any, data: Any) -> Any:
    parts = jax.tree.map(lambda x: x.reshape(-1, at_once, *x.shape[1:]), lanes)
    return jax.lax.map(
      lambda part: jax.vmap(lambda lane: run(lane, parameters, orders, data))(part), parts
    )

  arguments = (*jax.tree.map(jnp.asarray, (lanes, parameters, orders)), data)
  compiled = run_all.lower(*arguments).compile()
  compiled_in = time.perf_counter() - start
  with _turns:
    start = time.perf_counter()
    accuracy = np.asarray(compiled(*arguments), np.float64)
    run_in = time.perf_counter() - start
  settings, rates = PROGRAMS[cell.program], RATES[cell.optimizer]
  return [
    {
      **_named(cell, setting),
      "steps": count_steps(cell),
      "rates": rates,
      "accuracy": np.round(found, 5).tolist(),
      "device": jax.devices()[0].device_kind,
      "jax": jax.__version__,
      "compile_seconds": round(compiled_in, 2),
      "run_seconds": round(run_in, 2),
    }
    for setting, found in zip(
      settings, accuracy.reshape(len(settings), len(rates), len(SEEDS)), strict=True
    )
  ]


def _lanes(cell: Cell) -> Lane:
  """Return all runs of a cell as arrays `[lanes]`."""
  settings, rates, seeds = zip(
    *itertools.product(PROGRAMS[cell.program].values(), RATES[cell.optimizer], range(len(SEEDS))),
    strict=True,
  )
  return Lane(np.float32(rates), np.float32(settings), np.asarray(seeds))


def _lanes_at_once(cell: Cell, count: int) -> int:
  """Return the largest divisor of the number of lanes whose examples fit into the memory."""
  if cell.network == "fc":
    return count
  most = max(3, EXAMPLES_AT_ONCE // cell.batch_size)
  return max(part for part in range(1, count + 1) if count % part == 0 and part <= most)


def _named(cell: Cell, setting: str) -> dict[str, Any]:
  """Return the fields that a record is found by."""
  return {
    "network": cell.network,
    "batch_size": cell.batch_size,
    "optimizer": cell.optimizer,
    "setting": setting,
  }


def _start_worker(turns: contextlib.AbstractContextManager[Any]) -> None:
  global _turns
  _turns = turns


def _measure_in_worker(
  path: pathlib.Path, deadline: float, cell: Cell
) -> tuple[Cell, list[dict[str, Any]], str]:
  """Return the cell, its records, and the error if it failed; no records after the deadline."""
  if time.time() > deadline:
    return cell, [], ""
  try:
    return cell, measure(path, cell), ""
  except Exception as error:  # One cell that fails must not end the others.
    return cell, [], f"{type(error).__name__}: {error}"[:500]


def run(
  records: pathlib.Path, path: pathlib.Path, workers: int, budget: float, only: list[str]
) -> None:
  """Run the cells that have no record yet, and append their records.

  Raises:
    SystemExit: If cells failed, after the others have run.
  """
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
  left = _cells_left(read(records), only)
  # A file that cannot be written ends the command before a cell has run.
  append(records)
  start = time.time()
  measure_cell = functools.partial(_measure_in_worker, path, start + budget)
  context = multiprocessing.get_context("spawn")
  failures = 0
  turns = context.Semaphore(_PROGRAMS_AT_ONCE)
  with context.Pool(workers, _start_worker, (turns,)) as pool:
    done = pool.imap_unordered(measure_cell, left)
    for number, (cell, found, error) in enumerate(done, start=1):
      append(records, *found)
      failures += bool(error)
      note = error or (_times(found[0]) if found else "no time left")
      print(
        f"{time.time() - start:6.0f} s  {number}/{len(left)}  {' '.join(map(str, cell))}  {note}",
        flush=True,
      )
  if failures:
    raise SystemExit(f"{failures} cells failed; the same command runs them again")


def _cells_left(records: list[dict[str, Any]], only: list[str]) -> list[Cell]:
  """Return the cells that lack a record, in the order of `only`: those with all words of each."""
  done = {(*key_of(record), record["setting"]) for record in records}
  left = [
    cell
    for words in only or [""]
    for cell in cells()
    if all(word in map(str, cell) for word in words.split(",") if word)
    and any((*cell.key, setting) not in done for setting in PROGRAMS[cell.program])
  ]
  return list(dict.fromkeys(left))


def _times(record: dict[str, Any]) -> str:
  return f"compile {record['compile_seconds']} s, run {record['run_seconds']} s"


def test(records: pathlib.Path, path: pathlib.Path) -> None:
  """Test BNP's defaults and the optimizers alone, and append the records."""
  done = read(records)
  tested = {(*key_of(record), record["setting"]) for record in done if "test_accuracy" in record}
  rates = best_rates(done)
  for network, batch_size, optimizer, setting in TESTED:
    program = "alone" if setting == "alone" else "defaults"
    cell = Cell(program, batch_size, network, optimizer)
    if (*cell.key, setting) in tested:
      continue
    rate = rates[cell.key][setting]
    found = _test(path, cell, rate)
    record = {**_named(cell, setting), "rate": rate, "test_accuracy": found}
    append(records, record)
    print(json.dumps(record), flush=True)


def _test(path: pathlib.Path, cell: Cell, rate: float) -> list[float]:
  """Train from each of `TEST_SEEDS`, and return the accuracy on the test images."""
  # Not at the top: `run` needs no Pillow.
  from bnp_experiments import data

  dataset, (x, y, *_) = data.load("cifar10"), map(np.asarray, examples(path, cell.network))
  model, _ = model_and_parameters(path, cell.network)
  layers = find_layers(model, as_inputs(x[:1]))
  tx = make_optimizer(cell, Lane(rate, (math.inf, math.inf), 0), layers)
  take_step = training_step(model, tx, train=True)
  step = jax.jit(lambda carry, x, y: take_step(carry, as_batch(x, y)), donate_argnums=0)
  classify = jax.jit(lambda p, x: model.apply({"params": p}, as_inputs(x), train=False).argmax(-1))
  accuracies = []
  for seed in TEST_SEEDS:
    params = model.init(jax.random.key(seed), as_inputs(x[:1]), train=False)["params"]
    carry = params, tx.init(params)
    for indices in order(seed, len(x), cell):
      carry = step(carry, x[indices], y[indices])
    parts = np.split(dataset.x_test, 20)
    predicted = np.concatenate([classify(carry[0], part) for part in parts])
    accuracies.append(round(float(np.mean(predicted == dataset.y_test)), 5))
  return accuracies


def main() -> None:
  """Read the command line."""
  parser = argparse.ArgumentParser(description="Compare settings of BNP.")
  parser.add_argument("command", choices=("pack", "run", "test", "report", "figure"))
  parser.add_argument("file", type=pathlib.Path, help="the examples to pack, or the records")
  parser.add_argument("--examples", type=pathlib.Path, help="the file that pack wrote")
  parser.add_argument("--workers", type=int, default=1, help="number of processes")
  parser.add_argument("--budget", type=float, default=math.inf, help="seconds to start cells in")
  parser.add_argument("--only", nargs="*", default=[], help="such as fc,sgd,60 fc,adam")
  options = parser.parse_args()
  if options.command == "run":
    run(options.file, options.examples, options.workers, options.budget, options.only)
  elif options.command == "test":
    test(options.file, options.examples)
  else:
    {"pack": pack, "report": report, "figure": figure}[options.command](options.file)


if __name__ == "__main__":
  main()
