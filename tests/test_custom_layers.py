"""Layers that are not Flax's own: each step is that of its plain twin, or of the paper."""

import functools

import chex
from flax import nnx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bnp_optax
from tests import oracle, problems
from tests.test_lifting import update
from tests.test_linen import check, init, sow, uniform

normal = nn.initializers.normal()


@pytest.fixture(autouse=True, scope="module")
def rank_promotion(strict_promotion):
  """Allow what the models of others do: the addition of a bias to a batch."""
  with jax.numpy_rank_promotion("allow"):
    yield


def with_params(case):
  """Return a model's inputs and random parameters."""
  model, shape = case
  x = uniform(*shape)
  return model, x, init(model, x)


# Registered classes, each beside the plain layer and the axes that turn its kernel into its own.


class Named(nn.Module):
  """A dense layer with other names."""

  n: int

  @nn.compact
  def __call__(self, x):
    w = self.param("W", normal, (x.shape[-1], self.n))
    return x @ w + self.param("b", normal, (self.n,))


class Transposed(nn.Module):
  """A dense layer whose kernel is [output, feature] and called "kernel"."""

  n: int
  use_bias: bool = True

  @nn.compact
  def __call__(self, x):
    y = x @ self.param("kernel", normal, (self.n, x.shape[-1])).T
    return y + self.param("bias", normal, (self.n,)) if self.use_bias else y


class Heads(nn.Module):
  """Two feature axes and one output axis, in the order (output, second, first)."""

  n: int

  @nn.compact
  def __call__(self, x):
    w = self.param("w", normal, (self.n, x.shape[-1], x.shape[-2]))
    return jnp.einsum("...hd,kdh->...k", x, w)


class Experts(nn.Module):
  """A stack of dense layers along the second axis of the inputs and the last of the kernel."""

  n: int

  @nn.compact
  def __call__(self, x):
    w = self.param("w", normal, (x.shape[-1], self.n, x.shape[-3]))
    b = self.param("b", normal, (x.shape[-3], self.n))
    return jnp.einsum("becd,dfe->becf", x, w) + b[:, None]


class Reordered(nn.Module):
  """Outputs before the stack, without bias."""

  n: int

  @nn.compact
  def __call__(self, x):
    return jnp.einsum("bed,edf->bfe", x, self.param("w", normal, (*x.shape[1:], self.n)))


class ByArgument(nn.Module):
  """The equation is an argument."""

  shape: tuple[int, ...]

  @nn.compact
  def __call__(self, eqn, x):
    return jnp.einsum(eqn, x, self.param("w", normal, self.shape))


register = bnp_optax.linen.register
register(Named, "...d,df->...f", kernel="W", bias="b")
register(Transposed, "...d,fd->...f")
register(Heads, "...hd,kdh->...k", kernel="w", bias=None)
register(Experts, "becd,dfe->becf", kernel="w", bias="b")
register(Reordered, "bed,edf->bfe", kernel="w", bias=None)
register(ByArgument, lambda layer, eqn, x: (x, eqn), kernel="w", bias=None)


@pytest.mark.parametrize("shape", [(7, 5), (7, 2, 5), (3, 4, 4, 4)])
@pytest.mark.parametrize("n", [4, 5])
def test_named(shape, n):
  model, x, params = with_params((Named(n), shape))
  bnp_optax.linen.layers(model, x, strict=True)
  plain = update(nn.Dense(n), {"kernel": params["W"], "bias": params["b"]}, x)
  chex.assert_trees_all_equal(update(model, params, x), {"W": plain["kernel"], "b": plain["bias"]})


@pytest.mark.parametrize("use_bias", [False, True])
@pytest.mark.parametrize("n", [4, 5])
def test_transposed(n, use_bias):
  model, x, params = with_params((Transposed(n, use_bias), (7, 3, 5)))
  turn = lambda params: {**params, "kernel": params["kernel"].T}
  plain = update(nn.Dense(n, use_bias), turn(params), x)
  chex.assert_trees_all_close(update(model, params, x), turn(plain), rtol=1e-6)
  tx = bnp_optax.scale_by_bnp(debias=False)
  # A square kernel has the shape that the convention expects.
  match = "other axes than assumed" if n == 5 else "bias has shape|takes inputs of shape|other axes"
  with pytest.raises(ValueError, match=match):
    tx.update(params, tx.init(params), stats=sow(model, params, x))


