"""The meaning of each kernel axis, and the canonical form that all layers share.

Every linear layer is a stack of linear maps, ``W[stack, window, feature, output]``:

===================  =========================  ======================  =======================
layer                stack                      window                  feature, output
===================  =========================  ======================  =======================
Dense                one                        one                     the kernel's axes 0, 1
Conv                 one                        the spatial axes        its last two axes
grouped Conv         the groups                 the spatial axes        its last two axes
DenseGeneral         the batch axes             one                     all input, all output axes
ConvLocal            the output positions       one                     its last two axes
any, under nn.scan   the scanned axis before    as above                as above
===================  =========================  ======================  =======================
"""

from collections.abc import Sequence
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

_ROLES = ("stack", "window", "feature", "output")


@dataclasses.dataclass(frozen=True)
class KernelLayout:
  """The role of each kernel axis: stack, window, feature or output.

  >>> import jax.numpy as jnp
  >>> from bnp_optax import KernelLayout
  >>> conv = KernelLayout.by_convention(4)
  >>> conv
  KernelLayout(stack=(), window=(0, 1), feature=(2,), output=(3,), groups=1, exact_windows=False, \
calls=(), bias='bias')
  >>> kernel, bias = conv.to_canonical(jnp.ones((3, 3, 16, 32)), jnp.ones(32))
  >>> kernel.shape, bias.shape
  ((1, 9, 16, 32), (1, 32))

  Attributes:
    stack: Axes along which independent linear maps lie. They lead in the bias and in the
      statistics too.
    window: Axes of a convolution's kernel positions.
    feature: Axes of the inputs of one linear map.
    output: Axes of its outputs.
    groups: Number of independent linear maps that the outputs are split into
      (``feature_group_count``).
    exact_windows: Whether each kernel entry has its own mean and variance (eqs. 19 and 20) instead
      of one for all positions of the window (eqs. 21 and 22).
    calls: Leading axes of the statistics, not of the kernel, along which the same kernel was
      called, for example by a scan over time. Their rows add; their examples are the same.
    bias: Name of the bias leaf beside the kernel. The layer may have none. Empty for a layer that
      never has one.

  Raises:
    ValueError: Unless each axis of the kernel has one role.
  """

  stack: tuple[int, ...] = ()
  window: tuple[int, ...] = ()
  feature: tuple[int, ...] = (0,)
  output: tuple[int, ...] = (1,)
  groups: int = 1
  exact_windows: bool = False
  calls: tuple[int, ...] = ()
  bias: str = "bias"

  def __post_init__(self) -> None:
    """Raise ValueError unless the roles hold each axis of a kernel once."""
    roles = {role: getattr(self, role) for role in _ROLES}
    axes = [axis for role in roles.values() if isinstance(role, tuple) for axis in role]
    if sorted(axes) != [*range(len(axes))] or not all(isinstance(x, tuple) for x in roles.values()):
      raise ValueError(
        "KernelLayout: stack, window, feature and output must be tuples that together hold each "
        f"axis of the kernel once, counted from 0, got {roles}."
      )

  @classmethod
  def by_convention(cls, ndim: int) -> "KernelLayout":
    """Return the layout of Flax's Dense and Conv: window first, features at -2, outputs at -1."""
    return cls(window=tuple(range(ndim - 2)), feature=(ndim - 2,), output=(ndim - 1,))

  def _sizes(self, shape: Sequence[int]) -> list[int]:
    roles = (self.stack, self.window, self.feature, self.output)
    return [math.prod(shape[axis] for axis in axes) for axes in roles]

  @property
  def _permutation(self) -> tuple[int, ...]:
    return self.stack + self.window + self.feature + self.output

  @property
  def ndim(self) -> int:
    """Number of axes of the kernel."""
    return len(self._permutation)

  def stacked(self, axes: Sequence[int]) -> "KernelLayout":
    """Return the layout after the insertion of stack axes, the outermost stack first.

    >>> from bnp_optax import KernelLayout
    >>> KernelLayout.by_convention(2).stacked([0]).stack
    (0,)

    Args:
      axes: Positions of the new axes in the kernel that has all of them.
    """
    rest = [axis for axis in range(self.ndim + len(axes)) if axis not in axes]
    moved = self._moved(rest)
    return dataclasses.replace(self, **{**moved, "stack": (*axes, *moved["stack"])})

  def moved(self, axes: Sequence[int]) -> "KernelLayout":
    """Return the layout after axis ``i`` of the kernel became ``axes[i]``.

    >>> from bnp_optax import KernelLayout
    >>> transposed = KernelLayout().moved([1, 0])
    >>> transposed.feature, transposed.output
    ((1,), (0,))

    Args:
      axes: New position of each axis.
    """
    return dataclasses.replace(self, **self._moved(axes))

  def _moved(self, axes: Sequence[int]) -> dict[str, Any]:
    return {role: tuple(axes[axis] for axis in getattr(self, role)) for role in _ROLES}

  def statistics_shape(self, kernel_shape: Sequence[int]) -> tuple[int, ...]:
    """Return the shape of the layer's mean and variance.

    It is ``[*stack, groups * features]``, or with `exact_windows`
    ``[*stack, groups * window * features]``.
    """
    _, window, features, _ = self._sizes(kernel_shape)
    per_group = (window if self.exact_windows else 1) * features
    return (*(kernel_shape[axis] for axis in self.stack), self.groups * per_group)

  def bias_shape(self, kernel_shape: Sequence[int]) -> tuple[int, ...]:
    """Return the shape of the layer's bias, ``[*stack, *output]``."""
    return tuple(kernel_shape[axis] for axis in self.stack + self.output)

  def to_canonical(
    self, kernel: jax.Array, bias: jax.Array | None
  ) -> tuple[jax.Array, jax.Array | None]:
    """View a kernel as ``[stack, window, feature, output]`` and a bias as ``[stack, output]``."""
    stack, window, feature, output = self._sizes(kernel.shape)
    shape = (stack, window, feature, self.groups, output // self.groups)
    kernel = kernel.transpose(self._permutation).reshape(shape)
    kernel = kernel.transpose(0, 3, 1, 2, 4).reshape(-1, window, feature, output // self.groups)
    if bias is not None:
      bias = bias.reshape(-1, output // self.groups)
    return kernel, bias

  def from_canonical(
    self, kernel: jax.Array, bias: jax.Array | None, kernel_shape: Sequence[int]
  ) -> tuple[jax.Array, jax.Array | None]:
    """Invert `to_canonical`."""
    stack, window, feature, output = self._sizes(kernel_shape)
    kernel = kernel.reshape(stack, self.groups, window, feature, output // self.groups)
    kernel = kernel.transpose(0, 2, 3, 1, 4).reshape([kernel_shape[i] for i in self._permutation])
    inverse = sorted(range(len(self._permutation)), key=self._permutation.__getitem__)
    if bias is not None:
      bias = bias.reshape(self.bias_shape(kernel_shape))
    return kernel.transpose(inverse), bias

  def window_size(self, kernel_shape: Sequence[int]) -> int:
    """Return the number of positions in the window, the paper's ``k**2``."""
    return self._sizes(kernel_shape)[1]

  def statistics_to_canonical(self, x: jax.Array, kernel_shape: Sequence[int]) -> jax.Array:
    """View a mean or variance as ``[stack, 1, feature]``, one for all positions of the window.

    With `exact_windows` the view is ``[stack, window, feature]``.
    """
    _, window, features, _ = self._sizes(kernel_shape)
    return x.reshape(-1, window if self.exact_windows else 1, features)

  def scalars_to_canonical(self, x: jax.Array) -> jax.Array:
    """View one number for each stack entry, ``[*stack, 1]``, as ``[stack, 1, 1]``."""
    return jnp.repeat(x.reshape(-1, 1, 1), self.groups, axis=0)
