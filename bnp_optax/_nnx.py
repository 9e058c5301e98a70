"""The hooks of `flax.nnx`: every call of a linear layer reaches the active reporter.

NNX has no interceptors. While a context is open in any thread, the method of each linear layer's
class is replaced by a function that also reports the call to the context of its own thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
import contextlib
import contextvars
import dataclasses
import functools
import types
from typing import Any

from flax import nnx
import jax

from bnp_optax import _readers
from bnp_optax._calls import Call, Invocation, Reader
from bnp_optax._equations import Equation, check_registration, equation_reader, own_call
from bnp_optax._layout import KernelLayout
from bnp_optax._patching import Patches, Wrappers, activate
from bnp_optax._recurrence import enter_step, enter_whole, retrace, with_index
from bnp_optax._reporting import Reporter
from bnp_optax._taps import TapReporter


class Statistics(nnx.Variable[Any]):
  """Variable type of the statistics. Capture it with ``nnx.capture(model, Statistics)``."""


def _lora(invocation: Invocation) -> list[Call]:
  """Read LoRA as two consecutive linear maps."""
  layer, x = invocation.layer, invocation.inputs
  h, a = layer.promote_dtype((x, layer.lora_a[...]), dtype=layer.dtype)
  return [Call(KernelLayout(), x, kernel="lora_a"), Call(KernelLayout(), h @ a, kernel="lora_b")]


# The readers of each layer, by the class and the method that multiplies by its kernels.
_READERS: dict[tuple[type[nnx.Module], str], dict[str, Reader]] = {
  (layer, "__call__"): {"kernel": reader}
  for layer, reader in (
    (nnx.Linear, _readers.dense),
    (nnx.LinearGeneral, _readers.dense_general),
    (nnx.Einsum, _readers.einsum),
    (nnx.Conv, _readers.conv),
    (nnx.ConvTranspose, _readers.conv_transpose),
    (nnx.LoRA, _lora),
  )
}

# A function that reports a call of a module to the reporter of this thread, and the reporter.
_active: contextvars.ContextVar[Any] = contextvars.ContextVar("nnx", default=None)
_patches, _cell_patches = Patches(), Patches()


def register(
  layer_class: type[nnx.Module],
  equation: Equation,
  *,
  kernel: str = "kernel",
  bias: str | None = "bias",
  method: str = "__call__",
) -> None:
  """Register a class of linear layers that are not NNX's own.

  It is `bnp_optax.linen.register` for NNX, with the same arguments and errors. The parameters are
  attributes of the layer.

  Examples:
    >>> import bnp_optax, jax, jax.numpy as jnp
    >>> from flax import nnx
    >>> class Projection(nnx.Module):
    ...   def __init__(self, rngs):
    ...     self.weight = nnx.Param(jax.random.normal(rngs.params(), (3, 2)))
    ...   def __call__(self, x):
    ...     return x @ self.weight[...].T
    >>> bnp_optax.nnx.register(Projection, "...d,fd->...f", kernel="weight", bias=None)
    >>> layers = bnp_optax.nnx.layers(Projection(nnx.Rngs(0)), jnp.ones((4, 2)))
    >>> layers[("weight",)].feature, layers[("weight",)].output
    ((1,), (0,))
  """
  covered = [_READERS.get((base, method), ()) for base in layer_class.__mro__[1:]]
  check_registration(layer_class, equation, method, kernel, covered)
  readers = _READERS.setdefault((layer_class, method), {})
  readers[kernel] = equation_reader(equation, kernel, bias, _own_call)


def report(
  module: nnx.Module, kernel: str, inputs: jax.Array, equation: str, *, bias: str | None = None
) -> None:
  """Report a product of inputs and a kernel from inside a module of your own.

  It is `bnp_optax.linen.report` for NNX, with the same arguments and errors.
  """
  if (active := _active.get()) is not None:
    report_call, _ = active
    report_call(module, _own_call(module, kernel, inputs, equation, bias), None)


def _own_call(
  layer: nnx.Module, kernel: str, inputs: jax.Array, equation: str, bias: str | None
) -> Call:
  shapes = {k: x.shape for k, x in vars(layer).items() if isinstance(x, nnx.Param)}
  return own_call(type(layer).__name__, shapes, kernel, inputs, equation, bias)


def is_layer(module: nnx.Module) -> bool:
  """Return True for a module of a class whose calls are reported."""
  return isinstance(module, tuple(layer_class for layer_class, _ in _READERS))


def is_reporting() -> bool:
  """Return True within a context of `report_calls` in this thread."""
  return _active.get() is not None


@contextlib.contextmanager
def report_calls(reporter: Reporter | TapReporter) -> Iterator[None]:
  """Pass every call of a linear layer to ``reporter`` within this context."""
  owners: dict[int, tuple[Any, nnx.Module]] = {}
  outer = _active.get()
  if outer is not None and isinstance(outer[1], Reporter):
    reporter = outer[1].nested(reporter)

  def report(module: nnx.Module, call: Call, outputs: Any) -> Any:
    captures = getattr(module, "__captures__", ())
    if isinstance(reporter, Reporter) and not any(type(x) is Statistics for x in captures):
      return outputs  # Without a capture, sow would add a variable to the model.
    kernel = getattr(module, call.kernel)
    # A reference to the kernel keeps its id from being reused.
    _, owner = owners.setdefault(id(kernel), (kernel, module))
    if owner is not module:
      raise ValueError(
        f"Layer {describe(module, call)} shares its {call.kernel} with another module. Their "
        "statistics would be attributed to one of them: share the module instead of the Param."
      )
    problem = call.problem
    if _changes_value(kernel):
      problem = "its kernel is a function of its parameter, because the Param changes its value"
    call = dataclasses.replace(call, shape=kernel.shape, problem=problem)
    return reporter.report(module, Statistics, call, outputs)

  methods: Wrappers = {
    target: functools.partial(_reporting_method, readers=readers)
    for target, readers in _READERS.items()
  }
  methods[nnx.RNN, "__call__"] = _recurrent_method
  active = (report, reporter)
  with activate(_active, active, reporter.key), _patches.applied(methods), enter_whole():
    yield


def _changes_value(kernel: Any) -> bool:
  """Return True for a Variable whose value is a function of the array that it stores."""
  stored = kernel.get_raw_value() if isinstance(kernel, nnx.Variable) else None
  return isinstance(stored, jax.Array) and kernel.get_value() is not stored


def _reporting_method(
  original: Callable[..., Any], readers: Mapping[str, Reader]
) -> Callable[..., Any]:
  """Return a method that calls the original one and reports the call."""

  @functools.wraps(original)
  def call_and_report(self: nnx.Module, *args: Any, **kwargs: Any) -> Any:
    outputs = original(self, *args, **kwargs)
    if (active := _active.get()) is not None:
      report, reporter = active
      method, exact_windows = original.__get__(self), reporter.exact_windows
      invocation = Invocation(self, exact_windows, outputs, method, args, kwargs)
      for read in readers.values():
        for call in read(invocation):
          outputs = report(self, call, outputs)
    return outputs

  return call_and_report


def _cell_method(original: Callable[..., Any]) -> Callable[..., Any]:
  """Return the method of a cell that takes its inputs with the index of the step."""

  @functools.wraps(original)
  def call(self: Any, *args: Any, **kwargs: Any) -> Any:
    with enter_step(args) as args, retrace():
      return original(self, *args, **kwargs)

  return call


def _recurrent_method(original: Callable[..., Any]) -> Callable[..., Any]:
  """Return the method of a recurrent layer that also passes the index of each step to its cell."""

  @functools.wraps(original)
  def call(self: Any, *args: Any, **kwargs: Any) -> Any:
    if _active.get() is None:
      return original(self, *args, **kwargs)
    cell_class = next(x for x in type(self.cell).__mro__ if "__call__" in vars(x))
    # By default the statistics would be a part of the carry of the scan, whose structure is fixed.
    axes = nnx.StateAxes({Statistics: 0, **self.state_axes})
    layer = types.SimpleNamespace(**{**vars(self), "state_axes": axes})
    with _cell_patches.applied({(cell_class, "__call__"): _cell_method}):
      return with_index(original)(layer, *args, **kwargs)

  return call


def describe(module: nnx.Module, call: Call) -> str:
  """Return what errors call a layer. An NNX module has no path."""
  kernel: Any = getattr(module, call.kernel)
  return f"{type(module).__name__} with {call.kernel} of shape {kernel.shape}"
