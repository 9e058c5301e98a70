"""The hooks of `flax.linen`: every call of a linear layer reaches the active reporter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import functools
import inspect
from typing import Any

import flax.linen as nn
from flax.linen import recurrent
import jax
import jax.numpy as jnp

from bnp_optax import _readers
from bnp_optax._calls import Call, Invocation, Reader
from bnp_optax._equations import Equation, check_registration, equation_reader, own_call
from bnp_optax._lifting import COLLECTION, WRAPPERS, active, refer_to_parameter
from bnp_optax._patching import Patches, Wrappers, activate
from bnp_optax._recurrence import enter_step, enter_whole, with_index
from bnp_optax._reporting import Reporter
from bnp_optax._taps import TapReporter
from bnp_optax._trees import show_path

# The readers of each layer, by the method that multiplies by its kernels. A subclass that overrides
# the method is read where it calls the original one, and not read if it does not.
_READERS: dict[Callable[..., Any], dict[str, Reader]] = {
  inspect.unwrap(layer.__call__): {"kernel": reader}
  for layer, reader in (
    (nn.Dense, _readers.dense),
    (nn.DenseGeneral, _readers.dense_general),
    (nn.Einsum, _readers.einsum),
    (nn.Conv, _readers.conv),
    (nn.ConvLocal, _readers.conv),
    (nn.ConvTranspose, _readers.conv_transpose),
    # OptimizedLSTMCell passes its inputs to these modules and multiplies them itself.
    (recurrent.DenseParams, _readers.dense),
  )
}

# Wrappers of one layer, which replace its kernel by a function of its parameter.
_WRAPPERS = tuple(inspect.unwrap(layer.__call__) for layer in (nn.WeightNorm, nn.SpectralNorm))

_RNN = inspect.unwrap(nn.RNN.__call__)

_patches = Patches()


def register(
  layer_class: type[nn.Module],
  equation: Equation,
  *,
  kernel: str = "kernel",
  bias: str | None = "bias",
  method: str = "__call__",
) -> None:
  """Register a class of linear layers that are not Linen's own.

  From then on `sow_statistics` and `layers` cover it. The model needs no edit. An equation, as in
  `jax.numpy.einsum`, gives the axes of the product of inputs and kernel their meaning: an axis that
  only the inputs have is one of examples or positions, an axis that is summed is one of features,
  an axis of the kernel and the outputs is one of outputs, and an axis of all three is a stack of
  independent linear maps. A class with several kernels is registered once for each.

  Examples:
    >>> import bnp_optax, flax.linen as nn, jax, jax.numpy as jnp
    >>> class Projection(nn.Module):
    ...   features: int
    ...   @nn.compact
    ...   def __call__(self, x):
    ...     w = self.param("w", nn.initializers.lecun_normal(), (self.features, x.shape[-1]))
    ...     return x @ w.T + self.param("b", nn.initializers.zeros, (self.features,))
    >>> bnp_optax.linen.register(Projection, "...d,fd->...f", kernel="w", bias="b")
    >>> layers = bnp_optax.linen.layers(Projection(3), jnp.ones((4, 2)))
    >>> layers[("w",)].feature, layers[("w",)].output
    ((1,), (0,))

  Args:
    layer_class: The class. A subclass that overrides the method is covered where it calls the
      original one.
    equation: The equation of the inputs, which are the method's first argument, and the kernel. Or
      a function of the layer and the method's arguments that returns the inputs, as they are
      multiplied, and the equation.
    kernel: Name of the parameter that is the kernel.
    bias: Name of the parameter that is added to the product, of the shape of the stack and output
      axes; None without. A layer may lack it, for example with ``use_bias=False``.
    method: Name of the method that multiplies.

  Raises:
    ValueError: If the equation is not one of inputs and kernel, if the class does not define the
      method, or if its method calls one that reports the same kernel. While tracing a model, if a
      layer of the class has no such kernel, or if shapes do not fit the equation; the message names
      the layer.
  """
  bases = [vars(base).get(method) for base in layer_class.__mro__[1:]]
  covered = [_READERS.get(inspect.unwrap(base), ()) for base in bases if base]
  check_registration(layer_class, equation, method, kernel, covered)
  readers = _READERS.setdefault(inspect.unwrap(vars(layer_class)[method]), {})
  readers[kernel] = equation_reader(equation, kernel, bias, _own_call)


def report(
  module: nn.Module, kernel: str, inputs: jax.Array, equation: str, *, bias: str | None = None
) -> None:
  """Report a product of inputs and a kernel from inside a module of your own.

  Outside of `sow_statistics` and `layers` it does nothing.

  Examples:
    >>> import bnp_optax, flax.linen as nn, jax, jax.numpy as jnp
    >>> class Gated(nn.Module):
    ...   @nn.compact
    ...   def __call__(self, x):
    ...     gate = self.param("gate", nn.initializers.normal(), (2, 8))
    ...     down = self.param("down", nn.initializers.normal(), (8, 2))
    ...     bnp_optax.linen.report(self, "gate", x, "...d,df->...f")
    ...     h = nn.gelu(x @ gate)
    ...     bnp_optax.linen.report(self, "down", h, "...f,fd->...d")
    ...     return h @ down
    >>> list(bnp_optax.linen.layers(Gated(), jnp.ones((4, 2))))
    [('down',), ('gate',)]

  Args:
    module: The module that has the kernel among its parameters.
    kernel: As in `register`.
    inputs: The inputs that the kernel is multiplied by.
    equation: The equation of the product, as in `register`.
    bias: As in `register`.

  Raises:
    ValueError: While tracing, if the module has no such kernel, or if shapes do not fit the
      equation. The message names the layer.
  """
  if (reporter := active.get()) is not None:
    _report(reporter, module, _own_call(module, kernel, inputs, equation, bias), None)


def _own_call(
  layer: nn.Module, kernel: str, inputs: jax.Array, equation: str, bias: str | None
) -> Call:
  shapes = {name: jnp.shape(x) for name, x in _parameters(layer).items() if hasattr(x, "shape")}
  return own_call(show_path(layer.path), shapes, kernel, inputs, equation, bias)


def _parameters(layer: nn.Module) -> dict[str, Any]:
  return dict(nn.meta.unbox(layer.variables.get("params", {})))


def _report(reporter: Reporter | TapReporter, layer: nn.Module, call: Call, outputs: Any) -> Any:
  """Report a call and return its outputs."""
  parameters = _parameters(layer)
  problem = call.problem
  if type(layer).param is not nn.Module.param:
    problem = "its class overrides param(), so its kernel may be a function of its parameter"
  call = dataclasses.replace(call, shape=jnp.shape(parameters[call.kernel]), problem=problem)
  call = refer_to_parameter(call, (*layer.path, call.kernel), call.layout.bias in parameters)
  return reporter.report(layer, COLLECTION, call, outputs)


def is_sowing() -> bool:
  """Return True within a context of this thread whose layers sow: `sow_statistics` or `layers`."""
  return isinstance(active.get(), Reporter)


@contextlib.contextmanager
def report_calls(reporter: Reporter | TapReporter) -> Iterator[Reporter | TapReporter]:
  """Pass the calls of linear layers to a reporter: the outer one if it covers nested contexts."""
  if isinstance(outer := active.get(), Reporter):
    reporter = outer.nested(reporter)
  # An interceptor gets the inputs before the interceptors inside of it change them.
  hooks: Wrappers = {(nn.Module, "_call_wrapped_method"): _report_after, **WRAPPERS}
  with activate(active, reporter, reporter.key), _patches.applied(hooks), enter_whole():
    yield reporter


def _report_after(original: Callable[..., Any]) -> Callable[..., Any]:
  """Return a function that calls a method of a module and reports the call."""

  def call_wrapped_method(
    self: nn.Module, fun: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
  ) -> Any:
    reporter = active.get()
    with enter_step(args) as args:
      return original(self, fun if reporter is None else _with_report(fun, reporter), args, kwargs)

  return call_wrapped_method


def _with_report(fun: Any, reporter: Reporter | TapReporter) -> Any:
  """Return a method of a module that also reports the call, if it is that of a layer."""
  function = inspect.unwrap(fun)
  if function is _RNN:
    return with_index(fun)
  if function not in (*_READERS, *_WRAPPERS):
    return fun

  @functools.wraps(fun)
  def call_and_report(layer: Any, *args: Any, **kwargs: Any) -> Any:
    # Values sown while a wrapper maps the layer's variables are lost. The wrapper reports the
    # inputs in place of the layer.
    wraps_layer = function in _WRAPPERS
    inner = activate(active, None, reporter.key) if wraps_layer else contextlib.nullcontext()
    with inner:
      outputs = fun(layer, *args, **kwargs)
    read = function
    if wraps_layer:
      layer = layer.layer_instance
      read = inspect.unwrap(type(layer).__call__)
      kwargs = {name: value for name, value in kwargs.items() if name != "update_stats"}
    method, exact_windows = functools.partial(read, layer), reporter.exact_windows
    invocation = Invocation(layer, exact_windows, outputs, method, args, kwargs)
    for reader in _READERS.get(read, {}).values():
      for call in reader(invocation):
        outputs = _report(reporter, layer, call, outputs)
    return outputs

  return call_and_report
