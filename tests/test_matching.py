"""Matching by name and shape: every error of `_matching`, raised while tracing.

Errors of layers that lose their statistics inside a model are in tests/test_linen.py.
"""

import dataclasses
import functools

from flax.core import FrozenDict
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest

import bnp_optax
from bnp_optax import KernelLayout, _statistics
from bnp_optax._kernels import find_layers
from bnp_optax._matching import match_state, match_statistics
from tests import problems
from tests.problems import raises


def params_like(**shapes):
  return {name: {"kernel": jnp.ones(shape)} for name, shape in shapes.items()}


# The statistics of each layer.


def statistics(features, layout=None):
  """Return statistics of one row of ones."""
  ones = jnp.ones(features)
  return bnp_optax.LayerStatistics(jnp.ones(()), jnp.ones(()), ones, 0 * ones, ones, layout=layout)


def test_match_statistics_is_in_the_order_of_the_layers():
  params = params_like(a=(2, 3), b=(3, 4))
  stats = {name: {"layer_statistics": statistics(n)} for name, n in (("b", 3), ("a", 2))}
  matched = match_statistics(find_layers(params, None), jax.tree.leaves(params), stats)
  assert [x.total.shape for x in matched] == [(2,), (3,)]


def test_match_statistics_merges_the_calls_of_a_scan_over_time():
  layout = dataclasses.replace(KernelLayout(), calls=(0,))
  params, one = params_like(a=(2, 3)), statistics(2)
  stats = {"a": {"layer_statistics": jax.tree.map(lambda x: jnp.stack([x, x, x]), one)}}
  layers = find_layers(params, {("a", "kernel"): layout})
  (merged,) = match_statistics(layers, jax.tree.leaves(params), stats)
  assert (merged.examples, merged.rows, merged.total.tolist()) == (1, 3, [3, 3])


def test_no_stats(mlp):
  params, grads, _ = mlp
  tx = bnp_optax.scale_by_bnp()
  raises("call tx.update.*stats=stats", tx.update, grads, tx.init(params))
  raises("call tx.update.*stats=stats", tx.update, grads, tx.init(params), stats=None)


def test_stats_without_statistics(mlp):
  params, grads, _ = mlp
  tx = bnp_optax.scale_by_bnp()
  for stats in ({}, {"first": {"h": (jnp.ones(3),)}}):
    raises(
      r'(?s)holds no LayerStatistics.*mutable=\["intermediates"\].*sow_statistics',
      tx.update,
      grads,
      tx.init(params),
      stats=stats,
    )


def test_two_statistics_of_one_kernel(mlp):
  params, grads, stats = mlp
  tx = bnp_optax.scale_by_bnp()
  entry = next(iter(stats["first"].values()))
  update = functools.partial(tx.update, grads, tx.init(params))
  raises(
    "Layer first: there are two statistics of its kernel. Merge .* bnp_optax.merge_calls",
    update,
    stats=stats | {"first": {"left": entry, "right": dataclasses.replace(entry)}},
  )
  update(stats=stats | {"first": {"any name": bnp_optax.merge_calls(entry, entry)}})


def test_a_model_mapped_over_examples_names_the_remedy():
  mapped = nn.vmap(nn.Dense, variable_axes={"params": None}, split_rngs={"params": False})(3)
  params = mapped.init(jax.random.key(0), jnp.ones((6, 4)))["params"]
  with bnp_optax.linen.sow_statistics():
    _, aux = mapped.apply({"params": params}, jnp.ones((6, 4)), mutable=["intermediates"])
  tx = bnp_optax.scale_by_bnp()
  update = functools.partial(tx.update, stats=aux.get("intermediates", {}))
  raises(r"Under nn.vmap .* sow_statistics\(examples=", update, params, tx.init(params))


def test_a_kernel_without_statistics_is_named_with_the_remedies(mlp):
  params, grads, stats = mlp
  tx = bnp_optax.scale_by_bnp()
  raises(
    "(?s)No statistics for second. There are statistics for first.*optax.partition.*layers=",
    tx.update,
    grads,
    tx.init(params),
    stats={"first": stats["first"]},
  )


def test_levels_are_not_blamed_for_one_missing_layer():
  """The path of a kernel of the model itself is the end of every path."""
  params = {"kernel": jnp.ones((2, 2)), "dense": {"kernel": jnp.ones((2, 2))}}
  stats = {"dense": {"layer_statistics": statistics(2)}}
  tx = bnp_optax.scale_by_bnp()
  with pytest.raises(ValueError, match=r"No statistics for .*itself") as error:
    tx.update(params, tx.init(params), stats=stats)
  assert "first levels" not in str(error.value)


