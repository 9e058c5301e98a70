"""The steps of recurrent layers: which positions of the sequences each call of a cell gets.

`flax.linen.RNN` and `flax.nnx.RNN` call their cell with inputs that lack the axis of time. While a
reporter is active, they transpose, reverse and scan over an index together with the inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
import contextlib
import contextvars
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from bnp_optax._patching import activate


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sequences:
  """The inputs of a recurrent layer, or those of one step, with the index of each position."""

  inputs: jax.Array  # [*batch, time, *features], as the layer transposes them, or without time.
  index: jax.Array  # Index along the time, [*batch, time], transposed like the inputs.
  leading: tuple[int, ...] = dataclasses.field(metadata={"static": True})  # (*batch, time)
  time_major: bool = dataclasses.field(metadata={"static": True})

  # What the recurrent layers read of their inputs.
  ndim = property(lambda self: self.inputs.ndim)
  shape = property(lambda self: self.inputs.shape)


# The steps and parts of a batch that a layer is called with in this context, the innermost last.
# None is a part whose place in the batch is unknown.
_steps: contextvars.ContextVar[tuple[Sequences | None, ...]] = contextvars.ContextVar(
  "steps", default=()
)


def with_index(call: Callable[..., Any]) -> Callable[..., Any]:
  """Return the method of a recurrent layer that gives its cell `Sequences` as inputs."""

  @functools.wraps(call)
  def call_with_index(layer: Any, inputs: jax.Array, **options: Any) -> Any:
    time_major = options.get("time_major")
    time_major = layer.time_major if time_major is None else time_major
    leading = inputs.shape[: inputs.ndim - layer.cell.num_feature_axes]
    leading = (*leading[1:], leading[0]) if time_major else leading
    index = jnp.broadcast_to(jnp.arange(leading[-1]), leading)
    index = jnp.moveaxis(index, -1, 0) if time_major else index
    return call(layer, Sequences(inputs, index, leading, time_major), **options)

  return call_with_index


@contextlib.contextmanager
def enter_step(args: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
  """Yield the arguments of a cell with plain inputs, within the context of the step they have."""
  found = tuple(x for x in args if isinstance(x, Sequences))
  if not found:
    yield args
    return
  steps = _steps.get()
  # The loop of the recurrent layer is a part that is known now.
  steps = (*(steps[:-1] if steps and steps[-1] is None else steps), *found)
  with activate(_steps, steps, tuple(x and (x.leading, x.index.ndim) for x in steps)):
    yield tuple(x.inputs if isinstance(x, Sequences) else x for x in args)


def enter_part() -> contextlib.AbstractContextManager[None]:
  """Return a context in which layers get a part of the batch."""
  return activate(_steps, (*_steps.get(), None), "part")


def enter_whole() -> contextlib.AbstractContextManager[None]:
  """Return a context in which masks are those of a layer's inputs, whatever loops are around it."""
  return activate(_steps, (), "whole")


def retrace() -> contextlib.AbstractContextManager[None]:
  """Return a context in which functions are traced anew, with the index of this step."""
  return activate(_steps, _steps.get(), object() if _steps.get() else None)


def _known() -> tuple[Sequences, ...]:
  """Return the steps inside of the innermost part whose place is unknown."""
  known: tuple[Sequences, ...] = ()
  for step in _steps.get():
    known = (*known, step) if step else ()
  return known


def is_part() -> bool:
  """Return True if layers are called with a part of the batch whose place is unknown."""
  return None in _steps.get()


def time_on_first_axis() -> int | None:
  """Return the number of steps of the loop if the time is the first axis of its inputs."""
  return next((step.leading[-1] for step in _known() if step.time_major), None)


def leading_of_sequences(leading: tuple[int, ...]) -> tuple[int, ...] | None:
  """Return the leading shape over all steps from that of a layer's inputs in one step.

  It is None if the inputs do not begin with the batch of the step.
  """
  for step in reversed(_known()):
    if leading[: step.index.ndim] != step.index.shape:
      return None
    leading = (*step.leading, *leading[step.index.ndim :])
  return leading


def mask_of_step(mask: jax.Array) -> jax.Array:
  """Return the part of a mask of whole sequences that belongs to this step."""
  for step in _known():
    axis = step.index.ndim
    index = jnp.expand_dims(step.index, range(axis, mask.ndim))
    mask = jnp.squeeze(jnp.take_along_axis(mask, index, axis, mode="clip"), axis)
  return mask
