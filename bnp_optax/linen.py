"""How `flax.linen` layers report what they saw.

Linen calls every method of every module through its interceptors. One of them is enough to sow the
statistics of each layer's inputs beside the layer, with no edit to the model and no change to its
outputs or gradients.
"""

from collections.abc import Callable, Hashable, Iterator
import contextlib
import contextvars
import functools
import inspect
from typing import Any

import flax.linen as nn
from flax.linen import recurrent
import jax
import jax.numpy as jnp

from bnp_optax import _calls, _readers
from bnp_optax._calls import Call, call_statistics
from bnp_optax._layers import (
  Layers,
  make_layers,
  merge_observations,
  observe,
  split_arrays,
)
from bnp_optax._statistics import AxisName, LayerStatistics, NoStatistics, merge_calls

# How to read each layer, by the function that multiplies with its kernel. A subclass that overrides
# that function and calls it is read once, where it does; one that does not call it is not read.
_READERS = {
  inspect.unwrap(layer.__call__): reader
  for layer, reader in (
    (nn.Dense, _readers.dense),
    (nn.DenseGeneral, _readers.dense_general),
    (nn.Einsum, _readers.einsum),
    (nn.Conv, _readers.conv),
    (nn.ConvLocal, _readers.conv),
    (nn.ConvTranspose, _readers.conv_transpose),
    # OptimizedLSTMCell hands its inputs to these and multiplies them itself.
    (recurrent.DenseParams, _readers.dense),
  )
}

# Layers around one layer, which hand it another kernel than its parameter.
_WRAPPERS = tuple(inspect.unwrap(layer.__call__) for layer in (nn.WeightNorm, nn.SpectralNorm))

# What layers report to: where contexts are nested, the innermost alone.
_reporter: contextvars.ContextVar[Any] = contextvars.ContextVar("linen", default=None)


@contextlib.contextmanager
def sow_statistics(
  *,
  example_axes: int = 1,
  mask: jax.typing.ArrayLike | None = None,
  axis_name: AxisName | None = None,
  exact_windows: bool = False,
) -> Iterator[None]:
  """Within this context, every linear layer sows what it sees into ``intermediates``.

  Those are Dense, DenseGeneral, Einsum, Conv, ConvLocal and ConvTranspose, and whatever is built of
  them: attention, recurrent cells. Each sows one `LayerStatistics` of its inputs with
  `flax.linen.Module.sow`; apply the model with ``mutable=["intermediates"]`` to get them, together
  with whatever the model itself sows there. Outputs and gradients of the model stay bitwise the
  same. A layer called several times in one forward pass sees more rows.

  Enter it inside the function that is differentiated and jitted, around the call of the model.

  Under `flax.linen.scan`, `flax.linen.RNN` and `flax.linen.vmap` of several layers,
  ``variable_axes`` must hold ``"intermediates": 0``.
  Under `jax.shard_map`, `jax.pmap` and `jax.vmap` over examples, name the axis that they map:
  with ``axis_name`` the statistics are those of all examples along it. `flax.linen.vmap` over
  examples wants that too, with ``"intermediates": None`` and ``example_axes=0``.

  What was sown must not be handed to the next call of the model: it would be counted again.

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

    The same of single examples, mapped by `jax.vmap`:

    >>> def apply_one(x):
    ...   with bnp_optax.linen.sow_statistics(example_axes=0, axis_name="batch"):
    ...     return model.apply(params, x, mutable=["intermediates"])
    >>> y, aux = jax.vmap(apply_one, axis_name="batch", out_axes=(0, None))(x)
    >>> stats = aux["intermediates"]["layer_statistics"]
    >>> stats.examples, stats.mean, stats.variance
    (Array(4., dtype=float32), Array([3., 4.], dtype=float32), Array([5., 5.], dtype=float32))

  Args:
    example_axes: how many leading axes count examples, as the loss does: 1 if it is a mean over
      sequences or images, 2 if it is a mean over the tokens of ``[batch, time, features]``, 0 if
      `jax.vmap` maps single examples.
    mask: True, or not zero, for positions that count and False for padding; its shape is the
      leading shape of the inputs it is for, such as ``[batch, time]``. Layers whose inputs have
      only the example axes are not masked: a head after pooling, and a recurrent cell inside a
      scan over time. An example without any position that counts is none.
    axis_name: the name of the mapped axis that the examples are split over, or a tuple of names, as
      in `flax.linen.BatchNorm`. The statistics, and the number of examples, are then those of the
      whole batch, and the same everywhere along the axis.
    exact_windows: whether convolutions take one mean and variance for each kernel entry, over the
      zero-padded windows (eqs. 19 and 20), instead of one for each channel over the whole map
      (eqs. 21 and 22). Needs ``layers(..., exact_windows=True)``.

  Yields:
    None.

  Raises:
    ValueError: while tracing, if a layer's inputs have no rows. That they are complex, or do not
      fit `mask`, is an error of the optimizer that has use for the layer's statistics.
    NameError: while tracing, if there is no mapped axis of the name `axis_name`.
  """
  where = _calls.as_mask(mask)

  def see(module: nn.Module, call: Call) -> LayerStatistics | NoStatistics:
    return call_statistics(call, "/".join(module.path), example_axes, where, axis_name)

  key = (example_axes, axis_name, exact_windows, _calls.mask_key(where))
  with _reporting(see, merge_calls, exact_windows, key):
    yield


