"""Readers: the rows of H and the layout of each kind of layer, against explicit matrices.

The layout and the rows of a call are right if the outputs of each linear map of the layer are H w.
Without `exact_windows` the call of a convolution holds its input map instead of the rows of H.
"""

import inspect
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnp_optax import KernelLayout, _readers
from bnp_optax._calls import Invocation
from tests import unrolled

pytestmark = pytest.mark.usefixtures("x64")


def read(reader, layer, x, *, exact_windows=False):
  """Read one call of a Linen layer; return it with the outputs, the kernel and the bias."""
  rng = np.random.default_rng(1)
  layer = layer.clone(param_dtype=jnp.float64)
  shapes = jax.eval_shape(layer.init, jax.random.key(0), x)["params"]
  params = jax.tree.map(lambda p: rng.normal(size=p.shape), shapes)
  outputs = np.asarray(jax.jit(layer.apply)({"params": params}, x))
  call = read_arguments(layer, reader, x, exact_windows=exact_windows, outputs=outputs)
  return call, outputs, params["kernel"], params.get("bias")


def read_arguments(layer, reader, *args, exact_windows=False, outputs=None, **kwargs):
  method = inspect.unwrap(type(layer).__call__).__get__(layer)
  (call,) = reader(Invocation(layer, exact_windows, outputs, method, args, kwargs))
  return call


def normal(*shape):
  return np.random.default_rng(0).normal(1, 1, shape)


def products(call, kernel, bias):
  """Return H w for every linear map, ``[*leading, stack, output]``, and the rows themselves."""
  w, b = (None if x is None else np.asarray(x) for x in call.layout.to_canonical(kernel, bias))
  h = np.asarray(call.inputs).reshape(*call.leading, w.shape[0], -1)
  y = np.einsum("...sk,sko->...so", h, w.reshape(len(w), -1, w.shape[-1]))
  return y if b is None else y + b


# Dense, DenseGeneral, Einsum.


@pytest.mark.parametrize("shape", [(5,), (3, 5), (3, 2, 5)])
def test_dense(shape):
  x = normal(*shape)
  call, outputs, kernel, bias = read(_readers.dense, nn.Dense(4), x)
  np.testing.assert_array_equal(call.inputs, x)
  assert (call.layout, call.stack, call.rows, call.kernel) == (KernelLayout(), 0, None, "kernel")
  np.testing.assert_allclose(products(call, kernel, bias)[..., 0, :], outputs, rtol=1e-12)


