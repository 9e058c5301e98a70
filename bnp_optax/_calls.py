"""One call of a linear layer, in the one form that all layers share, and how it is reported."""

from collections.abc import Callable, Hashable, Iterator
import contextlib
import contextvars
import dataclasses
import math
from typing import Any

import jax
from jax.core import Tracer
import jax.numpy as jnp
import numpy as np

from bnp_optax._layout import KernelLayout
from bnp_optax._statistics import AxisName, LayerStatistics, NoStatistics, layer_statistics

# Part of the key of every cache of traced functions: what was traced without statistics, or with
# other ones, must be traced anew.
_cache_key = jax.make_user_context()


@contextlib.contextmanager
def recording(reporter: contextvars.ContextVar[Any], value: Any, key: Hashable) -> Iterator[None]:
  """Within this context and thread, the variable ``reporter`` has a value.

  Args:
    reporter: what the layers of one framework report to; the innermost context has its way.
    value: its value.
    key: functions traced under an equal key need not be traced again.
  """
  token = reporter.set(value)
  try:
    with _cache_key(key):
      yield
  finally:
    reporter.reset(token)


def as_mask(mask: jax.typing.ArrayLike | None) -> jax.Array | None:
  """A mask as booleans."""
  return None if mask is None else jnp.asarray(mask).astype(bool)


def mask_key(mask: jax.Array | None) -> Hashable:
  """What tells a mask from others: it is a constant of what is traced under it."""
  if mask is None:
    return None
  return object() if isinstance(mask, Tracer) else (mask.shape, np.asarray(mask).tobytes())


def sow(
  module: Any, collection: Any, call: "Call", seen: Any, merge: Callable[[Any, Any], Any]
) -> None:
  """Sows what was seen of a call beside its kernel, merged with what was sown there before."""
  module.sow(
    collection,
    statistics_name(call.kernel),
    seen,
    init_fn=lambda: None,
    reduce_fn=lambda old, new: new if old is None else merge(old, new),
  )


def statistics_name(kernel: str) -> str:
  """The name under which what a layer saw is sown beside its kernel."""
  return "layer_statistics" if kernel == "kernel" else f"layer_statistics_{kernel}"


@dataclasses.dataclass(frozen=True)
class Call:
  """What a layer was given, and the layout of the kernel that it was multiplied by.

  Attributes:
    layout: which axes of the kernel are what, as the layer itself sees it.
    inputs: the inputs as rows, ``[*leading, *stack, features]``; examples lead.
    stack: the number of stack axes.
    rows: the number of rows of ``H``; None if it is the number of leading positions.
    kernel: the name of the kernel's leaf.
    problem: why BNP is not defined for this call, or empty.
    batched: False for the map of a convolution alone: its first axis counts no examples.
  """

  layout: KernelLayout
  inputs: jax.Array
  stack: int = 0
  rows: int | None = None
  kernel: str = "kernel"
  problem: str = ""
  batched: bool = True

  def example_shape(self, example_axes: int) -> tuple[int, ...]:
    """The sizes of the leading axes that count examples, of ``example_axes`` in a batch."""
    return self.leading[: max(0, example_axes - (not self.batched))]

  @property
  def leading(self) -> tuple[int, ...]:
    """The sizes of the axes that count examples and positions."""
    return self.inputs.shape[: self.inputs.ndim - 1 - self.stack]


def call_statistics(
  call: Call,
  name: str,
  example_axes: int,
  mask: jax.Array | None,
  axis_name: AxisName | None,
) -> LayerStatistics | NoStatistics:
  """The statistics of one call of the layer called ``name``.

  Args:
    call: the call.
    name: what errors call the layer.
    example_axes: how many leading axes count examples.
    mask: True for the leading positions that count; None for all.
    axis_name: the mapped axes that the batch is split over; None if it is whole.

  Returns:
    The statistics, with the kernel's name and layout; or why there are none.

  Raises:
    ValueError: while tracing, if there are no rows.
  """
  if call.problem:
    return NoStatistics(call.kernel, call.problem)
  inputs, leading = call.inputs, call.leading
  example_shape = call.example_shape(example_axes)
  if inputs.size == 0:
    raise ValueError(f"Layer {name}: no rows in its inputs of shape {inputs.shape}: empty batch?")
  if mask is not None and leading[: mask.ndim] != mask.shape:
    if len(leading) > len(example_shape):
      return NoStatistics(
        call.kernel,
        f"the mask of shape {mask.shape} does not fit its inputs of shape {inputs.shape}: it must "
        "be the leading shape of the inputs",
      )
    mask = None
  examples: int | jax.Array = math.prod(example_shape)
  if mask is not None:
    # An example counts if any of its positions does.
    there = jnp.any(mask, tuple(range(len(example_shape), mask.ndim)))
    examples = examples // there.size * jnp.sum(there)
    mask = jnp.broadcast_to(jnp.expand_dims(mask, range(mask.ndim, len(leading))), leading)
  statistics = layer_statistics(
    inputs,
    examples=examples,
    rows=math.prod(leading) if call.rows is None else call.rows,
    mask=mask,
    stack=call.stack,
    axis_name=axis_name,
  )
  return dataclasses.replace(statistics, kernel=call.kernel, layout=call.layout)
