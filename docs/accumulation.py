"""How far a step on k micro-batches is from the step on the whole batch, for BNP and BatchNorm.

python docs/accumulation.py    (some seconds; the table of the README)
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import bnp_optax


class Network(nn.Module):
  """FC 20-100-100-100-10, with or without BatchNorm after each ReLU."""

  batch_norm: bool

  @nn.compact
  def __call__(self, h: jax.Array) -> jax.Array:
    """Logits of a batch."""
    for _ in range(3):
      h = nn.relu(nn.Dense(100)(h))
      h = nn.BatchNorm(use_running_average=False)(h) if self.batch_norm else h
    return nn.Dense(10)(h)


def distances(batch_norm: bool) -> dict[int, float]:
  """The relative distance between the two steps, for each k."""
  rng = np.random.default_rng(0)
  x, y = jnp.asarray(rng.normal(1, 1, (64, 20)), jnp.float32), jnp.asarray(rng.integers(0, 10, 64))
  model = Network(batch_norm)
  variables = model.init(jax.random.key(0), x)
  tx = optax.sgd(0.1) if batch_norm else optax.chain(bnp_optax.scale_by_bnp(), optax.sgd(0.1))
  tx = optax.with_extra_args_support(tx)

  def loss_fn(params, batch):  # noqa: ANN001, ANN202
    x, y = batch
    with bnp_optax.linen.sow_statistics():
      logits, aux = model.apply(
        {**variables, "params": params}, x, mutable=["intermediates", "batch_stats"]
      )
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
    return loss, aux["intermediates"]

  def step(k: int) -> optax.Updates:
    kind = optax.microbatching.AccumulationType
    (_, stats), grads = optax.microbatching.microbatch(
      jax.value_and_grad(loss_fn, has_aux=True),
      argnums=1,
      microbatch_size=len(x) // k,
      accumulator=((kind.MEAN, kind.SUM), kind.MEAN),
    )(variables["params"], (x, y))
    params = variables["params"]
    return tx.update(grads, tx.init(params), params, stats=stats)[0]

  whole = step(1)
  norm = optax.tree.norm
  return {k: float(norm(optax.tree.sub(step(k), whole)) / norm(whole)) for k in (4, 16, 64)}


if __name__ == "__main__":
  for name, batch_norm in (("BNP", False), ("BatchNorm", True)):
    print(name, {k: f"{d:.1e}" for k, d in distances(batch_norm).items()})
