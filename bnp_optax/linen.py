"""BNP for `flax.linen`: the statistics of each layer's inputs, and the table of a model.

Linen calls every method of every module through its interceptors. One interceptor sows the
statistics of each layer's inputs beside the layer. The model needs no edit, and its outputs and
gradients do not change.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
import contextlib
import contextvars
import functools
import inspect
from typing import Any

import flax.linen as nn
from flax.linen import recurrent
import jax
import jax.numpy as jnp

from bnp_optax import _readers
from bnp_optax._calls import Call
from bnp_optax._layers import Layers
from bnp_optax._observations import Observation, Owner, make_layers, merge_observed, observe_call
from bnp_optax._reporting import Masks, Reporter, activate, statistics_reporter, with_axes
from bnp_optax._statistics import AxisName, Mask
from bnp_optax._trees import Path, split_arrays

__all__ = ["layers", "sow_statistics"]

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

_NORMS = (
  *(nn.BatchNorm, nn.GroupNorm, nn.InstanceNorm, nn.LayerNorm, nn.RMSNorm),
  nn.WeightNorm,
)

# Wrappers of one layer, which replace its kernel by a function of its parameter.
_WRAPPERS = tuple(inspect.unwrap(layer.__call__) for layer in (nn.WeightNorm, nn.SpectralNorm))

_active: contextvars.ContextVar[Reporter | None] = contextvars.ContextVar("linen", default=None)


@contextlib.contextmanager
def sow_statistics(
  *,
  examples: int | jax.Array | None = None,
  example_axes: int = 1,
  mask: Mask | Mapping[str, Mask] = None,
  axis_name: AxisName | None = None,
  exact_windows: bool = False,
) -> Iterator[None]:
  """Sow the statistics of every linear layer's inputs into ``intermediates`` within this context.

  The linear layers are Dense, DenseGeneral, Einsum, Conv, ConvLocal and ConvTranspose, and the
  modules built from them, such as attention and recurrent cells. Each sows one `LayerStatistics`
  with `flax.linen.Module.sow`. Apply the model with ``mutable=["intermediates"]`` to get them,
  together with the values that the model itself sows there. Outputs and gradients of the model stay
  bitwise the same. Several calls of a layer in one forward pass add rows.

  Enter it inside the function that is differentiated and jitted, around the call of the model.

  Under `flax.linen.scan`, `flax.linen.RNN` and `flax.linen.vmap` of several layers,
  ``variable_axes`` must contain ``"intermediates": 0``. Under `jax.shard_map`, `jax.pmap` and
  `jax.vmap` over examples, pass the mapped axis as ``axis_name``; the statistics are then those of
  all examples along it. `flax.linen.vmap` over examples needs ``axis_name`` as well, with
  ``"intermediates": None`` and ``example_axes=0``.

  Do not pass sown statistics to the next call of the model, which would count them again.

  Examples:
    >>> import bnp_optax, flax.linen as nn, jax, jax.numpy as jnp
    >>> model = nn.Dense(3)
    >>> x = jnp.arange(8.0).reshape(4, 2)
    >>> params = model.init(jax.random.key(0), x)
    >>> with bnp_optax.linen.sow_statistics():
    ...   y, aux = model.apply(params, x, mutable=["intermediates"])
    >>> stats = aux["intermediates"]["layer_statistics"]
    >>> stats.examples, stats.mean, stats.variance
    (Array(4., dtype=float32), Array([3., 4.], dtype=float32), Array([5., 5.], dtype=float32))

    The same statistics from single examples, mapped by `jax.vmap`:

    >>> def apply_one(x):
    ...   with bnp_optax.linen.sow_statistics(example_axes=0, axis_name="batch"):
    ...     return model.apply(params, x, mutable=["intermediates"])
    >>> y, aux = jax.vmap(apply_one, axis_name="batch", out_axes=(0, None))(x)
    >>> stats = aux["intermediates"]["layer_statistics"]
    >>> stats.examples, stats.mean, stats.variance
    (Array(4., dtype=float32), Array([3., 4.], dtype=float32), Array([5., 5.], dtype=float32))

  Args:
    examples: Number of examples that the loss is a mean over, an integer or an array, the same for
      every layer; with `axis_name`, the number in one part. None to count the leading axes of each
      layer's inputs, which must then agree.
    example_axes: Number of leading axes that count examples in the loss: 1 for a mean over
      sequences or images, 2 for a mean over the tokens of ``[batch, time, features]``, 0 if
      `jax.vmap` maps single examples.
    mask: True, or nonzero, for positions that count and False for padding. Its shape is the leading
      shape of the inputs of every layer, such as ``[batch, time]``, or begins with it: for inputs
      ``[batch, features]``, as those of a head after pooling or of a recurrent cell inside a scan
      over time, an example counts if any of its positions does. A mapping from prefixes of the
      layers' paths to masks or None gives each layer the mask of its longest prefix, as in
      ``{"encoder": mask, "decoder": None, "": other}``. A layer without a prefix has no mask.
    axis_name: Name of the mapped axis that the examples are split over, or a tuple of names, as in
      `flax.linen.BatchNorm`. The statistics, and the number of examples, are then those of the
      whole batch and are equal along the axis.
    exact_windows: Whether convolutions take one mean and variance for each kernel entry, over the
      zero-padded windows (eqs. 19 and 20), instead of one for each channel over the whole map
      (eqs. 21 and 22). Needs ``layers(..., exact_windows=True)``.

  Yields:
    None.

  Raises:
    ValueError: While tracing, if a layer's inputs have no rows or do not fit `mask`, if a prefix in
      `mask` is that of no layer, or if layers disagree about the number of examples. Inputs that
      are complex are an error in ``update`` of an optimizer that needs the layer's statistics.
    NameError: While tracing, if there is no mapped axis of the name `axis_name`.
  """

  def locate(module: nn.Module, call: Call) -> Path:
    del call
    return module.path

  masks = Masks(mask)
  reporter = statistics_reporter(locate, examples, example_axes, masks, axis_name, exact_windows)
  with report_calls(reporter) as active:
    yield
  if active is reporter:
    masks.check_prefixes()


def layers(
  model: nn.Module,
  *init_args: Any,
  strict: bool = False,
  ignore: Collection[str] = (),
  axis_name: AxisName | None = None,
  exact_windows: bool = False,
  **init_kwargs: Any,
) -> Layers:
  """Find the linear layers of a model by tracing it once with `jax.eval_shape`.

  The trace computes nothing and works for models of any size. Pass the result as ``layers`` to
  `bnp_optax.scale_by_bnp` or `bnp_optax.bnp` if the model has layers other than plain Dense and
  Conv: attention, grouped and transposed convolutions, layers under `flax.linen.scan` or
  `flax.linen.vmap`.

  Examples:
    >>> import bnp_optax, flax.linen as nn, jax, jax.numpy as jnp
    >>> class Model(nn.Module):
    ...   @nn.compact
    ...   def __call__(self, tokens):
    ...     x = nn.Embed(50, 8, name="embed")(tokens)
    ...     x = x + nn.MultiHeadDotProductAttention(2, name="attention")(x)
    ...     return nn.Dense(50, name="head")(nn.LayerNorm(name="norm")(x))
    >>> tokens = jax.ShapeDtypeStruct((4, 6), jnp.int32)
    >>> layers = bnp_optax.linen.layers(Model(), tokens)
    >>> print(layers)
    path                    kind          shape  inputs  calls  positions  preconditioned
    -------------------------------------------------------------------------------------
    attention/key/kernel    DenseGeneral  8x2x4  4x6x8       1          6  yes
    attention/out/kernel    DenseGeneral  2x4x8  4x6x8       1          6  yes
    attention/query/kernel  DenseGeneral  8x2x4  4x6x8       1          6  yes
    attention/value/kernel  DenseGeneral  8x2x4  4x6x8       1          6  yes
    embed/embedding         Embed         50x8                             passes through
    head/kernel             Dense         8x50   4x6x8       1          6  yes
    norm/bias               LayerNorm     8                                passes through
    norm/scale              LayerNorm     8                                passes through
    5 layers, 738 of 1,154 parameters (64.0%)
    >>> layers[("attention", "key", "kernel")].output
    (1, 2)

  Args:
    model: The model.
    *init_args: Arguments of ``model.init`` after the random key; arrays may be
      `jax.ShapeDtypeStruct`.
    strict: Whether to raise if BNP does not reach a parameter of two and more axes. Embeddings, the
      parameters of norms and those in `ignore` may pass through.
    ignore: Prefixes of the paths of parameters that are to train without BNP, such as
      ``["positions", "decoder/router"]``.
    axis_name: Name of a mapped axis that the model needs, or a tuple of names, as for
      ``nn.BatchNorm(axis_name=...)``. The model is traced for one part.
    exact_windows: As in `sow_statistics`.
    **init_kwargs: Keyword arguments of ``model.init``, such as ``train=False`` or ``method``.

  Returns:
    An immutable, hashable mapping from the path of each kernel to its layout. Printed, it is a
    table of all parameters.

  Raises:
    ValueError: If `strict` and a parameter is not covered, or if a prefix in `ignore` is that of no
      parameter. The message names each.
  """
  called: dict[Path, str] = {}
  owners: dict[Path, Owner] = {}

  def record(module: nn.Module, call: Call) -> Observation:
    kind, kernel = type(module).__name__, module.get_variable("params", call.kernel)
    called[(*module.path, call.kernel)] = kind
    return observe_call(call, kind, jnp.shape(nn.meta.unbox(kernel)))

  def note_owner(
    next_fun: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    context: nn.module.InterceptorContext,
  ) -> Any:
    outputs, module = next_fun(*args, **kwargs), context.module
    if module.scope is not None:
      for name, x in nn.meta.unbox(module.variables).get("params", {}).items():
        if not isinstance(x, Mapping):
          owner = Owner.of(module, name, jnp.ndim(x), nn.Embed, _NORMS)
          owners.setdefault((*module.path, name), owner)
    return outputs

  arrays, rebuild = split_arrays((init_args, init_kwargs))

  def trace(key: jax.Array, arrays: list[Any]) -> tuple[Any, Any]:
    args, kwargs = rebuild(arrays)
    variables = dict(nn.meta.unbox(model.init(key, *args, **kwargs)))
    # init takes all positions; a decoding cache would take one at a time.
    for collection in ("intermediates", "cache"):
      variables.pop(collection, None)
    reporter = Reporter(record, merge_observed, exact_windows, covers_nested=True)
    with report_calls(reporter), nn.intercept_methods(note_owner):
      _, aux = model.apply(variables, *args, mutable=True, rngs={"params": key}, **kwargs)
    return variables.get("params", {}), aux.get("intermediates", {})

  key = jax.eval_shape(lambda: jax.random.key(0))
  params, observations = jax.eval_shape(with_axes(trace, axis_name), key, arrays)
  return make_layers(
    params,
    observations,
    called,
    owners,
    "its statistics are lost under nn.scan, nn.vmap or nn.RNN: add "
    '"intermediates": 0 to their variable_axes',
    strict,
    ignore,
  )


@contextlib.contextmanager
def report_calls(reporter: Reporter) -> Iterator[Reporter]:
  """Pass every call of a linear layer to ``reporter`` within this context. Not public.

  Yields:
    The reporter of this context: that of an outer one if it covers nested contexts.
  """
  if (outer := _active.get()) is not None:
    reporter = outer.nested(reporter)

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
        reporter.sow(module, "intermediates", call)
    return outputs

  with activate(_active, reporter, reporter.key), nn.intercept_methods(interceptor):
    yield reporter
