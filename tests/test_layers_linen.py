"""Every kind of Linen layer, through the public API, against the paper's loops."""

import functools
import math

import flax.linen as nn
import hypothesis
from hypothesis import given
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bnp_optax
from tests import unrolled
from tests.unrolled import Entry

pytestmark = pytest.mark.usefixtures("x64")

CASES = {}
N = 3
KERNEL = {"param_dtype": jnp.float64}


def case(fn):
  """Register `fn(draw) -> model, input shape, entries(params, x)`."""
  CASES[fn.__name__] = fn
  return fn


def sizes(draw, count, top=3):
  return draw(st.lists(st.integers(1, top), min_size=count, max_size=count))


@case
def dense_general(draw):
  """Several input axes at the end, several output axes."""
  features, outputs = sizes(draw, draw(st.integers(1, 2))), sizes(draw, draw(st.integers(1, 2)))
  model = nn.DenseGeneral(
    tuple(outputs), tuple(range(-len(features), 0)), use_bias=draw(st.booleans()), **KERNEL
  )
  time = draw(st.lists(st.integers(1, 3), max_size=1))

  def entries(params, x):
    h = x.reshape(*x.shape[: 1 + len(time)], -1)
    return [Entry((), h, math.prod(time), features=len(features))]

  return model, (N, *time, *features), entries


@case
def dense_general_over_other_axes(draw):
  """The input axis is the first after the examples."""
  n, rest, m = sizes(draw, 3)
  model = nn.DenseGeneral(m, axis=1, use_bias=draw(st.booleans()), **KERNEL)
  return model, (N, n, rest), lambda _, x: [Entry((), x.swapaxes(1, 2), rest)]


@case
def dense_general_with_batch_axes(draw):
  """One linear map for each of the leading axis."""
  batch, n, m, k = sizes(draw, 4)
  model = nn.DenseGeneral((m, k), -1, batch_dims=(0,), use_bias=draw(st.booleans()), **KERNEL)
  entries = lambda _, x: [Entry((), x[i], index=(i,)) for i in range(batch)]
  return model, (batch, N, n), entries


def output_positions(model, params, x):
  y = jax.eval_shape(lambda params: model.apply({"params": params}, x), params)
  return math.prod(y.shape[1:-1])


def geometry(draw, dims):
  kernel, strides, dilation = (sizes(draw, dims, 2) for _ in range(3))
  padding = [tuple(draw(st.lists(st.integers(0, 1), min_size=2, max_size=2))) for _ in kernel]
  space = [(k - 1) * d + draw(st.integers(1, 3)) for k, d in zip(kernel, dilation, strict=True)]
  return tuple(kernel), tuple(strides), tuple(dilation), padding, space


@case
def grouped_conv(draw):
  """feature_group_count; with one channel a group, depthwise."""
  dims, groups, n, m = draw(st.integers(1, 2)), draw(st.integers(2, 3)), *sizes(draw, 2)
  kernel, strides, dilation, padding, space = geometry(draw, dims)
  model = nn.Conv(
    groups * m,
    kernel,
    strides,
    padding,
    kernel_dilation=dilation,
    feature_group_count=groups,
    use_bias=draw(st.booleans()),
    **KERNEL,
  )

  def entries(params, x):
    positions = output_positions(model, params, x)
    return [
      Entry(
        (),
        x[..., g * n : (g + 1) * n],
        positions,
        window=dims,
        outputs=slice(g * m, (g + 1) * m),
      )
      for g in range(groups)
    ]

  return model, (N, *space, groups * n), entries


@case
def exact_conv(draw):
  """Equations (19) and (20): a mean and a variance for each kernel entry."""
  dims, groups, n, m = draw(st.integers(1, 2)), draw(st.integers(1, 2)), *sizes(draw, 2)
  kernel, strides, dilation, padding, space = geometry(draw, dims)
  model = nn.Conv(
    groups * m,
    kernel,
    strides,
    padding,
    kernel_dilation=dilation,
    feature_group_count=groups,
    use_bias=draw(st.booleans()),
    **KERNEL,
  )

  def entries(params, x):
    rows = unrolled.windows(x, kernel, strides, dilation, padding)
    positions = math.prod(rows.shape[dims + 1 : -1])
    return [
      Entry(
        (),
        None,
        positions,
        window=dims,
        outputs=slice(g * m, (g + 1) * m),
        windows=rows[..., g * n : (g + 1) * n],
      )
      for g in range(groups)
    ]

  return model, (N, *space, groups * n), entries


