"""The matrices of the theory, the survey of a model and the diagnostics of a training run."""

import dataclasses
import functools

from flax import nnx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bnp_optax
from bnp_optax import KernelLayout, conditioning
from bnp_optax.conditioning._spectrum import estimate_condition_number
from tests import problems

pytestmark = pytest.mark.usefixtures("x64")

F64 = {"param_dtype": jnp.float64}
N = 500


def random_params(model, x, seed=0):
  rng = np.random.default_rng(seed)
  shapes = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
  return jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape)), shapes)


@functools.partial(jax.jit, static_argnums=0)
def first_step(model, params, inputs, decay=0.99):
  """Return the updates of P P^T for gradients that equal the parameters, state and statistics."""
  with bnp_optax.linen.sow_statistics():
    _, aux = model.apply({"params": params}, inputs, mutable=["intermediates"])
  tx = bnp_optax.scale_by_bnp(decay, debias=False)
  return *tx.update(params, tx.init(params), stats=aux["intermediates"]), aux["intermediates"]


@jax.jit
def next_step(params, state, stats):
  return bnp_optax.scale_by_bnp(debias=False).update(params, state, stats=stats)[1]


diagnose = jax.jit(conditioning.diagnose)


def test_condition_number_counts_no_null_space():
  rng = np.random.default_rng(0)
  Q, R = (np.linalg.qr(rng.normal(size=(6, 6)))[0] for _ in range(2))
  A = Q[:, :4] * [8.0, 4.0, 2.0, 0.0] @ R[:4]
  np.testing.assert_allclose(conditioning.condition_number(A), 4, rtol=1e-12)
  np.testing.assert_allclose(conditioning.condition_number(np.stack([A, 3 * A.T])), 4, rtol=1e-12)
  np.testing.assert_allclose(conditioning.condition_number(A, threshold=0.3), 2, rtol=1e-12)


def test_condition_number_depends_on_the_precision_of_its_matrix():
  A = np.diag([1.0, 1e-9])
  np.testing.assert_allclose(conditioning.condition_number(A), 1e9)
  assert conditioning.condition_number(A.astype(np.float32)) == 1
  assert np.isnan(conditioning.condition_number(np.zeros((2, 2))))
  with pytest.raises(ValueError, match="1 of 4 entries of the matrix are not finite"):
    conditioning.condition_number([[1.0, np.nan], [0.0, 1.0]])


def with_singular_values(values, rows, seed):
  """Return a matrix of known singular values, by reflections of both sides."""
  rng, n = np.random.default_rng(seed), len(values)
  A = np.zeros((rows, n))
  A[np.arange(n), np.arange(n)] = values
  for _ in range(3):
    u, v = rng.normal(size=rows), rng.normal(size=n)
    A -= np.outer(u, 2 * (u @ A) / (u @ u))
    A -= np.outer(2 * (A @ v) / (v @ v), v)
  return A


SPECTRA = {
  "lognormal": lambda rng, n: np.exp(rng.normal(size=n)),
  "six decades": lambda rng, n: np.logspace(0, -6, n),
  # The hard case for Lanczos: eigenvalues crowd at both ends.
  "crowded": lambda rng, n: 10 + 9 * np.cos(np.pi * (np.arange(n) + 0.5) / n),
  "one apart": lambda rng, n: np.r_[1e4, rng.uniform(1, 2, n - 2), 1e-2],
}


@pytest.mark.slow
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize(("n", "rows"), [(400, 1000), (700, 700)])
def test_estimate_is_within_its_stated_error(spectrum, n, rows):
  for seed in range(3):
    values = SPECTRA[spectrum](np.random.default_rng(seed), n)
    A = with_singular_values(values, rows, seed)
    for matrix in (A, A.T):
      value, error = estimate_condition_number(matrix, 1e-12)
      exact = values.max() / values.min()
      assert 0 < error < 0.025
      assert value <= exact * (1 + 1e-9)
      assert exact <= value / (1 - error)


@pytest.mark.slow
def test_estimate_for_2048_inputs():
  values = SPECTRA["crowded"](None, 2048)
  value, error = estimate_condition_number(with_singular_values(values, 2049, 0), 1e-12)
  assert value <= values.max() / values.min() * (1 + 1e-9)
  assert values.max() / values.min() <= value / (1 - error)


def test_the_error_is_the_bound_of_kuczynski_and_wozniakowski():
  """Theirs is exceeded with probability 1.648 sqrt(n) exp(-sqrt(error) (2 k - 1)), k = 64 steps."""
  _, error = estimate_condition_number(np.diag(np.linspace(1, 2, 600)), 1e-12)
  probability = 1.648 * 600**0.5 * np.exp(-(error**0.5) * 127)
  np.testing.assert_allclose(probability, 1e-6, rtol=1e-9)


