"""The time of each kernel in a training step of plain SGD and of BNP.

Measures: the kernels of a step, FC 3072-100-100-10, at batch sizes 1, 16 and 60.
Command: `taskset -c 1 python benchmarks/step_profile.py`, thirty seconds. Needs `bnp_experiments`.
Quoted by: docs/experiments/step.md, "Where the time goes".
"""

import collections
import gzip
import json
import pathlib
import re
import tempfile

from bnp_experiments import methods
from bnp_experiments.models import MLP
from bnp_experiments.step_time import Step
from bnp_experiments.step_time.cells import Cell
import jax
import numpy as np

BATCHES, SAMPLES, SMALL = (1, 16, 60), 5, 2.0


def profile(step: Step) -> dict[str, float]:
  """Return the median time over steps of each event in the profile, in microseconds."""
  step.sample()
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      for _ in range(SAMPLES):
        step.sample()
    (file,) = pathlib.Path(folder).glob("**/*.trace.json.gz")
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
  taken: dict[str, list[float]] = collections.defaultdict(list)
  for event in events:
    if event.get("ph") == "X":
      taken[event["name"]].append(event["dur"])
  return {name: float(np.median(times)) for name, times in taken.items()}


def main() -> None:
  """Print the kernels of at least two microseconds, and the sum of the shorter ones."""
  for batch in BATCHES:
    cell = Cell("batch", MLP((100, 100)), (32, 32, 3), batch, (methods.SGD, methods.BNP))
    for method in cell.methods:
      step = Step(cell, method)
      taken = profile(step)
      text = step.compiled.as_text()
      entry = text[text.index("ENTRY") :]
      kernels = dict(re.findall(r"%([\w.-]+) = (\(?\w+\[[\d,]*\])", entry))
      small = [taken[name] for name in kernels if 0 < taken.get(name, 0) < SMALL]
      total = sum(taken.get(name, 0) for name in kernels)
      print(f"\nbatch {batch}, {method.label}: {total:.0f} us in kernels")
      for name in sorted(kernels, key=lambda name: -taken.get(name, 0)):
        if taken.get(name, 0) >= SMALL:
          operands = re.search(rf"%{re.escape(name)} = .*?\((.*?)\)", entry)
          read = " ".join(kernels.get(x, "?") for x in re.findall(r"%([\w.-]+)", operands[1]))
          print(f"  {taken[name]:6.1f}  {kernels[name]:14} {name:28} reads {read}")
      print(f"  {sum(small):6.1f}  {len(small)} kernels of less than {SMALL:.0f} us each")


if __name__ == "__main__":
  main()
