"""Whole networks on real data: a complete table, and a loss that falls."""

import functools

from bnp_experiments import data
from flax import nnx
import flax.linen as nn
import jax
import numpy as np
import optax
import pytest

import bnp_optax

STEPS, BATCH = 50, 16


@pytest.fixture(autouse=True)
def standard_promotion():
  """Allow promotion: Adam raises a float to an integer power."""
  with jax.numpy_dtype_promotion("standard"):
    yield


class ResNet18(nn.Module):
  """ResNet-18 with GroupNorm and no bias before it, narrow."""

  width: int = 8

  @nn.compact
  def __call__(self, x):
    conv = functools.partial(nn.Conv, use_bias=False)
    norm = functools.partial(nn.GroupNorm, num_groups=4)
    x = nn.relu(norm()(conv(self.width, (3, 3))(x)))
    for stage in range(4):
      for block in range(2):
        features, strides = self.width * 2**stage, 2 if stage > 0 and block == 0 else 1
        y = nn.relu(norm()(conv(features, (3, 3), strides)(x)))
        y = norm()(conv(features, (3, 3))(y))
        x = conv(features, (1, 1), strides)(x) if x.shape != y.shape else x
        x = nn.relu(x + y)
    return nn.Dense(10)(x.mean((1, 2)))


class MobileNet(nn.Module):
  """Depthwise and pointwise convolutions in turn."""

  @nn.compact
  def __call__(self, x):
    x = nn.relu(nn.Conv(16, (3, 3), 2)(x))
    for features in (16, 32, 32):
      x = nn.relu(nn.Conv(x.shape[-1], (3, 3), feature_group_count=x.shape[-1])(x))
      x = nn.relu(nn.Conv(features, (1, 1))(x))
      x = nn.avg_pool(x, (2, 2), (2, 2))
    return nn.Dense(10)(x.mean((1, 2)))


class Block(nn.Module):
  """A transformer block."""

  @nn.compact
  def __call__(self, x, _):
    x = x + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x))
    y = nn.gelu(nn.Dense(4 * x.shape[-1])(nn.LayerNorm()(x)))
    return x + nn.Dense(x.shape[-1])(y), None


class ViT(nn.Module):
  """Four blocks under nn.scan and nn.remat."""

  @nn.compact
  def __call__(self, x):
    x = nn.Conv(16, (8, 8), 8, name="patches")(x)
    x = x.reshape(x.shape[0], -1, x.shape[-1])
    x = x + self.param("position", nn.initializers.normal(0.02), (1, *x.shape[1:]))
    blocks = nn.scan(
      nn.remat(Block, prevent_cse=False),
      variable_axes={"params": 0, "intermediates": 0},
      split_rngs={"params": True},
      length=4,
    )
    x, _ = blocks(name="blocks")(x, None)
    return nn.Dense(10, name="head")(nn.LayerNorm()(x).mean(1))


class RowLSTM(nn.Module):
  """An LSTM over the rows of an image."""

  @nn.compact
  def __call__(self, x):
    x = x.reshape(*x.shape[:2], -1)
    x = nn.RNN(nn.OptimizedLSTMCell(16), variable_axes={"intermediates": 0})(x)
    return nn.Dense(10)(x[:, -1])


class Mixer(nn.Module):
  """An MLP-Mixer."""

  @nn.compact
  def __call__(self, x):
    mlp = lambda x, width: nn.Dense(x.shape[-1])(nn.gelu(nn.Dense(width)(x)))
    x = nn.Conv(16, (8, 8), 8)(x)
    x = x.reshape(x.shape[0], -1, x.shape[-1])
    for _ in range(2):
      x = x + mlp(nn.LayerNorm()(x).swapaxes(1, 2), 16).swapaxes(1, 2)
      x = x + mlp(nn.LayerNorm()(x), 32)
    return nn.Dense(10)(nn.LayerNorm()(x).mean(1))


def batches(name):
  """Return the first batches of a data set, with pixels of mean 0 and deviation 1."""
  found = data.load(name)
  x = np.asarray(found.x_train[: STEPS * BATCH], np.float32)
  x = x.reshape(*x.shape[:3], -1)
  x = (x - x.mean()) / x.std()
  y = np.asarray(found.y_train[: STEPS * BATCH], np.int32)
  return x.reshape(STEPS, BATCH, *x.shape[1:]), y.reshape(STEPS, BATCH)