@case
def dilated_conv(draw):
  """input_dilation: the kernel slides over the inputs with zeros between them."""
  n, m, dilation = draw(st.integers(1, 3)), 2, draw(st.integers(2, 3))
  model = nn.Conv(m, (2,), padding=1, input_dilation=dilation, **KERNEL)

  def entries(params, x):
    positions = output_positions(model, params, x)
    return [Entry((), unrolled.dilate(x, [dilation]), positions, window=1)]

  return model, (N, 4, n), entries


@case
def conv_transpose(draw):
  dims, n, m = draw(st.integers(1, 2)), *sizes(draw, 2)
  transpose = draw(st.booleans())
  strides = tuple(sizes(draw, dims))
  model = nn.ConvTranspose(
    m,
    tuple(sizes(draw, dims)),
    strides,
    padding=draw(st.sampled_from(["SAME", "VALID"])),
    use_bias=draw(st.booleans()),
    transpose_kernel=transpose,
    **KERNEL,
  )
  order = (*range(dims), dims + 1, dims) if transpose else None

  def entries(params, x):
    positions = output_positions(model, params, x)
    return [Entry((), unrolled.dilate(x, strides), positions, window=dims, order=order)]

  return model, (N, *sizes(draw, dims), n), entries


@case
def conv_local(draw):
  """Every output position has a kernel, with features in the order (channel, window)."""
  dims, n, m = draw(st.integers(1, 2)), *sizes(draw, 2)
  kernel, strides, dilation, padding, space = geometry(draw, dims)
  model = nn.ConvLocal(
    m,
    kernel,
    strides,
    padding,
    kernel_dilation=dilation,
    use_bias=draw(st.booleans()),
    **KERNEL,
  )

  def entries(params, x):
    rows = unrolled.windows(x, kernel, strides, dilation, padding)
    rows = np.moveaxis(rows.reshape(-1, *rows.shape[dims:]), 0, -1)
    return [
      Entry((), rows[(slice(None), *p)].reshape(N, -1), index=p)
      for p in np.ndindex(*rows.shape[1:-2])
    ]

  return model, (N, *space, n), entries


@case
def einsum_heads(draw):
  heads, n, m, time = sizes(draw, 4)
  model = nn.Einsum((heads, n, m), "btd,hdk->bthk", use_bias=draw(st.booleans()), **KERNEL)
  return model, (N, time, n), lambda _, x: [Entry((), x, time, order=(1, 0, 2))]


@case
def einsum_experts(draw):
  """A batch axis of the kernel: a linear map for each expert."""
  experts, n, m = sizes(draw, 3)
  model = nn.Einsum((experts, n, m), "...ed,edf->...ef", use_bias=draw(st.booleans()), **KERNEL)
  entries = lambda _, x: [Entry((), x[:, e], index=(e,)) for e in range(experts)]
  return model, (N, experts, n), entries


@functools.cache
def recorder(model):
  @jax.jit
  def run(params, args, kwargs):
    inputs = {}

    def interceptor(next_fun, args, kwargs, context):
      if context.method_name == "__call__" and isinstance(
        context.module, nn.Dense | nn.DenseGeneral | nn.linear._Conv
      ):
        inputs.setdefault(context.module.path, []).append(args[0])
      return next_fun(*args, **kwargs)

    with nn.intercept_methods(interceptor):
      outputs = model.apply({"params": params}, *args, **kwargs)
    return outputs, inputs

  return run


def record(model, params, *args, **kwargs):
  """Return the outputs, and the inputs of each layer: `{path: [inputs of a call]}`."""
  return jax.tree.map(np.asarray, recorder(model)(params, args, kwargs))


class SelfAndCross(nn.Module):
  """Attention of a sequence to itself, then to a longer one."""

  @nn.compact
  def __call__(self, x):
    kwargs = {"num_heads": 2, "qkv_features": 4, **KERNEL}
    y = nn.MultiHeadDotProductAttention(name="self", **kwargs)(x)
    memory = jnp.concatenate([x, x * x], 1)
    return nn.MultiHeadDotProductAttention(name="cross", **kwargs)(y, memory)


