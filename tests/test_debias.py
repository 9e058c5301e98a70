"""`debias` against a float64 NumPy oracle that keeps every batch, and `lag_guard`."""

import dataclasses
import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bnp_optax
from tests import oracle, problems

STEPS = 200
SIZES = (1, 2, 7)


class Scanned(nn.Module):
  """Three dense layers under a scan."""

  @nn.compact
  def __call__(self, x):
    class Block(nn.Module):
      @nn.compact
      def __call__(self, x, _):
        return nn.Dense(3, param_dtype=x.dtype, name="dense")(x), None

    scan = nn.scan(
      Block, variable_axes={"params": 0, "intermediates": 0}, split_rngs={"params": True}, length=3
    )
    return scan()(x, None)[0]


def scanned_inputs(x, params):
  """The inputs of each layer of `Scanned`, `[layers, rows, features]`."""
  kernel, bias = (np.asarray(x, np.float64) for x in jax.tree.leaves(params)[::-1])
  inputs = [x]
  for k, b in zip(kernel[:-1], bias[:-1], strict=True):
    inputs.append(inputs[-1] @ k + b)
  return np.stack(inputs)


def flat(x, params):
  """Every vector along the last axis is a row; a convolution's map is one set of rows."""
  del params
  return x.reshape(-1, x.shape[-1])


KINDS = {
  "dense": (lambda dtype: nn.Dense(4, param_dtype=dtype), (3,), flat),
  "dense on sequences": (lambda dtype: nn.Dense(4, param_dtype=dtype), (5, 3), flat),
  "dense without bias": (lambda dtype: nn.Dense(4, use_bias=False, param_dtype=dtype), (3,), flat),
  "conv": (lambda dtype: nn.Conv(4, (3, 2), strides=2, param_dtype=dtype), (5, 4, 3), flat),
  "grouped conv": (
    lambda dtype: nn.Conv(4, (3,), feature_group_count=2, param_dtype=dtype),
    (5, 4),
    flat,
  ),
  "transposed conv": (lambda dtype: nn.ConvTranspose(4, (3,), param_dtype=dtype), (5, 3), flat),
  "stack of dense": (
    lambda dtype: nn.Einsum((5, 3, 4), "bsi,sio->bso", param_dtype=dtype),
    (5, 3),
    lambda x, params: np.moveaxis(x, 1, 0),
  ),
  "scanned dense": (lambda dtype: Scanned(), (3,), scanned_inputs),
}


class Oracle:
  """The mean and variance of the rows of all batches, weighted by the decay since."""

  def __init__(self, centred):
    self.centred, self.batches = centred, []

  def add(self, rows, rho):
    self.batches = [(weight * rho, old) for weight, old in self.batches]
    self.batches.append((1.0, rows))

  def moments(self):
    total = sum(weight for weight, _ in self.batches)
    average = lambda f: sum(w * f(h).mean(axis=-2) for w, h in self.batches) / total
    mean = average(lambda h: h) if self.centred else np.zeros(())
    variance = average(lambda h: (h - mean[..., None, :] if self.centred else h) ** 2)
    return mean, variance


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_an_oracle_that_keeps_every_batch(kind, dtype):
  make, shape, rows_of = KINDS[kind]
  rng = np.random.default_rng(0)
  with jax.enable_x64(dtype == "float64"):
    model = make(dtype)
    array = lambda x: jnp.asarray(x, dtype)
    params = jax.jit(model.init)(jax.random.key(0), array(np.ones((1, *shape))))["params"]
    layers = bnp_optax.linen.layers(model, array(np.ones((1, *shape))))
    centred = "bias" in str(jax.tree_util.tree_structure(params))
    oracle = Oracle(centred)
    zeros = jax.tree.map(jnp.zeros_like, params)

    @jax.jit
    def step(state, x, decay):
      with bnp_optax.linen.sow_statistics():
        _, aux = model.apply({"params": params}, x, mutable=["intermediates"])
      tx = bnp_optax.scale_by_bnp(decay, debias=True, layers=layers)
      return tx.update(zeros, state, stats=aux["intermediates"])[1]

    state = bnp_optax.scale_by_bnp(debias=True, layers=layers).init(params)
    for i in range(STEPS):
      size = SIZES[rng.integers(len(SIZES))]
      x = np.asarray(array(rng.normal(2 + np.sin(i / 20), 0.5 + i / STEPS, (size, *shape))))
      decay = array(0.9 + 0.09 * i / STEPS)
      if i % 17 == 3:  # A batch that is left out does not decay the earlier ones.
        state = step(state, array(np.full_like(x, np.nan)), decay)
        continue
      state = step(state, array(x), decay)
      oracle.add(rows_of(x.astype(np.float64), params), float(decay))
    mean, variance = oracle.moments()
    tolerance = 1e-12 if dtype == "float64" else 1e-6
    actual_mean, actual_variance = (jax.tree.leaves(x)[0] for x in state[1:3])
    scale = np.sqrt(variance)
    assert np.max(np.abs(actual_mean - mean) / scale) <= tolerance
    np.testing.assert_allclose(actual_variance, variance, rtol=tolerance)


