"""A small training run for one device, many devices or many processes.

python -m tests.distributed_worker FOLDER PORT PROCESSES PROCESS

is one process of many: it takes the state from the checkpoint `start` in the folder, trains on its
share of the batches in `batches.npz`, and keeps the state as the checkpoint `end`.
"""

import functools
import os
import pathlib
import socket
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

import bnp_optax
from tests import compiling

P = jax.sharding.PartitionSpec
BATCH_SIZE = 16


class CNN(nn.Module):
  """For images of 8x8: a strided convolution, one without bias, and a dense head."""

  dtype: str

  @nn.compact
  def __call__(self, x):
    kwargs = {"dtype": self.dtype, "param_dtype": self.dtype}
    x = nn.relu(nn.Conv(4, (3, 3), strides=2, name="first", **kwargs)(x))
    x = nn.relu(nn.Conv(8, (3, 3), use_bias=False, name="second", **kwargs)(x))
    return nn.Dense(10, name="head", **kwargs)(x.reshape(len(x), -1))


def bnp():
  return optax.chain(bnp_optax.scale_by_bnp(debias=False), optax.sgd(0.02))


def loss_fn(params, batch, **context):
  """Return the mean cross entropy of a batch, and the statistics."""
  x, y = batch
  with bnp_optax.linen.sow_statistics(**context):
    logits, aux = CNN(x.dtype.name).apply({"params": params}, x, mutable=["intermediates"])
  loss = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
  return loss, aux["intermediates"]


def step(tx, params, state, batch, loss_fn=loss_fn, average=lambda grads: grads):
  """Take one training step; `average` may take the mean over devices."""
  (_, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, batch)
  grads = average(grads)
  updates, state = tx.update(grads, state, params, stats=stats)
  return optax.apply_updates(params, updates), state


def start(tx, dtype):
  """Return parameters and state before the first step."""
  params = jax.jit(CNN(dtype).init)(jax.random.key(0), jnp.zeros((1, 8, 8, 1), dtype))["params"]
  return params, tx.init(params)


def make_batches(count, dtype):
  """Return the first batches of scikit-learn's digits, `[count, BATCH_SIZE, ...]`, repeated."""
  from sklearn.datasets import load_digits

  pixels, labels = load_digits(return_X_y=True)
  indices = np.arange(count * BATCH_SIZE).reshape(count, -1) % len(labels)
  images = (pixels / 16).astype(dtype).reshape(-1, 8, 8, 1)
  return images[indices], labels[indices].astype(np.int32)


def make_mesh(shape, axes):
  """Return a mesh of the first devices, on which XLA chooses unspecified shardings."""
  size = int(np.prod(shape))
  auto = (jax.sharding.AxisType.Auto,) * len(axes)
  return jax.make_mesh(shape, axes, axis_types=auto, devices=jax.devices()[:size])


def run_processes(count, folder):
  """Run this file in many processes at once, and raise if one of them fails."""
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = str(free.getsockname()[1])
  root = pathlib.Path(__file__).parents[1]
  environment = os.environ | {
    "PYTHONPATH": os.pathsep.join([str(root), *filter(None, sys.path)]),
    "XLA_FLAGS": compiling.FLAGS.replace("device_count=8", "device_count=1"),
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
  }
  command = [sys.executable, "-m", "tests.distributed_worker", str(folder), port, str(count)]
  processes = [
    subprocess.Popen([*command, str(i)], env=environment, stderr=subprocess.PIPE, text=True)
    for i in range(count)
  ]
  try:
    errors = [process.communicate(timeout=600)[1] for process in processes]
  finally:
    for process in processes:
      process.kill()
  for process, error in zip(processes, errors, strict=True):
    if process.returncode:
      raise RuntimeError(error)


def main(folder, port, processes, process):
  jax.config.update("jax_enable_x64", True)
  jax.distributed.initialize(f"localhost:{port}", int(processes), int(process))
  folder = pathlib.Path(folder)
  mesh = make_mesh((jax.device_count(),), ("data",))
  replicated, split = (jax.NamedSharding(mesh, spec) for spec in (P(), P("data")))
  tx = bnp()

  abstract = jax.eval_shape(lambda: start(tx, "float64"))
  target = jax.tree.map(lambda x: x.update(sharding=replicated), abstract)
  with ocp.StandardCheckpointer() as checkpointer:
    params, state = checkpointer.restore(folder / "start", target)
    train = jax.jit(functools.partial(step, tx))
    with np.load(folder / "batches.npz") as batches:
      images, labels = batches["images"], batches["labels"]
    share = BATCH_SIZE // jax.process_count()
    mine = slice(jax.process_index() * share, (jax.process_index() + 1) * share)
    for batch in zip(images[:, mine], labels[:, mine], strict=True):
      batch = [jax.make_array_from_process_local_data(split, x) for x in batch]
      params, state = train(params, state, batch)
    checkpointer.save(folder / "end", (params, state))


if __name__ == "__main__":
  main(*sys.argv[1:])