@pytest.mark.parametrize(
  ("layer", "shape", "leading", "stack"),
  [
    (nn.DenseGeneral((4, 2), (-2, -1)), (3, 6, 2, 5), (0, 1), ()),
    (nn.DenseGeneral((4, 2), (-1, -2)), (3, 6, 2, 5), (0, 1), ()),
    (nn.DenseGeneral(4, 1), (3, 6, 2), (0, 2), ()),
    (nn.DenseGeneral((4, 2), (1, -1)), (3, 6, 2, 5), (0, 2), ()),
    (nn.DenseGeneral(4, -1, batch_dims=(0,), use_bias=False), (2, 3, 5), (1,), (0,)),
    (nn.DenseGeneral((4, 3), -1, batch_dims=(0, 1)), (2, 3, 6, 5), (2,), (0, 1)),
  ],
)
def test_dense_general(layer, shape, leading, stack):
  x = normal(*shape)
  call, outputs, kernel, bias = read(_readers.dense_general, layer, x)
  feature = tuple(i for i in range(x.ndim) if i not in leading + stack)
  sizes = [shape[i] for i in leading + stack]
  rows = np.moveaxis(x, leading + stack + feature, range(x.ndim)).reshape(*sizes, -1)
  np.testing.assert_array_equal(call.inputs, rows)
  assert (call.stack, call.leading) == (len(stack), tuple(shape[i] for i in leading))
  # The outputs of DenseGeneral have the batch axes first.
  expected = np.moveaxis(outputs, range(len(stack)), range(len(leading), len(leading + stack)))
  actual = products(call, kernel, bias).reshape(expected.shape)
  np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
  ("equation", "shape", "kernel", "bias", "rows", "order"),
  [
    ("bd,dk->bk", (3, 5), (5, 4), True, "bd->bd", "bk"),
    ("b d , k d -> b k", (3, 5), (4, 5), True, "bd->bd", "bk"),
    ("btd,hdk->bthk", (3, 2, 5), (4, 5, 2), True, "btd->btd", "bthk"),
    ("...ed,edf->...ef", (3, 2, 5), (2, 5, 4), True, "aed->aed", "aef"),
    ("bthk,hkd->btd", (3, 2, 4, 5), (4, 5, 2), True, "bthk->bthk", "btd"),
    # The inputs' own axis is summed before the product.
    ("btd,dk->bk", (3, 2, 5), (5, 4), False, "btd->bd", "bk"),
    # A batch axis of the kernel behind an axis of rows.
    ("ebd,edk->ebk", (2, 3, 5), (2, 5, 4), False, "ebd->bed", "bek"),
    # An output axis before a batch axis of the kernel, which a bias could not have.
    ("bed,edk->bke", (3, 2, 5), (2, 5, 4), False, "bed->bed", "bek"),
  ],
)
def test_einsum(equation, shape, kernel, bias, rows, order):
  x, layer = normal(*shape), nn.Einsum(kernel, equation, use_bias=bias)
  call, outputs, kernel, bias = read(_readers.einsum, layer, x)
  assert not call.problem
  expected = np.einsum(rows, x)
  np.testing.assert_allclose(np.ravel(call.inputs), np.ravel(expected), rtol=1e-12)
  result = equation.replace(" ", "").split("->")[1].replace("...", "a")
  outputs = np.einsum(f"{result}->{order}", outputs)
  actual = products(call, kernel, bias).reshape(outputs.shape)
  np.testing.assert_allclose(actual, outputs, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
  ("equation", "shape", "problem"),
  [
    ("bd,...dk->bk", (3, 5), "the kernel has an ellipsis"),
    ("bb,bk->bk", (3, 3), "an axis appears twice in one operand"),
    ("bd,ddk->bk", (3, 5), "an axis appears twice in one operand"),
    ("bd,dkl->bk", (3, 5), "the kernel's axis 'l' is summed alone, so its rows are not defined"),
    ("bed,edk->bke", (3, 2, 5), "an output axis stands before a batch axis of the kernel"),
  ],
)
def test_einsum_for_which_bnp_is_not_defined(equation, shape, problem):
  layer = nn.Einsum((1,), equation)
  call = read_arguments(layer, _readers.einsum, jnp.zeros(shape))
  assert call.problem == f"in {equation!r} {problem}"


# Convolutions.

CONVS = {
  "padding by name": (nn.Conv(4, (3, 2), 2, "SAME"), (2, 5, 6, 2), [(1, 1), (0, 0)]),
  "explicit padding": (nn.Conv(4, (2,), 1, [(2, 1)], kernel_dilation=2), (2, 5, 3), [(2, 1)]),
  "one number": (nn.Conv(4, 3, 2, 1), (2, 5, 3), [(1, 1)]),
  "groups": (nn.Conv(6, (2,), 1, "VALID", feature_group_count=3), (2, 5, 6), [(0, 0)]),
  "causal": (nn.Conv(4, (3,), 1, "CAUSAL", kernel_dilation=2), (2, 5, 3), [(4, 0)]),
  "three axes": (nn.Conv(2, (1, 2, 2), 1, "VALID"), (2, 2, 3, 3, 2), [(0, 0)] * 3),
  "four axes": (nn.Conv(2, (1, 2, 1, 2), 1, "VALID"), (2, 2, 3, 1, 3, 2), [(0, 0)] * 4),
}


def expected_windows(layer, x, padding):
  """Return the rows of H by loops, ``[N, *positions, groups * window * features]``."""
  window = tuple(np.atleast_1d(layer.kernel_size))
  per_axis = lambda option: tuple(np.broadcast_to(1 if option is None else option, len(window)))
  rows = unrolled.windows(
    x, window, per_axis(layer.strides), per_axis(layer.kernel_dilation), padding
  )
  positions = rows.shape[len(window) + 1 : -1]
  groups = layer.feature_group_count
  rows = rows.reshape(math.prod(window), len(x), *positions, groups, -1)
  return np.moveaxis(rows, 0, -2).reshape(len(x), *positions, -1)


