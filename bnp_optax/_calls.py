"""One call of a linear layer, in the form that all layers share."""

from collections.abc import Callable, Mapping
import dataclasses
import inspect
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bnp_optax._layout import KernelLayout
from bnp_optax._recurrence import leading_of_sequences

PREFIX = "layer_statistics"  # The names under which layers sow begin with it.


@dataclasses.dataclass(frozen=True)
class Call:
  """The inputs of one call of a layer, and the layout of the kernel that they are multiplied by."""

  layout: KernelLayout  # As the layer uses the kernel.
  inputs: jax.Array  # [*leading, *stack, features]. The examples lead.
  stack: int = 0  # Number of stack axes.
  rows: int | None = None  # Number of rows of H; None if it is that of leading positions.
  kernel: str = "kernel"  # Name of the kernel leaf.
  problem: str = ""  # Why BNP is not defined for this call, or empty.
  batched: bool = True  # False for a convolution of a single map, without an axis of examples.
  shape: tuple[int, ...] = ()  # That of the parameter that the layout refers to; empty if unknown.

  def __post_init__(self) -> None:
    """Refuse complex inputs."""
    if not self.problem and jnp.issubdtype(self.inputs.dtype, jnp.complexfloating):
      problem = f"BNP is defined for real inputs, found {self.inputs.dtype}"
      object.__setattr__(self, "problem", problem)

  def example_shape(self, example_axes: int) -> tuple[int, ...]:
    """Return the sizes of the axes that count examples, of ``example_axes`` in a batch."""
    leading = leading_of_sequences(self.leading) or self.leading
    return leading[: max(0, example_axes - (not self.batched))]

  @property
  def leading(self) -> tuple[int, ...]:
    """Sizes of the axes that count examples and positions."""
    return self.inputs.shape[: self.inputs.ndim - 1 - self.stack]

  @property
  def statistics_name(self) -> str:
    """Name under which the statistics of this call are sown beside the kernel."""
    return PREFIX if self.kernel == "kernel" else f"{PREFIX}_{self.kernel}"


class Invocation(NamedTuple):
  """``outputs = method(*args, **kwargs)`` of a layer, which a reader reads as calls."""

  layer: Any
  exact_windows: bool
  outputs: Any
  method: Callable[..., Any]
  args: tuple[Any, ...]
  kwargs: Mapping[str, Any]

  @property
  def arguments(self) -> dict[str, Any]:
    """The arguments by name."""
    return inspect.signature(self.method).bind(*self.args, **self.kwargs).arguments

  @property
  def inputs(self) -> jax.Array:
    """The first argument."""
    return jnp.asarray(next(iter(self.arguments.values())))


Reader = Callable[[Invocation], list[Call]]  # Returns the calls of a layer, one for each kernel.
