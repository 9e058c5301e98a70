"""BNP for `flax.nnx`: the statistics of each layer's inputs, and the table of a model.

NNX has no interceptors. While a `sow_statistics` context is open in any thread, the ``__call__`` of
each linear layer's class is replaced by a function that also reports the call to the context of its
own thread. The originals are restored when the last context closes. The statistics are returned by
`flax.nnx.capture`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
import contextlib
import contextvars
import threading
from typing import Any

from flax import nnx
import jax

from bnp_optax import _readers
from bnp_optax._calls import Call
from bnp_optax._layers import Layers
from bnp_optax._layout import KernelLayout
from bnp_optax._observations import Observation, Owner, make_layers, merge_observed, observe_call
from bnp_optax._reporting import Masks, Reporter, activate, statistics_reporter, with_axes
from bnp_optax._statistics import AxisName, Mask
from bnp_optax._trees import split_arrays

__all__ = ["Statistics", "layers", "sow_statistics"]


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

_NORMS = (nnx.BatchNorm, nnx.GroupNorm, nnx.InstanceNorm, nnx.LayerNorm, nnx.RMSNorm)

# A function that reports a call of a module to the reporter of this thread, and the reporter.
_active: contextvars.ContextVar[Any] = contextvars.ContextVar("nnx", default=None)

_lock = threading.Lock()
_originals: dict[type, Callable[..., Any]] = {}
_open = 0


@contextlib.contextmanager
def sow_statistics(
  *,
  examples: int | jax.Array | None = None,
  example_axes: int = 1,
  mask: Mask = None,
  axis_name: AxisName | None = None,
  exact_windows: bool = False,
) -> Iterator[None]:
  """Sow the statistics of every linear layer's inputs as `Statistics` within this context.

  The linear layers are Linear, LinearGeneral, Einsum, Conv, ConvTranspose and LoRA, and the modules
  built from them, such as attention and recurrent cells. Each sows one `LayerStatistics` of its
  inputs. Run the model through ``nnx.capture(model, Statistics)`` to get them. The model, its
  outputs and its gradients stay the same. Several calls of a layer in one forward pass add rows.

  Enter it inside the function that is differentiated and jitted, around the call of the model. It
  is thread-safe: a context records the calls of its own thread.

  Under `flax.nnx.scan` and `flax.nnx.vmap`, `Statistics` are stacked along axis 0, as parameters
  are by default. In a scan over time and in `flax.nnx.RNN` the parameters are the same at each
  step: pass ``nnx.StateAxes({Statistics: 0, ...: None})`` or ``nnx.Carry``. Under `jax.shard_map`,
  `jax.pmap` and `flax.nnx.vmap` over examples, pass the mapped axis as ``axis_name``; the
  statistics are then those of all examples along it.

  Examples:
    >>> import bnp_optax, jax, jax.numpy as jnp, optax
    >>> from flax import nnx
    >>> model = nnx.Linear(5, 1, rngs=nnx.Rngs(0))
    >>> optimizer = nnx.Optimizer(model, bnp_optax.bnp(optax.sgd(0.3)), wrt=nnx.Param)
    >>> x = jax.random.uniform(jax.random.key(0), (8, 5))
    >>> def loss_fn(model):
    ...   with bnp_optax.nnx.sow_statistics():
    ...     y, stats = nnx.capture(model, bnp_optax.nnx.Statistics)(x)
    ...   return jnp.mean((y - 2.0) ** 2), stats
    >>> @nnx.jit
    ... def step(model, optimizer):
    ...   (loss, stats), grads = nnx.value_and_grad(loss_fn, has_aux=True)(model)
    ...   optimizer.update(model, grads, stats=stats)
    ...   return loss
    >>> for _ in range(100):
    ...   loss = step(model, optimizer)
    >>> bool(loss < 1e-2)
    True

    The statistics of single examples, mapped by `flax.nnx.vmap`:

    >>> def call_one(model, x):
    ...   with bnp_optax.nnx.sow_statistics(example_axes=0, axis_name="batch"):
    ...     return nnx.capture(model, bnp_optax.nnx.Statistics)(x)
    >>> call = nnx.vmap(call_one, in_axes=(None, 0), out_axes=(0, None), axis_name="batch")
    >>> y, stats = call(model, x)
    >>> stats["layer_statistics"].get_value().examples
    Array(8., dtype=float32)

  Args:
    examples: As in `bnp_optax.linen.sow_statistics`.
    example_axes: As in `bnp_optax.linen.sow_statistics`.
    mask: As in `bnp_optax.linen.sow_statistics`, but not a mapping: an NNX module has no path. Call
      a part of the model that has another mask within its own context, inside the model.
    axis_name: As in `bnp_optax.linen.sow_statistics`.
    exact_windows: As in `bnp_optax.linen.sow_statistics`.

  Yields:
    None.

  Raises:
    ValueError: While tracing, if a layer is called outside of ``nnx.capture(model, Statistics)``,
      if its inputs have no rows or do not fit `mask`, or if layers disagree about the number of
      examples. Inputs that are complex are an error in ``update`` of an optimizer that needs the
      layer's statistics.
    NameError: While tracing, if there is no mapped axis of the name `axis_name`.
  """
  if isinstance(mask, Mapping):
    raise ValueError(
      "mask= is a mapping, but an NNX module has no path that a prefix could match. Call each part "
      "of the model within its own sow_statistics(mask=...) context, inside the model."
    )

  options = (examples, example_axes, Masks(mask), axis_name, exact_windows)
  with report_calls(statistics_reporter(lambda *call: (_describe(*call),), *options)):
    yield


def layers(
  model: nnx.Module,
  *args: Any,
  strict: bool = False,
  ignore: Collection[str] = (),
  axis_name: AxisName | None = None,
  exact_windows: bool = False,
  method: str = "__call__",
  **kwargs: Any,
) -> Layers:
  """Find the linear layers of a model by tracing it once with `flax.nnx.eval_shape`.

  The trace computes nothing, does not change the model, and works for models of any size. Pass the
  result as ``layers`` to `bnp_optax.scale_by_bnp` or `bnp_optax.bnp` if the model has layers other
  than plain Linear and Conv: attention, LoRA, grouped and transposed convolutions, layers under
  `flax.nnx.scan` or `flax.nnx.vmap`.

  Examples:
    >>> import bnp_optax, jax, jax.numpy as jnp
    >>> from flax import nnx
    >>> class Model(nnx.Module):
    ...   def __init__(self, rngs):
    ...     self.embed = nnx.Embed(50, 8, rngs=rngs)
    ...     self.blocks = nnx.List([nnx.Linear(8, 8, rngs=rngs) for _ in range(2)])
    ...     self.head = nnx.LinearGeneral(8, (5, 2), use_bias=False, rngs=rngs)
    ...   def __call__(self, tokens):
    ...     x = self.embed(tokens)
    ...     for block in self.blocks:
    ...       x = nnx.relu(block(x))
    ...     return self.head(x)
    >>> tokens = jax.ShapeDtypeStruct((4, 6), jnp.int32)
    >>> print(bnp_optax.nnx.layers(Model(nnx.Rngs(0)), tokens))
    path             kind           shape  inputs  calls  positions  preconditioned
    -----------------------------------------------------------------------------------------------
    blocks/0/kernel  Linear         8x8    4x6x8       1          6  yes
    blocks/1/kernel  Linear         8x8    4x6x8       1          6  yes
    embed/embedding  Embed          50x8                             passes through
    head/kernel      LinearGeneral  8x5x2  4x6x8       1          6  yes, without bias: not centred
    3 layers, 224 of 624 parameters (35.9%)

  Args:
    model: The model; it may be the result of `flax.nnx.eval_shape`.
    *args: Arguments of the model; arrays may be `jax.ShapeDtypeStruct`.
    strict: As in `bnp_optax.linen.layers`.
    ignore: As in `bnp_optax.linen.layers`.
    axis_name: As in `bnp_optax.linen.layers`.
    exact_windows: As in `sow_statistics`.
    method: Name of the method to trace.
    **kwargs: Keyword arguments of the model.

  Returns:
    An immutable, hashable mapping from the path of each kernel to its layout. Printed, it is a
    table of all parameters.

  Raises:
    ValueError: In the cases of `bnp_optax.linen.layers`.
  """

  def record(module: nnx.Module, call: Call) -> Observation:
    kernel: Any = getattr(module, call.kernel)
    return observe_call(call, type(module).__name__, kernel.shape)

  arrays, rebuild = split_arrays((args, kwargs))

  # nnx.eval_shape would read the sharding of what was sown.
  graph, state = nnx.split(model)

  def trace(state: Any, arrays: list[Any]) -> Any:
    model, (args, kwargs) = nnx.merge(graph, state), rebuild(arrays)
    with report_calls(Reporter(record, merge_observed, exact_windows, covers_nested=True)):
      return nnx.capture(getattr(model, method), Statistics)(*args, **kwargs)[1]

  observations = jax.eval_shape(with_axes(trace, axis_name), state, arrays)
  owners = {
    tuple(map(str, (*path, name))): Owner.of(module, name, x.ndim, nnx.Embed, _NORMS)
    for path, module in nnx.iter_graph(model)
    if isinstance(module, nnx.Module)
    for name, x in vars(module).items()
    if isinstance(x, nnx.Param)
  }
  return make_layers(nnx.state(model, nnx.Param), observations, {}, owners, "", strict, ignore)


@contextlib.contextmanager
def report_calls(reporter: Reporter) -> Iterator[None]:
  """Pass every call of a linear layer to ``reporter`` within this context. Not public."""
  owners: dict[int, tuple[Any, nnx.Module]] = {}
  if (outer := _active.get()) is not None:
    reporter = outer[1].nested(reporter)

  def report(module: nnx.Module, call: Call) -> None:
    kernel = getattr(module, call.kernel)
    # A reference to the kernel keeps its id from being reused.
    _, owner = owners.setdefault(id(kernel), (kernel, module))
    if owner is not module:
      raise ValueError(
        f"Layer {_describe(module, call)} shares its {call.kernel} with another module. Their "
        "statistics would be attributed to one of them: share the module instead of the Param."
      )
    if not any(type(captured) is Statistics for captured in getattr(module, "__captures__", ())):
      raise ValueError(
        f"Layer {_describe(module, call)} is called within sow_statistics, but its statistics are "
        "not captured: call the model through nnx.capture(model, bnp_optax.nnx.Statistics), and "
        "call models that are not trained outside of the context."
      )
    reporter.sow(module, Statistics, call)

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
        report(self, call)
    return outputs

  return call_and_report


def _describe(module: nnx.Module, call: Call) -> str:
  """Return what errors call a layer. An NNX module has no path."""
  kernel: Any = getattr(module, call.kernel)
  return f"{type(module).__name__} with {call.kernel} of shape {kernel.shape}"
