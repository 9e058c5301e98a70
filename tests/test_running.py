"""The running statistics: their state, one update, what is left out, and the two entry points."""

import dataclasses
import re

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bnp_optax
from bnp_optax import KernelLayout, _running
from tests import oracle, problems, reference
from tests.compiling import AS_USERS_DO


@pytest.fixture(scope="module")
def mlp():
  params, batch = problems.make(problems.MLP(), (8, 5))
  grads, stats = problems.grads_and_stats(problems.MLP(), params, batch)
  return params, grads, stats


# The state.


def test_state_has_the_structure_of_the_parameters(mlp):
  params, _, _ = mlp
  state = bnp_optax.scale_by_bnp(debias=False).init(params)
  masked = optax.MaskedNode()
  expected = {
    "first": {"kernel": np.zeros(5), "bias": masked},
    "second": {"kernel": np.zeros(4), "bias": masked},
  }
  chex.assert_trees_all_equal(state.input_mean, expected)
  chex.assert_trees_all_equal(state.input_variance, jax.tree.map(np.ones_like, expected))
  assert (state.count, state.nonfinite_count) == (0, 0)


class Scanned(nn.Module):
  """Three layers under nn.scan."""

  @nn.compact
  def __call__(self, x):
    block = nn.scan(
      lambda module, x, _: (module(x), None),
      variable_axes={"params": 0, "intermediates": 0},
      split_rngs={"params": True},
      length=3,
    )
    return block(nn.Dense(4, name="block"), x, None)[0]


@pytest.mark.parametrize(
  ("model", "shape", "exact", "expected"),
  [
    pytest.param(nn.Dense(3), (2, 5), False, (5,), id="dense"),
    pytest.param(nn.Conv(3, (2, 2)), (2, 4, 4, 5), False, (5,), id="conv"),
    pytest.param(nn.Conv(4, (3,), feature_group_count=2), (2, 4, 6), False, (6,), id="grouped"),
    pytest.param(nn.Conv(4, (3,), feature_group_count=2), (2, 4, 6), True, (18,), id="exact"),
    pytest.param(nn.ConvLocal(2, (3,), padding="VALID"), (2, 4, 5), False, (2, 15), id="local"),
    pytest.param(Scanned(), (2, 4), False, (3, 4), id="scanned"),
  ],
)
def test_state_shapes(model, shape, exact, expected):
  x = jax.ShapeDtypeStruct(shape, jnp.float32)
  params = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
  layers = bnp_optax.linen.layers(model, x, exact_windows=exact)
  state = jax.eval_shape(bnp_optax.scale_by_bnp(layers=layers, debias=False).init, params)
  for tree in (state.input_mean, state.input_variance):
    assert [leaf.shape for leaf in jax.tree.leaves(tree)] == [expected]


@pytest.mark.parametrize("kernel", ["bfloat16", "float16", "float32", "float64"])
def test_dtypes(kernel):
  with jax.enable_x64(True):
    params, batch = problems.make(problems.MLP(kernel), (8, 5), kernel)
    grads, stats = problems.grads_and_stats(problems.MLP(kernel), params, batch)
    tx = bnp_optax.scale_by_bnp(debias=False)
    state = tx.init(params)
    updates, new_state = jax.jit(tx.update)(grads, state, stats=stats)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, grads)
    chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)
    expected = "float64" if kernel == "float64" else "float32"
    assert {x.dtype.name for x in jax.tree.leaves(new_state.input_mean)} == {expected}


# One row, no bias, dead features.


def test_batch_of_one_takes_the_variance_about_the_running_mean():
  params, (x, y) = problems.make(problems.MLP(), (1, 5))
  grads, stats = problems.grads_and_stats(problems.MLP(), params, (x, y))
  tx = problems.compiled(bnp_optax.scale_by_bnp(0.9, debias=False))
  _, state = tx.update(grads, tx.init(params), stats=stats)
  mean = 0.1 * x[0]
  np.testing.assert_allclose(state.input_mean["first"]["kernel"], mean, rtol=1e-6)
  variance = 0.9 + 0.1 * (x[0] - mean) ** 2
  np.testing.assert_allclose(state.input_variance["first"]["kernel"], variance, rtol=1e-6)


def test_a_layer_without_bias_uses_the_second_moment():
  model = nn.Dense(2, use_bias=False)
  params, (x, y) = problems.make(model, (8, 5))
  grads, stats = problems.grads_and_stats(model, params, (x, y))
  tx = bnp_optax.scale_by_bnp(0.0, 0.0, 0.0, debias=False)
  updates, state = jax.jit(tx.update)(grads, tx.init(params), stats=stats)
  second_moment = np.mean(np.square(x, dtype=np.float64), axis=0)
  np.testing.assert_array_equal(state.input_mean["kernel"], np.zeros(5))
  np.testing.assert_allclose(state.input_variance["kernel"], second_moment, rtol=1e-6)
  expected = grads["kernel"] / second_moment[:, None]
  np.testing.assert_allclose(updates["kernel"], expected, rtol=1e-6)


