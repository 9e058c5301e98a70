"""Algorithms 2 and 3 through the public API, on real Flax gradients, against the paper's loops."""

import functools
import itertools
import math

import flax.linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax

import bnp_optax
from tests import oracle
from tests.compiling import AS_USERS_DO

STEPS = 20


@st.composite
def layers(draw):
  """Return a random Dense or Conv, with the shape of its inputs."""
  bias, features, outputs = draw(st.booleans()), draw(st.integers(1, 4)), draw(st.integers(1, 3))
  if draw(st.sampled_from(["dense", "conv", "conv"])) == "dense":
    time = draw(st.lists(st.integers(1, 3), max_size=2))
    return nn.Dense(outputs, use_bias=bias), (*time, features)
  dims = draw(st.integers(1, 3))
  per_axis = lambda elements: draw(st.lists(elements, min_size=dims, max_size=dims))
  kernel, dilation = per_axis(st.integers(1, 3)), per_axis(st.integers(1, 2))
  reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
  space = tuple(r + draw(st.integers(0, 3)) for r in reach)
  padding = draw(
    st.sampled_from(["SAME", "VALID", "CIRCULAR", "explicit"] + ["CAUSAL"] * (dims == 1))
  )
  if padding == "explicit":
    padding = [tuple(draw(st.lists(st.integers(0, 2), min_size=2, max_size=2))) for _ in kernel]
  layer = nn.Conv(
    outputs,
    kernel_size=tuple(kernel),
    strides=tuple(per_axis(st.integers(1, 2))),
    padding=padding,
    kernel_dilation=tuple(dilation),
    use_bias=bias,
  )
  return layer, (*space, features)


@st.composite
def problems(draw, mean):
  layer, shape = draw(layers())
  return {
    "layer": layer,
    "shape": (draw(st.integers(1, 5)), *shape),
    "mean": mean * draw(st.sampled_from([0.0, 0.1, 1.0])),
    "deviation": 10.0 ** draw(st.integers(-1, 1)),
    "decay": draw(st.sampled_from([0.9, 0.99])),
    "seed": draw(st.integers(0, 2**32 - 1)),
  }


def run(problem, dtype, steps=STEPS):
  """Yield gradients, updates, state, and the oracle's updates and statistics at each step."""
  layer, shape, decay = (
    problem["layer"].clone(param_dtype=dtype),
    problem["shape"],
    problem["decay"],
  )
  rng = np.random.default_rng(problem["seed"])
  offset = problem["mean"] * rng.choice([-1.0, 1.0], shape[-1])
  inputs = lambda: (problem["deviation"] * (offset + rng.normal(size=shape))).astype(dtype)
  params = jax.eval_shape(layer.init, jax.random.key(0), inputs())["params"]
  params = jax.tree.map(lambda p: rng.normal(size=p.shape).astype(dtype), params)
  tx = bnp_optax.scale_by_bnp(decay, debias=False)
  state = jax.jit(tx.init)(params)

  def loss_fn(params, x, target):
    with bnp_optax.linen.sow_statistics():
      y, aux = layer.apply({"params": params}, x, mutable=["intermediates"])
    return jnp.sum((y - target) ** 2) / shape[0], (y, aux["intermediates"])

  @functools.partial(jax.jit, compiler_options=AS_USERS_DO)
  def step(params, state, x, target):
    (_, (y, stats)), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, x, target)
    updates, state = tx.update(grads, state, params, stats=stats)
    return grads, updates, state, y

  y = jax.eval_shape(lambda x: layer.apply({"params": params}, x), inputs())
  mu, sigma2 = np.zeros(shape[-1]), np.ones(shape[-1])
  for _ in range(steps):
    x, target = inputs(), rng.normal(size=y.shape).astype(dtype)
    grads, updates, state, y = step(params, state, x, target)
    g_w, g_b = grads["kernel"], grads.get("bias")
    if g_w.ndim == 2 and x.ndim == 2:
      w, b, mu, sigma2 = oracle.algorithm_2(x, np.asarray(g_w).T, g_b, mu, sigma2, decay)
    else:
      positions = math.prod(y.shape[1:-1])
      w, b, mu, sigma2 = oracle.algorithm_3(x, positions, g_w, g_b, mu, sigma2, decay)
    yield grads, updates, state, (w.reshape(g_w.shape), b), (mu, sigma2)
    params = jax.tree.map(lambda p: rng.normal(size=p.shape).astype(dtype), params)


def relative_error(updates, expected):
  """Return |actual - expected| / |expected| in the 2-norm, over kernel and bias together."""
  w, b = expected
  actual = [np.ravel(updates["kernel"])] + ([] if b is None else [np.ravel(updates["bias"])])
  expected = np.concatenate([np.ravel(w)] + ([] if b is None else [np.ravel(b)]))
  error = np.linalg.norm(np.concatenate(actual) - expected)
  # A kernel whose inputs are all padding has a gradient of 0, which must stay exactly 0.
  return error / np.linalg.norm(expected) if error else 0.0