def layers(
  model: nn.Module,
  *init_args: Any,
  strict: bool = False,
  exact_windows: bool = False,
  **init_kwargs: Any,
) -> Layers:
  """Finds the linear layers of a model, by tracing it once with `jax.eval_shape`.

  It computes nothing and works for models of any size. Needed as ``layers`` of
  `bnp_optax.scale_by_bnp` and `bnp_optax.bnp` for whatever is no plain Dense or Conv: attention,
  grouped and transposed convolutions, layers under `flax.linen.scan` or `flax.linen.vmap`.

  Examples:
    >>> import bnp_optax, flax.linen as nn, jax, jax.numpy as jnp
    >>> class Model(nn.Module):
    ...   @nn.compact
    ...   def __call__(self, tokens):
    ...     x = nn.Embed(50, 8, name="embed")(tokens)
    ...     x = x + nn.MultiHeadDotProductAttention(2, name="attention")(x)
    ...     return nn.Dense(50, use_bias=False, name="head")(nn.LayerNorm(name="norm")(x))
    >>> tokens = jax.ShapeDtypeStruct((4, 6), jnp.int32)
    >>> layers = bnp_optax.linen.layers(Model(), tokens)
    >>> print(layers)
    path                    kind          shape  inputs  positions  preconditioned
    ----------------------------------------------------------------------------------------------
    attention/key/kernel    DenseGeneral  8x2x4  4x6x8           6  yes
    attention/out/kernel    DenseGeneral  2x4x8  4x6x8           6  yes
    attention/query/kernel  DenseGeneral  8x2x4  4x6x8           6  yes
    attention/value/kernel  DenseGeneral  8x2x4  4x6x8           6  yes
    embed/embedding                       50x8                      passes through
    head/kernel             Dense         8x50   4x6x8           6  yes, without bias: not centred
    norm/bias                             8                         passes through
    norm/scale                            8                         passes through
    5 layers, 688 of 1,104 parameters
    >>> layers[("attention", "key", "kernel")].output
    (1, 2)

  Args:
    model: the model.
    *init_args: what ``model.init`` takes after the random key; `jax.ShapeDtypeStruct` will do for
      arrays.
    strict: whether to raise if there is a linear layer that BNP cannot precondition.
    exact_windows: as in `sow_statistics`.
    **init_kwargs: likewise, such as ``train=False`` or ``method``.

  Returns:
    An immutable, hashable mapping from the path of each kernel to its layout. Printed, it is a
    table of all parameters.

  Raises:
    ValueError: if `strict` and a linear layer cannot be covered; it names each, and says why.
  """
  called: dict[tuple[str, ...], str] = {}

  def see(module: nn.Module, call: Call) -> Any:
    kind, kernel = type(module).__name__, module.get_variable("params", call.kernel)
    called[(*module.path, call.kernel)] = kind
    return observe(call, kind, jnp.shape(nn.meta.unbox(kernel)))

  arrays, rebuild = split_arrays((init_args, init_kwargs))

  def trace(key: jax.Array, arrays: list[Any]) -> tuple[Any, Any]:
    args, kwargs = rebuild(arrays)
    variables = dict(nn.meta.unbox(model.init(key, *args, **kwargs)))
    # A cache for decoding takes one position at a time, what init takes are all of them.
    for collection in ("intermediates", "cache"):
      variables.pop(collection, None)
    with _reporting(see, merge_observations, exact_windows, object()):
      _, aux = model.apply(variables, *args, mutable=True, rngs={"params": key}, **kwargs)
    return variables.get("params", {}), aux.get("intermediates", {})

  key = jax.eval_shape(lambda: jax.random.key(0))
  params, seen = jax.eval_shape(trace, key, arrays)
  return make_layers(
    params,
    seen,
    called,
    "its statistics are lost under nn.scan, nn.vmap or nn.RNN: add "
    '"intermediates": 0 to their variable_axes',
    strict,
  )


@contextlib.contextmanager
def _reporting(
  see: Callable[[nn.Module, Call], Any],
  merge: Callable[[Any, Any], Any],
  exact_windows: bool,
  key: Hashable,
) -> Iterator[None]:
  """Within this context, ``see(module, call)`` is sown beside each linear layer that is called."""

  def interceptor(
    next_fun: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    context: nn.module.InterceptorContext,
  ) -> Any:
    function: Any = getattr(context.orig_method, "func", None)
    if _reporter.get() is not see or function not in (*_READERS, *_WRAPPERS):
      return next_fun(*args, **kwargs)
    module: Any = context.module
    if function in _WRAPPERS:
      # What is sown while the wrapper maps the layer's variables is lost: the layer itself stays
      # silent, and the wrapper reports its inputs.
      with _calls.recording(_reporter, None, key):
        outputs = next_fun(*args, **kwargs)
      module = module.layer_instance
      function = inspect.unwrap(type(module).__call__)
      kwargs = {name: value for name, value in kwargs.items() if name != "update_stats"}
    else:
      outputs = next_fun(*args, **kwargs)
    if reader := _READERS.get(function):
      method = functools.partial(function, module)
      for call in _readers.read(reader, module, exact_windows, outputs, method, args, kwargs):
        if (seen := see(module, call)) is not None:
          _calls.sow(module, "intermediates", call, seen, merge)
    return outputs

  with _calls.recording(_reporter, see, key), nn.intercept_methods(interceptor):
    yield
