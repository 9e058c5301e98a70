"""Readers: functions that turn the inputs of one kind of linear layer into a `Call`.

A reader arranges the inputs of a layer as the rows of :math:`H` and returns them with the layout of
the kernel. The layers of `flax.linen` and `flax.nnx` have the same option names, so one reader
serves both.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bnp_optax._calls import Call, Invocation
from bnp_optax._equations import equation_call
from bnp_optax._layout import KernelLayout


def dense(invocation: Invocation) -> list[Call]:
  """Read Dense and Linear: every vector along the last axis is a row."""
  return [Call(KernelLayout(), invocation.inputs)]


def dense_general(invocation: Invocation) -> list[Call]:
  """Read DenseGeneral and LinearGeneral: flatten input and output axes, stack batch axes."""
  layer, inputs = invocation.layer, invocation.inputs
  # NNX maps the batch axes to their sizes.
  batch = layer.batch_dims if hasattr(layer, "batch_dims") else list(layer.batch_axis)
  batch, feature = (
    sorted(axis % inputs.ndim for axis in np.atleast_1d(np.asarray(x, int)).tolist())
    for x in (batch, layer.axis)
  )
  leading = [axis for axis in range(inputs.ndim) if axis not in (*batch, *feature)]
  h = inputs.transpose(*leading, *batch, *feature)
  h = h.reshape(*h.shape[: len(leading) + len(batch)], -1)
  counts = len(batch), len(feature), invocation.outputs.ndim - len(leading) - len(batch)
  return [Call(_consecutive(*counts), h, stack=len(batch))]


def conv(invocation: Invocation) -> list[Call]:
  """Read Conv and ConvLocal: every output position is a row."""
  layer, inputs = invocation.layer, invocation.inputs
  window = len(np.atleast_1d(layer.kernel_size))
  rows = math.prod(invocation.outputs.shape[:-1])
  if not getattr(layer, "shared_weights", True):
    # Every output position has its own kernel and its own statistics.
    layout = _consecutive(window, 1, 1)
    h, stack, rows = _windows(layer, inputs, channel_major=True), window, None
  else:
    layout = dataclasses.replace(
      KernelLayout.by_convention(window + 2),
      groups=layer.feature_group_count,
      exact_windows=invocation.exact_windows,
    )
    h, stack = _dilated(inputs, _per_axis(layer.input_dilation, window)), 0
    if invocation.exact_windows:
      h = _windows(layer, inputs, channel_major=False)
  batched = inputs.ndim > window + 1
  return [Call(layout, h, stack, rows, problem=_masked_weights(layer), batched=batched)]


def conv_transpose(invocation: Invocation) -> list[Call]:
  """Read ConvTranspose as a convolution over the inputs with zeros between them."""
  layer, inputs = invocation.layer, invocation.inputs
  window = len(np.atleast_1d(layer.kernel_size))
  # Circular padding wraps the outputs, so that several windows make one row.
  exact_windows = invocation.exact_windows and layer.padding != "CIRCULAR"
  layout = dataclasses.replace(KernelLayout.by_convention(window + 2), exact_windows=exact_windows)
  if layer.transpose_kernel:
    layout = dataclasses.replace(layout, feature=layout.output, output=layout.feature)
  if exact_windows:
    h, rows = _transposed_windows(layer, inputs), None
  else:
    h = _dilated(inputs, _per_axis(layer.strides, window))
    rows = math.prod(invocation.outputs.shape[:-1])
  batched = inputs.ndim > window + 1
  return [Call(layout, h, rows=rows, problem=_masked_weights(layer), batched=batched)]


def einsum(invocation: Invocation) -> list[Call]:
  """Read Einsum: axes of the inputs alone are rows, axes of all three operands are a stack."""
  layer, inputs = invocation.layer, invocation.inputs
  # No other argument of a supported layer changes the meaning of its kernel.
  equation = invocation.arguments.get("einsum_str") or layer.einsum_str
  call = equation_call(equation, inputs)
  # NNX has the bias, or None, as an attribute.
  biased = getattr(layer, "use_bias", getattr(layer, "bias", None) is not None)
  return [equation_call(equation, inputs, bias=None) if call.problem and not biased else call]


def _consecutive(stack: int, feature: int, output: int) -> KernelLayout:
  """Return the layout of a kernel whose axes are stack, feature and output, in this order."""
  axes, inputs = tuple(range(stack + feature + output)), stack + feature
  return KernelLayout(axes[:stack], (), axes[stack:inputs], axes[inputs:])


def _masked_weights(layer: Any) -> str:
  """Return the problem of a layer with a mask on its kernel, or an empty string."""
  return "" if layer.mask is None else "its kernel is masked: not every entry is a weight"


def _per_axis(x: Any, window: int) -> tuple[int, ...]:
  """Return an option of a convolution as one number for each axis of the window."""
  return tuple(np.broadcast_to(1 if x is None else x, window).tolist())


def _dilated(inputs: jax.Array, dilation: tuple[int, ...]) -> jax.Array:
  """Insert ``dilation - 1`` zeros between the inputs of a convolution."""
  interior = (0,) * (inputs.ndim - 1 - len(dilation)) + tuple(d - 1 for d in dilation) + (0,)
  if not any(interior) or inputs.size == 0:
    return inputs
  return jax.lax.pad(inputs, jnp.zeros((), inputs.dtype), [(0, 0, i) for i in interior])


def _windows(layer: Any, inputs: jax.Array, *, channel_major: bool) -> jax.Array:
  """Return the rows of ``H``, ``[*batch, *positions, entries]``, including zeros of the padding.

  The entries are in the order (group, window, feature). If ``channel_major``, they are in the order
  (feature, window), as in the kernel of ConvLocal.
  """
  kernel_size = tuple(np.atleast_1d(layer.kernel_size).tolist())
  window, channels = len(kernel_size), inputs.shape[-1]
  batch, h = _maps(inputs, window)
  dilation = _per_axis(layer.kernel_dilation, window)
  padding: Any = layer.padding
  reach = [(k - 1) * d for k, d in zip(kernel_size, dilation, strict=True)]
  if padding in ("CIRCULAR", "REFLECT", "CAUSAL"):
    sides = [(r, 0) if padding == "CAUSAL" else (r // 2, (r + 1) // 2) for r in reach]
    mode = {"CIRCULAR": "wrap", "REFLECT": "reflect", "CAUSAL": "constant"}[padding]
    h, padding = jnp.pad(h, [(0, 0), *sides, (0, 0)], mode), "VALID"
  else:
    padding = _sides(padding, window)
  letters = "ABDEFGH"[:window]  # Not those of the other axes: N, C, I, O.
  h = jax.lax.conv_general_dilated_patches(
    h,
    kernel_size,
    _per_axis(layer.strides, window),
    padding,
    lhs_dilation=_per_axis(layer.input_dilation, window),
    rhs_dilation=dilation,
    dimension_numbers=(f"N{letters}C", f"{letters}IO", f"N{letters}C"),
    precision=jax.lax.Precision.HIGHEST,
  )
  positions = h.shape[1:-1]
  if not channel_major:
    groups = layer.feature_group_count
    h = h.reshape(*h.shape[:-1], groups, channels // groups, math.prod(kernel_size))
    h = jnp.moveaxis(h, -1, -2)
  return h.reshape(*batch, *positions, -1)


def _transposed_windows(layer: Any, inputs: jax.Array) -> jax.Array:
  """Return the rows of ``H`` of a transposed convolution: its outputs for all one-hot kernels."""
  kernel_size = tuple(np.atleast_1d(layer.kernel_size).tolist())
  window, features = len(kernel_size), inputs.shape[-1]
  batch, h = _maps(inputs, window)
  entries = math.prod(kernel_size) * features
  kernel = jnp.eye(entries, dtype=h.dtype).reshape(*kernel_size, features, entries)
  h = jax.lax.conv_transpose(
    h,
    jnp.swapaxes(kernel, -1, -2) if layer.transpose_kernel else kernel,
    _per_axis(layer.strides, window),
    _sides(layer.padding, window),
    rhs_dilation=_per_axis(layer.kernel_dilation, window),
    transpose_kernel=layer.transpose_kernel,
    precision=jax.lax.Precision.HIGHEST,
  )
  return h.reshape(*batch, *h.shape[1:])


def _maps(inputs: jax.Array, window: int) -> tuple[tuple[int, ...], jax.Array]:
  """Return the batch shape, and the inputs as floating-point maps ``[batch, *space, channels]``."""
  batch = inputs.shape[: -window - 1]
  h = inputs.reshape(math.prod(batch), *inputs.shape[-window - 1 :])
  return batch, h if jnp.issubdtype(h.dtype, jnp.inexact) else h.astype(jnp.float32)


def _sides(padding: Any, window: int) -> Any:
  """Return padding as JAX takes it: a name, or a pair for each axis of the window."""
  if isinstance(padding, str):
    return padding
  sides = (padding,) * window if isinstance(padding, int) else padding
  return [(p, p) if isinstance(p, int) else tuple(p) for p in sides]
