"""Every statement of the paper as a test. docs/theory.md lists their conditions."""

import itertools

import chex
import flax.linen as nn
from hypothesis import assume, given
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bnp_optax
from bnp_optax import _preconditioner, conditioning
from bnp_optax._statistics import layer_statistics
from tests import problems

pytestmark = pytest.mark.usefixtures("x64")

seeds = st.integers(0, 2**32 - 1)
kappa = lambda matrix: float(conditioning.condition_number(matrix))


def relu_network(theta, x):
  """Evaluate two hidden units, [W, b, a] each; the output is invariant under their scaling."""
  w, b, a = theta[:, :2], theta[:, 2], theta[:, 3]
  return jnp.maximum(x @ w.T + b[None], 0) @ a


@jax.jit
def relu_hessian(theta, x, target):
  loss = lambda t: jnp.mean((relu_network(t.reshape(theta.shape), x) - target) ** 2) / 2
  return jax.hessian(loss)(theta.ravel())


@jax.jit
def relu_descent(theta, x, target, rate):
  loss = lambda theta: jnp.mean((relu_network(theta, x) - target) ** 2) / 2
  step = lambda theta, _: (theta - rate * jax.grad(loss)(theta), theta)
  return jax.lax.scan(step, theta, length=80)[1]


def closest_minimizer(theta, minimizer):
  """Return the point of the scale-invariant manifold [t w, t b, a / t] that is nearest to theta."""
  w, a, w_0, a_0 = theta[:, :3], theta[:, 3], minimizer[:, :3], minimizer[:, 3]
  t = np.ones(len(theta))
  for _ in range(20):
    slope = -np.sum(w_0 * (w - t[:, None] * w_0), 1) + (a - a_0 / t) * a_0 / t**2
    curvature = np.sum(w_0**2, 1) + a_0**2 / t**4 - 2 * (a - a_0 / t) * a_0 / t**3
    t = t - slope / curvature
  return np.column_stack([t[:, None] * w_0, a_0 / t])


@given(seed=seeds)
def test_theorem_1(seed):
  """Gradient descent contracts at the rate of kappa*, which does not count the null space."""
  rng = np.random.default_rng(seed)
  minimizer = np.column_stack(
    [rng.normal(size=(2, 2)), rng.normal(size=(2, 1)), rng.normal(size=2)]
  )
  x = rng.normal(size=(400, 2))
  # The loss is smooth near the minimizer only if no example lies on a kink of a unit.
  x = x[np.all(np.abs(x @ minimizer[:, :2].T + minimizer[:, 2]) > 0.05, axis=1)][:64]
  target = relu_network(minimizer, x)
  hessian = np.asarray(relu_hessian(minimizer, x, target))
  tangent = np.zeros((8, 2))
  for unit in range(2):
    tangent[4 * unit : 4 * unit + 4, unit] = [*minimizer[unit, :3], -minimizer[unit, 3]]
  assert np.abs(hessian @ tangent).max() <= 1e-12 * np.abs(hessian).max()

  eigenvalues, vectors = np.linalg.eigh(hessian)
  # The theorem's assumption: the null space is the tangent space and no more.
  assume(eigenvalues[2] > 1e-3 * eigenvalues[-1])
  rate = 2 / (eigenvalues[2] + eigenvalues[-1])
  kappa_star = float(conditioning.condition_number(hessian, threshold=1e-9))
  np.testing.assert_allclose(kappa_star, eigenvalues[-1] / eigenvalues[2], rtol=1e-9)
  r = (kappa_star - 1) / (kappa_star + 1)

  # Off the manifold in all directions, and most in those that contract slowest.
  offset = rng.normal(size=8) + 10 * vectors[:, 2] + 10 * vectors[:, -1]
  path = np.asarray(relu_descent(minimizer + 1e-6 * offset.reshape(2, 4), x, target, rate))
  distance = [np.linalg.norm(theta - closest_minimizer(theta, minimizer)) for theta in path]
  ratios = np.array(distance[1:]) / distance[:-1]
  assert np.all(ratios <= r + 1e-2)
  # And no faster: at the best rate both ends of the spectrum contract by r.
  assert np.all(ratios[-20:] >= r - 1e-2)


