"""What XLA's compilers for TPU and GPU make of a training step, without the hardware.

Measures: kernels, bytes, memory, collectives, the TPU compiler's estimate of cycles, and the time
to compile, of a step of SGD, BatchNorm, BNP, Adam, bnp(Adam) and Muon.
Command: `tpu/bin/python benchmarks/ahead.py v5e v6e`, `cuda/bin/python benchmarks/ahead.py h100`,
some ten minutes each. Without a target it prints the records.
Quoted by: docs/performance.md, "On GPU and TPU".

The records are in `records/ahead.jsonl`; what it has is not compiled again. The compilers are
packages, for
separate environments. They need neither hardware nor drivers:

python -m venv tpu && tpu/bin/pip install -e . 'jax[tpu]==0.10.2'
python -m venv cuda && cuda/bin/pip install -e . jax-cuda13-plugin==0.10.2 jax-cuda13-pjrt==0.10.2
"""

import argparse
from collections import Counter
from collections.abc import Iterator
import json
import math
import os
import pathlib
import re
import time
from typing import Any, NamedTuple

from cells import CELLS_WITH_FORMS, FORMS, METHODS, make_cell, make_step
import jax
from jax.experimental import topologies
import numpy as np

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
  "gpt2:8:bf16",
)
# The network whose step is split over four chips, and how.
SPLIT_CELL, SPLITS = "fc1024-1024:256:f32", ("data", "data and kernels")

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
  """Return the devices of a topology of one or four chips."""
  os.environ.update(WITHOUT_CHIPS)
  jax.config.update("jax_platforms", "cpu")
  if target == "h100":
    config = (HERE / "h100.txtpb").read_text()
    topology = topologies.get_topology_desc(
      "", "cuda", target_config=config, topology=f"1x1x{count}"
    )
  else:
    shape, bounds = ("2x2", (2, 2, 1)) if count == 4 else ("1x1", (1, 1, 1))
    topology = topologies.get_topology_desc(
      f"{target}:{shape}", "tpu", chips_per_host_bounds=bounds
    )
  return topology.devices


def compile_step(name: str, method: str, devices: list[Any], split: str) -> jax.stages.Compiled:
  """Compile the step of a method; with several devices, the batch is split over them."""
  cell = make_cell(name)
  step = make_step(cell, method)
  mesh = jax.sharding.Mesh(np.array(devices), ("x",))
  one = jax.sharding.SingleDeviceSharding(devices[0])

  def place(x: Any, spec: P) -> Any:
    sharding = one if len(devices) == 1 else jax.NamedSharding(mesh, spec)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

  def place_carry(x: Any) -> Any:
    whole = x.ndim < 2 or x.shape[-2] % len(devices) or split == "data"
    return place(x, P() if whole else P(*[None] * (x.ndim - 2), "x"))

  carry = jax.tree.map(place_carry, jax.eval_shape(step.init, jax.random.key(0)))
  batch = tuple(place(x, P("x")) for x in (cell.inputs, cell.labels))
  shardings = jax.tree.map(lambda x: x.sharding, carry)
  take = jax.jit(step.take, donate_argnums=0, out_shardings=shardings)
  return take.lower(carry, batch).compile()


def measure(target: str, name: str, method: str, split: str) -> dict[str, Any]:
  """Return the record of a step, on one chip or split over four."""
  devices = target_devices(target, 4 if split else 1)
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


def read_records() -> list[dict[str, Any]]:
  """Return the records so far."""
  return [json.loads(line) for line in RECORDS.read_text().splitlines()] if RECORDS.exists() else []


def print_tables() -> None:
  """Print the records as Markdown, relative to plain SGD."""
  records = {(x["target"], x["cell"], x["split"], x["method"]): x for x in read_records()}
  others = [method for method in (*METHODS, *FORMS) if method != "SGD"]
  for quantity in ("cycles", "bytes", "memory", "kernels", "compile_seconds"):
    print(f"\n| target | network, batch | SGD, {quantity} |", " | ".join(others), "|")
    print("| --- | --- " + "| --: " * (1 + len(others)) + "|")
    for target in TARGETS:
      for name in CELLS:
        sgd = records.get((target, name, "", "SGD"), {})
        if quantity in sgd:
          row = [records.get((target, name, "", method)) for method in others]
          ratios = [f"{x[quantity] / sgd[quantity]:.2f}" if x else "" for x in row]
          print(f"| {target} | {name} | {sgd[quantity]:,} |", " | ".join(ratios), "|")
  for (target, _, split, method), x in records.items():
    if split:
      kinds = ", ".join(f"{kind} {x[kind]:,}" for kind in x if _COLLECTIVE.fullmatch(kind))
      print(f"{target}, {split}, {method}: {x['collectives']} collectives, bytes in: {kinds}")


def main() -> None:
  """Compile what the records lack, and print them."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("targets", nargs="*", help=", ".join(TARGETS))
  parser.add_argument("--cells", nargs="*", default=CELLS, help="network:batch:dtype")
  options = parser.parse_args()
  done = {(x["target"], x["cell"], x["method"], x["split"]) for x in read_records()}
  wanted = [(name, split) for split in SPLITS for name in [SPLIT_CELL]]
  wanted = [*((name, "") for name in options.cells), *wanted]
  for target in options.targets:
    for name, split in wanted:
      for method in [*make_cell(name).methods, *(FORMS if name in CELLS_WITH_FORMS else ())]:
        if (target, name, method, split) not in done:
          record = measure(target, name, method, split)
          with RECORDS.open("a") as file:
            file.write(json.dumps(record) + "\n")
          print(json.dumps(record), flush=True)
  print_tables()


if __name__ == "__main__":
  main()
