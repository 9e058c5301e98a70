r"""Algorithms 2 and 3 of the paper, on canonical arrays.

A layer is a stack of linear maps with kernel ``W[stack, window, feature, output]``, bias
``b[stack, output]`` and input statistics ``mu, sigma2[stack, 1, feature]``. A dense layer has a
window of one entry and one position, so Algorithm 2 is Algorithm 3. With the change of variable
:math:`\theta = P z`, where for each output :math:`\theta = [b, w]` and (eqs. 15 and 23)

.. math::
  P = \frac1q \begin{bmatrix} 1 & -\mu^T \\ 0 & I \end{bmatrix}
      \begin{bmatrix} 1 & 0 \\ 0 & \mathrm{diag}(1/\tilde\sigma) \end{bmatrix},

gradient descent on :math:`z` is :math:`\theta \leftarrow \theta - \alpha P P^T \nabla L`.
This module depends on JAX alone.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Preconditioner(NamedTuple):
  """The parameters of the matrix P of every linear map of a layer.

  Attributes:
    mu: Running mean of the inputs; 0 where the layer has no bias and cannot be centred. Shape
      ``[stack, 1, feature]``.
    sigma: Regularized deviation, sigma-tilde in the paper. Shape ``[stack, 1, feature]``.
    q: Scale that gives the Hessian blocks of all layers the same norm. Shape ``[stack, 1, 1]``.
    guard: Divisor of the layer's step, at least 1; None for 1. Shape ``[stack, 1, 1]``.
  """

  mu: jax.Array
  sigma: jax.Array
  q: jax.Array
  guard: jax.Array | None = None


def update_statistics(
  mu: jax.Array,
  sigma2: jax.Array,
  mu_H: jax.Array,
  sigma2_H: jax.Array,
  rows: jax.Array,
  one_minus_rho: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Take step 2: update the running mean and variance by those of a batch of ``rows`` rows."""
  mu = _towards(mu, mu_H, one_minus_rho)
  # The variance of a single row is 0. The paper takes it about the running mean instead.
  sigma2_H = jnp.where(rows == 1, sigma2_H + (mu_H - mu) ** 2, sigma2_H)
  return mu, _towards(sigma2, sigma2_H, one_minus_rho)


