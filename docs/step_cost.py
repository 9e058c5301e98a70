"""How much longer a step takes with BNP than with plain SGD, for wide layers and small batches.

taskset -c 1 python docs/step_cost.py    (about a minute; the table of howto/when_not.md)
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

METHODS = {
  "SGD": lambda: optax.sgd(1e-3),
  "BNP": lambda: optax.chain(bnp_optax.scale_by_bnp(), optax.sgd(1e-3)),
  "Adam": lambda: optax.adam(1e-3),
  "bnp(Adam)": lambda: bnp_optax.bnp(optax.adam(1e-3)),
}
ROUNDS = 15


def make_steps(method: str, width: int, batch: int, steps: int) -> Callable[[], Any]:
  """A function that takes steps with a network of three hidden layers, in one compiled loop."""
  model = nn.Sequential([nn.Dense(width), nn.relu] * 3 + [nn.Dense(10)])
  x, y = jnp.ones((batch, width)), jnp.arange(batch) % 10
  params = model.init(jax.random.key(0), x)["params"]
  tx = optax.with_extra_args_support(METHODS[method]())

  def loss_fn(params: Any) -> tuple[jax.Array, Any]:
    with bnp_optax.linen.sow_statistics():
      logits, aux = model.apply({"params": params}, x, mutable=["intermediates"])
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
    return loss, aux["intermediates"]

  def step(_: int, carry: Any) -> Any:
    params, opt_state = carry
    grads, stats = jax.grad(loss_fn, has_aux=True)(params)
    updates, opt_state = tx.update(grads, opt_state, params, stats=stats)
    return optax.apply_updates(params, updates), opt_state

  run = jax.jit(lambda carry: jax.lax.fori_loop(0, steps, step, carry))
  start = (params, tx.init(params))
  return lambda: jax.block_until_ready(run(start))


def main() -> None:
  """Times the methods in turn, and prints the median and the quartiles of the ratios."""
  for width, batch, steps in ((100, 1, 500), (1000, 1, 20), (1000, 64, 5)):
    runs = {method: make_steps(method, width, batch, steps) for method in METHODS}
    seconds = {method: [] for method in METHODS}
    for run in runs.values():
      run()
    for _ in range(ROUNDS):
      for method, run in runs.items():
        start = time.process_time()
        run()
        seconds[method].append((time.process_time() - start) / steps)
    plain = np.array(seconds["SGD"])
    print(f"width {width}, batch size {batch}: SGD {1e3 * np.median(plain):.2f} ms")
    for method in METHODS:
      low, median, high = np.quantile(np.array(seconds[method]) / plain, (0.25, 0.5, 0.75))
      print(f"  {method}: {median:.2f}x ({low:.2f}-{high:.2f})")


if __name__ == "__main__":
  main()
