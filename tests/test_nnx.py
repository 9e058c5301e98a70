"""`bnp_optax.nnx`: the same statistics and updates as in Linen, and classes that are restored."""

import concurrent.futures
import contextlib
import functools

import chex
from flax import nnx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bnp_optax
from bnp_optax.nnx import Statistics, sow_statistics
from tests import unrolled
from tests.test_layers_linen import power_iteration, record

N = 3
KINDS = (nnx.Linear, nnx.LinearGeneral, nnx.Einsum, nnx.Conv, nnx.ConvTranspose, nnx.LoRA)
ORIGINALS = [kind.__dict__["__call__"] for kind in KINDS]


@pytest.fixture(autouse=True)
def classes_are_restored():
  yield
  assert [kind.__dict__["__call__"] for kind in KINDS] == ORIGINALS


def rngs():
  return nnx.Rngs(0)


def build(make):
  """Return the model `make(rngs)`, initialized in one program."""
  return nnx.jit(lambda: make(rngs()))()


def uniform(*shape, seed=0, dtype=jnp.float32):
  return jax.device_put(np.random.default_rng(seed).uniform(1, 2, shape).astype(dtype))


def loss_fn(model, x, **context):
  with sow_statistics(**context):
    y, stats = nnx.capture(model, Statistics)(x)
  return jnp.sum(jnp.sin(3 * y)) / x.shape[0], stats


@functools.partial(nnx.jit, static_argnames="exact_windows")
def grads_and_stats(model, x, exact_windows=False):
  grad = nnx.grad(functools.partial(loss_fn, exact_windows=exact_windows), has_aux=True)
  return grad(model, x)


class MLP(nnx.Module):
  def __init__(self, rngs, dtype=jnp.float32):
    make = functools.partial(nnx.Linear, rngs=rngs, dtype=dtype, param_dtype=dtype)
    self.layers = nnx.List([make(5, 4), make(4, 4), make(4, 3)])
    self.once_more = self.layers[1]

  def __call__(self, x):
    for layer in (*self.layers[:2], self.once_more):
      x = nnx.tanh(layer(x))
    return self.layers[2](x)


def statistics(stats, *path):
  return unrolled.get(stats, path)["layer_statistics"].get_value()


# Twins of Linen layers: the same weights, the same data, the same updates.

P = {"param_dtype": jnp.float64}
TWINS = {
  "linear": (nn.Dense(4, **P), lambda r: nnx.Linear(5, 4, rngs=r, **P), (N, 2, 5)),
  "linear_general": (
    nn.DenseGeneral((2, 3), (-2, -1), **P),
    lambda r: nnx.LinearGeneral((4, 5), (2, 3), axis=(-2, -1), rngs=r, **P),
    (N, 2, 4, 5),
  ),
  "linear_general_with_batch_axes": (
    nn.DenseGeneral(4, batch_dims=(0,), use_bias=False, **P),
    lambda r: nnx.LinearGeneral(5, 4, batch_axis={0: 2}, use_bias=False, rngs=r, **P),
    (2, N, 5),
  ),
  "einsum": (
    nn.Einsum((2, 5, 4), "btd,hdk->bthk", **P),
    lambda r: nnx.Einsum("btd,hdk->bthk", (2, 5, 4), (2, 4), rngs=r, **P),
    (N, 3, 5),
  ),
  "conv": (
    nn.Conv(4, (3, 2), strides=2, kernel_dilation=(1, 2), **P),
    lambda r: nnx.Conv(3, 4, (3, 2), strides=2, kernel_dilation=(1, 2), rngs=r, **P),
    (N, 6, 5, 3),
  ),
  "exact_conv": (
    nn.Conv(4, (3,), padding="CIRCULAR", feature_group_count=2, **P),
    lambda r: nnx.Conv(4, 4, (3,), padding="CIRCULAR", feature_group_count=2, rngs=r, **P),
    (N, 6, 4),
  ),
  "depthwise": (
    nn.Conv(4, (3, 3), feature_group_count=4, **P),
    lambda r: nnx.Conv(4, 4, (3, 3), feature_group_count=4, rngs=r, **P),
    (N, 4, 4, 4),
  ),
  "conv_transpose": (
    nn.ConvTranspose(4, (3,), (2,), transpose_kernel=True, **P),
    lambda r: nnx.ConvTranspose(3, 4, (3,), 2, transpose_kernel=True, rngs=r, **P),
    (N, 5, 3),
  ),
  "attention": (
    nn.MultiHeadDotProductAttention(2, qkv_features=4, **P),
    lambda r: nnx.MultiHeadAttention(2, 3, 4, decode=False, rngs=r, **P),
    (N, 4, 3),
  ),
  "recurrent": (
    nn.RNN(nn.SimpleCell(4, **P), variable_axes={"intermediates": 0}),
    lambda r: rnn(nnx.SimpleCell(3, 4, rngs=r, dtype=jnp.float64, **P)),
    (N, 4, 3),
  ),
}


def rnn(cell):
  return nnx.RNN(cell)


