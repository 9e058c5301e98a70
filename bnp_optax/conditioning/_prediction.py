"""A prediction of a layer's conditioning from its running statistics and those of one batch.

The model assumes uncorrelated features. The Gram matrix is then a diagonal matrix plus one of rank
one, and its extreme eigenvalues are roots of a scalar equation. The prediction costs a few hundred
passes over the mean and variance.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from bnp_optax import _preconditioner
from bnp_optax._kernels import Layer
from bnp_optax._running import RunningStatistics
from bnp_optax._statistics import LayerStatistics

_BISECTIONS = 64


def layer_values(
  running: RunningStatistics,
  layer: Layer,
  shape: tuple[int, ...],
  mean: jax.Array,
  variance: jax.Array,
  batch: LayerStatistics | None,
  *,
  debias: bool,
) -> dict[str, jax.Array]:
  """Return the fields of `Diagnostics` for one layer, a scalar each."""
  layout, bias = layer.layout, layer.bias is not None
  if batch is None:
    empty = jnp.zeros(layout.statistics_shape(shape)[:-1], mean.dtype)
    none = jnp.full(mean.shape, jnp.nan, mean.dtype)
    batch = LayerStatistics(empty, empty, none, none, none)
  mu, sigma2, mu_H, sigma2_H = (
    layout.statistics_to_canonical(x.astype(mean.dtype), shape)
    for x in (mean, variance, batch.mean, batch.variance)
  )
  rows = layout.scalars_to_canonical(batch.rows.astype(mean.dtype)[..., None])
  epsilon = max(float(jnp.finfo(x.dtype).eps) for x in (mean, batch.total))
  largest = _preconditioner.find_largest(mu, sigma2, epsilon if debias else 0.0)
  p = running.make_preconditioner(layer, shape, mean, variance, batch, largest)
  copies = layout.window_size(shape) // mu.shape[1]
  stack = len(mu)
  mu, sigma, mu_H, sigma2_H = (x.reshape(stack, -1) for x in (p.mu, p.sigma, mu_H, sigma2_H))

  alive = _preconditioner.varies(mu_H, sigma2_H, epsilon)
  widest = jnp.max(sigma2_H, axis=-1, where=alive, initial=0)
  narrowest = jnp.min(sigma2_H, axis=-1, where=alive, initial=jnp.inf)
  delta = (mu_H - mu) / sigma
  ratio = sigma2_H / sigma**2
  before = _extreme_eigenvalues(sigma2_H, mu_H, alive, copies, bias)
  after = _extreme_eigenvalues(ratio, delta, alive, copies, bias)
  D = jnp.pad(sigma, ((0, 0), (int(bias), 0)), constant_values=1)
  measured = jnp.all(jnp.isfinite(mu_H) & jnp.isfinite(sigma2_H), axis=-1)
  values = {
    "dead": jnp.sum(~alive, axis=-1, dtype=mean.dtype),
    "spread": widest / narrowest,
    "outlier": widest / jnp.nanmedian(jnp.where(alive, sigma2_H, jnp.nan), axis=-1),
    "lag": jnp.sqrt(jnp.mean(delta**2, axis=-1)) if bias else jnp.zeros(stack, mean.dtype),
    "variance_ratio": jnp.max(ratio if bias else ratio + delta**2, axis=-1),
    "largest_eigenvalue": after[0],
    "q2": p.q[:, 0, 0] ** 2,
    "guard": jnp.ones(stack, mean.dtype) if p.guard is None else p.guard[:, 0, 0],
    "improvement": (before[0] / before[1]) / (after[0] / after[1]),
  }
  values = {k: jnp.where(measured, x, jnp.nan) for k, x in values.items()}
  values |= {"kappa_D": jnp.max(D, axis=-1) / jnp.min(D, axis=-1), "rows": rows[:, 0, 0]}
  best = {"rows": jnp.min, "improvement": jnp.min}
  worst = {k: best.get(k, jnp.max)(x).astype(jnp.float32) for k, x in values.items()}
  counts = {"features": sigma.shape[-1], "inputs": copies * sigma.shape[-1]}
  return worst | {k: jnp.asarray(x, jnp.float32) for k, x in counts.items()}


def _extreme_eigenvalues(
  variance: jax.Array, mean: jax.Array, alive: jax.Array, copies: int, bias: bool
) -> tuple[jax.Array, jax.Array]:
  r"""Return the largest and the smallest nonzero eigenvalue of the Gram matrix.

  With uncorrelated features :math:`\hat H^T \hat H / \text{rows} = \mathrm{diag}(d) + z z^T`, where
  :math:`d` is the variance and :math:`z` the mean of each column, 0 and 1 for the column :math:`e`.
  Its eigenvalues are the roots of :math:`1 + \sum z^2 / (d - \lambda)`, which increases between its
  poles.
  """
  # Constant columns are multiples of e and merge into one column.
  constant = jnp.sum(jnp.where(alive, 0, copies * mean**2), axis=-1, keepdims=True) + int(bias)
  d = jnp.concatenate(
    [jnp.where(constant > 0, 0, jnp.inf), jnp.where(alive, variance, jnp.inf)], -1
  )
  z2 = jnp.concatenate([constant, jnp.where(alive, copies * mean**2, 0)], axis=-1)
  finite = jnp.isfinite(d)
  top = jnp.max(jnp.where(finite, d, 0), axis=-1)
  first, second = jnp.sort(jnp.concatenate([d, jnp.full_like(constant, jnp.inf)], -1), -1)[:, :2].T
  if copies > 1:
    # Every other column appears once for each copy.
    second = jnp.where(first > 0, first, second)
  total = jnp.sum(z2, axis=-1)

  def root(low: jax.Array, high: jax.Array) -> jax.Array:
    def halve(_: Any, bracket: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
      low, high = bracket
      middle = low + (high - low) / 2
      gap = jnp.where(finite, d - middle[:, None], jnp.inf)
      above = 1 + jnp.sum(z2 / jnp.where(gap == 0, 1e-30, gap), axis=-1) > 0
      return jnp.where(above, low, middle), jnp.where(above, middle, high)

    return jax.lax.fori_loop(0, _BISECTIONS, halve, (low, high))[1]

  return root(top, top + total), root(first, jnp.minimum(second, first + total))
