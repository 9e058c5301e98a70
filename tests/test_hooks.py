"""The hooks of Linen: which inputs count, the axes of a mapped kernel, calls that are left out."""

import concurrent.futures
import contextlib

import chex
from flax import nnx
from flax.core import lift
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bnp_optax
from bnp_optax.linen import sow_statistics
from tests import problems
from tests.test_lifting import update
from tests.test_linen import check, init, sow, uniform


def tenfold(next_fun, args, kwargs, context):
  """Intercept the calls of Dense to multiply their inputs by ten."""
  if isinstance(context.module, nn.Dense) and context.method_name == "__call__":
    return next_fun(10 * args[0], *args[1:], **kwargs)
  return next_fun(*args, **kwargs)


def tenfold_of_the_original(next_fun, args, kwargs, context):
  if isinstance(context.module, nn.Dense) and context.method_name == "__call__":
    return context.orig_method(10 * args[0])
  return next_fun(*args, **kwargs)


# The inputs that the layer multiplied.


@pytest.mark.parametrize("interceptor", [tenfold, tenfold_of_the_original])
@pytest.mark.parametrize("order", ["outside", "inside", "both"])
@pytest.mark.parametrize("model", [nn.Dense(3), nn.Sequential([nn.Dense(3)])])
def test_an_interceptor_that_changes_the_inputs(model, order, interceptor):
  x = uniform(8, 5)
  params = init(model, x)
  intercept = lambda: nn.intercept_methods(interceptor)
  contexts = {
    "outside": [intercept(), sow_statistics()],
    "inside": [sow_statistics(), intercept()],
    "both": [intercept(), sow_statistics(), intercept()],
  }[order]
  with contextlib.ExitStack() as stack:
    for context in contexts:
      stack.enter_context(context)
    y, aux = model.apply({"params": params}, x, mutable=["intermediates"])
  (statistics,) = jax.tree.leaves(
    aux["intermediates"], is_leaf=lambda s: isinstance(s, bnp_optax.LayerStatistics)
  )
  factor = 100 if order == "both" and interceptor is tenfold else 10
  check(statistics, factor * x, tolerance=1e-5)
  layer = params if "kernel" in params else params["layers_0"]
  np.testing.assert_allclose(y, factor * x @ layer["kernel"] + layer["bias"][None], rtol=1e-4)


def test_an_interceptor_inside_of_the_model():
  class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
      with nn.intercept_methods(tenfold):
        return nn.Dense(3, name="layer")(x)

  x = uniform(8, 5)
  params = init(Model(), x)
  check(sow(Model(), params, x)["layer"]["layer_statistics"], 10 * x, tolerance=1e-5)


def test_an_interceptor_in_place_of_the_layer():
  """The layer multiplies nothing, and reports nothing."""

  def skip(next_fun, args, kwargs, context):
    if isinstance(context.module, nn.Dense) and context.method_name == "__call__":
      return args[0][:, :3]
    return next_fun(*args, **kwargs)

  x = uniform(8, 5)
  params = init(nn.Dense(3), x)
  with sow_statistics(), nn.intercept_methods(skip):
    _, aux = nn.Dense(3).apply({"params": params}, x, mutable=["intermediates"])
  assert not aux


def test_interceptors_are_called_as_often_as_without():
  def trace(*contexts):
    names = []

    def record(next_fun, args, kwargs, context):
      names.append((context.module.path, context.method_name))
      return next_fun(*args, **kwargs)

    x = uniform(4, 5)
    params = init(problems.MLP(), x)
    names.clear()
    for context in contexts:
      with context, nn.intercept_methods(record):
        problems.MLP().apply({"params": params}, x, mutable=["intermediates"])
    return names

  assert trace(sow_statistics()) == trace(contextlib.nullcontext())


def test_nothing_is_left_after_the_context():
  functions = lambda: (nn.Module._call_wrapped_method, lift.pack, lift._split_in_out_axes)
  before = functions()
  with sow_statistics():
    replaced = functions()
    with sow_statistics():
      assert functions() == replaced
    assert functions() == replaced
  assert not set(replaced) & set(before)
  assert functions() == before
  with pytest.raises(ValueError, match="no rows"):
    sow(nn.Dense(3), init(nn.Dense(3), uniform(4, 5)), jnp.zeros((0, 5)))
  assert functions() == before