def as_in_linen(state):
  """Return the parameters as dictionaries, with Linen's names."""
  names = {"dense_i": "i", "dense_h": "h"}
  rename = lambda tree: (
    {names.get(k, k): rename(v) for k, v in tree.items()} if isinstance(tree, dict) else tree
  )
  return rename(nnx.to_pure_dict(state))


def update(layers, params, grads, stats):
  """Return the first update."""
  tx = bnp_optax.scale_by_bnp(layers=layers, debias=False)
  return jax.jit(lambda: tx.update(grads, tx.init(params), stats=stats)[0])()


class LinenCNN(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.relu(nn.Conv(4, (3, 3), strides=2, name="first", **P)(x))
    x = nn.relu(nn.Conv(4, (3, 3), use_bias=False, name="second", **P)(x))
    return nn.Dense(3, name="head", **P)(x.reshape(len(x), -1))


class CNN(nnx.Module):
  def __init__(self, rngs):
    self.first = nnx.Conv(3, 4, (3, 3), strides=2, rngs=rngs, **P)
    self.second = nnx.Conv(4, 4, (3, 3), use_bias=False, rngs=rngs, **P)
    self.head = nnx.Linear(16, 3, rngs=rngs, **P)

  def __call__(self, x):
    x = nnx.relu(self.second(nnx.relu(self.first(x))))
    return self.head(x.reshape(len(x), -1))


class LinenTransformer(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.Dense(4, name="embed", **P)(x)
    h = nn.LayerNorm(name="before_attention", **P)(x)
    x = x + nn.MultiHeadDotProductAttention(2, name="attention", **P)(h)
    h = nn.LayerNorm(name="before_mlp", **P)(x)
    x = x + nn.Dense(4, name="down", **P)(nn.gelu(nn.Dense(8, name="up", **P)(h)))
    return nn.Dense(3, name="head", **P)(x.mean(axis=1))


class Transformer(nnx.Module):
  def __init__(self, rngs):
    self.embed = nnx.Linear(3, 4, rngs=rngs, **P)
    self.before_attention = nnx.LayerNorm(4, rngs=rngs, **P)
    self.attention = nnx.MultiHeadAttention(2, 4, decode=False, rngs=rngs, **P)
    self.before_mlp = nnx.LayerNorm(4, rngs=rngs, **P)
    self.up = nnx.Linear(4, 8, rngs=rngs, **P)
    self.down = nnx.Linear(8, 4, rngs=rngs, **P)
    self.head = nnx.Linear(4, 3, rngs=rngs, **P)

  def __call__(self, x):
    x = self.embed(x)
    x = x + self.attention(self.before_attention(x))
    x = x + self.down(nnx.gelu(self.up(self.before_mlp(x))))
    return self.head(x.mean(axis=1))


TWINS |= {
  "cnn": (LinenCNN(), CNN, (N, 4, 4, 3)),
  "transformer": (LinenTransformer(), Transformer, (N, 4, 3)),
}
SOFTMAX_IN_FLOAT32 = ("attention", "transformer")


@pytest.mark.slow
@pytest.mark.parametrize("kind", TWINS)
def test_twins(kind):
  exact = kind.startswith("exact")
  promotion = "standard" if kind in SOFTMAX_IN_FLOAT32 else "strict"
  with jax.enable_x64(True), jax.numpy_dtype_promotion(promotion):
    linen, make, shape = TWINS[kind]
    model, x = build(make), uniform(*shape, dtype=jnp.float64)
    params = as_in_linen(nnx.state(model, nnx.Param))

    def linen_loss(params):
      with bnp_optax.linen.sow_statistics(exact_windows=exact):
        y, aux = linen.apply({"params": params}, x, mutable=["intermediates"])
      return jnp.sum(jnp.sin(3 * y)) / shape[0], aux["intermediates"]

    grads, stats = jax.jit(jax.grad(linen_loss, has_aux=True))(params)
    layers = bnp_optax.linen.layers(linen, x, strict=True, exact_windows=exact)
    expected = update(layers, params, grads, stats)

    grads, stats = grads_and_stats(model, x, exact_windows=exact)
    layers = bnp_optax.nnx.layers(model, x, strict=True, exact_windows=exact)
    actual = as_in_linen(update(layers, nnx.state(model, nnx.Param), grads, stats))
    chex.assert_trees_all_equal_structs(actual, expected)
    actual, expected = (
      np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])
      for tree in (actual, expected)
    )
    difference = np.linalg.norm(actual - expected) / np.linalg.norm(expected)
    assert difference <= (1e-5 if kind in SOFTMAX_IN_FLOAT32 else 1e-12)


def check_update(layers, model, grads, stats, entries, tolerance=1e-12):
  """Check the first update from `grads` and `stats` against the paper's loops."""
  updates = nnx.to_pure_dict(update(layers, nnx.state(model, nnx.Param), grads, stats))
  grads = jax.tree.map(np.asarray, nnx.to_pure_dict(grads))
  expected = unrolled.step(entries, grads, {})
  assert set(expected) == set(layers)
  assert unrolled.relative_error(updates, expected) <= tolerance


