"""How the layers of a framework report their calls.

A `Reporter` defines what each layer sows beside its kernel. While a reporter is active in a context
variable, the framework's hooks (see `linen` and `nnx`) pass it every call of a linear layer.
"""

from __future__ import annotations

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

from bnp_optax._calls import Call
from bnp_optax._statistics import (
  AxisName,
  LayerStatistics,
  Mask,
  NoStatistics,
  layer_statistics,
  merge_two_calls,
)

# Part of the key of every cache of traced functions. A function that was traced without statistics,
# or with other ones, is traced again.
_cache_key = jax.make_user_context()


@dataclasses.dataclass(frozen=True)
class Reporter:
  """What the layers of a model sow for each call, and how the values of several calls merge.

  Attributes:
    record: Maps a module and its call to the value to sow; None to sow nothing.
    merge: Merges the values of two calls of one layer.
    exact_windows: Whether the rows of a convolution are its windows.
    key: Functions traced under an equal key are reused. The default is equal to no other.
  """

  record: Callable[[Any, Call], Any]
  merge: Callable[[Any, Any], Any]
  exact_windows: bool
  key: Hashable = dataclasses.field(default_factory=object)

  def report(self, module: Any, collection: Any, call: Call, outputs: Any) -> Any:
    """Sow the record of a call beside its kernel, merged with those of earlier calls.

    Returns:
      The outputs of the layer, unchanged.
    """
    value = self.record(module, call)
    if value is not None:
      module.sow(
        collection,
        call.statistics_name,
        value,
        init_fn=lambda: None,
        reduce_fn=lambda old, new: new if old is None else self.merge(old, new),
      )
    return outputs


@contextlib.contextmanager
def activate(variable: contextvars.ContextVar[Any], value: Any, key: Hashable) -> Iterator[None]:
  """Set a context variable within this context and thread.

  Args:
    variable: The variable that the hooks of one framework read. The innermost context wins.
    value: Its value.
    key: Functions traced under an equal key are reused.
  """
  token = variable.set(value)
  try:
    with _cache_key(key):
      yield
  finally:
    variable.reset(token)


def statistics_reporter(
  describe: Callable[[Any, Call], str],
  examples: int | jax.Array | None,
  example_axes: int,
  mask: Mask,
  axis_name: AxisName | None,
  exact_windows: bool,
) -> Reporter:
  """Return the reporter of `LayerStatistics`.

  Args:
    describe: Returns the name of the layer of a call in errors.
    examples: Number of examples of every layer; None to count them along each layer's axes.
    example_axes: Number of leading axes that count examples.
    mask: Nonzero for the leading positions that count; None for all.
    axis_name: Mapped axes that the batch is split over; None if it is whole.
    exact_windows: As in `Reporter`.
  """
  present = None if mask is None else jnp.asarray(mask).astype(bool)
  counted: dict[int, str] = {}

  def record(module: Any, call: Call) -> LayerStatistics | NoStatistics:
    name = describe(module, call)
    statistics = call_statistics(call, name, examples, example_axes, present, axis_name)
    if examples is None and isinstance(statistics, LayerStatistics):
      counted.setdefault(math.prod(call.example_shape(example_axes)), name)
      if len(counted) > 1:
        layers = " and ".join(f"{n} in layer {name}" for n, name in counted.items())
        raise ValueError(
          f"The layers disagree about the number of examples: {layers}. Pass the number that the "
          "loss divides by as sow_statistics(examples=...)."
        )
    return statistics

  key = (_array_key(examples), example_axes, axis_name, exact_windows, _array_key(present))
  return Reporter(record, merge_two_calls, exact_windows, key)


def _array_key(x: int | jax.Array | None) -> Hashable:
  """Return a hashable cache key for an array, which is a constant of what is traced under it."""
  if x is None:
    return None
  return object() if isinstance(x, Tracer) else (np.shape(x), np.asarray(x).tobytes())


def call_statistics(
  call: Call,
  name: str,
  examples: int | jax.Array | None,
  example_axes: int,
  mask: jax.Array | None,
  axis_name: AxisName | None,
) -> LayerStatistics | NoStatistics:
  """Compute the statistics of one call of the layer called ``name``.

  Raises:
    ValueError: While tracing, if there are no rows.
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
  if examples is None:
    examples = math.prod(example_shape)
    if mask is not None:
      # An example counts if any of its positions does.
      counts = jnp.any(mask, tuple(range(len(example_shape), mask.ndim)))
      examples = examples // counts.size * jnp.sum(counts)
  if mask is not None:
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