@jax.jit
def curvatures(params, batch):
  """Return the Hessian, S, H-hat, P and the Hessian in z of one unit of both layers."""
  x, labels = batch
  model = problems.MLP(jnp.float64)

  def loss_fn(params):
    logits = model.apply({"params": params}, x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

  out = []
  for name, unit in (("first", 2), ("second", 1)):
    path = (name, "kernel")
    H = conditioning.hidden_matrix(model, {"params": params}, x, layer=path)[0]
    hidden = H[:, 1:]
    U, D = conditioning.preconditioner(
      *(f(hidden, axis=0) for f in (jnp.mean, jnp.var)),
      params[name]["kernel"].shape,
      eps_relative=0,
      eps_absolute=0,
    )
    P = (U @ D)[0]

    def loss_of_z(z):
      theta = P @ z
      layer = params[name]
      layer = {
        "bias": layer["bias"].at[unit].set(theta[0]),
        "kernel": layer["kernel"].at[:, unit].set(theta[1:]),
      }
      return loss_fn(params | {name: layer})

    layer = params[name]
    theta = jnp.concatenate([layer["bias"][unit][None], layer["kernel"][:, unit]])
    out.append(
      (
        conditioning.unit_hessian(loss_fn, params, path, unit),
        conditioning.unit_curvature(loss_fn, params, path, unit),
        H,
        P,
        jax.hessian(loss_of_z)(jnp.linalg.solve(P, theta)),
      )
    )
  return out, jax.nn.softmax(model.apply({"params": params}, x))[:, 1]


@pytest.mark.slow
@given(seed=seeds, mean=st.sampled_from([0.0, 1.0, 30.0]))
def test_proposition_2_and_theorem_3(seed, mean):
  """The Hessian of a unit is H^T S H with a diagonal S; in z it is G^T S G with normalized G."""
  rng, N = np.random.default_rng(seed), 9
  params = {
    name: {"kernel": rng.normal(size=(n, m)) / (1 + mean), "bias": rng.normal(size=m)}
    for name, n, m in (("first", 5, 4), ("second", 4, 3))
  }
  batch = mean + rng.normal(size=(N, 5)), rng.integers(0, 3, N)
  results, p = curvatures(params, batch)
  for hessian, S, H, P, in_z in (map(np.asarray, x) for x in results):
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-11 * np.abs(b).max())
    assert np.count_nonzero(S) == np.count_nonzero(np.diag(S)) > 0
    close(hessian, H.T @ S @ H)
    G = H @ P
    np.testing.assert_allclose(G[:, 1:].mean(0), 0, atol=1e-12 * (1 + mean) ** 2)
    np.testing.assert_allclose(G[:, 1:].std(0), 1, rtol=1e-12 * (1 + mean) ** 2)
    np.testing.assert_allclose(in_z, G.T @ S @ G, atol=1e-9 * (1 + mean) * np.abs(in_z).max())
  # Of the output layer, L'' is known: p (1 - p).
  np.testing.assert_allclose(np.diag(results[1][1]), p * (1 - p) / N, rtol=1e-11)


@pytest.mark.slow
@given(seed=seeds)
def test_equation_8(seed):
  """A step of gradient descent on z, mapped to theta, is the step of BNP."""
  rng, N, names = np.random.default_rng(seed), 9, ("first", "second")
  params = {
    name: {"kernel": rng.normal(size=(n, m)), "bias": rng.normal(size=m)}
    for name, n, m in (("first", 5, 4), ("second", 4, 3))
  }
  batch = 1 + rng.normal(size=(N, 5)), rng.normal(size=(N, 3))
  model, loss = problems.MLP(jnp.float64), problems.loss_fn(problems.MLP(jnp.float64))
  to_theta = lambda z, P: {
    name: {"bias": (P[name] @ z[name])[0], "kernel": (P[name] @ z[name])[1:]} for name in names
  }
  H = {
    name: conditioning.hidden_matrix(model, {"params": params}, batch[0], layer=(name, "kernel"))[0]
    for name in names
  }
  P = {name: np.matmul(*factors(np.asarray(H[name]))) for name in names}
  z = {
    name: np.linalg.solve(P[name], np.vstack([params[name]["bias"], params[name]["kernel"]]))
    for name in names
  }
  slope = jax.grad(lambda z: loss(to_theta(z, P), batch)[0])(z)
  grads, stats = problems.grads_and_stats(model, params, batch)
  # N >= n, so that q is 1, and the statistics are those of the batch.
  tx = bnp_optax.scale_by_bnp(0.0, 0.0, 0.0)
  updates, _ = tx.update(grads, tx.init(params), stats=stats)
  expected = to_theta(slope, P)
  chex.assert_trees_all_close(updates, expected, rtol=1e-9, atol=1e-11)