@pytest.mark.slow
def test_decoding():
  """Each step of decode mode has the inputs of causal attention at that position."""
  with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
    model = build(lambda rngs: nnx.MultiHeadAttention(2, 3, 4, decode=True, rngs=rngs, **P))
    x = uniform(N, 4, 3, dtype=jnp.float64)
    params = as_in_linen(nnx.state(model, nnx.Param))
    whole = nn.MultiHeadDotProductAttention(2, qkv_features=4, **P)
    _, inputs = record(whole, params, x, mask=nn.make_causal_mask(x[..., 0]))
    model.init_cache(x.shape, jnp.float64)
    layers = bnp_optax.nnx.layers(model, x[:, :1], strict=True)
    for t in range(4):
      grads, stats = grads_and_stats(model, x[:, t : t + 1])
      entries = [
        unrolled.Entry(path, h[:, t].reshape(N, -1), features=2 if path[-1] == "out" else 1)
        for path, (h,) in inputs.items()
      ]
      check_update(layers, model, grads, stats, entries, tolerance=1e-5)
    assert model.cache_index[...] == 4


class Normalized(nnx.Module):
  """Layers whose kernels are normalized before they multiply."""

  def __init__(self, wrapper, rngs):
    self.first = wrapper(nnx.Linear(3, 4, rngs=rngs, **P), rngs=rngs, **P)
    self.second = wrapper(nnx.Conv(4, 2, (2,), rngs=rngs, **P), rngs=rngs, **P)

  def __call__(self, x):
    return self.second(self.first(x))


@pytest.mark.parametrize("wrapper", [nnx.WeightNorm, nnx.SpectralNorm])
def test_normalized_weights(wrapper):
  """The parameter's gradient is preconditioned by what the normalized kernel multiplies."""
  with jax.enable_x64(True):
    kwargs = {"update_stats": True} if wrapper is nnx.SpectralNorm else {}
    model = build(lambda rngs: Normalized(functools.partial(wrapper, **kwargs), rngs))
    x = uniform(N, 4, 3, dtype=jnp.float64)
    kernel = np.asarray(model.first.layer_instance.kernel[...])
    if wrapper is nnx.WeightNorm:
      normalized = kernel / np.linalg.norm(kernel, axis=0)
    else:
      u = np.asarray(model.first.batch_stats["kernel", "u"][...])
      normalized, _, _ = power_iteration(kernel, u)
    layers = bnp_optax.nnx.layers(model, x, strict=True)
    np.testing.assert_array_equal(model.first.layer_instance.kernel[...], kernel)
    hidden = np.asarray(x) @ normalized
    entries = [
      unrolled.Entry(("first", "layer_instance"), np.asarray(x), 4),
      unrolled.Entry(("second", "layer_instance"), hidden, 4, window=1),
    ]
    grads, stats = grads_and_stats(model, x)
    check_update(layers, model, grads, stats, entries)


def test_a_param_shared_by_two_modules_is_refused():
  class Tied(nnx.Module):
    def __init__(self, rngs):
      self.a, self.b = (nnx.Linear(4, 4, rngs=rngs) for _ in range(2))
      self.b.kernel = self.a.kernel

    def __call__(self, x):
      return self.b(self.a(x))

  with pytest.raises(ValueError, match=r"Linear .* shares its kernel with another module"):
    jax.eval_shape(lambda x: loss_fn(Tied(rngs()), x), uniform(N, 4))


def test_lora():
  """Two linear maps after each other, beside the one that they adapt."""
  with jax.enable_x64(True):
    make = functools.partial(nnx.LoRALinear, lora_rank=2, lora_param_dtype=jnp.float64, **P)
    model = build(lambda rngs: make(5, 4, rngs=rngs))
    model.lora.lora_b[...] = uniform(2, 4, dtype=jnp.float64)
    x = uniform(N, 5, dtype=jnp.float64)
    grads, stats = grads_and_stats(model, x)
    layers = bnp_optax.nnx.layers(model, x, strict=True)
    hidden = np.asarray(x) @ np.asarray(model.lora.lora_a[...])
    entries = [
      unrolled.Entry((), np.asarray(x)),
      unrolled.Entry(("lora",), np.asarray(x), kernel="lora_a"),
      unrolled.Entry(("lora",), hidden, kernel="lora_b"),
    ]
    check_update(layers, model, grads, stats, entries)


def test_lora_in_low_precision():
  model, x = nnx.LoRA(5, 2, 4, dtype=jnp.bfloat16, rngs=rngs()), uniform(N, 5)
  with sow_statistics():
    _, stats = nnx.capture(model, Statistics)(x)
  hidden = x.astype(jnp.bfloat16) @ model.lora_a[...].astype(jnp.bfloat16)
  found = stats["layer_statistics_lora_b"].get_value()
  np.testing.assert_array_equal(found.mean, hidden.astype(jnp.float32).mean(0))


# It changes nothing.