def check(problem, dtype, tolerance):
  for grads, updates, state, expected, (mu, sigma2) in run(problem, dtype):
    assert relative_error(updates, expected) <= tolerance
    # A mean may be 0 by chance: its error counts in deviations of the inputs about 0.
    root_mean_square = np.sqrt(sigma2 + mu**2)
    assert np.all(np.abs(state.input_mean["kernel"] - mu) <= tolerance * root_mean_square)
    np.testing.assert_allclose(state.input_variance["kernel"], sigma2, rtol=tolerance)
    assert jax.tree.map(lambda u: u.dtype, updates) == jax.tree.map(lambda g: g.dtype, grads)
    assert state.nonfinite_count == 0


@given(problem=problems(mean=30.0))
def test_equals_the_paper_in_float64(problem):
  with jax.enable_x64(True):
    check(problem, jnp.float64, 1e-12)


@given(problem=problems(mean=30.0))
def test_equals_the_paper_in_float32(problem):
  check(problem, jnp.float32, 1e-5)


@settings(max_examples=settings.default.max_examples // 2)
@given(problem=problems(mean=3.0))
def test_equals_the_explicit_matrix(problem):
  with jax.enable_x64(True):
    for grads, updates, _, _, (mu, sigma2) in run(problem, jnp.float64, steps=3):
      if "bias" not in grads:
        continue
      window = math.prod(grads["kernel"].shape[:-2])
      x = jax.ShapeDtypeStruct(problem["shape"], jnp.float64)
      layer = problem["layer"].clone(param_dtype=jnp.float64)
      y = jax.eval_shape(lambda x: layer.init_with_output(jax.random.key(0), x)[0], x)
      N, *positions, _ = y.shape
      q2 = max(window * x.shape[-1] / N, math.sqrt(math.prod(positions)))
      P = oracle.explicit_matrices(mu, sigma2, window, q2)
      column = lambda tree: np.vstack(
        [tree["bias"][None], np.reshape(tree["kernel"], (-1, tree["bias"].size))]
      )
      expected = P @ P.T @ column(grads)
      error = np.linalg.norm(column(updates) - expected) / np.linalg.norm(expected)
      assert error <= 1e-12


def test_proposition_7():
  """One SGD step of the BatchNorm network is one BNP step of the folded network."""
  with jax.enable_x64(True):
    rng = np.random.default_rng(7)
    sizes, N, rate = (6, 5, 4, 3), 8, 0.1  # N >= n, so that q is 1 as in the proposition.
    x, target = jnp.asarray(2 + rng.normal(size=(N, 6))), jnp.asarray(rng.normal(size=(N, 3)))
    weights = [jnp.asarray(rng.normal(size=s)) for s in itertools.pairwise(sizes)]
    biases = [jnp.asarray(rng.normal(size=s)) for s in sizes[1:]]
    theta = list(zip(weights, biases, strict=True))

    class Vanilla(nn.Module):
      @nn.compact
      def __call__(self, h):
        for size in sizes[1:-1]:
          h = nn.tanh(nn.Dense(size, param_dtype=jnp.float64)(h))
        return nn.Dense(sizes[-1], param_dtype=jnp.float64)(h)

    def batchnorm_loss(theta):
      """Eq. (2) with gamma = 1 and beta = 0, and no gradient through the statistics."""
      h, statistics = x, []
      for i, (w, b) in enumerate(theta):
        mu, sigma = (jax.lax.stop_gradient(f(h, axis=0)) for f in (jnp.mean, jnp.std))
        statistics.append((mu, sigma))
        a = ((h - mu[None]) / sigma[None]) @ w + b[None]
        h = nn.tanh(a) if i < len(theta) - 1 else a
      return jnp.sum((h - target) ** 2) / N, statistics

    (loss, statistics), gradients = jax.jit(jax.value_and_grad(batchnorm_loss, has_aux=True))(theta)
    fold = lambda theta: {
      f"Dense_{i}": {"kernel": w / sigma[:, None], "bias": b - (mu / sigma) @ w}
      for i, ((w, b), (mu, sigma)) in enumerate(zip(theta, statistics, strict=True))
    }

    def vanilla_loss(params):
      with bnp_optax.linen.sow_statistics():
        y, aux = Vanilla().apply({"params": params}, x, mutable=["intermediates"])
      return jnp.sum((y - target) ** 2) / N, aux["intermediates"]

    params = fold(theta)
    tx = optax.chain(bnp_optax.scale_by_bnp(0.0, 0.0, 0.0, debias=False), optax.sgd(rate))
    (folded_loss, stats), grads = jax.jit(jax.value_and_grad(vanilla_loss, has_aux=True))(params)
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params, stats=stats)

    np.testing.assert_allclose(folded_loss, loss, rtol=1e-13)
    expected = fold(jax.tree.map(lambda p, g: p - rate * g, theta, gradients))
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12),
      optax.apply_updates(params, updates),
      expected,
    )