@st.composite
def hidden_matrices(draw):
  """Return H-hat of full column rank with features of many scales, means and correlations."""
  rng = np.random.default_rng(draw(seeds))
  n = draw(st.integers(2, 8))
  N = n + 1 + draw(st.integers(1, 30))
  mix = np.eye(n) + draw(st.sampled_from([0.0, 1.0])) * rng.normal(size=(n, n))
  h = rng.normal(size=(N, n)) @ mix * 10 ** rng.uniform(-2, 2, n)
  h = h + draw(st.sampled_from([0.0, 0.1, 10.0])) * rng.normal(size=n)
  return np.column_stack([np.ones(N), h])


def factors(H):
  U, D = (np.eye(H.shape[1]) for _ in range(2))
  U[0, 1:] = -H[:, 1:].mean(0)
  D[1:, 1:] = np.diag(1 / H[:, 1:].std(0))
  return U, D


@given(H=hidden_matrices(), seed=seeds)
def test_theorem_4(H, seed):
  U, D = factors(H)
  assert kappa(H @ U) <= kappa(H) * (1 + 1e-9)
  # Strict, where the mean has a part along the principal component.
  mean = H[:, 1:].mean(0)
  principal = np.linalg.eigh(np.cov(H[:, 1:].T))[1][:, -1]
  if abs(mean @ principal) > 1e-3 * H[:, 1:].std(0).max():
    assert kappa(H @ U) < kappa(H) * (1 - 1e-12)
  # Van der Sluis' bound, against the best of many other scalings, those near D among them.
  rng, n = np.random.default_rng(seed), H.shape[1] - 1
  scales = [np.ones(n + 1), np.diag(D)]
  scales += [np.diag(D) * np.exp(rng.normal(size=n + 1) * s) for s in (0.1, 0.3, 1.0) * 10]
  best = min(kappa(H @ U * scale) for scale in scales)
  assert kappa(H @ U @ D) <= np.sqrt(n + 1) * best * (1 + 1e-9)
  assert kappa(H @ U) <= kappa(H @ U @ D) * kappa(D) * (1 + 1e-9)


def test_theorem_4_is_an_equality_for_a_mean_of_zero():
  H = np.column_stack([np.ones(4), [1, 1, -1, -1], [2, -2, 2, -2]])
  assert kappa(H @ factors(H)[0]) == kappa(H)


def test_theorem_4_fails_for_fewer_examples_than_inputs():
  """Its assumption of full column rank is needed: centring may worsen a wide H-hat at will."""
  rng = np.random.default_rng(0)
  H = np.column_stack([np.ones(4), 100 * np.eye(4), 0.01 * rng.normal(size=(4, 4))])
  U, _ = factors(H)
  assert kappa(H) < 1.01
  assert kappa(H @ U) > 49  # 100 / sqrt(4): the rows of H U have e alone at this scale.


@pytest.mark.slow
@pytest.mark.parametrize(("decay", "rows"), [(0.9, 1), (0.99, 1), (0.99, 4)])
def test_the_noise_of_a_running_mean(decay, rows):
  """The running mean of independent rows is off by n delta^2 = n (1 - decay) / (2 rows)."""
  n, params = 2000, {"kernel": jnp.zeros((2000, 1)), "bias": jnp.zeros(1)}
  tx = bnp_optax.scale_by_bnp(decay=decay)

  def step(state, key):
    h = jax.random.normal(key, (rows, n))
    stats = {"inputs": layer_statistics(h, examples=rows, rows=rows)}
    return tx.update(params, state, stats=stats)[1], None

  keys = jax.random.split(jax.random.key(0), int(10 / (1 - decay)))
  state, _ = jax.lax.scan(step, tx.init(params), keys)
  mean = np.asarray(state.input_mean["kernel"], np.float64)
  expected = n * (1 - decay) / (1 + decay) / rows
  np.testing.assert_allclose(np.sum(mean**2), expected, rtol=0.15)
  np.testing.assert_allclose(expected, n * (1 - decay) / (2 * rows), rtol=0.06)


