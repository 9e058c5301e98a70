"""What one layer saw in a batch, as sums.

Everything here follows from "+": the statistics of two micro-batches, of two devices or of two
halves of a sequence are the sums of theirs. So `jax.tree.map(jnp.add, a, b)`, `jax.lax.psum` and
Optax's micro-batching merge them, and no function of ours is needed. Devices that know the mean of
the whole batch before they take squares have one vector less to tell each other.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from bnp_optax._layout import KernelLayout

# The name of a mapped axis, or the names of several.
AxisName = str | tuple[str, ...]

TWO_MEANINGS = "it is called with two different meanings of its kernel's axes"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerStatistics:
  r"""What one layer saw: how much, and the sums behind its mean and variance.

  A layer computes :math:`\hat H \hat w` where each row of :math:`\hat H = [e, H]` holds the inputs
  of one output position of one example (paper, eqs. 11 and 18). With :math:`h` running over those
  rows, and :math:`\bar h_b` the mean of the batch :math:`b` that a row belongs to, the sums are

  .. math::
    \text{total} = \sum h, \qquad
    \text{within} = \sum (h - \bar h_b)^2, \qquad
    \text{between} = \sum_b \text{total}_b^2 / \text{rows}_b .

  All five add up over batches. ``within + between`` is the plain sum of squares; it is kept in two
  parts because :math:`E[h^2] - E[h]^2` cancels: in float32 it loses the variance of inputs whose
  mean is some thousand deviations away from zero, ``within`` does not.

  Two batches are merged by adding every field:

  >>> import jax, jax.numpy as jnp
  >>> a = layer_statistics(jnp.array([[1.0], [2.0]]), examples=2, rows=2)
  >>> b = layer_statistics(jnp.array([[6.0], [7.0]]), examples=2, rows=2)
  >>> both = jax.tree.map(jnp.add, a, b)
  >>> both.mean, both.variance
  (Array([4.], dtype=float32), Array([6.5], dtype=float32))

  Attributes:
    examples: how many examples the loss is a mean over, the paper's :math:`N`. Shape ``[*stack]``.
    rows: the number of rows of :math:`H`, examples times output positions. Shape ``[*stack]``.
    total: the sum of the inputs. Shape ``[*stack, features]``.
    within: the sum of squares about each batch's own mean. Shape ``[*stack, features]``.
    between: the sum of each batch's ``total**2 / rows``. Shape ``[*stack, features]``.
    kernel: the name of the kernel's leaf beside which they were sown; no leaf of this pytree.
    layout: the layout of the kernel as the layer itself saw it; None if nobody said. No leaf.

  All arrays are float32, or float64 where the inputs are float64.
  """

  examples: jax.Array
  rows: jax.Array
  total: jax.Array
  within: jax.Array
  between: jax.Array
  kernel: str = dataclasses.field(default="kernel", metadata={"static": True})
  layout: KernelLayout | None = dataclasses.field(default=None, metadata={"static": True})

  @property
  def mean(self) -> jax.Array:
    r"""The mean :math:`\mu_H` (eqs. 13, 21), ``[*stack, features]``; NaN if there are no rows."""
    return self.total / self.rows[..., None]

  @property
  def variance(self) -> jax.Array:
    r"""The variance :math:`\sigma_H^2` (eqs. 13, 22), ``[*stack, features]``; never below 0."""
    spread = self.between - self.total * self.total / self.rows[..., None]
    # One batch alone has no spread between batches; what is left then is rounding, and
    # rounding of a large mean must not be taken for variance.
    rounding = 4 * jnp.finfo(spread.dtype).eps * self.between
    return (self.within + jnp.where(spread <= rounding, 0, spread)) / self.rows[..., None]

  @property
  def mean_square(self) -> jax.Array:
    r"""The second moment :math:`E[h^2]`, ``[*stack, features]``."""
    return (self.within + self.between) / self.rows[..., None]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NoStatistics:
  """Sown instead of statistics by a layer that can give none; it has no leaves.

  Only an optimizer that has use for the layer's statistics takes it for an error.

  Attributes:
    kernel: as in `LayerStatistics`.
    reason: why there are none.
  """

  kernel: str = dataclasses.field(metadata={"static": True})
  reason: str = dataclasses.field(metadata={"static": True})


def accumulation_dtype(*dtypes: jnp.dtype) -> jnp.dtype:
  """float64 if any of `dtypes` is, float32 for all others: what BNP keeps and computes in."""
  return jnp.dtype("float64" if "float64" in dtypes else "float32")


def layer_statistics(
  inputs: jax.Array,
  *,
  examples: int | jax.Array,
  rows: int,
  mask: jax.Array | None = None,
  stack: int = 0,
  axis_name: AxisName | None = None,
) -> LayerStatistics:
  """The statistics of one call of a layer.

  A convolution's mean and variance are taken over its whole input map (eqs. 21 and 22), whatever
  the number of its output positions; they are weighted by ``rows``, so that batches of different
  sizes add up as the rows of ``H`` do.

  Args:
    inputs: what the layer was given, ``[*leading, *stack, features]``; any real dtype.
    examples: how many of them the loss is a mean over.
    rows: the number of rows of ``H`` that they make, before masking.
    mask: True for the leading positions that count, ``[*leading]``; None for all.
    stack: the number of stack axes.
    axis_name: the mapped axes that the batch is split over; the sums are those of the whole.

  Returns:
    The sums, in float32, or float64 where the inputs are float64.
  """

  def whole(x: Any) -> Any:
    # A number, which is the same everywhere, is multiplied by the size of the axis, not sent.
    return x if axis_name is None else jax.lax.psum(x, axis_name)

  dtype = accumulation_dtype(inputs.dtype)
  h = jax.lax.stop_gradient(inputs).astype(dtype)
  leading = tuple(range(h.ndim - 1 - stack))
  weight = rows / max(1, math.prod(h.shape[: len(leading)]))
  counted = jnp.asarray(whole(rows), dtype)
  here = True
  if mask is not None:
    # where(), not a product: padding may hold anything, and 0 * NaN is NaN.
    here = jnp.expand_dims(mask, range(mask.ndim, h.ndim))
    h = jnp.where(here, h, 0)
    counted = whole(weight * jnp.sum(mask, dtype=dtype))
  # A part of a batch may be padding alone, and must not spoil the sum.
  rows_there = jnp.where(counted > 0, counted, 1)
  total = whole(weight * jnp.sum(h, leading))
  deviation = jnp.where(here, h - jnp.expand_dims(total / rows_there, leading), 0)
  shape = total.shape[:-1]
  return LayerStatistics(
    examples=jnp.broadcast_to(jnp.asarray(whole(examples), dtype), shape),
    rows=jnp.broadcast_to(counted, shape),
    total=total,
    within=whole(weight * jnp.sum(deviation * deviation, leading)),
    between=total * total / rows_there,
  )


def merge_calls(
  a: LayerStatistics | NoStatistics, b: LayerStatistics | NoStatistics
) -> LayerStatistics | NoStatistics:
  """The statistics of a layer called twice in a forward pass: more rows, the same examples."""
  if isinstance(a, NoStatistics) or isinstance(b, NoStatistics):
    return a if isinstance(a, NoStatistics) else b
  if a.layout != b.layout:
    return NoStatistics(a.kernel, TWO_MEANINGS)
  merged = jax.tree.map(jnp.add, a, b)
  return dataclasses.replace(merged, examples=jnp.maximum(a.examples, b.examples))


def merge_call_axes(a: LayerStatistics, axes: tuple[int, ...]) -> LayerStatistics:
  """The statistics of a layer called along axes of ``a``: more rows, the same examples."""
  if not axes:
    return a
  merged = jax.tree.map(lambda x: jnp.sum(x, axes), a)
  return dataclasses.replace(merged, examples=jnp.max(a.examples, axes))