def test_estimate_is_exact_for_a_singular_matrix():
  values = np.r_[np.linspace(1, 3, 398), 0, 0]
  value, error = estimate_condition_number(with_singular_values(values, 500, 0), 1e-10)
  assert error == 0
  np.testing.assert_allclose(value, 3, rtol=1e-10)
  assert estimate_condition_number(np.diag([2.0, 1.0, 0.0]), 1e-10) == (2.0, 0.0)


class Scanned(nn.Module):
  """A layer called by a scan over time, with one kernel for all steps or one for each."""

  shared: bool
  told: bool = False

  @nn.compact
  def __call__(self, x):
    axes = ({"intermediates": 0} if self.told else {}) | ({} if self.shared else {"params": 0})
    options = {"variable_broadcast": "params"} if self.shared else {}
    block = nn.scan(
      Block, variable_axes=axes, split_rngs={"params": not self.shared}, length=2, **options
    )
    return block(name="block")(x, None)[0]


class Twice(nn.Module):
  """A layer called twice in one forward pass."""

  @nn.compact
  def __call__(self, x):
    dense = nn.Dense(3, name="dense", **F64)
    return dense(dense(x))


class Block(nn.Module):
  @nn.compact
  def __call__(self, x, _):
    return nn.Dense(3, name="dense", **F64)(x), None


@pytest.mark.slow
@pytest.mark.parametrize(
  ("layer", "shape"),
  [
    (nn.Dense(3, **F64), (4, 5, 2)),
    (nn.DenseGeneral((2, 2), axis=(-2, -1), **F64), (4, 3, 2)),
    (nn.ConvLocal(2, (2,), padding="VALID", **F64), (3, 4, 2)),
  ],
)
def test_outputs_are_the_hidden_matrix_times_the_unit(layer, shape):
  """Convolutions are in test_theory.py, Lemma 8."""
  x = jnp.asarray(np.random.default_rng(0).normal(size=shape))
  params = random_params(layer, x)
  H = conditioning.hidden_matrix(layer, {"params": params}, x)
  layout = bnp_optax.linen.layers(layer, x)[("kernel",)]
  w, b = layout.to_canonical(params["kernel"], params["bias"])
  w_hat = jnp.concatenate([b[:, None], w.reshape(len(w), -1, w.shape[-1])], axis=1)
  y = layer.apply({"params": params}, x)
  outputs = jnp.moveaxis(H @ w_hat, 0, 1).reshape(y.shape)
  np.testing.assert_allclose(outputs, y, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
  "model",
  [Twice(), *(Scanned(shared, told) for shared in (True, False) for told in (True, False))],
  ids=["twice", "shared, told", "shared", "stacked, told", "stacked"],
)
def test_hidden_matrix_of_repeated_calls(model):
  """Calls of one kernel are more rows; a kernel for each call is a stack."""
  shared, x = getattr(model, "shared", True), np.random.default_rng(0).normal(size=(4, 3))
  params = random_params(model, x)
  H = conditioning.hidden_matrix(model, {"params": params}, x)
  dense = params.get("block", params)["dense"]
  first = dense if shared else jax.tree.map(lambda p: p[0], dense)
  second = x @ first["kernel"] + first["bias"][None]
  one = lambda h: jnp.concatenate([jnp.ones((4, 1)), h], axis=1)
  steps = [one(x), one(second)]
  expected = jnp.concatenate(steps)[None] if shared else jnp.stack(steps)
  np.testing.assert_allclose(H, expected, rtol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize(
  ("strides", "padding", "dilation"), [(1, "SAME", 2), (2, "VALID", 1), (2, [(0, 1), 1], 2)]
)
def test_hidden_matrix_of_a_transposed_convolution(transpose, strides, padding, dilation):
  model = nn.ConvTranspose(
    2, (3, 2), (strides, 1), padding, dilation, transpose_kernel=transpose, **F64
  )
  x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 4, 3)))
  params = random_params(model, x)
  (H,) = conditioning.hidden_matrix(model, {"params": params}, x)
  kernel = jnp.swapaxes(params["kernel"], -1, -2) if transpose else params["kernel"]
  w = jnp.concatenate([params["bias"][None], kernel.reshape(-1, 2)])
  outputs = model.apply({"params": params}, x)
  np.testing.assert_allclose(H @ w, outputs.reshape(-1, 2), rtol=1e-11, atol=1e-12)
  # Its means and variances are those of equations (19) and (20).
  with bnp_optax.linen.sow_statistics(exact_windows=True):
    _, aux = model.apply({"params": params}, x, mutable=["intermediates"])
  stats = aux["intermediates"]["layer_statistics"]
  np.testing.assert_allclose(stats.mean, H[:, 1:].mean(0), rtol=1e-11, atol=1e-12)
  np.testing.assert_allclose(stats.variance, H[:, 1:].var(0), rtol=1e-11, atol=1e-12)