@pytest.mark.parametrize("shape", [(7, 3, 5), (7, 4, 4)])
def test_several_feature_axes(shape):
  """Also where all axes have the same length."""
  model, x, params = with_params((Heads(4), shape))
  plain_params = {"kernel": params["w"].transpose(2, 1, 0)}
  plain = update(nn.DenseGeneral(4, (-2, -1), use_bias=False), plain_params, x)
  actual = update(model, params, x)["w"].transpose(2, 1, 0)
  chex.assert_trees_all_close(actual, plain["kernel"], rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(7, 2, 3, 5), (4, 4, 4, 4)])
def test_stacked_experts(shape):
  model, x, params = with_params((Experts(4), shape))
  updates = update(model, params, x)

  def loss(params):
    return jnp.mean(model.apply({"params": params}, x) ** 2)

  grads, n = jax.grad(loss)(params), shape[-1]
  for e in range(shape[1]):
    G_w, G_b, *_ = oracle.algorithm_3(
      x[:, e], shape[2], grads["w"][..., e], grads["b"][e], np.zeros(n), np.ones(n)
    )
    np.testing.assert_allclose(updates["w"][..., e], G_w[0], rtol=1e-4, atol=1e-8)
    np.testing.assert_allclose(updates["b"][e], G_b, rtol=1e-4, atol=1e-8)


def test_outputs_before_the_stack():
  model, x, params = with_params((Reordered(4), (7, 2, 5)))
  layers = bnp_optax.linen.layers(model, x, strict=True)
  assert layers["w",].stack == (0,)
  updates = update(model, params, x)["w"]
  grads = jax.grad(lambda w: jnp.mean(model.apply({"params": {"w": w}}, x) ** 2))(params["w"])
  for e in range(2):
    G_w, *_ = oracle.algorithm_2(x[:, e], grads[e].T, None, np.zeros(5), np.ones(5))
    np.testing.assert_allclose(updates[e], G_w[0], rtol=1e-4, atol=1e-8)


def test_the_equation_of_a_call():
  class Attention(nn.Module):
    @nn.compact
    def __call__(self, x):
      x = ByArgument((2, 5, 3), name="up")("bd,hdk->bhk", x)
      return ByArgument((2, 3, 5), name="down")("bhk,hkd->bd", x)

  model, x, params = with_params((Attention(), (7, 5)))
  layers = bnp_optax.linen.layers(model, x, strict=True)
  assert (layers["up", "w"].feature, layers["up", "w"].output) == ((1,), (0, 2))
  assert (layers["down", "w"].feature, layers["down", "w"].output) == ((0, 1), (2,))
  check(sow(model, params, x)["up"]["layer_statistics_w"], x)


def test_the_equation_by_keyword():
  model, x = ByArgument((5, 3)), uniform(7, 5)
  with bnp_optax.linen.sow_statistics():
    variables = {"params": {"w": uniform(5, 3)}}
    _, aux = model.apply(variables, eqn="bd,df->bf", x=x, mutable=["intermediates"])
  check(aux["intermediates"]["layer_statistics_w"], x)


def test_inputs_by_keyword():
  model, x, params = with_params((Named(4), (7, 5)))
  with bnp_optax.linen.sow_statistics():
    _, aux = model.apply({"params": params}, x=x, mutable=["intermediates"])
  check(aux["intermediates"]["layer_statistics_W"], x)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision(dtype):
  model, _, params = with_params((Named(4), (7, 5)))
  params = jax.tree.map(lambda p: p.astype(dtype), params)
  x = uniform(7, 5, dtype=dtype)
  statistics = sow(model, params, x)["layer_statistics_W"]
  assert statistics.total.dtype == jnp.float32
  check(statistics, x, tolerance=1e-5)