@pytest.mark.parametrize("name", CONVS)
def test_conv(name):
  layer, shape, _ = CONVS[name]
  x, window = normal(*shape), len(np.atleast_1d(layer.kernel_size))
  call, outputs, *_ = read(_readers.conv, layer, x)
  np.testing.assert_array_equal(call.inputs, x)
  assert call.rows == math.prod(outputs.shape[:-1])
  assert (call.stack, call.batched, call.problem) == (0, True, "")
  layout = call.layout
  axes = layout.stack, layout.window, layout.feature, layout.output
  assert axes == ((), tuple(range(window)), (window,), (window + 1,))
  assert (layout.groups, layout.exact_windows) == (layer.feature_group_count, False)


@pytest.mark.parametrize("name", CONVS)
def test_conv_with_exact_windows(name):
  layer, shape, padding = CONVS[name]
  x = normal(*shape)
  call, outputs, kernel, bias = read(_readers.conv, layer, x, exact_windows=True)
  assert call.layout.exact_windows
  np.testing.assert_allclose(call.inputs, expected_windows(layer, x, padding), rtol=1e-12)
  actual = products(call, kernel, bias).reshape(outputs.shape)
  np.testing.assert_allclose(actual, outputs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("padding", "mode"), [("CIRCULAR", "wrap"), ("REFLECT", "reflect")])
def test_padding_that_repeats_the_map(padding, mode):
  x, layer = normal(2, 6, 3), nn.Conv(4, (4,), padding=padding)
  call, outputs, kernel, bias = read(_readers.conv, layer, x, exact_windows=True)
  padded = np.pad(x, [(0, 0), (1, 2), (0, 0)], mode)
  np.testing.assert_allclose(call.inputs, expected_windows(layer, padded, [(0, 0)]), rtol=1e-12)
  np.testing.assert_allclose(products(call, kernel, bias)[..., 0, :], outputs, rtol=1e-11)
  # One mean for all entries of the window is that of the map, without padding.
  np.testing.assert_array_equal(read(_readers.conv, layer, x)[0].inputs, x)


def test_conv_with_dilated_inputs():
  x, layer = normal(2, 3, 4, 2), nn.Conv(4, (2, 2), padding=1, input_dilation=(2, 3))
  call, outputs, *_ = read(_readers.conv, layer, x)
  np.testing.assert_array_equal(call.inputs, unrolled.dilate(x, (2, 3)))
  assert call.rows == math.prod(outputs.shape[:-1])


@pytest.mark.parametrize(
  ("reader", "layer"),
  [
    (_readers.conv, nn.Conv(4, (2, 2), padding=1, input_dilation=(2, 3))),
    (_readers.conv_transpose, nn.ConvTranspose(3, (3, 2), (2, 1), "SAME")),
    (_readers.conv_transpose, nn.ConvTranspose(3, (3, 2), padding=[(1, 0), (0, 1)])),
    (_readers.conv_transpose, nn.ConvTranspose(3, (3, 2), (2, 1), kernel_dilation=(1, 2))),
  ],
)
def test_exact_windows_of_other_options(reader, layer):
  call, outputs, kernel, bias = read(reader, layer, normal(2, 4, 3, 2), exact_windows=True)
  actual = products(call, kernel, bias)[..., 0, :]
  np.testing.assert_allclose(actual, outputs, rtol=1e-11, atol=1e-12)


def test_conv_of_one_map_and_of_two_batch_axes():
  layer = nn.Conv(4, (3,))
  one, *_ = read(_readers.conv, layer, normal(5, 2))
  assert (one.batched, one.rows, one.example_shape(1)) == (False, 5, ())
  two, outputs, kernel, bias = read(_readers.conv, layer, normal(3, 2, 5, 2), exact_windows=True)
  assert (two.batched, two.rows, two.leading) == (True, 30, (3, 2, 5))
  np.testing.assert_allclose(products(two, kernel, bias)[..., 0, :], outputs, rtol=1e-11)


