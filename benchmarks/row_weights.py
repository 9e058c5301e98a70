"""Compare running statistics that weigh batches alike with those that weigh them by their rows.

Where the number of rows of a batch varies, as with masks, the statistics with `debias` could give a
batch the weight of its number of rows: W <- rho W + a and K = a / W, where a is 1 or the number of
rows relative to its mean. FC 100-100-100 of the paper trains on CIFAR-10 with a mask that keeps
between one example and all of each batch. Seven learning rates and three seeds; accuracy on
held-out images, as in `defaults.py`, which packs the examples.

Command: `python benchmarks/row_weights.py examples.npz`, five minutes on two cores.
Quoted by: docs/experiments/start.md, "Weights of the batches".
"""

import argparse
import itertools
import pathlib
from typing import Any
from unittest import mock

from bnp_experiments.models import find_layers
from bnp_experiments.training import as_inputs
from grid import (
  OPTIMIZER_NAMES,
  RATES,
  SEEDS,
  Cell,
  Lane,
  examples,
  make_optimizer,
  model_and_parameters,
  order,
)
import jax
import jax.numpy as jnp
import numpy as np
import optax
from tables import head, mean_and_range, row

import bnp_optax
from bnp_optax import _running

WEIGHTS = {"by batches": 0.0, "by rows": 1.0}


def main() -> None:
  """Train, and print the table of the page."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("examples", type=pathlib.Path, help="the file that `defaults.py pack` wrote")
  path = parser.parse_args().examples
  print(head(["optimizer, batch size", *WEIGHTS], "l"))
  for optimizer, batch_size in itertools.product(("sgd", "adam"), (6, 60)):
    accuracy = 100 * train(path, Cell("alone", batch_size, "fc", optimizer))
    best = accuracy[np.arange(len(WEIGHTS)), accuracy.mean(axis=2).argmax(axis=1)]
    label = f"{OPTIMIZER_NAMES[optimizer]}, {batch_size}"
    print(row([label, *map(mean_and_range, best)]), flush=True)


def train(path: pathlib.Path, cell: Cell) -> np.ndarray:
  """Return the accuracy of every weight, learning rate and seed."""
  x, y, *held_out = examples(path, cell.network)
  model, parameters = model_and_parameters(path, cell.network)
  parameters = jax.tree.map(jnp.asarray, parameters)
  layers = find_layers(model, as_inputs(x[:1]))
  orders = np.stack([order(seed, len(x), cell) for seed in SEEDS])
  rates = np.float32(RATES[cell.optimizer])

  def run(weight: Any, rate: Any, seed: Any) -> Any:
    tx = bnp_optax.bnp(make_optimizer(cell, Lane(rate, (0.0, 0.0), seed), None), layers=layers)

    def step(carry: Any, indices: Any) -> tuple[Any, None]:
      params, state = carry
      # The indices are random, and so is the number of rows.
      mask = jnp.arange(cell.batch_size) <= indices[0] % cell.batch_size

      def loss_fn(params: Any) -> tuple[Any, Any]:
        with bnp_optax.linen.sow_statistics(mask=mask):
          logits, aux = model.apply(
            {"params": params}, as_inputs(x[indices]), train=True, mutable=["intermediates"]
          )
        labels = y[indices].astype(jnp.int32)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return jnp.mean(losses, where=mask), aux["intermediates"]

      grads, stats = jax.grad(loss_fn, has_aux=True)(params)
      advance = _advance(weight, (cell.batch_size + 1) / 2)
      with mock.patch.object(_running.RunningStatistics, "_advance", advance):
        updates, state = tx.update(grads, state, params, stats=stats)
      return (optax.apply_updates(params, updates), state), None

    params = jax.tree.map(lambda leaf: leaf[seed], parameters)
    (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), jnp.asarray(orders)[seed])
    logits = model.apply({"params": params}, as_inputs(held_out[0]), train=False)
    return jnp.mean((logits.argmax(-1) == held_out[1]) & jnp.isfinite(logits).all(-1))

  lanes = itertools.product(np.float32(list(WEIGHTS.values())), rates, range(len(SEEDS)))
  accuracy = jax.jit(jax.vmap(run))(*map(np.asarray, zip(*lanes, strict=True)))
  return np.asarray(accuracy, np.float64).reshape(len(WEIGHTS), len(rates), len(SEEDS))


def _advance(weight: Any, mean_rows: float) -> Any:
  """Return the step of the statistics in which a batch has the weight (rows / mean)^weight."""

  def advance(
    self: Any, layer: Any, mu: jax.Array, sigma2: jax.Array, W: jax.Array, *, batch: Any
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    del layer
    a = (batch.rows[..., None] / mean_rows) ** weight
    W = self.decay * W + a
    K, d = a / W, batch.mean - mu
    return mu + K * d, (1 - K) * sigma2 + K * batch.variance + K * (1 - K) * d * d, W

  return advance


if __name__ == "__main__":
  main()
