"""P, its transpose and its inverse against explicit matrices, on random canonical layers."""

from hypothesis import given
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnp_optax import _preconditioner
from tests import oracle

pytestmark = pytest.mark.usefixtures("x64")


@st.composite
def canonical_layers(draw):
  stack, window, feature, output = (draw(st.sampled_from((1, size))) for size in (3, 4, 5, 2))
  rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
  return {
    "w": rng.normal(size=(stack, window, feature, output)),
    "b": rng.normal(size=(stack, output)),
    "mu": rng.normal(scale=10.0 ** draw(st.integers(-3, 1)), size=(stack, 1, feature)),
    "sigma2": rng.lognormal(sigma=2.0, size=(stack, 1, feature)),
    "examples": draw(st.integers(1, 64)),
    "positions": draw(st.integers(1, 1024)),
  }


def make(layer):
  full = lambda x: jnp.full((layer["w"].shape[0], 1, 1), float(x))
  return _preconditioner.make_preconditioner(
    jnp.asarray(layer["mu"]),
    jnp.asarray(layer["sigma2"]),
    layer["w"].shape[1],
    full(layer["examples"]),
    full(layer["positions"]),
    jnp.asarray(1e-2),
    jnp.asarray(1e-4),
  )


def explicit(layer, entry):
  window, feature = layer["w"].shape[1:3]
  q2 = max(window * feature / layer["examples"], np.sqrt(layer["positions"]))
  return oracle.explicit_matrices(layer["mu"][entry, 0], layer["sigma2"][entry, 0], window, q2)


def columns(w, b, entry):
  """Return [b, w] of one stack entry, a column for each output as in eq. (15)."""
  return np.vstack([b[entry][None], w[entry].reshape(-1, w.shape[-1])])


@pytest.mark.parametrize(
  ("function", "matrix"),
  [
    (_preconditioner.apply, lambda P: P),
    (_preconditioner.apply_transpose, lambda P: P.T),
    (_preconditioner.apply_inverse, np.linalg.inv),
    (_preconditioner.precondition, lambda P: P @ P.T),
  ],
)
@given(layer=canonical_layers())
def test_equals_the_explicit_matrix(function, matrix, layer):
  w, b = jax.jit(function)(make(layer), layer["w"], layer["b"])
  for entry in range(w.shape[0]):
    P = matrix(explicit(layer, entry))
    expected = P @ columns(layer["w"], layer["b"], entry)
    scale = np.abs(P) @ np.abs(columns(layer["w"], layer["b"], entry))
    error = np.abs(columns(np.asarray(w), np.asarray(b), entry) - expected)
    # inv() itself loses digits as the condition number of P; the others do not.
    bound = 1e-13 * (np.linalg.cond(P) if matrix is np.linalg.inv else 10)
    assert np.all(error <= bound * scale.max())


@given(layer=canonical_layers())
def test_inverse_undoes_it(layer):
  p = make(layer)
  w, b = jax.jit(_preconditioner.apply)(
    p, *jax.jit(_preconditioner.apply_inverse)(p, layer["w"], layer["b"])
  )
  np.testing.assert_allclose(w, layer["w"], rtol=1e-12)
  np.testing.assert_allclose(b, layer["b"], atol=1e-9 * np.abs(layer["mu"]).max() + 1e-12)


@given(layer=canonical_layers())
def test_without_bias_only_the_columns_are_scaled(layer):
  layer["mu"][:] = 0
  p = make(layer)
  for function in (
    _preconditioner.apply,
    _preconditioner.apply_transpose,
    _preconditioner.apply_inverse,
    _preconditioner.precondition,
  ):
    w, b = jax.jit(function)(p, layer["w"], None)
    assert b is None
    np.testing.assert_allclose(w, jax.jit(function)(p, layer["w"], 0 * layer["b"])[0], rtol=1e-15)


@given(layer=canonical_layers(), rho=st.floats(0, 1), rows=st.sampled_from([1, 2, 100]))
def test_update_statistics(layer, rho, rows):
  """Step 2; the variance of a single row, which is 0, is about the new running mean."""
  rng = np.random.default_rng(0)
  mu, sigma2, mu_H = layer["mu"], layer["sigma2"], rng.normal(size=layer["mu"].shape)
  sigma2_H = np.zeros_like(mu) if rows == 1 else rng.lognormal(size=mu.shape)
  actual = jax.jit(_preconditioner.update_statistics)(mu, sigma2, mu_H, sigma2_H, rows, 1 - rho)
  mean = rho * mu + (1 - rho) * mu_H
  about = (mu_H - mean) ** 2 if rows == 1 else sigma2_H
  np.testing.assert_allclose(actual[0], mean, rtol=1e-11, atol=1e-13)
  np.testing.assert_allclose(actual[1], rho * sigma2 + (1 - rho) * about, rtol=1e-11, atol=1e-13)
