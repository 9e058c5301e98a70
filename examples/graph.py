"""A padded graph network: one number for each node, two graphs in each step.

Random geometric graphs of 8 to 24 nodes are padded to 24. The target of a node is the number of its
triangles. The loss is a mean over real nodes, so the nodes are the examples (`example_axes=2`), and
`mask` leaves padding out of the statistics. The score is the mean square error, in units of the
targets' variance.

python examples/graph.py
"""

from typing import Any

import flax.linen as nn
import gallery
import jax
import jax.numpy as jnp
import numpy as np
import optax

import bnp_optax

EPOCHS, BATCH, NODES, GRAPHS = 16, 2, 24, 1_000


class Network(nn.Module):
  """Three rounds of messages, means over the neighbours, with 32 features a node."""

  @nn.compact
  def __call__(self, places: jax.Array, adjacency: jax.Array) -> jax.Array:
    """Map places and edges of nodes ``[graphs, nodes, ...]`` to numbers ``[graphs, nodes]``."""
    degrees = adjacency.sum(axis=-1, keepdims=True)
    x = jnp.concatenate([places, degrees / NODES], axis=-1)
    for _ in range(3):
      messages = adjacency @ nn.Dense(32)(x) / jnp.maximum(degrees, 1)
      x = nn.relu(nn.Dense(32)(jnp.concatenate([x, messages], axis=-1)))
    return nn.Dense(1)(x)[..., 0]


def make_graphs() -> tuple[np.ndarray, ...]:
  """Return the places and edges of nodes, masks of the real ones, and standardized targets."""
  rng = np.random.default_rng(0)
  places = rng.uniform(size=(GRAPHS, NODES, 2))
  mask = np.arange(NODES) < rng.integers(8, NODES + 1, size=(GRAPHS, 1))
  near = np.linalg.norm(places[:, :, None] - places[:, None], axis=-1) < 0.35
  edges = near & mask[:, :, None] & mask[:, None] & ~np.eye(NODES, dtype=bool)
  adjacency = edges.astype(np.float32)
  triangles = np.einsum("gij,gjk,gki->gi", adjacency, adjacency, adjacency) / 2
  targets = (triangles - triangles[mask].mean()) / triangles[mask].std()
  return places.astype(np.float32), adjacency, mask, targets.astype(np.float32)


PLACES, ADJACENCY, MASK, TARGETS = map(jnp.asarray, make_graphs())
MODEL = Network()


def error(predictions: jax.Array, graphs: Any) -> jax.Array:
  """Return the mean square error over the real nodes."""
  return jnp.mean((predictions - TARGETS[graphs]) ** 2, where=MASK[graphs])


def loss_fn(params: Any, graphs: jax.Array) -> tuple[jax.Array, Any]:
  """Return the loss on a batch of graphs, and the statistics of its real nodes."""
  with bnp_optax.linen.sow_statistics(mask=MASK[graphs], example_axes=2):
    predictions, aux = MODEL.apply(
      {"params": params}, PLACES[graphs], ADJACENCY[graphs], mutable=["intermediates"]
    )
  return error(predictions, graphs), aux["intermediates"]


def test_error(params: Any, part: slice) -> jax.Array:
  """Return the error on a part of the graphs."""
  return error(MODEL.apply({"params": params}, PLACES[part], ADJACENCY[part]), part)


@gallery.side_by_side
def run(method: gallery.Method, rate: jax.Array, seed: jax.Array) -> gallery.Scores:
  """Train one network."""
  key = jax.random.key(seed)
  params = MODEL.init(key, PLACES[:1], ADJACENCY[:1])["params"]
  tx = method.optimizer(rate)

  def step(carry: Any, graphs: jax.Array) -> tuple[Any, None]:
    params, opt_state = carry
    grads, stats = jax.grad(loss_fn, has_aux=True)(params, graphs)
    updates, opt_state = tx.update(grads, opt_state, params, stats=stats)
    return (optax.apply_updates(params, updates), opt_state), None

  def epoch(carry: Any, key: jax.Array) -> tuple[Any, jax.Array]:
    order = 400 + jax.random.permutation(key, GRAPHS - 400).reshape(-1, BATCH)
    carry, _ = jax.lax.scan(step, carry, order)
    return carry, test_error(carry[0], slice(200))

  keys = jax.random.split(key, EPOCHS)
  (params, _), curve = jax.lax.scan(epoch, (params, tx.init(params)), keys)
  return gallery.Scores(test_error(params, slice(200, 400)), curve[-1], curve)


if __name__ == "__main__":
  title = f"Triangles of each node of a padded graph, {BATCH} graphs a step, {EPOCHS} epochs"
  gallery.compare("graph", title, run, "mean square error", up=False)