def test_errors_of_hidden_matrix():
  x = jnp.ones((2, 5, 3))
  layer = nn.ConvTranspose(2, (2,), padding="CIRCULAR", **F64)
  with pytest.raises(ValueError, match="does not support circular transposed conv"):
    conditioning.hidden_matrix(layer, {"params": random_params(layer, x)}, x)
  model = problems.MLP(jnp.float64)
  x = x[:, 0]
  variables = {"params": random_params(model, x)}
  with pytest.raises(ValueError, match=r"Several layers: give layer= one of .*'first', 'kernel'"):
    conditioning.hidden_matrix(model, variables, x)
  with pytest.raises(ValueError, match="Give a Linen module"):
    conditioning.hidden_matrix(lambda x: x, {}, x)


def test_the_largest_variance_is_that_of_all_entries_of_the_window():
  layout = dataclasses.replace(bnp_optax.KernelLayout.by_convention(3), exact_windows=True)
  variance = jnp.array([1.0, 4.0, 9.0, 16.0])
  factors = conditioning.preconditioner(
    0 * variance, variance, (2, 2, 3), layout, eps_relative=1.0, eps_absolute=0.0
  )
  np.testing.assert_allclose(jnp.diagonal(factors.D[0])[1:] ** -2, variance + 16, rtol=1e-6)


@pytest.mark.parametrize("bias", [True, False])
def test_preconditioner_is_the_one_that_the_optimizer_applies(bias):
  layer, x = (
    nn.Conv(2, (3,), use_bias=bias, **F64),
    np.random.default_rng(0).normal(2, 1, (4, 6, 2)),
  )
  x = jnp.asarray(x)
  params = random_params(layer, x)
  updates, state, _ = first_step(layer, params, x)
  mean, variance = state.input_mean["kernel"], state.input_variance["kernel"]
  U, D = conditioning.preconditioner(mean, variance, params["kernel"].shape, bias=bias)
  P = (U @ D)[0]
  q2 = max(3 * 2 / 4, np.sqrt(6))
  column = lambda tree: np.vstack(
    ([tree["bias"][None]] if bias else []) + [np.reshape(tree["kernel"], (-1, 2))]
  )
  np.testing.assert_allclose(column(updates), P @ P.T @ column(params) / q2, rtol=1e-12)


def test_figure_8():
  """kappa of a unit's Hessian, beyond what its own eigenvalues resolve, and of D."""
  model, N = nn.Dense(4, **F64), 6
  x = jnp.asarray(np.random.default_rng(0).normal(3, np.logspace(0, -2, 9), (N, 9)))
  labels = jnp.arange(N) % 4
  params = random_params(model, x)

  def loss_fn(params):
    logits = model.apply({"params": params}, x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

  @jax.jit
  def matrices(params, x):
    mean, variance = jnp.mean(x, axis=0), jnp.var(x, axis=0)
    return (
      conditioning.unit_hessian(loss_fn, params),
      jnp.diag(conditioning.unit_curvature(loss_fn, params)),
      conditioning.hidden_matrix(model, {"params": params}, x)[0],
      *conditioning.preconditioner(mean, variance, (9, 4), eps_relative=0, eps_absolute=0),
    )

  hessian, S, H, U, D = map(np.asarray, matrices(params, x))
  P = (U @ D)[0]
  for matrix, factor in ((hessian, H), (P.T @ hessian @ P, H @ P)):
    # The Hessian of fewer examples than inputs is singular; its factor has no null space to miss.
    eigenvalues = np.linalg.eigvalsh(matrix)[-N:]
    kappa = conditioning.condition_number(np.sqrt(S)[:, None] * factor) ** 2
    np.testing.assert_allclose(kappa, eigenvalues[-1] / eigenvalues[0], rtol=1e-6)
  deviation = np.append(np.std(x, 0), 1)
  np.testing.assert_allclose(
    conditioning.condition_number(D[0]), deviation.max() / deviation.min(), rtol=1e-12
  )


def test_errors_of_unit_curvature():
  layer, x = nn.Dense(2, **F64), jnp.ones((3, 2))
  params = random_params(layer, x)
  with pytest.raises(ValueError, match="called 2 times by the loss instead of once"):
    conditioning.unit_curvature(
      lambda p: jnp.sum(layer.apply({"params": p}, layer.apply({"params": p}, x))), params
    )
  with pytest.raises(ValueError, match="called 0 times"):
    conditioning.unit_curvature(lambda p: jnp.sum(x @ p["kernel"]), params)


@pytest.mark.slow
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.checkpoint])
@pytest.mark.parametrize(
  ("over", "times"),
  [
    (lambda f, x: f(x), 1),
    (lambda f, x: jax.vmap(f)(x), 6),
    (lambda f, x: jax.lax.map(f, x.reshape(2, 3, 4)), 2),
    (lambda f, x: jax.vmap(jax.vmap(f))(x.reshape(2, 3, 4)), 6),
  ],
)
def test_the_curvature_of_calls_that_are_mapped_is_refused(over, times, wrap):
  layer, x = nn.Dense(3, **F64), jnp.asarray(np.random.default_rng(0).normal(size=(6, 4)))
  params = random_params(layer, x)

  def loss_fn(params):
    return jnp.mean(jnp.sin(over(wrap(lambda x: layer.apply({"params": params}, x)), x)))

  if times == 1:
    H = conditioning.hidden_matrix(layer, {"params": params}, x)[0]
    S = conditioning.unit_curvature(loss_fn, params, unit=1)
    np.testing.assert_allclose(H.T @ S @ H, conditioning.unit_hessian(loss_fn, params, unit=1))
  else:
    with pytest.raises(ValueError, match=f"called {times} times by the loss instead of once"):
      conditioning.unit_curvature(loss_fn, params, unit=1)


