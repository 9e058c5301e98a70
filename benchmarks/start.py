"""Measure the accuracy of BNP with and without the bias of the initial statistics.

The network is FC 3072-100-100-100-10 on CIFAR-10. Every setting and optimizer trains for 60 steps
at batch size 512 and for 400 at 60, with each learning rate and three seeds. The settings are the
paper's start, `debias`, `debias` with `lag_guard`, and `debias` with a bound on the step.

Command: `python benchmarks/start.py`, fifteen minutes. Needs `bnp_experiments` and CIFAR-10.
Quoted by: docs/optimizers.md, "The start of the running statistics".
"""

from collections.abc import Callable, Iterable
import functools
from typing import Any

from bnp_experiments import data
from bnp_experiments.models import MLP
from bnp_experiments.training import as_inputs
import jax
import jax.numpy as jnp
import numpy as np
import optax

import bnp_optax

MODEL = MLP()
SEEDS = (0, 1, 2)
HELD_OUT = 5_000
LENGTHS = ((512, 60), (60, 400))
OPTIMIZERS: dict[str, tuple[Callable[[Any], Any], tuple[float, ...]]] = {
  "SGD": (optax.sgd, (0.03, 0.1, 0.3, 1.0)),
  "Adam": (optax.adam, (3e-4, 1e-3, 3e-3, 1e-2)),
}


def bounded(optimizer: Callable[[Any], Any], rate: Any) -> Any:
  """Return an optimizer whose step for each output is at most 3 % of its weights in z."""
  return optax.chain(optimizer(rate), optax.adaptive_grad_clip(0.03))


SETTINGS: dict[str, Callable[[Callable[[Any], Any], Any], Any]] = {
  "the paper's start": lambda optimizer, rate: bnp_optax.bnp(optimizer(rate)),
  "debias": lambda optimizer, rate: bnp_optax.bnp(optimizer(rate), debias=True),
  "debias, lag_guard=2": lambda optimizer, rate: bnp_optax.bnp(
    optimizer(rate), debias=True, lag_guard=2.0
  ),
  "debias, bounded step": lambda optimizer, rate: bnp_optax.bnp(
    bounded(optimizer, rate), debias=True
  ),
}


@functools.partial(jax.jit, static_argnames="make")
def train(
  make: Callable[[Any], Any],
  rate: jax.Array,
  params: Any,
  order: jax.Array,
  examples: tuple[jax.Array, jax.Array],
) -> Any:
  """Train one run along the batches of `order`, `[steps, batch]`; return its parameters."""
  tx = make(rate)

  def step(carry: tuple[Any, Any], indices: jax.Array) -> tuple[tuple[Any, Any], None]:
    params, state = carry
    images, labels = (x[indices] for x in examples)

    def loss_fn(params: Any) -> tuple[jax.Array, Any]:
      with bnp_optax.linen.sow_statistics():
        logits, aux = MODEL.apply(
          {"params": params}, as_inputs(images), train=True, mutable=["intermediates"]
        )
      losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
      return losses.mean(), aux["intermediates"]

    grads, stats = jax.grad(loss_fn, has_aux=True)(params)
    updates, state = tx.update(grads, state, params, stats=stats)
    return (optax.apply_updates(params, updates), state), None

  return jax.lax.scan(step, (params, tx.init(params)), order)[0][0]


def accuracies(
  make: Callable[[Any], Any], rates: Iterable[float], orders: np.ndarray, dataset: data.DataSet
) -> np.ndarray:
  """Return the accuracy on the held-out images, `[rates, seeds]`."""
  images, labels = jnp.asarray(dataset.x_train), jnp.asarray(dataset.y_train, jnp.int32)
  held_out, held_out_labels = as_inputs(images[-HELD_OUT:]), labels[-HELD_OUT:]
  found = []
  for rate in rates:
    for seed, order in zip(SEEDS, orders, strict=True):
      params = MODEL.init(jax.random.key(seed), as_inputs(images[:1]), train=False)["params"]
      trained = train(make, jnp.float32(rate), params, jnp.asarray(order), (images, labels))
      logits = MODEL.apply({"params": trained}, held_out, train=False)
      found.append(np.mean(np.argmax(logits, axis=-1) == held_out_labels))
  return np.reshape(found, (-1, len(SEEDS)))


def main() -> None:
  """Print the mean and the range over the seeds, in %, for each learning rate."""
  dataset = data.load("cifar10")
  for batch_size, steps in LENGTHS:
    count = len(dataset.y_train) - HELD_OUT
    orders = np.stack(
      [np.random.default_rng(seed).permutation(count)[: batch_size * steps] for seed in SEEDS]
    ).reshape(len(SEEDS), steps, batch_size)
    for name, (optimizer, rates) in OPTIMIZERS.items():
      print(f"\nbatch size {batch_size}, {steps} steps, {name}, rates {rates}", flush=True)
      for setting, around in SETTINGS.items():
        make = functools.partial(around, optimizer)
        found = 100 * accuracies(make, rates, orders, dataset)
        cells = (f"{x.mean():.1f} ({x.min():.1f}–{x.max():.1f})" for x in found)
        print(f"| {setting} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
  main()
