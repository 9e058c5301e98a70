"""Linear layers by equation: which axes of a kernel are stack, feature and output.

An equation of `jax.numpy.einsum` of the inputs and the kernel defines them: axes of the inputs
alone are rows, axes of all three operands are a stack, axes that are summed are features.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
import inspect
import re

import jax
import jax.numpy as jnp

from bnp_optax._calls import Call, Invocation, Reader
from bnp_optax._layout import KernelLayout

# An equation, or a function of a layer and the arguments of its call that returns the inputs and
# the equation.
Equation = str | Callable[..., tuple[jax.Array, str]]


def check_equation(equation: str) -> None:
  """Raise ValueError if an equation is not one of inputs and kernel."""
  letters = r"[^\W_]*(\.\.\.)?[^\W_]*"
  if not re.fullmatch(f"{letters},{letters}->{letters}", equation.replace(" ", "")):
    raise ValueError(
      f"The equation {equation!r} must be that of inputs and kernel, as in '...d,df->...f'."
    )


def check_registration(
  layer_class: type,
  equation: Equation,
  method: str,
  kernel: str,
  covered: Iterable[Collection[str]],
) -> None:
  """Raise ValueError if the calls of a class cannot be read by an equation, or would count twice.

  ``covered`` holds the kernels that the methods of its base classes report.
  """
  if isinstance(equation, str):
    check_equation(equation)
  if method not in vars(layer_class):
    raise ValueError(
      f"{layer_class.__name__} does not define {method}: register the class that defines it."
    )
  code = getattr(inspect.unwrap(vars(layer_class)[method]), "__code__", None)
  names = {*code.co_names} if code else set()
  if {"super", method} <= names and any(kernel in kernels for kernels in covered):
    raise ValueError(
      f"{layer_class.__name__}: its {method} calls that of a base class, which reports {kernel} "
      "already. Its rows would count twice: do not register it."
    )


def equation_call(
  equation: str,
  inputs: jax.Array,
  shape: tuple[int, ...] = (),
  kernel: str = "kernel",
  bias: str | None = "bias",
) -> Call:
  """Return the call of a layer that computes ``einsum(equation, inputs, kernel)`` plus a bias.

  The bias is ``[*stack, *output]``. Without a shape of the kernel, the layer itself checks that the
  equation fits; otherwise, one that does not fit is a ValueError.
  """
  check_equation(equation)
  equation = equation.replace(" ", "")
  operands, result = equation.split("->")
  given, weights = operands.split(",")
  spare = [c for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if c not in equation]
  ellipsis = "".join(spare[: max(0, inputs.ndim - len(given.replace("...", "")))])
  given, result = given.replace("...", ellipsis), result.replace("...", ellipsis)
  problem = ""
  if "..." in weights:
    problem = "the kernel has an ellipsis"
  elif any(len(set(x)) < len(x) for x in (given, weights, result)):
    problem = "an axis appears twice in one operand"
  elif shape and not _fit((given, inputs.shape), (weights, shape)):
    raise ValueError(
      f"the equation {equation!r} does not fit inputs of shape {inputs.shape} and a kernel of "
      f"shape {shape}"
    )
  elif alone := [c for c in weights if c not in given + result]:
    problem = f"the kernel's axis {alone[0]!r} is summed alone, so its rows are not defined"
  elif new := [c for c in result if c not in given + weights]:
    problem = f"the output's axis {new[0]!r} is in neither operand"
  leading = [c for c in given if c in result and c not in weights]
  stack = [c for c in result if c in given and c in weights]
  feature = [c for c in weights if c not in result]
  output = [c for c in result if c in weights and c not in given]
  if bias is not None and [c for c in result if c in weights] != stack + output:
    problem = problem or "an output axis stands before a batch axis of the kernel"
  if problem:
    return Call(KernelLayout(), inputs, kernel=kernel, problem=f"in {equation!r} {problem}")
  # A sum over an axis of the inputs alone commutes with the product.
  h = jnp.einsum(f"{given}->{''.join(leading + stack + feature)}", inputs)
  h = h.reshape(*h.shape[: len(leading) + len(stack)], -1)
  axes = [tuple(map(weights.index, letters)) for letters in (stack, feature, output)]
  layout = KernelLayout(axes[0], (), axes[1], axes[2], bias=bias or "")
  return Call(layout, h, stack=len(stack), kernel=kernel)


def _fit(*operands: tuple[str, tuple[int, ...]]) -> bool:
  """Return whether operands, each of letters and a shape, have one size for each letter."""
  sizes: dict[str, int] = {}
  return all(
    len(letters) == len(shape)
    and all(sizes.setdefault(c, n) == n for c, n in zip(letters, shape, strict=True))
    for letters, shape in operands
  )


def own_call(
  layer: str,
  shapes: Mapping[str, tuple[int, ...]],
  kernel: str,
  inputs: jax.Array,
  equation: str,
  bias: str | None,
) -> Call:
  """Return the call of a layer whose class is not Flax's own, from the shapes of its parameters.

  It raises ValueError if there is no such kernel, or if shapes do not fit the equation.
  """
  if kernel not in shapes:
    names = ", ".join(shapes) or "none"
    raise ValueError(f"Layer {layer} has no parameter {kernel!r}: its parameters are {names}.")
  try:
    call = equation_call(equation, jnp.asarray(inputs), shapes[kernel], kernel, bias)
  except ValueError as error:
    raise ValueError(f"Layer {layer}, parameter {kernel}: {error}") from None
  if not call.problem and bias is not None and bias in shapes:
    expected = call.layout.bias_shape(shapes[kernel])
    if shapes[bias] != expected:
      raise ValueError(
        f"Layer {layer}: the bias {bias} has shape {shapes[bias]}, but the equation {equation!r} "
        f"with {kernel} of shape {shapes[kernel]} requires {expected}."
      )
  return call


def equation_reader(
  equation: Equation, kernel: str, bias: str | None, call: Callable[..., Call]
) -> Reader:
  """Return a reader whose calls are ``call(layer, kernel, inputs, equation, bias)``."""

  def read(invocation: Invocation) -> list[Call]:
    layer = invocation.layer
    if callable(equation):
      inputs, given = equation(layer, *invocation.args, **invocation.kwargs)
    else:
      inputs, given = invocation.inputs, equation
    return [call(layer, kernel, inputs, given, bias)]

  return read