class Gated(nn.Module):
  """A module of two products, of which only the second makes its outputs."""

  @nn.compact
  def __call__(self, x):
    gate = self.param("gate", nn.initializers.normal(), (2, 8))
    down = self.param("down", nn.initializers.normal(), (8, 2))
    bnp_optax.linen.report(self, "gate", x, "...d,df->...f")
    h = nn.gelu(x @ gate)
    bnp_optax.linen.report(self, "down", h, "...f,fd->...d")
    return h @ down


@pytest.mark.parametrize(
  "model", [Gated(), nn.Einsum((2, 4), "btd,df->bft", use_bias=False, **F64)]
)
def test_the_curvature_of_other_layers_is_refused(model):
  x = jnp.ones((3, 4, 2))
  params = model.init(jax.random.key(0), x)["params"]
  layers = bnp_optax.linen.layers(model, x)
  with pytest.raises(ValueError, match=r"called 0 times .* must be a Dense, DenseGeneral, Conv or"):
    conditioning.unit_curvature(
      lambda params: jnp.mean(model.apply({"params": params}, x) ** 2),
      *(params, next(iter(layers))),
      layers=layers,
    )


class Narrow(nn.Module):
  """A grouped convolution without bias, a circular transposed one, and a head."""

  @nn.compact
  def __call__(self, x):
    x = nn.relu(nn.Conv(4, (2,), feature_group_count=2, use_bias=False, name="grouped", **F64)(x))
    x = nn.ConvTranspose(3, (2,), padding="CIRCULAR", name="transposed", **F64)(x)
    return nn.Dense(2, name="head", **F64)(x.mean(axis=1))


@pytest.mark.slow
def test_survey_agrees_with_the_explicit_matrices():
  model, x = Narrow(), jnp.asarray(np.random.default_rng(0).normal(1, [1, 10, 0.1, 1], (6, 5, 4)))
  variables = {"params": random_params(model, x)}
  result = conditioning.survey(model, variables, x)
  grouped, head, transposed = result.layers
  assert np.isnan(transposed.before)
  assert "not measured" in str(result).splitlines()[-1]

  H = np.asarray(conditioning.hidden_matrix(model, variables, x, layer=("grouped", "kernel")))
  before = conditioning.condition_number(H)
  sigma2 = np.mean(np.asarray(x) ** 2, (0, 1)).reshape(2, 2)
  sigma = np.sqrt(sigma2 + 0.01 * sigma2.max(1, keepdims=True) + 1e-4)
  after = conditioning.condition_number(H / np.tile(sigma, 2)[:, None])
  np.testing.assert_allclose(grouped.before, before.max(), rtol=1e-9)
  np.testing.assert_allclose(grouped.after, after[before.argmax()], rtol=1e-9)

  H = conditioning.hidden_matrix(model, variables, x, layer=("head", "kernel"))
  h = np.asarray(H)[0, :, 1:]
  mean, variance = (jnp.asarray(f(h, 0)) for f in (np.mean, np.var))
  U, D = conditioning.preconditioner(mean, variance, (3, 2))
  np.testing.assert_allclose(head.before, conditioning.condition_number(H[0]), rtol=1e-9)
  np.testing.assert_allclose(
    head.after, conditioning.condition_number(H[0] @ (U @ D)[0]), rtol=1e-9
  )
  assert (head.rows, head.inputs, head.error) == (6, 3, 0.0)


