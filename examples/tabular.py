"""Online tabular data: one row at a time, with raw and with standardized columns.

Scikit-learn's breast cancer data have 569 rows, each seen once, and 30 columns with standard
deviations from 0.003 to 570. The network predicts each row before it learns from it. The score is
the mean log loss of these predictions; the validation score is that of another order of the rows.
"standardized" subtracts a running mean of each column and divides by its running deviation.

python examples/tabular.py
"""

from typing import Any

import flax.linen as nn
import gallery
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_breast_cancer

import bnp_optax

PARTS = 12
MODEL = nn.Sequential([nn.Dense(50), nn.relu, nn.Dense(50), nn.relu, nn.Dense(1)])
DATA = load_breast_cancer()
X, Y = jnp.asarray(DATA.data, jnp.float32), jnp.asarray(DATA.target, jnp.float32)


def standardized(x: np.ndarray) -> np.ndarray:
  """Standardize each row by the rows up to and including it.

  Only the epsilon, a thousandth of the variance of each column, depends on all rows.
  """
  count = np.arange(1, len(x) + 1)[:, None]
  mean = np.cumsum(x, axis=0) / count
  variance = np.cumsum(x**2, axis=0) / count - mean**2
  return ((x - mean) / np.sqrt(variance + 1e-3 * variance[-1])).astype(np.float32)


def make_orders() -> tuple[np.ndarray, np.ndarray]:
  """Return an order of the rows for each seed, and the standardized rows in that order."""
  rngs = [np.random.default_rng(seed) for seed in (0, *gallery.SEEDS)]
  orders = np.stack([rng.permutation(len(X)) for rng in rngs])
  return orders, np.stack([standardized(DATA.data[order]) for order in orders])


ORDERS, STANDARDIZED = map(jnp.asarray, make_orders())


def loss_fn(params: Any, x: jax.Array, y: jax.Array) -> tuple[jax.Array, Any]:
  """Return the loss of one row, and the statistics."""
  with bnp_optax.linen.sow_statistics():
    logits, aux = MODEL.apply({"params": params}, x[None], mutable=["intermediates"])
  return optax.sigmoid_binary_cross_entropy(logits[0, 0], y), aux["intermediates"]


def make_run(standardize: bool) -> gallery.Run:
  """Return the function that trains on the columns as they are, or standardized."""

  @gallery.side_by_side
  def run(method: gallery.Method, rate: jax.Array, seed: jax.Array) -> gallery.Scores:
    params = MODEL.init(jax.random.key(seed), X[:1])["params"]
    tx = method.optimizer(rate)

    def step(carry: Any, row: Any) -> tuple[Any, jax.Array]:
      params, opt_state = carry
      (loss, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, *row)
      updates, opt_state = tx.update(grads, opt_state, params, stats=stats)
      return (optax.apply_updates(params, updates), opt_state), loss

    order = ORDERS[seed]
    rows = STANDARDIZED[seed] if standardize else X[order]
    _, losses = jax.lax.scan(step, (params, tx.init(params)), (rows, Y[order]))
    size = len(X) // PARTS
    parts = losses[: PARTS * size].reshape(PARTS, size).mean(axis=1)
    return gallery.Scores(losses.mean(), losses.mean(), parts)

  return run


if __name__ == "__main__":
  for name, standardize in (("tabular-raw", False), ("tabular-standardized", True)):
    title = f"Breast cancer, one row at a time, {name.partition('-')[2]} columns, FC 50-50"
    gallery.compare(name, title, make_run(standardize), "log loss", up=False)
