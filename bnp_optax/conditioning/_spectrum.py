"""The paper's condition number: exact for small matrices, by Lanczos' method for large ones.

This module uses NumPy in float64. In float32, a matrix with a condition number above some 1e7 is
indistinguishable from a singular one.
"""

from __future__ import annotations

from collections.abc import Callable
import math
from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import ArrayLike
import numpy as np

_EXACT = 384
_STEPS = 64
_FAILURE = 1e-6


def condition_number(matrix: ArrayLike, *, threshold: float | None = None) -> np.ndarray:
  r"""Compute the largest singular value over the smallest nonzero one.

  .. math::
    \kappa(A) = \sigma_{\max} / \sigma^*_{\min}

  Examples:
    >>> from bnp_optax import conditioning
    >>> import jax.numpy as jnp
    >>> conditioning.condition_number(jnp.array([[2.0, 0.0], [0.0, 0.5], [0.0, 0.0]]))
    array(4.)
    >>> conditioning.condition_number(jnp.ones((5, 5)))
    array(1.)

  Args:
    matrix: ``[..., m, n]``, not traced. The singular values are computed in float64.
    threshold: A singular value counts as nonzero if it is more than ``threshold`` times the
      largest. None for ``sqrt(max(m, n))`` times the machine epsilon of the matrix's dtype, the
      size that rounding gives to a zero singular value.

  Returns:
    ``[...]``, float64, at least 1; NaN for a matrix of zeros.

  Raises:
    ValueError: If an entry is not finite, or the matrix is complex.

  References:
    Lange, Helfrich, Ye, JMLR 23(72), 2022: the end of section 1.
  """
  array = np.asarray(matrix)
  if np.iscomplexobj(array):
    raise ValueError(f"condition_number is for real matrices, found {array.dtype}.")
  threshold = rounding(array) if threshold is None else threshold
  array = array.astype(np.float64)
  _check_finite(array)
  return _ratio(np.linalg.svd(array, compute_uv=False), threshold)


def rounding(array: np.ndarray) -> float:
  """Return the size that rounding gives to a zero singular value, relative to the largest."""
  # jnp.finfo, unlike np.finfo, supports bfloat16.
  dtype = array.dtype if jnp.issubdtype(array.dtype, jnp.floating) else np.dtype(np.float64)
  return math.sqrt(max(array.shape[-2:])) * float(jnp.finfo(dtype).eps)


class Estimate(NamedTuple):
  """A lower bound of a condition number, up to rounding, and its error.

  The condition number is at most ``value / (1 - error)``, except for two in a million random
  starts. The error is 0 if it was computed exactly.
  """

  value: float
  error: float


def estimate_condition_number(matrix: np.ndarray, threshold: float) -> Estimate:
  r"""Estimate the condition number of a float64 matrix that may be large.

  A QR factorization reduces the matrix ``[m, n]`` to a triangular ``R`` with the same singular
  values. If ``min(m, n)`` is small, they are computed. Otherwise Lanczos' method with a random
  start finds the largest eigenvalues of :math:`R^T R` and of :math:`R^{-1} R^{-T}`. It never
  overestimates them; after :math:`k` steps in dimension :math:`n` the relative error exceeds
  :math:`\epsilon` with a probability of at most
  :math:`1.648 \sqrt n \, e^{-\sqrt\epsilon (2k - 1)}`, whatever the eigenvalues are. The singular
  values of a matrix that is singular to within the threshold are computed, whatever its size.

  References:
    Kuczynski, Wozniakowski, Estimating the largest eigenvalue by the power and Lanczos algorithms
    with a random start, SIAM J. Matrix Anal. Appl. 13(4), 1992.
  """
  _check_finite(matrix)
  # Dead features and windows of padding only add singular values of zero.
  matrix = matrix[matrix.any(axis=1)][:, matrix.any(axis=0)]
  if matrix.size == 0:
    return Estimate(math.nan, 0.0)
  tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
  r = np.asfortranarray(np.linalg.qr(tall, mode="r"))
  n = len(r)
  diagonal = np.abs(np.diagonal(r))
  if n > _EXACT and diagonal.min() > threshold * diagonal.max():
    import scipy.linalg  # Imported here to keep the import of the package light.

    def solve(x: np.ndarray, trans: int) -> np.ndarray:
      return scipy.linalg.solve_triangular(r, x, trans=trans, check_finite=False)

    rng = np.random.default_rng(0)
    largest = _largest_eigenvalue(lambda x: r.T @ (r @ x), n, rng)
    smallest = 1 / _largest_eigenvalue(lambda x: solve(solve(x, 1), 0), n, rng)
    value = math.sqrt(largest / smallest)
    if value * threshold < 1:
      root = math.log(1.648 * math.sqrt(n) / _FAILURE) / (2 * _STEPS - 1)
      return Estimate(value, root**2)
  return Estimate(float(_ratio(np.linalg.svd(r, compute_uv=False), threshold)), 0.0)


def _largest_eigenvalue(
  multiply: Callable[[np.ndarray], np.ndarray], n: int, rng: np.random.Generator
) -> float:
  """Return the largest Ritz value of a symmetric matrix after `_STEPS` steps of Lanczos."""
  basis = np.zeros((min(_STEPS, n), n))
  diagonal, off_diagonal = [], []
  x = rng.normal(size=n)
  beta = float(np.linalg.norm(x))
  for k in range(len(basis)):
    basis[k] = x / beta
    x = multiply(basis[k])
    diagonal.append(float(basis[k] @ x))
    # Orthogonalize against the whole basis, twice: the three-term recurrence loses orthogonality.
    for _ in range(2):
      x = x - basis[: k + 1].T @ (basis[: k + 1] @ x)
    beta = float(np.linalg.norm(x))
    if beta <= np.finfo(np.float64).eps * max(diagonal):
      break
    off_diagonal.append(beta)
  ritz = np.linalg.eigvalsh(np.diag(diagonal) + np.diag(off_diagonal[: len(diagonal) - 1], -1))
  return float(ritz.max())


def _ratio(singular_values: np.ndarray, threshold: float) -> np.ndarray:
  largest = singular_values.max(axis=-1)
  nonzero = singular_values > threshold * largest[..., None]
  smallest = np.where(nonzero, singular_values, np.inf).min(axis=-1)
  return np.where(largest > 0, largest / smallest, np.nan)


def _check_finite(array: np.ndarray) -> None:
  if count := np.sum(~np.isfinite(array)):
    raise ValueError(
      f"{count} of {array.size} entries of the matrix are not finite: it has no condition number."
    )