@pytest.mark.slow
def test_survey_states_the_error_of_the_estimate_with_bnp():
  """H is singular to within float32, and therefore exact; H P is regular, and an estimate."""
  model, x = nn.Dense(1), jnp.asarray(normal(900, 400, mean=1e4), jnp.float32)
  (layer,) = conditioning.survey(model, model.init(jax.random.key(0), x), x).layers
  assert layer.before > 1e5
  assert layer.after < 20
  assert 0 < layer.error < 0.025


def test_survey_names_what_is_not_covered():
  table = bnp_optax.linen.layers(
    nn.Conv(2, (2,), mask=jnp.ones((2, 3, 2)), **F64), jnp.ones((1, 5, 3))
  )
  line = conditioning.LayerSurvey("conv", 9, 4, 20.0, 2.0, 0.01)
  shown = str(conditioning.Survey((line,), table)).splitlines()
  assert shown[2] == "conv      9       4        20           2         100x  1.0 %"
  assert shown[3].startswith("kernel: its kernel is masked")


@pytest.mark.slow
def test_survey_of_layers_that_count_examples_differently():
  class Tokens(nn.Module):
    @nn.compact
    def __call__(self, x):
      h = nn.Dense(3, name="hidden", **F64)(x.reshape(-1, x.shape[-1]))
      return nn.Dense(2, name="head", **F64)(h.reshape(*x.shape[:2], 3).mean(axis=1))

  class NnxTokens(nnx.Module):
    def __init__(self, rngs):
      self.hidden = nnx.Linear(2, 3, rngs=rngs, **F64)
      self.head = nnx.Linear(3, 2, rngs=rngs, **F64)

    def __call__(self, x):
      h = self.hidden(x.reshape(-1, x.shape[-1]))
      return self.head(h.reshape(*x.shape[:2], 3).mean(axis=1))

  x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 5, 2)))
  for model in ((Tokens(), Tokens().init(jax.random.key(0), x)), nnx.split(NnxTokens(nnx.Rngs(0)))):
    assert {x.name: x.rows for x in conditioning.survey(*model, x).layers} == {
      "hidden": 40,
      "head": 8,
    }


def test_survey_of_an_nnx_model():
  x = jnp.asarray(np.random.default_rng(0).normal(2, [1, 3], (8, 2)))
  model = nnx.Linear(2, 3, rngs=nnx.Rngs(0), **F64)
  (twin,) = conditioning.survey(
    nn.Dense(3, **F64), {"params": {"kernel": model.kernel[...], "bias": model.bias[...]}}, x
  ).layers
  (layer,) = conditioning.survey(*nnx.split(model), x).layers
  assert dataclasses.asdict(layer) | {"name": ""} == dataclasses.asdict(twin) | {"name": ""}


def run(inputs, *, steps=1, decay=0.99):
  """Return the diagnostics of an MLP, `first` then `second`, after `steps` equal batches."""
  model = problems.MLP(jnp.float64)
  params = random_params(model, inputs)
  _, state, stats = first_step(model, params, inputs, decay)
  for _ in range(steps - 1):
    state = next_step(params, state, stats)
  return diagnose(params, state, stats), params, state, stats


def normal(*shape, mean=0.0):
  return np.random.default_rng(0).normal(mean, 1, shape)


def changed(column, value):
  inputs = normal(N, 5)
  inputs[:, column] = value
  return inputs


def test_a_healthy_layer_has_no_notes():
  diagnostics, *_ = run(normal(N, 5), decay=0.0)
  assert diagnostics.names == ("first", "second")
  assert diagnostics.notes() == ["", ""]
  np.testing.assert_allclose(diagnostics.lag, 0, atol=1e-6)
  np.testing.assert_allclose(diagnostics.largest_eigenvalue, 1, rtol=1e-5)
  np.testing.assert_array_equal(diagnostics.q2, [1, 1])


@pytest.mark.slow
def test_a_healthy_layer_without_bias_has_no_notes():
  """Its mean is not centred, which makes the largest eigenvalue large."""
  params = {"kernel": jnp.ones((64, 4))}
  x = jnp.asarray(np.maximum(normal(256, 64), 0))
  stats = {"layer_statistics": bnp_optax.layer_statistics(x, examples=256, rows=256)}
  tx = bnp_optax.scale_by_bnp()
  _, state = tx.update(params, tx.init(params), stats=stats)
  diagnostics = conditioning.diagnose(params, state, stats)
  assert diagnostics.largest_eigenvalue[0] > 15
  assert diagnostics.notes() == [""]


def test_a_dead_layer_is_found():
  diagnostics, *_ = run(np.zeros((N, 5)))
  assert diagnostics.notes()[0] == "5 of 5 inputs are dead"
  diagnostics, *_ = run(changed(slice(2), 3.3))
  assert diagnostics.dead[0] == 2


