"""How `flax.nnx` layers report what they saw.

NNX has no interceptors. While some `sow_statistics` is open, the functions that multiply with a
kernel are replaced on their classes by ones that ask whether this thread records; when the last one
closes they are put back. What is recorded comes out through `flax.nnx.capture`.
"""

from collections.abc import Callable, Hashable, Iterator
import contextlib
import contextvars
import threading
from typing import Any

from flax import nnx
import jax

from bnp_optax import _calls, _readers
from bnp_optax._calls import Call, call_statistics
from bnp_optax._layers import (
  Layers,
  make_layers,
  merge_observations,
  observe,
  split_arrays,
)
from bnp_optax._layout import KernelLayout
from bnp_optax._statistics import AxisName, LayerStatistics, NoStatistics, merge_calls


class Statistics(nnx.Variable[Any]):
  """The variable type of what layers saw: capture it with ``nnx.capture(model, Statistics)``."""


def _lora(layer: nnx.LoRA, outputs: Any, exact_windows: bool, x: jax.Array) -> list[Call]:
  """LoRA: two linear maps after each other."""
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

# What layers report to in this thread, and whether they report exact windows.
_reporter: contextvars.ContextVar[Any] = contextvars.ContextVar("nnx", default=None)

_lock = threading.Lock()
_originals: dict[type, Callable[..., Any]] = {}
_open = 0


@contextlib.contextmanager
def sow_statistics(
  *,
  example_axes: int = 1,
  mask: jax.typing.ArrayLike | None = None,
  axis_name: AxisName | None = None,
  exact_windows: bool = False,
) -> Iterator[None]:
  """Within this context, every linear layer sows what it sees as a `Statistics` variable.

  Those are Linear, LinearGeneral, Einsum, Conv, ConvTranspose and LoRA, and whatever is built of
  them: attention, recurrent cells. Each sows one `LayerStatistics` of its inputs; run the model
  through ``nnx.capture(model, Statistics)`` to get them. Outputs and gradients of the model stay
  the same, and so does the model. A layer called several times in one forward pass sees more rows.

  Enter it inside the function that is differentiated and jitted, around the call of the model. It
  is safe under threads: each records its own contexts alone.

  Under `flax.nnx.scan` and `flax.nnx.vmap`, `Statistics` go along axis 0, as parameters do by
  default; in a scan over time, where the parameters are the same at each step, and for
  `flax.nnx.RNN`, say so: ``nnx.StateAxes({Statistics: 0, ...: None})`` or ``nnx.Carry``.
  Under `jax.shard_map`, `jax.pmap` and `flax.nnx.vmap` over examples, name the axis that they map:
  with ``axis_name`` the statistics are those of all examples along it.

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
    example_axes: as in `bnp_optax.linen.sow_statistics`.
    mask: as in `bnp_optax.linen.sow_statistics`.
    axis_name: as in `bnp_optax.linen.sow_statistics`.
    exact_windows: as in `bnp_optax.linen.sow_statistics`.

  Yields:
    None.

  Raises:
    ValueError: while tracing, if a layer is called outside of ``nnx.capture(model, Statistics)``,
      or if its inputs have no rows. That they are complex, or do not fit `mask`, is an error of the
      optimizer that has use for the layer's statistics.
    NameError: while tracing, if there is no mapped axis of the name `axis_name`.
  """
  where = _calls.as_mask(mask)

  def see(module: nnx.Module, call: Call) -> LayerStatistics | NoStatistics:
    return call_statistics(call, _describe(module, call), example_axes, where, axis_name)

  key = (example_axes, axis_name, exact_windows, _calls.mask_key(where))
  with _reporting(see, merge_calls, exact_windows, key):
    yield