@case
def attention(draw):
  time = draw(st.integers(2, 4))
  model = SelfAndCross()

  def entries(params, x):
    _, inputs = record(model, params, x)
    out = []
    for path, (h,) in inputs.items():
      h = h.reshape(*h.shape[:2], -1)
      features = 2 if path[-1] == "out" else 1
      out.append(Entry(path, h, h.shape[1], features=features))
    return out

  return model, (N, time, 3), entries


CELLS = {
  "lstm": (nn.LSTMCell, [f"i{g}" for g in "ifgo"], [f"h{g}" for g in "ifgo"]),
  "optimized_lstm": (nn.OptimizedLSTMCell, [f"i{g}" for g in "ifgo"], [f"h{g}" for g in "ifgo"]),
  "gru": (nn.GRUCell, ["ir", "iz", "in"], ["hr", "hz", "hn"]),
  "mgu": (nn.MGUCell, ["if", "in"], ["hf", "hn"]),
  "simple": (nn.SimpleCell, ["i"], ["h"]),
}


@case
def recurrent_cells(draw):
  """nn.RNN: the same kernels at every time step."""
  kind = draw(st.sampled_from(sorted(CELLS)))
  time, n, m = draw(st.integers(1, 4)), *sizes(draw, 2)
  make, from_inputs, from_state = CELLS[kind]
  cell = make(m, **KERNEL)
  model = nn.RNN(cell, variable_axes={"intermediates": 0}, variable_broadcast="params")

  def entries(params, x):
    params = params["cell"]
    init = jax.jit(cell.initialize_carry, static_argnums=1)
    step = jax.jit(lambda carry, x: cell.apply({"params": params}, carry, x)[0])
    carry, states = init(jax.random.key(0), x[:, 0].shape), []
    for t in range(time):
      states.append(np.asarray(carry[1] if isinstance(carry, tuple) else carry))
      carry = step(carry, x[:, t])
    out = [Entry(("cell", name), x, time) for name in from_inputs]
    return out + [Entry(("cell", name), np.stack(states, 1), time) for name in from_state]

  return model, (N, time, n), entries


class Block(nn.Module):
  """A residual block whose two kernels have different layouts."""

  @nn.compact
  def __call__(self, x, _):
    y = nn.DenseGeneral((2, 2), name="up", **KERNEL)(x)
    return x + nn.DenseGeneral(x.shape[-1], (-2, -1), name="down", **KERNEL)(nn.tanh(y)), None


class Stack(nn.Module):
  """Blocks under nn.scan."""

  length: int
  remat: bool = False

  @nn.compact
  def __call__(self, x):
    block = nn.scan(
      nn.remat(Block) if self.remat else Block,
      variable_axes={"params": 0, "intermediates": 0},
      split_rngs={"params": True},
      length=self.length,
    )
    return block(name="blocks")(x, None)[0]


def at(tree, i):
  return jax.tree.map(lambda x: x[i], tree)


@case
def scanned_layers(draw):
  """The stack is a stack of linear maps; as long as an axis of a kernel (2), too."""
  length, time, n = draw(st.integers(1, 3)), *sizes(draw, 2)
  model = Stack(length, draw(st.booleans()))

  def entries(params, x):
    out = []
    for i in range(length):
      block = at(params["blocks"], i)
      outputs, inputs = record(Block(), block, x, None)
      down = inputs[("down",)][0].reshape(N, time, 4)
      out.append(Entry(("blocks", "up"), x, time, index=(i,)))
      out.append(Entry(("blocks", "down"), down, time, index=(i,), features=2))
      x = outputs[0]
    return out

  return model, (N, time, n), entries


class Ensemble(nn.Module):
  """Members under nn.vmap, all given the same inputs."""

  @nn.compact
  def __call__(self, x):
    member = nn.vmap(
      nn.Conv,
      in_axes=None,
      variable_axes={"params": 0, "intermediates": 0},
      split_rngs={"params": True},
      axis_size=3,
    )
    return member(2, (2,), feature_group_count=2, name="members", **KERNEL)(x)