# A kernel that nn.map_variables computes from its parameter.


class Mapped(nn.Module):
  """A dense layer whose kernel is a function of its parameter."""

  n: int
  function: object
  use_bias: bool = False
  mutable: bool = True

  @nn.compact
  def __call__(self, x):
    turn = lambda tree: jax.tree.map(self.function, tree)
    layer = lambda module: nn.Dense(self.n, self.use_bias, name="layer")(x)
    mutable = self.mutable or self.is_initializing()
    return nn.map_variables(layer, "params", turn, turn, mutable=mutable)(self)


transpose = lambda a: a.T


def plain_update(n, kernel, x, bias=None):
  """Return the step of a plain layer."""
  params = {"kernel": kernel} if bias is None else {"kernel": kernel, "bias": bias}
  return update(nn.Dense(n, bias is not None), params, x)


@pytest.mark.slow
@pytest.mark.parametrize("mutable", [False, True])
@pytest.mark.parametrize("use_bias", [False, True])
@pytest.mark.parametrize("n", [4, 5])
def test_a_transposed_kernel(n, use_bias, mutable):
  x, model = uniform(8, 5), Mapped(n, transpose, use_bias, mutable)
  params = init(model, x)
  assert params["layer"]["kernel"].shape == (n, 5)
  layers = bnp_optax.linen.layers(model, x, strict=True)
  layout = layers["layer", "kernel"]
  assert (layout.feature, layout.output) == ((1,), (0,))
  expected = plain_update(n, params["layer"]["kernel"].T, x, params["layer"].get("bias"))
  actual = update(model, params, x)["layer"]
  chex.assert_trees_all_close(actual["kernel"].T, expected["kernel"], rtol=1e-5)
  assert actual.keys() == expected.keys()
  # Without layers=, a square kernel has the shape that the convention expects.
  tx = bnp_optax.scale_by_bnp()
  with pytest.raises(ValueError, match="layers="):
    tx.update(params, tx.init(params), stats=sow(model, params, x))


def test_large_variables_are_not_computed():
  class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
      turn = lambda tree: jax.tree.map(lambda a: a.T, tree)
      layers = lambda module: nn.Sequential([nn.Dense(3_000_000), nn.Dense(2_000_000)])(x)
      return nn.map_variables(layers, "params", turn, turn, mutable=True)(self)

  layers = bnp_optax.linen.layers(Model(), jax.ShapeDtypeStruct((2, 5), jnp.float32))
  assert [layout.feature for layout in layers.values()] == [(1,), (1,)]


class Permuted(nn.Module):
  """A convolution whose kernel is transposed by each of several functions, the outermost first."""

  orders: tuple[tuple[int, ...], ...]

  @nn.compact
  def __call__(self, x):
    call = lambda module: nn.Conv(2, (3,), name="layer", use_bias=False)(x)
    for order in reversed(self.orders):
      turn, back = (
        lambda tree, axes=axes: jax.tree.map(lambda a: a.transpose(axes), tree)
        for axes in (order, np.argsort(order))
      )
      call = nn.map_variables(call, "params", turn, back, mutable=True)
    return call(self)


@pytest.mark.parametrize("orders", [[(1, 2, 0)], [(1, 2, 0), (1, 0, 2)], [(1, 0, 2), (0, 2, 1)]])
def test_kernels_that_are_transposed_more_than_once(orders):
  x, model = uniform(4, 6, 5), Permuted(tuple(orders))
  (entry,) = bnp_optax.linen.layers(model, x, strict=True).entries
  axes = np.arange(3)
  for order in orders:
    axes = axes[list(order)]
  layout = entry.layout
  assert (*layout.window, *layout.feature, *layout.output) == tuple(axes)
  assert [entry.shape[axis] for axis in axes] == [3, 5, 2]


def test_a_cast_to_another_dtype():
  class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
      cast, back = (
        lambda tree, dtype=dtype: jax.tree.map(lambda a: a.astype(dtype), tree)
        for dtype in (jnp.bfloat16, jnp.float32)
      )
      layer = lambda module: nn.Dense(4, dtype=jnp.bfloat16, name="layer")(x)
      return nn.map_variables(layer, "params", cast, back, mutable=True)(self)

  layers = bnp_optax.linen.layers(Model(), uniform(8, 5), strict=True)
  assert layers["layer", "kernel"] == bnp_optax.KernelLayout()


