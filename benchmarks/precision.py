"""The error of a float32 step against the mean of the inputs over their deviation.

Measures: the relative errors of the step and of the running variance, for three kinds of layers.
Command: `python benchmarks/precision.py`, thirty seconds. Needs the test dependencies.
Quoted by: docs/precision.md.
"""

import pathlib
import sys

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

# The float64 transcription of the paper's algorithms belongs to the tests, which are not installed.
sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
from tests.test_algorithms import relative_error, run

DECAY, STEPS, SEEDS = 0.9, 200, 3
CASES = {
  "dense": (nn.Dense(4), (16, 16)),
  "conv": (nn.Conv(4, (3, 3)), (8, 6, 6, 4)),
  "dense, no bias": (nn.Dense(4, use_bias=False), (16, 16)),
}


def largest_errors(layer: nn.Module, shape: tuple[int, ...], ratio: float) -> np.ndarray:
  """Return the largest relative errors over the seeds, of the last step's updates and variances."""
  errors = []
  for seed in range(SEEDS):
    problem = {"layer": layer, "shape": shape, "mean": ratio, "deviation": 1.0}
    *_, last = run({**problem, "decay": DECAY, "seed": seed}, jnp.float32, STEPS)
    _, updates, state, expected, (_, sigma2) = last
    variance = np.asarray(state.input_variance["kernel"], np.float64)
    errors.append((relative_error(updates, expected), np.max(np.abs(variance / sigma2 - 1))))
  return np.max(errors, axis=0)


def main() -> None:
  """Print the table."""
  print("| mean / deviation | " + " | ".join(f"{name}: step, variance" for name in CASES) + " |")
  print("| --: " * (1 + len(CASES)) + "|")
  for ratio in (0, 1, 10, 30, 100, 1e3, 1e4, 1e5):
    cells = ["{:.0e}, {:.0e}".format(*largest_errors(*case, ratio)) for case in CASES.values()]
    print(f"| {ratio:g} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
  main()