def update_debiased_statistics(
  mu: jax.Array,
  sigma2: jax.Array,
  W: jax.Array,
  mu_H: jax.Array,
  sigma2_H: jax.Array,
  one_minus_rho: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Take step 2 without the bias of the initial values, which is not in the paper.

  ``mu`` and ``sigma2`` are the mean and variance of the rows of all batches so far, where a batch
  of age ``a`` has the weight ``rho**a``. ``W`` is the sum of these weights, 0 before the first
  batch. No batch size needs a special case: ``K (1 - K) d^2`` is the variance between the batches.
  """
  W = W + (1 - one_minus_rho * W)
  K = 1 / W
  d = mu_H - mu
  return _towards(mu, mu_H, K), _towards(sigma2, sigma2_H, K) + K * (1 - K) * d * d, W


def varies(mu: jax.Array, sigma2: jax.Array, epsilon: float) -> jax.Array:
  """Return whether a variance is more than the rounding of inputs as large as ``mu``."""
  return sigma2 > (8 * epsilon * mu) ** 2


def find_largest(mu: jax.Array, sigma2: jax.Array, epsilon: float) -> jax.Array:
  """Return the largest variance of each linear map; 0 if it is rounding, where epsilon is not 0."""
  size, largest = (jnp.max(x, axis=(1, 2), keepdims=True) for x in (jnp.abs(mu), sigma2))
  return jnp.where(varies(size, largest, epsilon), largest, 0) if epsilon else largest


def make_preconditioner(
  mu: jax.Array,
  sigma2: jax.Array,
  window: int,
  examples: jax.Array,
  positions: jax.Array,
  eps_1: jax.Array,
  eps_2: jax.Array,
  largest: jax.Array | None = None,
) -> Preconditioner:
  """Take step 3: compute sigma-tilde and q from the running statistics and the batch size.

  Inputs that have not varied, such as a first single row, have a ``sigma-tilde`` of at least 1,
  which is not in the paper. ``largest`` is that of `find_largest`, if it is computed already.
  """
  largest = find_largest(mu, sigma2, 0.0) if largest is None else largest
  sigma = jnp.sqrt(sigma2 + eps_1 * largest + eps_2)
  # z_w is then rounding alone. Division by sqrt(eps_2) would multiply it, and Adam by far more.
  sigma = jnp.where(largest > 0, sigma, jnp.maximum(sigma, 1))
  q2 = jnp.maximum(window * mu.shape[-1] / examples, jnp.sqrt(positions))
  return Preconditioner(mu, sigma, jnp.sqrt(q2))


def guard_against_lag(
  p: Preconditioner, mu_H: jax.Array, window: int, rows: jax.Array, c: jax.Array
) -> Preconditioner:
  """Divide ``P P^T`` by the eigenvalue that the lag of the running mean adds, not in the paper.

  A running mean that is ``delta`` deviations behind that of the batch gives the preconditioned
  Hessian an eigenvalue of ``1 + sum delta^2`` over the ``n`` inputs of one output. The sampling
  noise of ``mu_H`` alone makes it some ``1 + n / rows``. The divisor is the ratio of the first to
  ``1 + c n / rows``, and at least 1. It is 1 if ``lag2`` is not finite.
  """
  delta2 = ((mu_H - p.mu) / p.sigma) ** 2
  n = window * mu_H.shape[-1]
  lag2 = n * jnp.mean(delta2, axis=(1, 2), keepdims=True)
  ratio = (1 + lag2) / (1 + c * n / rows)
  return p._replace(guard=jnp.where((ratio > 1) & jnp.isfinite(ratio), ratio, 1))


def apply_transpose(
  p: Preconditioner, g_w: jax.Array, g_b: jax.Array | None
) -> tuple[jax.Array, jax.Array | None]:
  """Apply ``P^T``: map the gradient with respect to theta to that with respect to z."""
  scale = 1 / (p.sigma * p.q)
  if g_b is None:
    return _scaled(scale, g_w), None
  # Scale, then centre. In the other order XLA computes z_w twice and keeps g_w as well.
  b = _matrix(jnp.broadcast_to(g_b[:, None, None, :], g_w.shape))
  z_w = _column(scale, g_w) * _matrix(g_w) - _column(p.mu * scale, g_w) * b
  return z_w.reshape(g_w.shape), g_b / p.q[..., 0]


def apply(
  p: Preconditioner, z_w: jax.Array, z_b: jax.Array | None
) -> tuple[jax.Array, jax.Array | None]:
  """Apply ``P``, and divide by the guard: map a step in z to the step in theta."""
  q = p.q if p.guard is None else p.q * p.guard
  scale = 1 / (p.sigma * q)
  d_w = _scaled(scale, z_w)
  if z_b is None:
    return d_w, None
  return d_w, z_b / q[..., 0] - _sum(p.mu * scale, z_w)


def apply_inverse(
  p: Preconditioner, w: jax.Array, b: jax.Array | None
) -> tuple[jax.Array, jax.Array | None]:
  """Apply ``P^-1``: map the parameters theta to z."""
  z_w = _scaled(p.sigma * p.q, w)
  if b is None:
    return z_w, None
  return z_w, p.q[..., 0] * (b + _sum(p.mu, w))


def precondition(
  p: Preconditioner, g_w: jax.Array, g_b: jax.Array | None
) -> tuple[jax.Array, jax.Array | None]:
  """Apply ``P P^T``: take steps 4 and 5. Step 5 uses the ``G_w`` that step 4 has updated."""
  return apply(p, *apply_transpose(p, g_w, g_b))


# The functions below work on the kernel as a matrix, [stack * window * feature, output]. With more
# axes XLA keeps a second array of the kernel's size, which costs more than the arithmetic on it.


def _matrix(w: jax.Array) -> jax.Array:
  return w.reshape(-1, w.shape[-1])


def _column(v: jax.Array, w: jax.Array) -> jax.Array:
  """Return ``v`` as a column that broadcasts over the outputs in the matrix of ``w``."""
  return jnp.broadcast_to(v, w.shape[:-1]).reshape(-1, 1)


def _scaled(scale: jax.Array, w: jax.Array) -> jax.Array:
  return (_column(scale, w) * _matrix(w)).reshape(w.shape)


def _sum(v: jax.Array, w: jax.Array) -> jax.Array:
  """Compute ``sum v w`` over window and features."""
  stack = len(w)
  v, matrix = _column(v, w).reshape(stack, -1), w.reshape(stack, -1, w.shape[-1])
  # A product is faster on a CPU. A TPU computes a reduction together with w, without an array.
  return jax.lax.platform_dependent(v, matrix, cpu=_product, default=_reduction)


def _product(v: jax.Array, matrix: jax.Array) -> jax.Array:
  return jnp.einsum("sk,sko->so", v, matrix, precision=jax.lax.Precision.HIGHEST)


def _reduction(v: jax.Array, matrix: jax.Array) -> jax.Array:
  return jnp.sum(v[..., None] * matrix, axis=1)


def _towards(old: jax.Array, new: jax.Array, part: jax.Array) -> jax.Array:
  """Compute ``(1 - part) old + part new`` with the rounding error of the nearer end."""
  # Both a large mean and a small variance that follows a large one keep their last digits.
  step = new - old
  return jnp.where(part < 0.5, old + part * step, new - (1 - part) * step)
