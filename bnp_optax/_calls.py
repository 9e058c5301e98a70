"""One call of a linear layer, in the form that all layers share."""

import dataclasses

import jax
import jax.numpy as jnp

from bnp_optax._layout import KernelLayout
from bnp_optax._recurrence import leading_of_sequences

# The names under which layers sow begin with it.
PREFIX = "layer_statistics"


@dataclasses.dataclass(frozen=True)
class Call:
  """The inputs of one call of a layer, and the layout of the kernel that they are multiplied by.

  Attributes:
    layout: Layout of the kernel as the layer uses it.
    inputs: Inputs, ``[*leading, *stack, features]``. The examples lead.
    stack: Number of stack axes.
    rows: Number of rows of ``H``; None if it is the number of leading positions.
    kernel: Name of the kernel leaf.
    problem: Why BNP is not defined for this call, or empty.
    batched: False for a convolution of a single map, whose first axis is not an axis of examples.
    partial: Whether a transform may call the layer with a part of the batch.
    shape: Shape of the kernel parameter that `layout` refers to; empty if not yet known.
  """

  layout: KernelLayout
  inputs: jax.Array
  stack: int = 0
  rows: int | None = None
  kernel: str = "kernel"
  problem: str = ""
  batched: bool = True
  partial: bool = False
  shape: tuple[int, ...] = ()

  def __post_init__(self) -> None:
    """Refuse complex inputs."""
    if not self.problem and jnp.issubdtype(self.inputs.dtype, jnp.complexfloating):
      problem = f"BNP is defined for real inputs, found {self.inputs.dtype}"
      object.__setattr__(self, "problem", problem)

  def example_shape(self, example_axes: int) -> tuple[int, ...]:
    """Return the sizes of the axes that count examples, of ``example_axes`` in a batch."""
    leading = leading_of_sequences(self.leading)
    return leading[: max(0, example_axes - (not self.batched))]

  @property
  def leading(self) -> tuple[int, ...]:
    """Sizes of the axes that count examples and positions."""
    return self.inputs.shape[: self.inputs.ndim - 1 - self.stack]

  @property
  def statistics_name(self) -> str:
    """Name under which the statistics of this call are sown beside the kernel."""
    return PREFIX if self.kernel == "kernel" else f"{PREFIX}_{self.kernel}"