def test_theorem_4_fails_for_a_mean_that_lags():
  """It is about the batch's own mean; a running mean far behind worsens a centred H-hat."""
  rng = np.random.default_rng(0)
  H = np.column_stack([np.ones(2000), rng.normal(size=(2000, 64))])
  U = np.eye(65)
  U[0, 1:] = -1.0
  assert kappa(H) < 1.5
  assert kappa(H @ U) > 50
  # As the diagnostics predict it: 1 + n delta^2, or up to 1 more.
  largest = np.linalg.norm(H @ U, 2) ** 2 / 2000
  assert 65 <= largest <= 66 * 1.05


@given(seed=seeds, n=st.integers(1, 8), extra=st.integers(0, 20))
def test_lemma_a1(seed, n, extra):
  """Columns of one norm are within sqrt(n) of the best scaling."""
  rng = np.random.default_rng(seed)
  A = rng.normal(size=(n + extra, n)) * 10 ** rng.uniform(-3, 3, n)
  assume(np.linalg.matrix_rank(A / np.linalg.norm(A, axis=0)) == n)
  D = 1 / np.linalg.norm(A, axis=0)
  best = min(kappa(A * D * np.exp(s * rng.normal(size=n))) for s in (0.0, 0.1, 0.3, 1.0) * 10)
  assert kappa(A * D) <= np.sqrt(n) * best * (1 + 1e-9)


ENTRIES = {
  "normal": lambda rng, shape: rng.normal(size=shape),
  "uniform": lambda rng, shape: rng.uniform(-np.sqrt(3), np.sqrt(3), shape),
  "signs": lambda rng, shape: rng.choice([-1.0, 1.0], shape),
  "Laplace": lambda rng, shape: rng.laplace(size=shape) / np.sqrt(2),
}
SIZES = tuple(itertools.product((3, 30, 300), repeat=2))


def sparse(rng, shape):
  """Return a matrix of unit variance with about one entry that is not 0."""
  p = 1 / (shape[0] * shape[1])
  return rng.choice([-1.0, 1.0], shape) * (rng.random(shape) < p) / np.sqrt(p)


@pytest.mark.parametrize("entries", ENTRIES)
def test_proposition_5(entries):
  """The norm of G-hat / q stays below 2.2 sqrt(N), measured over sizes and batch sizes."""
  rng = np.random.default_rng(0)
  for N, n in SIZES:
    q = np.sqrt(max(n / N, 1))
    G = ENTRIES[entries](rng, (10, N, n))
    G = np.concatenate([np.ones((10, N, 1)), G], axis=2)
    assert np.linalg.norm(G, 2, axis=(1, 2)).mean() <= 2.2 * q * np.sqrt(N)


def test_proposition_5_fails_without_a_bound_on_the_fourth_moment():
  """Zero mean and unit variance are not enough: no constant serves entries that are rarely large.

  The proof takes the expectation of the largest row for that of one row.
  """
  rng = np.random.default_rng(0)
  # The norm of a matrix is at least its largest entry.
  ratio = {
    n: np.mean([np.abs(sparse(rng, (n, n))).max() for _ in range(30)]) / np.sqrt(n)
    for n in (10, 100, 1000)
  }
  assert ratio[100] > 2 * ratio[10]
  assert ratio[1000] > 2 * ratio[100]


@pytest.mark.parametrize("entries", [*ENTRIES, "sparse"])
def test_lemma_a2(entries):
  """E |G|^k is within C^k of the largest rows and columns, C = 2, for sparse entries too."""
  rng, draw = np.random.default_rng(0), (ENTRIES | {"sparse": sparse})[entries]
  for shape in ((3, 3), (30, 30), (10, 300), (300, 10)):
    G = np.stack([draw(rng, shape) for _ in range(30)])
    norm = np.linalg.norm(G, 2, axis=(1, 2))
    rows, columns = (np.linalg.norm(G, axis=axis).max(axis=1) for axis in (2, 1))
    for k in (1, 2, int(2 * np.log(max(shape)))):
      assert np.mean(norm**k) <= 2**k * (np.mean(rows**k) + np.mean(columns**k))


