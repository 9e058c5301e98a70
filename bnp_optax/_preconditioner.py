r"""Algorithms 2 and 3 of the paper, on canonical arrays.

A layer is a stack of linear maps with kernel ``W[stack, window, feature, output]``, bias
``b[stack, output]`` and input statistics ``mu, sigma2[stack, 1, feature]``. A dense layer has a
window of one entry and one position, so Algorithm 2 is Algorithm 3. With the change of variable
:math:`\theta = P z`, where for each output :math:`\theta = [b, w]` and (eqs. 15 and 23)

.. math::
  P = \frac1q \begin{bmatrix} 1 & -\mu^T \\ 0 & I \end{bmatrix}
      \begin{bmatrix} 1 & 0 \\ 0 & \mathrm{diag}(1/\tilde\sigma) \end{bmatrix},

gradient descent on :math:`z` is :math:`\theta \leftarrow \theta - \alpha P P^T \nabla L`.
This file knows neither Flax nor Optax.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Preconditioner(NamedTuple):
  """The matrix P of every linear map of a layer: its few numbers, not its entries.

  Attributes:
    mu: the running mean of the inputs; 0 where the layer has no bias to centre with.
      Shape ``[stack, 1, feature]``.
    sigma: the regularized deviation, sigma-tilde in the paper. Shape ``[stack, 1, feature]``.
    q: what brings the Hessian blocks of all layers to one norm. Shape ``[stack, 1, 1]``.
  """

  mu: jax.Array
  sigma: jax.Array
  q: jax.Array


def update_statistics(
  mu: jax.Array,
  sigma2: jax.Array,
  mu_H: jax.Array,
  sigma2_H: jax.Array,
  rows: jax.Array,
  one_minus_rho: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Step 2: the running mean and variance after a batch with ``mu_H``, ``sigma2_H``, ``rows``."""
  mu = _towards(mu, mu_H, one_minus_rho)
  # One row has no variance of its own: the paper takes it about the running mean.
  sigma2_H = jnp.where(rows == 1, sigma2_H + (mu_H - mu) ** 2, sigma2_H)
  return mu, _towards(sigma2, sigma2_H, one_minus_rho)


def preconditioner(
  mu: jax.Array,
  sigma2: jax.Array,
  window: int,
  examples: jax.Array,
  positions: jax.Array,
  eps_1: jax.Array,
  eps_2: jax.Array,
) -> Preconditioner:
  """Step 3: sigma-tilde and q from the running statistics and the size of the batch."""
  largest = jnp.max(sigma2, axis=(1, 2), keepdims=True)
  q2 = jnp.maximum(window * mu.shape[-1] / examples, jnp.sqrt(positions))
  return Preconditioner(mu, jnp.sqrt(sigma2 + eps_1 * largest + eps_2), jnp.sqrt(q2))


def apply_transpose(
  p: Preconditioner, g_w: jax.Array, g_b: jax.Array | None
) -> tuple[jax.Array, jax.Array | None]:
  """``P^T``: from the gradient with respect to theta to the gradient with respect to z."""
  scale = 1 / (p.sigma * p.q)
  if g_b is None:
    return _scaled(scale, g_w), None
  # Scaled, then centred: in the other order XLA makes z_w twice, and g_w has to stay beside it.
  z_w = _column(scale, g_w) * _matrix(g_w) - _column(p.mu * scale, g_w) * _rows(g_b, g_w)
  return z_w.reshape(g_w.shape), g_b / p.q[..., 0]


def apply(
  p: Preconditioner, z_w: jax.Array, z_b: jax.Array | None
) -> tuple[jax.Array, jax.Array | None]:
  """``P``: from a step in z to the step in theta."""
  scale = 1 / (p.sigma * p.q)
  d_w = _scaled(scale, z_w)
  if z_b is None:
    return d_w, None
  return d_w, z_b / p.q[..., 0] - _sum(p.mu * scale, z_w)


def apply_inverse(
  p: Preconditioner, w: jax.Array, b: jax.Array | None
) -> tuple[jax.Array, jax.Array | None]:
  """``P^-1``: from the parameters theta to z."""
  z_w = _scaled(p.sigma * p.q, w)
  if b is None:
    return z_w, None
  return z_w, p.q[..., 0] * (b + _sum(p.mu, w))


def precondition(
  p: Preconditioner, g_w: jax.Array, g_b: jax.Array | None
) -> tuple[jax.Array, jax.Array | None]:
  """``P P^T``: steps 4 and 5. The second uses the ``G_w`` that the first has updated."""
  return apply(p, *apply_transpose(p, g_w, g_b))


# The kernel as a matrix, [stack * window * feature, output], a row for each input of a linear map.
# For more axes XLA keeps a second array of its size, which costs more than the arithmetic on it.


def _matrix(w: jax.Array) -> jax.Array:
  return w.reshape(-1, w.shape[-1])


def _column(v: jax.Array, w: jax.Array) -> jax.Array:
  """A number for each row of the matrix of ``w``."""
  return jnp.broadcast_to(v, w.shape[:-1]).reshape(-1, 1)


def _scaled(scale: jax.Array, w: jax.Array) -> jax.Array:
  return (_column(scale, w) * _matrix(w)).reshape(w.shape)


def _rows(b: jax.Array, w: jax.Array) -> jax.Array:
  """A number for each output, in each row of the matrix of ``w``."""
  return _matrix(jnp.broadcast_to(b[:, None, None, :], w.shape))


def _sum(v: jax.Array, w: jax.Array) -> jax.Array:
  """``sum v w`` over window and features; with the mean for ``v``, what weights make of it."""
  stack = len(w)
  v, matrix = _column(v, w).reshape(stack, -1), w.reshape(stack, -1, w.shape[-1])
  return jnp.einsum("sk,sko->so", v, matrix, precision=jax.lax.Precision.HIGHEST)


def _towards(old: jax.Array, new: jax.Array, part: jax.Array) -> jax.Array:
  """``(1 - part) old + part new``, rounded once, and about as finely as the nearer end is."""
  # A large mean must be known to its last digits, and so must a small variance after a large one.
  step = new - old
  return jnp.where(part < 0.5, old + part * step, new - (1 - part) * step)
