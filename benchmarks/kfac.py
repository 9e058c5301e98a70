"""The time of a training step with K-FAC, beside BNP and plain SGD.

Measures: the time relative to plain SGD, FC 3072-100-100-10, at batch sizes 1, 16, 60 and 512.
Command: `kfac/bin/python benchmarks/kfac.py`, five minutes.
Quoted by: docs/performance.md, "Beside K-FAC".

kfac-jax 0.0.8 needs an older JAX than the newest one that BNP supports, so install it in a separate
environment:

python -m venv kfac
kfac/bin/pip install -e . kfac-jax==0.0.8 jax==0.8.1 jaxlib==0.8.1 flax==0.12.6
"""

from collections.abc import Callable
import itertools
from typing import Any

from common import FullyConnected, repeated, time_in_turn, training_step
import jax
import jax.numpy as jnp
import numpy as np
import optax

import bnp_optax

MODEL = FullyConnected((100, 100))


def optax_step(tx: optax.GradientTransformation, params: Any, batch: Any) -> Callable[[], Any]:
  """Return a function that takes one step of an Optax optimizer at each call."""
  return repeated(jax.jit(training_step(MODEL, tx)), (params, tx.init(params)), batch)


def kfac_step(params: Any, batch: Any) -> Callable[[], Any]:
  """Return a function that takes one step of K-FAC, which adapts its hyperparameters."""
  # Imported here because the environment of the other benchmarks does not have it.
  import kfac_jax  # pyright: ignore[reportMissingImports]

  def loss_fn(params: Any, batch: Any) -> jax.Array:
    logits = MODEL.apply({"params": params}, batch[0])
    kfac_jax.register_softmax_cross_entropy_loss(logits, batch[1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

  optimizer = kfac_jax.Optimizer(
    jax.value_and_grad(loss_fn),
    l2_reg=0.0,
    use_adaptive_learning_rate=True,
    use_adaptive_momentum=True,
    use_adaptive_damping=True,
    initial_damping=1.0,
    num_burnin_steps=0,
    multi_device=False,
  )
  keys = map(jax.random.key, itertools.count())
  # K-FAC donates the parameters and the state that it is given.
  params = jax.tree.map(jnp.copy, params)

  def step(carry: Any) -> Any:
    return optimizer.step(*carry, next(keys), batch=batch)[:2]

  return repeated(step, (params, optimizer.init(params, next(keys), batch)))


def main() -> None:
  """Time the methods in turn, and print the median and the quartiles of the ratios."""
  for batch_size in (1, 16, 60, 512):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.uniform(size=(batch_size, 3072)), jnp.float32)
    batch = x, jnp.arange(batch_size) % 10
    params = MODEL.init(jax.random.key(0), x)["params"]
    steps = {
      "SGD": optax_step(optax.sgd(1e-6), params, batch),
      "BNP": optax_step(optax.chain(bnp_optax.scale_by_bnp(), optax.sgd(1e-6)), params, batch),
      "K-FAC": kfac_step(params, batch),
    }
    seconds = time_in_turn(steps, rounds=9, calls=4)
    plain = seconds["SGD"]
    print(f"batch size {batch_size}: SGD {1e3 * np.median(plain):.2f} ms")
    for name, times in seconds.items():
      low, median, high = np.quantile(times / plain, (0.25, 0.5, 0.75))
      print(f"  {name}: {median:.2f}x ({low:.2f}-{high:.2f})")


if __name__ == "__main__":
  main()
