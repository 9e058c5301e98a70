"""Small versions of public models with linear layers of their own, trained beside plain twins.

The layers are written after t5x's T5, Hugging Face's FlaxGPT2, score_sde's DDPM, the Gemma of
big_vision and openpi, and Bonsai's LLaDA. One to three lines cover each class; no model is edited.
"""

import math

import chex
from flax import nnx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bnp_optax

pytestmark = pytest.mark.usefixtures("x64")

BATCH, TIME, WIDTH = 6, 5, 8
STEPS = 20
normal = nn.initializers.normal(0.3)


@pytest.fixture(autouse=True, scope="module")
def promotion(strict_promotion):
  """Allow what these models do."""
  with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
    yield


def array(*shape):
  return jnp.asarray(np.random.default_rng(len(shape)).normal(1, 1, shape))


# T5: a DenseGeneral of its own, whose parameter is always a matrix.


class T5Dense(nn.Module):
  features: tuple[int, ...]
  axes: int = 1

  @nn.compact
  def __call__(self, x):
    inner, outer = x.shape[-self.axes :], self.features
    kernel = self.param("kernel", normal, (math.prod(inner), math.prod(outer)))
    kernel = kernel.reshape(*inner, *outer)
    return jnp.tensordot(x, kernel, self.axes)