def test_outputs_and_gradients_are_the_same():
  model, x = MLP(rngs()), uniform(N, 5)
  plain = lambda model, x: jnp.sum(jnp.sin(3 * model(x))) / x.shape[0]
  loss, grads = nnx.jit(nnx.value_and_grad(plain))(model, x)
  (sown_loss, _), sown_grads = nnx.jit(nnx.value_and_grad(loss_fn, has_aux=True))(model, x)
  assert loss == sown_loss
  chex.assert_trees_all_equal(jax.tree.leaves(grads), jax.tree.leaves(sown_grads))
  assert not hasattr(model.layers[0], "__captures__")


def test_the_second_call_traces_nothing():
  model, x, traces = MLP(rngs()), uniform(N, 5), []
  optimizer = nnx.Optimizer(model, bnp_optax.bnp(optax.sgd(0.1, 0.9), debias=False), wrt=nnx.Param)

  @nnx.jit
  def step(model, optimizer, x):
    traces.append(None)
    grads, stats = nnx.grad(loss_fn, has_aux=True)(model, x)
    optimizer.update(model, grads, stats=stats)

  for i in range(3):
    step(model, optimizer, x + i)
  assert len(traces) == 1
  assert optimizer.opt_state.statistics.count[...] == 3


def test_shared_modules_and_lists():
  model, x = MLP(rngs()), uniform(N, 5)
  _, stats = grads_and_stats(model, x)
  first, shared = statistics(stats, "layers", 0), statistics(stats, "layers", 1)
  np.testing.assert_allclose(first.mean, np.mean(x, 0), rtol=1e-6)
  assert (first.rows, first.examples, shared.rows, shared.examples) == (N, N, 2 * N, N)
  optimizer = nnx.Optimizer(model, bnp_optax.scale_by_bnp(debias=False), wrt=nnx.Param)
  grads, stats = grads_and_stats(model, x)
  nnx.jit(lambda model, optimizer: optimizer.update(model, grads, stats=stats))(model, optimizer)
  mean = optimizer.opt_state.input_mean["layers"]
  np.testing.assert_allclose(mean[0]["kernel"][...], 0.01 * np.mean(x, 0), rtol=1e-5)


def test_functional_style():
  model, x = MLP(rngs()), uniform(N, 5)
  graphdef, params = nnx.split(model)
  tx = bnp_optax.scale_by_bnp(debias=False)

  @jax.jit
  def step(params, state, x):
    loss = lambda params: loss_fn(nnx.merge(graphdef, params), x)
    grads, stats = jax.grad(loss, has_aux=True)(params)
    return tx.update(grads, state, params, stats=stats)

  updates, _ = step(params, tx.init(params), x)
  grads, stats = grads_and_stats(model, x)
  expected = update(None, params, grads, stats)
  chex.assert_trees_all_close(jax.tree.leaves(updates), jax.tree.leaves(expected), rtol=1e-4)


# Transformations.


class Stack(nnx.Module):
  """Layers under nnx.scan, as many as they are wide; or a scan over time."""

  def __init__(self, rngs, *, remat=False):
    make = nnx.split_rngs(splits=4)(nnx.vmap(lambda rngs: nnx.Linear(4, 4, rngs=rngs)))
    self.blocks = make(rngs)
    self.remat = remat

  def __call__(self, x):
    run = lambda x, block: nnx.tanh(block(x))
    run = nnx.remat(run) if self.remat else run
    return nnx.scan(run, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.blocks)


@pytest.mark.parametrize("remat", [False, True])
def test_scanned_layers(remat):
  model, x = Stack(rngs(), remat=remat), uniform(N, 4)
  grads, stats = grads_and_stats(model, x)
  layers = bnp_optax.nnx.layers(model, x, strict=True)
  assert layers["blocks", "kernel"].stack == (0,)
  updates = nnx.to_pure_dict(update(layers, nnx.state(model), grads, stats))
  params, grads = (nnx.to_pure_dict(t)["blocks"] for t in (nnx.state(model), grads))
  entries, h = [], np.asarray(x)
  for i in range(4):
    entries.append(unrolled.Entry(("blocks",), h, index=(i,)))
    h = np.tanh(h @ np.asarray(params["kernel"][i]) + np.asarray(params["bias"][i]))
  expected = unrolled.step(entries, {"blocks": jax.tree.map(np.asarray, grads)}, {})
  assert unrolled.relative_error(updates, expected) <= 1e-5
  no_bias = {"blocks": {"kernel": params["kernel"]}}
  tx = bnp_optax.scale_by_bnp(debias=False)
  with pytest.raises(ValueError, match=r"under nn.scan.*layers="):
    tx.update(no_bias, tx.init(no_bias), stats=stats)


