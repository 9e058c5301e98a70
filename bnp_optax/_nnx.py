"""The hooks of `flax.nnx`: every call of a linear layer reaches the active reporter.

NNX has no interceptors. While a context is open in any thread, the ``__call__`` of each linear
layer's class is replaced by a function that also reports the call to the context of its own thread.
The originals are restored when the last context closes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
import contextlib
import contextvars
import threading
from typing import Any

from flax import nnx
import jax

from bnp_optax import _readers
from bnp_optax._calls import Call
from bnp_optax._layout import KernelLayout
from bnp_optax._reporting import Reporter, activate
from bnp_optax._taps import TapReporter


class Statistics(nnx.Variable[Any]):
  """Variable type of the statistics. Capture it with ``nnx.capture(model, Statistics)``."""


def _lora(layer: nnx.LoRA, outputs: Any, exact_windows: bool, x: jax.Array) -> list[Call]:
  """Read LoRA as two consecutive linear maps."""
  del outputs, exact_windows
  h, a = layer.promote_dtype((x, layer.lora_a[...]), dtype=layer.dtype)
  return [
    Call(KernelLayout(), x, kernel="lora_a"),
    Call(KernelLayout(), h @ a, kernel="lora_b"),
  ]


_READERS: dict[type[nnx.Module], Callable[..., list[Call]]] = {
  nnx.Linear: _readers.dense,
  nnx.LinearGeneral: _readers.dense_general,
  nnx.Einsum: _readers.einsum,
  nnx.Conv: _readers.conv,
  nnx.ConvTranspose: _readers.conv_transpose,
  nnx.LoRA: _lora,
}

# A function that reports a call of a module to the reporter of this thread, and the reporter.
_active: contextvars.ContextVar[Any] = contextvars.ContextVar("nnx", default=None)

_lock = threading.Lock()
_originals: dict[type, Callable[..., Any]] = {}
_open = 0


def is_reporting() -> bool:
  """Return True within a context of `report_calls` in this thread."""
  return _active.get() is not None


@contextlib.contextmanager
def report_calls(reporter: Reporter | TapReporter) -> Iterator[None]:
  """Pass every call of a linear layer to ``reporter`` within this context."""
  owners: dict[int, tuple[Any, nnx.Module]] = {}

  def report(module: nnx.Module, call: Call, outputs: Any) -> Any:
    kernel = getattr(module, call.kernel)
    # A reference to the kernel keeps its id from being reused.
    _, owner = owners.setdefault(id(kernel), (kernel, module))
    if owner is not module:
      raise ValueError(
        f"Layer {describe(module, call)} shares its {call.kernel} with another module. Their "
        "statistics would be attributed to one of them: share the module instead of the Param."
      )
    captures = getattr(module, "__captures__", ())
    if isinstance(reporter, Reporter) and not any(type(x) is Statistics for x in captures):
      raise ValueError(
        f"Layer {describe(module, call)} is called within sow_statistics, but its statistics are "
        "not captured: call the model through nnx.capture(model, bnp_optax.nnx.Statistics), and "
        "call models that are not trained outside of the context."
      )
    return reporter.report(module, Statistics, call, outputs)

  with activate(_active, (report, reporter), reporter.key), _patched():
    yield


@contextlib.contextmanager
def _patched() -> Iterator[None]:
  """Make the layers' classes report their calls while any thread is within this context."""
  global _open
  with _lock:
    if _open == 0:
      for layer, reader in _READERS.items():
        _originals[layer] = layer.__dict__["__call__"]
        layer.__call__ = _reporting_call(_originals[layer], reader)  # pyright: ignore[reportAttributeAccessIssue]
    _open += 1
  try:
    yield
  finally:
    with _lock:
      _open -= 1
      if _open == 0:
        for layer in _READERS:
          layer.__call__ = _originals.pop(layer)  # pyright: ignore[reportAttributeAccessIssue]


def _reporting_call(
  original: Callable[..., Any], reader: Callable[..., list[Call]]
) -> Callable[..., Any]:
  """Return a ``__call__`` that calls the original one and reports the call."""

  def call_and_report(self: nnx.Module, *args: Any, **kwargs: Any) -> Any:
    outputs = original(self, *args, **kwargs)
    if (active := _active.get()) is not None:
      report, reporter = active
      method, exact_windows = original.__get__(self), reporter.exact_windows
      for call in _readers.read(reader, self, exact_windows, outputs, method, args, kwargs):
        outputs = report(self, call, outputs)
    return outputs

  return call_and_report


def describe(module: nnx.Module, call: Call) -> str:
  """Return what errors call a layer. An NNX module has no path."""
  kernel: Any = getattr(module, call.kernel)
  return f"{type(module).__name__} with {call.kernel} of shape {kernel.shape}"
