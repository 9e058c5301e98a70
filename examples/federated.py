"""Federated averaging: ten clients with one to three classes each, and batches of five.

The digits are sorted by class and dealt to ten clients, so that each has one to three classes. In a
round every client starts from the server's network and optimizer state, which holds Adam's moments
and BNP's running statistics, and makes one pass over its 115 images. The server then averages the
networks and states. The score is the accuracy of the server's network.

python examples/federated.py
"""

from typing import Any

import flax.linen as nn
import gallery
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import bnp_optax

ROUNDS, CLIENTS, BATCH = 15, 10, 5
MODEL = nn.Sequential([nn.Dense(100), nn.relu, nn.Dense(100), nn.relu, nn.Dense(10)])
DATA = load_digits()
ORDER = np.random.default_rng(0).permutation(1797)
X, Y = jnp.asarray(DATA.data[ORDER] / 16, jnp.float32), jnp.asarray(DATA.target[ORDER], jnp.int32)
TEST, VALIDATION = slice(300), slice(300, 600)
TRAIN = 600 + np.argsort(np.asarray(Y[600:1750]), kind="stable")
SHARDS = jnp.asarray(TRAIN.reshape(CLIENTS, -1))


def loss_fn(params: Any, images: jax.Array) -> tuple[jax.Array, Any]:
  """Return the loss on a batch, and the statistics."""
  with bnp_optax.linen.sow_statistics():
    logits, aux = MODEL.apply({"params": params}, X[images], mutable=["intermediates"])
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, Y[images])
  return losses.mean(), aux["intermediates"]


def accuracy(params: Any, part: slice) -> jax.Array:
  """Return the accuracy on a part of the images."""
  return jnp.mean(MODEL.apply({"params": params}, X[part]).argmax(-1) == Y[part])


@gallery.side_by_side
def run(method: gallery.Method, rate: jax.Array, seed: jax.Array) -> gallery.Scores:
  """Train one network by federated averaging."""
  key = jax.random.key(seed)
  params = MODEL.init(key, X[:1])["params"]
  tx = method.optimizer(rate)

  def step(carry: Any, images: jax.Array) -> tuple[Any, None]:
    params, opt_state = carry
    grads, stats = jax.grad(loss_fn, has_aux=True)(params, images)
    updates, opt_state = tx.update(grads, opt_state, params, stats=stats)
    return (optax.apply_updates(params, updates), opt_state), None

  def average(leaves: jax.Array) -> jax.Array:
    return leaves[0] if jnp.issubdtype(leaves.dtype, jnp.integer) else leaves.mean(axis=0)

  def federated_round(server: Any, key: jax.Array) -> tuple[Any, jax.Array]:
    def client(shard: jax.Array, key: jax.Array) -> Any:
      order = jax.random.permutation(key, shard).reshape(-1, BATCH)
      return jax.lax.scan(step, server, order)[0]

    clients = jax.vmap(client)(SHARDS, jax.random.split(key, CLIENTS))
    server = jax.tree.map(average, clients)
    return server, accuracy(server[0], TEST)

  keys = jax.random.split(key, ROUNDS)
  (params, _), curve = jax.lax.scan(federated_round, (params, tx.init(params)), keys)
  return gallery.Scores(accuracy(params, VALIDATION), curve[-1], curve)


if __name__ == "__main__":
  title = (
    f"Federated averaging of the digits, {CLIENTS} clients, {ROUNDS} rounds, batches of {BATCH}"
  )
  gallery.compare("federated", title, run, "test accuracy", up=True)