@pytest.mark.parametrize("nested", ["params", "stats"])
def test_a_level_too_many_is_named(nested, mlp):
  params, grads, stats = mlp
  if nested == "params":
    params, grads = {"params": params}, {"params": grads}
  else:
    stats = {"intermediates": stats}
  tx = bnp_optax.scale_by_bnp()
  remedy = r", or add their first level: stats={'params': stats}\."
  match = r"The paths differ in their first levels.*\]" + (remedy if nested == "params" else r"\.")
  raises(match, tx.update, grads, tx.init(params), stats=stats)
  if nested == "params":
    tx.update(grads, tx.init(params), stats={"params": stats})


def test_all_kernels_without_statistics_are_listed():
  params = {f"layer_{i}": {"kernel": jnp.ones((2, 2))} for i in range(30)}
  tx = bnp_optax.scale_by_bnp()
  _, stats = problems.grads_and_stats(nn.Dense(1), *problems.make(nn.Dense(1), (2, 2)))
  with pytest.raises(ValueError, match="layer_0, layer_1, ") as error:
    tx.update(params, tx.init(params), stats={"other": stats})
  assert all(f"layer_{i}" in str(error.value) for i in range(30))


def test_a_layer_whose_statistics_are_undefined():
  params = params_like(a=(2, 3), b=(2, 3))
  stats = {
    "a": {"layer_statistics": statistics(2)},
    "b": {"layer_statistics": _statistics.NoStatistics("kernel", "its kernel is masked")},
  }
  tx = bnp_optax.scale_by_bnp()
  raises(
    "No statistics for b: its kernel is masked. .* optax.masked or optax.partition",
    tx.update,
    params,
    tx.init(params),
    stats=stats,
  )


@pytest.mark.parametrize(
  "reported",
  [KernelLayout(feature=(1,), output=(0,)), KernelLayout(groups=2), KernelLayout(bias="offset")],
)
def test_a_layer_that_reports_another_layout(reported):
  params = params_like(a=(2, 2))
  tx = bnp_optax.scale_by_bnp()
  stats = {"a": {"layer_statistics": statistics(2, reported)}}
  raises(
    "their kernels have other axes than assumed: a. Pass layers=",
    tx.update,
    params,
    tx.init(params),
    stats=stats,
  )


def test_a_table_of_a_call_that_did_not_report_a_kernel():
  class Model(nn.Module):
    @nn.compact
    def __call__(self, x, report=True):
      w = self.param("w", nn.initializers.normal(), (5, 3))
      if report:
        bnp_optax.linen.report(self, "w", x, "...d,df->...f")
      return nn.Dense(3, name="dense")(x) + x @ w

  x, key = jnp.ones((4, 5)), jax.random.key(0)
  tx = bnp_optax.scale_by_bnp(layers=bnp_optax.linen.layers(Model(), x, report=False))
  params = Model().init(key, x)["params"]
  with bnp_optax.linen.sow_statistics():
    _, aux = Model().apply({"params": params}, x, mutable=["intermediates"])
  update = functools.partial(tx.update, params, tx.init(params))
  match = "layers= has no layer w: it is .* a call without the layer"
  raises(match, update, stats=aux["intermediates"])


def test_exact_windows_in_the_statistics_alone():
  """Under a stack, which the layer does not report, `exact_windows` must still agree."""
  reported = dataclasses.replace(KernelLayout.by_convention(3), exact_windows=True)
  layout = KernelLayout.by_convention(3).stacked([0])
  params, stats = params_like(a=(4, 3, 2, 2)), {"a": {"s": statistics((4, 2), reported)}}
  tx = bnp_optax.scale_by_bnp(layers={("a", "kernel"): layout})
  raises("the same exact_windows= as in sow", tx.update, params, tx.init(params), stats=stats)


def test_statistics_of_another_width(mlp):
  params, grads, stats = mlp
  tx = bnp_optax.scale_by_bnp()
  raises(
    r"Layer first: its kernel of shape \(5, 4\) takes inputs of shape \(5,\), but .* of \(4,\)",
    tx.update,
    grads,
    tx.init(params),
    stats={"first": stats["second"], "second": stats["second"]},
  )


def test_statistics_under_vmap_without_axis_name(mlp):
  params, grads, stats = mlp
  tx = bnp_optax.scale_by_bnp()
  stats = jax.tree.map(lambda s: jnp.stack([s, s]), stats)
  raises(
    r"under jax.vmap without sow_statistics\(axis_name=",
    tx.update,
    grads,
    tx.init(params),
    stats=stats,
  )


# The state.


def test_parameters_of_other_gradients():
  params = {name: {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)} for name in "ab"}
  grads, stats = {"b": params["b"]}, {"b": {"layer_statistics": statistics(3)}}
  tx = bnp_optax.bnp(optax.sgd(0.1))
  match = "params and the gradients have different leaves; the first that differ are a/bias and b/"
  raises(match, tx.update, grads, tx.init(grads), params, stats=stats)
  raises("differ are none and b/bias", tx.update, grads, tx.init(grads), {}, stats=stats)
  tx.update(grads, tx.init(grads), grads, stats=stats)


