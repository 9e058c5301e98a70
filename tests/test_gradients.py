"""Gradients through the update, as MAML and learned rates take them, against finite differences."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bnp_optax
from bnp_optax import linen

pytestmark = pytest.mark.usefixtures("x64", "standard_promotion")


class Net(nn.Module):
  @nn.compact
  def __call__(self, x):
    kwargs = {"param_dtype": jnp.float64}
    x = jnp.tanh(nn.Conv(3, (2,), use_bias=False, name="conv", **kwargs)(x))
    return nn.Dense(1, name="head", **kwargs)(nn.Dense(3, name="hidden", **kwargs)(x.mean(1)))


@pytest.fixture(scope="module")
def problem():
  rng = np.random.default_rng(0)
  x, y = jnp.asarray(rng.normal(1, 1, (6, 5, 4))), jnp.asarray(rng.normal(size=(6, 1)))
  params = Net().init(jax.random.key(0), x)["params"]
  direction = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape)), params)

  def inner_loss(params):
    with linen.sow_statistics():
      outputs, aux = Net().apply({"params": params}, x, mutable=["intermediates"])
    return jnp.mean((outputs - y) ** 2), aux["intermediates"]

  return params, direction, inner_loss


@pytest.mark.slow
def test_gradients_have_a_part_through_the_statistics(problem):
  params, _, inner_loss = problem
  tx = bnp_optax.scale_by_bnp(0.5)

  def step_norm(params, statistics):
    (_, stats), grads = jax.value_and_grad(inner_loss, has_aux=True)(params)
    updates, _ = tx.update(jax.lax.stop_gradient(grads), tx.init(params), stats=statistics(stats))
    return optax.tree.norm(updates)

  total, without = (
    jax.jit(jax.grad(step_norm), static_argnums=1)(params, statistics)
    for statistics in (lambda stats: stats, jax.lax.stop_gradient)
  )
  assert optax.tree.norm(without) == 0
  # The statistics of the convolution depend on no parameter; those of the later layers do.
  assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(total["conv"]))


TRANSFORMS = {
  "the paper": lambda rate: optax.chain(bnp_optax.scale_by_bnp(0.5), optax.sgd(rate)),
  "debiased": lambda rate: optax.chain(bnp_optax.scale_by_bnp(0.5, debias=True), optax.sgd(rate)),
  "bnp(momentum)": lambda rate: bnp_optax.bnp(optax.sgd(rate, momentum=0.9), debias=True),
}


@pytest.mark.slow
@pytest.mark.parametrize("make", TRANSFORMS.values(), ids=TRANSFORMS)
def test_gradients_through_the_update_equal_finite_differences(problem, make):
  params, direction, inner_loss = problem

  def outer_loss(t, rate):
    """The loss after three steps from a point on a line through the parameters."""
    point = jax.tree.map(lambda p, d: p + t * d, params, direction)
    tx = make(rate)
    state = tx.init(point)
    for _ in range(3):
      (_, stats), grads = jax.value_and_grad(inner_loss, has_aux=True)(point)
      updates, state = tx.update(grads, state, point, stats=stats)
      point = optax.apply_updates(point, updates)
    return inner_loss(point)[0]

  outer_loss = jax.jit(outer_loss)
  actual = jax.jit(jax.grad(outer_loss, (0, 1)))(0.0, 0.1)
  h = 1e-6
  expected = (
    (outer_loss(h, 0.1) - outer_loss(-h, 0.1)) / (2 * h),
    (outer_loss(0.0, 0.1 + h) - outer_loss(0.0, 0.1 - h)) / (2 * h),
  )
  np.testing.assert_allclose(actual, expected, rtol=1e-6)