def test_dead_features_stay_finite():
  params, (x, y) = problems.make(problems.MLP(), (8, 5))
  x = x.at[:, 1].set(0).at[:, 2].set(3)
  tx = problems.compiled(bnp_optax.scale_by_bnp(0.0, debias=False))
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
  tx = problems.compiled(bnp_optax.scale_by_bnp(debias=False))
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


GROUPED = dataclasses.replace(KernelLayout.by_convention(3), groups=2)


@pytest.mark.parametrize(("which", "bad"), [(0, np.nan), (1, np.nan), (1, np.inf), (0, 1.0)])
@pytest.mark.parametrize(
  ("layout", "shape"),
  [
    pytest.param(KernelLayout(), (5, 4), id="dense"),
    pytest.param(KernelLayout().stacked([0]), (3, 5, 4), id="stacked"),
    pytest.param(GROUPED, (3, 2, 4), id="grouped"),
    pytest.param(dataclasses.replace(GROUPED, exact_windows=True), (3, 2, 4), id="exact"),
  ],
)
@pytest.mark.parametrize("epsilon", [0.0, 1e-7])
def test_an_accelerator_leaves_out_the_same_statistics(
  layout, shape, which, bad, epsilon, monkeypatch
):
  rng = np.random.default_rng(0)
  new, old = rng.lognormal(size=(2, 2, *layout.statistics_shape(shape))).astype(np.float32)
  new[which].flat[1] = bad
  check = lambda: jax.jit(lambda *args: _running._check(layout, shape, *args, epsilon))(new, old)
  expected = check()

  def default_form(*args, cpu, default):
    return default(*args)

  monkeypatch.setattr(jax.lax, "platform_dependent", default_form)
  actual = check()
  chex.assert_trees_all_equal(actual, expected, strict=True)
  assert np.all(expected[0]) == np.isfinite(bad)


def test_gradients_that_are_not_finite_are_passed_on(mlp):
  params, grads, stats = mlp
  grads = {**grads, "first": jax.tree.map(lambda g: g.at[0].set(jnp.nan), grads["first"])}
  tx = problems.compiled(bnp_optax.scale_by_bnp(debias=False))
  updates, state = tx.update(grads, tx.init(params), stats=stats)
  assert np.isnan(updates["first"]["kernel"]).any()
  chex.assert_tree_all_finite((updates["second"], state))


def test_each_map_of_a_stack_is_left_out_and_counted_alone():
  params = {"kernel": jnp.ones((3, 5, 4))}
  x = np.random.default_rng(0).normal(size=(8, 3, 5)).astype(np.float32)
  x[0, :2, 0] = np.nan
  stats = {"statistics": bnp_optax.layer_statistics(jnp.asarray(x), examples=8, rows=8, stack=1)}
  tx = problems.compiled(bnp_optax.scale_by_bnp(layers={("kernel",): KernelLayout().stacked([0])}))
  _, state = tx.update(params, tx.init(params), stats=stats)
  assert state.nonfinite_count == 2
  np.testing.assert_array_equal(state.input_weight["kernel"][:, 0], [0, 0, 1])


# One update.


def test_one_minus_the_decay_keeps_the_digits_of_float32(mlp):
  params, grads, stats = mlp
  tx = problems.compiled(bnp_optax.scale_by_bnp(0.99, debias=False))
  _, state = tx.update(grads, tx.init(params), stats=stats)
  expected = 0.01 * np.asarray(stats["first"]["layer_statistics"].mean, np.float64)
  np.testing.assert_allclose(state.input_mean["first"]["kernel"], expected, rtol=2e-7)


def test_statistics_and_steps_are_those_of_the_paper():
  """Over three batches, for strided and unbiased convolutions and a dense head."""
  with jax.enable_x64(True):
    model = problems.CNN("float64")
    params, first = problems.make(model, (2, 6, 6, 3), "float64")
    batches = [first, *(problems.make(model, (2, 6, 6, 3), "float64", seed)[1] for seed in (1, 2))]
    tx = problems.compiled(bnp_optax.scale_by_bnp(0.9, debias=False))
    actual, state = params, tx.init(params)
    for batch in batches:
      grads, stats = problems.grads_and_stats(model, actual, batch)
      updates, state = tx.update(grads, state, stats=stats)
      actual = optax.apply_updates(actual, updates)
    expected, (running, _) = reference.train(reference.bnp(rho=0.9), model, params, batches)
    chex.assert_trees_all_close(actual, expected, rtol=1e-9, atol=1e-12)
    for name, (mean, variance) in running.items():
      np.testing.assert_allclose(state.input_mean[name]["kernel"], mean, rtol=1e-9, atol=1e-12)
      np.testing.assert_allclose(state.input_variance[name]["kernel"], variance, rtol=1e-9)


