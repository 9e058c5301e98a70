"""Statistics of one layer's inputs over a batch, as sums.

Statistics of disjoint sets of examples, such as micro-batches or the parts of devices, add:
`jax.tree.map(jnp.add, a, b)`, `jax.lax.psum` and Optax's micro-batching merge them. With
`axis_name`, devices compute the mean of the whole batch before they take squares, which saves the
transfer of one vector.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from bnp_optax._layout import KernelLayout

# The name of a mapped axis, or the names of several.
AxisName = str | tuple[str, ...]
Mask = jax.typing.ArrayLike | None  # Nonzero for the positions that count.

TWO_MEANINGS = "it is called with two different meanings of its kernel's axes"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerStatistics:
  r"""Statistics of one layer's inputs: counts, and the sums behind their mean and variance.

  A layer computes :math:`\hat H \hat w` where each row of :math:`\hat H = [e, H]` holds the inputs
  of one output position of one example (paper, eqs. 11 and 18). With :math:`h` running over those
  rows, and :math:`\bar h_b` the mean of the batch :math:`b` that a row belongs to, the sums are

  .. math::
    \text{total} = \sum h, \qquad
    \text{within} = \sum (h - \bar h_b)^2, \qquad
    \text{between} = \sum_b \text{total}_b^2 / \text{rows}_b .

  All five fields add over batches. ``within + between`` is the plain sum of squares. It is kept in
  two parts because :math:`E[h^2] - E[h]^2` cancels: in float32 it loses the variance of inputs
  whose mean is about a thousand deviations away from zero. ``within`` does not.

  Two batches are merged by adding every field:

  >>> import jax, jax.numpy as jnp
  >>> from bnp_optax import layer_statistics
  >>> a = layer_statistics(jnp.array([[1.0], [2.0]]), examples=2, rows=2)
  >>> b = layer_statistics(jnp.array([[6.0], [7.0]]), examples=2, rows=2)
  >>> both = jax.tree.map(jnp.add, a, b)
  >>> both.mean, both.variance
  (Array([4.], dtype=float32), Array([6.5], dtype=float32))

  Attributes:
    examples: Number of examples that the loss is a mean over, the paper's :math:`N`. Shape
      ``[*stack]``.
    rows: Number of rows of :math:`H`, examples times output positions. Shape ``[*stack]``.
    total: Sum of the inputs. Shape ``[*stack, features]``.
    within: Sum of squares about each batch's own mean. Shape ``[*stack, features]``.
    between: Sum of each batch's ``total**2 / rows``. Shape ``[*stack, features]``.
    kernel: Name of the kernel leaf that the statistics belong to. Static.
    layout: Layout of the kernel as the layer reported it; None if unknown. Static.

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
    # A single batch has no spread between batches. The remainder is rounding, and the rounding of
    # a large mean must not count as variance.
    rounding = 4 * jnp.finfo(spread.dtype).eps * self.between
    return (self.within + jnp.where(spread <= rounding, 0, spread)) / self.rows[..., None]

  @property
  def mean_square(self) -> jax.Array:
    r"""The second moment :math:`E[h^2]`, ``[*stack, features]``."""
    return (self.within + self.between) / self.rows[..., None]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NoStatistics:
  """Placeholder sown by a layer whose statistics are undefined, with the reason. It has no leaves.

  It is an error only for an optimizer that needs the layer's statistics.
  """

  kernel: str = dataclasses.field(metadata={"static": True})
  reason: str = dataclasses.field(metadata={"static": True})


# What a layer sows.
Sown = LayerStatistics | NoStatistics


def accumulation_dtype(*dtypes: jnp.dtype) -> jnp.dtype:
  """Return the dtype of BNP's state and arithmetic: float64 if any of `dtypes` is, else float32."""
  return jnp.dtype("float64" if "float64" in dtypes else "float32")


def layer_statistics(
  inputs: jax.Array,
  *,
  examples: int | jax.Array,
  rows: int,
  mask: Mask = None,
  stack: int = 0,
  axis_name: AxisName | None = None,
  kernel: str = "kernel",
) -> LayerStatistics:
  """Compute the statistics of one call of a layer.

  A convolution's mean and variance are taken over its whole input map (eqs. 21 and 22), whatever
  its number of output positions. They are weighted by ``rows``, so that batches of different sizes
  add up as the rows of ``H`` do.

  Examples:
    >>> import jax.numpy as jnp
    >>> from bnp_optax import layer_statistics
    >>> statistics = layer_statistics(jnp.array([[1.0, 5.0], [3.0, 5.0]]), examples=2, rows=2)
    >>> statistics.mean, statistics.variance
    (Array([2., 5.], dtype=float32), Array([1., 0.], dtype=float32))

  Args:
    inputs: Inputs of the layer, ``[*leading, *stack, features]``; any real dtype.
    examples: Number of examples that the loss is a mean over.
    rows: Number of rows of ``H`` that the inputs make, before masking.
    mask: Nonzero for the leading positions that count, ``[*leading]``; None for all.
    stack: Number of stack axes.
    axis_name: Mapped axes that the batch is split over. The sums are taken over all of it.
    kernel: Name of the kernel leaf that the statistics belong to.

  Returns:
    The sums, in float32, or float64 where the inputs are float64.

  Raises:
    ValueError: While tracing, if the shape of the mask is not the leading shape of the inputs.
  """

  def sum_over_devices(x: Any) -> Any:
    # psum of a Python number is a product with the axis size and needs no communication.
    return x if axis_name is None else jax.lax.psum(x, axis_name)

  dtype = accumulation_dtype(inputs.dtype)
  h = inputs.astype(dtype)
  leading = tuple(range(h.ndim - 1 - stack))
  # Not max(): the size of a batch that is symbolic cannot be compared with 1.
  weight = rows / (math.prod(h.shape[: len(leading)]) or 1)
  counted = jnp.asarray(sum_over_devices(rows), dtype)
  present = True
  if mask is not None:
    mask = jnp.asarray(mask).astype(bool)
    if mask.shape != h.shape[: len(leading)]:
      raise ValueError(
        f"layer_statistics: the mask has shape {mask.shape}, and the inputs of shape {h.shape} "
        f"have the leading shape {h.shape[: len(leading)]}. Broadcast the mask to it."
      )
    # where(), not a product: padding may hold anything, and 0 * NaN is NaN.
    present = jnp.expand_dims(mask, range(mask.ndim, h.ndim))
    h = jnp.where(present, h, 0)
    counted = sum_over_devices(weight * jnp.sum(mask, dtype=dtype))
  # A part of a batch may be all padding and must not make the sum NaN.
  divisor = jnp.where(counted > 0, counted, 1)
  total = sum_over_devices(weight * jnp.sum(h, leading))
  deviation = jnp.where(present, h - jnp.expand_dims(total / divisor, leading), 0)
  shape = total.shape[:-1]
  return LayerStatistics(
    examples=jnp.broadcast_to(jnp.asarray(sum_over_devices(examples), dtype), shape),
    rows=jnp.broadcast_to(counted, shape),
    total=total,
    within=sum_over_devices(weight * jnp.sum(deviation * deviation, leading)),
    between=total * total / divisor,
    kernel=kernel,
  )


