"""What XLA's compilers for TPU and GPU make of a training step, without the hardware.

Measures: kernels, bytes, memory, collectives, the TPU compiler's estimate of cycles, and the time
to compile, of a step of SGD, BatchNorm, BNP, Adam, bnp(Adam) and Muon.
Command: `tpu/bin/python benchmarks/ahead.py v5e v6e`, `cuda/bin/python benchmarks/ahead.py h100`,
some ten minutes each. Without a target it prints the records;
`--figure` draws them.
Quoted by: docs/experiments/step.md, "What the compilers for GPU and TPU report".

The records are in `records/ahead.jsonl`; what it has is not compiled again. The compilers are
packages for separate environments. They need neither hardware nor drivers:

python -m venv tpu && tpu/bin/pip install -e . 'jax[tpu]==0.10.2'
python -m venv cuda && cuda/bin/pip install -e . jax-cuda13-plugin==0.10.2 jax-cuda13-pjrt==0.10.2
"""

import argparse
from collections import Counter
from collections.abc import Iterator
import itertools
import json
import math
import os
import pathlib
import re
import time
from typing import Any, NamedTuple

from cells import CELLS_WITH_FORMS, FORMS, METHODS, describe, make_cell, make_step
import jax
from jax.experimental import topologies
import numpy as np
from tables import append, head, read, row

