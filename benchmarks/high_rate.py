"""Train at a learning rate that is too high, with each start of the running statistics.

Measures: the mean training loss of four epochs and the largest loss of a step, for the CNN of the
paper on the first 10,000 images of CIFAR-10 at batch size 128, SGD, rate 0.5.
Command: `python benchmarks/high_rate.py`, eight minutes. Needs `bnp_experiments` and CIFAR-10.
Quoted by: docs/diagnostics.md, "A run that blew up".
"""

import functools
from typing import Any

from bnp_experiments import data, models
from bnp_experiments.training import as_inputs
import jax
import numpy as np
import optax

import bnp_optax

RATE, COUNT, BATCH, EPOCHS = 0.5, 10_000, 128, 4
OPTIMIZERS = {
  "the paper's start": lambda: bnp_optax.bnp(optax.sgd(RATE), debias=False),
  "debias": lambda: bnp_optax.bnp(optax.sgd(RATE)),
  "debias, lag_guard=2": lambda: bnp_optax.bnp(optax.sgd(RATE), lag_guard=2.0),
  "debias, bounded step": lambda: bnp_optax.bnp(
    optax.chain(optax.sgd(RATE), optax.adaptive_grad_clip(0.03))
  ),
}


def train(tx: optax.GradientTransformationExtraArgs, seed: int, x: Any, y: Any) -> np.ndarray:
  """Return the loss of each step, `[epochs, steps]`."""
  model = models.CNN()
  params = model.init(jax.random.key(seed), as_inputs(x[:1]), train=False)["params"]

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def step(params: Any, state: Any, x: jax.Array, y: jax.Array) -> tuple[Any, Any, jax.Array]:
    def loss_fn(params: Any) -> tuple[jax.Array, Any]:
      with bnp_optax.linen.sow_statistics():
        logits, aux = model.apply(
          {"params": params}, as_inputs(x), train=True, mutable=["intermediates"]
        )
      losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
      return losses.mean(), aux["intermediates"]

    (loss, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
    updates, state = tx.update(grads, state, params, stats=stats)
    return optax.apply_updates(params, updates), state, loss

  state, losses, steps = tx.init(params), [], COUNT // BATCH
  for epoch in range(EPOCHS):
    order = np.random.default_rng(1000 * seed + epoch).permutation(COUNT)
    for indices in order[: steps * BATCH].reshape(steps, BATCH):
      params, state, loss = step(params, state, x[indices], y[indices])
      losses.append(float(loss))
  return np.reshape(losses, (EPOCHS, steps))


def main() -> None:
  """Print the losses of each start, for two seeds."""
  dataset = data.load("cifar10")
  x, y = dataset.x_train[:COUNT], dataset.y_train[:COUNT].astype(np.int32)
  for seed in range(2):
    for name, make in OPTIMIZERS.items():
      losses = train(make(), seed, x, y)
      epochs = ", ".join(f"{loss:.3g}" for loss in losses.mean(axis=1))
      print(f"| {name} | {seed} | {epochs} | {losses.max():.3g} |", flush=True)


if __name__ == "__main__":
  main()
