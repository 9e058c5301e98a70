"""The cost of a data-parallel step against the number of devices, with and without BNP.

Measures: the time of a step on 1, 2, 4 and 8 emulated devices, and the bytes of its collectives.
Command: `python benchmarks/scaling.py`, thirty seconds. Needs the test dependencies.
Quoted by: docs/distributed.md, "Communication".
"""

from collections.abc import Callable
import functools
import os
import pathlib
import sys
from typing import Any

from common import FullyConnected, time_in_turn, training_step
import jax
import jax.numpy as jnp
import numpy as np
import optax
from tables import head

import bnp_optax

# The tests read the collectives from compiled programs; they are not installed.
sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
from tests.test_distributed import communication

P = jax.sharding.PartitionSpec
BATCH_SIZE, DEVICES = 256, (1, 2, 4, 8)
MODEL = FullyConnected((512, 512))


def compiled_step(
  devices: int, tx: optax.GradientTransformation
) -> tuple[jax.stages.Compiled, Callable[[], Any]]:
  """Return a compiled data-parallel step, and a function that runs it."""
  auto = (jax.sharding.AxisType.Auto,)
  mesh = jax.make_mesh((devices,), ("data",), auto, devices=jax.devices()[:devices])
  rng = np.random.default_rng(0)
  batch = (
    rng.normal(size=(BATCH_SIZE, 784)).astype(np.float32),
    rng.integers(0, 10, BATCH_SIZE, np.int32),
  )
  batch = jax.device_put(batch, jax.NamedSharding(mesh, P("data")))
  params = MODEL.init(jax.random.key(0), jnp.zeros((1, 784)))["params"]
  carry = jax.device_put((params, tx.init(params)), jax.NamedSharding(mesh, P()))
  compiled = jax.jit(training_step(MODEL, tx)).lower(carry, batch).compile()
  return compiled, functools.partial(compiled, carry, batch)


def carried_bytes(compiled: jax.stages.Compiled) -> int:
  """Return the bytes that the collectives of a compiled program carry."""
  return sum(
    int(np.prod(shape, dtype=int)) * int(dtype.strip("fsu")) // 8
    for dtype, shape in communication(compiled)
  )


def main() -> None:
  """Print the table."""
  optimizers = {
    "SGD": optax.sgd(0.1),
    "BNP": optax.chain(bnp_optax.scale_by_bnp(), optax.sgd(0.1)),
  }
  programs, functions = {}, {}
  for devices in DEVICES:
    for name, tx in optimizers.items():
      key = f"{name}, {devices}"
      programs[key], functions[key] = compiled_step(devices, tx)
  seconds = time_in_turn(functions, rounds=30, calls=1)
  print(head(("devices", "SGD, ms", "BNP, ms", "SGD, bytes", "BNP, bytes", "BNP adds")))
  for devices in DEVICES:
    keys = [f"{name}, {devices}" for name in optimizers]
    times = " | ".join(f"{1e3 * np.median(seconds[key]):.1f}" for key in keys)
    sgd, bnp = (carried_bytes(programs[key]) for key in keys)
    added = f"{bnp / sgd - 1:.2%}" if sgd else ""
    print(f"| {devices} | {times} | {sgd:,} | {bnp:,} | {added} |")


if __name__ == "__main__":
  os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
  main()