def test_a_large_feature_is_found():
  diagnostics, *_ = run(normal(N, 5) * [1, 1e3, 1, 1, 1], decay=0.0)
  assert diagnostics.notes() == ["an input's variance is 1e+06 times the median", ""]
  assert 5e5 < diagnostics.spread[0] < 2e6
  # D has a 1 for the bias, and the epsilons keep its other entries within 101 to 1.
  assert 900 < diagnostics.kappa_D[0] < 1100


def test_a_lagging_mean_is_found():
  """Its eigenvalue is predicted: 1 + n delta^2, or up to 1 more."""
  inputs = normal(N, 5, mean=8.0)
  diagnostics, params, state, _ = run(inputs, steps=60)
  note = diagnostics.notes()[0]
  assert note.startswith("the running mean is 4.")
  assert note.endswith("deviations behind")
  lag, n = float(diagnostics.lag[0]), 5
  U, D = conditioning.preconditioner(
    *(getattr(state, x)["first"]["kernel"] for x in ("input_mean", "input_variance")),
    params["first"]["kernel"].shape,
  )
  H = conditioning.hidden_matrix(
    problems.MLP(jnp.float64), {"params": params}, inputs, layer=("first", "kernel")
  )
  largest = np.linalg.norm(np.asarray((H @ U @ D)[0]), 2) ** 2 / N
  np.testing.assert_allclose(diagnostics.largest_eigenvalue[0], largest, rtol=1e-2)
  assert 1 + n * lag**2 < diagnostics.largest_eigenvalue[0] < 2 + n * lag**2


@pytest.mark.slow
@pytest.mark.parametrize(
  ("bias", "change"),
  [(True, lambda x: 20 * x + 0.1), (False, lambda x: 20 * x), (False, lambda x: x + 20)],
)
def test_inputs_that_are_larger_than_before_are_found(bias, change):
  """Their means hardly lag. Without a bias, a second moment takes the place of a variance."""
  signs = np.sign(normal(128, 8))
  x = jnp.asarray(np.concatenate([signs, -signs]))
  params = {"kernel": jnp.ones((8, 4))} | ({"bias": jnp.ones(4)} if bias else {})
  before, after = (
    {"layer_statistics": bnp_optax.layer_statistics(x, examples=256, rows=256)}
    for x in (x, change(x))
  )
  tx = bnp_optax.scale_by_bnp()
  _, state = tx.update(params, tx.init(params), stats=before)
  assert conditioning.diagnose(params, state, before).notes() == [""]
  diagnostics = conditioning.diagnose(params, state, after)
  (note,) = diagnostics.notes()
  assert note == "a second moment is 4e+02 times the preconditioner's"
  np.testing.assert_allclose(diagnostics.variance_ratio, 400, rtol=0.05)


def test_a_layer_without_statistics_is_found():
  _, params, state, stats = run(normal(N, 5))
  diagnostics = diagnose(params, state, {"first": stats["first"]})
  assert diagnostics.notes()[1] == "no statistics, or no rows"
  assert np.isnan(diagnostics.lag[1])
  assert not np.isnan(diagnostics.lag[0])


def test_statistics_that_are_not_finite_are_found():
  diagnostics, *_ = run(changed(2, np.inf))
  assert diagnostics.notes()[0] == "its statistics are not finite"
  # Values whose mean is finite and whose variance is not.
  diagnostics, *_ = run(np.where(np.arange(N)[:, None] % 2, 1e200, -1e200) * np.ones((N, 5)))
  assert diagnostics.notes()[0] == "its statistics are not finite"


@pytest.mark.slow
@pytest.mark.parametrize("bias", [True, False])
def test_predictions_are_exact_for_uncorrelated_features(bias):
  """Extreme eigenvalues and the improvement, against H itself; with a dead feature or two."""
  rng, rows = np.random.default_rng(1), 12
  layer = nn.Dense(2, use_bias=bias, **F64)
  h = rng.normal(size=(rows, 5))
  h = np.linalg.qr(h - h.mean(0))[0] * [1, 3, 0.2, 1, 2] * np.sqrt(rows) + rng.normal(size=5)
  x = jnp.asarray(np.column_stack([h, np.zeros(rows), np.full(rows, 0.7)]))
  params = random_params(layer, x)
  _, state, stats = first_step(layer, params, x, 0.5)
  diagnostics = diagnose(params, state, stats)
  H = np.asarray(conditioning.hidden_matrix(layer, {"params": params}, x)[0])
  U, D = conditioning.preconditioner(
    state.input_mean["kernel"], state.input_variance["kernel"], (7, 2), bias=bias
  )
  G = H @ np.asarray(U @ D)[0]
  largest = np.linalg.norm(G, 2) ** 2 / rows
  np.testing.assert_allclose(diagnostics.largest_eigenvalue, largest, rtol=1e-5)
  improvement = (conditioning.condition_number(H) / conditioning.condition_number(G)) ** 2
  np.testing.assert_allclose(diagnostics.improvement, improvement, rtol=1e-4)
  assert diagnostics.dead == 2


