"""Tests of `Tapped`: the statistics that arrive with the gradient are those that are sown."""

from flax import nnx, serialization
from flax.core import FrozenDict
import flax.linen as nn
from flax.training import dynamic_scale
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bnp_optax
from bnp_optax import _taps
from bnp_optax._statistics import LayerStatistics, merge_call_axes
from bnp_optax._trees import by_kernel, unboxed
from tests import problems

pytestmark = pytest.mark.usefixtures("x64")

DTYPE = {"param_dtype": jnp.float64}


def normal(*shape, seed=0):
  return jax.device_put(np.random.default_rng(seed).normal(1, 2, shape))


def loss(outputs):
  """Return a mean over examples, the first axis."""
  return jnp.mean(jnp.sum(jnp.sin(outputs), range(1, outputs.ndim)))


def from_taps(grads):
  return by_kernel(_taps.read_taps(unboxed(grads), has_layers=True), LayerStatistics)


def assert_close(actual, expected, rtol=1e-12):
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol, 1e-14), actual, expected)


def assert_same_statistics(actual, expected, layers=None, rtol=1e-12):
  assert set(actual) == set(expected)
  for path, x in expected.items():
    calls = layers[path].calls if layers else ()
    x = merge_call_axes(x, calls)
    for field in ("examples", "rows", "mean", "variance", "mean_square"):
      assert_close(getattr(actual[path], field), getattr(x, field), rtol)


def sown_linen(model, params, x, **options):
  """Return the gradient and the statistics as `sow_statistics` gives them."""

  def loss_fn(params):
    with bnp_optax.linen.sow_statistics(**options):
      y, aux = model.apply({"params": params}, x, mutable=["intermediates"])
    return loss(y), aux["intermediates"]

  return jax.jit(jax.grad(loss_fn, has_aux=True))(params)


# Layers.


class Layer(nn.Module):
  """Calls a function of the inputs that makes layers."""

  call: object

  @nn.compact
  def __call__(self, x):
    return self.call(x)


def tied(x):
  dense = nn.remat(nn.Dense)(4, **DTYPE)
  return dense(nn.tanh(dense(x)))


class Block(nn.Module):
  @nn.compact
  def __call__(self, x, _):
    return nn.tanh(nn.Dense(4, **DTYPE)(x)), None


AXES = {"params": 0, "intermediates": 0}


def scanned_layers(x):
  block = nn.scan(Block, variable_axes=AXES, split_rngs={"params": True}, length=3)
  return block()(x, None)[0]


def ensemble(x):
  options = {"variable_axes": AXES, "split_rngs": {"params": True}, "axis_size": 3}
  return nn.vmap(nn.Dense, in_axes=None, out_axes=1, **options)(2, **DTYPE)(x)


def recurrent(cell, **options):
  return lambda x: nn.RNN(cell(3, **DTYPE), **options)(x)


SOWN = {"variable_axes": {"intermediates": 0}}
LINEN = {
  "dense": (lambda x: nn.Dense(3, **DTYPE)(x), (6, 4)),
  "sequence": (lambda x: nn.Dense(3, use_bias=False, **DTYPE)(x), (6, 5, 4)),
  "conv": (lambda x: nn.Conv(3, (3, 3), strides=2, **DTYPE)(x), (6, 7, 7, 4)),
  "grouped": (lambda x: nn.Conv(4, (3,), feature_group_count=2, **DTYPE)(x), (6, 7, 4)),
  "local": (lambda x: nn.ConvLocal(3, (3,), **DTYPE)(x), (6, 5, 4)),
  "transposed": (
    lambda x: nn.ConvTranspose(3, (3,), (2,), transpose_kernel=True, **DTYPE)(x),
    (6, 5, 4),
  ),
  "attention": (lambda x: nn.MultiHeadDotProductAttention(2, **DTYPE)(x), (6, 5, 4)),
  "general": (lambda x: nn.DenseGeneral((2, 3), axis=(-2, -1), **DTYPE)(x), (6, 5, 4)),
  "batch dims": (
    lambda x: nn.DenseGeneral(3, batch_dims=(0,), **DTYPE)(jnp.swapaxes(x, 0, 1)).swapaxes(0, 1),
    (6, 5, 4),
  ),
  "einsum": (lambda x: nn.Einsum((3, 4), "btd,fd->btf", use_bias=False, **DTYPE)(x), (6, 5, 4)),
  "weight norm": (lambda x: nn.WeightNorm(nn.Dense(3, **DTYPE), **DTYPE)(x), (6, 4)),
  "GRU": (recurrent(nn.GRUCell, **SOWN), (6, 5, 4)),
  "LSTM": (recurrent(nn.OptimizedLSTMCell, **SOWN), (6, 5, 4)),
  "tied, remat": (tied, (6, 4)),
  "scan": (scanned_layers, (6, 4)),
  "vmap": (ensemble, (6, 4)),
}