@case
def vmapped_members(draw):
  """A stack of grouped convolutions: two stacks at once."""
  space, n = draw(st.integers(1, 4)), draw(st.integers(1, 2))

  def entries(params, x):
    return [
      Entry(
        ("members",),
        x[..., g * n : (g + 1) * n],
        space,
        index=(i,),
        window=1,
        outputs=slice(g, g + 1),
      )
      for i in range(3)
      for g in range(2)
    ]

  return Ensemble(), (N, space, 2 * n), entries


class Normalized(nn.Module):
  """Layers whose kernels are normalized before they multiply."""

  wrapper: type

  @nn.compact
  def __call__(self, x, **kwargs):
    x = self.wrapper(nn.Dense(3, name="first", **KERNEL), **KERNEL)(x, **kwargs)
    return self.wrapper(nn.Conv(2, (2,), name="second", **KERNEL), **KERNEL)(x, **kwargs)


@case
def normalized_weights(draw):
  """The parameter is preconditioned by the inputs of the layer, not by its scaled kernel."""
  model = Normalized(nn.WeightNorm)

  def entries(params, x):
    _, inputs = record(model, params, x)
    return [
      Entry(path, h[0], x.shape[1], window=int(path[-1] == "second"))
      for path, h in inputs.items()
      if path[-1] in ("first", "second")
    ]

  return model, (N, draw(st.integers(1, 3)), draw(st.integers(1, 3))), entries


class Adapted(nn.Module):
  """A layer whose scope is shared by the module around it, which adds two layers there."""

  @nn.compact
  def __call__(self, x):
    layer = nn.Dense(3, name="layer", **KERNEL)
    nn.share_scope(self, layer)
    return layer(x) + nn.Dense(3, name="up", **KERNEL)(nn.Dense(2, name="down", **KERNEL)(x))


@case
def shared_scope(draw):
  """The kernel lies where the module around its layer does."""

  def entries(params, x):
    hidden = x @ np.asarray(params["down"]["kernel"]) + np.asarray(params["down"]["bias"])
    return [Entry((), x), Entry(("down",), x), Entry(("up",), hidden)]

  return Adapted(), (N, draw(st.integers(1, 3))), entries


