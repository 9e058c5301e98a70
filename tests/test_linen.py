"""`linen.sow_statistics`: the statistics of each layer, an unchanged model, and errors."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bnp_optax
from bnp_optax import LayerStatistics
from bnp_optax.linen import sow_statistics
from tests import problems, reference
from tests.compiling import AS_USERS_DO


def sow(model, params, *args, context=None, **kwargs):
  """Return the intermediates of one jitted forward pass with statistics."""

  @jax.jit
  def forward(params, args):
    with sow_statistics(**(context or {})):
      return model.apply({"params": params}, *args, mutable=["intermediates"], **kwargs)[1]

  return forward(params, args).get("intermediates", {})


def init(model, *args, **kwargs):
  """Return random parameters; `model.init` would be compiled."""
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(model.init, jax.random.key(0), *args, **kwargs)["params"]
  return jax.tree.map(lambda p: jax.device_put(rng.normal(size=p.shape).astype(p.dtype)), shapes)


def check(statistics, rows, *, examples=None, tolerance=1e-6):
  """Check statistics against the rows of H."""
  rows = np.asarray(rows, np.float64).reshape(-1, np.shape(rows)[-1])
  assert statistics.rows == len(rows)
  assert statistics.examples == (len(rows) if examples is None else examples)
  np.testing.assert_allclose(statistics.mean, rows.mean(0), rtol=tolerance)
  np.testing.assert_allclose(statistics.variance, rows.var(0), rtol=tolerance)


def uniform(*shape, seed=0, dtype=jnp.float32):
  return jax.device_put(np.random.default_rng(seed).uniform(1, 2, shape).astype(dtype))


# It changes nothing.


class Sower(nn.Module):
  """A network that sows values itself."""

  @nn.compact
  def __call__(self, x):
    x = nn.relu(nn.Conv(4, (3, 3))(x))
    self.sow("intermediates", "features", x)
    x = nn.Dense(3)(x.mean((1, 2)))
    self.sow("intermediates", "logits", x)
    return x


@pytest.mark.slow
@pytest.mark.parametrize("model", [problems.CNN(), Sower(), nn.remat(problems.CNN)()])
def test_outputs_and_gradients_are_bitwise_the_same(model):
  params, batch = problems.make(model, (4, 8, 8, 3))

  def loss_fn(params, batch, *, sow):
    x, y = batch
    if not sow:
      outputs = model.apply({"params": params}, x)
      return jnp.sum((outputs - y) ** 2), (outputs, {})
    with sow_statistics():
      outputs, aux = model.apply({"params": params}, x, mutable=["intermediates"])
    return jnp.sum((outputs - y) ** 2), (outputs, aux["intermediates"])

  run = lambda sow: jax.jit(
    jax.value_and_grad(functools.partial(loss_fn, sow=sow), has_aux=True),
    compiler_options=AS_USERS_DO,
  )(params, batch)
  (loss, (outputs, _)), grads = run(False)
  (sown_loss, (sown_outputs, stats)), sown_grads = run(True)
  assert jax.tree.leaves(stats)
  chex.assert_trees_all_equal((loss, outputs, grads), (sown_loss, sown_outputs, sown_grads))


def test_values_sown_by_the_model_are_unchanged():
  x = uniform(2, 6, 6, 3)
  params = init(Sower(), x)
  _, plain = jax.jit(lambda p: Sower().apply({"params": p}, x, mutable=["intermediates"]))(params)
  sown = sow(Sower(), params, x)
  assert set(sown) == {"features", "logits", "Conv_0", "Dense_0"}
  chex.assert_trees_all_equal({k: sown[k] for k in plain["intermediates"]}, plain["intermediates"])


def test_nothing_is_sown_into_other_collections_or_at_init():
  model, x = problems.MLP(), uniform(4, 5)

  def run(x):
    with sow_statistics():
      variables = model.init(jax.random.key(0), x)
      return variables, model.apply(variables, x)

  variables, outputs = jax.eval_shape(run, x)
  assert set(variables) == {"params"}
  assert outputs.shape == (4, 3)


def test_the_second_call_compiles_nothing():
  x = uniform(4, 5)
  params = init(problems.MLP(), x)

  @jax.jit
  @chex.assert_max_traces(n=1)
  def forward(params, x):
    with sow_statistics():
      return problems.MLP().apply({"params": params}, x, mutable=["intermediates"])

  forward(params, x)
  forward(params, x + 1)
  assert forward._cache_size() == 1


# Every way to build a model.


def test_a_jitted_module_is_traced_once_without_jit_around_it():
  traces = []

  class Layer(nn.Module):
    @nn.compact
    def __call__(self, x):
      traces.append(None)
      return nn.Dense(3)(x)

  # Its first call is within a context.
  model, x = nn.jit(Layer)(), uniform(4, 5)
  params = {"Dense_0": {"kernel": uniform(5, 3), "bias": uniform(3)}}
  for _ in range(3):
    with sow_statistics():
      model.apply({"params": params}, x, mutable=["intermediates"])
  assert len(traces) == 1


class Tied(nn.Module):
  """One layer, called three times."""

  @nn.compact
  def __call__(self, x):
    layer = nn.Dense(x.shape[-1], name="layer")
    for _ in range(3):
      self.sow("intermediates", "inputs", x)
      x = layer(x)
    return x


def test_calls_of_a_layer_add_rows_of_the_same_examples():
  x = uniform(5, 4)
  stats = sow(Tied(), init(Tied(), x), x)
  check(stats["layer"]["layer_statistics"], np.concatenate(stats["inputs"]), examples=5)


class Scanned(nn.Module):
  """Layers stacked by nn.scan."""

  axes: tuple[str, ...] = ("params", "intermediates")
  features: int = 3

  @nn.compact
  def __call__(self, x):
    block = nn.scan(
      lambda module, x, _: (nn.tanh(module(x)), None),
      variable_axes=dict.fromkeys(self.axes, 0),
      split_rngs={"params": True},
      length=4,
    )
    return block(nn.Dense(self.features, name="block"), x, None)[0]


class Setup(nn.Module):
  def setup(self):
    self.layers = [nn.Dense(4), nn.Dense(3)]
    self.heads = {"a": nn.Dense(2)}

  def encode(self, x):
    for layer in self.layers:
      x = layer(x)
    return x

  def __call__(self, x):
    return self.heads["a"](self.encode(x))


def test_setup_and_methods():
  x = uniform(6, 5)
  params = init(Setup(), x)
  assert set(sow(Setup(), params, x)) == {"layers_0", "layers_1", "heads_a"}
  stats = sow(Setup(), params, x, method=Setup.encode)
  assert set(stats) == {"layers_0", "layers_1"}
  check(stats["layers_0"]["layer_statistics"], x)


class Shared(nn.Module):
  def setup(self):
    self.inner = problems.MLP()
    nn.share_scope(self, self.inner)

  def __call__(self, x):
    return self.inner(x)


@pytest.mark.parametrize("wrap", [nn.remat, nn.jit, lambda m: nn.jit(nn.remat(m))])
def test_lifted_transforms(wrap):
  x = uniform(4, 5)
  params = init(problems.MLP(), x)
  model = wrap(problems.MLP)()
  # Traced before without statistics: nothing stale may come back.
  jax.eval_shape(lambda: model.apply({"params": params}, x))
  jax.eval_shape(lambda: model.apply({"params": params}, x, mutable=["intermediates"]))
  stats = sow(model, params, x)
  chex.assert_trees_all_close(stats, sow(problems.MLP(), params, x), rtol=1e-6)
  _, stats = problems.grads_and_stats(model, params, (x, jnp.zeros((4, 3))))
  check(stats["first"]["layer_statistics"], x)


@pytest.mark.slow
@pytest.mark.parametrize("wrap", [lambda m: m, nn.remat, nn.jit, lambda m: nn.jit(nn.remat(m))])
@pytest.mark.parametrize("model", [problems.MLP, problems.CNN])
def test_steps_with_the_sown_statistics_are_those_of_the_paper(model, wrap):
  with jax.enable_x64(True):
    shape = (4, 5) if model is problems.MLP else (2, 6, 6, 3)
    params, batch = problems.make(model("float64"), shape, "float64")
    tx = bnp_optax.scale_by_bnp(0.9, debias=False)

    @jax.jit
    def step(params, state):
      grads, stats = problems.grads_and_stats(wrap(model)("float64"), params, batch)
      updates, state = tx.update(grads, state, params, stats=stats)
      return optax.apply_updates(params, updates), state

    expected, _ = reference.train(reference.bnp(rho=0.9), model("float64"), params, [batch] * 2)
    actual, state = params, tx.init(params)
    for _ in range(2):
      actual, state = step(actual, state)
    chex.assert_trees_all_close(actual, expected, rtol=1e-9, atol=1e-12)


def test_share_scope():
  x = uniform(4, 5)
  params = init(Shared(), x)
  assert set(params) == {"first", "second"}
  stats = sow(Shared(), params, x)
  check(stats["first"]["layer_statistics"], x)
  tx = bnp_optax.scale_by_bnp(debias=False)
  jax.eval_shape(tx.update, params, tx.init(params), stats=stats)


def test_a_subclass_that_calls_its_parent_is_read_once():
  class Doubled(nn.Dense):
    def __call__(self, inputs):
      return super().__call__(2 * inputs)

  x = uniform(4, 5)
  check(sow(Doubled(3), init(Doubled(3), x), x)["layer_statistics"], 2 * x)


def test_inputs_by_keyword():
  x = uniform(4, 5)
  with sow_statistics():
    _, aux = nn.Dense(3).apply(
      {"params": init(nn.Dense(3), x)}, inputs=x, mutable=["intermediates"]
    )
  check(aux["intermediates"]["layer_statistics"], x)


def test_one_unbatched_input():
  x = uniform(5)
  check(sow(nn.Dense(3), init(nn.Dense(3), x), x)["layer_statistics"], x[None])


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.uint8, jnp.bool_])
def test_integers_and_booleans(dtype):
  x = jnp.asarray(np.random.default_rng(0).integers(0, 2, (6, 4)), dtype)
  model = nn.Dense(3, dtype=jnp.float32)
  check(sow(model, init(model, x), x)["layer_statistics"], x)


def test_numpy_inputs():
  x = np.asarray(uniform(4, 5))
  with sow_statistics():
    _, aux = nn.Dense(3).apply({"params": init(nn.Dense(3), x)}, x, mutable=["intermediates"])
  check(aux["intermediates"]["layer_statistics"], x)


# Precision.


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_with_a_large_mean(dtype):
  """E[h^2] - E[h]^2 in bfloat16 gave 0.0 here."""
  x = jnp.asarray(100 + np.random.default_rng(0).normal(size=(512, 3)), dtype)
  model = nn.Dense(2, dtype=dtype, param_dtype=dtype)
  statistics = sow(model, init(model, x), x)["layer_statistics"]
  chex.assert_type(jax.tree.leaves(statistics), jnp.float32)
  check(statistics, x.astype(jnp.float32), tolerance=1e-5)


def test_double_precision():
  with jax.enable_x64(True):
    x = uniform(50, 3, dtype=jnp.float64) + 1e6
    model = nn.Dense(2, param_dtype=jnp.float64)
    params = init(model, x)
    statistics = sow(model, params, x)["layer_statistics"]
    chex.assert_type(jax.tree.leaves(statistics), jnp.float64)
    check(statistics, x, tolerance=1e-9)
    state = bnp_optax.scale_by_bnp(debias=False).init(params)
    assert state.input_mean["kernel"].dtype == jnp.float64


# Examples, rows, masks.


def test_example_axes():
  x = uniform(4, 6, 5)
  params = init(nn.Dense(3), x)
  check(sow(nn.Dense(3), params, x)["layer_statistics"], x, examples=4)
  stats = sow(nn.Dense(3), params, x, context={"example_axes": 2})
  check(stats["layer_statistics"], x, examples=24)


@pytest.mark.parametrize(("example_axes", "examples"), [(1, 3), (2, 7)])
def test_padding(example_axes, examples):
  mask = jnp.array([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 0]], bool)
  x = jnp.where(mask[..., None], uniform(3, 4, 5), jnp.nan)
  params = init(nn.Dense(2), x)
  context = {"example_axes": example_axes, "mask": mask}
  statistics = sow(nn.Dense(2), params, x, context=context)["layer_statistics"]
  check(statistics, np.asarray(x)[np.asarray(mask)], examples=examples)


def test_padding_of_examples():
  mask = jnp.array([True, True, False])
  x = uniform(3, 4, 5)
  statistics = sow(nn.Dense(2), init(nn.Dense(2), x), x, context={"mask": mask})["layer_statistics"]
  check(statistics, x[:2], examples=2)


class Pooled(nn.Module):
  """A layer on tokens, and a head on their masked mean, which is NaN for padding alone."""

  @nn.compact
  def __call__(self, x, mask):
    h = nn.Dense(3, name="tokens")(jnp.where(mask[..., None], x, 0))
    return nn.Dense(2, name="head")(h.mean(1, where=mask[..., None]))


def test_a_head_after_pooling_takes_the_examples_that_are_not_padding_alone():
  x = uniform(3, 4, 5)
  mask = jnp.array([[1, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]], bool)
  params = init(Pooled(), x, mask)
  stats = sow(Pooled(), params, x, mask, context={"mask": mask})
  check(stats["tokens"]["layer_statistics"], x[mask], examples=2)
  kernel, bias = (np.asarray(params["tokens"][name]) for name in ("kernel", "bias"))
  h = np.stack([x[0, :2].mean(0), x[2, 0]]) @ kernel + bias
  check(stats["head"]["layer_statistics"], h, tolerance=1e-5)


def test_a_mask_that_does_not_fit():
  x, model = uniform(3, 4, 5), nn.Dense(2, name="dense")
  params = init(model, x)
  with pytest.raises(ValueError, match=r"mask of shape \(3, 5\) does not fit .*\(3, 4, 5\)"):
    sow(model, params, x, context={"mask": jnp.ones((3, 5), bool)})


def test_a_mask_that_does_not_fit_windows():
  x, model = uniform(4, 9, 2), nn.Conv(3, (3,), strides=2)
  context = {"mask": jnp.ones((4, 9), bool), "exact_windows": True}
  with pytest.raises(
    ValueError, match=r"windows, those of exact_windows=True, of shape \(4, 5, 6\)"
  ):
    sow(model, init(model, x), x, context=context)


class Graph(nn.Module):
  """A network of nodes and edges, each with padding, with the positions folded into one axis."""

  @nn.compact
  def __call__(self, nodes, edges, sender):
    h = nn.relu(nn.Dense(4, name="node")(nodes))
    h = nn.Dense(4, name="edge")(jnp.concatenate([h[sender], edges], -1))
    return nn.Dense(1, name="out")(jax.ops.segment_sum(h, sender, len(nodes)))


def graph():
  nodes, edges = uniform(8, 3).at[6:].set(jnp.nan), uniform(12, 2, seed=1).at[9:].set(jnp.nan)
  return nodes, edges, jnp.array([0, 1, 2, 3, 4, 5, 0, 1, 2, 7, 7, 7])


def test_a_mask_for_each_prefix():
  nodes, edges, sender = graph()
  params = init(Graph(), nodes, edges, sender)
  with pytest.raises(ValueError, match=r"Layer edge: the mask of shape \(8,\) .* \(12, 6\)"):
    sow(Graph(), params, *graph(), context={"mask": np.arange(8) < 6})
  masks = {"": np.arange(8) < 6, "edge": np.arange(12) < 9}
  stats = sow(Graph(), params, *graph(), context={"mask": masks, "examples": 6})
  kernel, bias = (np.asarray(params["node"][name]) for name in ("kernel", "bias"))
  h = np.maximum(0, np.asarray(nodes) @ kernel + bias)
  rows = np.concatenate([h[sender], edges], -1)[:9]
  check(stats["edge"]["layer_statistics"], rows, examples=6, tolerance=1e-5)
  check(stats["node"]["layer_statistics"], nodes[:6], examples=6)


def test_a_prefix_without_a_mask():
  """The mask of one part does not fit the other, which has none."""

  class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
      return nn.Dense(2, name="fits")(x[:, :2]), nn.Dense(2, name="other")(x)

  x, mask = uniform(3, 4, 5), jnp.ones((3, 2), bool).at[0, 0].set(False)
  params = init(Model(), x)
  for masks in ({"fits": mask}, {"": mask, "other": None}, {"fits/kernel": mask}):
    stats = sow(Model(), params, x, context={"mask": masks})
    assert stats["fits"]["layer_statistics"].rows == 5
    assert stats["other"]["layer_statistics"].rows == 12
  with pytest.raises(ValueError, match="no layer that was called: othr"):
    sow(Model(), params, x, context={"mask": {"fits": mask, "othr": None}})


def test_masks_by_prefix_with_an_inner_function_that_was_traced_before():
  x, model = uniform(4, 3), nn.Dense(2)
  params = init(model, x)
  forward = jax.jit(lambda x: model.apply({"params": params}, x, mutable=["intermediates"])[1])
  for _ in range(2):
    with sow_statistics(mask={"": np.array([1, 0, 1, 1])}):
      assert forward(x)["intermediates"]["layer_statistics"].rows == 3


def test_a_function_traced_before_with_other_masks_by_prefix():
  x, model = uniform(4, 3), nn.Sequential([nn.Dense(2), nn.Dense(2)])
  params = init(model, x)
  forward = jax.jit(lambda x: model.apply({"params": params}, x, mutable=["intermediates"])[1])
  for mask in ([1, 0, 1, 1], [1, 0, 0, 0]):
    with sow_statistics(mask={"": np.ones(4), "layers_1": np.array(mask)}, examples=4):
      stats = forward(x)["intermediates"]
    assert stats["layers_1"]["layer_statistics"].rows == sum(mask)


@pytest.mark.parametrize("cast", [np.asarray, lambda m: 3 * m.astype(int), lambda m: m.tolist()])
def test_a_mask_of_numbers_counts_what_is_not_zero(cast):
  mask = np.array([[1, 1, 0], [1, 0, 0]], bool)
  x = uniform(2, 3, 5)
  params = init(nn.Dense(2), x)
  statistics = sow(nn.Dense(2), params, x, context={"mask": cast(mask)})["layer_statistics"]
  check(statistics, np.asarray(x)[mask], examples=2)


def test_a_sequence_of_padding_alone_is_no_example():
  mask = jnp.array([[1, 1, 0], [0, 0, 0]], bool)
  x = uniform(2, 3, 5)
  statistics = sow(nn.Dense(2), init(nn.Dense(2), x), x, context={"mask": mask})["layer_statistics"]
  check(statistics, x[0, :2], examples=1)


def test_an_equal_mask_outside_of_jit_is_no_new_trace():
  x, traced = uniform(4, 3), []

  @jax.jit
  def forward(params):
    traced.append(None)
    return nn.Dense(2).apply({"params": params}, x, mutable=["intermediates"])

  params = init(nn.Dense(2), x)
  for mask in ([True, True, False, True], [True, True, False, True], [True, False, False, True]):
    with sow_statistics(mask=np.array(mask)):
      _, aux = forward(params)
    assert aux["intermediates"]["layer_statistics"].rows == sum(mask)
  assert len(traced) == 2


@pytest.mark.parametrize("model", [nn.Conv(2, (3, 3)), nn.ConvTranspose(2, (3, 3))])
def test_one_map_without_a_batch_axis_is_one_example(model):
  x = uniform(1, 6, 6, 3)
  params = init(model, x)
  alone, batch = (sow(model, params, x)["layer_statistics"] for x in (x[0], x))
  chex.assert_trees_all_equal(alone, batch)
  assert alone.examples == 1


def test_an_empty_batch():
  params = init(nn.Dense(2), uniform(3, 4))
  with pytest.raises(ValueError, match=r"no rows in its inputs of shape \(0, 4\)"):
    sow(nn.Dense(2), params, jnp.ones((0, 4)))


def test_complex_inputs():
  model = nn.Dense(2, param_dtype=jnp.complex64)
  x = jnp.ones((3, 4), jnp.complex64)
  stats = sow(model, jax.tree.map(lambda p: p.astype(jnp.complex64), init(nn.Dense(2), x.real)), x)
  tx = bnp_optax.scale_by_bnp(debias=False)
  real = init(nn.Dense(2), x.real)
  with pytest.raises(ValueError, match="real inputs, found complex64"):
    tx.update(real, tx.init(real), stats=stats)
  with pytest.raises(ValueError, match="kernel: BNP is defined for real inputs, found complex64"):
    bnp_optax.linen.layers(model, x, strict=True)


# Examples that are split over a mapped axis.


def sow_mapped(model, params, x, mask=None, axes=("batch",), context=None):
  """Return the statistics of a forward pass whose examples `jax.vmap` maps over each axis."""

  def forward(x, mask):
    with sow_statistics(mask=mask, axis_name=axes, **(context or {})):
      _, aux = model.apply({"params": params}, x, mutable=["intermediates"])
    return layer_statistics(aux)

  for axis in reversed(axes):
    # They are the same for all that is mapped.
    forward = jax.vmap(forward, axis_name=axis, out_axes=None)
  return jax.jit(forward)(x, mask)


def layer_statistics(tree):
  """Return the `LayerStatistics` in a tree."""
  is_statistics = lambda x: isinstance(x, LayerStatistics)
  return [x for x in jax.tree.leaves(tree, is_leaf=is_statistics) if is_statistics(x)]


@pytest.mark.parametrize(
  ("model", "shape", "context"),
  [
    pytest.param(problems.CNN(), (8, 6, 6, 2), {}, id="strides"),
    pytest.param(nn.Conv(4, (3,), 2, feature_group_count=2), (8, 7, 4), {}, id="groups"),
    pytest.param(nn.Conv(2, (3,), 2), (8, 7, 2), {"exact_windows": True}, id="exact windows"),
    pytest.param(nn.Einsum((3, 5, 2), "ngf,gfo->ngo"), (8, 3, 5), {}, id="stack"),
    pytest.param(nn.Dense(2), (8, 4, 3), {"example_axes": 2}, id="example axes"),
    pytest.param(Tied(), (8, 4), {}, id="called again"),
    pytest.param(Scanned(), (8, 3), {}, id="scan"),
    pytest.param(nn.remat(problems.MLP)(), (8, 5), {}, id="remat"),
  ],
)
def test_statistics_over_a_mapped_axis_are_those_of_the_whole_batch(model, shape, context):
  x = uniform(*shape)
  params = init(model, x)
  expected = layer_statistics(sow(model, params, x, context=context))
  for axes, sizes in ((("batch",), (4,)), (("a", "b"), (2, 2))):
    split = x.reshape(*sizes, -1, *shape[1:])
    actual = sow_mapped(model, params, split, axes=axes, context=context)
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("example_axes", [1, 2])
@pytest.mark.parametrize("mask_axes", [1, 2])
def test_padding_along_a_mapped_axis(example_axes, mask_axes):
  """Some parts have no padding, one is all padding."""
  mask = np.arange(40).reshape(8, 5) % 7 < 5
  mask[2:4] = False
  mask = mask if mask_axes == 2 else mask[:, 0]
  x = np.where(np.expand_dims(mask, tuple(range(mask_axes, 3))), uniform(8, 5, 3), np.nan)
  model = nn.Dense(2)
  params = init(model, x)
  context = {"example_axes": example_axes}
  expected = layer_statistics(sow(model, params, x, context={**context, "mask": mask}))
  split = (a.reshape(4, 2, *a.shape[1:]) for a in (x, mask))
  actual = sow_mapped(model, params, *split, context=context)
  chex.assert_trees_all_close(actual, expected, rtol=1e-5)


@pytest.mark.parametrize("mask", [None, np.arange(8) < 5, np.arange(40).reshape(8, 5) % 7 < 5])
def test_single_examples_along_a_mapped_axis(mask):
  """An example that is mapped alone has no example axis, and its positions are not examples."""
  x, model = uniform(8, 5, 3), nn.Conv(2, (3,))
  params = init(model, x)
  expected = layer_statistics(sow(model, params, x, context={"mask": mask}))
  actual = sow_mapped(model, params, x, mask, context={"example_axes": 0})
  chex.assert_trees_all_close(actual, expected, rtol=1e-5)


def test_micro_batches_of_a_mapped_axis_add_up():
  x, model = uniform(8, 5, 3), nn.Dense(2)
  params = init(model, x)
  (expected,) = layer_statistics(sow(model, params, x))
  parts = [sow_mapped(model, params, part.reshape(2, 2, 5, 3)) for part in (x[:4], x[4:])]
  (both,) = jax.tree.map(jnp.add, *parts)
  assert (both.examples, both.rows) == (expected.examples, expected.rows) == (8, 40)
  np.testing.assert_allclose(both.mean, expected.mean, rtol=1e-5)
  np.testing.assert_allclose(both.variance, expected.variance, rtol=1e-5)


def test_a_function_traced_before_without_axis_name():
  x, model = uniform(4, 2, 5), nn.jit(problems.MLP)()
  params = init(model, x[0])

  def forward(x):
    for axis_name in (None, "batch"):
      with sow_statistics(axis_name=axis_name):
        _, aux = model.apply({"params": params}, x, mutable=["intermediates"])
      yield aux["intermediates"]["first"]["layer_statistics"].rows

  run = jax.vmap(lambda x: tuple(forward(x)), axis_name="batch", out_axes=(0, None))
  alone, whole = jax.jit(run)(x)
  assert (alone.tolist(), whole) == ([2, 2, 2, 2], 8)


@pytest.mark.parametrize("whole", [True, False])
def test_masks_of_examples_that_differ_need_the_number_of_examples(whole):
  """Masks of positions leave the number of examples as it is."""

  class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
      return nn.Dense(3, name="second")(nn.Dense(4, name="first")(x))

  x = uniform(4, 2, 5)
  masks = np.array([[1, 1], [1, 0], [0, 1], [1, 1]]), np.ones((4, 2), int)
  if whole:
    masks = [mask.any(1) for mask in masks]
  context = {"mask": dict(zip(("first", ""), masks, strict=True))}
  params = init(Model(), x)
  if whole:
    match = "4 before its mask in layer first and 4 before its mask in layer second"
    with pytest.raises(ValueError, match=match):
      sow(Model(), params, x, context=context)
    context["examples"] = 4
  stats = sow(Model(), params, x, context=context)
  found = [stats[name]["layer_statistics"] for name in ("first", "second")]
  assert [s.examples for s in found] == [4, 4]


def test_an_axis_name_of_no_mapped_axis():
  x = uniform(4, 5)
  params = init(nn.Dense(3), x)
  with pytest.raises(NameError, match="unbound axis name: batch"):
    sow(nn.Dense(3), params, x, context={"axis_name": "batch"})


# Ways to lose statistics: each is an error with a remedy.


def update(model, params, x, layers=None, **context):
  tx = bnp_optax.scale_by_bnp(layers=layers, debias=False)
  stats = sow(model, params, x, context=context)
  return jax.jit(tx.update)(params, tx.init(params), stats=stats)


class Loop(nn.Module):
  """A layer that is called in a while loop alone, which returns no statistics."""

  @nn.compact
  def __call__(self, x):
    layer = nn.Dense(3, name="layer")
    if self.is_initializing():
      return layer(x)
    more = lambda module, carry: carry[0] > 0
    step = lambda module, carry: (carry[0] - 1, module(carry[1]))
    return nn.while_loop(more, step, layer, (2, x))[1]


def test_lost_in_a_while_loop():
  x, model = uniform(5, 3), Loop()
  params = init(model, x)
  with pytest.raises(ValueError, match="layer/kernel: its statistics do not leave the lifted"):
    bnp_optax.linen.layers(model, x, strict=True)
  with pytest.raises(ValueError, match=r"No statistics for layer|no LayerStatistics.*mutable="):
    update(model, params, x)


@pytest.mark.parametrize("features", [3, 4])  # 4: the stack is as long as the layer is wide.
def test_a_scanned_stack_without_layers_is_never_taken_for_a_convolution(features):
  x, model = uniform(5, features), Scanned(features=features)
  params = init(model, x)
  stats = sow(model, params, x)
  unbiased = {"block": {"kernel": params["block"]["kernel"]}}
  for p, match in ((params, "block: the bias has shape"), (unbiased, "block: .*under nn.scan")):
    tx = bnp_optax.scale_by_bnp(debias=False)
    with pytest.raises(ValueError, match=rf"Layer {match}.*layers=bnp_optax.linen.layers\(model"):
      tx.update(p, tx.init(p), stats=stats)


def test_attention_without_layers_is_never_taken_for_a_convolution():
  for features, heads in ((6, 2), (4, 4)):
    model, x = nn.MultiHeadDotProductAttention(heads, use_bias=False), uniform(3, 5, features)
    params = init(model, x)
    with pytest.raises(ValueError, match=r"key, .*value.*layers=bnp_optax.linen.layers\(model"):
      update(model, params, x)
    update(model, params, x, bnp_optax.linen.layers(model, x))


def test_not_mutable():
  model, x = problems.MLP(), uniform(4, 5)
  params = init(model, x)
  with sow_statistics():
    _, aux = model.apply({"params": params}, x, mutable=["batch_stats"])
  tx = bnp_optax.scale_by_bnp(debias=False)
  with pytest.raises(ValueError, match=r'mutable=\["intermediates"\]'):
    tx.update(params, tx.init(params), stats=aux)


def test_context_around_a_function_that_is_traced_already():
  model, x = problems.MLP(), uniform(4, 5)
  params = init(model, x)
  forward = jax.jit(lambda p: model.apply({"params": p}, x, mutable=["intermediates"])[1])
  plain = forward(params)
  with sow_statistics():
    check(forward(params)["intermediates"]["first"]["layer_statistics"], x)
  tx = bnp_optax.scale_by_bnp(debias=False)
  with pytest.raises(ValueError, match="inside the function that is jitted"):
    tx.update(params, tx.init(params), stats=plain)


class Custom(nn.Module):
  """A module with its own linear kernel."""

  @nn.compact
  def __call__(self, x):
    x = nn.Dense(4, name="known")(x)
    return x @ self.param("kernel", nn.initializers.lecun_normal(), (4, 3))


def test_a_custom_module_with_its_own_kernel():
  model, x = Custom(), uniform(5, 2)
  params = init(model, x)
  with pytest.raises(ValueError, match=r"No statistics for \(the model itself\).*layers="):
    update(model, params, x)
  with pytest.raises(ValueError, match="kernel: no linear layer"):
    bnp_optax.linen.layers(model, x, strict=True)
  layers = bnp_optax.linen.layers(model, x)
  updates, _ = update(model, params, x, layers)
  chex.assert_trees_all_equal(updates["kernel"], params["kernel"])
  assert "unknown: no linear layer was called with it" in str(layers)


def test_a_masked_kernel_is_refused():
  model, x = nn.Conv(4, (3,), mask=jnp.ones((3, 2, 4))), uniform(5, 6, 2)
  with pytest.raises(ValueError, match=r"model itself\): its kernel is masked"):
    update(model, init(model, x), x)
  with pytest.raises(ValueError, match="kernel: its kernel is masked"):
    bnp_optax.linen.layers(model, x, strict=True)


def test_a_layer_called_with_two_meanings_is_refused():
  class Tied(nn.Module):
    @nn.compact
    def __call__(self, x):
      tied = nn.Einsum((3, 4), None, use_bias=False, name="tied")
      h = nn.Dense(3, name="out")(x)
      return tied(tied(h, "bd,dv->bv"), "bv,dv->bd")

  x = uniform(5, 2)
  params = init(Tied(), x)
  stats = sow(Tied(), params, x)
  layers = bnp_optax.linen.layers(Tied(), x)
  assert "NO: it is called with two different meanings" in str(layers)
  tx = bnp_optax.scale_by_bnp(layers=layers, debias=False)
  tx.update(params, tx.init(params), stats=stats)
  tx = bnp_optax.scale_by_bnp(debias=False)
  with pytest.raises(ValueError, match="No statistics for tied: it is called with two different"):
    tx.update(params, tx.init(params), stats=stats)


def test_nn_vmap_over_examples():
  over = nn.vmap(
    nn.Dense,
    variable_axes={"params": None, "intermediates": None},
    in_axes=0,
    axis_name="batch",
    split_rngs={"params": False},
  )
  x = uniform(5, 3)
  params = init(nn.Dense(2), x)
  whole = sow(nn.Dense(2), params, x)
  mapped = sow(over(2), params, x, context={"example_axes": 0, "axis_name": "batch"})
  chex.assert_trees_all_close(mapped, whole, rtol=1e-6)


# A batch of symbolic size.


@pytest.mark.slow
@pytest.mark.parametrize("masked", [True, False])
def test_a_step_that_is_exported_for_any_batch_size(masked):
  model, x = problems.CNN(), uniform(3, 8, 8, 2)
  params = init(model, x)
  tx = bnp_optax.bnp(optax.sgd(0.1))

  def step(params, x, mask):
    def loss_fn(params):
      with sow_statistics(mask=mask if masked else None):
        y, aux = model.apply({"params": params}, x, mutable=["intermediates"])
      return jnp.sum(y**2) / x.shape[0], aux["intermediates"]

    grads, stats = jax.grad(loss_fn, has_aux=True)(params)
    return tx.update(grads, tx.init(params), params, stats=stats)[0]

  (batch,) = jax.export.symbolic_shape("batch")
  shapes = jax.ShapeDtypeStruct((batch, 8, 8, 2), x.dtype), jax.ShapeDtypeStruct((batch,), bool)
  exported = jax.export.export(jax.jit(step))(params, *shapes)
  mask = np.array([True, False, True])
  chex.assert_trees_all_close(
    exported.call(params, x, mask), jax.jit(step)(params, x, mask), rtol=1e-4, atol=1e-6
  )
  found, plain = (bnp_optax.linen.layers(model, inputs) for inputs in (shapes[0], x))
  assert dict(found) == dict(plain)
  positions = [[entry.positions for entry in table.entries] for table in (found, plain)]
  assert positions[0] == positions[1]