def test_complex_inputs():
  model, x, params = with_params((Named(4), (7, 5)))
  tx = bnp_optax.scale_by_bnp(layers=bnp_optax.linen.layers(model, x), debias=False)
  with jax.numpy_dtype_promotion("standard"):
    stats = sow(model, params, 1j * x)
  with pytest.raises(ValueError, match="W: BNP is defined for real inputs, found complex64"):
    tx.update(params, tx.init(params), stats=stats)


# Several kernels in one module.


class Gated(nn.Module):
  """A gated network with three kernels, which reports them itself."""

  n: int

  @nn.compact
  def __call__(self, x):
    d = x.shape[-1]
    gate, up = (self.param(name, normal, (d, self.n)) for name in ("gate", "up"))
    down, bias = self.param("down", normal, (self.n, d)), self.param("bias", normal, (d,))
    report = functools.partial(bnp_optax.linen.report, self)
    report("gate", x, "...d,df->...f")
    report("up", x, "...d,df->...f")
    h = nn.silu(x @ gate) * (x @ up)
    report("down", h, "...f,fd->...d", bias="bias")
    return h @ down + bias


class PlainGated(nn.Module):
  n: int

  @nn.compact
  def __call__(self, x):
    dense = lambda name: nn.Dense(self.n, use_bias=False, name=name)
    h = nn.silu(dense("gate")(x)) * dense("up")(x)
    return nn.Dense(x.shape[-1], name="down")(h)


def test_report():
  model, x, params = with_params((Gated(8), (7, 3, 4)))
  assert len(bnp_optax.linen.layers(model, x, strict=True)) == 3
  plain = {k: {"kernel": params[k]} for k in ("gate", "up", "down")}
  plain["down"]["bias"] = params["bias"]
  expected = update(PlainGated(8), plain, x)
  actual = update(model, params, x)
  chex.assert_trees_all_close(actual.pop("bias"), expected["down"].pop("bias"), rtol=1e-6)
  chex.assert_trees_all_close(actual, {k: v["kernel"] for k, v in expected.items()}, rtol=1e-6)


def test_report_does_nothing_outside_of_the_context():
  model, x, params = with_params((Gated(8), (7, 3, 4)))
  _, aux = model.apply({"params": params}, x, mutable=["intermediates"])
  assert not aux
  assert set(model.init(jax.random.key(0), x)) == {"params"}


class TwoKernels(nn.Module):
  """Two products of the inputs, read by two registrations."""

  @nn.compact
  def __call__(self, x):
    v, w = (self.param(name, normal, (x.shape[-1], 3)) for name in "vw")
    return (x @ v) * (x @ w)


register(TwoKernels, "...d,df->...f", kernel="v", bias=None)
register(TwoKernels, "...d,df->...f", kernel="w", bias=None)


def test_a_class_registered_once_for_each_kernel():
  model, x, params = with_params((TwoKernels(), (7, 5)))
  assert set(bnp_optax.linen.layers(model, x, strict=True)) == {("v",), ("w",)}
  stats = sow(model, params, x)
  check(stats["layer_statistics_v"], x)
  check(stats["layer_statistics_w"], x)


class Coder(nn.Module):
  """Two methods, each with a kernel."""

  def setup(self):
    self.a = self.param("a", normal, (5, 3))
    self.b = self.param("b", normal, (5, 3))

  def encode(self, x):
    return x @ self.a

  def decode(self, z):
    return z @ self.b.T

  def __call__(self, x):
    return self.decode(self.encode(x))


register(Coder, "...d,df->...f", kernel="a", bias=None, method="encode")
register(Coder, "...f,df->...d", kernel="b", bias=None, method="decode")


def test_methods():
  model, x, params = with_params((Coder(), (7, 5)))
  stats = sow(model, params, x)
  check(stats["layer_statistics_a"], x)
  check(stats["layer_statistics_b"], x @ params["a"], tolerance=1e-5)
  assert set(sow(model, params, x, method="encode")) == {"layer_statistics_a"}


