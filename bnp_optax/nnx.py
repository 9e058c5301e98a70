"""BNP for `flax.nnx`: the statistics of each layer's inputs, and the table of a model.

Within `sow_statistics`, each layer sows the statistics of its inputs; `flax.nnx.capture` returns
them. The model, its outputs and its gradients do not change.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
import contextlib
from typing import Any

from flax import nnx
import jax

from bnp_optax._calls import Call
from bnp_optax._layers import Layers
from bnp_optax._nnx import Statistics, describe, register, report, report_calls
from bnp_optax._nnx_taps import Tap, Tapped, remove_taps
from bnp_optax._observations import Observation, Owner, make_layers, merge_observed, observe_call
from bnp_optax._reporting import Exclude, MaskFn, Masks, Reporter, eval_shape, statistics_reporter
from bnp_optax._statistics import AxisName, Mask
from bnp_optax._trees import split_arrays

__all__ = [
  "Statistics",
  "Tap",
  "Tapped",
  "layers",
  "register",
  "remove_taps",
  "report",
  "sow_statistics",
]

_NORMS = (nnx.BatchNorm, nnx.GroupNorm, nnx.InstanceNorm, nnx.LayerNorm, nnx.RMSNorm)
# The classes of which a parameter of this name is not the kernel of a linear layer.
_OTHERS = {"embedding": nnx.Embed, "scale": _NORMS, "bias": _NORMS}


@contextlib.contextmanager
def sow_statistics(
  *,
  examples: int | jax.Array | None = None,
  example_axes: int = 1,
  mask: Mask | MaskFn = None,
  axis_name: AxisName | None = None,
  exact_windows: bool = False,
  exclude: Exclude | None = None,
) -> Iterator[None]:
  """Sow the statistics of every linear layer's inputs as `Statistics` within this context.

  The linear layers are Linear, LinearGeneral, Einsum, Conv, ConvTranspose and LoRA, and the modules
  built from them, such as attention and recurrent cells. Each sows one `LayerStatistics` of its
  inputs, and ``nnx.capture(model, Statistics)`` returns them. Outside of a capture nothing is sown.
  The model, its outputs and its gradients stay the same. Several calls of a layer add rows.

  Enter it inside the function that is differentiated and jitted, around the call of the model. It
  is thread-safe: a context records the calls of its own thread.

  Under `flax.nnx.scan` and `flax.nnx.vmap`, `Statistics` are stacked along axis 0, as parameters
  are by default. In a scan over time of your own, the parameters are the same at each step: pass
  ``nnx.StateAxes({Statistics: 0, ...: nnx.Carry})`` as its axis of the module. Under
  `jax.shard_map`, `jax.pmap` and `flax.nnx.vmap` over examples, pass ``axis_name``; the
  statistics are then those of all examples along it, and ``out_axes=(0, None)`` returns them once.

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

  Args:
    examples: As in `bnp_optax.linen.sow_statistics`.
    example_axes: As in `bnp_optax.linen.sow_statistics`.
    mask: As in `bnp_optax.linen.sow_statistics`, or, in place of a mapping, a function of a layer
      and the inputs of one call, ``[*leading, *stack, features]``, that returns the layer's mask or
      None, as in ``mask=lambda layer, x: source if layer is model.attention.key else target``.
      Outside of `jax.jit`, JAX compiles a program for each context with a function.
    axis_name: As in `bnp_optax.linen.sow_statistics`.
    exact_windows: As in `bnp_optax.linen.sow_statistics`.
    exclude: As in `bnp_optax.linen.sow_statistics`, for example
      ``exclude=lambda layer, x: layer is model.head and x.ndim == 4``.

  Yields:
    None.

  Raises:
    ValueError: If `mask` is a mapping, or if `examples` or `example_axes` is out of range. While
      tracing, if a layer's inputs have no rows or do not fit `mask`, or if layers of one context
      disagree about the number of examples. Inputs that are complex are an error in ``update``.
    NameError: While tracing, if there is no mapped axis of the name `axis_name`.
  """
  if isinstance(mask, Mapping):
    raise ValueError(
      "mask= is a mapping, but an NNX module has no path that a prefix could match. Pass a "
      "function, as in mask=lambda layer, x: mask if layer is model.encoder else None."
    )
  options = (examples, example_axes, Masks(mask), axis_name, exact_windows, exclude)
  with report_calls(statistics_reporter(lambda *call: (describe(*call),), *options)):
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
    >>> rngs = nnx.Rngs(0)
    >>> hidden, head = nnx.Linear(8, 8, rngs=rngs), nnx.Linear(8, 2, use_bias=False, rngs=rngs)
    >>> model = nnx.Sequential(nnx.Embed(50, 8, rngs=rngs), hidden, head)
    >>> print(bnp_optax.nnx.layers(model, jax.ShapeDtypeStruct((4, 6), jnp.int32)))
    path                kind    shape  inputs  calls  positions  preconditioned
    -------------------------------------------------------------------------------------------
    layers/0/embedding  Embed   50x8                             passes through
    layers/1/kernel     Linear  8x8    4x6x8       1          6  yes
    layers/2/kernel     Linear  8x2    4x6x8       1          6  yes, without bias: not centred
    2 layers, 88 of 488 parameters (18.0%)

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
  arrays, rebuild = split_arrays((args, kwargs))

  # nnx.eval_shape would read the sharding of what was sown.
  graph, state = nnx.split(model)

  def record(module: nnx.Module, call: Call) -> Observation | None:
    # A kernel that is an array, or another kind of Variable, is frozen.
    trained = isinstance(getattr(module, call.kernel), nnx.Param)
    return observe_call(module, call) if trained else None

  def trace(state: Any, arrays: list[Any]) -> Any:
    model, (args, kwargs) = nnx.merge(graph, state), rebuild(arrays)
    with report_calls(Reporter(record, merge_observed, exact_windows, covers_nested=True)):
      # Not capture(model.method): of a jitted method, the first argument would be the model.
      return nnx.capture(lambda m: getattr(m, method)(*args, **kwargs), Statistics)(model)[1]

  observations = eval_shape(trace, axis_name, state, arrays)
  owners = {
    tuple(map(str, (*path, name))): Owner.of(module, name, x.ndim, _OTHERS)
    for path, module in nnx.iter_graph(model)
    if isinstance(module, nnx.Module)
    for name, x in vars(module).items()
    if isinstance(x, nnx.Param)
  }
  params = nnx.state(model, nnx.All(nnx.Param, nnx.Not(Tap)))
  return make_layers(params, observations, {}, owners, strict, ignore)
