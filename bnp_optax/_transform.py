"""`scale_by_bnp`: Algorithms 2 and 3 as an Optax gradient transformation.

The transformation finds the layers in the parameters (a kernel, and the bias beside it), finds in
`stats` what each of them saw, and applies `P P^T` to their gradients. All of that is decided by
names and shapes while tracing; a compiled step holds arithmetic alone.
"""

from collections.abc import Callable, Iterable, Mapping
import dataclasses
import math
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from bnp_optax import _preconditioner
from bnp_optax._layers import Path, flatten
from bnp_optax._layout import KernelLayout
from bnp_optax._preconditioner import Preconditioner
from bnp_optax._statistics import LayerStatistics, accumulation_dtype, merge_call_axes

Layouts = Mapping[Path, KernelLayout]


class ScaleByBnpState(NamedTuple):
  """State of `scale_by_bnp`.

  Attributes:
    count: number of updates so far, an int32 scalar.
    input_mean: the running mean of each layer's inputs. The structure of the parameters, with an
      array ``[*stack, features]`` at each kernel, float32 (float64 where the kernel is float64),
      and `optax.MaskedNode` at every other leaf.
    input_variance: the running variance, likewise.
    nonfinite_count: how often a layer's statistics were not finite, or came from no rows at all,
      and were therefore left out, summed over layers and updates: an int32 scalar. It stays 0 in a
      healthy run.
  """

  count: jax.typing.ArrayLike  # pyright: ignore[reportIncompatibleMethodOverride]
  input_mean: optax.Updates
  input_variance: optax.Updates
  nonfinite_count: jax.typing.ArrayLike


@dataclasses.dataclass(frozen=True)
class Layer:
  """One layer of the parameters: where its kernel and its bias are among the leaves."""

  path: Path
  layout: KernelLayout
  kernel: int
  bias: int | None

  def __str__(self) -> str:
    return _name(self.path[:-1] if self.path[-1] == "kernel" else self.path)