def merge_calls(*stats: Any) -> Any:
  """Merge the statistics of several calls of a model on the same examples.

  Rows add, and the number of examples is the largest one. (The statistics of different examples,
  such as micro-batches, are added with ``jax.tree.map(jnp.add, a, b)`` instead.)

  Examples:
    >>> import bnp_optax, flax.linen as nn, jax, jax.numpy as jnp
    >>> model, x = nn.Dense(3), jnp.ones((4, 3))
    >>> params = model.init(jax.random.key(0), x)
    >>> def call(x, _=None):
    ...   with bnp_optax.linen.sow_statistics():
    ...     y, aux = model.apply(params, x, mutable=["intermediates"])
    ...   return y, aux["intermediates"]
    >>> y, first = call(x)
    >>> _, second = call(y)
    >>> both = bnp_optax.merge_calls(first, second)["layer_statistics"]
    >>> print(both.rows, both.examples)
    8.0 4.0

    The iterations of a loop:

    >>> _, stacked = jax.lax.scan(call, x, length=5)
    >>> all_calls = bnp_optax.merge_calls(stacked)["layer_statistics"]
    >>> print(all_calls.rows, all_calls.examples)
    20.0 4.0

  Args:
    *stats: Trees of `LayerStatistics` with the same structure, or a single one whose arrays have
      the calls along a leading axis, before the stack of layers under `nn.scan` or `nn.vmap`.

  Returns:
    A tree of the same structure.

  Raises:
    ValueError: If nothing is given, if the trees have different structures, or if a single one has
      no axis of calls.
  """
  if not stats:
    raise ValueError("merge_calls: give the statistics of at least one call.")

  def is_leaf(x: Any) -> bool:
    return isinstance(x, Sown)

  def merge(*calls: Any) -> Any:
    if len(calls) == 1 and isinstance(call := calls[0], LayerStatistics):
      if call.examples.ndim <= (len(call.layout.stack) if call.layout else 0):
        raise ValueError(
          "merge_calls: a single tree must have the calls along the leading axis of its arrays, as "
          f"jax.lax.scan returns them. Those of {call.kernel} are {call.total.shape}."
        )
      return merge_call_axes(call, (0,))
    return functools.reduce(merge_two_calls, calls) if is_leaf(calls[0]) else calls[-1]

  structures = [jax.tree.structure(tree, is_leaf=is_leaf) for tree in stats]
  if any(structure != structures[0] for structure in structures):
    raise ValueError(f"merge_calls: the calls have statistics of different layers: {structures}.")

  return jax.tree.map(merge, *stats, is_leaf=is_leaf)


def merge_two_calls(a: Sown, b: Sown) -> Sown:
  """Merge two calls of a layer in one forward pass: rows add, examples are the same."""
  if isinstance(a, NoStatistics) or isinstance(b, NoStatistics):
    return a if isinstance(a, NoStatistics) else b
  if a.layout != b.layout:
    return NoStatistics(a.kernel, TWO_MEANINGS)
  merged = jax.tree.map(jnp.add, a, b)
  return dataclasses.replace(merged, examples=jnp.maximum(a.examples, b.examples))


def merge_call_axes(a: LayerStatistics, axes: tuple[int, ...]) -> LayerStatistics:
  """Merge the calls of a layer along axes of ``a``: rows add, examples are the same."""
  if not axes:
    return a
  merged = jax.tree.map(lambda x: jnp.sum(x, axes), a)
  return dataclasses.replace(merged, examples=jnp.max(a.examples, axes))


def leave_transform(a: Sown, axis: int | None) -> Sown:
  """Return the statistics of a whole kernel, as `Reporter.leave` does."""
  if isinstance(a, NoStatistics):
    return a
  if axis is None:
    return merge_call_axes(a, (0,))
  return dataclasses.replace(a, layout=a.layout and a.layout.stacked((axis % (a.layout.ndim + 1),)))