def test_statistics_over_a_mapped_axis_are_those_of_the_whole_batch():
  """One layer of the model is called twice."""
  with jax.enable_x64(True):
    model = build(functools.partial(MLP, dtype=jnp.float64))
    x = uniform(N, 5, dtype=jnp.float64)

    def one(model, x):
      with sow_statistics(example_axes=0, axis_name="batch"):
        return nnx.capture(model, Statistics)(x)[1]

    axes = {"in_axes": (None, 0), "out_axes": None, "axis_name": "batch"}
    actual = nnx.jit(nnx.vmap(one, **axes))(model, x)
    _, expected = grads_and_stats(model, x)
    for layer in range(3):
      a, b = (statistics(stats, "layers", layer) for stats in (actual, expected))
      chex.assert_trees_all_close(a, b, rtol=1e-12)


def test_a_function_traced_before_without_axis_name():
  model, x = MLP(rngs()), uniform(N, 5)
  forward = nnx.jit(lambda model, x: nnx.capture(model, Statistics)(x)[1])

  def one(model, x):
    for axis_name in (None, "batch"):
      with sow_statistics(axis_name=axis_name):
        yield statistics(forward(model, x), "layers", 0).rows

  run = nnx.vmap(
    lambda *args: tuple(one(*args)), in_axes=(None, 0), out_axes=(0, None), axis_name="batch"
  )
  alone, whole = run(model, x)
  assert (alone.tolist(), whole) == ([1] * N, N)


# Ways to lose statistics.


def test_without_capture():
  model, x = MLP(rngs()), uniform(N, 5)
  before = nnx.state(model)
  with sow_statistics():
    y, sown = nnx.capture(model, nnx.Intermediate)(x)
    chex.assert_trees_all_equal(model(x), y)
  # Nothing is left in the model.
  chex.assert_trees_all_equal(nnx.state(model), before)
  tx = bnp_optax.scale_by_bnp()
  with pytest.raises(ValueError, match=r"nnx.capture\(model, bnp_optax.nnx.Statistics\)"):
    tx.update(before, tx.init(before), stats=sown)


def test_a_capture_of_other_values():
  """Its number of examples does not count."""
  model, x = MLP(rngs()), uniform(N, 5)
  with sow_statistics():
    nnx.capture(model, nnx.Intermediate)(x[:1])
    _, stats = nnx.capture(model, Statistics)(x)
  assert statistics(stats, "layers", 0).rows == N


def test_another_view_of_the_model_that_is_not_captured():
  """As of a target network, or the same model in evaluation, within the context of the other."""
  model, x = MLP(rngs()), uniform(N, 5)
  graph, state = nnx.split(model)

  def sown(calls):
    with sow_statistics():
      for _ in range(calls):
        nnx.merge(graph, state)(x)
      return nnx.capture(nnx.merge(graph, state), Statistics)(x)[1]

  chex.assert_trees_all_equal(sown(2), sown(0))


@pytest.mark.parametrize("method", ["__call__", "encode"])
@pytest.mark.parametrize("transform", [nnx.jit, nnx.remat])
def test_the_table_of_a_transformed_method(transform, method):
  class Model(nnx.Module):
    def __init__(self, rngs):
      self.first, self.second = nnx.Linear(5, 4, rngs=rngs), nnx.Linear(4, 3, rngs=rngs)

  plain = lambda self, x: self.second(jnp.tanh(self.first(x)))
  setattr(Model, method, transform(plain))
  layers = bnp_optax.nnx.layers(Model(rngs()), uniform(N, 5), method=method)
  assert [*layers] == [("first", "kernel"), ("second", "kernel")]


def tanh_sum(layer, x):
  return jnp.sum(nnx.tanh(layer(x)))