def test_proposition_6():
  """6 operations a weight, as in the paper; 5 an input, for its 4 and a selection."""

  def step(h, g_w, g_b, mu, sigma2):
    s = layer_statistics(h, examples=h.shape[0], rows=h.shape[0])
    whole = lambda x: x.reshape(1, 1, -1)
    rho, one = jnp.asarray(0.01), jnp.ones((1, 1, 1))
    mu, sigma2 = _preconditioner.update_statistics(
      mu, sigma2, whole(s.mean), whole(s.variance), whole(s.rows), rho
    )
    p = _preconditioner.make_preconditioner(mu, sigma2, 1, one * len(h), one, rho, rho)
    return _preconditioner.precondition(p, g_w[None, None], g_b[None]), mu, sigma2

  def operations(N, n, m):
    shapes = (N, n), (n, m), (m,), (1, 1, n), (1, 1, n)
    lowered = jax.jit(step).lower(*(jax.ShapeDtypeStruct(s, jnp.float64) for s in shapes))
    return lowered.cost_analysis()["flops"]

  mixed = lambda f: (f(2, 2) - f(1, 2) - f(2, 1) + f(1, 1)) / 64**2
  assert mixed(lambda i, j: operations(64, 64 * i, 64 * j)) == pytest.approx(6, abs=0.05)
  assert mixed(lambda i, j: operations(64 * i, 64 * j, 64)) == pytest.approx(5, abs=0.1)
  paper = 4 * 100 * 60 + 6 * 100 * 100 + 2 * 100 + 8 * 100
  assert operations(60, 100, 100) == pytest.approx(1.10 * paper, rel=0.02)


def conv_output_and_matrix(layer, shape, seed):
  rng = np.random.default_rng(seed)
  layer = layer.clone(param_dtype=jnp.float64)
  x = jnp.asarray(rng.normal(1, 1, shape))
  params = jax.eval_shape(layer.init, jax.random.key(0), x)["params"]
  params = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape)), params)
  H = conditioning.hidden_matrix(layer, {"params": params}, x)
  return x, params, np.asarray(layer.apply({"params": params}, x)), np.asarray(H)


@pytest.mark.parametrize(
  ("layer", "shape"),
  [
    (nn.Conv(2, (3, 3)), (2, 4, 3, 2)),
    (nn.Conv(2, (2,), strides=2, kernel_dilation=2, padding="VALID"), (3, 7, 2)),
    (nn.Conv(4, (2, 1, 2), feature_group_count=2), (2, 3, 2, 2, 4)),
  ],
)
def test_lemma_8(layer, shape):
  """A convolution's outputs are H-hat times its bias and weights, one output after another."""
  _, params, y, H = conv_output_and_matrix(layer, shape, 0)
  for unit in range(y.shape[-1]):
    group = unit * len(H) // y.shape[-1]
    w_hat = np.concatenate([params["bias"][unit][None], np.ravel(params["kernel"][..., unit])])
    np.testing.assert_allclose(y[..., unit].ravel(), H[group] @ w_hat, rtol=1e-12, atol=1e-13)


def test_lemma_8_as_printed():
  """The matrix of the example in section 4: a map of 4 by 3 under a kernel of 3 by 3."""
  h = np.add.outer(10 * np.arange(1, 5), np.arange(1, 4)).astype(float)  # h_ab is 10 a + b.
  rows = [
    ". . . . 11 21 . 12 22",
    ". . . 11 21 31 12 22 32",
    ". . . 21 31 41 22 32 42",
    ". . . 31 41 . 32 42 .",
    ". 11 21 . 12 22 . 13 23",
    "11 21 31 12 22 32 13 23 33",
    "21 31 41 22 32 42 23 33 43",
    "31 41 . 32 42 . 33 43 .",
    ". 12 22 . 13 23 . . .",
    "12 22 32 13 23 33 . . .",
    "22 32 42 23 33 43 . . .",
    "32 42 . 33 43 . . . .",
  ]
  printed = np.array([[0.0 if x == "." else float(x) for x in row.split()] for row in rows])
  layer = nn.Conv(1, (3, 3), param_dtype=jnp.float64)
  params = {"kernel": jnp.zeros((3, 3, 1, 1)), "bias": jnp.zeros(1)}
  H = np.asarray(conditioning.hidden_matrix(layer, {"params": params}, h[None, :, :, None]))[
    0, :, 1:
  ]
  # vec() counts the first index first; JAX the last.
  order = lambda *shape: np.arange(np.prod(shape)).reshape(shape).T.ravel()
  np.testing.assert_array_equal(H[order(4, 3)][:, order(3, 3)], printed)


