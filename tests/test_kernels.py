"""The layers that are found in a tree of parameters, and the errors of `layers=`."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bnp_optax
from bnp_optax import KernelLayout
from bnp_optax._kernels import choose_layer, find_layers
from tests import problems
from tests.problems import raises


def params_like(**shapes):
  return {name: {"kernel": jnp.ones(shape)} for name, shape in shapes.items()}


def test_find_layers_by_convention():
  params = {"b": {"kernel": jnp.ones((3, 3, 2, 4))}, "a": {"kernel": jnp.ones((2, 4))}}
  params["a"] |= {"bias": jnp.ones(4), "scale": jnp.ones(4)}
  first, second = find_layers(params, None)
  assert (first.path, first.bias, first.kernel) == (("a", "kernel"), 0, 1)
  assert (second.path, second.bias, second.kernel) == (("b", "kernel"), None, 3)
  assert first.layout == KernelLayout.by_convention(2)
  assert second.layout == KernelLayout.by_convention(4)
  assert [str(first), str(second)] == ["a", "b"]


def test_find_layers_takes_those_of_the_mapping_alone():
  params = {"a": {"weight": jnp.ones((2, 4)), "offset": jnp.ones(4)}, **params_like(b=(2, 4))}
  layout = KernelLayout(bias="offset")
  (layer,) = find_layers(params, {("a", "weight"): layout})
  assert (layer.layout, layer.kernel, layer.bias, str(layer)) == (layout, 1, 0, "a/weight")


@pytest.mark.parametrize("key", [("b", "weight"), ("b/w",)])
def test_a_mapping_names_every_kernel(key):
  params = {name: {"w": jnp.ones((2, 4))} for name in "ab"}
  layouts = {("a", "w"): KernelLayout(), key: KernelLayout()}
  raises(f"not in the parameters: {'/'.join(key)}. .*a/w, b/w", find_layers, params, layouts)


@pytest.mark.slow
def test_the_table_of_another_model():
  """A layer that was added after the table was made has statistics, and no entry."""

  class Net(nn.Module):
    adapter: bool = False

    @nn.compact
    def __call__(self, x):
      x = nn.Dense(4, name="hidden")(x)
      return nn.Dense(4, name="adapter")(x) if self.adapter else x

  x = jnp.ones((3, 2))
  layers = bnp_optax.linen.layers(Net(), x)
  params, batch = problems.make(Net(adapter=True), (3, 2))
  grads, stats = problems.grads_and_stats(Net(adapter=True), params, batch)
  for tx in (bnp_optax.scale_by_bnp(layers=layers), bnp_optax.bnp(optax.sgd(1.0), layers=layers)):
    state = tx.init(params)
    problems.raises("layers= has no layer adapter", tx.update, grads, state, stats=stats)
  # Parameters without statistics are those of something else than layers.
  tx, known = bnp_optax.scale_by_bnp(layers=layers), {"hidden": grads["hidden"], "w": x}
  tx.update(known, tx.init(known), stats=stats)


@pytest.mark.slow
def test_the_table_of_a_call_without_a_layer():
  """A layer that the traced call did not use has an entry, but BNP would leave it out."""

  class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train=True):
      x = nn.Dense(4, name="hidden")(x)
      if train or self.is_initializing():
        x = x + nn.Dense(4, name="auxiliary")(x)
      return x

  x = jnp.ones((3, 2))
  params, batch = problems.make(Net(), (3, 2))
  grads, stats = problems.grads_and_stats(Net(), params, batch)
  for options, match in ((dict(train=False), "layers= has no layer auxiliary"), ({}, None)):
    tx = bnp_optax.scale_by_bnp(layers=bnp_optax.linen.layers(Net(), x, **options))
    if match:
      problems.raises(match, tx.update, grads, tx.init(params), stats=stats)
    else:
      tx.update(grads, tx.init(params), stats=stats)
  ignored = bnp_optax.linen.layers(Net(), x, train=False, ignore=["auxiliary"])
  tx = bnp_optax.scale_by_bnp(layers=ignored)
  tx.update(grads, tx.init(params), stats=stats)


def test_the_table_of_a_model_serves_for_a_part_of_it():
  layouts = bnp_optax.linen.layers(nn.Sequential([nn.Dense(4), nn.Dense(3)]), jnp.ones((2, 5)))
  (layer,) = find_layers({"layers_1": {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}}, layouts)
  assert layer.path == ("layers_1", "kernel")


def test_a_bias_of_another_name_is_not_overlooked():
  params = {"a": {"w": jnp.ones((2, 4)), "b": jnp.ones(4)}}
  raises(
    r"Layer a/w: layers= names its bias 'bias'.* 'b' has the shape of a bias.*bias='b'",
    *(find_layers, params, {("a", "w"): KernelLayout()}),
  )
  for bias, found in (("b", 0), ("", None)):
    (layer,) = find_layers(params, {("a", "w"): KernelLayout(bias=bias)})
    assert layer.bias == found


def test_a_kernel_of_another_layer_is_no_bias():
  params = {"up": jnp.ones((2, 4)), "down": jnp.ones((4, 1))}
  layers = find_layers(params, {("up",): KernelLayout(), ("down",): KernelLayout()})
  assert [layer.bias for layer in layers] == [None, None]


def test_a_bias_with_axes_of_size_1_is_that_of_a_convolution():
  """Equinox's Conv has the weight [output, feature, *window] and the bias [output, 1, 1]."""
  layout = KernelLayout(window=(2, 3), feature=(1,), output=(0,), bias="bias")
  rng = np.random.default_rng(0)
  weight, bias = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((4, 2, 3, 3), (4, 1, 1)))
  inputs = jnp.asarray(rng.normal(2, 1, (5, 9, 2)), jnp.float32)
  tx = problems.compiled(bnp_optax.bnp(optax.sgd(0.1), layers={("conv", "weight"): layout}))
  updates = []
  for b in (bias, bias.ravel()):
    params = {"conv": {"weight": weight, "bias": b}}
    statistics = bnp_optax.layer_statistics(inputs, examples=5, rows=45, kernel="weight")
    stats = {"conv": {"inputs": statistics}}
    updates.append(tx.update(params, tx.init(params), params, stats=stats)[0]["conv"])
  assert updates[0]["bias"].shape == (4, 1, 1)
  for name in ("weight", "bias"):
    one, other = (np.ravel(x[name]) for x in updates)
    np.testing.assert_array_equal(one, other)
    assert np.any(one)


