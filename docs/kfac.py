"""What a step costs with K-FAC, beside BNP and plain SGD, in one run.

kfac-jax 0.0.8 needs an older JAX than the newest that BNP runs with, and so an environment of its
own (python -m venv kfac):

kfac/bin/pip install -e . kfac-jax==0.0.8 jax==0.8.1 jaxlib==0.8.1 flax==0.12.6
kfac/bin/python docs/kfac.py    (five minutes)
"""

from collections.abc import Callable
import time
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import bnp_optax

ROUNDS, STEPS = 9, 4
MODEL = nn.Sequential([nn.Dense(100), nn.relu, nn.Dense(100), nn.relu, nn.Dense(10)])


def optax_steps(tx: optax.GradientTransformation, params: Any, x: Any, y: Any) -> Callable[[], Any]:
  """A function that takes steps of an Optax optimizer."""
  tx = optax.with_extra_args_support(tx)

  def loss_fn(params: Any) -> tuple[jax.Array, Any]:
    with bnp_optax.linen.sow_statistics():
      logits, aux = MODEL.apply({"params": params}, x, mutable=["intermediates"])
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
    return loss, aux["intermediates"]

  @jax.jit
  def step(params: Any, opt_state: Any) -> Any:
    grads, stats = jax.grad(loss_fn, has_aux=True)(params)
    updates, opt_state = tx.update(grads, opt_state, params, stats=stats)
    return optax.apply_updates(params, updates), opt_state

  carry = [params, tx.init(params)]

  def steps() -> None:
    for _ in range(STEPS):
      carry[:] = step(*carry)
    jax.block_until_ready(carry)

  return steps


def kfac_steps(params: Any, x: Any, y: Any) -> Callable[[], Any]:
  """A function that takes steps of K-FAC, with rate, momentum and damping adapted by itself."""
  # Here, so that the documentation can be collected where it is not installed.
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
  batch, rng = (x, y), jax.random.PRNGKey(0)
  params = jax.tree.map(jnp.copy, params)
  carry = [params, optimizer.init(params, rng, batch)]

  def steps() -> None:
    for number in range(STEPS):
      key = jax.random.fold_in(rng, number)
      carry[0], carry[1], _ = optimizer.step(*carry, key, batch=batch)
    jax.block_until_ready(carry[0])

  return steps


def main() -> None:
  """Times the methods in turn, and prints the median and the quartiles of the ratios."""
  for batch_size in (1, 16, 60, 512):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.uniform(size=(batch_size, 3072)), jnp.float32)
    y = jnp.arange(batch_size) % 10
    params = MODEL.init(jax.random.key(0), x)["params"]
    runs = {
      "SGD": optax_steps(optax.sgd(1e-6), params, x, y),
      "BNP": optax_steps(optax.chain(bnp_optax.scale_by_bnp(), optax.sgd(1e-6)), params, x, y),
      "K-FAC": kfac_steps(params, x, y),
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
      run()
    for _ in range(ROUNDS):
      for name, run in runs.items():
        start = time.perf_counter()
        run()
        seconds[name].append((time.perf_counter() - start) / STEPS)
    plain = np.array(seconds["SGD"])
    print(f"batch size {batch_size}: SGD {1e3 * np.median(plain):.2f} ms")
    for name in runs:
      low, median, high = np.quantile(np.array(seconds[name]) / plain, (0.25, 0.5, 0.75))
      print(f"  {name}: {median:.2f}x ({low:.2f}-{high:.2f})")


if __name__ == "__main__":
  main()
