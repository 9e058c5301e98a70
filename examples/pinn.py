"""A physics-informed network: Poisson's equation on a square, 32 points in each step.

The network u(x, y) minimizes the mean squares of ``u_xx + u_yy - f`` at random points inside and of
u at random points on the boundary. The solution is ``sin(pi x) sin(2 pi y)``. The statistics come
from an ordinary call on the points; the derivatives are taken outside of `sow_statistics`. The
score is the relative L2 error on a grid; the validation score is that at other points.

python examples/pinn.py
"""

from typing import Any

import flax.linen as nn
import gallery
import jax
import jax.numpy as jnp
import optax

import bnp_optax

STEPS, EVERY, POINTS = 3_000, 250, 32


class Network(nn.Module):
  """The fully connected network 2-50-50-50-1 with tanh."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Return u at points ``[..., 2]``."""
    for _ in range(3):
      x = nn.tanh(nn.Dense(50)(x))
    return nn.Dense(1)(x)[..., 0]


MODEL = Network()


def solution(x: jax.Array) -> jax.Array:
  """Return the solution at points ``[..., 2]``."""
  return jnp.sin(jnp.pi * x[..., 0]) * jnp.sin(2 * jnp.pi * x[..., 1])


def loss_fn(params: Any, inside: jax.Array, edge: jax.Array) -> tuple[jax.Array, Any]:
  """Return the loss and the statistics of the layers on the points inside."""
  with bnp_optax.linen.sow_statistics():
    _, aux = MODEL.apply({"params": params}, inside, mutable=["intermediates"])

  def laplacian(x: jax.Array) -> jax.Array:
    return jnp.trace(jax.hessian(lambda x: MODEL.apply({"params": params}, x))(x))

  residual = jax.vmap(laplacian)(inside) + 5 * jnp.pi**2 * solution(inside)
  boundary = MODEL.apply({"params": params}, edge)
  return jnp.mean(residual**2) + 100 * jnp.mean(boundary**2), aux["intermediates"]


def points(key: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Return random points inside the square and on its boundary."""
  keys = jax.random.split(key, 4)
  inside = jax.random.uniform(keys[0], (POINTS, 2))
  along = jax.random.uniform(keys[1], (POINTS,))
  side = jax.random.bernoulli(keys[2], shape=(POINTS,)).astype(jnp.float32)
  edge = jnp.stack([along, side], axis=1)
  flip = jax.random.bernoulli(keys[3], shape=(POINTS, 1))
  return inside, jnp.where(flip, edge[:, ::-1], edge)


def error(params: Any, x: jax.Array) -> jax.Array:
  """Return the relative L2 error at points."""
  wrong = MODEL.apply({"params": params}, x) - solution(x)
  return jnp.sqrt(jnp.sum(wrong**2) / jnp.sum(solution(x) ** 2))


@gallery.side_by_side
def run(method: gallery.Method, rate: jax.Array, seed: jax.Array) -> gallery.Scores:
  """Train one network."""
  key = jax.random.key(seed)
  params = MODEL.init(key, jnp.zeros((1, 2)))["params"]
  tx = method.optimizer(rate)

  def step(carry: Any, key: jax.Array) -> tuple[Any, None]:
    params, opt_state = carry
    grads, stats = jax.grad(loss_fn, has_aux=True)(params, *points(key))
    updates, opt_state = tx.update(grads, opt_state, params, stats=stats)
    return (optax.apply_updates(params, updates), opt_state), None

  axis = jnp.linspace(0.01, 0.99, 40)
  grid = jnp.stack(jnp.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
  others = jax.random.uniform(jax.random.key(1_000), (500, 2))

  def stretch(carry: Any, keys: jax.Array) -> tuple[Any, jax.Array]:
    carry, _ = jax.lax.scan(step, carry, keys)
    return carry, error(carry[0], grid)

  keys = jax.random.split(key, STEPS).reshape(-1, EVERY)
  (params, _), curve = jax.lax.scan(stretch, (params, tx.init(params)), keys)
  return gallery.Scores(error(params, others), curve[-1], curve)


if __name__ == "__main__":
  title = f"Poisson's equation, FC 50-50-50, {POINTS} points a step, {STEPS:,} steps"
  gallery.compare("pinn", title, run, "relative L2 error", up=False)
