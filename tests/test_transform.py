"""`scale_by_bnp`: parameters that pass through, hyperparameters, and their errors."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bnp_optax
from tests import problems, reference
from tests.problems import raises


def test_the_second_call_traces_nothing():
  params, (x, y) = problems.make(problems.CNN(), (2, 8, 8, 3))
  tx = optax.chain(bnp_optax.scale_by_bnp(debias=False), optax.sgd(0.01))
  grad_fn = jax.value_and_grad(problems.loss_fn(problems.CNN()), has_aux=True)

  @jax.jit
  @chex.assert_max_traces(n=1)
  def step(params, state, batch):
    (_, stats), grads = grad_fn(params, batch)
    updates, state = tx.update(grads, state, params, stats=stats)
    return optax.apply_updates(params, updates), state

  state = tx.init(params)
  for _ in range(3):
    params, state = step(params, state, (x, y))
  assert state[0].count == 3


def test_parameters_of_no_linear_layer_pass_through_untouched():
  class Model(nn.Module):
    @nn.compact
    def __call__(self, tokens):
      h = nn.Embed(7, 4, name="embed")(tokens)
      h = nn.LayerNorm(name="norm")(h)
      return nn.Dense(3, name="head")(h) * self.param("gain", nn.initializers.ones, (3,))[None]

  tokens = jnp.arange(6) % 7
  params = jax.jit(Model().init)(jax.random.key(0), tokens)["params"]
  grads, stats = problems.grads_and_stats(Model(), params, (tokens, jnp.ones((6, 3))))
  tx = bnp_optax.scale_by_bnp(debias=False)
  updates, _ = jax.jit(tx.update)(grads, tx.init(params), stats=stats)
  for name in ("embed", "norm", "gain"):
    chex.assert_trees_all_equal(updates[name], grads[name])
  assert not np.allclose(updates["head"]["kernel"], grads["head"]["kernel"])


def test_intermediates_sown_by_the_user_are_ignored(mlp):
  params, grads, stats = mlp
  tx = bnp_optax.scale_by_bnp(debias=False)
  expected = tx.update(grads, tx.init(params), stats=stats)
  stats = {**stats, "features": (jnp.ones(3),), "first": {**stats["first"], "h": (jnp.ones(2),)}}
  chex.assert_trees_all_equal(tx.update(grads, tx.init(params), stats=stats), expected)


def test_hyperparameters_may_be_arrays_and_schedules(mlp):
  params, grads, stats = mlp
  fixed = bnp_optax.scale_by_bnp(0.9, 0.1, 1e-3, debias=False)
  arrays = bnp_optax.scale_by_bnp(*map(jnp.asarray, (0.9, 0.1, 1e-3)), debias=False)
  schedules = optax.inject_hyperparams(bnp_optax.scale_by_bnp)(
    lambda count: 0.9, 0.1, 1e-3, debias=False
  )
  _, batch = problems.make(problems.MLP(), (8, 5))
  _, calls = reference.gradients(problems.MLP(), params, batch)
  paper = reference.bnp(rho=0.9, eps_1=0.1, eps_2=1e-3)
  expected, _ = paper.update(jax.tree.map(np.asarray, grads), paper.init(params), calls=calls)
  for tx in (fixed, arrays, schedules):
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), stats=stats)
    chex.assert_trees_all_close(updates, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("inner", [None, optax.sgd(0.01)])
def test_layers_without_the_scale_q(inner):
  params, batch = problems.make(problems.CNN(), (2, 8, 8, 3))
  grads, stats = problems.grads_and_stats(problems.CNN(), params, batch)
  make = bnp_optax.scale_by_bnp if inner is None else functools.partial(bnp_optax.bnp, inner)
  tx = make(debias=False, scale_layers=False)
  updates, _ = jax.jit(tx.update)(grads, tx.init(params), params, stats=stats)

  paper = reference.bnp(inner, scale_layers=False)
  _, calls = reference.gradients(problems.CNN(), params, batch)
  to_numpy = lambda tree: jax.tree.map(np.asarray, tree)
  expected, _ = paper.update(
    to_numpy(grads), paper.init(to_numpy(params)), to_numpy(params), calls=calls
  )
  chex.assert_trees_all_close(updates, expected, rtol=1e-4, atol=1e-6)


# Errors.


@pytest.mark.parametrize("inner", [1e-3, optax.adam, optax.constant_schedule(1e-3)])
def test_an_inner_optimizer_that_is_none(inner):
  with pytest.raises(
    TypeError, match=r"inner must be an optimizer, such as optax.adam\(1e-3\), got"
  ):
    bnp_optax.bnp(inner)


@pytest.mark.parametrize("value", [optax.constant_schedule(0.9), optax.adam(1e-3), "0.9"])
def test_numbers_of_another_type(value):
  with pytest.raises(TypeError, match=r"decay must be a number, got .*inject_hyperparams.*bnp\("):
    bnp_optax.scale_by_bnp(value)


@pytest.mark.parametrize("decay", [-0.1, 1.0, np.nan, np.inf, jnp.float32(1.5)])
def test_decay_out_of_range(decay):
  with pytest.raises(ValueError, match=r"decay must be in \[0, 1\), got"):
    bnp_optax.scale_by_bnp(decay)


@pytest.mark.parametrize("name", ["eps_relative", "eps_absolute"])
@pytest.mark.parametrize("value", [-1e-3, np.nan, np.inf])
def test_epsilon_out_of_range(name, value):
  with pytest.raises(ValueError, match=rf"{name} must be in \[0, inf\), got"):
    bnp_optax.scale_by_bnp(**{name: value})


def test_a_decay_that_inject_hyperparams_rounds_to_bfloat16(mlp):
  params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), mlp[0])
  make = optax.inject_hyperparams(bnp_optax.scale_by_bnp, hyperparam_dtype=jnp.float32)
  state = jax.jit(make(decay=0.999).init)(params)
  assert state.hyperparams["decay"] == jnp.float32(0.999)
  raises(
    "decay is bfloat16.*hyperparam_dtype=jnp.float32",
    jax.jit(optax.inject_hyperparams(bnp_optax.scale_by_bnp)(decay=0.999).init),
    params,
  )


def test_an_empty_batch():
  params, (x, y) = problems.make(problems.MLP(), (8, 5))
  raises(
    r"Layer first: no rows in its inputs of shape \(0, 5\)",
    problems.loss_fn(problems.MLP()),
    params,
    (x[:0], y[:0]),
  )