@jax.custom_vjp
def binary(a):
  return jnp.sign(a)


# The straight-through estimator.
binary.defvjp(lambda a: (jnp.sign(a), None), lambda _, g: (g,))


@pytest.mark.parametrize(
  "function",
  [lambda a: a, lambda a: a.astype(jnp.bfloat16).astype(a.dtype), lambda a: a + 1, binary],
  ids=["same", "cast", "added to", "quantized"],
)
def test_a_function_that_keeps_the_axes(function):
  x, model = uniform(8, 5), Mapped(4, function, use_bias=True)
  params = init(model, x)
  bnp_optax.linen.layers(model, x, strict=True)
  stats = sow(model, params, x)["layer"]["layer_statistics"]
  assert stats.layout == bnp_optax.KernelLayout()
  check(stats, x)


@pytest.mark.parametrize(
  "function",
  [
    lambda a: (a + a.T) / 2,
    lambda a: a @ jnp.eye(5),
    lambda a: a.reshape(-1).reshape(5, 5),
    lambda a: 0.5 * a,
    lambda a: a * a.shape[0] ** -0.5,
    lambda a: a / jnp.linalg.norm(a, axis=0, keepdims=True),
    lambda a: a[::-1],
    lambda a: jnp.where(jnp.abs(a) > 0.5, a, 0),
    jnp.abs,
  ],
  ids=[
    *("symmetric", "rotated", "reshaped", "scaled", "by fan-in", "normalized", "reversed"),
    *("pruned", "absolute"),
  ],
)
def test_a_function_of_the_values_is_refused(function):
  x, model = uniform(8, 5), Mapped(5, function)
  with pytest.raises(ValueError, match=r"layer/kernel: nn.map_variables computes its kernel"):
    bnp_optax.linen.layers(model, x, strict=True)
  params, tx = init(model, x), bnp_optax.scale_by_bnp()
  with pytest.raises(ValueError, match=r"No statistics for layer: nn.map_variables computes"):
    tx.update(params, tx.init(params), stats=sow(model, params, x))


@pytest.mark.parametrize("layer_class", [nn.Dense, nn.Conv])
def test_a_class_that_changes_its_parameters_is_refused(layer_class):
  class Scaled(layer_class):
    def param(self, name, *args, **kwargs):
      parameter = super().param(name, *args, **kwargs)
      return 0.1 * parameter if name == "kernel" else parameter

  x, model = uniform(8, 5), Scaled(4) if layer_class is nn.Dense else Scaled(4, (1,))
  with pytest.raises(ValueError, match=r"kernel: its class overrides param\(\)"):
    bnp_optax.linen.layers(model, x, strict=True)
  params, tx = init(model, x), bnp_optax.scale_by_bnp()
  with pytest.raises(ValueError, match=r"No statistics for .*: its class overrides param\(\)"):
    tx.update(params, tx.init(params), stats=sow(model, params, x))


def test_a_parameter_that_scales_the_kernel_is_refused():
  class Gained(nn.Module):
    @nn.compact
    def __call__(self, x):
      self.param("gain", nn.initializers.ones, ())
      return nn.Dense(4, name="layer")(x)

  def scale(variables):
    params = variables["params"]
    layer = {**params["layer"], "kernel": params["gain"] * params["layer"]["kernel"]}
    return {"params": {**params, "layer": layer}}

  class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
      gained = Gained(name="gained")
      if self.is_initializing():
        return gained(x)
      return nn.map_variables(lambda gained, x: gained(x), "params", scale)(gained, x)

  with pytest.raises(ValueError, match=r"gained/layer/kernel: nn.map_variables"):
    bnp_optax.linen.layers(Model(), uniform(8, 5), strict=True)


def test_a_function_that_scales_the_bias_is_refused():
  x, model = uniform(8, 5), Mapped(4, lambda a: 2 * a if a.ndim == 1 else a, use_bias=True)
  with pytest.raises(ValueError, match=r"layer/kernel: .* or changes its bias"):
    bnp_optax.linen.layers(model, x, strict=True)