def test_an_embedding_that_is_also_the_head_is_refused():
  class Tied(nn.Module):
    @nn.compact
    def __call__(self, x):
      w = self.param("w", normal, (5, 5))
      bnp_optax.linen.report(self, "w", x, "...d,df->...f")
      bnp_optax.linen.report(self, "w", x @ w, "...f,df->...d")
      return x @ w @ w.T

  model, x, params = with_params((nn.Sequential([Tied()]), (7, 5)))
  with pytest.raises(ValueError, match="layers_0/w: it is called with two different meanings"):
    bnp_optax.linen.layers(model, x, strict=True)
  tx = bnp_optax.scale_by_bnp(
    layers={("layers_0", "w"): bnp_optax.KernelLayout(bias="")}, debias=False
  )
  with pytest.raises(ValueError, match="No statistics for layers_0/w: it is called with two"):
    tx.update(params, tx.init(params), stats=sow(model, params, x))


def test_one_bias_of_two_kernels_is_refused():
  class Cell(nn.Module):
    @nn.compact
    def __call__(self, x):
      v, w = (self.param(name, normal, (5, 3)) for name in "vw")
      b = self.param("b", normal, (3,))
      for name in "vw":
        bnp_optax.linen.report(self, name, x, "...d,df->...f", bias="b")
      return x @ v + x @ w + b

  model, x, params = with_params((Cell(), (7, 5)))
  with pytest.raises(ValueError, match=r"Layers v and w have the same bias, b.*bias=None"):
    update(model, params, x)


# Ways to call a registered layer.


class Half(Named):
  """A subclass that calls the original method."""

  @nn.compact
  def __call__(self, x):
    return super().__call__(x / 2)


class Other(Named):
  """A subclass that does not."""

  @nn.compact
  def __call__(self, x):
    return x @ self.param("W", normal, (x.shape[-1], self.n))


def test_subclasses():
  model, x, params = with_params((Half(4), (7, 5)))
  check(sow(model, params, x)["layer_statistics_W"], x / 2)
  model, x, params = with_params((Other(4), (7, 5)))
  assert not sow(model, params, x)


class Twice(Named):
  """A subclass that calls the method of its base class and has a kernel of its own."""

  @nn.compact
  def __call__(self, x):
    y = super().__call__(x)
    return y + x @ self.param("V", normal, (x.shape[-1], self.n))


def test_a_class_whose_base_class_reports_the_kernel_is_refused():
  with pytest.raises(
    ValueError, match=r"Half: its __call__ calls that of a base class, .* reports W"
  ):
    register(Half, "...d,df->...f", kernel="W")
  register(Twice, "...d,df->...f", kernel="V", bias=None)
  model, x, params = with_params((Twice(4), (7, 5)))
  stats = sow(model, params, x)
  check(stats["layer_statistics_W"], x)
  check(stats["layer_statistics_V"], x)


def test_a_class_that_calls_the_same_method_of_another_layer():
  class Residual(Coder):
    other: nn.Module | None = None

    def encode(self, x):
      return x @ self.a + self.other.encode(x)

  register(Residual, "...d,df->...f", kernel="a", bias=None, method="encode")
  model, x, params = with_params((Residual(Coder()), (7, 5)))
  stats = sow(model, params, x, method="encode")
  check(stats["layer_statistics_a"], x)
  check(stats["other"]["layer_statistics_a"], x)


def checked(method):
  """Decorate a method as runtime type checkers do."""

  @functools.wraps(method)
  def wrapper(self, x):
    return method(self, x)

  return wrapper


def decorated(decorate):
  class Decorated(nn.Module):
    @decorate
    @nn.compact
    def __call__(self, x):
      return x @ self.param("w", normal, (x.shape[-1], 4))

  register(Decorated, "...d,df->...f", kernel="w", bias=None)
  return Decorated()


@pytest.mark.parametrize("decorate", [nn.remat, nn.jit, checked, lambda m: nn.jit(nn.remat(m))])
def test_decorated_methods_are_read_once(decorate):
  model, x, params = with_params((decorated(decorate), (7, 5)))
  check(sow(model, params, x)["layer_statistics_w"], x)


@pytest.mark.parametrize("wrap", [nn.remat, nn.jit])
def test_transformed_classes_are_read_once(wrap):
  model, x, params = with_params((wrap(Named)(4), (7, 5)))
  check(sow(model, params, x)["layer_statistics_W"], x)


