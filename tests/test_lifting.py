"""Statistics under lifted transforms as others wrote them, without intermediates in their axes.

Each model is compared with a plain one that calls its layers in a Python loop.
"""

import concurrent.futures
import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bnp_optax
from bnp_optax.linen import sow_statistics
from tests import test_linen
from tests.test_linen import init, sow, uniform

N, T, D = 4, 3, 5
check = functools.partial(test_linen.check, tolerance=1e-5)


def update(model, params, x, **context):
  """Take one step of the paper's BNP, with the layers that a trace of the model finds."""
  tx = bnp_optax.scale_by_bnp(debias=False, layers=bnp_optax.linen.layers(model, x))

  @jax.jit
  def step(params):
    def loss(params):
      with sow_statistics(**context):
        y, aux = model.apply({"params": params}, x, mutable=["intermediates"])
      return jnp.mean(y**2), aux.get("intermediates", {})

    (_, stats), grads = jax.value_and_grad(loss, has_aux=True)(params)
    return tx.update(grads, tx.init(params), stats=stats)[0]

  return step(params)


def small(model, x):
  """Return parameters with which tanh is not saturated."""
  return jax.tree.map(lambda p: 0.3 * p, init(model, x))


def at(tree, i, axis=0):
  return jax.tree.map(lambda x: jnp.take(x, i, axis), tree)


# Over time: rows add, examples do not.


def recurrent(cell, **options):
  return nn.Sequential([nn.RNN(cell(6), **options), lambda x: x[:, -1], nn.Dense(2)])


@pytest.mark.slow
@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.OptimizedLSTMCell])
def test_a_default_rnn(cell):
  x = uniform(N, T, D)
  default = recurrent(cell)
  told = recurrent(cell, variable_axes={"intermediates": 0})
  params = init(default, x)
  chex.assert_trees_all_close(update(default, params, x), update(told, params, x), rtol=1e-5)
  layers = bnp_optax.linen.layers(default, x, strict=True)
  assert all(layout.calls == () for layout in layers.values())
  assert {entry.positions for entry in layers.entries if entry.layout} == {1, T}


def test_the_rows_of_a_default_rnn():
  x = uniform(N, T, D)
  model = nn.RNN(nn.SimpleCell(6, name="cell"))
  stats = sow(model, init(model, x), x)["cell"]
  check(stats["i"]["layer_statistics"], x, examples=N)
  assert stats["h"]["layer_statistics"].rows == N * T


@pytest.mark.parametrize(
  "options",
  [{"reverse": True}, {"time_major": True}, {"unroll": 2}, {"return_carry": False}],
  ids=str,
)
def test_options_of_an_rnn(options):
  x = uniform(T, N, D) if "time_major" in options else uniform(N, T, D)
  model = nn.RNN(nn.SimpleCell(6, name="cell"), **options)
  check(sow(model, init(model, x), x)["cell"]["i"]["layer_statistics"], x, examples=N)


def test_a_bidirectional_rnn():
  x = uniform(N, T, D)
  model = nn.Bidirectional(nn.RNN(nn.SimpleCell(6)), nn.RNN(nn.SimpleCell(6)))
  stats = sow(model, init(model, x), x)
  assert len(stats) == 2
  for rnn in stats.values():
    check(rnn["cell"]["i"]["layer_statistics"], x, examples=N)


def test_one_rnn_on_sequences_of_two_lengths():
  class Siamese(nn.Module):
    @nn.compact
    def __call__(self, x):
      rnn = nn.RNN(nn.SimpleCell(6, name="cell"))
      return rnn(x)[:, -1] + rnn(x[:, :2])[:, -1]

  x = uniform(N, T, D)
  stats = sow(Siamese(), init(Siamese(), x), x)
  rows = np.concatenate([x.reshape(-1, D), x[:, :2].reshape(-1, D)])
  check(stats["cell"]["i"]["layer_statistics"], rows, examples=N)


# Over layers: the layers are a stack.


class Block(nn.Module):
  use_bias: bool = True

  @nn.compact
  def __call__(self, x, _):
    return nn.tanh(nn.Dense(x.shape[-1], self.use_bias, name="layer")(x)), None


# Made when the module is imported, outside of every context.
DecoratedBlock = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=D)


class Stack(nn.Module):
  """Blocks under nn.scan, as many as the layer is wide."""

  axis: int = 0
  kind: str = "scan"
  biased: bool = False

  @nn.compact
  def __call__(self, x):
    options = {"variable_axes": {"params": self.axis}, "split_rngs": {"params": True}}
    if self.kind == "told":
      options["variable_axes"]["intermediates"] = 0
    if self.kind == "decorated":
      return DecoratedBlock(name="blocks")(x, None)[0]
    block = nn.remat(Block) if self.kind == "remat" else Block
    return nn.scan(block, length=D, **options)(self.axis == 0 or self.biased, name="blocks")(
      x, None
    )[0]


