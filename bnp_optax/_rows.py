"""The rows of H, of every linear layer of a model, from one forward pass.

The frameworks' rooms report each call of a layer as rows; here the rows themselves are kept instead
of their mean and variance, and brought to the canonical form: a stack of matrices.
"""

from collections.abc import Callable
import dataclasses
import math
from typing import Any, NamedTuple

import flax.linen
import jax
import jax.numpy as jnp

from bnp_optax import _preconditioner, linen
from bnp_optax._calls import Call
from bnp_optax._layers import Layers, Path, by_kernel, split_arrays
from bnp_optax._layout import KernelLayout
from bnp_optax._matching import Layer, find_layers, flatten_masked, match_statistics
from bnp_optax._statistics import LayerStatistics, accumulation_dtype


class Observed(NamedTuple):
  """One layer and what it saw.

  Attributes:
    layer: its name, the layout of its kernel, and whether it has a bias.
    shape: the shape of its kernel.
    rows: ``H``, ``[stack, rows, window * feature]``; None for a circular transposed convolution.
    statistics: the mean and variance that BNP would take from this batch.
  """

  layer: Layer
  shape: tuple[int, ...]
  rows: jax.Array | None
  statistics: LayerStatistics


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Rows:
  """``[*outer, stack, rows, entries]``, where scan and vmap add the outer axes."""

  h: jax.Array
  kernel: str = dataclasses.field(metadata={"static": True})


def observe(
  model: Any, variables: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Layers, list[Observed]]:
  """What each layer that BNP covers sees when a model is called.

  Args:
    model: a Linen module, or the graph definition of an NNX one.
    variables: a Linen module's variables, or an NNX one's state.
    args: what it is called with.
    kwargs: likewise.

  Returns:
    The table of the model, and its layers in the order of the parameters.

  Raises:
    ValueError: if BNP covers no layer of the model.
  """
  framework = _linen if isinstance(model, flax.linen.Module) else _nnx
  params, layers, see = framework(model, variables, args, kwargs)
  found = find_layers(params, layers)
  if not found:
    raise ValueError(f"BNP covers no layer of this model:\n{layers}")

  arrays, rebuild = split_arrays((args, kwargs))

  @jax.jit
  def run(variables: Any, arrays: list[Any]) -> tuple[Any, Any]:
    args, kwargs = rebuild(arrays)
    return see(variables, *args, **kwargs)

  rows, statistics = run(variables, arrays)
  leaves, _ = flatten_masked(params)
  matched = match_statistics(found, leaves, statistics)
  seen: dict[Path, _Rows] = by_kernel(rows, _Rows)
  observed = []
  for layer, stats in zip(found, matched, strict=True):
    h = None
    if layer.path in seen:
      h = _without_outer_axes(seen[layer.path].h, layer.layout.calls)
    observed.append(Observed(layer, leaves[layer.kernel].shape, h, stats))
  return layers, observed


def _linen(
  model: flax.linen.Module, variables: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, Layers, Callable[..., tuple[Any, Any]]]:
  """The parameters of a Linen module, its table, and what gives the rows and statistics."""

  def see(variables: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    variables = {k: v for k, v in variables.items() if k != "intermediates"}
    # Any stream will do, the same in both passes.
    rngs = {"params": jax.random.key(0)}
    with linen._reporting(_rows, _append, True, object()):
      _, rows = model.apply(variables, *args, mutable=True, rngs=rngs, **kwargs)
    with linen.sow_statistics():
      _, statistics = model.apply(variables, *args, mutable=True, rngs=rngs, **kwargs)
    return rows.get("intermediates", {}), statistics["intermediates"]

  params = flax.linen.meta.unbox(variables["params"])
  return params, linen.layers(model, *args, **kwargs), see


def _nnx(
  model: Any, variables: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, Layers, Callable[..., tuple[Any, Any]]]:
  """The same of an NNX module."""
  # Here, because the import of NNX takes long and Linen's users need none of it.
  from flax import nnx

  from bnp_optax.nnx import Statistics, _reporting, layers, sow_statistics

  if not isinstance(model, nnx.GraphDef):
    raise ValueError(
      "Give a Linen module with its variables, or the two parts of an NNX module, as in "
      f"conditioning.survey(*nnx.split(model), x); found a {type(model).__name__}."
    )

  def see(variables: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    with _reporting(_rows, _append, True, object()):
      module: Any = nnx.merge(model, variables)
      _, rows = nnx.capture(module, Statistics)(*args, **kwargs)
    with sow_statistics():
      module: Any = nnx.merge(model, variables)
      _, statistics = nnx.capture(module, Statistics)(*args, **kwargs)
    return rows, statistics

  module: Any = nnx.merge(model, variables)
  return nnx.state(module, nnx.Param), layers(module, *args, **kwargs), see


def columns(
  mean: jax.Array,
  variance: jax.Array,
  kernel_shape: tuple[int, ...],
  layout: KernelLayout,
  eps_relative: float,
  eps_absolute: float,
) -> tuple[jax.Array, jax.Array]:
  """The mean and the regularized deviation of every column of H, ``[stack, window * feature]``."""
  mu, sigma2 = (layout.statistics_to_canonical(x, kernel_shape) for x in (mean, variance))
  one, window = jnp.ones((), mu.dtype), layout.window_size(kernel_shape)
  eps = (jnp.asarray(x, mu.dtype) for x in (eps_relative, eps_absolute))
  p = _preconditioner.preconditioner(mu, sigma2, window, one, one, *eps)
  shape = len(mu), window, mu.shape[-1]
  mu, sigma = (jnp.broadcast_to(x, shape).reshape(len(mu), -1) for x in (p.mu, p.sigma))
  return mu, sigma


def _rows(module: Any, call: Call) -> _Rows | None:
  """The rows of one call; a circular transposed convolution's windows are not formed."""
  del module
  if call.problem or (call.layout.window and not call.layout.exact_windows):
    return None
  stack = call.inputs.shape[len(call.leading) : -1]
  shape = math.prod(call.leading), math.prod(stack), call.layout.groups, -1
  h = call.inputs.astype(accumulation_dtype(call.inputs.dtype)).reshape(shape)
  h = h.transpose(1, 2, 0, 3).reshape(-1, shape[0], h.shape[-1])
  return _Rows(h, call.kernel)


def _append(a: _Rows, b: _Rows) -> _Rows:
  """The rows of a layer called twice."""
  return dataclasses.replace(a, h=jnp.concatenate([a.h, b.h], axis=-2))


def _without_outer_axes(h: jax.Array, calls: tuple[int, ...]) -> jax.Array:
  """Repeated calls are more rows, the other outer axes are a stack."""
  outer = [axis for axis in range(h.ndim - 3) if axis not in calls]
  h = h.transpose(*outer, h.ndim - 3, *calls, h.ndim - 2, h.ndim - 1)
  entries = h.shape[-1]
  stack = math.prod(h.shape[: len(outer) + 1])
  return h.reshape(stack, -1, entries)