def test_a_function_that_transposes_the_bias_is_refused():
  class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
      turn = lambda tree: jax.tree.map(lambda a: a.T if a.ndim == 2 else a, tree)
      layer = lambda module: nn.DenseGeneral((3, 3), name="layer")(x)
      return nn.map_variables(layer, "params", turn, turn, mutable=True)(self)

  with pytest.raises(ValueError, match=r"layer/kernel: .* or changes its bias"):
    bnp_optax.linen.layers(Model(), uniform(8, 5), strict=True)


def test_a_function_of_other_variables():
  class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
      def layers(module):
        return nn.BatchNorm(True, name="norm")(nn.Dense(3, name="layer")(x))

      return nn.map_variables(layers, "batch_stats", mutable=True)(self)

  assert [*bnp_optax.linen.layers(Model(), uniform(8, 5), strict=True)] == [("layer", "kernel")]


@pytest.mark.parametrize("first", ["plain", "mapped"])
def test_tied_and_transposed_is_refused(first):
  """One square kernel, multiplied as it is and transposed."""

  class Tied(nn.Module):
    @nn.compact
    def __call__(self, x):
      layer = nn.Dense(5, use_bias=False, name="layer")
      if first == "plain":
        x = layer(x)
      turn = lambda tree: jax.tree.map(jnp.transpose, tree)
      mapped = nn.map_variables(lambda layer, x: layer(x), "params", turn, turn, mutable=True)
      x = mapped(layer, x)
      return x if first == "plain" else layer(x)

  x, model = uniform(8, 5), Tied()
  with pytest.raises(ValueError, match="layer/kernel: it is called with two different meanings"):
    bnp_optax.linen.layers(model, x, strict=True)
  params, tx = init(model, x), bnp_optax.scale_by_bnp()
  with pytest.raises(ValueError, match="No statistics for layer: it is called with two different"):
    tx.update(params, tx.init(params), stats=sow(model, params, x))


def test_a_mapped_stack():
  """Inside a scan over layers, each layer's parameter is turned."""

  class Stack(nn.Module):
    @nn.compact
    def __call__(self, x):
      scan = nn.scan(
        lambda layer, x, _: (layer(x), None),
        variable_axes={"params": 0},
        split_rngs={"params": True},
        length=5,
      )
      return scan(Mapped(5, transpose, name="block"), x, None)[0]

  x, model = uniform(8, 5), Stack()
  params = init(model, x)
  layout = bnp_optax.linen.layers(model, x, strict=True)["block", "layer", "kernel"]
  assert (layout.stack, layout.feature, layout.output) == ((0,), (2,), (1,))
  updates = update(model, params, x)["block"]["layer"]["kernel"]
  plain = nn.Sequential([nn.Dense(5, use_bias=False) for _ in range(5)])
  kernels = params["block"]["layer"]["kernel"].mT
  expected = update(plain, {f"layers_{i}": {"kernel": kernels[i]} for i in range(5)}, x)
  for i in range(5):
    chex.assert_trees_all_close(updates[i].T, expected[f"layers_{i}"]["kernel"], rtol=1e-4)


def test_a_stack_that_is_mapped_as_a_whole_is_refused():
  class Whole(nn.Module):
    @nn.compact
    def __call__(self, x):
      def stack(module):
        scan = nn.scan(
          lambda layer, x, _: (layer(x), None),
          variable_axes={"params": 0},
          split_rngs={"params": True},
          length=5,
        )
        return scan(nn.Dense(5, use_bias=False, name="layer"), x, None)[0]

      turn = lambda tree: jax.tree.map(lambda a: a.mT, tree)
      return nn.map_variables(stack, "params", turn, turn, mutable=True)(self)

  with pytest.raises(ValueError, match=r"layer/kernel: nn.map_variables computes its kernel"):
    bnp_optax.linen.layers(Whole(), uniform(8, 5), strict=True)


def test_parameters_with_metadata():
  class Boxed(nn.Module):
    @nn.compact
    def __call__(self, x):
      make = nn.with_partitioning(nn.initializers.normal(), ("out", "in"))
      turn = lambda tree: jax.tree.map(jnp.transpose, tree)
      layer = lambda module: nn.Dense(5, use_bias=False, kernel_init=make, name="layer")(x)
      return nn.map_variables(layer, "params", turn, turn, mutable=True)(self)

  layout = bnp_optax.linen.layers(Boxed(), uniform(8, 5), strict=True)["layer", "kernel"]
  assert (layout.feature, layout.output) == ((1,), (0,))