# `scale_by_bnp` and `bnp` are two entry points on one engine.

LAYERS = {
  "dense": (lambda **kwargs: nn.Dense(4, **kwargs), (8, 5)),
  "dense, no bias": (lambda **kwargs: nn.Dense(4, use_bias=False, **kwargs), (8, 5)),
  "conv": (lambda **kwargs: nn.Conv(4, (3, 3), **kwargs), (2, 6, 6, 4)),
  "grouped conv": (
    lambda **kwargs: nn.Conv(4, (3, 3), feature_group_count=2, **kwargs),
    (2, 6, 6, 4),
  ),
  "grouped conv, no bias": (
    lambda **kwargs: nn.Conv(4, (3, 3), feature_group_count=2, use_bias=False, **kwargs),
    (2, 6, 6, 4),
  ),
}


def computations(compiled):
  """Return the text of an optimized program without the module's name and the metadata."""
  text = re.sub(r", metadata=\{[^}]*\}", "", compiled.as_text())
  return text[re.search(r"^(%|ENTRY)", text, re.MULTILINE).start() :]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
  ("name", "options"),
  [*((name, {}) for name in LAYERS), ("grouped conv", {"debias": True, "lag_guard": 2.0})],
)
def test_scale_by_bnp_and_bnp_of_identity_are_one_program(name, options, dtype):
  """Bitwise: the same optimized program, the same updates and the same statistics."""
  make, shape = LAYERS[name]
  with jax.enable_x64(dtype == "float64"):
    model = make(dtype=dtype, param_dtype=dtype)
    params, batch = problems.make(model, shape, dtype)
    grads, stats = problems.grads_and_stats(model, params, batch)
    layers = bnp_optax.linen.layers(model, batch[0])
    scale, bnp = (
      bnp_optax.scale_by_bnp(**options, layers=layers),
      bnp_optax.bnp(optax.identity(), **options, layers=layers),
    )

    def update_scale(grads, state, params, stats):
      return scale.update(grads, state, params, stats=stats)

    # The arguments have the same names, which are in the text of the program.
    def update_bnp(grads, state, params, stats):
      state = bnp_optax.BnpState(state, optax.EmptyState())
      updates, state = bnp.update(grads, state, params, stats=stats)
      return updates, state.statistics

    args = grads, scale.init(params), params, stats
    first, second = (
      jax.jit(update, compiler_options=AS_USERS_DO).lower(*args).compile()
      for update in (update_scale, update_bnp)
    )
    assert computations(first) == computations(second)
    chex.assert_trees_all_equal(first(*args), second(*args), strict=True)


def test_in_bfloat16_bnp_of_identity_rounds_once_more():
  """`bnp` hands z to the inner optimizer in the gradients' dtype; `scale_by_bnp` has no z."""
  model = nn.Dense(4, dtype="bfloat16", param_dtype="bfloat16")
  params, (x, y) = problems.make(model, (8, 5), "bfloat16")
  grads, stats = problems.grads_and_stats(model, params, (x, y))
  scale, bnp = (
    bnp_optax.scale_by_bnp(0.5, debias=False),
    bnp_optax.bnp(optax.identity(), 0.5, debias=False),
  )
  once, state = scale.update(grads, scale.init(params), stats=stats)
  twice, _ = bnp.update(grads, bnp.init(params), stats=stats)

  chex.assert_trees_all_equal_dtypes(once, twice, grads)
  to_columns = lambda tree: np.vstack([tree["bias"][None], tree["kernel"]]).astype(np.float64)
  statistics = state.input_mean["kernel"], state.input_variance["kernel"]
  P = oracle.explicit_matrices(*statistics, window=1, q2=1.0)
  unit = float(jnp.finfo(jnp.bfloat16).eps) / 2
  z = P.T @ to_columns(grads)
  rounding_of_z = unit * np.abs(P) @ np.abs(z)
  rounding_of_updates = unit * (np.abs(to_columns(once)) + np.abs(to_columns(twice)))
  error = np.abs(to_columns(once) - to_columns(twice))
  assert error.max() > 0
  assert np.all(error <= 1.01 * (rounding_of_z + rounding_of_updates))