def cross_entropy(logits, labels):
  return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def falls(losses):
  assert np.isfinite(losses).all()
  assert np.mean(losses[-10:]) < np.mean(losses[:10])


@pytest.mark.data
@pytest.mark.parametrize(
  ("model", "name", "kernels"),
  [
    (ResNet18(), "cifar10", 21),
    (MobileNet(), "cifar10", 8),
    (ViT(), "cifar10", 8),
    (RowLSTM(), "mnist", 9),
    (Mixer(), "cifar10", 10),
  ],
  ids=lambda x: type(x).__name__ if isinstance(x, nn.Module) else str(x),
)
def test_linen(model, name, kernels):
  x, y = batches(name)
  params = jax.jit(model.init)(jax.random.key(0), x[0])["params"]
  ignore = {"position"} & params.keys()
  layers = bnp_optax.linen.layers(model, x[0], strict=True, ignore=ignore)
  assert len(layers) == kernels
  tx = bnp_optax.bnp(optax.adam(3e-3), layers=layers)

  def loss_fn(params, x, y):
    with bnp_optax.linen.sow_statistics():
      logits, aux = model.apply({"params": params}, x, mutable=["intermediates"])
    return cross_entropy(logits, y), aux["intermediates"]

  @jax.jit
  def step(params, state, x, y):
    (loss, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, x, y)
    updates, state = tx.update(grads, state, params, stats=stats)
    return optax.apply_updates(params, updates), state, loss

  state, losses = tx.init(params), []
  for i in range(STEPS):
    params, state, loss = step(params, state, x[i], y[i])
    losses.append(float(loss))
  falls(losses)


class NnxMobileNet(nnx.Module):
  """Depthwise and pointwise convolutions in turn."""

  def __init__(self, rngs):
    conv = functools.partial(nnx.Conv, rngs=rngs)
    self.first = conv(3, 16, (3, 3), 2)
    self.depthwise = nnx.List([conv(n, n, (3, 3), feature_group_count=n) for n in (16, 16, 32)])
    self.pointwise = nnx.List([conv(n, m, (1, 1)) for n, m in ((16, 16), (16, 32), (32, 32))])
    self.head = nnx.Linear(32, 10, rngs=rngs)

  def __call__(self, x):
    x = nnx.relu(self.first(x))
    for depthwise, pointwise in zip(self.depthwise, self.pointwise, strict=True):
      x = nnx.relu(pointwise(nnx.relu(depthwise(x))))
      x = nnx.avg_pool(x, (2, 2), (2, 2))
    return self.head(x.mean((1, 2)))


class NnxRowLSTM(nnx.Module):
  """An LSTM over the rows of an image."""

  def __init__(self, rngs):
    self.rnn = nnx.RNN(nnx.OptimizedLSTMCell(28, 16, rngs=rngs), rngs=rngs)
    self.head = nnx.Linear(16, 10, rngs=rngs)

  def __call__(self, x):
    return self.head(self.rnn(x.reshape(*x.shape[:2], -1))[:, -1])


@pytest.mark.data
@pytest.mark.parametrize(
  ("make", "name", "kernels"), [(NnxMobileNet, "cifar10", 8), (NnxRowLSTM, "mnist", 3)]
)
def test_nnx(make, name, kernels):
  x, y = batches(name)
  model = make(nnx.Rngs(0))
  layers = bnp_optax.nnx.layers(model, x[0], strict=True)
  assert len(layers) == kernels
  tx = bnp_optax.bnp(optax.adam(3e-3), layers=layers)
  optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

  def loss_fn(model, x, y):
    with bnp_optax.nnx.sow_statistics():
      logits, stats = nnx.capture(model, bnp_optax.nnx.Statistics)(x)
    return cross_entropy(logits, y), stats

  @nnx.jit
  def step(model, optimizer, x, y):
    (loss, stats), grads = nnx.value_and_grad(loss_fn, has_aux=True)(model, x, y)
    optimizer.update(model, grads, stats=stats)
    return loss

  falls([float(step(model, optimizer, x[i], y[i])) for i in range(STEPS)])