@pytest.mark.slow
@pytest.mark.parametrize("exact_windows", [False, True])
@pytest.mark.parametrize("name", LINEN)
def test_linen(name, exact_windows):
  call, shape = LINEN[name]
  if exact_windows and "conv" not in name:
    return
  model, x, options = Layer(call), normal(*shape), {"exact_windows": exact_windows}
  tapped = bnp_optax.linen.Tapped(model, examples=len(x), **options)
  layers = bnp_optax.linen.layers(model, x, **options)
  params = jax.jit(tapped.init)(jax.random.key(0), x)["params"]
  plain = jax.jit(model.init)(jax.random.key(0), x)["params"]
  assert_close(bnp_optax.linen.remove_taps(params), plain, rtol=0)

  grads = jax.jit(jax.grad(lambda p: loss(tapped.apply({"params": p}, x))))(params)
  sown_grads, stats = sown_linen(model, plain, x, **options)
  assert_close(bnp_optax.linen.remove_taps(grads), sown_grads)
  assert_same_statistics(from_taps(grads), by_kernel(stats, LayerStatistics), layers)

  tx = problems.compiled(bnp_optax.scale_by_bnp(layers=layers))
  updates, _ = tx.update(grads, tx.init(params))
  expected, _ = tx.update(sown_grads, tx.init(plain), stats=stats)
  assert_close(bnp_optax.linen.remove_taps(updates), expected)


