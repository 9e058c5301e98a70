"""The table of a model: its parameters, the axes that are matched, and what `strict` refuses."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bnp_optax
from bnp_optax import _observations
from bnp_optax._layout import KernelLayout
from bnp_optax.linen import sow_statistics


@pytest.mark.parametrize(
  ("shape", "inner", "outer", "expected"),
  [
    ((3, 4), (3, 4), (), ((), ())),
    ((5, 3, 4), (3, 4), (5,), ((0,), ())),
    ((3, 5, 4), (3, 4), (5,), ((1,), ())),
    ((3, 3, 3), (3, 3), (3,), ((0,), ())),  # By default, stacks lead.
    ((3, 4), (3, 4), (7,), ((), (0,))),
    ((5, 3, 4), (3, 4), (5, 7), ((0,), (1,))),
    ((5, 3, 4), (3, 4), (7, 5), ((0,), (0,))),
    ((2, 5, 3, 4), (3, 4), (2, 5), ((0, 1), ())),
    ((5, 3, 4), (3, 4), (5, 5), None),  # Which is the scan over time?
    ((3, 4), (5, 3, 4), (), None),
    ((5, 3, 4), (3, 4), (), None),
  ],
)
def test_stack_axes(shape, inner, outer, expected):
  assert _observations._stack_axes(shape, inner, outer) == expected


# The mapping and its table.


class Everything(nn.Module):
  """Linear layers, other parameters, and a kernel of a custom module."""

  @nn.compact
  def __call__(self, tokens):
    x = nn.Embed(9, 4, name="embed")(tokens)
    x = nn.LayerNorm(name="norm")(x + self.param("position", nn.initializers.zeros, (1, 5, 4)))
    x = nn.Conv(8, (3,), feature_group_count=4, name="conv")(x)
    x = nn.Einsum((8, 3), "btd,dk->bk", use_bias=False, name="pool")(x)
    x = nn.Einsum((3, 3, 2), "bd,dkl->bk", name="odd")(x)
    return x @ self.param("kernel", nn.initializers.ones, (3, 2))


TABLE = """\
path             kind        shape  inputs  calls  positions  preconditioned
-
conv/kernel      Conv        3x1x8  2x5x4       1          5  yes
embed/embedding  Embed       9x4                              passes through
kernel           Everything  3x2                              unknown: no linear layer was called with it: a class that is not registered, or no call
norm/bias        LayerNorm   4                                passes through
norm/scale       LayerNorm   4                                passes through
odd/bias         Einsum      3                                passes through
odd/kernel       Einsum      3x3x2  2x3         1          1  NO: in 'bd,dkl->bk' the kernel's axis 'l' is summed alone, so its rows are not defined
pool/kernel      Einsum      8x3    2x8         1          1  yes, without bias: not centred
position         Everything  1x5x4                            unknown: no linear layer was called with it: a class that is not registered, or no call
2 layers, 56 of 147 parameters (38.1%)"""  # noqa: E501


@pytest.fixture(scope="module")
def everything():
  return bnp_optax.linen.layers(Everything(), jax.ShapeDtypeStruct((2, 5), jnp.int32))


def test_the_table(everything):
  lines = [line.rstrip() for line in str(everything).splitlines()]
  expected = TABLE.splitlines()
  assert lines[0] == expected[0]
  assert lines[2:] == expected[2:]


def test_strict_names_each_parameter_and_why():
  tokens = jnp.ones((2, 5), jnp.int32)
  with pytest.raises(ValueError, match="BNP cannot precondition these parameters") as error:
    bnp_optax.linen.layers(Everything(), tokens, strict=True)
  assert "  kernel: no linear layer" in str(error.value)
  assert "  odd/kernel: in 'bd,dkl->bk'" in str(error.value)
  assert "  position: no linear layer" in str(error.value)
  assert not any(name in str(error.value) for name in ("conv", "embed", "norm", "pool", "odd/bias"))
  with pytest.raises(ValueError, match=r"parameters:\n  position: .*\.\nName in ignore="):
    bnp_optax.linen.layers(Everything(), tokens, strict=True, ignore=["kernel", "odd"])
  ignore = ["kernel", "odd/kernel", "position"]
  layers = bnp_optax.linen.layers(Everything(), tokens, strict=True, ignore=ignore)
  assert len(layers) == 2
  with pytest.raises(ValueError, match="prefix of no parameter of the model: 'posi'"):
    bnp_optax.linen.layers(Everything(), tokens, ignore=["posi"])


def test_parameters_of_stacked_norms_and_vectors_are_no_matrices():
  class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
      gain = self.param("gain", nn.initializers.ones, (4,))
      x = nn.LayerNorm()(x) * gain[None]
      return nn.DenseGeneral((2, 2))(x).reshape(x.shape), None

  class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
      kwargs = {"variable_axes": {"params": 0, "intermediates": 0}, "length": 3}
      x, _ = nn.scan(Block, split_rngs={"params": True}, **kwargs)(name="blocks")(x, None)
      return nn.WeightNorm(nn.Dense(2))(x)

  layers = bnp_optax.linen.layers(Model(), jnp.ones((5, 4)), strict=True)
  assert {entry.path: entry.kind for entry in layers.entries} == {
    ("Dense_0", "kernel"): "Dense",
    ("WeightNorm_0", "Dense_0/kernel/scale"): "WeightNorm",
    ("blocks", "DenseGeneral_0", "kernel"): "DenseGeneral",
    ("blocks", "LayerNorm_0", "bias"): "LayerNorm",
    ("blocks", "LayerNorm_0", "scale"): "LayerNorm",
    ("blocks", "gain"): "Block",
  }


def test_an_embedding_is_the_parameter_of_its_name_in_the_class_and_no_other():
  class Projected(nn.Embed):
    @nn.compact
    def project(self, x):
      return self(x) @ self.param("matrix", nn.initializers.ones, (4, 2))

  class Table(nn.Module):
    @nn.compact
    def __call__(self, x):
      table = self.param("embedding", nn.initializers.ones, (2, 9))
      return nn.Dense(2)(Projected(9, 4).project(x)) @ table

  with pytest.raises(ValueError, match="cannot precondition") as error:
    bnp_optax.linen.layers(Table(), jnp.ones((2,), jnp.int32), strict=True)
  lines = str(error.value).splitlines()[1:-1]
  assert [line.split(":")[0] for line in lines] == ["  Projected_0/matrix", "  embedding"]


@pytest.mark.parametrize("bias", [True, False])
def test_calls_are_counted(bias):
  class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
      x = nn.RNN(nn.SimpleCell(3), variable_axes={"intermediates": 0}, name="rnn")(x)
      shared = nn.Dense(3, name="shared", use_bias=bias)
      return nn.remat(nn.Dense)(2, name="once")(shared(shared(shared(x))))

  layers = bnp_optax.linen.layers(Model(), jnp.ones((2, 7, 3)))
  calls = {entry.path[-2]: (entry.calls, entry.positions) for entry in layers.entries}
  assert calls == {"i": (7, 7), "h": (7, 7), "once": (1, 7), "shared": (3, 21)}


@pytest.mark.slow
@pytest.mark.parametrize(("exact_windows", "outer"), [(True, False), (False, False), (False, True)])
def test_layers_in_contexts_that_the_model_enters(exact_windows, outer):
  """The table takes their exact_windows and none of their masks."""

  class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
      with sow_statistics(mask={"conv": np.ones(2)}, exact_windows=exact_windows):
        h = nn.Conv(4, (3,), name="conv")(x)
      h = nn.Conv(4, (3,), name="last")(h)
      return nn.Dense(2, name="head")(h.mean(1))

  x = jnp.ones((2, 5, 3))
  layers = bnp_optax.linen.layers(Model(), x, strict=True, exact_windows=outer)
  assert list(layers) == [("conv", "kernel"), ("head", "kernel"), ("last", "kernel")]
  assert layers["conv", "kernel"].exact_windows == exact_windows
  assert layers["last", "kernel"].exact_windows == outer
  params = jax.jit(Model().init)(jax.random.key(0), x)["params"]
  tx = bnp_optax.scale_by_bnp(layers=layers)

  def step(params):
    with sow_statistics(exact_windows=outer):
      _, aux = Model().apply({"params": params}, x, mutable=["intermediates"])
    return tx.update(params, tx.init(params), stats=aux["intermediates"])

  jax.eval_shape(step, params)


@pytest.mark.parametrize("axis_name", ["batch", ("model", "batch")])
def test_a_model_that_needs_a_mapped_axis(axis_name):
  class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
      x = nn.BatchNorm(use_running_average=False, axis_name=axis_name)(nn.Dense(4)(x))
      return nn.Dense(2)(x)

  layers = bnp_optax.linen.layers(Model(), jnp.ones((3, 5)), axis_name=axis_name)
  assert [entry.inputs for entry in layers.entries if entry.layout] == [(3, 5), (3, 4)]
  with pytest.raises(NameError, match="unbound axis name") as error:
    bnp_optax.linen.layers(Model(), jnp.ones((3, 5)))
  assert any("axis_name='batch'" in note for note in error.value.__notes__)


def test_layers_are_an_immutable_hashable_mapping(everything):
  assert set(everything) == {("conv", "kernel"), ("pool", "kernel")}
  assert everything["conv", "kernel"].groups == 4
  same = bnp_optax.linen.layers(Everything(), jnp.ones((2, 5), jnp.int32))
  assert (same == everything, hash(same) == hash(everything)) == (True, True)
  with pytest.raises(AttributeError):
    everything.entries = ()
  with pytest.raises(TypeError):
    everything["conv", "kernel"] = KernelLayout()  # pyright: ignore[reportIndexIssue]


def test_layers_survive_inject_hyperparams(everything):
  params = jax.jit(Everything().init)(jax.random.key(0), jnp.ones((2, 5), jnp.int32))["params"]
  tx = optax.inject_hyperparams(bnp_optax.scale_by_bnp)(decay=0.5, layers=everything)
  state = tx.init(params)
  assert set(state.hyperparams) == {"decay", "eps_relative", "eps_absolute"}
  assert state.inner_state.input_mean["conv"]["kernel"].shape == (4,)


@pytest.mark.slow
def test_hundreds_of_layers():
  class Deep(nn.Module):
    @nn.compact
    def __call__(self, x):
      for _ in range(300):
        x = nn.Dense(1024)(x)
      return x

  layers = bnp_optax.linen.layers(Deep(), jax.ShapeDtypeStruct((8, 1024), jnp.float32))
  assert len(layers) == 300
  assert len(str(layers).splitlines()) == 303


def test_a_complex_kernel_is_not_covered():
  model = nn.Dense(3, dtype=jnp.complex64, param_dtype=jnp.complex64)
  layers = bnp_optax.linen.layers(model, jnp.ones((2, 4)))
  assert not layers
  with pytest.raises(ValueError, match="kernel: BNP is defined for real kernels, found complex64"):
    bnp_optax.linen.layers(model, jnp.ones((2, 4)), strict=True)