def layers(
  model: nnx.Module,
  *args: Any,
  strict: bool = False,
  exact_windows: bool = False,
  method: str = "__call__",
  **kwargs: Any,
) -> Layers:
  """Finds the linear layers of a model, by tracing it once with `flax.nnx.eval_shape`.

  It computes nothing, leaves the model as it is, and works for models of any size. Needed as
  ``layers`` of `bnp_optax.scale_by_bnp` and `bnp_optax.bnp` for whatever is no plain Linear or
  Conv: attention, LoRA, grouped and transposed convolutions, layers under `flax.nnx.scan` or
  `flax.nnx.vmap`.

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
    path             kind           shape  inputs  positions  preconditioned
    ----------------------------------------------------------------------------------------
    blocks/0/kernel  Linear         8x8    4x6x8           6  yes
    blocks/1/kernel  Linear         8x8    4x6x8           6  yes
    embed/embedding                 50x8                      passes through
    head/kernel      LinearGeneral  8x5x2  4x6x8           6  yes, without bias: not centred
    3 layers, 224 of 624 parameters

  Args:
    model: the model; one made by `flax.nnx.eval_shape` will do.
    *args: what the model is called with; `jax.ShapeDtypeStruct` will do for arrays.
    strict: whether to raise if there is a linear layer that BNP cannot precondition.
    exact_windows: as in `sow_statistics`.
    method: the name of the method to trace.
    **kwargs: what the model is called with by keyword.

  Returns:
    An immutable, hashable mapping from the path of each kernel to its layout. Printed, it is a
    table of all parameters.

  Raises:
    ValueError: if `strict` and a linear layer cannot be covered; it names each, and says why.
  """

  def see(module: nnx.Module, call: Call) -> Any:
    kernel: Any = getattr(module, call.kernel)
    return observe(call, type(module).__name__, kernel.shape)

  arrays, rebuild = split_arrays((args, kwargs))

  def trace(model: nnx.Module, arrays: list[Any]) -> Any:
    args, kwargs = rebuild(arrays)
    with _reporting(see, merge_observations, exact_windows, object()):
      return nnx.capture(getattr(model, method), Statistics)(*args, **kwargs)[1]

  seen = nnx.eval_shape(trace, model, arrays)
  return make_layers(nnx.state(model, nnx.Param), seen, {}, "", strict)


@contextlib.contextmanager
def _reporting(
  see: Callable[[nnx.Module, Call], Any],
  merge: Callable[[Any, Any], Any],
  exact_windows: bool,
  key: Hashable,
) -> Iterator[None]:
  """Within this context, ``see(module, call)`` is sown beside each linear layer that is called."""
  owners: dict[int, tuple[Any, nnx.Module]] = {}

  def report(module: nnx.Module, call: Call) -> None:
    kernel = getattr(module, call.kernel)
    # The kernel is kept beside its owner, so that its id is nobody else's.
    _, owner = owners.setdefault(id(kernel), (kernel, module))
    if owner is not module:
      raise ValueError(
        f"Layer {_describe(module, call)} shares its {call.kernel} with another module, and what "
        "the two see would be taken for one's alone: share the module instead of the Param."
      )
    if not any(type(captured) is Statistics for captured in getattr(module, "__captures__", ())):
      raise ValueError(
        f"Layer {_describe(module, call)} is called within sow_statistics, but nobody captures "
        "what it sees: call the model through nnx.capture(model, bnp_optax.nnx.Statistics), and "
        "models that are not trained outside of the context."
      )
    if (seen := see(module, call)) is not None:
      _calls.sow(module, Statistics, call, seen, merge)

  with _calls.recording(_reporter, (report, exact_windows), key), _patched():
    yield


@contextlib.contextmanager
def _patched() -> Iterator[None]:
  """Within this context, of however many threads, the layers' classes report their calls."""
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
  """The function of a class that calls the original one and reports the call."""

  def call_and_report(self: nnx.Module, *args: Any, **kwargs: Any) -> Any:
    outputs = original(self, *args, **kwargs)
    if (reporter := _reporter.get()) is not None:
      report, exact_windows = reporter
      method = original.__get__(self)
      for call in _readers.read(reader, self, exact_windows, outputs, method, args, kwargs):
        report(self, call)
    return outputs

  return call_and_report


def _describe(module: nnx.Module, call: Call) -> str:
  """What errors call a layer; it does not know its path."""
  kernel: Any = getattr(module, call.kernel)
  return f"{type(module).__name__} with {call.kernel} of shape {kernel.shape}"
