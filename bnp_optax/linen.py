"""BNP for `flax.linen`: the statistics of each layer's inputs, and the table of a model.

Within `sow_statistics`, each layer sows the statistics of its inputs beside its parameters. The
model needs no edit, and its outputs and gradients do not change.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
import contextlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from bnp_optax._calls import Call
from bnp_optax._layers import Layers
from bnp_optax._lifting import leave_observation
from bnp_optax._linen import register, report, report_calls
from bnp_optax._linen_taps import Tapped
from bnp_optax._observations import Observation, Owner, make_layers, merge_observed, observe_call
from bnp_optax._reporting import Exclude, Masks, Reporter, eval_shape, statistics_reporter
from bnp_optax._statistics import AxisName, Mask
from bnp_optax._taps import remove_taps
from bnp_optax._trees import Path, split_arrays

__all__ = ["Tapped", "layers", "register", "remove_taps", "report", "sow_statistics"]

_NORMS = (nn.BatchNorm, nn.GroupNorm, nn.InstanceNorm, nn.LayerNorm, nn.RMSNorm, nn.WeightNorm)
# The classes of which a parameter of this name is not the kernel of a linear layer.
_OTHERS = {"embedding": nn.Embed, "scale": _NORMS, "bias": _NORMS}


@contextlib.contextmanager
def sow_statistics(
  *,
  examples: int | jax.Array | None = None,
  example_axes: int = 1,
  mask: Mask | Mapping[str, Mask] = None,
  axis_name: AxisName | None = None,
  exact_windows: bool = False,
  exclude: Exclude | None = None,
) -> Iterator[None]:
  """Sow the statistics of every linear layer's inputs into ``intermediates`` within this context.

  The linear layers are Dense, DenseGeneral, Einsum, Conv, ConvLocal and ConvTranspose, and the
  modules built from them, such as attention and recurrent cells. Each sows one `LayerStatistics`
  with `flax.linen.Module.sow`. Apply the model with ``mutable=["intermediates"]`` to get them,
  together with the values that the model itself sows there. Outputs and gradients of the model stay
  bitwise the same. Several calls of a layer in one forward pass add rows.

  Enter it inside the function that is differentiated and jitted, around the call of the model.
  Outside of `jax.jit`, JAX compiles and keeps a program for each new `mask`, `examples`, `exclude`,
  and for each call with a mapping as `mask`.

  `flax.linen.scan`, `flax.linen.RNN` and `flax.linen.vmap` of several layers return the
  intermediates within this context, whatever their ``variable_axes``. A `flax.linen.vmap` with
  shared parameters may map examples or anything else: it returns them only if `examples` is given.

  Under `jax.shard_map`, `jax.pmap` and `jax.vmap` over examples, pass the mapped axis as
  ``axis_name``; the statistics are then those of all examples along it. `flax.linen.vmap` over
  examples needs ``axis_name`` as well, with ``"intermediates": None`` in ``variable_axes`` and
  ``example_axes=0``.

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
    examples: Number of examples that the loss is a mean over, a number above 0 or a scalar array,
      the same for every layer; with `axis_name` or micro-batches, the number in one part. None to
      count the leading axes of each layer's inputs, without the examples that its mask leaves out;
      the layers within the context must then agree, and have the same mask of examples.
    example_axes: Number of leading axes that count examples in the loss: 1 for a mean over
      sequences or images, 2 for a mean over the tokens of ``[batch, time, features]``, 0 if
      `jax.vmap` maps single examples.
    mask: True, or nonzero, for positions that count and False for padding. Its axes, such as
      ``[batch]`` or ``[batch, time]``, are the leading axes of every layer's inputs. Those of a
      transposed convolution include the zeros between its inputs. Where inputs lack some of them,
      as in a head after pooling, an example counts if any of its positions does. The cell of an
      `nn.RNN` has the mask of its inputs, ``[batch, time]`` also with ``time_major``. A mapping
      from prefixes of the layers' paths to masks or None gives each layer the mask of its longest
      prefix, as in ``{"encoder": source, "": target}``. A layer without one has no mask.
    axis_name: Name of the mapped axis that the examples are split over, or a tuple of names, as in
      `flax.linen.BatchNorm`. The statistics, and the number of examples, are then those of the
      whole batch and are equal along the axis.
    exact_windows: Whether convolutions take one mean and variance for each kernel entry, over the
      zero-padded windows (eqs. 19 and 20), instead of one for each channel over the whole map
      (eqs. 21 and 22). Needs ``layers(..., exact_windows=True)``.
    exclude: Function of a layer and the inputs of one call, ``[*leading, *stack, features]``. It
      returns True for a call that does not count because its outputs do not reach the loss, as in
      ``exclude=lambda layer, x: layer.name == "head" and x.ndim == 4``.

  Yields:
    None.

  Raises:
    ValueError: If `examples` or `example_axes` is out of range. While tracing, if a layer's inputs
      have no rows or do not fit `mask`, if a prefix in `mask` is that of no layer, or if layers
      of one context disagree about the number of examples. Inputs that are complex are an error in
      ``update`` of an optimizer that needs the layer's statistics.
    NameError: While tracing, if there is no mapped axis of the name `axis_name`.
  """
  masks = Masks(mask)
  options = (examples, example_axes, masks, axis_name, exact_windows, exclude)
  reporter = statistics_reporter(lambda module, _: module.path, *options)
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
    strict: Whether to raise if BNP does not reach a parameter of two or more axes. Embeddings, the
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
    observation = observe_call(module, call)
    called[(*module.path, call.kernel)] = observation.kind
    return observation

  def note_owner(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
    outputs, module = next_fun(*args, **kwargs), context.module
    if module.scope is not None:
      for name, x in nn.meta.unbox(module.variables).get("params", {}).items():
        if not isinstance(x, Mapping):
          owner = Owner.of(module, name, jnp.ndim(x), _OTHERS)
          owners.setdefault((*module.path, name), owner)
    return outputs

  arrays, rebuild = split_arrays((init_args, init_kwargs))

  def trace(key: jax.Array, arrays: list[Any]) -> tuple[Any, Any]:
    args, kwargs = rebuild(arrays)
    # The model's own init and apply may have been replaced by jitted ones.
    variables = dict(nn.meta.unbox(type(model).init(model, key, *args, **kwargs)))
    # init takes all positions; a decoding cache would take one at a time.
    for collection in ("intermediates", "cache"):
      variables.pop(collection, None)
    variables["params"] = remove_taps(variables.get("params", {}))
    reporter = Reporter(
      record, merge_observed, exact_windows, leave=leave_observation, covers_nested=True
    )
    with report_calls(reporter), nn.intercept_methods(note_owner):
      _, aux = type(model).apply(
        model, variables, *args, mutable=True, rngs={"params": key}, **kwargs
      )
    return variables["params"], aux.get("intermediates", {})

  key = jax.eval_shape(lambda: jax.random.key(0))
  params, observations = eval_shape(trace, axis_name, key, arrays)
  return make_layers(params, observations, called, owners, strict, ignore)
