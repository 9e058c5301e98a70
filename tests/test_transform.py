"""`scale_by_bnp`: what it keeps, what it leaves alone, and how it refuses what does not fit."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bnp_optax
from tests import problems


@pytest.fixture(scope="module")
def mlp():
  params, batch = problems.make(problems.MLP(), (8, 5))
  grads, stats = problems.grads_and_stats(problems.MLP(), params, batch)
  return params, grads, stats


def raises(match, fn, *args, **kwargs):
  """Checks that a ValueError is raised while tracing, before anything is computed."""
  with pytest.raises(ValueError, match=match):
    jax.eval_shape(lambda: fn(*args, **kwargs))


# The state.


def test_state_has_the_structure_of_the_parameters(mlp):
  params, _, _ = mlp
  state = bnp_optax.scale_by_bnp().init(params)
  masked = optax.MaskedNode()
  expected = {
    "first": {"kernel": np.zeros(5), "bias": masked},
    "second": {"kernel": np.zeros(4), "bias": masked},
  }
  chex.assert_trees_all_equal(state.input_mean, expected)
  chex.assert_trees_all_equal(state.input_variance, jax.tree.map(np.ones_like, expected))
  assert (state.count, state.nonfinite_count) == (0, 0)


@pytest.mark.parametrize("kernel", ["bfloat16", "float16", "float32", "float64"])
def test_dtypes(kernel):
  with jax.enable_x64(True):
    params, batch = problems.make(problems.MLP(kernel), (8, 5), kernel)
    grads, stats = problems.grads_and_stats(problems.MLP(kernel), params, batch)
    tx = bnp_optax.scale_by_bnp()
    state = tx.init(params)
    updates, new_state = jax.jit(tx.update)(grads, state, stats=stats)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, grads)
    chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)
    expected = "float64" if kernel == "float64" else "float32"
    assert {x.dtype.name for x in jax.tree.leaves(new_state.input_mean)} == {expected}


def test_the_second_call_traces_nothing(mlp):
  params, (x, y) = problems.make(problems.CNN(), (2, 8, 8, 3))
  tx = optax.chain(bnp_optax.scale_by_bnp(), optax.sgd(0.01))
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
  tx = bnp_optax.scale_by_bnp()
  updates, _ = jax.jit(tx.update)(grads, tx.init(params), stats=stats)
  for name in ("embed", "norm", "gain"):
    chex.assert_trees_all_equal(updates[name], grads[name])
  assert not np.allclose(updates["head"]["kernel"], grads["head"]["kernel"])


def test_intermediates_sown_by_the_user_are_ignored(mlp):
  params, grads, stats = mlp
  tx = bnp_optax.scale_by_bnp()
  expected = tx.update(grads, tx.init(params), stats=stats)
  stats = {**stats, "features": (jnp.ones(3),), "first": {**stats["first"], "h": (jnp.ones(2),)}}
  chex.assert_trees_all_equal(tx.update(grads, tx.init(params), stats=stats), expected)


def test_hyperparameters_may_be_arrays_and_schedules(mlp):
  params, grads, stats = mlp
  fixed = bnp_optax.scale_by_bnp(0.9, 0.1, 1e-3)
  arrays = bnp_optax.scale_by_bnp(*map(jnp.asarray, (0.9, 0.1, 1e-3)))
  schedules = optax.inject_hyperparams(bnp_optax.scale_by_bnp)(lambda count: 0.9, 0.1, 1e-3)
  expected, expected_state = jax.jit(fixed.update)(grads, fixed.init(params), stats=stats)
  for tx in (arrays, schedules):
    updates, state = jax.jit(tx.update)(grads, tx.init(params), stats=stats)
    chex.assert_trees_all_close(updates, expected, rtol=1e-6)
    state = state.inner_state if tx is schedules else state
    chex.assert_trees_all_close(state, expected_state, rtol=1e-6)


# One row, no bias, dead features.


def test_batch_of_one_takes_the_variance_about_the_running_mean():
  params, (x, y) = problems.make(problems.MLP(), (1, 5))
  grads, stats = problems.grads_and_stats(problems.MLP(), params, (x, y))
  tx = bnp_optax.scale_by_bnp(0.9)
  _, state = tx.update(grads, tx.init(params), stats=stats)
  mean = 0.1 * x[0]
  np.testing.assert_allclose(state.input_mean["first"]["kernel"], mean, rtol=1e-6)
  variance = 0.9 + 0.1 * (x[0] - mean) ** 2
  np.testing.assert_allclose(state.input_variance["first"]["kernel"], variance, rtol=1e-6)


def test_a_layer_without_bias_uses_the_second_moment():
  model = nn.Dense(2, use_bias=False)
  params, (x, y) = problems.make(model, (8, 5))
  grads, stats = problems.grads_and_stats(model, params, (x, y))
  tx = bnp_optax.scale_by_bnp(0.0, 0.0, 0.0)
  updates, state = jax.jit(tx.update)(grads, tx.init(params), stats=stats)
  second_moment = np.mean(np.square(x, dtype=np.float64), axis=0)
  np.testing.assert_array_equal(state.input_mean["kernel"], np.zeros(5))
  np.testing.assert_allclose(state.input_variance["kernel"], second_moment, rtol=1e-6)
  expected = grads["kernel"] / second_moment[:, None]
  np.testing.assert_allclose(updates["kernel"], expected, rtol=1e-6)


def test_dead_features_stay_finite():
  params, (x, y) = problems.make(problems.MLP(), (8, 5))
  x = x.at[:, 1].set(0).at[:, 2].set(3)
  tx = bnp_optax.scale_by_bnp(0.0)
  state = tx.init(params)
  for inputs in (x, 0 * x):
    grads, stats = problems.grads_and_stats(problems.MLP(), params, (inputs, y))
    updates, state = tx.update(grads, state, stats=stats)
    chex.assert_tree_all_finite((updates, state))
    assert state.nonfinite_count == 0


# Non-finite statistics.


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30])
def test_statistics_that_are_not_finite_never_enter_the_state(bad):
  params, (x, y) = problems.make(problems.MLP(), (8, 5))
  tx = bnp_optax.scale_by_bnp()
  grads, stats = problems.grads_and_stats(problems.MLP(), params, (x, y))
  _, state = tx.update(grads, tx.init(params), stats=stats)

  bad_x = x.at[3, 1].set(bad)
  _, bad_stats = problems.grads_and_stats(problems.MLP(), params, (bad_x, y))
  updates, kept = tx.update(grads, state, stats=bad_stats)
  for mean_or_variance in ("input_mean", "input_variance"):
    before, after = getattr(state, mean_or_variance), getattr(kept, mean_or_variance)
    chex.assert_trees_all_equal(after["first"], before["first"])
  # Overflow is in the square of 1e30 alone; tanh of it is a fine input for the second layer.
  layers = 2 if np.isnan(bad) else 1
  assert kept.nonfinite_count == layers
  chex.assert_tree_all_finite((updates, kept))

  _, state = tx.update(grads, kept, stats=stats)
  assert state.nonfinite_count == layers
  assert state.count == 3


def test_gradients_that_are_not_finite_are_passed_on(mlp):
  params, grads, stats = mlp
  grads = {**grads, "first": jax.tree.map(lambda g: g.at[0].set(jnp.nan), grads["first"])}
  tx = bnp_optax.scale_by_bnp()
  updates, state = tx.update(grads, tx.init(params), stats=stats)
  assert np.isnan(updates["first"]["kernel"]).any()
  chex.assert_tree_all_finite((updates["second"], state))


# Errors.


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


def test_no_stats(mlp):
  params, grads, _ = mlp
  tx = bnp_optax.scale_by_bnp()
  raises("call tx.update.*stats=stats", tx.update, grads, tx.init(params))
  raises("call tx.update.*stats=stats", tx.update, grads, tx.init(params), stats=None)


def test_stats_without_statistics(mlp):
  params, grads, _ = mlp
  tx = bnp_optax.scale_by_bnp()
  for stats in ({}, {"first": {"h": (jnp.ones(3),)}}):
    raises(
      r'(?s)holds no LayerStatistics.*mutable=\["intermediates"\].*sow_statistics',
      tx.update,
      grads,
      tx.init(params),
      stats=stats,
    )


def test_a_kernel_without_statistics_is_named_with_the_ways_out(mlp):
  params, grads, stats = mlp
  tx = bnp_optax.scale_by_bnp()
  raises(
    "(?s)No statistics for second. There are statistics for first.*optax.partition.*layers=",
    tx.update,
    grads,
    tx.init(params),
    stats={"first": stats["first"]},
  )


def test_all_kernels_without_statistics_are_listed():
  params = {f"layer_{i}": {"kernel": jnp.ones((2, 2))} for i in range(30)}
  tx = bnp_optax.scale_by_bnp()
  _, stats = problems.grads_and_stats(nn.Dense(1), *problems.make(nn.Dense(1), (2, 2)))
  with pytest.raises(ValueError, match="layer_0, layer_1, ") as error:
    tx.update(params, tx.init(params), stats={"other": stats})
  assert all(f"layer_{i}" in str(error.value) for i in range(30))


def test_statistics_of_another_width(mlp):
  params, grads, stats = mlp
  tx = bnp_optax.scale_by_bnp()
  raises(
    r"Layer first: its kernel of shape \(5, 4\) takes inputs of shape \(5,\), but .* of \(4,\)",
    tx.update,
    grads,
    tx.init(params),
    stats={"first": stats["second"], "second": stats["second"]},
  )


def test_statistics_under_vmap_without_axis_name(mlp):
  params, grads, stats = mlp
  tx = bnp_optax.scale_by_bnp()
  stats = jax.tree.map(lambda s: jnp.stack([s, s]), stats)
  raises(
    r"under jax.vmap without sow_statistics\(axis_name=",
    tx.update,
    grads,
    tx.init(params),
    stats=stats,
  )


def test_state_for_other_parameters(mlp):
  params, grads, stats = mlp
  tx = bnp_optax.scale_by_bnp()
  wider = {**params, "first": {"kernel": jnp.ones((6, 4)), "bias": jnp.ones(4)}}
  raises(
    r"Layer first: the state's input_mean should be of shape \(5,\), found \(6,\).*tx.init",
    tx.update,
    grads,
    tx.init(wider),
    stats=stats,
  )
  raises(
    "state was made for other parameters",
    tx.update,
    grads,
    tx.init({"first": params["first"]}),
    stats=stats,
  )
  raises(
    "state was made for other parameters",
    tx.update,
    grads,
    tx.init({**params, "third": jnp.ones(3)}),
    stats=stats,
  )


@pytest.mark.parametrize("away", ["kernel", "bias"])
def test_kernel_and_bias_torn_apart_by_a_mask(mlp, away):
  params, _, _ = mlp
  mask = jax.tree.map_with_path(
    lambda path, _: path != (jax.tree_util.DictKey("first"), jax.tree_util.DictKey(away)), params
  )
  tx = optax.masked(bnp_optax.scale_by_bnp(), mask)
  raises(rf"Layer first: .* its {away} is masked out.*mask both or neither", tx.init, params)


def test_an_empty_batch():
  params, (x, y) = problems.make(problems.MLP(), (8, 5))
  raises(
    r"Layer first: no rows in its inputs of shape \(0, 5\)",
    problems.loss_fn(problems.MLP()),
    params,
    (x[:0], y[:0]),
  )


def test_complex_kernels():
  params = {"layer": {"kernel": jnp.ones((2, 2), jnp.complex64)}}
  raises("Layer layer: .*real kernels.*complex64", bnp_optax.scale_by_bnp().init, params)


def test_kernels_that_are_no_dense_or_conv():
  init = bnp_optax.scale_by_bnp().init
  raises(r"Layer odd: a kernel of shape \(3,\)", init, {"odd": {"kernel": jnp.ones(3)}})
  attention = {"kernel": jnp.ones((6, 2, 3)), "bias": jnp.ones((2, 3))}
  raises(r"Layer query: the bias has shape \(2, 3\), .*layers=", init, {"query": attention})
