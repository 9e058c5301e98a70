"""`scale_by_bnp`: Algorithms 2 and 3 as an Optax gradient transformation.

The transformation matches each layer of the parameters with what it saw, keeps the running mean and
variance, and applies `P P^T` to the gradients. What belongs together is decided by names and shapes
while tracing; a compiled step holds arithmetic alone.
"""

from collections.abc import Callable, Iterable
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bnp_optax import _preconditioner
from bnp_optax._layers import unboxed
from bnp_optax._matching import (
  Layer,
  Layouts,
  check_state,
  find_layers,
  flatten_masked,
  match_state,
  match_statistics,
)
from bnp_optax._preconditioner import Preconditioner
from bnp_optax._statistics import accumulation_dtype


class ScaleByBnpState(NamedTuple):
  """State of `scale_by_bnp`.

  Attributes:
    count: number of updates so far, an int32 scalar.
    input_mean: the running mean of each layer's inputs. The structure of the parameters (without
      their metadata, if they have any), with an array ``[*stack, features]`` at each kernel,
      float32 (float64 where the kernel is float64), and `optax.MaskedNode` at every other leaf.
    input_variance: the running variance, likewise.
    nonfinite_count: how often a layer's statistics were not finite, or came from no rows at all,
      and were therefore left out, summed over layers and updates: an int32 scalar. It stays 0 in a
      healthy run.
  """

  count: jax.typing.ArrayLike  # pyright: ignore[reportIncompatibleMethodOverride]
  input_mean: optax.Updates
  input_variance: optax.Updates
  nonfinite_count: jax.typing.ArrayLike


def scale_by_bnp(
  decay: jax.typing.ArrayLike = 0.99,
  eps_relative: jax.typing.ArrayLike = 1e-2,
  eps_absolute: jax.typing.ArrayLike = 1e-4,
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
    <https://jmlr.org/papers/v23/20-1135.html>`_, JMLR 23(72), 2022: section 3.3 and 4.
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
  decay: jax.typing.ArrayLike,
  eps_relative: jax.typing.ArrayLike,
  eps_absolute: jax.typing.ArrayLike,
) -> None:
  """Raises ValueError for values out of range, as far as they are known while tracing."""
  for name, value, top in (
    ("decay", decay, 1.0),
    ("eps_relative", eps_relative, math.inf),
    ("eps_absolute", eps_absolute, math.inf),
  ):
    dtype = getattr(value, "dtype", None)
    if dtype is not None and jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32:
      raise ValueError(
        f"{name} is {dtype}, in which 0.999 is 1. optax.inject_hyperparams casts to the dtype of "
        "the parameters: give it hyperparam_dtype=jnp.float32."
      )
    try:
      in_range = 0 <= float(value) < top  # pyright: ignore[reportArgumentType]
    except jax.errors.ConcretizationTypeError:
      continue  # A traced value, as inject_hyperparams passes.
    if not in_range:
      raise ValueError(f"{name} must be in [0, {top:g}), got {value}.")


def init_statistics(params: optax.Params, layouts: Layouts | None) -> ScaleByBnpState:
  """The statistics before the first batch: mean 0 and variance 1 for every layer."""
  params = unboxed(params)
  leaves, treedef = flatten_masked(params)
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
  decay: jax.typing.ArrayLike,
  eps_relative: jax.typing.ArrayLike,
  eps_absolute: jax.typing.ArrayLike,
) -> tuple[ScaleByBnpState, list[tuple[Layer, Preconditioner]]]:
  """Steps 2 and 3 for every layer: the new running statistics and the preconditioners they give."""
  check_state(state, ScaleByBnpState)
  updates = unboxed(updates)
  leaves, treedef = flatten_masked(updates)
  layers = find_layers(updates, layouts)
  mean = match_state("input_mean", state.input_mean, treedef, leaves, layers)
  variance = match_state("input_variance", state.input_variance, treedef, leaves, layers)
  seen = match_statistics(layers, leaves, stats)

  preconditioners = []
  nonfinite = state.nonfinite_count
  for layer, statistics in zip(layers, seen, strict=True):
    shape = leaves[layer.kernel].shape
    mu, sigma2 = mean[layer.kernel], variance[layer.kernel]
    dtype = mu.dtype
    # 1 - decay is taken before it is rounded: of 0.99 in float32, 1 % has lost a digit.
    one_minus_rho, eps_1, eps_2 = (
      jnp.asarray(x, dtype) for x in (1 - decay, eps_relative, eps_absolute)
    )
    statistics = jax.tree.map(lambda x, dtype=dtype: x.astype(dtype), statistics)
    rows, examples = statistics.rows[..., None], jnp.maximum(statistics.examples, 1)[..., None]

    if layer.bias is None:
      # Without a bias nothing can be centred, and the norms of H's columns are its second moments.
      mu_H, sigma2_H, rows_H = jnp.zeros_like(mu), statistics.mean_square, jnp.zeros_like(rows)
    else:
      mu_H, sigma2_H, rows_H = statistics.mean, statistics.variance, rows
    new_mu, new_sigma2 = _preconditioner.update_statistics(
      mu, sigma2, mu_H, sigma2_H, rows_H, one_minus_rho
    )

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
  leaves, treedef = flatten_masked(tree)
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
