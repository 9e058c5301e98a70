"""Kernels with split axes on a mesh with Explicit axes: the same steps as on one device."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

import bnp_optax
from bnp_optax import KernelLayout
from bnp_optax._sharding import on_auto_axes, replicated

pytestmark = pytest.mark.usefixtures("standard_promotion")

LAYOUTS = {
  "dense": (KernelLayout(), (6, 4), ("data", "model")),
  "heads": (KernelLayout(output=(1, 2)), (6, 4, 2), ("data", "model", None)),
  "projection": (KernelLayout(feature=(0, 1), output=(2,)), (4, 2, 6), ("model", None, "data")),
  "scanned": (KernelLayout.by_convention(2).stacked([0]), (2, 6, 4), ("data", None, "model")),
  "convolution": (KernelLayout.by_convention(4), (3, 3, 2, 4), (None, None, "data", "model")),
  "grouped": (
    KernelLayout((), (0,), (1,), (2,), groups=2, exact_windows=True),
    (3, 2, 4),
    (None, "data", "model"),
  ),
}


def mesh(kind=AxisType.Explicit):
  return jax.make_mesh((2, 2), ("data", "model"), axis_types=(kind, kind))


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("wrap", [bnp_optax.bnp, None])
@pytest.mark.parametrize(
  "compile_", [jax.jit, pytest.param(lambda step: step, marks=pytest.mark.slow, id="uncompiled")]
)
def test_the_steps_of_split_kernels(name, bias, wrap, compile_):
  layout, shape, axes = LAYOUTS[name]
  rng = np.random.default_rng(0)
  array = lambda *shape: jax.device_put(rng.normal(size=shape).astype(np.float32))
  params, specs = {"kernel": array(*shape)}, {"kernel": P(*axes)}
  if bias:
    kept = layout.stack + layout.output
    params["bias"] = array(*(shape[i] for i in kept))
    specs["bias"] = P(*(axes[i] for i in kept))
  inputs = array(16, *layout.statistics_shape(shape))
  layouts = {("kernel",): layout}
  if wrap is None:
    tx = bnp_optax.scale_by_bnp(layers=layouts, debias=True, lag_guard=1.0)
  else:
    tx = wrap(optax.adamw(0.1), layers=layouts)

  def step(params, state, inputs):
    statistics = bnp_optax.layer_statistics(inputs, examples=16, rows=16, stack=len(layout.stack))
    return tx.update(params, state, params, stats={"layer_statistics": statistics})

  expected = jax.jit(step)(params, jax.jit(tx.init)(params), inputs)
  with jax.set_mesh(mesh()):
    put = lambda x, spec: jax.device_put(x, NamedSharding(mesh(), spec))
    split = jax.tree.map(put, params, specs)
    state = jax.jit(tx.init)(split)
    features = P("data", *[None] * len(layout.stack), "model")
    updates, new_state = compile_(step)(split, state, put(inputs, features))
    assert jax.tree.map(lambda x: x.sharding.spec, updates) == specs
    assert jax.tree.map(jax.typeof, new_state) == jax.tree.map(jax.typeof, state)
    for found, right in zip(*map(jax.tree.leaves, ((updates, new_state), expected)), strict=True):
      np.testing.assert_allclose(found, right, rtol=1e-5, atol=1e-6)


def test_a_model_with_split_heads():
  """The whole step, with a batch that is split as well."""
  model, x = nn.DenseGeneral((4, 2)), np.random.default_rng(0).normal(1, 1, (8, 6))
  x = jnp.asarray(x.astype(np.float32))
  params = jax.jit(model.init)(jax.random.key(1), x)["params"]
  tx = bnp_optax.bnp(optax.adam(0.01), layers=bnp_optax.linen.layers(model, x))

  @jax.jit
  def step(params, state, x):
    def loss_fn(params):
      with bnp_optax.linen.sow_statistics():
        y, aux = model.apply({"params": params}, x, mutable=["intermediates"])
      return jnp.mean(y**2), aux["intermediates"]

    (_, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
    return tx.update(grads, state, params, stats=stats)[0]

  expected = step(params, tx.init(params), x)
  specs = {"kernel": P(None, "model", None), "bias": P("model", None)}
  with jax.set_mesh(mesh()):
    put = lambda x, spec: jax.device_put(x, NamedSharding(mesh(), spec))
    split = jax.tree.map(put, params, specs)
    updates = step(split, jax.jit(tx.init)(split), put(x, P("data")))
  assert jax.tree.map(lambda x: x.sharding.spec, updates) == specs
  for found, right in zip(*map(jax.tree.leaves, (updates, expected)), strict=True):
    np.testing.assert_allclose(found, right, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_taps_of_a_split_batch():
  x = jnp.asarray(np.random.default_rng(0).normal(1, 1, (16, 6)).astype(np.float32))
  model = bnp_optax.linen.Tapped(nn.Dense(3), examples=16)
  params = model.init(jax.random.key(1), x)["params"]
  gradient = jax.jit(jax.grad(lambda params, x: jnp.mean(model.apply({"params": params}, x) ** 2)))
  expected = gradient(params, x)
  with jax.set_mesh(mesh()):
    everywhere = jax.device_put(params, NamedSharding(mesh(), P()))
    found = gradient(everywhere, jax.device_put(x, NamedSharding(mesh(), P("data", "model"))))
  assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(expected["tap"])) > 0
  chex.assert_trees_all_close(jax.device_get(found), jax.device_get(expected), rtol=1e-5)


def test_shard_map_over_one_of_two_explicit_axes():
  model, x = nn.Dense(3), np.random.default_rng(0).normal(1, 1, (16, 6)).astype(np.float32)
  params = model.init(jax.random.key(1), x)["params"]
  tx = bnp_optax.bnp(optax.adam(0.01))

  def step(params, state, x, axis_name=None):
    def loss_fn(params):
      with bnp_optax.linen.sow_statistics(axis_name=axis_name):
        y, aux = model.apply({"params": params}, x, mutable=["intermediates"])
      loss = jnp.mean(y**2)
      return loss if axis_name is None else jax.lax.pmean(loss, axis_name), aux["intermediates"]

    (_, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
    return tx.update(grads, state, params, stats=stats)

  expected = jax.jit(step)(params, tx.init(params), x)
  parts = functools.partial(step, axis_name="data")
  with jax.set_mesh(mesh()):
    arguments = jax.device_put((params, tx.init(params)), NamedSharding(mesh(), P()))
    found = jax.jit(
      jax.shard_map(parts, in_specs=(P(), P(), P("data")), out_specs=P(), axis_names={"data"})
    )(*arguments, jax.device_put(x, NamedSharding(mesh(), P("data"))))
  chex.assert_trees_all_close(jax.device_get(found), jax.device_get(expected), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", [None, AxisType.Auto])
def test_other_arrays_are_left_alone(kind):
  x = jnp.ones((2, 2))
  if kind is not None:
    x = jax.device_put(x, NamedSharding(mesh(kind), P("data")))
  function = lambda x: (x, None)
  assert on_auto_axes(function, x, None) is function
  assert replicated(x) is x
