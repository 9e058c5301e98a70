"""The running statistics of all layers: their state, one update, and the P that they give.

`bnp_optax.scale_by_bnp` and `bnp_optax.bnp` are two entry points on this module. Matching happens
while tracing; a compiled step holds arithmetic alone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
import optax

from bnp_optax import _preconditioner
from bnp_optax._checks import check_layouts, check_range
from bnp_optax._kernels import Layer, Layouts, find_layers
from bnp_optax._layout import KernelLayout
from bnp_optax._matching import check_state, check_table, match_state, match_statistics
from bnp_optax._preconditioner import Preconditioner
from bnp_optax._sharding import on_auto_axes, replicated
from bnp_optax._statistics import LayerStatistics, accumulation_dtype
from bnp_optax._taps import read_taps
from bnp_optax._trees import flatten_masked, is_masked, unboxed

# A function of P, a kernel and a bias in canonical form.
_LayerFunction = Callable[
  [Preconditioner, jax.Array, jax.Array | None], tuple[jax.Array, jax.Array | None]
]


class ScaleByBnpState(NamedTuple):
  """State of `scale_by_bnp`.

  Attributes:
    count: Number of updates so far, an int32 scalar.
    input_mean: Running mean of each layer's inputs. It has the structure of the parameters (without
      their metadata, if any), with an array ``[*stack, features]`` at each kernel, float32 (float64
      where the kernel is float64), and `optax.MaskedNode` at every other leaf.
    input_variance: Running variance of each layer's inputs, in the form of ``input_mean``.
    input_weight: With ``debias``, the sum of the weights of each layer's batches, in the form of
      ``input_mean``, with the same number for all features, so that the three fields are updated
      together. Without ``debias``, `optax.MaskedNode` everywhere.
    nonfinite_count: Number of times that the statistics of a layer, or of one map of a stack, were
      left out because they were not finite or had no rows: an int32 scalar. It stays 0 in a healthy
      run.
  """

  count: ArrayLike  # pyright: ignore[reportIncompatibleMethodOverride]
  input_mean: optax.Updates
  input_variance: optax.Updates
  input_weight: optax.Updates
  nonfinite_count: ArrayLike


class Preconditioners(NamedTuple):
  """The layers of a tree of parameters, and the preconditioner of each."""

  layers: list[Layer]
  P: list[Preconditioner]

  def map(self, function: _LayerFunction, tree: optax.Updates) -> optax.Updates:
    """Apply ``function(P, kernel, bias)`` to every layer; other leaves pass through."""
    leaves, treedef = flatten_masked(tree)
    for layer, p in zip(self.layers, self.P, strict=True):
      kernel, bias = leaves[layer.kernel], None if layer.bias is None else leaves[layer.bias]
      apply = on_auto_axes(functools.partial(_map_layer, function, layer.layout), kernel, bias)
      kernel, bias = apply(p, kernel, bias)
      for i, x in ((layer.kernel, kernel), (layer.bias, bias)):
        if i is not None and x is not None:
          leaves[i] = x
    return treedef.unflatten(leaves)


def _map_layer(
  function: _LayerFunction,
  layout: KernelLayout,
  p: Preconditioner,
  kernel: jax.Array,
  bias: jax.Array | None,
) -> tuple[jax.Array, jax.Array | None]:
  """Apply ``function(P, kernel, bias)`` in canonical form to one layer."""
  dtype = accumulation_dtype(kernel.dtype, p.mu.dtype)
  w, b = layout.to_canonical(kernel.astype(dtype), None if bias is None else bias.astype(dtype))
  p = jax.tree.map(lambda x: x.astype(dtype), p)
  w, b = layout.from_canonical(*function(p, w, b), kernel.shape)
  if b is None or bias is None:
    return w.astype(kernel.dtype), None
  return w.astype(kernel.dtype), b.reshape(bias.shape).astype(bias.dtype)


@dataclasses.dataclass(frozen=True)
class RunningStatistics:
  """Steps 2 and 3 of the algorithms for all layers. `scale_by_bnp` documents the fields."""

  decay: ArrayLike
  eps_relative: ArrayLike
  eps_absolute: ArrayLike
  debias: bool
  lag_guard: ArrayLike | None
  scale_layers: bool
  layers: Layouts | None

  def __post_init__(self) -> None:
    """Raise TypeError for other types, and ValueError for concrete values out of range."""
    check_range("decay", self.decay, 1.0)
    check_range("eps_relative", self.eps_relative, math.inf)
    check_range("eps_absolute", self.eps_absolute, math.inf)
    if self.lag_guard is not None:
      check_range("lag_guard", self.lag_guard, math.inf)
    check_layouts(self.layers)

  def init(self, params: optax.Params) -> ScaleByBnpState:
    """Return the state before the first batch: mean 0 and variance 1 for every layer."""
    params = unboxed(params)
    leaves, treedef = flatten_masked(params)
    if not leaves and not isinstance(params, Collection):
      # The placeholder of optax.tree.map_params. The arrays of the state are vectors, to which a
      # function or a sharding of the parameters does not apply.
      zero = jnp.zeros([], jnp.int32)
      return ScaleByBnpState(zero, zero, zero, zero, zero)
    mean: list[Any] = [optax.MaskedNode()] * len(leaves)
    variance, weight = list(mean), list(mean)
    layers = find_layers(params, self.layers)
    if not layers and any(not is_masked(x) for x in leaves):
      raise ValueError(
        "BNP covers no layer of these parameters and would change nothing. Pass it the parameters "
        "of the model, not a flattened copy, and layers= of bnp_optax.linen or bnp_optax.nnx if "
        f"no kernel is named kernel. The parameters are {jax.tree.structure(params)}."
      )
    for layer in layers:
      kernel = leaves[layer.kernel]
      shape = layer.layout.statistics_shape(kernel.shape)
      dtype = accumulation_dtype(kernel.dtype)
      mean[layer.kernel] = jnp.zeros(shape, dtype)
      variance[layer.kernel] = jnp.ones(shape, dtype)
      if self.debias:
        weight[layer.kernel] = jnp.zeros(shape, dtype)
    return ScaleByBnpState(
      count=jnp.zeros([], jnp.int32),
      input_mean=treedef.unflatten(mean),
      input_variance=treedef.unflatten(variance),
      input_weight=treedef.unflatten(weight),
      nonfinite_count=jnp.zeros([], jnp.int32),
    )

  def update(
    self, updates: optax.Updates, state: ScaleByBnpState, stats: Any
  ) -> tuple[ScaleByBnpState, Preconditioners]:
    """Update the running statistics by those of a batch and return the P that they give."""
    check_state(state, ScaleByBnpState)
    updates = unboxed(updates)
    leaves, treedef = flatten_masked(updates)
    layers = find_layers(updates, self.layers)
    shapes = {x: x.layout.statistics_shape(leaves[x.kernel].shape) for x in layers}
    mean = match_state("input_mean", state.input_mean, updates, shapes)
    variance = match_state("input_variance", state.input_variance, updates, shapes)
    weight = match_state("input_weight", state.input_weight, updates, shapes if self.debias else {})
    fields = (mean, variance, weight) if self.debias else (mean, variance)
    if stats is None:
      stats = read_taps(updates, has_layers=self.layers is not None)
    batches = match_statistics(layers, leaves, stats)
    check_table(self.layers, updates, stats)

    preconditioners = []
    nonfinite = state.nonfinite_count
    for layer, batch in zip(layers, batches, strict=True):
      i = layer.kernel
      batch = jax.tree.map(replicated, batch)
      old = [field[i] for field in fields]
      new = self._advance(layer, *old, batch=batch)
      shape = leaves[i].shape
      eps = max(float(jnp.finfo(x.dtype).eps) for x in (mean[i], batch.total))
      finite, largest = _check(layer.layout, shape, new[:2], old[:2], eps if self.debias else 0.0)
      nonfinite += jnp.sum(~finite, dtype=jnp.int32)
      for field, x, y in zip(fields, new, old, strict=True):
        field[i] = jnp.where(finite, x, y)
      p = self.make_preconditioner(layer, shape, mean[i], variance[i], batch, largest)
      preconditioners.append(p if self.scale_layers else p._replace(q=jnp.ones_like(p.q)))
    mean, variance, weight = (treedef.unflatten(field) for field in (mean, variance, weight))
    count = optax.safe_increment(state.count)
    new_state = ScaleByBnpState(count, mean, variance, weight, nonfinite)
    return new_state, Preconditioners(layers, preconditioners)

  def _advance(
    self,
    layer: Layer,
    mu: jax.Array,
    sigma2: jax.Array,
    W: jax.Array | None = None,
    *,
    batch: LayerStatistics,
  ) -> tuple[jax.Array, ...]:
    """Take step 2 for one layer."""
    if layer.bias is None:
      # Without a bias nothing can be centred, and the norms of H's columns are its second moments.
      mu_H, sigma2_H = jnp.zeros_like(mu), batch.mean_square.astype(mu.dtype)
    else:
      mu_H, sigma2_H = batch.mean.astype(mu.dtype), batch.variance.astype(mu.dtype)
    # 1 - decay is computed before it is rounded: float32 loses a digit of 1 - 0.99.
    one_minus_rho = jnp.asarray(1 - self.decay, mu.dtype)
    if W is None:
      rows = batch.rows[..., None].astype(mu.dtype)
      return _preconditioner.update_statistics(mu, sigma2, mu_H, sigma2_H, rows, one_minus_rho)
    return _preconditioner.update_debiased_statistics(mu, sigma2, W, mu_H, sigma2_H, one_minus_rho)

  def make_preconditioner(
    self,
    layer: Layer,
    shape: tuple[int, ...],
    mean: jax.Array,
    variance: jax.Array,
    batch: LayerStatistics,
    largest: jax.Array,
  ) -> Preconditioner:
    """Take step 3 for one layer whose kernel has a shape; `largest` is that of `find_largest`."""
    layout, window, dtype = layer.layout, layer.layout.window_size(shape), mean.dtype
    examples = jnp.maximum(batch.examples, 1)[..., None].astype(dtype)
    rows = batch.rows[..., None].astype(dtype)
    p = _preconditioner.make_preconditioner(
      layout.statistics_to_canonical(mean, shape),
      layout.statistics_to_canonical(variance, shape),
      window,
      layout.scalars_to_canonical(examples),
      layout.scalars_to_canonical(rows / examples),
      jnp.asarray(self.eps_relative, dtype),
      jnp.asarray(self.eps_absolute, dtype),
      largest,
    )
    # Without a bias nothing is centred, so that no mean can lag.
    if self.lag_guard is None or layer.bias is None:
      return p
    mu_H = layout.statistics_to_canonical(batch.mean.astype(dtype), shape)
    rows, c = layout.scalars_to_canonical(rows), jnp.asarray(self.lag_guard, dtype)
    return _preconditioner.guard_against_lag(p, mu_H, window, rows, c)


def _check(
  layout: KernelLayout,
  shape: tuple[int, ...],
  new: Sequence[jax.Array],
  old: Sequence[jax.Array],
  epsilon: float,
) -> Any:
  """Return whether mean and variance are finite, and the largest variance: the old one if not."""

  def find_largest(mean: jax.Array, variance: jax.Array) -> jax.Array:
    mu, sigma2 = (layout.statistics_to_canonical(x, shape) for x in (mean, variance))
    return _preconditioner.find_largest(mu, sigma2, epsilon)

  def check_first(new: Sequence[jax.Array], old: Sequence[jax.Array]) -> Any:
    finite = jnp.all(jnp.isfinite(new[0]) & jnp.isfinite(new[1]), axis=-1, keepdims=True)
    return finite, find_largest(*(jnp.where(finite, x, y) for x, y in zip(new, old, strict=True)))

  def reduce_once(new: Sequence[jax.Array], old: Sequence[jax.Array]) -> Any:
    both = jnp.isfinite(new[0]) & jnp.isfinite(new[1])
    checked = find_largest(jnp.where(both, new[0], 0), jnp.where(both, new[1], jnp.inf))
    finite = checked.reshape(*new[0].shape[:-1], -1).max(axis=-1, keepdims=True) < jnp.inf
    return finite, jnp.where(layout.scalars_to_canonical(finite), checked, find_largest(*old))

  # The first is faster on a CPU. The second takes a kernel less on a GPU and a TPU.
  return jax.lax.platform_dependent(new, old, cpu=check_first, default=reduce_once)