DERIVATIVES = {
  "grad": lambda layer, x: nnx.grad(tanh_sum, argnums=1)(layer, x),
  "value_and_grad": lambda layer, x: nnx.value_and_grad(tanh_sum, argnums=1)(layer, x)[1],
  "vjp": lambda layer, x: nnx.vjp(tanh_sum, layer, x, graph=False)[1](jnp.ones(()))[1],
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", DERIVATIVES)
def test_a_derivative_inside_of_a_model(kind):
  """Its forward pass counts once."""

  class Model(nnx.Module):
    def __init__(self, rngs):
      self.layer = nnx.Linear(5, 5, rngs=rngs)

    def __call__(self, x):
      return DERIVATIVES[kind](self.layer, x)

  model, x = Model(rngs()), uniform(N, 5)
  with sow_statistics():
    y, stats = nnx.capture(model, Statistics)(x)
  chex.assert_trees_all_equal(y, model(x))
  found = statistics(stats, "layer")
  assert (found.rows, found.examples) == (N, N)
  np.testing.assert_allclose(found.mean, x.mean(0), rtol=1e-6)


class MasksOfItsParts(nnx.Module):
  """A model that enters the context of each part itself."""

  def __init__(self, rngs):
    self.encoder = nnx.Linear(5, 4, rngs=rngs)
    self.decoder = nnx.Linear(4, 3, rngs=rngs)

  def __call__(self, x, source=None, target=None):
    with sow_statistics(mask=source):
      x = self.encoder(x)
    with sow_statistics(mask=target):
      return self.decoder(x)


@pytest.mark.slow
def test_contexts_of_the_model_itself():
  model, x = MasksOfItsParts(rngs()), uniform(N, 5)
  source, target = jnp.arange(N) < 2, jnp.arange(N) < 3
  y, stats = nnx.capture(model, Statistics)(x, source, target)
  assert [statistics(stats, part).rows for part in ("encoder", "decoder")] == [2, 3]
  # Evaluation captures nothing, with and without jit.
  chex.assert_trees_all_equal(model(x), y)
  chex.assert_trees_all_close(nnx.jit(lambda model, x: model(x))(model, x), y)
  assert not nnx.state(model, Statistics)


def test_without_context():
  model, x = MLP(rngs()), uniform(N, 5)
  _, stats = nnx.capture(model, Statistics)(x)
  tx = bnp_optax.scale_by_bnp(debias=False)
  params = nnx.state(model)
  with pytest.raises(ValueError, match="no LayerStatistics"):
    tx.update(params, tx.init(params), stats=stats)


def test_a_function_traced_before_without_the_context():
  model, x = MLP(rngs()), uniform(N, 5)
  forward = nnx.jit(lambda model, x: nnx.capture(model, Statistics)(x)[1])
  assert not jax.tree.leaves(forward(model, x))
  with sow_statistics():
    assert jax.tree.leaves(forward(model, x))


def test_layers_of_a_model_that_holds_no_arrays():
  abstract = nnx.eval_shape(lambda: MLP(nnx.Rngs(0)))
  layers = bnp_optax.nnx.layers(abstract, jax.ShapeDtypeStruct((N, 5), jnp.float32))
  assert layers == bnp_optax.nnx.layers(MLP(rngs()), uniform(N, 5))
  assert set(layers) == {("layers", str(i), "kernel") for i in range(3)}


# Threads, exceptions, nesting.


def test_nothing_is_left_after_an_exception():
  class Failing(nnx.Module):
    def __init__(self, rngs):
      self.layer = nnx.Linear(5, 4, rngs=rngs)

    def __call__(self, x):
      self.layer(x)
      raise RuntimeError("on purpose")

  model = Failing(rngs())
  with contextlib.suppress(RuntimeError):
    loss_fn(model, uniform(N, 5))
  assert [kind.__dict__["__call__"] for kind in KINDS] == ORIGINALS
  with pytest.raises(RuntimeError, match="on purpose"):
    bnp_optax.nnx.layers(model, uniform(N, 5))


def test_nested_contexts():
  model, x = MLP(rngs()), uniform(N, 2, 5)

  @nnx.jit
  def nested(model):
    with sow_statistics():
      (_, inner) = loss_fn(model, x, example_axes=2)
      _, outer = nnx.capture(model, Statistics)(x)
    return inner, outer

  inner, outer = nested(model)
  assert statistics(inner, "layers", 0).examples == 2 * N
  assert statistics(outer, "layers", 0).examples == N


def test_threads():
  """Sixteen threads trace different models at once, one in two of them without statistics."""

  def work(i):
    model = nnx.eval_shape(lambda: nnx.Linear(2 + i, 3, rngs=rngs()))
    x = jax.ShapeDtypeStruct((2 + i, 2 + i), jnp.float32)
    for _ in range(5):
      if i % 2:
        assert nnx.eval_shape(lambda model, x: model(x), model, x).shape == (2 + i, 3)
      else:
        with sow_statistics():
          run = lambda model, x: nnx.capture(model, Statistics)(x)
          _, stats = nnx.eval_shape(run, model, x)
        assert stats["layer_statistics"].get_value().total.shape == (2 + i,)
        assert len(bnp_optax.nnx.layers(model, x)) == 1
    return i

  with concurrent.futures.ThreadPoolExecutor(16) as pool:
    assert list(pool.map(work, range(16))) == list(range(16))


@pytest.mark.slow
@pytest.mark.parametrize(
  "make",
  [
    lambda: optax.chain(bnp_optax.scale_by_bnp(), optax.sgd(0.1)),
    lambda: bnp_optax.bnp(optax.sgd(0.1, momentum=0.9)),
  ],
)
def test_parameters_with_partitioning_metadata(make):
  kernel = nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, "model"))
  x = uniform(N, 5)

  def train(model):
    optimizer = nnx.Optimizer(model, make(), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
      grads, stats = nnx.grad(loss_fn, has_aux=True)(model, x)
      optimizer.update(model, grads, stats=stats)

    for _ in range(2):
      step(model, optimizer)
    return jax.device_get(nnx.to_pure_dict(nnx.state(model, nnx.Param)))

  expected = train(nnx.Linear(5, 8, rngs=rngs()))
  axis_types = (jax.sharding.AxisType.Explicit,) * 2
  with jax.set_mesh(jax.make_mesh((2, 4), ("data", "model"), axis_types=axis_types)):
    actual = train(nnx.Linear(5, 8, kernel_init=kernel, rngs=rngs()))
  chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_a_param_shared_by_two_modules_is_in_the_table_across_a_transform():
  class Tied(nnx.Module):
    def __init__(self, rngs):
      self.a, self.b = (nnx.Linear(4, 4, rngs=rngs) for _ in range(2))
      self.b.kernel = self.a.kernel

    def __call__(self, x):
      return nnx.remat(lambda module, h: module(h))(self.b, self.a(x))

  with pytest.raises(ValueError, match="b/kernel: its kernel is shared with another module"):
    bnp_optax.nnx.layers(Tied(rngs()), uniform(N, 4), strict=True)


def test_missing_layers_are_named_with_their_kernels():
  model = nnx.LoRA(5, 2, 4, rngs=rngs())
  layers = bnp_optax.nnx.layers(model, uniform(N, 5))
  params = nnx.state(model, nnx.LoRAParam)
  tx = bnp_optax.scale_by_bnp(layers=layers, debias=False)
  stats = {"layer_statistics": bnp_optax.LayerStatistics(*[jnp.ones(2)] * 5)}
  with pytest.raises(ValueError, match="No statistics for lora_a, lora_b"):
    tx.update(params, tx.init(params), stats=stats)


class Attends(nnx.Module):
  """Cross-attention: one call with inputs that have different padding."""

  def __init__(self, rngs):
    options = {"qkv_features": 8, "decode": False, "rngs": rngs}
    self.attention = nnx.MultiHeadAttention(2, 5, **options)
    self.head = nnx.Linear(5, 2, rngs=rngs)

  def __call__(self, target, source):
    return self.head(self.attention(target, source))


def padding(lengths, time):
  return np.arange(time)[None] < np.array(lengths)[:, None]


@nnx.jit
def attention_statistics(model, x, y, source, target):
  def mask(layer, inputs):
    if layer is model.head:
      return None
    return source if layer in (model.attention.key, model.attention.value) else target

  with sow_statistics(mask=mask):
    return nnx.capture(model, Statistics)(x, y)[1]


def test_masks_by_a_function_of_the_layer():
  """Keys and values of cross-attention have the padding of the source, of equal shape here."""
  model, x, y = build(Attends), uniform(N, 4, 5), uniform(N, 4, 5, seed=1)
  source, target = padding([2, 4, 1], 4), padding([3, 3, 2], 4)
  stats = attention_statistics(model, x, y, source, target)
  for name, mask, inputs in (("query", target, x), ("key", source, y), ("value", source, y)):
    found, rows = statistics(stats, "attention", name), np.asarray(inputs)[mask]
    assert found.rows == len(rows)
    np.testing.assert_allclose(found.mean, rows.mean(0), rtol=1e-6)
  assert statistics(stats, "attention", "out").rows == int(target.sum())
  assert statistics(stats, "head").rows == N * 4


def test_a_function_traced_before_with_the_masks_of_another_function():
  model, x, y = build(Attends), uniform(N, 4, 5), uniform(N, 6, 5)
  forward = nnx.jit(lambda model: model(x, y))
  for lengths in ([2, 4, 1], [6, 5, 4]):
    masks = {4: padding(lengths, 4), 6: padding(lengths, 6)}
    with sow_statistics(mask=lambda layer, x, masks=masks: masks[x.shape[1]]):
      stats = nnx.capture(forward, Statistics)(model)[1]
    for name, length in (("query", 4), ("key", 6)):
      assert statistics(stats, "attention", name).rows == int(masks[length].sum())


@pytest.mark.slow
@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["plain", "jit"])
def test_masks_of_tokens_that_differ_need_the_number_of_examples(transform):
  """The query counts other tokens than the key, both of one shape."""
  model, x = build(Attends), uniform(N, 4, 5)
  graph, state = nnx.split(model)

  def forward(state, source, target, **context):
    model = nnx.merge(graph, state)
    mask = lambda layer, _: source if layer is model.attention.key else target
    with sow_statistics(mask=mask, example_axes=2, **context):
      return nnx.capture(model, Statistics)(x, x)[1]

  source, target = padding([2, 4, 1], 4), padding([3, 3, 2], 4)
  with pytest.raises(ValueError, match=r"disagree .* 12 before its mask in .* Pass the number"):
    transform(forward)(state, source, target)
  stats = transform(functools.partial(forward, examples=8))(state, source, target)
  assert statistics(stats, "attention", "key").examples == 8
  one = transform(lambda state, mask: forward(state, mask, mask))(state, source)
  assert statistics(one, "head").examples == 7