def test_proposition_9():
  """The Hessian of a convolution's unit is H^T S H, where S has one block for each example."""
  layer, N, positions = nn.Conv(2, (2, 2), param_dtype=jnp.float64), 3, 6
  x, params, _, H = conv_output_and_matrix(layer, (N, 2, 3, 2), 1)

  def loss_fn(params):
    a = layer.apply({"params": params}, x).reshape(N, -1)
    return jnp.mean(jnp.log(jnp.sum(jnp.exp(a), axis=1)) + jnp.prod(a[:, :3], axis=1))

  hessian, S = jax.jit(
    lambda params: (
      conditioning.unit_hessian(loss_fn, params, unit=1),
      conditioning.unit_curvature(loss_fn, params, unit=1),
    )
  )(params)
  np.testing.assert_allclose(hessian, H[0].T @ S @ H[0], atol=1e-12 * np.abs(hessian).max())
  block = np.kron(np.eye(N), np.ones((positions, positions))).astype(bool)
  assert np.all(np.asarray(S)[~block] == 0)
  assert np.all(np.asarray(S)[block] != 0)


@given(
  seed=seeds,
  r=st.integers(1, 12),
  s=st.integers(1, 12),
  half=st.integers(0, 2),
  N=st.integers(1, 3),
)
def test_proposition_10(seed, r, s, half, N):
  """The mean of a kernel entry's submatrix is close to that of the map (eqs. 19 and 21)."""
  k = 2 * half + 1
  assume(half <= min(r, s))
  h = np.random.default_rng(seed).normal(1, 1, (N, r, s))
  padded = np.pad(h, ((0, 0), (half, half), (half, half)))
  bound = (k - 1) * (1 / (2 * r) + 1 / (2 * s) - (k - 1) / (4 * r * s)) * np.abs(h).max()
  for t, a in np.ndindex(k, k):
    error = abs(padded[:, t : t + r, a : a + s].mean() - h.mean())
    assert error <= bound * (1 + 1e-12)


def test_proposition_10_is_sharp():
  """For a constant map and a corner of the kernel it is an equality; H's columns are eq. 19."""
  r, s, k = 5, 4, 3
  layer = nn.Conv(1, (k, k), param_dtype=jnp.float64)
  params = {"kernel": jnp.zeros((k, k, 1, 1)), "bias": jnp.zeros(1)}
  H = conditioning.hidden_matrix(layer, {"params": params}, jnp.ones((1, r, s, 1)))
  error = abs(np.mean(H[0, :, 1:], axis=0)[0] - 1)
  np.testing.assert_allclose(error, (k - 1) * (1 / (2 * r) + 1 / (2 * s) - (k - 1) / (4 * r * s)))


@given(seed=seeds, m=st.integers(1, 12), n=st.integers(1, 8), rank=st.integers(1, 8))
def test_proposition_11(seed, m, n, rank):
  """kappa(H^T S H) <= kappa(H)^2 kappa(S) for positive definite S, for H of any rank."""
  rng = np.random.default_rng(seed)
  rank = min(rank, m, n)
  H = rng.normal(size=(m, rank)) @ rng.normal(size=(rank, n))
  Q = np.linalg.qr(rng.normal(size=(m, m)))[0]
  S = Q * 10 ** rng.uniform(-2, 2, m) @ Q.T
  number = lambda a: float(conditioning.condition_number(a, threshold=1e-11))
  assume(number(H) ** 2 * number(S) < 1e8)
  assert number(H.T @ S @ H) <= number(H) ** 2 * number(S) * (1 + 1e-6)


def test_proposition_11_fails_for_a_singular_curvature():
  """Examples without curvature, as those a ReLU unit is off for, leave H's other rows alone."""
  H = np.array([[1.0, 0.0], [1.0, 1e-3], [0.0, 1.0]])
  S = np.diag([1.0, 1.0, 0.0])
  assert kappa(H) ** 2 * kappa(S) < 3
  assert kappa(H.T @ S @ H) > 1e6
