"""The distance between a step on k micro-batches and the step on the whole batch.

Measures: the relative distance, for BNP and for BatchNorm, at k = 4, 16 and 64.
Command: `python benchmarks/accumulation.py`, twenty seconds.
Quoted by: README.md, "Micro-batches".
"""

from common import FullyConnected, cross_entropy
import jax
import jax.numpy as jnp
import numpy as np
import optax

import bnp_optax


def distances(batch_norm: bool) -> dict[int, float]:
  """Return the relative distance between the two steps for each k."""
  rng = np.random.default_rng(0)
  x, y = jnp.asarray(rng.normal(1, 1, (64, 20)), jnp.float32), jnp.asarray(rng.integers(0, 10, 64))
  model = FullyConnected((100, 100, 100), batch_norm)
  variables = model.init(jax.random.key(0), x)
  params = variables["params"]
  tx = optax.sgd(0.1) if batch_norm else optax.chain(bnp_optax.scale_by_bnp(), optax.sgd(0.1))
  tx = optax.with_extra_args_support(tx)

  def loss_fn(params: optax.Params, batch: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, object]:
    return cross_entropy(model, {**variables, "params": params}, *batch)

  def step(k: int) -> optax.Updates:
    kind = optax.microbatching.AccumulationType
    (_, stats), grads = optax.microbatching.microbatch(
      jax.value_and_grad(loss_fn, has_aux=True),
      argnums=1,
      microbatch_size=len(x) // k,
      accumulator=((kind.MEAN, kind.SUM), kind.MEAN),
    )(params, (x, y))
    return tx.update(grads, tx.init(params), params, stats=stats)[0]

  whole = step(1)
  norm = optax.tree.norm
  return {k: float(norm(optax.tree.sub(step(k), whole)) / norm(whole)) for k in (4, 16, 64)}


def main() -> None:
  """Print the distances of both."""
  for name, batch_norm in (("BNP", False), ("BatchNorm", True)):
    print(name, {k: f"{d:.1e}" for k, d in distances(batch_norm).items()})


if __name__ == "__main__":
  main()