@pytest.mark.slow
@pytest.mark.parametrize("kind", CASES)
@hypothesis.settings(
  max_examples=max(2, hypothesis.settings.default.max_examples // 7),
  phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
)
@given(data=st.data())
def test_equals_the_paper_on_unrolled_inputs(kind, data):
  model, shape, entries = CASES[kind](data.draw)
  exact = kind.startswith("exact")
  rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
  inputs = jax.ShapeDtypeStruct(shape, jnp.float64)
  layers = bnp_optax.linen.layers(model, inputs, exact_windows=exact, strict=True)
  tx = bnp_optax.scale_by_bnp(layers=layers, debias=False)

  def loss_fn(params, x):
    with bnp_optax.linen.sow_statistics(exact_windows=exact):
      y, aux = model.apply({"params": params}, x, mutable=["intermediates"])
    return jnp.sum(jnp.sin(3 * y)) / N, aux["intermediates"]

  @jax.jit
  def step(params, state, x):
    (_, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, x)
    return grads, *tx.update(grads, state, params, stats=stats)

  params = jax.eval_shape(model.init, jax.random.key(0), inputs)["params"]
  state, running = jax.jit(lambda: tx.init(params))(), {}
  for _ in range(2):
    x = rng.normal(2, 1.5, shape)
    params = jax.tree.map(lambda p: rng.normal(size=p.shape), params)
    grads, updates, state = step(params, state, x)
    grads = jax.tree.map(np.asarray, grads)
    expected = unrolled.step(entries(params, x), grads, running)
    assert set(expected) == set(layers)
    assert unrolled.relative_error(updates, expected) <= 1e-12


# Layers that keep variables of their own beside their parameters.


def stepper(model, tx, collection, **kwargs):
  """Return a step that also returns the gradients and the new variables of a collection."""

  @jax.jit
  def step(params, variables, state, x):
    def loss_fn(params):
      with bnp_optax.linen.sow_statistics():
        y, aux = model.apply(
          {"params": params, collection: variables},
          x,
          mutable=["intermediates", collection],
          **kwargs,
        )
      return jnp.sum(jnp.sin(3 * y)) / N, aux

    grads, aux = jax.grad(loss_fn, has_aux=True)(params)
    return grads, aux[collection], *tx.update(grads, state, params, stats=aux["intermediates"])

  return step


@pytest.mark.slow
def test_decoding():
  """Each step of decode mode has the inputs of causal attention at that position."""
  model = nn.MultiHeadDotProductAttention(2, qkv_features=4, decode=True, **KERNEL)
  x = np.random.default_rng(0).normal(2, 1.5, (N, 4, 3))
  variables = jax.jit(model.init)(jax.random.key(0), x)
  params, cache = variables["params"], variables["cache"]
  _, inputs = record(model.clone(decode=False), params, x, mask=nn.make_causal_mask(x[..., 0]))
  layers = bnp_optax.linen.layers(model, x, strict=True)
  tx = bnp_optax.scale_by_bnp(layers=layers, debias=False)
  step, state, running = stepper(model, tx, "cache"), tx.init(params), {}
  for t in range(4):
    with jax.numpy_dtype_promotion("standard"):  # The cache's index is an int32.
      grads, cache, updates, state = step(params, cache, state, x[:, t : t + 1])
    entries = [
      Entry(path, h[:, t].reshape(N, -1), features=2 if path[-1] == "out" else 1)
      for path, (h,) in inputs.items()
    ]
    expected = unrolled.step(entries, jax.tree.map(np.asarray, grads), running)
    assert set(expected) == set(layers)
    assert unrolled.relative_error(updates, expected) <= 1e-12
  assert cache["cache_index"] == 4


def power_iteration(kernel, u):
  """Return the kernel over its largest singular value, the new `u`, and that value."""
  matrix = kernel.reshape(-1, kernel.shape[-1])
  normalize = lambda x: x / np.sqrt(np.sum(x**2) + 1e-12)
  v = normalize(u @ matrix.T)
  u = normalize(v @ matrix)
  sigma = (v @ matrix @ u.T).item()
  return kernel / sigma, u, sigma


@pytest.mark.slow
def test_spectral_norm():
  """The parameter's gradient is preconditioned by what the normalized kernel multiplies."""
  model, rng = Normalized(nn.SpectralNorm), np.random.default_rng(0)
  x = rng.normal(2, 1.5, (N, 4, 3))
  variables = jax.jit(lambda key, x: model.init(key, x, update_stats=False))(jax.random.key(0), x)
  params, statistics = variables["params"], variables["batch_stats"]
  layers = bnp_optax.linen.layers(model, x, update_stats=True, strict=True)
  assert layers == bnp_optax.linen.layers(model, x, update_stats=False)
  tx = bnp_optax.scale_by_bnp(layers=layers, debias=False)
  step, state = stepper(model, tx, "batch_stats", update_stats=True), tx.init(params)
  running = {}
  for _ in range(3):
    first, second = (
      power_iteration(
        np.asarray(params[name]["kernel"]),
        np.asarray(statistics[f"SpectralNorm_{i}"][f"{name}/kernel/u"]),
      )
      for i, name in enumerate(("first", "second"))
    )
    hidden = x @ first[0] + np.asarray(params["first"]["bias"])
    entries = [Entry(("first",), x, 4), Entry(("second",), hidden, 4, window=1)]
    grads, statistics, updates, state = step(params, statistics, state, x)
    for i, (name, (_, u, sigma)) in enumerate((("first", first), ("second", second))):
      actual = statistics[f"SpectralNorm_{i}"]
      np.testing.assert_allclose(actual[f"{name}/kernel/u"], u, rtol=1e-12)
      np.testing.assert_allclose(actual[f"{name}/kernel/sigma"], sigma, rtol=1e-12)
    expected = unrolled.step(entries, jax.tree.map(np.asarray, grads), running)
    assert set(expected) == set(layers)
    assert unrolled.relative_error(updates, expected) <= 1e-12
    params = jax.tree.map(lambda p, u: np.asarray(p) - 0.1 * np.asarray(u), params, updates)
    x = rng.normal(2, 1.5, x.shape)
