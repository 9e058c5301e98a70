"""The steps of recurrent layers: which positions of the sequences each call of a cell gets.

`flax.linen.RNN` and `flax.nnx.RNN` call their cell in a loop, with inputs that lack the axis of
time. While a reporter is active, an index goes through the loop with the inputs, which the layer
transposes, reverses and scans over as it does with the inputs.
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
  """The inputs of a recurrent layer, or those of one step, with their index.

  Attributes:
    inputs: ``[*batch, time, *features]``, or as the layer transposes them; without time in a step.
    index: Index along the time of each position, ``[*batch, time]``, transposed like the inputs.
    leading: Sizes of all positions, ``(*batch, time)``.
  """

  inputs: jax.Array
  index: jax.Array
  leading: tuple[int, ...] = dataclasses.field(metadata={"static": True})

  # What the recurrent layers read of their inputs.
  ndim = property(lambda self: self.inputs.ndim)
  shape = property(lambda self: self.inputs.shape)


_steps: contextvars.ContextVar[tuple[Sequences, ...]] = contextvars.ContextVar("steps", default=())


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
    return call(layer, Sequences(inputs, index, leading), **options)

  return call_with_index


@contextlib.contextmanager
def enter_step(args: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
  """Yield the arguments of a cell with plain inputs, within the context of the step they have."""
  steps = tuple(x for x in args if isinstance(x, Sequences))
  # The index is a constant of whatever is traced within: the key is equal to no other.
  inner = activate(_steps, (*_steps.get(), *steps), object()) if steps else contextlib.nullcontext()
  with inner:
    yield tuple(x.inputs if isinstance(x, Sequences) else x for x in args)


def count_loops() -> int:
  """Return the number of recurrent layers whose cell is being called."""
  return len(_steps.get())


def leading_of_sequences(leading: tuple[int, ...]) -> tuple[int, ...]:
  """Return the leading shape over all steps from that of the inputs in one step."""
  for step in reversed(_steps.get()):
    leading = (*step.leading, *leading[step.index.ndim :])
  return leading


def mask_of_step(mask: jax.Array) -> jax.Array:
  """Return the part of a mask of whole sequences that belongs to this step."""
  for step in _steps.get():
    axis = step.index.ndim
    index = jnp.expand_dims(step.index, range(axis, mask.ndim))
    mask = jnp.squeeze(jnp.take_along_axis(mask, index, axis, mode="clip"), axis)
  return mask
