"""The number of examples: `sow_statistics(examples=...)`, and `merge_calls`."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bnp_optax
from bnp_optax import linen
from tests import oracle

BATCH, TIME = 4, 9


class Tokens(nn.Module):
  """A layer on every position, its axes folded or not, and a head after pooling."""

  fold: bool

  @nn.compact
  def __call__(self, x):
    h = x.reshape(-1, x.shape[-1]) if self.fold else x
    h = nn.relu(nn.Dense(6, name="tokens")(h)).reshape(*x.shape[:2], 6)
    return nn.Dense(1, name="head")(h.mean(1))


class TimeMajor(nn.Module):
  """A layer on `[time, batch, features]`."""

  @nn.compact
  def __call__(self, x):
    h = nn.relu(nn.Dense(6, name="tokens")(jnp.swapaxes(x, 0, 1)))
    return nn.Dense(1, name="head")(h.mean(0))


class Latents(nn.Module):
  """Latents without a batch axis beside inputs with one."""

  @nn.compact
  def __call__(self, x):
    latents = self.param("latents", nn.initializers.normal(), (7, 5))
    return nn.Dense(1, name="inputs")(x.mean(1)) + nn.Dense(1, name="latent")(latents).sum()


def gather(model, params, x, **kwargs):
  @jax.jit
  def forward(params, x):
    with linen.sow_statistics(**kwargs):
      return model.apply({"params": params}, x, mutable=["intermediates"])[1]["intermediates"]

  return forward(params, x)


def step(model, params, x, **kwargs):
  def loss_fn(params):
    with linen.sow_statistics(**kwargs):
      y, aux = model.apply({"params": params}, x, mutable=["intermediates"])
    return jnp.mean(y**2), aux["intermediates"]

  tx = bnp_optax.scale_by_bnp(debias=False)

  @jax.jit
  def update(params):
    (_, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
    return tx.update(grads, tx.init(params), stats=stats)[0]

  return update(params)


@pytest.fixture(scope="module")
def x():
  return 1 + jax.random.normal(jax.random.key(0), (BATCH, TIME, 5))


@pytest.fixture(scope="module")
def params(x):
  return Tokens(fold=False).init(jax.random.key(1), x)["params"]


@pytest.mark.parametrize("model", [Tokens(fold=True), TimeMajor()], ids=["folded", "time-major"])
@pytest.mark.parametrize("examples", [BATCH, jnp.asarray(BATCH)], ids=["int", "array"])
def test_folded_axes_take_the_step_of_the_batch(model, examples, params, x):
  expected = step(Tokens(fold=False), params, x)
  actual = step(model, params, x, examples=examples)
  for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_the_step_with_folded_axes_is_that_of_the_paper(params, x):
  def loss(params):
    return jnp.mean(Tokens(fold=True).apply({"params": params}, x) ** 2)

  grads = jax.grad(loss)(params)["tokens"]
  kernel, bias, _, _ = oracle.algorithm_3(
    x, TIME, grads["kernel"], grads["bias"], np.zeros(5), np.ones(5)
  )
  actual = step(Tokens(fold=True), params, x, examples=BATCH)["tokens"]
  np.testing.assert_allclose(actual["kernel"], kernel[0], rtol=1e-4, atol=1e-7)
  np.testing.assert_allclose(actual["bias"], bias, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
  ("model", "counts"),
  [
    (Tokens(fold=True), "36 in layer tokens and 4 in layer head"),
    (TimeMajor(), "9 in layer tokens and 4 in layer head"),
    (Latents(), "4 in layer inputs and 7 in layer latent"),
  ],
)
def test_layers_that_disagree_are_named(model, counts, x):
  params = model.init(jax.random.key(1), x)["params"]
  match = rf"{counts}. Pass the number .* as sow_statistics\(examples=...\)"
  with pytest.raises(ValueError, match=match):
    jax.eval_shape(lambda params: gather(model, params, x), params)
  stats = gather(model, params, x, examples=4)
  leaves = jax.tree.leaves(stats, is_leaf=lambda s: isinstance(s, bnp_optax.LayerStatistics))
  assert [s.examples for s in leaves] == [4, 4]


def test_the_number_may_be_traced(params, x):
  count = jax.jit(
    lambda n: gather(Tokens(fold=True), params, x, examples=n)["head"]["layer_statistics"].examples
  )
  assert (count(3), count(5)) == (3, 5)


def test_nested_functions_are_traced_for_each_number(params, x):
  apply = jax.jit(lambda: Tokens(fold=False).apply({"params": params}, x, mutable=True)[1])
  for n in (3, 5):
    with linen.sow_statistics(examples=n):
      assert apply()["intermediates"]["head"]["layer_statistics"].examples == n


def test_parts_under_an_axis_name_add(params, x):
  def part(x):
    return gather(Tokens(fold=True), params, x, examples=2, axis_name="parts")

  stats = jax.vmap(part, axis_name="parts", out_axes=None)(x.reshape(2, 2, TIME, 5))
  assert stats["tokens"]["layer_statistics"].examples == BATCH


class Twice(nn.Module):
  @nn.compact
  def __call__(self, x):
    dense = nn.Dense(5, name="dense")
    return dense(nn.tanh(dense(x)))


def test_merged_calls_equal_a_layer_called_twice():
  x = jax.random.normal(jax.random.key(0), (BATCH, 5))
  params = Twice().init(jax.random.key(1), x)["params"]
  expected = gather(Twice(), params, x)
  dense = nn.Dense(5)

  def call(x, _=None):
    with linen.sow_statistics():
      y, aux = dense.apply({"params": params["dense"]}, x, mutable=["intermediates"])
    return nn.tanh(y), {"dense": aux["intermediates"]}

  y, first = call(x)
  merged = bnp_optax.merge_calls(first, call(y)[1])
  looped = bnp_optax.merge_calls(jax.lax.scan(call, x, length=2)[1])
  for actual in (merged, looped):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), actual, expected)


def test_merging_nothing_or_different_models_is_an_error(params, x):
  with pytest.raises(ValueError, match="at least one call"):
    bnp_optax.merge_calls()
  stats = gather(Tokens(fold=False), params, x)
  with pytest.raises(ValueError, match="different layers"):
    bnp_optax.merge_calls(stats, {"tokens": stats["tokens"]})
  with pytest.raises(ValueError, match="the calls along the leading axis"):
    bnp_optax.merge_calls(stats)


def test_the_stack_of_a_layer_is_not_an_axis_of_calls():
  options = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "axis_size": 3}
  model, x = nn.vmap(nn.Dense, in_axes=None, **options)(2), jnp.ones((4, 5))
  stats = gather(model, model.init(jax.random.key(0), x)["params"], x)
  with pytest.raises(ValueError, match="the calls along the leading axis"):
    bnp_optax.merge_calls(stats)
  twice = bnp_optax.merge_calls(jax.tree.map(lambda x: jnp.stack([x, x]), stats))
  assert twice["layer_statistics"].rows.tolist() == [8.0] * 3
