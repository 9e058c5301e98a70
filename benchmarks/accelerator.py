"""The time of a training step on the default device, such as a GPU.

Measures: the time of a step of SGD, BatchNorm, BNP, Adam, bnp(Adam) and Muon, and of BNP with other
forms of step 5.
Command: `python benchmarks/accelerator.py --out records.jsonl`, on an H100 some ten minutes. With
`--report` it prints the records instead.
Quoted by: docs/performance.md, "Measured on an H200 and an H100".

All methods of a cell are compiled first and then timed in turn, in rounds. One measurement is a
compiled loop of steps. The loop takes two batches in turn, so that the compiler cannot compute
anything of a batch once for all steps. A ratio is taken within a round.
"""

import argparse
from collections.abc import Callable, Iterator
import functools
import json
import pathlib
import time
from typing import Any

from cells import CELLS_WITH_FORMS, FORMS, METHODS, describe, make_cell, make_step
from common import repeated, time_in_turn
import jax
import jax.numpy as jnp
import numpy as np
from tables import append, head, read, row

CELLS = (
  "fc4096-4096:60:f32",
  "fc100-100:60:f32",
  "fc2048-2048:60:f32",
  "gpt2:8:bf16",
  "resnet18:64:f32",
  "cnn:128:f32",
  "fc100-100:1:f32",
  "fc100-100:16:f32",
  "fc100-100:256:f32",
)
CALIBRATION = 10


def make_batches(name: str) -> tuple[jax.Array, jax.Array]:
  """Return two random batches, along the leading axis."""
  cell, rng = make_cell(name), np.random.default_rng(0)

  def draw(x: jax.ShapeDtypeStruct) -> Any:
    shape = (2, *x.shape)
    if jnp.issubdtype(x.dtype, jnp.floating):
      return rng.normal(size=shape).astype(x.dtype)
    return rng.integers(0, 10, shape, x.dtype)

  return jax.device_put((draw(cell.inputs), draw(cell.labels)))


def make_loop(name: str, method: str, steps: int, batches: Any) -> tuple[Callable[[], Any], float]:
  """Return a function that takes a number of steps at each call, and the seconds to compile it."""
  step = make_step(make_cell(name), method)
  carry = jax.jit(step.init)(jax.random.key(0))

  @functools.partial(jax.jit, donate_argnums=0)
  def loop(carry: Any, batches: Any) -> Any:
    def body(i: jax.Array, carry: Any) -> Any:
      return step.take(carry, jax.tree.map(lambda x: x[i % 2], batches))

    return jax.lax.fori_loop(0, steps, body, carry)

  start = time.perf_counter()
  compiled = loop.lower(carry, batches).compile()
  seconds = time.perf_counter() - start
  return repeated(compiled, carry, batches), seconds


def count_steps(name: str, batches: Any, seconds: float) -> int:
  """Return the number of steps of plain SGD that take as long as given."""
  loop, _ = make_loop(name, "SGD", CALIBRATION, batches)
  time_of_call = np.median(time_in_turn({"SGD": loop}, rounds=3, calls=1)["SGD"])
  return max(1, round(seconds / time_of_call * CALIBRATION))


def measure(name: str, methods: list[str], rounds: int, seconds: float) -> Iterator[dict[str, Any]]:
  """Yield the record of each method of a cell."""
  batches = make_batches(name)
  steps = count_steps(name, batches, seconds)
  loops, compile_seconds = {}, {}
  for method in methods:
    try:
      loops[method], compile_seconds[method] = make_loop(name, method, steps, batches)
    except jax.errors.JaxRuntimeError as error:  # Out of memory, for example.
      yield {"cell": name, "method": method, "error": str(error)[:300]}
  if "SGD" not in loops:
    return
  times = time_in_turn(loops, rounds=rounds, calls=1)
  for method, values in times.items():
    low, median, high = np.quantile(values / times["SGD"], (0.25, 0.5, 0.75))
    yield {
      "cell": name,
      "method": method,
      "microseconds": round(1e6 * float(np.median(values)) / steps, 2),
      "ratio": round(float(median), 4),
      "quartiles": [round(float(low), 4), round(float(high), 4)],
      "steps": steps,
      "rounds": rounds,
      "compile_seconds": round(compile_seconds[method], 2),
    }


def report(path: pathlib.Path) -> None:
  """Print the table of the page: times relative to SGD, median (quartiles)."""
  records = [r for r in read(path) if "ratio" in r]
  found = {(r["cell"], r["method"]): r for r in records}
  others = [method for method in METHODS if method != "SGD"]
  print(head(("device", "network, batch", "SGD, µs", *others), "ll"))
  for name in dict.fromkeys(r["cell"] for r in records):
    sgd = found[name, "SGD"]
    cells = [sgd["device"], describe(name), f"{sgd['microseconds']:,.0f}"]
    for method in others:
      r = found.get((name, method))
      low, high = r["quartiles"] if r else (0, 0)
      cells.append(f"{r['ratio']:.2f} ({low:.2f}–{high:.2f})" if r else "")
    print(row(cells))


def main() -> None:
  """Measure the cells that the output file does not have yet."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--out", type=pathlib.Path, required=True, help="file of JSON lines")
  parser.add_argument(
    "--budget", type=float, default=3600, help="seconds after which no cell starts"
  )
  parser.add_argument("--cells", nargs="*", default=CELLS, help="network:batch:dtype")
  parser.add_argument("--forms", nargs="*", default=CELLS_WITH_FORMS, help="cells with all forms")
  parser.add_argument("--rounds", type=int, default=15, help="measurements of each method")
  parser.add_argument("--seconds", type=float, default=0.05, help="length of a measurement of SGD")
  parser.add_argument("--revision", default="", help="revision of the library, for the records")
  parser.add_argument("--report", action="store_true", help="print the records instead")
  options = parser.parse_args()
  if options.report:
    report(options.out)
    return

  start = time.perf_counter()
  device = jax.devices()[0]
  run = {
    "device": device.device_kind,
    "jax": jax.__version__,
    "revision": options.revision,
  }
  # A cell with an error, such as memory that ran out, is measured again.
  done = {r["cell"] for r in read(options.out) if "ratio" in r and r["device"] == run["device"]}
  for name in options.cells:
    if name in done:
      continue
    if time.perf_counter() - start > options.budget:
      print(f"budget used up before {name}", flush=True)
      break
    methods = [*make_cell(name).methods, *(FORMS if name in options.forms else ())]
    try:
      records = list(measure(name, methods, options.rounds, options.seconds))
    except jax.errors.JaxRuntimeError as error:
      records = [{"cell": name, "error": str(error)[:300]}]
    append(options.out, *(run | record for record in records))
    for record in records:
      print(json.dumps(record), flush=True)
    print(f"{name}: {time.perf_counter() - start:.0f} s so far", flush=True)


if __name__ == "__main__":
  main()