class T5(nn.Module):
  plain: bool = False

  @nn.compact
  def __call__(self, x):
    def dense(features, axes, name):
      if self.plain:
        return nn.DenseGeneral(features, range(-axes, 0), use_bias=False, name=name)
      return T5Dense(features, axes, name=name)

    heads = (2, WIDTH // 2)
    x = nn.Dense(WIDTH, name="stem")(x)
    y = nn.LayerNorm()(x)
    q, k, v = (dense(heads, 1, name)(y) for name in ("query", "key", "value"))
    x = x + dense((WIDTH,), 2, "out")(nn.dot_product_attention(q, k, v))
    y = nn.LayerNorm()(x)
    h = nn.gelu(dense((16,), 1, "wi_0")(y)) * dense((16,), 1, "wi_1")(y)
    return x + dense((WIDTH,), 1, "wo")(h)


def register_t5():
  bnp_optax.linen.register(
    T5Dense, lambda layer, x: (x.reshape(*x.shape[: -layer.axes], -1), "...d,df->...f"), bias=None
  )


def t5_twin(params):
  heads = {name: (WIDTH, 2, WIDTH // 2) for name in ("query", "key", "value")}
  shapes = {**heads, "out": (2, WIDTH // 2, WIDTH)}
  reshape = lambda name, p: p.reshape(shapes[name]) if name in shapes else p
  return {
    name: {key: reshape(name, p) for key, p in layer.items()} for name, layer in params.items()
  }


# GPT-2: kernels are [output, feature].


class GPT2Conv1D(nn.Module):
  features: int

  @nn.compact
  def __call__(self, inputs):
    kernel = self.param("kernel", normal, (self.features, inputs.shape[-1]))
    bias = self.param("bias", nn.initializers.zeros, (self.features,))
    return jax.lax.dot_general(inputs, kernel.T, (((inputs.ndim - 1,), (0,)), ((), ()))) + bias


class GPT2(nn.Module):
  plain: bool = False

  @nn.compact
  def __call__(self, x):
    layer = nn.Dense if self.plain else GPT2Conv1D
    x = nn.Dense(WIDTH, name="stem")(x)
    qkv = layer(3 * WIDTH, name="c_attn")(nn.LayerNorm()(x))
    q, k, v = jnp.split(qkv.reshape(*x.shape[:2], 2, -1), 3, axis=-1)
    y = nn.dot_product_attention(q, k, v).reshape(x.shape)
    x = x + layer(WIDTH, name="c_proj")(y)
    h = nn.gelu(layer(4 * WIDTH, name="c_fc")(nn.LayerNorm()(x)))
    return x + layer(WIDTH, name="c_out")(h)


def register_gpt2():
  bnp_optax.linen.register(GPT2Conv1D, "...d,fd->...f")


def transposed(params):
  return {
    name: {key: p.T if name[:2] == "c_" and key == "kernel" else p for key, p in layer.items()}
    for name, layer in params.items()
  }


# DDPM: NIN, a dense layer with parameters W and b.


class NIN(nn.Module):
  num_units: int

  @nn.compact
  def __call__(self, x):
    W = self.param("W", normal, (x.shape[-1], self.num_units))
    return jnp.einsum("bhwc,cd->bhwd", x, W) + self.param("b", normal, (self.num_units,))


class DDPM(nn.Module):
  plain: bool = False

  @nn.compact
  def __call__(self, x):
    nin = nn.Dense if self.plain else NIN
    x = nn.Conv(WIDTH, (3, 3), name="stem")(x)
    h = nn.GroupNorm(4)(x)
    q, k, v = (nin(WIDTH, name=f"NIN_{i}")(h) for i in range(3))
    w = nn.softmax(jnp.einsum("bhwc,bHWc->bhwHW", q, k).reshape(*q.shape[:3], -1))
    h = jnp.einsum("bhwn,bnc->bhwc", w, v.reshape(v.shape[0], -1, v.shape[-1]))
    return nn.Conv(3, (3, 3), name="out")(x + nin(WIDTH, name="NIN_3")(h))


def register_ddpm():
  bnp_optax.linen.register(NIN, "...c,cd->...d", kernel="W", bias="b")


def renamed(params):
  names = {"W": "kernel", "b": "bias"}
  return {
    name: {names.get(key, key): p for key, p in layer.items()} for name, layer in params.items()
  }


# Gemma: an Einsum whose equation is an argument, and two kernels in one module.


class GemmaEinsum(nn.Module):
  shape: tuple[int, ...]

  @nn.compact
  def __call__(self, eqn, x):
    return jnp.einsum(eqn, x, self.param("w", normal, self.shape))


class GemmaFeedForward(nn.Module):
  hidden: int

  @nn.compact
  def __call__(self, x):
    gating = self.param("gating_einsum", normal, (2, x.shape[-1], self.hidden))
    linear = self.param("linear", normal, (self.hidden, x.shape[-1]))
    return jnp.dot(nn.gelu(jnp.dot(x, gating[0])) * jnp.dot(x, gating[1]), linear)


class PlainFeedForward(nn.Module):
  hidden: int

  @nn.compact
  def __call__(self, x):
    dense = lambda n, name: nn.Dense(n, use_bias=False, name=name)
    h = nn.gelu(dense(self.hidden, "gate")(x)) * dense(self.hidden, "up")(x)
    return dense(x.shape[-1], "linear")(h)


class Gemma(nn.Module):
  plain: bool = False

  @nn.compact
  def __call__(self, x):
    def einsum(shape, eqn, name, x):
      if self.plain:
        return nn.Einsum(shape, eqn, use_bias=False, name=name)(x)
      return GemmaEinsum(shape, name=name)(eqn, x)

    x = nn.Dense(WIDTH, name="stem")(x)
    y = nn.RMSNorm()(x)
    q = einsum((2, WIDTH, 4), "BTD,NDH->BTNH", "q_einsum", y)
    # JAX takes a digit for an axis, NumPy does not.
    k, v = einsum((2, 2, WIDTH, 4), "BSD,2KDH->2BSKH", "kv_einsum", y)
    y = nn.dot_product_attention(q, k, v)
    x = x + einsum((2, 4, WIDTH), "BTNH,NHD->BTD", "attn_vec_einsum", y)
    feed_forward = PlainFeedForward if self.plain else GemmaFeedForward
    return x + feed_forward(16, name="mlp")(nn.RMSNorm()(x))


def register_gemma():
  def hidden(layer, x):
    gate, up = layer.variables["params"]["gating_einsum"]
    return nn.gelu(jnp.dot(x, gate)) * jnp.dot(x, up), "...f,fd->...d"

  register = bnp_optax.linen.register
  register(GemmaEinsum, lambda layer, eqn, x: (x, eqn), kernel="w", bias=None)
  register(GemmaFeedForward, "...d,cdf->...cf", kernel="gating_einsum", bias=None)
  register(GemmaFeedForward, hidden, kernel="linear", bias=None)


def gemma_twin(params):
  out = {name: {"kernel": layer["w"]} if "w" in layer else layer for name, layer in params.items()}
  gate, up = params["mlp"]["gating_einsum"]
  linear = params["mlp"]["linear"]
  out["mlp"] = {"gate": {"kernel": gate}, "up": {"kernel": up}, "linear": {"kernel": linear}}
  return out


# The layers that are covered, with the percentage of parameters, before the registration and after.
MODELS = {
  "t5": (T5, register_t5, t5_twin, (BATCH, TIME, WIDTH), (1, 10), (8, 96)),
  "gpt2": (GPT2, register_gpt2, transposed, (BATCH, TIME, WIDTH), (1, 8), (5, 97)),
  "ddpm": (DDPM, register_ddpm, renamed, (BATCH, 4, 4, 3), (2, 59), (6, 98)),
  "gemma": (Gemma, register_gemma, gemma_twin, (BATCH, TIME, WIDTH), (1, 10), (6, 98)),
}


def coverage(layers):
  covered = sum(entry.size for entry in layers.entries if entry.layout is not None)
  return len(layers), round(100 * covered / sum(entry.size for entry in layers.entries))


def train(model, params, x, target):
  """Train with BNP inside momentum and around Adam; return the parameters and losses."""
  layers = bnp_optax.linen.layers(model, x)
  results = []
  for tx in (
    optax.chain(bnp_optax.scale_by_bnp(layers=layers), optax.sgd(0.03, momentum=0.9)),
    bnp_optax.bnp(optax.adam(1e-2), layers=layers),
  ):

    def loss(params):
      with bnp_optax.linen.sow_statistics():
        y, aux = model.apply({"params": params}, x, mutable=["intermediates"])
      return jnp.mean((y - target) ** 2), aux["intermediates"]

    def step(carry, _, tx=tx):
      params, state = carry
      (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(params)
      updates, state = tx.update(grads, state, params, stats=stats)
      return (optax.apply_updates(params, updates), state), value

    run = jax.jit(lambda params, tx=tx: jax.lax.scan(step, (params, tx.init(params)), length=STEPS))
    (trained, _), losses = run(params)
    results.append((trained, losses))
  return results


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_linen(name):
  make, register, twin, shape, before, after = MODELS[name]
  x = array(*shape)
  model, plain = make(), make(plain=True)
  params = jax.tree.map(lambda p: p.astype(jnp.float64), model.init(jax.random.key(0), x)["params"])
  assert coverage(bnp_optax.linen.layers(model, x)) == before
  register()
  assert coverage(bnp_optax.linen.layers(model, x, strict=True)) == after
  target = array(*model.apply({"params": params}, x).shape) / 2
  for (own, losses), (other, plain_losses) in zip(
    train(model, params, x, target), train(plain, twin(params), x, target), strict=True
  ):
    np.testing.assert_allclose(losses, plain_losses, rtol=1e-8)
    assert losses[-1] < losses[0]
    chex.assert_trees_all_close(twin(own), other, rtol=1e-6, atol=1e-9)


# LLaDA: a linear layer for explicit sharding, in NNX.


class ShardedLinear(nnx.Module):
  def __init__(self, n, m, *, use_bias, rngs):
    self.kernel = nnx.Param(jax.random.normal(rngs.params(), (n, m), jnp.float64) / n**0.5)
    # Without a bias it holds an array that is no parameter.
    self.bias = nnx.Param(jnp.zeros(m)) if use_bias else nnx.data(jnp.zeros(m))

  def __call__(self, x, *, out_sharding):
    return jnp.matmul(x, self.kernel[...], out_sharding=out_sharding) + self.bias[...]


class LLaDA(nnx.Module):
  def __init__(self, plain, rngs):
    def linear(n, m, use_bias):
      if plain:
        return nnx.Linear(n, m, use_bias=use_bias, rngs=rngs, param_dtype=jnp.float64)
      return ShardedLinear(n, m, use_bias=use_bias, rngs=rngs)

    self.plain = plain
    self.stem = nnx.Linear(WIDTH, WIDTH, rngs=rngs, param_dtype=jnp.float64)
    self.projections = nnx.List([linear(WIDTH, WIDTH, False) for _ in range(4)])
    self.gate, self.up = linear(WIDTH, 16, True), linear(WIDTH, 16, True)
    self.down = linear(16, WIDTH, False)

  def __call__(self, x):
    call = lambda layer, x: layer(x) if self.plain else layer(x, out_sharding=None)
    x = self.stem(x)
    *qkv, out = self.projections
    q, k, v = (call(layer, x).reshape(*x.shape[:2], 2, -1) for layer in qkv)
    x = x + call(out, nnx.dot_product_attention(q, k, v).reshape(x.shape))
    return x + call(self.down, nnx.silu(call(self.gate, x)) * call(self.up, x))


@pytest.mark.slow
def test_nnx():
  x = array(BATCH, TIME, WIDTH)
  model, plain = LLaDA(False, nnx.Rngs(0)), LLaDA(True, nnx.Rngs(0))
  nnx.update(plain, nnx.state(model, nnx.Param))
  assert coverage(bnp_optax.nnx.layers(model, x)) == (1, 10)
  bnp_optax.nnx.register(ShardedLinear, "...d,df->...f")
  assert coverage(bnp_optax.nnx.layers(model, x, strict=True)) == (8, 100)
  trained = []
  for each in (model, plain):
    tx = bnp_optax.bnp(optax.adam(1e-2), layers=bnp_optax.nnx.layers(each, x))
    optimizer = nnx.Optimizer(each, tx, wrt=nnx.Param)

    @nnx.jit
    def step(each, optimizer):
      def loss(each):
        with bnp_optax.nnx.sow_statistics():
          y, stats = nnx.capture(each, bnp_optax.nnx.Statistics)(x)
        return jnp.mean((y - x[::-1] / 2) ** 2), stats

      (value, stats), grads = nnx.value_and_grad(loss, has_aux=True)(each)
      optimizer.update(each, grads, stats=stats)
      return value

    losses = [step(each, optimizer) for _ in range(STEPS)]
    assert losses[-1] < losses[0]
    trained.append((losses, nnx.to_pure_dict(nnx.state(each, nnx.Param))))
  chex.assert_trees_all_close(*trained, rtol=1e-6, atol=1e-9)