def update(tx, params, grads, stats, state=None):
  state = tx.init(params) if state is None else state
  return jax.jit(tx.update)(grads, state, params, stats=stats)


@pytest.fixture(scope="module")
def problem():
  params, batch = problems.make(problems.MLP(), (8, 5))
  return params, *problems.grads_and_stats(problems.MLP(), params, batch)


def test_the_first_batch_gives_its_own_mean_and_variance(problem):
  params, grads, stats = problem
  _, state = update(bnp_optax.scale_by_bnp(debias=True), params, grads, stats)
  for name in ("first", "second"):
    statistics = stats[name]["layer_statistics"]
    np.testing.assert_array_equal(state.input_mean[name]["kernel"], statistics.mean)
    np.testing.assert_array_equal(state.input_variance[name]["kernel"], statistics.variance)


@pytest.mark.parametrize(
  "make", [bnp_optax.scale_by_bnp, functools.partial(bnp_optax.bnp, optax.identity())]
)
def test_the_first_step_is_that_of_the_matrix_of_the_batch(problem, make):
  params, grads, stats = problem
  updates, _ = update(make(debias=True), params, grads, stats)
  for name in ("first", "second"):
    statistics = stats[name]["layer_statistics"]
    inputs, q2 = len(statistics.mean), max(len(statistics.mean) / 8, 1)
    P = oracle.explicit_matrices(statistics.mean, statistics.variance, window=1, q2=q2)
    columns = lambda tree: np.vstack([tree["bias"][None], tree["kernel"]]).astype(np.float64)
    expected = P @ P.T @ columns(grads[name])
    assert columns(updates[name]).shape == (1 + inputs, expected.shape[1])
    np.testing.assert_allclose(columns(updates[name]), expected, rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 7, 60, 128])
def test_rows_that_start_alike_do_not_multiply_rounding(rows):
  """The gradient of the kernel in z is then rounding alone, of which only the sign is used here."""
  model = problems.MLP()
  params, (row, y) = problems.make(model, (1, 5))
  batch = jnp.tile(row + 0.1, (rows, 1)), jnp.tile(y, (rows, 1))
  grads, stats = problems.grads_and_stats(model, params, batch)
  variance = stats["first"]["layer_statistics"].variance
  # Of the first layer: what is rounding, and not 0.
  assert jnp.any(variance > 0) == (rows > 1)
  tx = bnp_optax.bnp(optax.sign_sgd(0.1))
  updates, _ = jax.jit(tx.update)(grads, tx.init(params), params, stats=stats)
  for name in params:
    assert jnp.max(jnp.abs(updates[name]["kernel"])) <= 0.1


@pytest.mark.slow
def test_equal_rows_in_batches_of_different_sizes():
  """Their products differ by rounding, which exceeds that of a mean where terms cancel."""
  row = jax.random.normal(jax.random.key(0), (784,))
  frozen, head = nn.Dense(100), nn.Dense(10)
  hidden = frozen.init(jax.random.key(1), row)
  inputs = jax.jit(lambda x: nn.relu(frozen.apply(hidden, x)))
  params = head.init(jax.random.key(2), jnp.ones(100))["params"]
  tx = bnp_optax.bnp(optax.sign_sgd(1e-3))
  state = tx.init(params)

  @jax.jit
  def step(state, x):
    def loss_fn(params):
      with bnp_optax.linen.sow_statistics():
        y, aux = head.apply({"params": params}, x, mutable=["intermediates"])
      return jnp.mean((y - 1) ** 2), aux["intermediates"]

    grads, stats = jax.grad(loss_fn, has_aux=True)(params)
    return tx.update(grads, state, params, stats=stats)

  for rows in (1, 64, 3, 1, 4):
    updates, state = step(state, inputs(jnp.broadcast_to(row, (rows, 784))))
    assert jnp.max(jnp.abs(updates["kernel"])) <= 1e-3
  assert jnp.any(state.statistics.input_variance["kernel"] > 0)