P = jax.sharding.PartitionSpec
# The TPU's compiler looks for chips otherwise.
WITHOUT_CHIPS = {
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
HERE = pathlib.Path(__file__).parent
RECORDS = HERE / "records" / "ahead.jsonl"
TARGETS = ("v5e", "v6e", "h100")
CELLS = (
  *(f"fc100-100:{batch}:f32" for batch in (1, 16, 60, 256)),
  "fc2048-2048:60:f32",
  "fc4096-4096:60:f32",
  "cnn:128:f32",
  "resnet18:64:f32",
  "resnet50:64:f32",
  "vit-b:64:bf16",
  "gpt2:8:bf16",
)
# The steps that are split over chips, with the number of chips, and how they are split: the batch
# alone; the batch, and each kernel by its inputs; each kernel by its outputs, for every example.
SPLIT_CELLS = {"fc1024-1024:256:f32": 4, "fc1024-1024:16384:f32": 256}
SPLITS = ("data", "data and kernels", "outputs")
SPLIT_METHODS = ("SGD", "BNP", "Adam", "bnp(Adam)")

_FREE = {
  "parameter",
  "constant",
  "bitcast",
  "tuple",
  "get-tuple-element",
  "after-all",
  "partition-id",
}
_COLLECTIVE = re.compile(r"(all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)")
_BITS = re.compile(r"\b(pred|[a-z]+(\d+))\w*\[([\d,]*)\]")


class Instruction(NamedTuple):
  """An instruction of a compiled program: its operation, type, operands and whole line."""

  op: str
  type: str
  operands: list[str]
  line: str


Computations = dict[str, dict[str, Instruction]]


def parse(program: str) -> tuple[Computations, str]:
  """Return the computations of a program as XLA prints it, and the name of the entry."""
  computations, entry = {}, ""
  for line in program.splitlines():
    if head := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{", line):
      current = computations.setdefault(head[2], {})
      entry = head[2] if head[1] else entry
    elif found := re.match(r"\s+(?:ROOT )?%([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)", line):
      name, type_, op, rest = found.groups()
      operands = re.findall(r"%([\w.\-]+)", rest.split("), ")[0])
      current[name] = Instruction(op, type_, operands, line)
  return computations, entry


def kernels(
  computations: Computations, name: str, times: int = 1
) -> Iterator[tuple[int, Instruction, dict[str, Instruction]]]:
  """Yield the kernels of a computation, how often each runs, and the instructions beside it."""
  for x in computations[name].values():
    called = re.search(r"(?:body|to_apply|calls)=%?([\w.\-]+)", x.line)
    if x.op == "while" and called:
      trips = re.search(r'"known_trip_count":\{"n":"(\d+)"', x.line)
      yield from kernels(computations, called[1], times * int(trips[1] if trips else 1))
    elif x.op in ("call", "async-start") and called:
      yield from kernels(computations, called[1], times)
    elif x.op not in _FREE and not x.op.endswith("-done"):
      yield times, x, computations[name]


def size(type_: str) -> int:
  """Return the bytes of a type."""
  return sum(
    (int(bits or 8) + 7) // 8 * math.prod(int(n) for n in shape.split(",") if n)
    for _, bits, shape in _BITS.findall(type_)
  )


def traffic(x: Instruction, beside: dict[str, Instruction], computations: Computations) -> int:
  """Return the bytes of the operands and results of a kernel.

  Of an operand that the kernel only slices, and of a result that it only updates, the part counts.
  """
  whole = size(x.type) + sum(size(beside[name].type) for name in x.operands if name in beside)
  called = re.search(r"calls=%?([\w.\-]+)", x.line)
  if x.op != "fusion" or not called:
    return whole
  inside = computations[called[1]]
  for name, y in inside.items():
    users = [z for z in inside.values() if name in z.operands]
    if y.op == "parameter" and users:
      if all(z.op == "dynamic-slice" for z in users):
        whole += sum(size(z.type) for z in users) - size(y.type)
      elif all(z.op == "dynamic-update-slice" and z.operands[0] == name for z in users):
        # Neither the operand nor the result, which takes its place, is read or written as a whole.
        whole += sum(size(inside[z.operands[1]].type) for z in users) - 2 * size(y.type)
  return whole


def target_devices(target: str, count: int) -> list[Any]:
  """Return the devices of a topology of 1, 4 or 256 chips."""
  os.environ.update(WITHOUT_CHIPS)
  jax.config.update("jax_platforms", "cpu")
  if target == "h100":
    config = (HERE / "h100.txtpb").read_text()
    hosts = max(1, count // 8)
    topology = topologies.get_topology_desc(
      "", "cuda", target_config=config, topology=f"1x{hosts}x{count // hosts}"
    )
  else:
    side = math.isqrt(count)
    bounds = (1, 1, 1) if count == 1 else (2, 2, 1)
    topology = topologies.get_topology_desc(
      f"{target}:{side}x{side}", "tpu", chips_per_host_bounds=bounds
    )
  return topology.devices


def compile_step(name: str, method: str, devices: list[Any], split: str) -> jax.stages.Compiled:
  """Compile the step of a method, split over the devices."""
  cell = make_cell(name)
  step = make_step(cell, method)
  mesh = jax.sharding.Mesh(np.array(devices), ("x",))
  one = jax.sharding.SingleDeviceSharding(devices[0])

  def place(x: Any, spec: P) -> Any:
    sharding = one if len(devices) == 1 else jax.NamedSharding(mesh, spec)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

  def place_carry(x: Any) -> Any:
    axis = {"data and kernels": x.ndim - 2, "outputs": x.ndim - 1}.get(split, -1)
    whole = x.ndim < 2 or axis < 0 or x.shape[axis] % len(devices)
    return place(x, P() if whole else P(*[None] * axis, "x"))

  carry = jax.tree.map(place_carry, jax.eval_shape(step.init, jax.random.key(0)))
  spec = P() if split == "outputs" else P("x")
  batch = tuple(place(x, spec) for x in (cell.inputs, cell.labels))
  shardings = jax.tree.map(lambda x: x.sharding, carry)
  take = jax.jit(step.take, donate_argnums=0, out_shardings=shardings)
  return take.lower(carry, batch).compile()


def measure(target: str, name: str, method: str, split: str) -> dict[str, Any]:
  """Return the record of a step, on one chip or split over several."""
  devices = target_devices(target, SPLIT_CELLS[name] if split else 1)
  start = time.process_time()
  compiled = compile_step(name, method, devices, split)
  seconds = time.process_time() - start
  program, memory = compiled.as_text() or "", compiled.memory_analysis()
  computations, entry = parse(program)
  totals: Counter[str] = Counter()
  for times, x, beside in kernels(computations, entry):
    totals["kernels"] += times
    # A TPU's copies between its memories overlap with other kernels.
    totals["bytes"] += times * (x.op != "copy-start") * traffic(x, beside, computations)
    if cycles := re.search(r'"estimated_cycles":"(\d+)"', x.line):
      totals["cycles"] += times * int(cycles[1])
    if kind := _COLLECTIVE.match(x.op):
      totals["collectives"] += times
      totals[kind[1]] += times * sum(size(beside[operand].type) for operand in x.operands)
  return {
    "target": target,
    "cell": name,
    "method": method,
    "split": split,
    "memory": memory.temp_size_in_bytes + memory.argument_size_in_bytes,
    **totals,
    "compile_seconds": round(seconds, 2),
    "jax": jax.__version__,
  }


Records = dict[tuple[str, str, str, str], dict[str, Any]]


def read_by_step(records: pathlib.Path) -> Records:
  """Return the records so far, by target, cell, split and method."""
  return {(x["target"], x["cell"], x["split"], x["method"]): x for x in read(records)}


_FORM_NAMES = {
  "BNP: product": "product of matrices",
  "BNP: reduction": "**reduction: the library on TPU and GPU**",
  "BNP: centred": "reduction of `v (g_w - mu g_b)`",
  "BNP: pairs": "reduction of two arrays, added in pairs",
  "BNP: two sums": "`sum v g_w - (sum v mu) g_b`",
  "bnp(Adam): product": "bnp(Adam), product",
  "bnp(Adam): reduction": "bnp(Adam), reduction: the library",
}
# What is compared on a target.
_COSTS = {"v5e": "cycles", "v6e": "cycles", "h100": "bytes"}


def report(path: pathlib.Path) -> None:
  """Print the tables of the page."""
  records = read_by_step(path)
  _print_steps(records)
  _print_forms(records)
  _print_splits(records)


def _print_steps(records: Records) -> None:
  others = [method for method in METHODS if method != "SGD"]
  columns = ["target", "network, batch", "kernels: SGD, BNP", "SGD", *others]
  print(head([*columns, "BNP: memory", "BNP: compile time"], "ll"))
  for target, name in itertools.product(TARGETS, CELLS):
    found = {method: records.get((target, name, "", method)) for method in METHODS}
    sgd, bnp = found["SGD"], found["BNP"]
    if sgd and bnp:
      cost = _COSTS[target]
      ratios = [f"{x[cost] / sgd[cost]:.2f}" if (x := found[method]) else "" for method in others]
      kernels = f"{sgd['kernels']:,}, {bnp['kernels']:,}"
      last = [f"{bnp[x] / sgd[x]:.2f}" for x in ("memory", "compile_seconds")]
      shown = f"{sgd[cost] / 1e3:,.0f}k" if cost == "cycles" else f"{sgd[cost] / 1e6:,.1f} MB"
      print(row([target, describe(name), kernels, shown, *ratios, *last]))


def _print_forms(records: Records) -> None:
  shown = list(itertools.product(TARGETS, CELLS_WITH_FORMS))
  heads = (f"{target}, {_COSTS[target]}: {describe(name)}" for target, name in shown)
  print("\n" + head(["form of step 5", *heads], "l"))
  for form, text in _FORM_NAMES.items():
    ratios = []
    for target, name in shown:
      x, sgd = (records.get((target, name, "", method)) for method in (form, "SGD"))
      cost = _COSTS[target]
      ratios.append(f"{x[cost] / sgd[cost]:.2f}" if x and sgd else "")
    print(row([text, *ratios]))


def _print_splits(records: Records) -> None:
  methods = ("SGD", "BNP")
  print("\n" + head(["target", "chips", "split", *methods], "lrlll"))
  for target, (name, chips), split in itertools.product(TARGETS, SPLIT_CELLS.items(), SPLITS):
    found = [records.get((target, name, split, method)) for method in methods]
    if all(found):
      print(row([target, str(chips), split, *(_collectives(x) for x in found if x)]))


def _collectives(record: dict[str, Any]) -> str:
  kinds = sorted(kind for kind in record if _COLLECTIVE.fullmatch(kind))
  return f"{record['collectives']}: " + ", ".join(f"{k} {record[k] / 1e6:.3f} MB" for k in kinds)


def figure(path: pathlib.Path) -> None:
  """Draw the cost of a step relative to SGD beside the records, a panel for each target."""
  import matplotlib.pyplot as plt

  records = read_by_step(path)
  styles = {
    "BatchNorm": ("#E69F00", "^"),
    "BNP": ("#0072B2", "o"),
    "Adam": ("#000000", "<"),
    "bnp(Adam)": ("#D55E00", "h"),
  }
  fig, axes = plt.subplots(1, len(TARGETS), figsize=(11, 4), sharey=True, layout="constrained")
  cells = [name for name in CELLS[::-1] if any(name in key for key in records)]
  for axis, target in zip(axes, TARGETS, strict=True):
    for method, (colour, marker) in styles.items():
      points = [
        (records[target, name, "", method][_COSTS[target]] / sgd[_COSTS[target]], height)
        for height, name in enumerate(cells)
        if (sgd := records.get((target, name, "", "SGD"))) and (target, name, "", method) in records
      ]
      axis.plot(*zip(*points, strict=True), marker, color=colour, label=method, alpha=0.9)
    axis.axvline(1, color="#A6A6A6", zorder=0)
    axis.set(title=target, xlabel=f"{_COSTS[target]} of a step relative to SGD", xlim=(0, None))
    axis.set_yticks(range(len(cells)), [describe(name) for name in cells])
    axis.grid(color="#E6E6E6", linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
  fig.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
  fig.savefig(path.with_suffix(".png"), dpi=150)


def main() -> None:
  """Compile what the records lack, and print them."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("targets", nargs="*", help=", ".join(TARGETS))
  parser.add_argument("--cells", nargs="*", default=CELLS, help="network:batch:dtype")
  parser.add_argument("--figure", action="store_true", help="draw the records as well")
  options = parser.parse_args()
  done = read_by_step(RECORDS)
  wanted = [
    (name, "", method)
    for name in options.cells
    for method in [*make_cell(name).methods, *(FORMS if name in CELLS_WITH_FORMS else ())]
  ]
  wanted += itertools.product(SPLIT_CELLS, SPLITS, SPLIT_METHODS)
  for target in options.targets:
    for name, split, method in wanted:
      if (target, name, split, method) not in done:
        record = measure(target, name, method, split)
        append(RECORDS, record)
        print(json.dumps(record), flush=True)
  report(RECORDS)
  if options.figure:
    figure(RECORDS)


if __name__ == "__main__":
  main()