class Deep(nnx.Module):
  def __init__(self, rngs):
    self.blocks = nnx.vmap(lambda rngs: nnx.Linear(4, 4, rngs=rngs, **DTYPE))(rngs.split(3))

  def __call__(self, x):
    call = nnx.scan(lambda x, block: jnp.tanh(block(x)), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    return call(x, self.blocks)


class Tied(nnx.Module):
  def __init__(self, rngs):
    self.dense = nnx.Linear(4, 4, rngs=rngs, **DTYPE)

  def __call__(self, x):
    call = nnx.remat(lambda dense, x: dense(x))
    return call(self.dense, jnp.tanh(call(self.dense, x)))


def gru(axes):
  return lambda r: nnx.RNN(nnx.GRUCell(4, 3, rngs=r, **DTYPE), state_axes=axes)


STATISTICS = nnx.StateAxes({bnp_optax.nnx.Statistics: 0, ...: None})
NNX = {
  "linear": (lambda r: nnx.Linear(4, 3, rngs=r, **DTYPE), (6, 4)),
  "LoRA": (
    lambda r: nnx.LoRA(4, 2, 3, base_module=nnx.Linear(4, 3, rngs=r, **DTYPE), rngs=r, **DTYPE),
    (6, 4),
  ),
  "attention": (lambda r: nnx.MultiHeadAttention(2, 4, decode=False, rngs=r, **DTYPE), (6, 5, 4)),
  "conv": (lambda r: nnx.Conv(4, 6, (3,), feature_group_count=2, rngs=r, **DTYPE), (6, 5, 4)),
  "transposed": (lambda r: nnx.ConvTranspose(4, 6, (3,), rngs=r, **DTYPE), (6, 5, 4)),
  "einsum": (lambda r: nnx.Einsum("btd,df->btf", (4, 3), rngs=r, **DTYPE), (6, 5, 4)),
  "GRU": (gru(STATISTICS), (6, 5, 4)),
  "scan": (Deep, (6, 4)),
  "tied, remat": (Tied, (6, 4)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NNX)
@pytest.mark.usefixtures("standard_promotion")
def test_nnx(name):
  layer, shape = NNX[name]
  make = nnx.jit(lambda: layer(nnx.Rngs(0)))
  x, plain = normal(*shape), make()

  def loss_fn(model):
    with bnp_optax.nnx.sow_statistics():
      y, stats = nnx.capture(model, bnp_optax.nnx.Statistics)(x)
    return loss(y), stats

  tapped = bnp_optax.nnx.Tapped(make(), x, examples=len(x))
  grads = nnx.jit(nnx.grad(lambda model: loss(model(x))))(tapped)
  sown_grads, stats = nnx.jit(nnx.grad(loss_fn, has_aux=True))(plain)
  actual = {path[1:]: s for path, s in from_taps(grads).items()}
  layers = bnp_optax.nnx.layers(plain, x)
  assert_same_statistics(actual, by_kernel(stats, LayerStatistics), layers)

  tapped_layers = bnp_optax.nnx.layers(tapped, x)
  assert [path[1:] for path in tapped_layers] == [*layers]
  assert len(tapped_layers.entries) == len(layers.entries)
  adam = optax.adam(1e-2)
  optimizer = nnx.Optimizer(tapped, bnp_optax.bnp(adam, layers=tapped_layers), wrt=nnx.Param)
  update = nnx.jit(lambda optimizer, *args, **extra: optimizer.update(*args, **extra))
  update(optimizer, tapped, grads)
  assert not any(map(np.any, jax.tree.leaves(nnx.state(tapped, bnp_optax.nnx.Tap))))
  sown_optimizer = nnx.Optimizer(plain, bnp_optax.bnp(adam, layers=layers), wrt=nnx.Param)
  update(sown_optimizer, plain, sown_grads, stats=stats)
  bnp_optax.nnx.remove_taps(tapped)
  assert_close(nnx.state(tapped.model, nnx.Param), nnx.state(plain, nnx.Param))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Using 'Module.sow:DeprecationWarning")
def test_nnx_state_and_captures_of_the_model_remain():
  class Model(nnx.Module):
    def __init__(self, rngs):
      self.norm = nnx.BatchNorm(4, rngs=rngs)
      self.dense = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
      x = self.norm(x)
      self.sow(nnx.Intermediate, "normalized", x)
      return self.dense(x)

  x = jnp.asarray(normal(6, 4), jnp.float32)
  tapped = bnp_optax.nnx.Tapped(Model(nnx.Rngs(0)), x, examples=6)
  assert not np.any(tapped.model.norm.mean)
  _, captured = nnx.capture(tapped, nnx.Intermediate)(x)
  assert np.all(tapped.model.norm.mean[...] != 0)
  assert jax.tree.leaves(captured)
  assert not hasattr(tapped.model.dense, "tap_index")


@pytest.mark.slow
def test_nnx_layers_beside_a_linen_module():
  """ToNNX takes every attribute for a Linen variable."""

  class Model(nnx.Module):
    def __init__(self, rngs):
      self.tower = nnx.bridge.ToNNX(nn.Dense(4, **DTYPE), rngs=rngs)
      self.tower.lazy_init(x)
      self.head = nnx.Linear(4, 3, rngs=rngs, **DTYPE)

    def __call__(self, x):
      return self.head(self.tower(x))

  x = normal(6, 4)
  tapped = bnp_optax.nnx.Tapped(Model(nnx.Rngs(0)), x, examples=6)
  stats = from_taps(nnx.grad(lambda model: loss(model(x)))(tapped))
  assert [path for path in stats] == [("model", "head", "kernel")]
  assert_close(stats["model", "head", "kernel"].mean, tapped.model.tower(x).mean(0))


@pytest.mark.slow
def test_nnx_vmap_over_a_model_that_is_closed_over():
  x = normal(6, 4)
  model = bnp_optax.nnx.Tapped(
    nnx.Linear(4, 3, rngs=nnx.Rngs(0), **DTYPE), x[0], examples=6, example_axes=0
  )
  grads = nnx.grad(lambda model: jnp.mean(jnp.sin(jax.vmap(model)(x))))(model)
  (stats,) = from_taps(grads).values()
  assert_close((stats.examples, stats.rows), (6, 6))
  assert_close(stats.variance, jnp.var(x, 0))


# Transformations of the gradient.


class Model(nn.Module):
  """A convolution, and a layer that is called twice."""

  @nn.compact
  def __call__(self, x):
    x = nn.tanh(nn.Conv(3, (2,), padding="VALID", **DTYPE)(x))
    x = x.reshape(*x.shape[:-2], -1)
    dense = nn.Dense(x.shape[-1], **DTYPE)
    return nn.Dense(2, **DTYPE)(dense(nn.tanh(dense(x))))


X = (8, 3, 2)
TAPPED = bnp_optax.linen.Tapped(Model(), examples=8)
SINGLE = bnp_optax.linen.Tapped(Model(), examples=8, example_axes=0)


@pytest.fixture(scope="module")
def whole():
  """The parameters with taps, a batch, and its gradient and statistics as they are sown."""
  x = normal(*X)
  params = jax.jit(TAPPED.init)(jax.random.key(0), x)["params"]
  return params, x, *sown_linen(Model(), bnp_optax.linen.remove_taps(params), x)


def batch_loss(params, x):
  return loss(TAPPED.apply({"params": params}, x))


def single_loss(params, x):
  return loss(SINGLE.apply({"params": params}, x)[None])


def mean(tree):
  return jax.tree.map(lambda x: jnp.mean(x, 0), tree)


def split(x):
  return x.reshape(4, 2, *x.shape[1:])


def micro_batches(params, x):
  return mean(jax.lax.map(lambda x: jax.grad(batch_loss)(params, x), split(x)))


def sum_of_losses(params, x):
  return jax.grad(lambda p: sum(batch_loss(p, x) for x in split(x)) / 4)(params)


def grad_of_vmap(params, x):
  return jax.grad(lambda p: jnp.mean(jax.vmap(single_loss, (None, 0))(p, x)))(params)


def vmap_of_grad(params, x):
  return mean(jax.vmap(jax.grad(single_loss), (None, 0))(params, x))


def vmap_of_batches(params, x):
  return jax.grad(lambda p: jnp.mean(jax.vmap(batch_loss, (None, 0))(p, split(x))))(params)


def checkpoint(params, x):
  return jax.grad(jax.checkpoint(batch_loss))(params, x)


def loss_scale(params, x):
  scaler = dynamic_scale.DynamicScale(scale=2.0**20)
  with jax.numpy_dtype_promotion("standard"):
    return scaler.value_and_grad(batch_loss)(params, x)[3]


def devices(check_vma):
  mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
  batch, all_devices = jax.P("d"), jax.P()

  def step(params, x):
    if not check_vma:
      return jax.lax.pmean(jax.grad(batch_loss)(params, x), "d")
    # The gradient of what is equal on all devices is summed over them.
    return jax.tree.map(lambda x: x / 4, jax.grad(batch_loss)(params, x))

  specs = {"in_specs": (all_devices, batch), "out_specs": all_devices, "check_vma": check_vma}
  return jax.shard_map(step, mesh=mesh, **specs)


def negated(params, x):
  return jax.tree.map(jnp.negative, jax.grad(lambda p: -batch_loss(p, x))(params))


GRADIENTS = {
  f.__name__: f
  for f in (
    *(micro_batches, sum_of_losses, grad_of_vmap, vmap_of_grad, vmap_of_batches, checkpoint),
    negated,
    loss_scale,
  )
} | {"pmean": devices(check_vma=False), "psum": devices(check_vma=True)}


@pytest.mark.slow
@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_of_parts_have_the_statistics_of_the_whole(name, whole):
  params, x, grads, stats = whole
  actual = jax.jit(GRADIENTS[name])(params, x)
  # DynamicScale returns float32.
  rtol = 1e-6 if name == "loss_scale" else 1e-12
  assert_same_statistics(from_taps(actual), by_kernel(stats, LayerStatistics), rtol=rtol)
  assert_close(bnp_optax.linen.remove_taps(actual), grads, rtol)


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
def test_multi_steps(whole):
  params, x, grads, stats = whole
  plain = bnp_optax.linen.remove_taps(params)
  tx = optax.chain(bnp_optax.scale_by_bnp(), optax.sgd(0.1))
  steps = problems.compiled(problems.multi_steps(tx, 4))
  state = steps.init(params)
  for part in split(x):
    updates, state = steps.update(jax.jit(jax.grad(batch_loss))(params, part), state, params)
  expected, _ = problems.compiled(tx).update(grads, tx.init(plain), stats=stats)
  assert_close(bnp_optax.linen.remove_taps(updates), expected)


@pytest.mark.slow
@pytest.mark.parametrize("inner", [optax.yogi(1e-2), optax.add_noise(0.1, 0.55, 0)])
@pytest.mark.usefixtures("standard_promotion")
def test_no_inner_optimizer_moves_the_taps(whole, inner):
  """Weight decay before BNP would add a part of their values to the statistics."""
  params, x, *_ = whole
  tx = problems.compiled(bnp_optax.bnp(inner))
  updates, _ = tx.update(jax.jit(jax.grad(batch_loss))(params, x), tx.init(params), params)
  norms = (optax.tree.norm(updates), optax.tree.norm(bnp_optax.linen.remove_taps(updates)))
  assert norms[0] == norms[1] > 0


@pytest.mark.slow
def test_taps_that_were_cast_are_refused():
  tapped = bnp_optax.linen.Tapped(nn.Dense(3), examples=8)
  x = normal(8, 5).astype(jnp.float32)
  params = tapped.init(jax.random.key(0), x)["params"]
  grads = jax.grad(lambda p: loss(tapped.apply({"params": p}, x)))(params)
  tx = bnp_optax.scale_by_bnp()
  state = tx.init(params)
  for dtype in (jnp.float16, jnp.bfloat16):
    cast = jax.tree.map(lambda g, d=dtype: g.astype(d), grads)
    problems.raises(f"its tap was cast to {jnp.dtype(dtype)}", tx.update, cast, state, params)


@pytest.mark.slow
@pytest.mark.parametrize("exponent", [40, 55, 62, 70, 80])
def test_large_loss_scales_in_float32(exponent):
  """Statistics are right, or they are left out and counted."""
  model, x = bnp_optax.linen.Tapped(nn.Dense(3), examples=8), normal(8, 5).astype(jnp.float32)
  params = model.init(jax.random.key(0), x)
  scale = np.float32(2.0**exponent)
  grads = jax.grad(lambda p: scale * loss(model.apply(p, x)))(params)
  grads = jax.tree.map(lambda g: g / scale, grads)
  tx = bnp_optax.scale_by_bnp()
  updates, state = tx.update(grads, tx.init(params))
  assert all(np.all(np.isfinite(u)) for u in jax.tree.leaves(updates))
  assert state.nonfinite_count == int(exponent > 50)
  if exponent <= 50:
    mean, variance = (x["params"]["kernel"] for x in (state.input_mean, state.input_variance))
    np.testing.assert_allclose(mean, np.mean(x, 0), rtol=1e-5)
    np.testing.assert_allclose(variance, np.var(x, 0), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("limit", [1e-3, 1e3])
def test_clipping_before_bnp_clips_the_gradient_alone(whole, limit):
  params, x, grads, stats = whole
  plain = bnp_optax.linen.remove_taps(params)
  clip = optax.clip_by_global_norm(limit)
  tx = problems.compiled(optax.chain(clip, bnp_optax.bnp(optax.adam(1e-2))))
  actual = jax.jit(jax.grad(batch_loss))(params, x)
  assert_close(optax.tree.norm(actual), optax.tree.norm(grads))
  with jax.numpy_dtype_promotion("standard"):
    updates, _ = tx.update(actual, tx.init(params), params)
    expected, _ = tx.update(grads, tx.init(plain), plain, stats=stats)
  assert_close(bnp_optax.linen.remove_taps(updates), expected)


# Life with taps in the parameters.


@pytest.mark.slow
def test_rnn_by_default_and_a_layer_that_does_not_reach_the_loss():
  class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
      h = nn.RNN(nn.GRUCell(3, **DTYPE))(x)
      nn.Dense(2, name="unused", **DTYPE)(h)
      return nn.Dense(2, name="head", **DTYPE)(h[:, -1])

  x, model = normal(4, 6, 3), bnp_optax.linen.Tapped(Net(), examples=4)
  params = jax.jit(model.init)(jax.random.key(0), x)["params"]
  grads = jax.jit(jax.grad(lambda p: loss(model.apply({"params": p}, x))))(params)
  stats = {path[-2]: s for path, s in from_taps(grads).items()}
  assert (stats["in"].examples, stats["in"].rows) == (4, 24)
  np.testing.assert_allclose(stats["in"].mean, np.mean(x, (0, 1)), 1e-12)
  np.testing.assert_allclose(stats["in"].variance, np.var(x, (0, 1)), 1e-12)
  assert (stats["unused"].examples, stats["unused"].rows) == (0, 0)

  tx = problems.compiled(bnp_optax.scale_by_bnp())
  updates, state = tx.update(grads, tx.init(params))
  assert all(np.all(np.isfinite(u)) for u in jax.tree.leaves(updates))
  assert state.nonfinite_count == 1
  assert not np.any(state.input_mean["unused"]["kernel"])
  np.testing.assert_allclose(
    state.input_mean["GRUCell_0"]["in"]["kernel"], np.mean(x, (0, 1)), 1e-12
  )


def test_nnx_rnn_by_default():
  x = normal(4, 6, 4)
  model = bnp_optax.nnx.Tapped(nnx.RNN(nnx.GRUCell(4, 3, rngs=nnx.Rngs(0), **DTYPE)), x, examples=4)
  stats = from_taps(nnx.jit(nnx.grad(lambda model: loss(model(x))))(model))
  dense_i = stats["model", "cell", "dense_i", "kernel"]
  assert (dense_i.examples, dense_i.rows) == (4, 24)
  np.testing.assert_allclose(dense_i.mean, np.mean(x, (0, 1)), 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("inner", [optax.adamw(1e-2), optax.lion(1e-2), optax.contrib.muon(1e-2)])
@pytest.mark.usefixtures("standard_promotion")
def test_taps_stay_zero(whole, inner):
  params, x, *_ = whole
  tx = problems.compiled(bnp_optax.bnp(inner))
  state = tx.init(params)
  for _ in range(2):
    updates, state = tx.update(jax.jit(jax.grad(batch_loss))(params, x), state, params)
    params = optax.apply_updates(params, updates)
  taps = [x for x in jax.tree.leaves(params, is_leaf=_taps.is_tap) if _taps.is_tap(x)]
  assert len(taps) == 3
  assert not any(np.any(x) for x in jax.tree.leaves(taps))
  assert np.any(updates["Dense_0"]["kernel"])


@pytest.mark.slow
def test_taps_are_added_to_parameters_and_serialized(whole):
  params, x, *_ = whole
  plain = bnp_optax.linen.remove_taps(params)
  assert set(plain["Dense_0"]) == {"kernel", "bias"}
  assert_close(plain, jax.jit(Model().init)(jax.random.key(0), x)["params"], rtol=0)
  _, variables = TAPPED.apply({"params": plain}, x, mutable=["params"])
  assert_close(variables["params"], params, rtol=0)
  restored = serialization.from_bytes(params, serialization.to_bytes(params))
  assert_close(restored, params, rtol=0)
  np.testing.assert_array_equal(
    TAPPED.apply({"params": plain}, x), Model().apply({"params": plain}, x)
  )


def test_map_params_reaches_every_parameter_once(whole):
  params, *_ = whole
  tx = bnp_optax.bnp(optax.adam(1e-2))
  state = tx.init(params)
  mapped = optax.tree.map_params(tx, lambda x: x + 1, state)
  assert jax.tree.structure(mapped) == jax.tree.structure(state)


def test_statistics_that_are_given_are_used(whole):
  params, x, _, stats = whole
  tx = problems.compiled(bnp_optax.scale_by_bnp())
  grads = jax.jit(jax.grad(batch_loss))(params, x)
  doubled = jax.tree.map(lambda x: 2 * x, stats)
  updates, _ = tx.update(grads, tx.init(params), stats=doubled)
  expected, _ = tx.update(
    bnp_optax.linen.remove_taps(grads), tx.init(bnp_optax.linen.remove_taps(params)), stats=doubled
  )
  assert_close(bnp_optax.linen.remove_taps(updates), expected, rtol=0)
  assert not np.any(updates["Dense_0"]["tap"]["total"])


def test_attributes_of_the_model():
  model = bnp_optax.linen.Tapped(nn.Dense(3), examples=2)
  assert model.features == 3
  with pytest.raises(AttributeError, match="nonsense"):
    _ = model.nonsense


def test_a_loss_of_a_derivative_of_the_model():
  """Forces are the gradient of an energy with respect to the inputs."""
  model, x = nn.Sequential([nn.Dense(4, **DTYPE), jnp.tanh, nn.Dense(1, **DTYPE)]), normal(6, 3)
  tapped = bnp_optax.linen.Tapped(model, examples=6)
  params = jax.jit(tapped.init)(jax.random.key(0), x)["params"]

  def loss_fn(params, apply=tapped.apply):
    def energy(x):
      energies = apply({"params": params}, x)
      return energies.sum(), energies

    forces, energies = jax.grad(energy, has_aux=True)(x)
    return loss(forces) + loss(energies)

  grads = jax.jit(jax.grad(loss_fn))(params)
  plain = bnp_optax.linen.remove_taps(params)
  plain_grads = jax.jit(jax.grad(loss_fn), static_argnums=1)(plain, model.apply)
  assert_close(bnp_optax.linen.remove_taps(grads), plain_grads)
  assert_same_statistics(
    from_taps(grads), by_kernel(sown_linen(model, plain, x)[1], LayerStatistics)
  )


@pytest.mark.slow
def test_an_array_before_the_batch_that_vmap_does_not_map():
  class Scaled(nn.Module):
    @nn.compact
    def __call__(self, scale, x):
      return nn.Dense(3, **DTYPE)(x * scale)

  x, scale = normal(6, 4), jnp.full(1, 2.0, jnp.float64)
  model = bnp_optax.linen.Tapped(Scaled(), examples=6, example_axes=0)
  params = model.init(jax.random.key(0), scale, x[0])

  def loss_fn(params):
    return loss(jax.vmap(lambda x: model.apply(params, scale, x))(x))

  (stats,) = from_taps(jax.grad(loss_fn)(params)).values()
  np.testing.assert_allclose((stats.examples, stats.rows), (6, 6), rtol=1e-6)
  np.testing.assert_allclose(stats.mean, 2 * x.mean(0), rtol=1e-6)


def test_a_loss_of_the_gradient_itself():
  model = nn.Sequential([nn.Dense(4, **DTYPE), jnp.tanh, nn.Dense(2, **DTYPE)])
  tapped, x = bnp_optax.linen.Tapped(model, examples=6), normal(6, 3)
  params = jax.jit(tapped.init)(jax.random.key(0), x)["params"]

  def loss_fn(params):
    value, grads = jax.value_and_grad(lambda p: loss(tapped.apply({"params": p}, x)))(params)
    return value + optax.tree.norm(bnp_optax.linen.remove_taps(grads), squared=True)

  stats = sown_linen(model, bnp_optax.linen.remove_taps(params), x)[1]
  actual = from_taps(jax.jit(jax.grad(loss_fn))(params))
  assert_same_statistics(actual, by_kernel(stats, LayerStatistics))


@pytest.mark.slow
def test_layers_on_all_positions_of_the_only_argument():
  class Flat(nn.Module):
    @nn.compact
    def __call__(self, x):
      return nn.Dense(3, **DTYPE)(x.reshape(-1, 4)).reshape(*x.shape[:-1], 3)

  model, x = bnp_optax.linen.Tapped(Flat(), examples=6), normal(6, 5, 4)
  params = model.init(jax.random.key(0), x)
  (stats,) = from_taps(jax.grad(lambda p: loss(model.apply(p, x)))(params)).values()
  assert (stats.examples, stats.rows) == (6, 30)


@pytest.mark.slow
def test_inputs_of_another_precision_than_the_tap():
  model = bnp_optax.linen.Tapped(nn.Dense(3, dtype=jnp.float64, **DTYPE), examples=6)
  params = model.init(jax.random.key(0), normal(6, 4).astype(jnp.float32))
  (stats,) = from_taps(jax.grad(lambda p: loss(model.apply(p, normal(6, 4))))(params)).values()
  assert (stats.rows, stats.total.dtype) == (6, jnp.float32)


def test_one_jitted_class_with_and_without_exact_windows():
  model, x = nn.jit(nn.Conv)(2, (2,), **DTYPE), normal(6, 5, 3)
  for exact_windows, features in ((False, 3), (True, 6)):
    tapped = bnp_optax.linen.Tapped(model, examples=6, exact_windows=exact_windows)
    params = tapped.init(jax.random.key(0), x)["params"]
    (tap,) = (x for x in params.values() if _taps.is_tap(x))
    assert tap["total"].shape == (features,)


def test_frozen_dictionaries_stay_frozen():
  params = FrozenDict({"layer": {"kernel": jnp.ones(3), "tap": dict.fromkeys(_taps._FIELDS, 0)}})
  plain = bnp_optax.linen.remove_taps(params)
  assert isinstance(plain, FrozenDict)
  assert [*plain["layer"]] == ["kernel"]


def test_every_init_adds_taps():
  x, key = normal(6, 4), jax.random.key(0)
  model = bnp_optax.linen.Tapped(nn.Dense(3, **DTYPE), examples=6)
  variables = model.init(key, x)
  outputs, other = model.init_with_output(key, x)
  assert outputs.shape == (6, 3)
  assert_close(other, variables, rtol=0)
  assert_close(model.lazy_init(key, jax.ShapeDtypeStruct(x.shape, x.dtype)), variables, rtol=0)
  problems.raises("a model that is bound reports nothing", model.bind, variables)


def test_a_tapped_model_within_another():
  """Each counts its own examples: 6 of the loss, and 5 latents."""
  x, latents, key = normal(6, 4), normal(5, 3), jax.random.key(0)
  inner = bnp_optax.linen.Tapped(nn.Dense(4, **DTYPE), examples=5)

  class Outer(nn.Module):
    @nn.compact
    def __call__(self, x, params):
      shift = inner.apply({"params": params}, latents).sum(0, keepdims=True)
      return nn.Dense(2, **DTYPE)(x + shift)

  outer = bnp_optax.linen.Tapped(Outer(), examples=6, batch_argument=0)
  params = jax.jit(inner.init)(key, latents)["params"]
  params = {"inner": params, "outer": jax.jit(outer.init)(key, x, params)["params"]}
  call = lambda p: loss(outer.apply({"params": p["outer"]}, x, p["inner"]))
  stats = from_taps(jax.jit(jax.grad(call))(params))
  found = {path[0]: (int(s.examples), int(s.rows)) for path, s in stats.items()}
  assert found == {"inner": (5, 5), "outer": (6, 6)}


def test_within_other_contexts_the_layers_report_to_those():
  x = normal(6, 4)
  model = bnp_optax.linen.Tapped(nn.Dense(3, **DTYPE), examples=6)
  plain = model.model.init(jax.random.key(0), x)
  with bnp_optax.linen.sow_statistics():
    _, aux = model.apply(plain, x, mutable=["intermediates"])
  assert [x.rows for x in by_kernel(aux["intermediates"], LayerStatistics).values()] == [6]
  assert str(bnp_optax.linen.layers(model, x)) == str(bnp_optax.linen.layers(model.model, x))


# Errors.


@pytest.mark.parametrize(("examples", "example_axes"), [(0, 1), (4, -1)])
def test_numbers_out_of_range(examples, example_axes):
  with pytest.raises(ValueError, match="examples= must be a number above 0"):
    bnp_optax.linen.Tapped(nn.Dense(3), examples=examples, example_axes=example_axes)
  model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match="examples= must be a number above 0"):
    bnp_optax.nnx.Tapped(model, normal(2, 4), examples=examples, example_axes=example_axes)


@pytest.mark.parametrize("examples", [None, jnp.asarray(4), "4"])
def test_the_number_of_examples_is_known(examples):
  with pytest.raises(ValueError, match="Tapped needs examples= as a number"):
    bnp_optax.linen.Tapped(nn.Dense(3), examples=examples)
  with pytest.raises(ValueError, match="Tapped needs examples= as a number"):
    bnp_optax.nnx.Tapped(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), normal(2, 4), examples=examples)


def test_no_axis_of_examples():
  model = bnp_optax.linen.Tapped(nn.Dense(3, **DTYPE), examples=4)
  params = model.init(jax.random.key(0), jnp.ones(4))
  problems.raises("no argument has 1 leading axes", model.apply, params, jnp.ones(()))


def test_keys_are_not_examples():
  class Noisy(nn.Module):
    @nn.compact
    def __call__(self, key, x):
      return nn.Dense(3, **DTYPE)(x + jax.random.normal(key[0], x.shape))

  model, x = bnp_optax.linen.Tapped(Noisy(), examples=6), normal(6, 4)
  keys = jax.random.split(jax.random.key(0), 2)
  params = model.init(jax.random.key(0), keys, x)
  (stats,) = from_taps(jax.grad(lambda p: loss(model.apply(p, keys, x)))(params)).values()
  assert stats.examples == 6


@pytest.mark.parametrize("other", [np.ones(1), np.ones((2,), np.uint32), {"a": np.ones((5, 4))}])
def test_an_array_before_the_batch_is_refused(other):
  class Model(nn.Module):
    @nn.compact
    def __call__(self, other, x):
      others = [jnp.sum(a).astype(x.dtype) for a in jax.tree.leaves(other)]
      return nn.Dense(3, **DTYPE)(x + sum(others))

  model, x = bnp_optax.linen.Tapped(Model(), examples=6), normal(6, 4)
  params = model.init(jax.random.key(0), other, x)
  for _ in range(2):
    problems.raises(
      "counts .* along the first array .* have other numbers: there are 6 in layer Dense_0",
      *(model.apply, params, other, x),
    )
  model = bnp_optax.linen.Tapped(Model(), examples=6, batch_argument=1)
  (stats,) = from_taps(jax.grad(lambda p: loss(model.apply(p, other, x)))(params)).values()
  assert stats.examples == 6


def test_an_array_before_the_batch_is_refused_in_nnx():
  class Model(nnx.Module):
    def __init__(self, rngs):
      self.dense = nnx.Linear(4, 3, rngs=rngs, **DTYPE)

    def __call__(self, other, x):
      return self.dense(x + other[0])

  x = normal(6, 4)
  model = bnp_optax.nnx.Tapped(Model(nnx.Rngs(0)), jnp.ones(1), x, examples=6)
  problems.raises("other numbers: there are 6 in layer Linear", model, jnp.ones(1), x)
  model = bnp_optax.nnx.Tapped(model.model, jnp.ones(1), x, examples=6, batch_argument="x")
  grads = nnx.grad(lambda model: loss(model(jnp.ones(1), x=x)))(model)
  assert [x.examples for x in from_taps(grads).values()] == [6]


@pytest.mark.slow
def test_layers_with_other_numbers_of_rows_are_not_the_examples():
  """The second layer has 5 rows, those of a table of positions, and the model is called twice."""

  class Model(nn.Module):
    @nn.compact
    def __call__(self, x, positions):
      x = nn.jit(nn.Dense)(3, **DTYPE)(x)
      return x + jnp.sum(nn.Dense(3, **DTYPE)(positions), 0, keepdims=True)

  model, x = bnp_optax.linen.Tapped(Model(), examples=6), normal(6, 4)
  params = model.init(jax.random.key(0), x, normal(5, 2))
  for _ in range(2):
    problems.raises("Pass batch_argument=", model.apply, params, x, normal(5, 2))
  model = bnp_optax.linen.Tapped(Model(), examples=6, batch_argument=0)
  for _ in range(2):
    grads = jax.grad(lambda p: loss(model.apply(p, x, normal(5, 2))))(params)
    assert {int(s.examples) for s in from_taps(grads).values()} == {6}


@pytest.mark.slow
def test_the_state_of_a_recurrent_layer_before_the_batch():
  """The loss is a mean over time and batch, the layers in the loop have the batch alone."""

  class Model(nn.Module):
    @nn.compact
    def __call__(self, carry, x):
      cell = nn.RNN(nn.GRUCell(3, **DTYPE), time_major=True)
      return cell(nn.Dense(4, **DTYPE)(x), initial_carry=carry)

  carry, x = normal(4, 3), normal(5, 4, 2)
  model = bnp_optax.linen.Tapped(Model(), examples=20, example_axes=2, batch_argument="x")
  params = model.init(jax.random.key(0), carry, x)
  stats = from_taps(jax.grad(lambda p: loss(model.apply(p, carry, x=x)))(params))
  assert {(int(s.examples), int(s.rows)) for s in stats.values()} == {(20, 20)}
  problems.raises("without the argument 'x'", model.apply, params, carry, x)
  model = bnp_optax.linen.Tapped(Model(), examples=20)
  problems.raises("Pass batch_argument=", model.apply, params, carry, x)


def test_kernels_with_other_axes_need_layers():
  # The shapes of this kernel and of its statistics fit a Dense.
  model = bnp_optax.linen.Tapped(
    nn.Einsum((4, 4), "bd,fd->bf", use_bias=False, **DTYPE), examples=6
  )
  x = jnp.ones((6, 4))
  params = model.init(jax.random.key(0), x)["params"]
  grads = jax.grad(lambda p: loss(model.apply({"params": p}, x)))(params)
  tx = bnp_optax.scale_by_bnp()
  problems.raises(
    "other axes than that of a Dense or Conv, pass layers=", tx.update, grads, tx.init(params)
  )


def test_taps_below_float32():
  model = bnp_optax.linen.Tapped(nn.Dense(3), examples=6)
  params = model.init(jax.random.key(0), jnp.ones((6, 4), jnp.float32))
  half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  problems.raises("its tap is bfloat16", model.apply, half, jnp.ones((6, 4), jnp.bfloat16))


@pytest.mark.parametrize("name", ["tap", "rows"])
def test_a_tap_that_is_masked_out(whole, name):
  params, *_ = whole
  mask = jax.tree_util.tree_map_with_path(
    lambda path, _: name not in [k.key for k in path] or "Dense_0" not in [k.key for k in path],
    params,
  )
  tx = optax.masked(bnp_optax.scale_by_bnp(), mask)
  problems.raises("No statistics for Dense_0", tx.update, params, tx.init(params))


def test_no_taps(whole):
  params, *_ = whole
  plain = bnp_optax.linen.remove_taps(params)
  tx = bnp_optax.scale_by_bnp()
  problems.raises(r"give it Tapped\(model", tx.update, plain, tx.init(plain))


@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("transform", ["scan", "vmap"])
def test_linen_stacks_along_another_axis_than_the_first(transform, use_bias, axis):
  class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
      return nn.Dense(4, use_bias=use_bias, **DTYPE)(x), None

  class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
      axes = {"variable_axes": {"params": axis}, "split_rngs": {"params": True}}
      if transform == "scan":
        return nn.scan(Block, length=3, **axes)()(x, None)[0]
      return nn.vmap(Block, in_axes=None, axis_size=3, **axes)()(x)[0]

  model = bnp_optax.linen.Tapped(Net(), examples=6)
  error = (
    f"Tapped: nn.scan or nn.vmap stacks the parameters along axis {axis}, but taps need axis 0"
  )
  problems.raises(error, model.init, jax.random.key(0), normal(6, 4))


def test_nnx_stacks_along_another_axis_than_the_first():
  class Net(nnx.Module):
    def __init__(self, rngs):
      self.axes = nnx.StateAxes({nnx.Param: 1, ...: None})
      make = nnx.vmap(lambda rngs: nnx.Linear(4, 3, rngs=rngs, **DTYPE), out_axes=self.axes)
      self.layers = make(rngs.split(2))

    def __call__(self, x):
      return nnx.vmap(lambda layer, x: layer(x), in_axes=(self.axes, None))(self.layers, x)

  with pytest.raises(ValueError, match="stacked along axis 0"):
    bnp_optax.nnx.Tapped(Net(nnx.Rngs(0)), jnp.ones((6, 4)), examples=6)


def test_a_dtype_among_the_arguments_is_no_batch():
  class Model(nn.Module):
    @nn.compact
    def __call__(self, x, dtype):
      return nn.Dense(3, dtype=dtype)(x)

  x, model = jnp.ones((4, 2)), bnp_optax.linen.Tapped(Model(), examples=4)
  variables = model.init(jax.random.key(0), x, jnp.bfloat16)
  for dtype in (jnp.bfloat16, np.float32, jnp.dtype("float32")):
    assert model.apply(variables, x, dtype).dtype == dtype