def test_a_function_as_mask_that_gives_another_shape_is_refused():
  model, x = nnx.Linear(5, 4, rngs=rngs()), uniform(N, 5)
  with (
    pytest.raises(ValueError, match=r"mask of shape \(2,\) does not fit .* by a function"),
    sow_statistics(mask=lambda layer, x: np.ones(2)),
  ):
    nnx.capture(model, Statistics)(x)


def test_masks_by_prefix_are_refused():
  with (
    pytest.raises(ValueError, match="an NNX module has no path"),
    sow_statistics(mask={"encoder": np.ones(3)}),
  ):
    pass


class Nested(nnx.Module):
  """A model that enters a context itself, with an embedding, a norm and a matrix of its own."""

  def __init__(self, rngs):
    self.embed = nnx.Embed(9, 4, rngs=rngs)
    self.norm = nnx.BatchNorm(4, axis_name="batch", rngs=rngs)
    self.matrix = nnx.Param(jnp.ones((4, 4)))
    self.inner = nnx.Conv(4, 3, (3,), rngs=rngs)
    self.head = nnx.Linear(3, 2, rngs=rngs)

  def __call__(self, tokens):
    x = self.norm(self.embed(tokens)) @ self.matrix[...]
    with sow_statistics(exact_windows=True):
      x = self.inner(x)
    return self.head(x)