def test_conv_local():
  """Every position has a kernel; its features are in the order (channel, window)."""
  x, layer = normal(2, 5, 4, 3), nn.ConvLocal(4, (2, 3), (2, 1), "VALID")
  call, outputs, kernel, bias = read(_readers.conv, layer, x)
  rows = unrolled.windows(x, (2, 3), (2, 1), (1, 1), [(0, 0)] * 2)
  rows = np.moveaxis(rows.reshape(6, *rows.shape[2:]), 0, -1)
  np.testing.assert_allclose(call.inputs, rows.reshape(*rows.shape[:-2], -1), rtol=1e-12)
  assert (call.stack, call.rows, call.leading) == (2, None, (2,))
  actual = products(call, kernel, bias).reshape(outputs.shape)
  np.testing.assert_allclose(actual, outputs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("exact", [False, True])
def test_conv_transpose(transpose, exact):
  x = normal(2, 4, 3, 2)
  layer = nn.ConvTranspose(3, (3, 2), (2, 1), "VALID", transpose_kernel=transpose)
  call, outputs, kernel, bias = read(_readers.conv_transpose, layer, x, exact_windows=exact)
  assert call.layout.feature == ((3,) if transpose else (2,))
  assert call.layout.output == ((2,) if transpose else (3,))
  assert call.layout.exact_windows == exact
  if exact:
    actual = products(call, kernel, bias).reshape(outputs.shape)
    np.testing.assert_allclose(actual, outputs, rtol=1e-11, atol=1e-12)
  else:
    np.testing.assert_array_equal(call.inputs, unrolled.dilate(x, (2, 1)))
    assert call.rows == math.prod(outputs.shape[:-1])


def test_circular_conv_transpose_has_no_exact_windows():
  layer = nn.ConvTranspose(3, (2,), (2,), "CIRCULAR")
  call, *_ = read(_readers.conv_transpose, layer, normal(2, 4, 2), exact_windows=True)
  assert not call.layout.exact_windows


@pytest.mark.parametrize(
  ("reader", "layer"),
  [
    (_readers.conv, nn.Conv(2, (3,), mask=np.ones((3, 2, 2)))),
    (_readers.conv, nn.ConvLocal(2, (3,), padding="VALID", mask=np.ones((3, 6, 2)))),
    (_readers.conv_transpose, nn.ConvTranspose(2, (3,), mask=np.ones((3, 2, 2)))),
  ],
)
def test_a_masked_kernel_is_a_problem(reader, layer):
  call, *_ = read(reader, layer, normal(2, 5, 2))
  assert call.problem == "its kernel is masked: not every entry is a weight"


@pytest.mark.parametrize("dtype", [np.int32, np.bool_])
def test_windows_of_integers_are_floating_point(dtype):
  x = np.random.default_rng(0).integers(0, 2, (2, 5, 3)).astype(dtype)
  layer = nn.Conv(2, (2,), padding="VALID")
  outputs = np.zeros((2, 4, 2))
  call = read_arguments(layer, _readers.conv, x, exact_windows=True, outputs=outputs)
  np.testing.assert_array_equal(call.inputs, expected_windows(layer, x, [(0, 0)]))


# The arguments of a call.


def test_inputs_are_read_by_position_and_by_keyword():
  x = normal(3, 5)
  for args, kwargs in (((x,), {}), ((), {"inputs": x}), ((x.tolist(),), {})):
    call = read_arguments(nn.Dense(2), _readers.dense, *args, **kwargs)
    np.testing.assert_array_equal(call.inputs, x)


def test_the_equation_of_a_call_replaces_that_of_the_layer():
  layer = nn.Einsum((4, 5), "bk,kd->bd")
  call = read_arguments(layer, _readers.einsum, normal(3, 4))
  assert call.layout == KernelLayout()
  call = read_arguments(layer, _readers.einsum, normal(3, 5), "bd,kd->bk")
  assert call.layout == KernelLayout(feature=(1,), output=(0,))


def test_complex_inputs_are_a_problem():
  call = read_arguments(nn.Dense(2), _readers.dense, 1j * normal(3, 5))
  assert call.problem == "BNP is defined for real inputs, found complex128"
