"""The cost of a training step with taps and with sown statistics, as XLA counts it."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import bnp_optax


class FC(nn.Module):
  """The paper's fully connected network."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Return the logits."""
    for _ in range(3):
      x = nn.relu(nn.Dense(100)(x))
    return nn.Dense(10)(x)


class CNN(nn.Module):
  """Three convolutions and a dense layer."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Return the logits."""
    for features in (32, 64, 64):
      x = nn.relu(nn.Conv(features, (3, 3), strides=2)(x))
    return nn.Dense(10)(x.reshape(len(x), -1))


def compile_step(model: nn.Module, x: jax.Array, kind: str) -> jax.stages.Compiled:
  """Return the compiled step of a kind: sgd, sow or taps."""
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

  return jax.jit(step, donate_argnums=(0, 1)).lower(params, tx.init(params), x).compile()


def main() -> None:
  """Print flops and bytes of each step relative to plain SGD."""
  for name, model, shape in (("FC", FC(), (3072,)), ("CNN", CNN(), (32, 32, 3))):
    for batch in (1, 6, 60, 512):
      steps = {k: compile_step(model, jnp.ones((batch, *shape)), k) for k in ("sgd", "sow", "taps")}
      costs = {k: step.cost_analysis() for k, step in steps.items()}
      for cost in ("flops", "bytes accessed"):
        sgd, sow, taps = (costs[k][cost] for k in ("sgd", "sow", "taps"))
        print(f"{name:4} {batch:4} {cost:15} sow {sow / sgd:.4f} taps {taps / sgd:.4f}")


if __name__ == "__main__":
  main()