def test_one_jitted_function_in_two_contexts_of_the_model():
  class Model(nnx.Module):
    def __init__(self, rngs):
      self.plain, self.exact = (nnx.Conv(3, 3, (2,), rngs=rngs) for _ in range(2))

    def __call__(self, x):
      call = nnx.jit(lambda layer, x: layer(x))
      for layer, exact_windows in ((self.plain, False), (self.exact, True)):
        with sow_statistics(exact_windows=exact_windows):
          x = call(layer, x)
      return x

  layers = bnp_optax.nnx.layers(Model(rngs()), uniform(N, 6, 3))
  assert not layers["plain", "kernel"].exact_windows
  assert layers["exact", "kernel"].exact_windows


def test_layers_with_a_context_inside_and_a_mapped_axis():
  model, tokens = build(Nested), jax.ShapeDtypeStruct((2, 5), jnp.int32)
  layers = functools.partial(bnp_optax.nnx.layers, model, tokens, axis_name="batch")
  with pytest.raises(
    ValueError, match=r"parameters:\n  matrix: no linear layer.*\nName in ignore="
  ):
    layers(strict=True)
  table = layers(strict=True, ignore=["matrix"])
  assert {path: layout.exact_windows for path, layout in table.items()} == {
    ("head", "kernel"): False,
    ("inner", "kernel"): True,
  }
  kinds = {entry.path[0]: entry.kind for entry in table.entries}
  assert (kinds["embed"], kinds["norm"], kinds["matrix"]) == ("Embed", "BatchNorm", "Nested")
  with pytest.raises(NameError, match="unbound axis name") as error:
    bnp_optax.nnx.layers(model, tokens)
  assert any("axis_name='batch'" in note for note in error.value.__notes__)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit])
@pytest.mark.parametrize("metadata", [{}, {"kernel_metadata": {"out_sharding": ("data", "model")}}])
def test_layers_and_survey_under_a_mesh(kind, metadata):
  make = functools.partial(nnx.Linear, 8, 2, **metadata)
  x = uniform(4, 8)
  plain = bnp_optax.nnx.layers(nnx.Linear(8, 2, rngs=rngs()), x)
  expected = bnp_optax.conditioning.survey(*nnx.split(nnx.Linear(8, 2, rngs=rngs())), x)
  with jax.set_mesh(jax.make_mesh((2, 2), ("data", "model"), axis_types=(kind, kind))):
    model = make(rngs=rngs())
    assert bnp_optax.nnx.layers(model, x) == plain
    found = bnp_optax.conditioning.survey(*nnx.split(model), x)
  np.testing.assert_allclose(found.layers[0].after, expected.layers[0].after, rtol=1e-5)


def test_a_param_that_changes_its_value_is_refused():
  class Scaled(nnx.Param):
    def get_value(self, **kwargs):
      return 0.1 * super().get_value(**kwargs)

  model = nnx.Linear(5, 4, rngs=rngs())
  model.kernel = Scaled(model.kernel[...])
  with pytest.raises(ValueError, match="kernel: its kernel is a function of its parameter"):
    bnp_optax.nnx.layers(model, jnp.ones((3, 5)), strict=True)
  with sow_statistics():
    _, stats = nnx.capture(model, Statistics)(jnp.ones((3, 5)))
  params, tx = nnx.state(model, nnx.Param), bnp_optax.scale_by_bnp()
  with pytest.raises(ValueError, match=r"No statistics for .*: its kernel is a function"):
    tx.update(params, tx.init(params), stats=stats)


class Frozen(nnx.Variable):
  """A parameter that is not trained."""


@pytest.mark.parametrize("freeze", [Frozen, jnp.asarray])
def test_layers_that_are_frozen_by_the_type_of_their_parameters(freeze):
  body, head = nnx.Linear(5, 4, rngs=rngs()), nnx.Linear(4, 2, rngs=rngs())
  body.kernel, body.bias = freeze(body.kernel[...]), freeze(body.bias[...])
  model, x = nnx.Sequential(body, head), jnp.ones((3, 5))
  layers = bnp_optax.nnx.layers(model, x, strict=True)
  assert [entry.path for entry in layers.entries] == [("layers", "1", "kernel")]
  with sow_statistics():
    _, stats = nnx.capture(model, Statistics)(x)
  params, tx = nnx.state(model, nnx.Param), bnp_optax.scale_by_bnp(layers=layers)
  updates, _ = tx.update(params, tx.init(params), stats=stats)
  assert jax.tree.structure(updates) == jax.tree.structure(params)