# A model whose init and apply were replaced.


@pytest.mark.parametrize("name", ["apply", "init"])
def test_a_jitted_method(name):
  class Model(nn.Module):
    @nn.compact
    def __call__(self, x, train):
      return nn.Dense(2)(x) if train else x

  model, x = Model(), uniform(4, 8)
  expected = bnp_optax.linen.layers(model, x, train=True)
  model.__dict__[name] = jax.jit(getattr(model, name))
  assert bnp_optax.linen.layers(model, x, train=True) == expected


def test_an_overridden_apply():
  class Twice(nn.Dense):
    def apply(self, variables, x, **kwargs):
      return super().apply(variables, jnp.concatenate([x, x]), **kwargs)

  layers = bnp_optax.linen.layers(Twice(2), uniform(4, 8))
  assert layers.entries[0].inputs == (8, 8)


# Calls that do not reach the loss.


class Map(nn.Module):
  """A head that is also applied to every position, for visualization."""

  extra: bool

  @nn.compact
  def __call__(self, x):
    x = nn.Dense(4, name="stem")(x)
    head = nn.Dense(3, name="head")
    if self.extra:
      self.sow("intermediates", "logits_2d", head(x))
    return head(x.mean(1))


def test_an_excluded_call():
  x = 3 * uniform(4, 6, 5) + 1
  params = init(Map(False), x)
  exclude = lambda layer, x: layer.name == "head" and x.ndim == 3
  expected = update(Map(False), params, x)
  chex.assert_trees_all_equal(update(Map(True), params, x, exclude=exclude), expected)
  different = update(Map(True), params, x)
  assert not np.allclose(different["head"]["kernel"], expected["head"]["kernel"], rtol=1e-2)
  with pytest.raises(ValueError, match="No statistics for head"):
    update(Map(True), params, x, exclude=lambda layer, x: layer.name == "head")


def test_a_function_traced_before_with_another_exclude():
  x, model = uniform(4, 3), nn.Sequential([nn.Dense(2), nn.Dense(2)])
  params = init(model, x)
  forward = jax.jit(lambda x: model.apply({"params": params}, x, mutable=["intermediates"])[1])
  for name in ("layers_0", "layers_1"):
    with sow_statistics(exclude=lambda layer, x, name=name: layer.name == name):
      assert name not in forward(x)["intermediates"]


def test_an_excluded_call_of_nnx():
  class NnxMap(nnx.Module):
    def __init__(self, rngs):
      self.stem, self.head = nnx.Linear(5, 4, rngs=rngs), nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
      x = self.stem(x)
      self.head(x)
      return self.head(x.mean(1))

  model, x = NnxMap(nnx.Rngs(0)), uniform(4, 6, 5)

  @nnx.jit
  def run(model, x):
    with bnp_optax.nnx.sow_statistics(exclude=lambda layer, x: layer is model.head and x.ndim == 3):
      return nnx.capture(model, bnp_optax.nnx.Statistics)(x)[1]

  stats = run(model, x)
  assert stats["head"]["layer_statistics"].get_value().rows == 4
  assert stats["stem"]["layer_statistics"].get_value().rows == 24


def test_threads():
  """Sixteen threads trace scanned models at once, one in two of them without statistics."""

  class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
      scan = nn.scan(
        lambda layer, x, _: (layer(x), None),
        variable_axes={"params": 0},
        split_rngs={"params": True},
        length=2,
      )
      return scan(nn.Dense(x.shape[-1], name="layer"), x, None)[0]

  def work(i):
    x = jax.ShapeDtypeStruct((4, 2 + i), jnp.float32)
    params = jax.eval_shape(Scanned().init, jax.random.key(0), x)
    run = lambda params, x: Scanned().apply(params, x, mutable=["intermediates"])[1]
    for _ in range(5):
      if i % 2:
        assert not jax.eval_shape(run, params, x)
      else:
        with sow_statistics():
          stats = jax.eval_shape(run, params, x)["intermediates"]["layer"]["layer_statistics"]
        assert stats.total.shape == (2, 2 + i)
        assert stats.layout.stack == (0,)

  with concurrent.futures.ThreadPoolExecutor(16) as pool:
    list(pool.map(work, range(16)))
