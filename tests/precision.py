"""How the error of a float32 step grows with the mean of the inputs over their deviation.

python -m tests.precision    (about a minute; the table of docs/precision.md)
"""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from tests.test_algorithms import relative_error, run

CASES = {
  "dense": (nn.Dense(4), (16, 16)),
  "conv": (nn.Conv(4, (3, 3)), (8, 6, 6, 4)),
  "dense, no bias": (nn.Dense(4, use_bias=False), (16, 16)),
}


def largest_errors(layer, shape, ratio, decay, steps):
  """The largest relative error over three seeds of the last step's updates and variances."""
  errors = []
  for seed in range(3):
    problem = {"layer": layer, "shape": shape, "mean": ratio, "deviation": 1.0}
    *_, last = run({**problem, "decay": decay, "seed": seed}, jnp.float32, steps)
    _, updates, state, expected, (_, sigma2) = last
    variance = np.asarray(state.input_variance["kernel"], np.float64)
    errors.append((relative_error(updates, expected), np.max(np.abs(variance / sigma2 - 1))))
  return np.max(errors, axis=0)


if __name__ == "__main__":
  print("| mean / deviation | " + " | ".join(f"{name}: step, variance" for name in CASES) + " |")
  print("| --: " * (1 + len(CASES)) + "|")
  for ratio in (0, 1, 10, 30, 100, 1e3, 1e4, 1e5):
    cells = [
      "{:.0e}, {:.0e}".format(*largest_errors(*case, ratio, decay=0.9, steps=200))
      for case in CASES.values()
    ]
    print(f"| {ratio:g} | " + " | ".join(cells) + " |", flush=True)