@pytest.mark.parametrize(
  "layers", [["hidden", "head"], {"hidden": KernelLayout()}, {("hidden", "kernel"): None}, 3]
)
def test_layers_of_another_type(layers):
  with pytest.raises(TypeError, match=r"layers= must map the path of each kernel.*got"):
    bnp_optax.scale_by_bnp(layers=layers)


def test_find_layers_skips_those_that_are_masked_out():
  masked = optax.MaskedNode()
  params = {"a": {"kernel": masked}, "b": {"kernel": masked, "bias": masked}}
  layers = find_layers(params | params_like(c=(2, 4)), None)
  assert [layer.path for layer in layers] == [("c", "kernel")]


def test_layers_of_whole_variables():
  params = {"params": params_like(a=(2, 4))}
  layouts = {("a", "kernel"): KernelLayout()}
  raises(r"or add their first level: layers={\('params', \*path\)", find_layers, params, layouts)
  above = {("params", *path): x for path, x in layouts.items()}
  assert [layer.path for layer in find_layers(params, above)] == [("params", "a", "kernel")]


def test_layers_of_another_model():
  raises(
    "These kernels in layers= are not in the parameters: kernel. The parameters are conv/kernel",
    bnp_optax.scale_by_bnp(layers=bnp_optax.linen.layers(nn.Dense(2), jnp.ones((4, 3)))).init,
    params_like(conv=(3, 2)),
  )
  layouts = {("conv", "kernel"): KernelLayout.by_convention(3)}
  raises(
    "These kernels in layers= are not in the parameters: conv/kernel. The parameters are "
    "params/kernel",
    bnp_optax.scale_by_bnp(layers=layouts).init,
    {"params": {"kernel": jnp.ones((3, 2))}},
  )
  raises(
    r"Layer conv: layers= has a layout of 3 axes .* kernel has shape \(3, 2\)",
    bnp_optax.scale_by_bnp(layers=layouts).init,
    params_like(conv=(3, 2)),
  )


@pytest.mark.parametrize("away", ["kernel", "bias"])
def test_a_mask_that_separates_kernel_and_bias(mlp, away):
  params, _, _ = mlp
  mask = jax.tree.map_with_path(
    lambda path, _: path != (jax.tree_util.DictKey("first"), jax.tree_util.DictKey(away)), params
  )
  tx = optax.masked(bnp_optax.scale_by_bnp(), mask)
  expected = rf"Layer first: .* its {away} is masked or left out.*give it both or neither"
  raises(expected, tx.init, params)
  # As where nnx.Optimizer(wrt=...) selects parameters.
  layers = bnp_optax.linen.layers(problems.MLP(), jnp.ones((8, 5)))
  part = {**params, "first": {k: x for k, x in params["first"].items() if k != away}}
  raises(expected, bnp_optax.scale_by_bnp(layers=layers).init, part)


def test_complex_kernels():
  params = {"layer": {"kernel": jnp.ones((2, 2), jnp.complex64)}}
  raises("Layer layer: .*real kernels.*complex64", bnp_optax.scale_by_bnp().init, params)


def test_kernels_that_are_not_of_a_dense_or_conv():
  init = bnp_optax.scale_by_bnp().init
  raises(r"Layer odd: a kernel of shape \(3,\)", init, {"odd": {"kernel": jnp.ones(3)}})
  attention = {"kernel": jnp.ones((6, 2, 3)), "bias": jnp.ones((2, 3))}
  raises(r"Layer query: the bias has shape \(2, 3\), .*layers=", init, {"query": attention})


def test_choose_layer():
  layers = find_layers(params_like(a=(2, 3), b=(3, 4)), None)
  assert choose_layer(layers, ("b", "kernel")) is layers[1]
  assert choose_layer(layers, ["b", "kernel"]) is layers[1]
  assert choose_layer(layers[:1], None) is layers[0]
  known = r"give layer= one of \[\('a', 'kernel'\), \('b', 'kernel'\)\]"
  with pytest.raises(ValueError, match=f"Several layers: {known}"):
    choose_layer(layers, None)
  with pytest.raises(ValueError, match=rf"No layer at \('c',\): {known}"):
    choose_layer(layers, ("c",))