def test_a_stack_of_registered_layers():
  class Stack(nn.Module):
    @nn.compact
    def __call__(self, x):
      step = lambda layer, x, _: (layer(x), None)
      scan = nn.scan(step, variable_axes={"params": 0}, split_rngs={"params": True}, length=5)
      return scan(Transposed(5, name="block"), x, None)[0]

  model, x, params = with_params((Stack(), (7, 5)))
  layers = bnp_optax.linen.layers(model, x, strict=True)
  layout = layers["block", "kernel"]
  assert (layout.stack, layout.feature, layout.output) == ((0,), (2,), (1,))
  updates = update(model, params, x)["block"]
  plain = nn.Sequential([nn.Dense(5) for _ in range(5)])
  stacked = {"kernel": params["block"]["kernel"].mT, "bias": params["block"]["bias"]}
  unrolled = {f"layers_{i}": jax.tree.map(lambda p, i=i: p[i], stacked) for i in range(5)}
  expected = update(plain, unrolled, x)
  for i in range(5):
    actual = {"kernel": updates["kernel"][i].T, "bias": updates["bias"][i]}
    chex.assert_trees_all_close(actual, expected[f"layers_{i}"], rtol=1e-4)


def test_an_own_cell_in_a_default_rnn():
  class Cell(nn.RNNCellBase):
    @nn.compact
    def __call__(self, carry, x):
      v, w = self.param("v", normal, (5, 3)), self.param("w", normal, (3, 3))
      bnp_optax.linen.report(self, "v", x, "...d,df->...f")
      bnp_optax.linen.report(self, "w", carry, "...d,df->...f")
      carry = nn.tanh(x @ v + carry @ w)
      return carry, carry

    def initialize_carry(self, rng, input_shape):
      return jnp.zeros((*input_shape[:-1], 3))

    num_feature_axes = 1

  model, x, params = with_params((nn.RNN(Cell(name="cell")), (7, 4, 5)))
  stats = sow(model, params, x)["cell"]
  check(stats["layer_statistics_v"], x, examples=7, tolerance=1e-5)
  assert stats["layer_statistics_w"].rows == 28


# Errors.


@pytest.mark.parametrize(
  "equation", ["d,df", "d->f", "d,df,e->f", "d,df->f->g", "d,d_->_", "", "d,df->....f"]
)
def test_equations_that_are_none(equation):
  with pytest.raises(ValueError, match=r"must be that of inputs and kernel, as in"):
    register(Named, equation)


def test_a_method_that_the_class_does_not_define():
  with pytest.raises(ValueError, match="Dense does not define attend: register the class that"):
    register(nn.Dense, "...d,df->...f", method="attend")

  class Same(Named):
    pass

  with pytest.raises(ValueError, match="Same does not define __call__"):
    register(Same, "...d,df->...f")


class Reporter(nn.Module):
  """A module that reports as it is told."""

  kernel: str
  equation: str
  bias: str | None = "b"

  @nn.compact
  def __call__(self, x):
    w, b = self.param("w", normal, (5, 3)), self.param("b", normal, (3,))
    bnp_optax.linen.report(self, self.kernel, x, self.equation, bias=self.bias)
    return x @ w + b


@pytest.mark.parametrize(
  ("kernel", "equation", "match"),
  [
    ("kernel", "...d,df->...f", r"Layer layers_0 has no parameter 'kernel': .* are b, w\."),
    ("w", "...d,fd->...f", r"layers_0, parameter w: .*'...d,fd->...f' does not fit .*\(7, 5\)"),
    ("w", "...d,dfg->...f", r"layers_0, parameter w: .* does not fit .* of shape \(5, 3\)"),
    ("w", "btd,df->btf", r"layers_0, parameter w: .* does not fit .* of shape \(7, 5\)"),
    ("w", "bd,df->bf->", "must be that of inputs and kernel"),
  ],
)
def test_reports_that_do_not_fit(kernel, equation, match):
  model, x = nn.Sequential([Reporter(kernel, equation)]), uniform(7, 5)
  with pytest.raises(ValueError, match=match):
    bnp_optax.linen.layers(model, x, strict=True)
  with pytest.raises(ValueError, match=match):
    sow(model, init(model, x), x)