@pytest.mark.slow
@pytest.mark.parametrize(
  ("axis", "kind"),
  [(0, "scan"), (1, "scan"), (-1, "scan"), (0, "decorated"), (0, "remat")],
)
def test_a_scanned_stack(axis, kind):
  """Also where the stacked kernel is a cube, so that its shape does not tell the stack."""
  x, model = uniform(N, D), Stack(axis, kind)
  params = init(model, x)
  (layout,) = bnp_optax.linen.layers(model, x, strict=True).values()
  assert layout.stack == ({0: 0, 1: 1, -1: 2}[axis],)
  stats = sow(model, params, x)["blocks"]["layer"]["layer_statistics"]
  updates = update(model, params, x)["blocks"]["layer"]

  class Loop(nn.Module):
    @nn.compact
    def __call__(self, x):
      for i in range(D):
        x = nn.tanh(nn.Dense(D, axis == 0, name=f"layer_{i}")(x))
      return x

  unrolled = {f"layer_{i}": at(params["blocks"]["layer"], i, axis) for i in range(D)}
  expected = update(Loop(), unrolled, x)
  plain = sow(Loop(), unrolled, x)
  for i in range(D):
    chex.assert_trees_all_close(
      stats.total[i], plain[f"layer_{i}"]["layer_statistics"].total, rtol=1e-5
    )
    chex.assert_trees_all_close(at(updates, i, axis), expected[f"layer_{i}"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize(
  ("options", "remedy"),
  [
    ({"biased": True}, "its bias"),
    ({"kind": "told"}, "the intermediates in variable_axes"),
    ({"biased": True, "kind": "told"}, "its bias and the intermediates in variable_axes"),
  ],
  ids=str,
)
def test_a_stack_whose_axis_only_its_shape_could_tell_is_refused(axis, options, remedy):
  """A bias has the right shape too where there are as many layers as outputs."""
  x, model = uniform(N, D), Stack(axis, **options)
  match = r"blocks/layer(/kernel)?: nn.scan or nn.vmap does not stack it along axis 0: "
  match += rf".* leave out {remedy}(?! and)"
  with pytest.raises(ValueError, match=match):
    bnp_optax.linen.layers(model, x, strict=True)
  layers = bnp_optax.linen.layers(Stack(axis), x)
  tx, params = bnp_optax.scale_by_bnp(layers=layers), init(model, x)
  with pytest.raises(ValueError, match=match):
    tx.update(params, tx.init(params), stats=sow(model, params, x))


@pytest.mark.slow
def test_critics_under_vmap():
  """Members that are given the same inputs, as in soft actor-critic."""
  critics = nn.vmap(
    nn.Dense,
    in_axes=None,
    out_axes=0,
    axis_size=2,
    variable_axes={"params": 0},
    split_rngs={"params": True},
  )
  model, x = nn.Sequential([nn.Dense(3), critics(1)]), uniform(N, D)
  params = init(model, x)
  layers = bnp_optax.linen.layers(model, x, strict=True)
  assert layers[("layers_1", "kernel")].stack == (0,)
  updates = update(model, params, x)
  for i in range(2):
    one = nn.Sequential([nn.Dense(3), nn.Dense(1)])
    member = {"layers_0": params["layers_0"], "layers_1": at(params["layers_1"], i)}
    expected = update(one, member, x)["layers_1"]
    # The mean over two members halves the gradient of each.
    actual = jax.tree.map(lambda u, i=i: 2 * u[i], updates["layers_1"])
    chex.assert_trees_all_close(actual, expected, rtol=1e-4)


class Recurrence(nn.Module):
  """A block of a stack of recurrent layers."""

  told: bool = False

  @nn.compact
  def __call__(self, x, _):
    axes = {"intermediates": 0} if self.told else {}
    return nn.RNN(nn.SimpleCell(x.shape[-1], name="cell"), variable_axes=axes)(x), None


class RecurrentStack(nn.Module):
  inner: bool = False
  outer: bool = False

  @nn.compact
  def __call__(self, x):
    axes = {"params": 0, "intermediates": 0} if self.outer else {"params": 0}
    stack = nn.scan(Recurrence, variable_axes=axes, split_rngs={"params": True}, length=T)
    return stack(self.inner, name="blocks")(x, None)[0]


@pytest.mark.slow
@pytest.mark.parametrize("outer", [False, True])
def test_a_stack_of_recurrent_layers_as_long_as_the_sequence(outer):
  x, model = uniform(N, T, T), RecurrentStack(outer=outer)
  params = small(model, x)
  stats = sow(model, params, x)["blocks"]["cell"]["i"]["layer_statistics"]
  layers = bnp_optax.linen.layers(model, x, strict=True)
  assert layers["blocks", "cell", "i", "kernel"].stack == (0,)
  for i in range(T):
    block = at(params["blocks"], i)
    check(at(stats, i), x, examples=N)
    x = Recurrence().apply({"params": block}, x, None)[0]


def test_intermediates_of_the_inner_transform_alone_are_refused():
  """The axes of its statistics are those of the calls and of the stack, in an order not known."""
  with pytest.raises(ValueError, match=r"cell/i/kernel: of nested nn.scan or nn.vmap only the"):
    bnp_optax.linen.layers(RecurrentStack(inner=True), uniform(N, T, T), strict=True)


class DeepCell(nn.Module):
  """One step in time through a scanned stack of layers."""

  @nn.compact
  def __call__(self, carry, x):
    stack = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
    y, _ = stack(name="blocks")(x + carry, None)
    return y, y


def test_a_scan_over_time_of_a_scan_over_layers():
  class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
      over_time = nn.scan(
        DeepCell, variable_broadcast="params", split_rngs={"params": False}, in_axes=1, out_axes=1
      )
      return over_time(name="cell")(jnp.zeros_like(x[:, 0]), x)[1]

  x = uniform(N, T, D)
  params = small(Model(), x)
  stats = sow(Model(), params, x)["cell"]["blocks"]["layer"]["layer_statistics"]
  assert bnp_optax.linen.layers(Model(), x)["cell", "blocks", "layer", "kernel"].stack == (0,)
  carry, rows = jnp.zeros((N, D)), ([], [])
  for t in range(T):
    carry = x[:, t] + carry
    for i in range(2):
      rows[i].append(carry)
      layer = at(params["cell"]["blocks"]["layer"], i)
      carry = jnp.tanh(nn.Dense(D).apply({"params": layer}, carry))
  for i in range(2):
    check(at(stats, i), np.stack(rows[i]), examples=N, tolerance=2e-4)


# The scope of a transform that holds other values.


class InPlace(nn.Module):
  """A scan over the module itself, which calls its layer before and after."""

  def setup(self):
    self.layer = nn.Dense(D)

  def __call__(self, x):
    self.layer(x[:, 0])
    self.sow("intermediates", "before", x.sum())

    def step(module, carry, x):
      module.sow("intermediates", "inside", x.sum())
      carry = module.layer(carry + x)
      return carry, carry

    scan = nn.scan(step, variable_broadcast="params", in_axes=1, out_axes=1)
    carry, y = scan(self, x[:, 0], x)
    self.layer(carry)
    return y


def test_a_scan_over_a_scope_with_other_intermediates():
  x, model = uniform(N, T, D), InPlace()
  params = init(model, x)
  stats = sow(model, params, x)
  rows, carry = [x[:, 0]], x[:, 0]
  for t in range(T):
    rows.append(carry + x[:, t])
    carry = nn.Dense(D).apply({"params": params["layer"]}, rows[-1])
  check(stats["layer"]["layer_statistics"], np.stack([*rows, carry]), examples=N)
  np.testing.assert_allclose(stats["before"][0], x.sum(), rtol=1e-6)


def test_a_scan_that_carries_the_intermediates():
  class Carried(nn.Module):
    @nn.compact
    def __call__(self, x):
      layer = nn.Dense(D, name="layer")
      layer(x[:, 0])
      scan = nn.scan(
        lambda layer, carry, x: (carry, layer(x)),
        variable_broadcast="params",
        variable_carry="intermediates",
        in_axes=1,
        out_axes=1,
      )
      return scan(layer, (), x)[1]

  x, model = uniform(N, T, D), Carried()
  stats = sow(model, init(model, x), x)["layer"]["layer_statistics"]
  check(stats, np.concatenate([x[:, 0], x.reshape(-1, D)]), examples=N)


# A vmap with shared parameters maps examples, or something else.


def shared():
  over = nn.vmap(nn.Dense, variable_axes={"params": None}, split_rngs={"params": False})
  return nn.Sequential([over(2)])


def test_vmap_with_shared_parameters():
  x = uniform(N, T, D)
  params = init(shared(), x)
  stats = sow(shared(), params, x, context={"examples": N})
  check(stats["layers_0"]["layer_statistics"], x, examples=N)
  with pytest.raises(ValueError, match=r"No statistics|no LayerStatistics"):
    update(shared(), params, x)
  updates = update(shared(), params, x, examples=N)
  expected = update(nn.Sequential([nn.Dense(2)]), params, x)
  chex.assert_trees_all_close(updates, expected, rtol=1e-5)


def test_vmap_with_shared_parameters_that_names_the_intermediates():
  """Each call has one example. The number of the loss is unknown without `examples`."""
  axes = {"params": None, "intermediates": 0}
  over = nn.vmap(nn.Dense, variable_axes=axes, split_rngs={"params": False})
  model, x = nn.Sequential([over(2)]), uniform(N, D)
  with pytest.raises(ValueError, match=r"layers_0: nn.vmap shares it .*\(examples=\.\.\.\)"):
    update(model, init(model, x), x)
  params = init(model, x)
  expected = update(nn.Sequential([nn.Dense(2)]), params, x)
  chex.assert_trees_all_close(update(model, params, x, examples=N), expected, rtol=1e-5)


# It changes nothing else.


def program(model, params, x, **kwargs):
  return jax.jit(functools.partial(model.apply, **kwargs)).lower({"params": params}, x).as_text()


@pytest.mark.parametrize("model", [Stack(), recurrent(nn.LSTMCell), InPlace()])
def test_programs_without_the_context_are_unchanged(model):
  x = uniform(N, D) if isinstance(model, Stack) else uniform(N, T, D)
  params = init(model, x)
  run = functools.partial(program, model, params, x, mutable=["intermediates"])
  before, plain = run(), program(model, params, x)
  with sow_statistics():
    assert run() != before
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
      assert pool.submit(run).result() == before
  assert run() == before
  # Without mutable intermediates, the context has no effect.
  with sow_statistics():
    assert program(model, params, x) == plain


def test_outputs_and_gradients_are_bitwise_the_same():
  x, model = uniform(N, T, D), recurrent(nn.LSTMCell)
  params = init(model, x)

  def loss(params, context):
    with sow_statistics() if context else jax.named_scope("plain"):
      y, _ = model.apply({"params": params}, x, mutable=["intermediates"])
    return jnp.mean(y**2)

  grad = jax.jit(jax.value_and_grad(loss), static_argnums=1)
  chex.assert_trees_all_equal(grad(params, False), grad(params, True))


# Derivatives inside of a model, and remat_scan.


def _tanh_sum(layer, x):
  return jnp.sum(nn.tanh(layer(x)))


DERIVATIVES = {
  "vjp": lambda layer, x: nn.vjp(_tanh_sum, layer, x)[1](jnp.ones(()))[1],
  "jvp": lambda layer, x: nn.jvp(
    lambda layer, x: nn.tanh(layer(x)), layer, (x,), (x,), variable_tangents={}
  )[1],
  "grad": lambda layer, x: nn.grad(_tanh_sum, layer, x)[0],
  "value_and_grad": lambda layer, x: nn.value_and_grad(_tanh_sum, layer, x)[1][0],
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", DERIVATIVES)
def test_a_derivative_inside_of_a_model(kind):
  """Its forward pass counts once."""

  class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
      return DERIVATIVES[kind](nn.Dense(D, name="layer"), x)

  x = uniform(N, D)
  params = init(Model(), x)
  with sow_statistics():
    y, aux = Model().apply({"params": params}, x, mutable=["intermediates"])
  chex.assert_trees_all_equal(y, Model().apply({"params": params}, x))
  check(aux["intermediates"]["layer"]["layer_statistics"], x, examples=N)


@pytest.mark.slow
def test_blocks_under_remat_scan():
  """A stack of two axes, whose backward pass calls the layers again."""

  class Layer(nn.Module):
    @nn.compact
    def __call__(self, x):
      return nn.tanh(nn.Dense(D, name="layer")(x))

  class Blocks(nn.Module):
    @nn.compact
    def __call__(self, x):
      return nn.remat_scan(Layer, lengths=(2, 3))(name="blocks")(x)

  class Loop(nn.Module):
    @nn.compact
    def __call__(self, x):
      for i in range(6):
        x = nn.tanh(nn.Dense(D, name=f"layer_{i}")(x))
      return x

  x = uniform(N, D)
  params = init(Blocks(), x)
  updates = update(Blocks(), params, x)["blocks"]["layer"]
  unrolled = {f"layer_{i}": at(at(params["blocks"]["layer"], i // 3), i % 3) for i in range(6)}
  expected = update(Loop(), unrolled, x)
  for i in range(6):
    found = at(at(updates, i // 3), i % 3)
    chex.assert_trees_all_close(found, expected[f"layer_{i}"], rtol=1e-4, atol=1e-6)
