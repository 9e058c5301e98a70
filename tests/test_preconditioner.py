"""P, its transpose and its inverse against explicit matrices, on random canonical layers."""

import chex
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
  full = lambda x: np.full((layer["w"].shape[0], 1, 1), float(x))
  make = jax.jit(_preconditioner.make_preconditioner, static_argnums=2)
  window, rows = layer["w"].shape[1], (full(layer["examples"]), full(layer["positions"]))
  return make(layer["mu"], layer["sigma2"], window, *rows, np.asarray(1e-2), np.asarray(1e-4))


def explicit(layer, entry):
  window, feature = layer["w"].shape[1:3]
  q2 = max(window * feature / layer["examples"], np.sqrt(layer["positions"]))
  return oracle.explicit_matrices(layer["mu"][entry, 0], layer["sigma2"][entry, 0], window, q2)


ARGUMENTS = (
  _preconditioner.Preconditioner(
    np.linspace(0.5, 2, 10, dtype=np.float32).reshape(2, 1, 5),
    np.linspace(1, 3, 10, dtype=np.float32).reshape(2, 1, 5),
    np.ones((2, 1, 1), np.float32),
  ),
  np.linspace(-1, 2, 120, dtype=np.float32).reshape(2, 3, 5, 4),
  np.ones((2, 4), np.float32),
)


def export_precondition(platforms):
  return jax.export.export(jax.jit(_preconditioner.precondition), platforms=platforms)(*ARGUMENTS)


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


@pytest.mark.parametrize("form", [_preconditioner._product, _preconditioner._reduction])
def test_the_sum_of_step_5_has_one_value_in_both_forms(form):
  rng = np.random.default_rng(0)
  v, matrix = rng.normal(size=(3, 7)), rng.normal(size=(3, 7, 4))
  actual = jax.jit(form)(jnp.asarray(v), jnp.asarray(matrix))
  np.testing.assert_allclose(actual, (v[..., None] * matrix).sum(1), rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize(("platform", "products"), [("cpu", 1), ("tpu", 0), ("cuda", 0)])
def test_a_program_holds_the_form_of_its_platform_alone(platform, products):
  program = export_precondition([platform]).mlir_module()
  assert program.count("stablehlo.dot_general") == products


def test_a_program_for_several_platforms_chooses_when_it_runs():
  exported = export_precondition(["cpu", "tpu", "cuda"])
  np.testing.assert_allclose(
    exported.call(*ARGUMENTS)[1], _preconditioner.precondition(*ARGUMENTS)[1], rtol=1e-6
  )


def test_maps_over_examples_and_devices():
  expected = _preconditioner.precondition(*ARGUMENTS)
  twice = jax.tree.map(lambda x: jnp.stack([x, x]), ARGUMENTS)
  mapped = jax.jit(jax.vmap(_preconditioner.precondition))(*twice)
  mesh = jax.make_mesh((2,), ("stack",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
  spec = jax.sharding.PartitionSpec("stack")
  sharded = jax.jit(
    jax.shard_map(_preconditioner.precondition, mesh=mesh, in_specs=spec, out_specs=spec)
  )(*ARGUMENTS)
  chex.assert_trees_all_close(jax.tree.map(lambda x: x[1], mapped), expected, rtol=1e-6)
  chex.assert_trees_all_close(sharded, expected, rtol=1e-6)


@given(layer=canonical_layers())
def test_inverse_undoes_it(layer):
  p = make(layer)
  w, b = jax.jit(_preconditioner.apply)(
    p, *jax.jit(_preconditioner.apply_inverse)(p, layer["w"], layer["b"])
  )
  np.testing.assert_allclose(w, layer["w"], rtol=1e-12)
  np.testing.assert_allclose(b, layer["b"], atol=1e-9 * np.abs(layer["mu"]).max() + 1e-12)


@pytest.mark.slow
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


def test_an_update_keeps_the_digits_of_the_nearer_end():
  assert jax.jit(_preconditioner._towards)(1.0, 1e20, 0.0) == 1
  assert jax.jit(_preconditioner._towards)(1e20, 1.0, 1.0) == 1


@pytest.mark.parametrize(("lag", "expected"), [(10.0, 101 / 1.2), (np.inf, 1.0)])
def test_the_guard_of_each_map_of_a_stack(lag, expected):
  one = jnp.ones((2, 1, 1))
  p = _preconditioner.Preconditioner(jnp.zeros((2, 1, 3)), jnp.ones((2, 1, 3)), one)
  mu_H = jnp.zeros((2, 1, 3)).at[1, 0, 0].set(lag)
  p = _preconditioner.guard_against_lag(p, mu_H, 1, 30 * one, jnp.asarray(2.0))
  np.testing.assert_allclose(p.guard.ravel(), [1, expected], rtol=1e-14)


def test_rounding_is_no_variance():
  """The rounding of the largest mean counts, as a sum that cancels is as inexact as its terms."""
  eps = float(jnp.finfo(jnp.float32).eps)
  mu = jnp.asarray([[[-1e3, 0.0]]])
  for factor, largest in ((7, 0.0), (9, (9e3 * eps) ** 2)):
    sigma2 = jnp.asarray([[[0.0, (factor * 1e3 * eps) ** 2]]])
    np.testing.assert_allclose(_preconditioner.find_largest(mu, sigma2, eps), largest)
    assert _preconditioner.find_largest(mu, sigma2, 0.0) == sigma2[..., 1:]
    one = jnp.ones((1, 1, 1))
    p = _preconditioner.make_preconditioner(
      *(mu, sigma2, 1, one, one, 0.0, 1e-4), largest=jnp.full((1, 1, 1), largest)
    )
    np.testing.assert_allclose(p.sigma, 0.01 if largest else 1, rtol=1e-2)


def test_inputs_that_do_not_vary_keep_a_deviation_above_1():
  one = jnp.ones((1, 1, 1))
  p = _preconditioner.make_preconditioner(
    *(1e9 * one, 1e6 * one, 1, one, one, 0.01, 1e-4), largest=0 * one
  )
  np.testing.assert_allclose(p.sigma, 1e3)