def test_a_bias_of_another_shape():
  class Wrong(nn.Module):
    @nn.compact
    def __call__(self, x):
      w, b = self.param("w", normal, (5, 3)), self.param("b", normal, (1, 3))
      bnp_optax.linen.report(self, "w", x, "...d,df->...f", bias="b")
      return x @ w + b

  match = r"the bias b has shape \(1, 3\), but the equation .* requires \(3,\)"
  with pytest.raises(ValueError, match=match):
    bnp_optax.linen.layers(Wrong(), uniform(7, 5))


@pytest.mark.parametrize(
  ("equation", "problem"),
  [
    ("bd,...df->bf", "the kernel has an ellipsis"),
    ("bd,df->bfx", "the output's axis 'x' is in neither operand"),
    ("bd,dd->bd", "an axis appears twice in one operand"),
    ("bd,df->bff", "an axis appears twice in one operand"),
    ("bd,df->bd", "the kernel's axis 'f' is summed alone"),
  ],
)
def test_equations_for_which_bnp_is_not_defined(equation, problem):
  model = Reporter("w", equation)
  with pytest.raises(ValueError, match=f"w: in .* {problem}"):
    bnp_optax.linen.layers(model, uniform(7, 5), strict=True)


def test_a_bias_before_the_stack():
  """Its shape does not matter, as BNP is not defined."""

  class Biased(nn.Module):
    @nn.compact
    def __call__(self, x):
      w, b = self.param("w", normal, (2, 5, 4)), self.param("b", normal, (4, 2))
      bnp_optax.linen.report(self, "w", x, "bed,edf->bfe", bias="b")
      return jnp.einsum("bed,edf->bfe", x, w) + b

  with pytest.raises(ValueError, match="an output axis stands before a batch axis"):
    bnp_optax.linen.layers(Biased(), uniform(7, 2, 5), strict=True)


# NNX.


class NnxNamed(nnx.Module):
  def __init__(self, n, m, rngs):
    self.w = nnx.Param(jax.random.normal(rngs.params(), (m, n)))
    self.b = nnx.Param(jnp.zeros(m))

  def __call__(self, x):
    return x @ self.w[...].T + self.b[...]


class NnxGated(nnx.Module):
  def __init__(self, rngs):
    self.gate = nnx.Param(jax.random.normal(rngs.params(), (4, 8)))
    self.down = nnx.Param(jax.random.normal(rngs.params(), (8, 4)))

  def __call__(self, x):
    bnp_optax.nnx.report(self, "gate", x, "...d,df->...f")
    h = nnx.silu(x @ self.gate[...])
    bnp_optax.nnx.report(self, "down", h, "...f,fd->...d")
    return h @ self.down[...]


class NnxModel(nnx.Module):
  def __init__(self, rngs):
    self.first, self.second = NnxNamed(5, 4, rngs), NnxGated(rngs)

  def __call__(self, x):
    return self.second(nnx.tanh(self.first(x)))


class NnxPlain(nnx.Module):
  def __init__(self, rngs):
    self.first = nnx.Linear(5, 4, rngs=rngs)
    self.gate = nnx.Linear(4, 8, use_bias=False, rngs=rngs)
    self.down = nnx.Linear(8, 4, use_bias=False, rngs=rngs)

  def __call__(self, x):
    return self.down(nnx.silu(self.gate(nnx.tanh(self.first(x)))))


bnp_optax.nnx.register(NnxNamed, "...d,fd->...f", kernel="w", bias="b")


def nnx_update(model, x):
  layers = bnp_optax.nnx.layers(model, x, strict=True)
  tx = problems.compiled(bnp_optax.scale_by_bnp(layers=layers, debias=False))

  def loss(model):
    with bnp_optax.nnx.sow_statistics():
      y, stats = nnx.capture(model, bnp_optax.nnx.Statistics)(x)
    return jnp.mean(y**2), stats

  (_, stats), grads = nnx.jit(nnx.value_and_grad(loss, has_aux=True))(model)
  return nnx.to_pure_dict(tx.update(grads, tx.init(nnx.state(model)), stats=stats)[0])