def test_diagnose_within_the_training_step():
  """Under jit and scan, and for a convolution with several window entries."""
  layer, x = nn.Conv(2, (3,), feature_group_count=2, **F64), normal(4, 6, 4, mean=2.0)
  params = random_params(layer, x)
  layers = bnp_optax.linen.layers(layer, x)
  tx = bnp_optax.bnp(optax.sgd(0.1), layers=layers, debias=False)

  def step(state, x):
    with bnp_optax.linen.sow_statistics():
      _, aux = layer.apply({"params": params}, x, mutable=["intermediates"])
    _, state = tx.update(params, state, params, stats=aux["intermediates"])
    return state, conditioning.diagnose(params, state, aux["intermediates"], layers=layers)

  scanned = jax.jit(lambda s, x: jax.lax.scan(step, s, x))
  _, history = scanned(tx.init(params), jnp.stack([x, x + 1, x]))
  assert history.lag.shape == (3, 1)
  assert np.all(history.inputs == 6)
  assert np.all(history.largest_eigenvalue > 1 + 6 * history.lag**2)

  figure = conditioning.heat_map(history, "lag")
  axes = figure.axes[0]
  assert [label.get_text() for label in axes.get_yticklabels()] == ["(the model itself)"]
  np.testing.assert_allclose(axes.images[0].get_array(), np.asarray(history.lag).T)
  with pytest.raises(ValueError, match=r"lag should be \[steps, layers\]"):
    conditioning.heat_map(jax.tree.map(lambda x: x[0], history), "lag")


def test_diagnose_reads_the_gradients_of_taps():
  x = jnp.asarray(np.random.default_rng(0).normal(size=(6, 4)))
  model, tx = nn.Dense(3, **F64), problems.compiled(bnp_optax.scale_by_bnp())
  tapped = bnp_optax.linen.Tapped(model, examples=6)
  params = jax.jit(tapped.init)(jax.random.key(0), x)["params"]
  grads = jax.jit(jax.grad(lambda p: jnp.mean(tapped.apply({"params": p}, x))))(params)
  _, state = tx.update(grads, tx.init(params))
  with bnp_optax.linen.sow_statistics():
    _, aux = model.apply({"params": params}, x, mutable=["intermediates"])
  found = diagnose(params, state, grads)
  expected = diagnose(params, state, aux["intermediates"])
  assert found.names == expected.names
  assert found.notes() == [""]
  for field in ("rows", "lag", "largest_eigenvalue", "improvement"):
    one, other = getattr(found, field), getattr(expected, field)
    np.testing.assert_allclose(one, other, rtol=1e-12)


def test_survey_needs_the_variables():
  params = {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}
  with pytest.raises(ValueError, match=r"Give variables, .*found \['bias', 'kernel'\]"):
    conditioning.survey(nn.Dense(3), params, jnp.ones((6, 4)))


def test_diagnose_needs_a_state_of_bnp():
  with pytest.raises(ValueError, match="no state of scale_by_bnp or bnp"):
    conditioning.diagnose({"kernel": jnp.ones((2, 2))}, optax.sgd(0.1).init({}), {})


def test_diagnose_refuses_settings_out_of_range():
  params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
  state = bnp_optax.scale_by_bnp().init(params)
  with pytest.raises(ValueError, match=r"eps_relative must be in \[0, inf\), got -1"):
    conditioning.diagnose(params, state, {}, eps_relative=-1)


def test_every_layer_of_a_model_that_two_optimizers_share_is_diagnosed():
  params, batch = problems.make(problems.MLP(), (8, 5))
  grads, stats = problems.grads_and_stats(problems.MLP(), params, batch)
  first, *others = params
  for kinds in (("a", "b"), ("b", "a")):
    labels = {first: kinds[0]} | dict.fromkeys(others, kinds[1])
    tx = optax.partition(
      {"a": bnp_optax.scale_by_bnp(debias=False), "b": bnp_optax.bnp(optax.sgd(0.1), debias=False)},
      {name: {"kernel": label, "bias": label} for name, label in labels.items()},
    )
    step = lambda: tx.update(grads, tx.init(params), params, stats=stats)[1]
    found = jax.eval_shape(lambda: conditioning.diagnose(params, step(), stats))
    assert set(found.names) == {*params}


