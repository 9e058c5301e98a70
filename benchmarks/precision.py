"""The error of a float32 step against the mean of the inputs over their deviation.

Measures: the relative errors of the step and of the running variance, for three kinds of layers
with the paper's start. For a dense layer with the default start: those of the running variance, of
the variance of single rows whose statistics are added, and of the step in bfloat16.
Command: `python benchmarks/precision.py`, one minute. Needs the test dependencies.
Quoted by: docs/precision.md.
"""

import pathlib
import sys
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from tables import head, row

import bnp_optax

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


def error_of_running_variance(ratio: float, seed: int) -> float:
  """Return the largest relative error of the running variance with the default start."""
  rng, tx = np.random.default_rng(seed), bnp_optax.scale_by_bnp(DECAY)
  params = {"kernel": jnp.ones((16, 4)), "bias": jnp.zeros(4)}
  state, mu, sigma2, W = tx.init(params), np.zeros(16), np.zeros(16), 0.0

  @jax.jit
  def step(state: Any, x: jax.Array) -> Any:
    stats = {"layer_statistics": bnp_optax.layer_statistics(x, examples=16, rows=16)}
    return tx.update(params, state, params, stats=stats)[1]

  for _ in range(STEPS):
    x = (ratio + rng.normal(size=(16, 16))).astype(np.float32)
    state, h = step(state, x), x.astype(np.float64)
    W = DECAY * W + 1
    d = h.mean(0) - mu
    mu = mu + d / W
    sigma2 = (1 - 1 / W) * (sigma2 + d**2 / W) + h.var(0) / W
  return np.max(np.abs(np.asarray(state.input_variance["kernel"], np.float64) / sigma2 - 1))


def error_of_added_rows(ratio: float, seed: int) -> float:
  """Return the largest relative error of the variance of 64 single rows that are added."""
  x = (ratio + np.random.default_rng(seed).normal(size=(64, 16))).astype(np.float32)
  rows = [bnp_optax.layer_statistics(row[None], examples=1, rows=1) for row in jnp.asarray(x)]
  variance = jax.tree.map(lambda *x: sum(x[1:], x[0]), *rows).variance
  return np.max(np.abs(np.asarray(variance, np.float64) / x.astype(np.float64).var(0) - 1))


def error_of_bfloat16_step(ratio: float, seed: int) -> float:
  """Return the relative error of the first step of a kernel whose layer computes in bfloat16."""
  rng = np.random.default_rng(seed)
  # Numbers that bfloat16 represents exactly, so that only the gradient is rounded.
  x = jnp.asarray(ratio + rng.normal(size=(64, 64)), jnp.bfloat16).astype(jnp.float32)
  y = jnp.asarray(rng.normal(size=(64, 8)), jnp.float32)
  params = {"kernel": jnp.asarray(rng.normal(size=(64, 8)) / 8, jnp.float32), "bias": jnp.zeros(8)}
  tx = bnp_optax.scale_by_bnp()

  def step(dtype: Any) -> jax.Array:
    layer = nn.Dense(8, dtype=dtype)

    def loss_fn(params: Any) -> tuple[jax.Array, Any]:
      with bnp_optax.linen.sow_statistics():
        z, aux = layer.apply({"params": params}, x, mutable=["intermediates"])
      return optax.l2_loss(z.astype(jnp.float32), y).sum(-1).mean(), aux["intermediates"]

    grads, stats = jax.grad(loss_fn, has_aux=True)(params)
    return tx.update(grads, tx.init(params), params, stats=stats)[0]["kernel"]

  expected = step(jnp.float32)
  return float(jnp.linalg.norm(step(jnp.bfloat16) - expected) / jnp.linalg.norm(expected))


DEFAULT = {
  "running variance": error_of_running_variance,
  "variance of added single rows": error_of_added_rows,
  "first step in bfloat16": error_of_bfloat16_step,
}


def main() -> None:
  """Print the tables."""
  print(head(["mean / deviation", *(f"{name}: step, variance" for name in CASES)]))
  for ratio in (0, 1, 10, 30, 100, 1e3, 1e4, 1e5):
    cells = ["{:.0e}, {:.0e}".format(*largest_errors(*case, ratio)) for case in CASES.values()]
    print(row([f"{ratio:g}", *cells]), flush=True)
  print("\n" + head(["mean / deviation", *DEFAULT]))
  for ratio in (0, 1, 3, 10, 30, 100, 1e3, 1e4):
    errors = [max(error(ratio, seed) for seed in range(SEEDS)) for error in DEFAULT.values()]
    print(row([f"{ratio:g}", *(f"{error:.0e}" for error in errors)]), flush=True)


if __name__ == "__main__":
  main()
