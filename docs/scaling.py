"""How the cost of a data-parallel step grows with the number of devices, with and without BNP.

python -m docs.scaling    (about a minute; the table of docs/distributed.md)
"""

import os
import statistics
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import bnp_optax

P = jax.sharding.PartitionSpec
BATCH_SIZE, ROUNDS = 256, 30


class Network(nn.Module):
  """FC 784-512-512-10."""

  @nn.compact
  def __call__(self, h: jax.Array) -> jax.Array:
    """Logits of a batch."""
    for _ in range(2):
      h = nn.relu(nn.Dense(512)(h))
    return nn.Dense(10)(h)


def compiled_step(devices: int, tx: optax.GradientTransformation):  # noqa: ANN201
  """One data-parallel step, compiled, and what it is called with."""
  auto = (jax.sharding.AxisType.Auto,)
  mesh = jax.make_mesh((devices,), ("data",), auto, devices=jax.devices()[:devices])
  rng = np.random.default_rng(0)
  batch = (
    rng.normal(size=(BATCH_SIZE, 784)).astype(np.float32),
    rng.integers(0, 10, BATCH_SIZE, np.int32),
  )
  batch = jax.device_put(batch, jax.NamedSharding(mesh, P("data")))
  params = Network().init(jax.random.key(0), jnp.zeros((1, 784)))["params"]
  carry = jax.device_put((params, tx.init(params)), jax.NamedSharding(mesh, P()))

  def loss_fn(params, batch):  # noqa: ANN001, ANN202
    x, y = batch
    with bnp_optax.linen.sow_statistics():
      logits, aux = Network().apply({"params": params}, x, mutable=["intermediates"])
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
    return loss, aux["intermediates"]

  def step(params, state, batch):  # noqa: ANN001, ANN202
    (_, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, batch)
    updates, state = optax.with_extra_args_support(tx).update(grads, state, params, stats=stats)
    return optax.apply_updates(params, updates), state

  return jax.jit(step).lower(*carry, batch).compile(), (*carry, batch)


def main() -> None:
  """Measures, all in turn so that a busy machine slows all alike, and prints the table."""
  from tests.test_distributed import wire

  optimizers = {
    "SGD": optax.sgd(0.1),
    "BNP": optax.chain(bnp_optax.scale_by_bnp(), optax.sgd(0.1)),
  }
  programs = {
    (devices, name): compiled_step(devices, tx)
    for devices in (1, 2, 4, 8)
    for name, tx in optimizers.items()
  }
  seconds = {key: [] for key in programs}
  for _ in range(ROUNDS):
    for key, (step, args) in programs.items():
      begun = time.perf_counter()
      jax.block_until_ready(step(*args))
      seconds[key].append(time.perf_counter() - begun)
  print("| devices | SGD, ms | BNP, ms | SGD, bytes | BNP, bytes | BNP adds |")
  print("| --: " * 6 + "|")
  for devices in (1, 2, 4, 8):
    times = [1e3 * statistics.median(seconds[devices, name]) for name in optimizers]
    carried = [
      sum(
        int(np.prod(shape, dtype=int)) * int(dtype.strip("fsu")) // 8
        for dtype, shape in wire(programs[devices, name][0])
      )
      for name in optimizers
    ]
    added = f"{carried[1] / carried[0] - 1:.2%}" if carried[0] else ""
    print(
      f"| {devices} | {times[0]:.1f} | {times[1]:.1f} | {carried[0]:,} | {carried[1]:,} | {added} |"
    )


if __name__ == "__main__":
  os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
  main()