@pytest.mark.parametrize("unit", [-1, 3])
def test_a_unit_out_of_range(unit):
  model, x = nn.Dense(3, **F64), jnp.ones((2, 4))
  params = random_params(model, x)

  def loss_fn(params):
    return jnp.sum(model.apply({"params": params}, x))

  for function in (conditioning.unit_hessian, conditioning.unit_curvature):
    with pytest.raises(ValueError, match=f"no unit {unit}; the layer has 3 outputs"):
      function(loss_fn, params, unit=unit)


def test_rounding_to_bfloat16_adds_no_rank():
  rng = np.random.default_rng(0)
  product = np.outer(rng.normal(size=30), rng.normal(size=20))
  assert conditioning.condition_number(jnp.asarray(product, jnp.bfloat16)) == 1
  with pytest.raises(ValueError, match="real matrices, found complex128"):
    conditioning.condition_number(1j * product)


@pytest.mark.slow
def test_a_model_that_draws_random_numbers_can_be_surveyed():
  class Noisy(nn.Module):
    @nn.compact
    def __call__(self, x):
      x = nn.Dense(4, name="mean", **F64)(x)
      x = x + jax.random.normal(self.make_rng("latent"), x.shape)
      return nn.Dense(2, name="head", **F64)(x)

  x = jnp.asarray(np.random.default_rng(0).normal(size=(16, 3)))
  variables = Noisy().init(jax.random.key(0), x)
  assert [x.name for x in conditioning.survey(Noisy(), variables, x).layers] == ["head", "mean"]


@pytest.mark.slow
def test_a_survey_takes_both_passes_from_the_same_state():
  """The second pass must not start from the random numbers, or the state, that the first left."""

  class Changing(nnx.Module):
    def __init__(self, rngs):
      self.factor, self.drop = nnx.Variable(jnp.ones(())), nnx.Dropout(0.5, rngs=rngs)
      self.out = nnx.Linear(6, 2, rngs=rngs, **F64)

    def __call__(self, x):
      x = self.drop(x) * self.factor[...]
      self.factor[...] = self.factor[...] * 10
      return self.out(x)

  x = jnp.asarray(np.random.default_rng(0).normal(2, 1, (40, 6)))
  model = nnx.split(Changing(nnx.Rngs(0)))
  (layer,) = conditioning.survey(*model, x).layers
  H = conditioning.hidden_matrix(*model, x)[0]
  mean, variance = H[:, 1:].mean(0), H[:, 1:].var(0)
  U, D = conditioning.preconditioner(mean, variance, (6, 2))
  np.testing.assert_allclose(layer.before, conditioning.condition_number(H), rtol=1e-6)
  np.testing.assert_allclose(layer.after, conditioning.condition_number(H @ (U @ D)[0]), rtol=1e-6)


@pytest.mark.slow
def test_the_hessian_with_a_bias_that_has_axes_of_size_1():
  """As in Equinox's convolutions: `[output, 1, 1]`, a weight of `[output, feature, *window]`."""
  rng = np.random.default_rng(0)
  params = {"weight": rng.normal(size=(4, 2, 3, 3)), "bias": rng.normal(size=(4, 1, 1))}
  params, x = jax.tree.map(jnp.asarray, params), jnp.asarray(rng.normal(size=(2, 2, 4, 4)))
  layers = {("weight",): KernelLayout(window=(2, 3), feature=(1,), output=(0,))}

  def loss_fn(params):
    y = jax.lax.conv_general_dilated(x, params["weight"], (1, 1), "SAME") + params["bias"][None]
    return jnp.mean(jnp.tanh(y) ** 2)

  def loss_of_bias(b):
    return loss_fn(params | {"bias": params["bias"].at[1].set(b)})

  hessian = conditioning.unit_hessian(loss_fn, params, unit=1, layers=layers)
  assert hessian.shape == (19, 19)
  expected = jax.hessian(loss_of_bias)(params["bias"][1, 0, 0])
  np.testing.assert_allclose(hessian[0, 0], expected, rtol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("debias", [False, True])
def test_rows_that_are_equal_have_the_preconditioner_of_the_step(debias):
  params = {"kernel": jnp.ones((5, 4)), "bias": jnp.zeros(4)}
  x = jnp.full((7, 5), 0.1)
  stats = bnp_optax.layer_statistics(x, examples=7, rows=7)
  assert 0 < stats.variance[0] < 1e-15
  tx = bnp_optax.scale_by_bnp(decay=0.0, debias=debias)
  _, state = tx.update(params, tx.init(params), stats={"layer_statistics": stats})
  diagnostics = conditioning.diagnose(params, state, {"layer_statistics": stats})
  np.testing.assert_allclose(diagnostics.kappa_D, 1 if debias else 100, rtol=1e-5)