@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_inputs_whose_deviation_is_near_their_rounding(scale):
  """Such as Unix timestamps within an hour."""
  x = scale * 2e6 + scale * np.random.default_rng(0).normal(size=(64, 1))
  x = jnp.asarray(x, jnp.float32)
  y = (x - jnp.mean(x)) / jnp.std(x)
  params = {"kernel": jnp.zeros((1, 1)), "bias": jnp.zeros(1)}
  tx = optax.chain(bnp_optax.scale_by_bnp(), optax.sgd(0.1))

  @jax.jit
  def step(params, state):
    def loss_fn(params):
      with bnp_optax.linen.sow_statistics():
        out, aux = nn.Dense(1).apply({"params": params}, x, mutable=["intermediates"])
      return jnp.mean((out - y) ** 2), aux["intermediates"]

    (loss, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
    updates, state = tx.update(grads, state, params, stats=stats)
    return optax.apply_updates(params, updates), state, loss

  state, losses = tx.init(params), []
  for _ in range(20):
    params, state, loss = step(params, state)
    losses.append(loss)
  assert losses[-1] < 0.2 * losses[0]


@pytest.mark.slow
def test_float64_parameters_with_float32_inputs():
  with jax.enable_x64(True):
    x = 1e3 + np.random.default_rng(0).normal(size=(64, 3))
    x = x.astype(np.float32)
    params = {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}
    stats = {"layer_statistics": bnp_optax.layer_statistics(x, examples=64, rows=64)}
    tx = bnp_optax.scale_by_bnp()
    _, state = tx.update(params, tx.init(params), stats=stats)
    variance = state.input_variance["kernel"]
    assert variance.dtype == np.float64
    np.testing.assert_allclose(variance, np.var(x.astype(np.float64), axis=0), rtol=1e-6)
    equal = np.full((7, 3), 0.1, np.float32)
    stats = {"layer_statistics": bnp_optax.layer_statistics(equal, examples=7, rows=7)}
    updates, _ = tx.update(params, tx.init(params), stats=stats)
    # With sigma-tilde of 1.
    np.testing.assert_allclose(updates["kernel"], 1 - np.float32(0.1), rtol=1e-6)


def test_micro_batches_equal_one_batch(problem):
  params, grads, stats = problem
  x = np.random.default_rng(1).normal(3, 2, (12, 5)).astype(np.float32)

  @jax.jit
  def gather(x):
    with bnp_optax.linen.sow_statistics():
      return problems.MLP().apply({"params": params}, x, mutable=["intermediates"])[1][
        "intermediates"
      ]

  parts = [gather(part) for part in np.split(x, 3)]
  tx = bnp_optax.scale_by_bnp(debias=True, lag_guard=2.0)
  _, state = update(tx, params, grads, stats)
  expected, expected_state = update(tx, params, grads, gather(x), state)
  merged = jax.tree.map(lambda a, b, c: a + b + c, *parts)
  actual, actual_state = update(tx, params, grads, merged, state)
  chex.assert_trees_all_close(actual, expected, rtol=2e-6, atol=1e-7)
  chex.assert_trees_all_close(actual_state, expected_state, rtol=2e-6)


def test_a_layer_that_is_added_later_starts_without_bias(problem):
  params, grads, stats = problem
  tx = bnp_optax.scale_by_bnp(debias=True)
  only = lambda tree: {"first": tree["first"]}
  _, old = update(tx, only(params), only(grads), only(stats))
  fresh = tx.init(params)
  grafted = fresh._replace(
    **{
      field: {**getattr(fresh, field), **getattr(old, field)}
      for field in ("input_mean", "input_variance", "input_weight")
    }
  )
  _, state = update(tx, params, grads, stats, grafted)
  statistics = stats["second"]["layer_statistics"]
  np.testing.assert_array_equal(state.input_mean["second"]["kernel"], statistics.mean)
  np.testing.assert_allclose(state.input_weight["first"]["kernel"], 1.99, rtol=1e-6)
  np.testing.assert_array_equal(state.input_weight["second"]["kernel"], 1.0)


def test_without_debias_the_state_has_no_weights(problem):
  params, grads, stats = problem
  plain, debiased = bnp_optax.scale_by_bnp(debias=False), bnp_optax.scale_by_bnp(debias=True)
  assert not jax.tree.leaves(plain.init(params).input_weight)
  for made, used in ((plain, debiased), (debiased, plain)):
    with pytest.raises(ValueError, match="another debias="):
      used.update(grads, made.init(params), stats=stats)


def guarded(inner=None, c=2.0):
  kwargs = {"debias": True, "lag_guard": c}
  if inner is None:
    return bnp_optax.scale_by_bnp(**kwargs)
  return bnp_optax.bnp(inner, **kwargs)


@pytest.mark.slow
@pytest.mark.parametrize("model", [problems.MLP(), problems.CNN()], ids=["mlp", "cnn"])
@pytest.mark.parametrize("inner", [None, optax.sgd(1.0), optax.scale_by_sign()])
def test_the_guard_divides_the_step_of_each_layer(model, inner):
  """After a jump of the inputs, by the formula; before it, by 1."""
  shape = (64, 5) if isinstance(model, problems.MLP) else (64, 6, 6, 2)
  params, (x, y) = problems.make(model, shape)
  grads, stats = problems.grads_and_stats(model, params, (x, y))
  _, jumped = problems.grads_and_stats(model, params, (5 + x, y))
  tx = guarded(inner)
  plain = (
    bnp_optax.scale_by_bnp(debias=True) if inner is None else bnp_optax.bnp(inner, debias=True)
  )
  (first, state), (expected, plain_state) = (update(t, params, grads, stats) for t in (tx, plain))
  chex.assert_trees_all_equal(first, expected)
  actual, state = update(tx, params, grads, jumped, state)
  expected, plain_state = update(plain, params, grads, jumped, plain_state)
  running = state if inner is None else state.statistics
  factors = []
  for name in params:
    kernel = params[name]["kernel"]
    mu, sigma2 = (
      np.asarray(x[name]["kernel"], np.float64)
      for x in (running.input_mean, running.input_variance)
    )
    batch = jumped[name]["layer_statistics"]
    factor = 1.0
    if "bias" in params[name]:
      sigma2 = sigma2 + 1e-2 * sigma2.max() + 1e-4
      window, n = np.prod(kernel.shape[:-2]), np.prod(kernel.shape[:-1])
      lag2 = window * np.sum((np.asarray(batch.mean, np.float64) - mu) ** 2 / sigma2)
      factor = max(1, (1 + lag2) / (1 + 2 * n / float(batch.rows)))
    factors.append(factor)
    for leaf in params[name]:
      np.testing.assert_allclose(
        actual[name][leaf] * factor, expected[name][leaf], rtol=2e-5, atol=1e-7
      )
  assert max(factors) > 1.5


def test_the_guard_leaves_the_coordinates_alone(problem):
  """An inner optimizer that reads the parameters gets the same z with and without it."""
  params, grads, stats = problem
  far = jax.tree.map(lambda x: x, stats)
  far["first"]["layer_statistics"] = dataclasses.replace(
    stats["first"]["layer_statistics"], total=100 * stats["first"]["layer_statistics"].total
  )
  read = optax.GradientTransformation(lambda p: optax.tree.zeros_like(p), lambda u, s, p: (p, p))
  _, state = update(guarded(read), params, grads, stats)
  _, plain = update(bnp_optax.bnp(read, debias=True), params, grads, stats)
  _, state = update(guarded(read), params, grads, far, state)
  _, plain = update(bnp_optax.bnp(read, debias=True), params, grads, far, plain)
  chex.assert_trees_all_equal(state.inner_state, plain.inner_state)


@pytest.mark.parametrize("field", ["total", "within"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_statistics_that_are_not_finite_do_not_reach_the_step(problem, field, value):
  params, grads, stats = problem
  tx = guarded()
  _, state = update(tx, params, grads, stats)
  bad = jax.tree.map(lambda x: x, stats)
  statistics = stats["first"]["layer_statistics"]
  bad["first"]["layer_statistics"] = dataclasses.replace(
    statistics, **{field: jnp.full_like(getattr(statistics, field), value)}
  )
  updates, new = update(tx, params, grads, bad, state)
  chex.assert_tree_all_finite(updates)
  assert new.nonfinite_count == 1
  for name in ("input_mean", "input_variance", "input_weight"):
    chex.assert_trees_all_equal(getattr(new, name)["first"], getattr(state, name)["first"])


@pytest.mark.parametrize("c", [-1.0, np.nan, np.inf])
def test_the_guard_refuses_values_out_of_range(c):
  with pytest.raises(ValueError, match=r"lag_guard must be in \[0, inf\), got"):
    guarded(c=c)