def test_state_for_other_parameters(mlp):
  params, grads, stats = mlp
  tx = bnp_optax.scale_by_bnp()
  wider = {**params, "first": {"kernel": jnp.ones((6, 4)), "bias": jnp.ones(4)}}
  raises(
    r"Layer first: the state's input_mean should be of shape \(5,\), found \(6,\).*tx.init",
    tx.update,
    grads,
    tx.init(wider),
    stats=stats,
  )


@pytest.mark.parametrize(
  ("change", "match"),
  [
    (lambda p: {"first": p["first"]}, r"its input_mean lacks second\. Call tx.init"),
    (lambda p: {**p, "third": p["first"]}, "its input_mean has third, which they lack"),
    (lambda p: {**p, "norm": {"scale": jnp.ones(3)}}, "its input_mean has norm, which they lack"),
    (lambda p: {**p, "gain": jnp.ones(3)}, "its input_mean has gain, which they lack"),
    (lambda p: {"first": p["first"], "a": p["second"]}, "lacks second and has a, which they lack"),
    (lambda p: FrozenDict(p), "its input_mean has the structure"),
  ],
)
def test_a_state_for_other_parameters_names_what_was_added_and_removed(change, match, mlp):
  params, grads, stats = mlp
  tx = bnp_optax.scale_by_bnp()
  raises(match, tx.update, grads, tx.init(change(params)), stats=stats)


def test_a_state_made_with_other_layers(mlp):
  params, grads, stats = mlp
  layouts = {(name, "kernel"): KernelLayout() for name in ("first", "second")}
  both = bnp_optax.scale_by_bnp(layers=layouts)
  one = bnp_optax.scale_by_bnp(layers={("first", "kernel"): KernelLayout()})
  match = "input_mean has an array for second/kernel, which is no layer"
  raises(match, one.update, grads, both.init(params), stats=stats)
  raises(
    r"Layer second: .* of shape \(4,\), found None",
    both.update,
    grads,
    one.init(params),
    stats=stats,
  )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int32"])
def test_a_state_that_was_cast(dtype, mlp):
  params, grads, stats = mlp
  tx = bnp_optax.scale_by_bnp()
  state = jax.tree.map(lambda x: x.astype(jnp.dtype(dtype)), tx.init(params))
  raises(
    rf"Layer first: the state's input_mean is {dtype}\. Below float32",
    tx.update,
    grads,
    state,
    stats=stats,
  )


def test_a_state_whose_variance_alone_is_of_other_parameters(mlp):
  params, grads, stats = mlp
  tx = bnp_optax.scale_by_bnp()
  state = tx.init(params)
  mean = dict(state.input_mean, first={"kernel": jnp.ones(6), "bias": optax.MaskedNode()})
  raises(
    r"Layer first: the state's input_variance should be of shape \(5,\), found \(6,\)",
    tx.update,
    grads,
    state._replace(input_variance=mean),
    stats=stats,
  )


def test_a_state_of_another_optimizer(mlp):
  params, grads, stats = mlp
  scale, bnp = bnp_optax.scale_by_bnp(), bnp_optax.bnp(optax.identity())
  message = "BNP was given a state that is a {}, not a {}.*otherwise call tx.init"
  match = message.format("BnpState", "ScaleByBnpState")
  raises(match, scale.update, grads, bnp.init(params), params, stats=stats)
  match = message.format("ScaleByBnpState", "BnpState")
  raises(match, bnp.update, grads, scale.init(params), params, stats=stats)
  match = message.format("EmptyState", "ScaleByBnpState")
  raises(match, scale.update, grads, optax.EmptyState(), params, stats=stats)


def test_match_state_returns_the_leaves_in_the_order_of_the_gradients():
  params = params_like(a=(2, 3))
  params = {"a": params["a"] | {"bias": jnp.ones(3)}, "scale": jnp.ones(2)}
  mean = bnp_optax.scale_by_bnp().init(params).input_mean
  (layer,) = find_layers(params, None)
  found = match_state("input_mean", mean, params, {layer: (2,)})
  assert [getattr(x, "shape", None) for x in found] == [None, (2,), None]


@pytest.mark.parametrize("debias", [True, False])
def test_a_state_of_another_debias(debias, mlp):
  params, grads, stats = mlp
  state = bnp_optax.scale_by_bnp(debias=debias).init(params)
  tx = bnp_optax.scale_by_bnp(debias=not debias)
  raises("another debias=", tx.update, grads, state, stats=stats)
