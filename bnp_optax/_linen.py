"""The hooks of `flax.linen`: every call of a linear layer reaches the active reporter.

Linen calls every method of every module through its interceptors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
import contextlib
import contextvars
import functools
import inspect
from typing import Any

import flax.linen as nn
from flax.linen import recurrent

from bnp_optax import _readers
from bnp_optax._reporting import Reporter, activate
from bnp_optax._taps import TapReporter

# The reader of each layer, by the method that multiplies by its kernel. A subclass that overrides
# the method is read where it calls the original one, and not read if it does not.
_READERS = {
  inspect.unwrap(layer.__call__): reader
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

_active: contextvars.ContextVar[Reporter | TapReporter | None] = contextvars.ContextVar(
  "linen", default=None
)


@contextlib.contextmanager
def report_calls(reporter: Reporter | TapReporter) -> Iterator[None]:
  """Pass every call of a linear layer to ``reporter`` within this context."""

  def interceptor(
    next_fun: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    context: nn.module.InterceptorContext,
  ) -> Any:
    function: Any = getattr(context.orig_method, "func", None)
    if _active.get() is not reporter or function not in (*_READERS, *_WRAPPERS):
      return next_fun(*args, **kwargs)
    module: Any = context.module
    if function in _WRAPPERS:
      # Values sown while the wrapper maps the layer's variables are lost. The wrapper reports the
      # inputs in place of the layer.
      with activate(_active, None, reporter.key):
        outputs = next_fun(*args, **kwargs)
      module = module.layer_instance
      function = inspect.unwrap(type(module).__call__)
      kwargs = {name: value for name, value in kwargs.items() if name != "update_stats"}
    else:
      outputs = next_fun(*args, **kwargs)
    if reader := _READERS.get(function):
      method = functools.partial(function, module)
      exact_windows = reporter.exact_windows
      for call in _readers.read(reader, module, exact_windows, outputs, method, args, kwargs):
        outputs = reporter.report(module, "intermediates", call, outputs)
    return outputs

  with activate(_active, reporter, reporter.key), nn.intercept_methods(interceptor):
    yield
