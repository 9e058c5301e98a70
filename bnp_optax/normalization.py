"""Batch normalization layers that Flax lacks, for comparison with BNP.

They follow `flax.linen.BatchNorm`: features are the last axis, running averages are in the
collection `batch_stats`, and `use_running_average=False` is training.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from bnp_optax._statistics import accumulation_dtype
from bnp_optax._trees import flatten

_Moments = tuple[jax.Array, jax.Array]
# The parameters of a normalization layer, and their values in the identity.
_IDENTITY = {"scale": 1.0, "bias": 0.0}


class BatchRenorm(nn.Module):
  """Batch Renormalization: BatchNorm corrected towards its running averages.

  With the mean m and the deviation s = sqrt(variance + epsilon) of the batch, their running
  averages mu and sigma before this step, and no gradient through r and d::

      r = clip(s / sigma, 1 / r_max, r_max)        d = clip((m - mu) / sigma, -d_max, d_max)
      y = scale ((x - m) / s r + d) + bias
      mu <- mu + (1 - momentum) (m - mu)           sigma <- sigma + (1 - momentum) (s - sigma)

  and y = scale (x - mu) / sigma + bias in inference. With ``r_max=1, d_max=0`` training is that of
  BatchNorm. While nothing is clipped, outputs in training equal those in inference.

  Examples:
    >>> import bnp_optax.normalization, jax, jax.numpy as jnp
    >>> norm = bnp_optax.normalization.BatchRenorm(momentum=0.9, r_max=3.0, d_max=5.0)
    >>> x = jnp.array([[1.0], [3.0]])
    >>> variables = norm.init(jax.random.key(0), x, use_running_average=False)
    >>> y, new = norm.apply(variables, x, use_running_average=False, mutable=["batch_stats"])
    >>> print(y.ravel())  # normalized with the running mean 0 and deviation 1, as in inference
    [1. 3.]
    >>> print(new["batch_stats"]["mean"], new["batch_stats"]["count"])
    [0.2] 1

  Attributes:
    use_running_average: True for inference. Give it here or to the call.
    momentum: Decay of the running averages, 1 - alpha in the paper.
    epsilon: Added to the variance.
    r_max: Upper bound of r, at least 1: a number, or a schedule over steps. The default is that of
      the paper: 1 for 5,000 steps, then linear to 3 at step 40,000.
    d_max: Upper bound of d: a number, or a schedule over steps. The default is that of the paper: 0
      for 5,000 steps, then linear to 5 at step 25,000.

  References:
    Ioffe, `Batch Renormalization: Towards Reducing Minibatch Dependence in Batch-Normalized Models
    <https://arxiv.org/abs/1702.03275>`_, NeurIPS 2017: Algorithm 1, and Section 4 for the limits.
  """

  use_running_average: bool | None = None
  momentum: float = 0.99
  epsilon: float = 1e-5
  r_max: float | optax.Schedule = optax.linear_schedule(1.0, 3.0, 35_000, 5_000)
  d_max: float | optax.Schedule = optax.linear_schedule(0.0, 5.0, 20_000, 5_000)

  @nn.compact
  def __call__(self, x: jax.Array, use_running_average: bool | None = None) -> jax.Array:
    """Normalize each feature of `x`, ``[..., features]``; keep its shape and dtype.

    Raises:
      TypeError: While tracing, if `x` does not hold floating-point numbers.
      ValueError: While tracing, if `r_max` is below 1 or `d_max` below 0.
    """
    inference = nn.merge_param("use_running_average", self.use_running_average, use_running_average)
    features, dtype = x.shape[-1], _sum_dtype(self, x)
    mean = self.variable("batch_stats", "mean", jnp.zeros, features, dtype)
    deviation = self.variable("batch_stats", "deviation", jnp.ones, features, dtype)
    count = self.variable("batch_stats", "count", jnp.zeros, (), jnp.int32)
    axes, shape = tuple(range(x.ndim - 1)), (1,) * (x.ndim - 1) + (features,)
    mu, sigma = mean.value.reshape(shape), deviation.value.reshape(shape)
    inputs = x.astype(dtype)
    if inference:
      normalized = (inputs - mu) / sigma
    else:
      r_max = self._limit("r_max", 1.0, count.value, dtype)
      d_max = self._limit("d_max", 0.0, count.value, dtype)
      m = jnp.mean(inputs, axes, keepdims=True)
      s = jnp.sqrt(jnp.var(inputs, axes, keepdims=True) + self.epsilon)
      r = jax.lax.stop_gradient(jnp.clip(s / sigma, 1 / r_max, r_max))
      d = jax.lax.stop_gradient(jnp.clip((m - mu) / sigma, -d_max, d_max))
      normalized = (inputs - m) / s * r + d
      if not self.is_initializing():
        mean.value = (mu + (1 - self.momentum) * (m - mu)).reshape(features)
        deviation.value = (sigma + (1 - self.momentum) * (s - sigma)).reshape(features)
        count.value = count.value + 1
    return _affine(self, normalized, x)

  def _limit(self, name: str, least: float, count: jax.Array, dtype: Any) -> jax.Array:
    limit = getattr(self, name)
    if not callable(limit) and limit < least:
      raise ValueError(f"{_name(self)}: {name} must be at least {least:g}, not {limit}.")
    return jnp.asarray(limit(count) if callable(limit) else limit, dtype)


class GhostBatchNorm(nn.Module):
  """BatchNorm within ghost batches and groups of channels, with the example itself in inference.

  Training divides the examples into ghost batches of consecutive examples and the channels into
  groups of consecutive channels. All values in the same ghost batch and group, over all positions,
  are normalized together: ``y = scale (x - mean) / sqrt(variance + epsilon) + bias``. This is

  - BatchNorm by default;
  - Ghost BatchNorm with `ghost_size`, a regularizer at large batches;
  - BatchNorm and GroupNorm combined with `num_groups` or `group_size`, for small batches.

  Inference averages the running E[x] and E[x^2] of each channel with those of the example, with the
  weight `example_weight`, and then over a group of channels. The weight can be chosen after
  training, on held-out data.

  The running averages are those of E[x] and E[x^2] over the whole batch, so that the running
  variance includes the variance between the means of batches. Hoffer et al. update once for each
  ghost batch, and average its deviation.

  Examples:
    >>> import bnp_optax.normalization, jax, jax.numpy as jnp
    >>> norm = bnp_optax.normalization.GhostBatchNorm(ghost_size=2)
    >>> x = jnp.array([[1.0], [3.0], [10.0], [30.0]])
    >>> variables = norm.init(jax.random.key(0), x, use_running_average=False)
    >>> y, new = norm.apply(variables, x, use_running_average=False, mutable=["batch_stats"])
    >>> print(y.ravel().round(3))
    [-1.  1. -1.  1.]
    >>> print(new["batch_stats"]["mean"])
    [0.11]

  Attributes:
    use_running_average: True for inference. Give it here or to the call.
    momentum: Decay of the running averages.
    epsilon: Added to the variance.
    ghost_size: Number of examples in a ghost batch, at most the whole batch; None for all of it.
    num_groups: Number of groups of channels. Without it and `group_size`, each channel is a group.
    group_size: Number of channels in a group, as an alternative to `num_groups`.
    example_weight: Weight of the example's moments in inference, from 0 to 1.

  References:
    Hoffer, Hubara and Soudry, `Train longer, generalize better: closing the generalization gap in
    large batch training of neural networks <https://arxiv.org/abs/1705.08741>`_, NeurIPS 2017:
    Algorithm 1.

    Summers and Dinneen, `Four Things Everyone Should Know to Improve Batch Normalization
    <https://arxiv.org/abs/1906.03548>`_, ICLR 2020, in the form of the `authors' code
    <https://github.com/ceciliaresearch/four_things_batch_norm>`_.
  """

  use_running_average: bool | None = None
  momentum: float = 0.99
  epsilon: float = 1e-5
  ghost_size: int | None = None
  num_groups: int | None = None
  group_size: int | None = None
  example_weight: float = 0.0

  @nn.compact
  def __call__(self, x: jax.Array, use_running_average: bool | None = None) -> jax.Array:
    """Normalize the channels of `x`, ``[batch, ..., channels]``; keep its shape and dtype.

    Raises:
      TypeError: While tracing, if `x` does not hold floating-point numbers.
      ValueError: While tracing, if the batch cannot be divided into ghost batches or the channels
        into groups, or if `example_weight` is not in [0, 1].
    """
    inference = nn.merge_param("use_running_average", self.use_running_average, use_running_average)
    (batch, *positions, channels), dtype = x.shape, _sum_dtype(self, x)
    groups = self._groups(channels)
    if not 0 <= (weight := self.example_weight) <= 1:
      raise ValueError(f"{_name(self)}: example_weight must be from 0 to 1, not {weight}.")
    running_mean = self.variable("batch_stats", "mean", jnp.zeros, channels, dtype)
    running_var = self.variable("batch_stats", "var", jnp.ones, channels, dtype)
    ghosts = batch if inference else self._ghosts(batch)
    # [ghosts, examples, *positions, groups, channels of a group]
    shape = (ghosts, 1 if inference else batch // ghosts, *positions, groups, channels // groups)
    values = x.astype(dtype).reshape(shape)
    axes, last = tuple(range(1, values.ndim - 2)), values.ndim - 1
    running_shape = (1,) * (values.ndim - 2) + shape[-2:]
    running = running_mean.value.reshape(running_shape), running_var.value.reshape(running_shape)
    if inference:
      mean, variance = _mix(running, _moments(values, axes), weight)
      variance = jnp.mean(variance, last, keepdims=True) + jnp.var(mean, last, keepdims=True)
      mean = jnp.mean(mean, last, keepdims=True)
    else:
      mean, variance = _moments(values, (*axes, last))
      if not self.is_initializing():
        new = _mix(running, _moments(values, (0, *axes)), 1 - self.momentum)
        running_mean.value, running_var.value = (moment.reshape(channels) for moment in new)
    normalized = (values - mean) / jnp.sqrt(variance + self.epsilon)
    return _affine(self, normalized.reshape(x.shape), x)

  def _ghosts(self, batch: int) -> int:
    size = batch if self.ghost_size is None else min(self.ghost_size, batch)
    if size < 1 or batch % size:
      what = f"{batch} examples cannot be divided into ghost batches of {self.ghost_size}"
      raise ValueError(f"{_name(self)}: {what}. Choose a ghost_size that divides the batch size.")
    return batch // size

  def _groups(self, channels: int) -> int:
    if self.num_groups is not None and self.group_size is not None:
      raise ValueError(f"{_name(self)}: give num_groups or group_size, not both.")
    if self.num_groups is not None:
      divisor, wanted = self.num_groups, f"{self.num_groups} groups: choose another num_groups"
    else:
      divisor = 1 if self.group_size is None else self.group_size
      wanted = f"groups of {divisor}: choose another group_size"
    if divisor < 1 or channels % divisor:
      raise ValueError(f"{_name(self)}: {channels} channels cannot be divided into {wanted}.")
    return channels // divisor if self.num_groups is None else divisor


def add_decayed_scale_and_bias(weight_decay: float) -> optax.GradientTransformation:
  r"""Decay the scales and biases of normalization layers towards the identity, 1 and 0.

  This adds the gradient of ``weight_decay / 2 (sum (scale - 1)^2 + sum bias^2)`` over all
  normalization layers to the updates: put it before the optimizer. A module with a parameter
  ``scale`` and no ``kernel`` is a normalization layer.

  Examples:
    >>> import bnp_optax.normalization, jax.numpy as jnp, optax
    >>> params = {
    ...   "dense": {"kernel": jnp.array([[2.0]]), "bias": jnp.array([2.0])},
    ...   "norm": {"scale": jnp.array([3.0]), "bias": jnp.array([2.0])},
    ... }
    >>> tx = bnp_optax.normalization.add_decayed_scale_and_bias(0.1)
    >>> updates, _ = tx.update(optax.tree.zeros_like(params), tx.init(params), params)
    >>> print(updates["dense"]["bias"], updates["norm"]["scale"], updates["norm"]["bias"])
    [0.] [0.2] [0.2]

  Args:
    weight_decay: Strength of the decay.

  Raises:
    ValueError: From ``update``, if it is not given the parameters.

  References:
    Summers and Dinneen, `Four Things Everyone Should Know to Improve Batch Normalization
    <https://arxiv.org/abs/1906.03548>`_, ICLR 2020. The decay of the scale towards 1 is that of the
    `authors' code <https://github.com/ceciliaresearch/four_things_batch_norm>`_.
  """

  def add(updates: Any, params: Any) -> Any:
    if params is None:
      raise ValueError("add_decayed_scale_and_bias needs the parameters: update(..., params).")
    paths = [path for path, _ in flatten(params)]

    def decayed(path: Any, update: jax.Array, param: jax.Array) -> jax.Array:
      siblings = {other[-1] for other in paths if other[:-1] == path[:-1]}
      if "scale" not in siblings or "kernel" in siblings or path[-1] not in _IDENTITY:
        return update
      return update + weight_decay * (param - _IDENTITY[path[-1]])

    leaves, treedef = jax.tree.flatten(updates)
    return treedef.unflatten(map(decayed, paths, leaves, treedef.flatten_up_to(params)))

  return optax.stateless(add)


def _mix(old: _Moments, new: _Moments, weight: float) -> _Moments:
  """Average E[x] and E[x^2] with this weight of the new, without the cancellation in a variance."""
  (mean, variance), (new_mean, new_variance) = old, new
  apart = new_mean - mean
  return (
    mean + weight * apart,
    variance + weight * (new_variance - variance) + weight * (1 - weight) * apart**2,
  )


def _moments(values: jax.Array, axes: tuple[int, ...]) -> _Moments:
  return jnp.mean(values, axes, keepdims=True), jnp.var(values, axes, keepdims=True)


def _affine(module: nn.Module, normalized: jax.Array, x: jax.Array) -> jax.Array:
  """Multiply by the scale and add the bias."""
  shape = (1,) * (x.ndim - 1) + x.shape[-1:]
  dtype = normalized.dtype
  scale, bias = (
    module.param(name, nn.initializers.constant(value), x.shape[-1:], dtype)
    for name, value in _IDENTITY.items()
  )
  scale, bias = scale.astype(dtype).reshape(shape), bias.astype(dtype).reshape(shape)
  return (normalized * scale + bias).astype(x.dtype)


def _sum_dtype(module: nn.Module, x: jax.Array) -> Any:
  if not jnp.issubdtype(x.dtype, jnp.floating):
    raise TypeError(f"{_name(module)}: inputs must be floating-point numbers, not {x.dtype}.")
  return accumulation_dtype(x.dtype)


def _name(module: nn.Module) -> str:
  """Return what errors call a module."""
  return "/".join(module.path) or type(module).__name__