def scale_by_bnp(
  decay: chex.Numeric = 0.99,
  eps_relative: chex.Numeric = 1e-2,
  eps_absolute: chex.Numeric = 1e-4,
  *,
  layers: Layouts | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Precondition gradients as batch normalization would, without a layer in the network.

  For each linear layer, with the mean :math:`\mu_H` and variance :math:`\sigma_H^2` of its inputs
  over the batch (Algorithms 2 and 3 of Lange, Helfrich and Ye, 2022):

  .. math::
    \mu &\leftarrow \rho \mu + (1 - \rho) \mu_H, \qquad
    \sigma^2 \leftarrow \rho \sigma^2 + (1 - \rho) \sigma_H^2 \\
    \tilde\sigma^2 &= \sigma^2 + \epsilon_1 \max(\sigma^2) + \epsilon_2, \qquad
    q^2 = \max(k^2 c / N, \sqrt{rs}) \\
    G_w &\leftarrow \frac{1}{q^2} (G_w - \mu G_b) / \tilde\sigma^2 \\
    G_b &\leftarrow \frac{1}{q^2} G_b - \sum \mu G_w

  where :math:`\mu = 0, \sigma^2 = 1` at first, :math:`k^2 c` is the number of inputs of one
  output, :math:`N` the number of examples and :math:`rs` the number of output positions (for a
  dense layer on ``[batch, features]``, 1). A layer without bias cannot be centred; there
  :math:`\mu = 0` and :math:`\sigma_H^2 = E[h^2]`. Parameters that belong to no linear layer pass
  through untouched.

  Chain it with `optax.sgd`, with or without momentum. An optimizer that rescales each coordinate,
  such as Adam, would tear a weight's step from the bias step that makes up for it: use
  `bnp_optax.bnp(optax.adam(1e-3))` instead. Weight decay goes between this and momentum.

  Examples:
    >>> import bnp_optax, flax.linen as nn, jax, jax.numpy as jnp, optax
    >>> model = nn.Dense(1)
    >>> x = jax.random.uniform(jax.random.key(0), (8, 5))
    >>> params = model.init(jax.random.key(1), x)["params"]
    >>> tx = optax.chain(bnp_optax.scale_by_bnp(), optax.sgd(0.3))
    >>> opt_state = tx.init(params)
    >>> def loss_fn(params):
    ...   with bnp_optax.linen.sow_statistics():
    ...     y, aux = model.apply({"params": params}, x, mutable=["intermediates"])
    ...   return jnp.mean((y - 2.0) ** 2), aux["intermediates"]
    >>> @jax.jit
    ... def step(params, opt_state):
    ...   (loss, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
    ...   updates, opt_state = tx.update(grads, opt_state, params, stats=stats)
    ...   return optax.apply_updates(params, updates), opt_state, loss
    >>> for _ in range(100):
    ...   params, opt_state, loss = step(params, opt_state)
    >>> bool(loss < 1e-2)
    True

  Args:
    decay: the decay of the running statistics, the paper's :math:`\rho`, in [0, 1).
    eps_relative: :math:`\epsilon_1 \geq 0`, relative to the largest variance of the layer's inputs.
    eps_absolute: :math:`\epsilon_2 \geq 0`.
    layers: which axes of which kernel are what, as `bnp_optax.linen.layers` finds them. None for
      Dense and Conv by convention: a leaf named ``kernel`` with features at axis -2, outputs at
      axis -1 and the window before, and beside it a leaf named ``bias`` or none.

  Returns:
    A transformation whose ``update`` takes the keyword ``stats``: the statistics of the forward
    pass that the gradients come from, as `bnp_optax.linen.sow_statistics` gathers them. It may be a
    whole ``intermediates`` collection; whatever else was sown there is ignored. Gradients come
    back in their own dtype. Numeric arguments may be arrays, or schedules through
    `optax.inject_hyperparams`.

  Raises:
    ValueError: on creation, if `decay` or an epsilon is out of range; from ``init`` and ``update``,
      while tracing, if kernels, biases, statistics and state do not fit together. Each message
      names the layer.

  References:
    Lange, Helfrich, Ye, `Batch Normalization Preconditioning for Neural Network Training
    <https://jmlr.org/papers/v23/21-0135.html>`_, JMLR 23(72), 2022: section 3.3 and 4.
  """
  check_hyperparameters(decay, eps_relative, eps_absolute)

  def init_fn(params: optax.Params) -> ScaleByBnpState:
    return init_statistics(params, layers)

  def update_fn(
    updates: optax.Updates,
    state: ScaleByBnpState,
    params: optax.Params | None = None,
    *,
    stats: Any = None,
    **extra_args: Any,
  ) -> tuple[optax.Updates, ScaleByBnpState]:
    del params, extra_args
    state, preconditioners = advance_statistics(
      updates, state, stats, layers, decay, eps_relative, eps_absolute
    )
    return map_layers(_preconditioner.precondition, preconditioners, updates), state

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)  # pyright: ignore[reportArgumentType]


def check_hyperparameters(
  decay: chex.Numeric, eps_relative: chex.Numeric, eps_absolute: chex.Numeric
) -> None:
  """Raises ValueError for values out of range, as far as they are known while tracing."""
  for name, value, top in (
    ("decay", decay, 1.0),
    ("eps_relative", eps_relative, math.inf),
    ("eps_absolute", eps_absolute, math.inf),
  ):
    try:
      in_range = 0 <= float(value) < top
    except jax.errors.ConcretizationTypeError:
      continue  # A traced value, as inject_hyperparams passes.
    if not in_range:
      raise ValueError(f"{name} must be in [0, {top:g}), got {value}.")


def init_statistics(params: optax.Params, layouts: Layouts | None) -> ScaleByBnpState:
  """The statistics before the first batch: mean 0 and variance 1 for every layer."""
  leaves, treedef = _flatten(params)
  mean: list[Any] = [optax.MaskedNode()] * len(leaves)
  variance = list(mean)
  for layer in find_layers(params, layouts):
    kernel = leaves[layer.kernel]
    shape = layer.layout.statistics_shape(kernel.shape)
    dtype = accumulation_dtype(kernel.dtype)
    mean[layer.kernel] = jnp.zeros(shape, dtype)
    variance[layer.kernel] = jnp.ones(shape, dtype)
  return ScaleByBnpState(
    count=jnp.zeros([], jnp.int32),
    input_mean=treedef.unflatten(mean),
    input_variance=treedef.unflatten(variance),
    nonfinite_count=jnp.zeros([], jnp.int32),
  )


def advance_statistics(
  updates: optax.Updates,
  state: ScaleByBnpState,
  stats: Any,
  layouts: Layouts | None,
  decay: chex.Numeric,
  eps_relative: chex.Numeric,
  eps_absolute: chex.Numeric,
) -> tuple[ScaleByBnpState, list[tuple[Layer, Preconditioner]]]:
  """Steps 2 and 3 for every layer: the new running statistics and the preconditioners they give."""
  leaves, treedef = _flatten(updates)
  layers = find_layers(updates, layouts)
  mean, variance = _state_leaves(state, treedef, leaves, layers)
  seen = _statistics_of(layers, leaves, stats)

  preconditioners = []
  nonfinite = state.nonfinite_count
  for layer, statistics in zip(layers, seen, strict=True):
    shape = leaves[layer.kernel].shape
    mu, sigma2 = mean[layer.kernel], variance[layer.kernel]
    dtype = mu.dtype
    rho, eps_1, eps_2 = (jnp.asarray(x, dtype) for x in (decay, eps_relative, eps_absolute))
    statistics = jax.tree.map(lambda x, dtype=dtype: x.astype(dtype), statistics)
    rows, examples = statistics.rows[..., None], jnp.maximum(statistics.examples, 1)[..., None]

    if layer.bias is None:
      # Without a bias nothing can be centred, and the norms of H's columns are its second moments.
      mu_H, sigma2_H, rows_H = jnp.zeros_like(mu), statistics.mean_square, jnp.zeros_like(rows)
    else:
      mu_H, sigma2_H, rows_H = statistics.mean, statistics.variance, rows
    new_mu, new_sigma2 = _preconditioner.update_statistics(mu, sigma2, mu_H, sigma2_H, rows_H, rho)

    finite = jnp.all(jnp.isfinite(new_mu) & jnp.isfinite(new_sigma2), axis=-1, keepdims=True)
    nonfinite += jnp.sum(~finite, dtype=jnp.int32)
    mu = mean[layer.kernel] = jnp.where(finite, new_mu, mu)
    sigma2 = variance[layer.kernel] = jnp.where(finite, new_sigma2, sigma2)

    mu, sigma2 = (layer.layout.statistics_to_canonical(x, shape) for x in (mu, sigma2))
    preconditioners.append(
      (
        layer,
        _preconditioner.preconditioner(
          mu,
          sigma2,
          layer.layout.window_size(shape),
          layer.layout.scalars_to_canonical(examples),
          layer.layout.scalars_to_canonical(rows / examples),
          eps_1,
          eps_2,
        ),
      )
    )
  new_state = ScaleByBnpState(
    count=optax.safe_increment(state.count),
    input_mean=treedef.unflatten(mean),
    input_variance=treedef.unflatten(variance),
    nonfinite_count=nonfinite,
  )
  return new_state, preconditioners


def map_layers(
  fn: Callable[[Preconditioner, jax.Array, jax.Array | None], tuple[jax.Array, jax.Array | None]],
  preconditioners: Iterable[tuple[Layer, Preconditioner]],
  tree: optax.Updates,
) -> optax.Updates:
  """Applies ``fn(P, kernel, bias)`` to every layer of a tree, and leaves the other leaves alone."""
  leaves, treedef = _flatten(tree)
  for layer, p in preconditioners:
    kernel, bias = leaves[layer.kernel], None if layer.bias is None else leaves[layer.bias]
    dtype = accumulation_dtype(kernel.dtype, p.mu.dtype)
    w, b = layer.layout.to_canonical(
      kernel.astype(dtype), None if bias is None else bias.astype(dtype)
    )
    p = Preconditioner(*(x.astype(dtype) for x in p))
    w, b = layer.layout.from_canonical(*fn(p, w, b), kernel.shape)
    for i, x in ((layer.kernel, w), (layer.bias, b)):
      if i is not None and x is not None:
        leaves[i] = x.astype(leaves[i].dtype)
  return treedef.unflatten(leaves)


def find_layers(tree: Any, layouts: Layouts | None) -> list[Layer]:
  """The layers whose kernels are in a tree of parameters or gradients.

  Raises:
    ValueError: if a kernel is no kernel of a linear layer, or stands without the bias that
      belongs to it.
  """
  named = flatten(tree, optax.MaskedNode)
  leaves = [leaf for _, leaf in named]
  index = {path: i for i, (path, _) in enumerate(named)}
  if layouts and not any(path in index for path in layouts):
    raise ValueError(
      f"None of the kernels that layers= names is in the parameters. It names {_names(layouts)}; "
      f"the parameters are {_names(index)}. Trace the model that these parameters belong to, and "
      'give this transformation the "params" collection itself.'
    )
  layers = []
  for path, i in index.items():
    if not path or (path[-1] != "kernel" if layouts is None else path not in layouts):
      continue
    # A layer goes by its module's name, unless that has several kernels.
    where = path[:-1] if path[-1] == "kernel" else path
    bias_name = "bias" if layouts is None else layouts[path].bias
    kernel, j = leaves[i], index.get((*path[:-1], bias_name))
    bias = None if j is None else leaves[j]
    if _is_masked(kernel):
      if bias is not None and not _is_masked(bias):
        raise ValueError(_torn(where, "bias", "kernel"))
      continue
    if _is_masked(bias):
      raise ValueError(_torn(where, "kernel", "bias"))
    if not jnp.issubdtype(kernel.dtype, jnp.floating):
      raise ValueError(
        f"Layer {_name(where)}: BNP is defined for real kernels, but this one is {kernel.dtype}. "
        "Leave the layer out with optax.masked or optax.partition."
      )
    if layouts is not None:
      layout = layouts[path]
    elif kernel.ndim >= 2:
      layout = KernelLayout.by_convention(kernel.ndim)
    else:
      raise ValueError(
        f"Layer {_name(where)}: a kernel of shape {kernel.shape} is not that of a Dense or Conv. "
        "Leave the layer out with optax.masked or optax.partition."
      )
    if layout.ndim != kernel.ndim:
      raise ValueError(
        f"Layer {_name(where)}: layers= has a layout of {layout.ndim} axes for it, {layout}, but "
        f"its kernel has shape {kernel.shape}. Trace the model that these parameters belong to."
      )
    if bias is not None and bias.shape != layout.bias_shape(kernel.shape):
      raise ValueError(
        f"Layer {_name(where)}: the bias has shape {bias.shape}, but by its kernel of shape "
        f"{kernel.shape} it should have {layout.bias_shape(kernel.shape)}. If the layer is not a "
        "plain Dense or Conv, pass layers=bnp_optax.linen.layers(model, *inputs)."
      )
    layers.append(Layer(path, layout, i, j if bias is not None else None))
  return layers


def _statistics_of(layers: list[Layer], leaves: list[Any], stats: Any) -> list[LayerStatistics]:
  """What each layer saw, in the order of the layers."""
  if stats is None:
    raise ValueError(
      "BNP needs the statistics of the forward pass: call tx.update(grads, state, params, "
      "stats=stats) with what bnp_optax.linen.sow_statistics gathered. A wrapper that drops "
      "extra arguments loses them too."
    )
  found: dict[Path, LayerStatistics] = {
    (*path[:-1], leaf.kernel): leaf
    for path, leaf in flatten(stats, LayerStatistics)
    if isinstance(leaf, LayerStatistics)
  }
  if not found and layers:
    raise ValueError(
      "stats holds no LayerStatistics. Was the forward pass run with "
      'mutable=["intermediates"], and within `with bnp_optax.linen.sow_statistics():`? The '
      "context belongs inside the function that is jitted: around one that has been traced "
      f"already it does nothing. stats is a tree of {jax.tree.structure(stats)}."
    )
  if missing := [layer for layer in layers if layer.path not in found]:
    raise ValueError(
      f"No statistics for {_names(layer.path[:-1] for layer in missing)}. They came for "
      f"{_names(path[:-1] for path in found)}. If these layers did not run, or are no Dense or "
      "Conv, leave them out of this optimizer with optax.masked or optax.partition, or name the "
      "layers it is for with "
      "layers=bnp_optax.linen.layers(model, *inputs). If they ran under nn.scan or nn.vmap, add "
      '"intermediates" to its variable_axes.'
    )
  if other := [layer for layer in layers if _is_another(layer.layout, found[layer.path].layout)]:
    raise ValueError(
      f"These layers are no plain Dense or Conv, and their kernels' axes are not what they were "
      f"taken for: {_names(layer.path[:-1] for layer in other)}. Pass "
      "layers=bnp_optax.linen.layers(model, *inputs) (or bnp_optax.nnx.layers(model, *inputs)), "
      "traced from this model, with the same exact_windows= as in sow_statistics."
    )
  merged = []
  for layer in layers:
    shape, statistics = leaves[layer.kernel].shape, found[layer.path]
    expected, saw = layer.layout.statistics_shape(shape), statistics.total.shape
    if len(saw) == len(expected) + len(layer.layout.calls):
      statistics = merge_call_axes(statistics, layer.layout.calls)
    if expected != statistics.total.shape:
      raise ValueError(
        f"Layer {layer}: its kernel of shape {shape} takes inputs of shape {expected}, but the "
        f"statistics are of {saw}. Were they taken from another model, or under jax.vmap without "
        "summing the mapped axis? If the layer is not a plain Dense or Conv, or ran under nn.scan "
        "or nn.vmap, pass layers=bnp_optax.linen.layers(model, *inputs)."
      )
    merged.append(statistics)
  return merged


def _is_another(layout: KernelLayout, seen: KernelLayout | None) -> bool:
  """Whether the layer itself saw its kernel otherwise; what is stacked from outside, it cannot."""
  return seen is not None and (
    seen != dataclasses.replace(layout, calls=())
    if seen.ndim == layout.ndim
    else seen.exact_windows != layout.exact_windows
  )


def _state_leaves(
  state: ScaleByBnpState, treedef: Any, leaves: list[Any], layers: list[Layer]
) -> tuple[list[Any], list[Any]]:
  """The leaves of the state's mean and variance, after a check that they fit the gradients."""
  mean, variance = _flatten(state.input_mean), _flatten(state.input_variance)
  expected = {
    layer.kernel: layer.layout.statistics_shape(leaves[layer.kernel].shape) for layer in layers
  }
  for i, layer in ((layer.kernel, layer) for layer in layers):
    for tree, x in (("input_mean", mean[0][i : i + 1]), ("input_variance", variance[0][i : i + 1])):
      saw = None if not x or _is_masked(x[0]) else x[0].shape
      if saw != expected[i]:
        raise ValueError(
          f"Layer {layer}: the state's {tree} should be of shape {expected[i]}, found {saw}. The "
          "state was made for other parameters: call tx.init with these."
        )
  if not treedef == mean[1] == variance[1] or any(
    not _is_masked(x) for i, x in enumerate(mean[0]) if i not in expected
  ):
    raise ValueError(
      "The state was made for other parameters than these gradients: call tx.init with the "
      f"parameters. The state's structure is {mean[1]}, the gradients' is {treedef}."
    )
  return mean[0], variance[0]


def _flatten(tree: Any) -> tuple[list[Any], Any]:
  return jax.tree.flatten(tree, is_leaf=_is_masked)


def _is_masked(x: Any) -> bool:
  return isinstance(x, optax.MaskedNode)


def _name(path: Path) -> str:
  return "/".join(path) or "(the model itself)"


def _names(paths: Iterable[Path]) -> str:
  return ", ".join(_name(path) for path in paths)


def _torn(path: Path, here: str, away: str) -> str:
  return (
    f"Layer {_name(path)}: its {here} is given to BNP, its {away} is masked out. A layer's kernel "
    "and bias make up for each other's steps and belong together: mask both or neither."
  )
