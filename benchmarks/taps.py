"""The cost of a training step with taps and with sown statistics, relative to plain SGD.

Measures: flops and bytes, as XLA counts them, and the time: the median and quartiles of rounds in
which the three steps run in turn.
Command: `taskset -c 1 python benchmarks/taps.py`, two minutes.
Quoted by: docs/howto/trainers.md, "What it costs".
"""

from typing import Any

from common import FullyConnected, repeated, time_in_turn
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from tables import head, median_and_quartiles, row

import bnp_optax


class CNN(nn.Module):
  """Three convolutions and a dense layer."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Return the logits."""
    for features in (32, 64, 64):
      x = nn.relu(nn.Conv(features, (3, 3), strides=2)(x))
    return nn.Dense(10)(x.reshape(len(x), -1))


def compile_step(model: nn.Module, x: jax.Array, kind: str) -> tuple[jax.stages.Compiled, Any]:
  """Return the compiled step of a kind, sgd, sow or taps, and its initial parameters and state."""
  tx = optax.sgd(0.1) if kind == "sgd" else optax.chain(bnp_optax.scale_by_bnp(), optax.sgd(0.1))
  used = bnp_optax.linen.Tapped(model, examples=len(x)) if kind == "taps" else model
  params = used.init(jax.random.key(0), x)["params"]
  labels = jnp.zeros(len(x), int)

  def loss_fn(params: optax.Params, x: jax.Array) -> tuple[jax.Array, dict[str, optax.Params]]:
    variables, extra = {"params": params}, {}
    if kind == "sow":
      with bnp_optax.linen.sow_statistics():
        logits, aux = used.apply(variables, x, mutable=["intermediates"])
      extra = {"stats": aux["intermediates"]}
    else:
      logits = used.apply(variables, x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), extra

  def step(
    params: optax.Params, state: optax.OptState, x: jax.Array
  ) -> tuple[optax.Params, optax.OptState]:
    grads, extra = jax.grad(loss_fn, has_aux=True)(params, x)
    updates, state = tx.update(grads, state, params, **extra)
    return optax.apply_updates(params, updates), state

  carry = params, tx.init(params)
  return jax.jit(step, donate_argnums=(0, 1)).lower(*carry, x).compile(), carry


def main() -> None:
  """Print the table of the page."""
  columns = ("flops: sown", "taps", "bytes: sown", "taps", "time: sown", "taps")
  print(head(("network", "batch", *columns), "l"))
  fc = FullyConnected((100, 100, 100))
  for name, model, shape in (("FC", fc, (3072,)), ("CNN", CNN(), (32, 32, 3))):
    for batch in (1, 6, 60, 512):
      x = jnp.ones((batch, *shape))
      steps = {kind: compile_step(model, x, kind) for kind in ("sgd", "sow", "taps")}
      cells = [name, str(batch)]
      for cost in ("flops", "bytes accessed"):
        counts = {kind: step.cost_analysis()[cost] for kind, (step, _) in steps.items()}
        cells += [f"{counts[kind] / counts['sgd']:.3f}" for kind in ("sow", "taps")]
      functions = {
        kind: repeated(lambda carry, x, step=step: step(*carry, x), carry, x)
        for kind, (step, carry) in steps.items()
      }
      seconds = time_in_turn(functions, rounds=25, calls=max(2, 200 // batch))
      cells += [median_and_quartiles(seconds[kind] / seconds["sgd"]) for kind in ("sow", "taps")]
      print(row(cells), flush=True)


if __name__ == "__main__":
  main()