@pytest.mark.slow
def test_nnx():
  model, plain, x = NnxModel(nnx.Rngs(0)), NnxPlain(nnx.Rngs(0)), uniform(7, 5)
  plain.first.kernel[...] = model.first.w[...].T
  plain.gate.kernel[...], plain.down.kernel[...] = model.second.gate[...], model.second.down[...]
  updates, expected = nnx_update(model, x), nnx_update(plain, x)
  close = functools.partial(chex.assert_trees_all_close, rtol=1e-5)
  close(updates["first"]["w"].T, expected["first"]["kernel"])
  close(updates["first"]["b"], expected["first"]["bias"])
  close(updates["second"]["gate"], expected["gate"]["kernel"])
  close(updates["second"]["down"], expected["down"]["kernel"])
  # Outside of the context it is an ordinary module.
  assert model(x).shape == (7, 4)
  assert NnxNamed.__call__.__qualname__ == "NnxNamed.__call__"


class NnxTwoKernels(nnx.Module):
  def __init__(self, rngs):
    self.v, self.w = (nnx.Param(rngs.normal((5, 3))) for _ in range(2))

  def __call__(self, x):
    return (x @ self.v[...]) * (x @ self.w[...])


for _kernel in "vw":
  bnp_optax.nnx.register(NnxTwoKernels, "...d,df->...f", kernel=_kernel, bias=None)


def test_an_nnx_class_registered_once_for_each_kernel():
  layers = bnp_optax.nnx.layers(NnxTwoKernels(nnx.Rngs(0)), uniform(7, 5), strict=True)
  assert set(layers) == {("v",), ("w",)}


def test_nnx_errors():
  class Wrong(nnx.Module):
    def __init__(self, rngs):
      self.w = nnx.Param(jnp.zeros((5, 3)))

    def __call__(self, x):
      bnp_optax.nnx.report(self, self.name, x, self.equation)
      return x @ self.w[...]

  model = Wrong(nnx.Rngs(0))
  model.name, model.equation = "v", "...d,df->...f"
  with pytest.raises(ValueError, match="Layer Wrong has no parameter 'v': its parameters are w"):
    bnp_optax.nnx.layers(model, uniform(7, 5))
  model.name, model.equation = "w", "...d,fd->...f"
  with pytest.raises(ValueError, match=r"Layer Wrong, parameter w: the equation .* does not fit"):
    bnp_optax.nnx.layers(model, uniform(7, 5))


def test_nnx_class_whose_base_class_reports_the_kernel_is_refused():
  class Half(nnx.Linear):
    def __call__(self, x):
      return super().__call__(x / 2)

  class Other(nnx.Linear):
    def __call__(self, x):
      return x @ self.kernel[...]

  with pytest.raises(ValueError, match="Half: its __call__ calls that of a base class"):
    bnp_optax.nnx.register(Half, "...d,df->...f")
  bnp_optax.nnx.register(Other, "...d,df->...f")
  bnp_optax.nnx.register(
    type("Partial", (Other,), {"__call__": nnx.jit(Other.__call__)}), "...d,df->...f"
  )
  assert len(bnp_optax.nnx.layers(Other(5, 4, rngs=nnx.Rngs(0)), uniform(7, 5))) == 1


def test_nnx_ensemble():
  @nnx.vmap(in_axes=(0, None))
  def make(rngs, _):
    return NnxNamed(5, 4, rngs)

  class Ensemble(nnx.Module):
    def __init__(self, rngs):
      self.members = make(rngs.split(3), None)

    def __call__(self, x):
      return nnx.vmap(lambda member, x: member(x), in_axes=(0, None))(self.members, x)

  model, x = Ensemble(nnx.Rngs(0)), uniform(7, 5)
  layout = bnp_optax.nnx.layers(model, x, strict=True)["members", "w"]
  assert (layout.stack, layout.feature, layout.output) == ((0,), (2,), (1,))
