"""`scale_by_bnp` and `bnp`: BNP as a gradient transformation, and around any optimizer."""

from __future__ import annotations

from typing import Any, NamedTuple

from jax.typing import ArrayLike
import optax

from bnp_optax import _preconditioner
from bnp_optax._inner import check_inner
from bnp_optax._kernels import Layouts, find_layers
from bnp_optax._matching import check_parameters, check_state
from bnp_optax._running import RunningStatistics, ScaleByBnpState
from bnp_optax._taps import zero_taps


def scale_by_bnp(
  decay: ArrayLike = 0.99,
  eps_relative: ArrayLike = 1e-2,
  eps_absolute: ArrayLike = 1e-4,
  *,
  debias: bool = True,
  lag_guard: ArrayLike | None = None,
  scale_layers: bool = True,
  layers: Layouts | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Precondition gradients as batch normalization would, without a layer in the network.

  For each linear layer, with the mean :math:`\mu_H` and variance :math:`\sigma_H^2` of its inputs
  over the batch (Algorithms 2 and 3 of Lange, Helfrich and Ye, 2022):

  .. math::
    W &\leftarrow \rho W + 1, \qquad K = 1 / W, \qquad d = \mu_H - \mu \\
    \mu &\leftarrow \mu + K d, \qquad
    \sigma^2 \leftarrow (1 - K) \sigma^2 + K \sigma_H^2 + K (1 - K) d^2 \\
    \tilde\sigma^2 &= \sigma^2 + \epsilon_1 \max(\sigma^2) + \epsilon_2, \qquad
    q^2 = \max(k^2 c / N, \sqrt{rs}) \\
    G_w &\leftarrow \frac{1}{q^2} (G_w - \mu G_b) / \tilde\sigma^2 \\
    G_b &\leftarrow \frac{1}{q^2} G_b - \sum \mu G_w

  where initially :math:`W = 0`, :math:`k^2 c` is the number of inputs of one output, :math:`N` the
  number of examples and :math:`rs` the number of output positions (1 for a dense layer on
  ``[batch, features]``). A layer without bias cannot be centred; there :math:`\mu = 0` and
  :math:`\sigma_H^2 = E[h^2]`. Parameters that belong to no linear layer pass through unchanged.

  The first two lines are not those of the paper, which are
  :math:`\mu \leftarrow \rho \mu + (1 - \rho) \mu_H` and
  :math:`\sigma^2 \leftarrow \rho \sigma^2 + (1 - \rho) \sigma_H^2` from :math:`\mu = 0` and
  :math:`\sigma^2 = 1`. ``debias=False`` selects them.

  Chain it with `optax.sgd`, with or without momentum. An optimizer that rescales each coordinate,
  such as Adam, breaks the relation between the steps of a weight and of its bias: use
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
    decay: Decay of the running statistics, the paper's :math:`\rho`, in [0, 1). For long runs of a
      layer with :math:`n` inputs and :math:`R` rows in a batch, choose about :math:`1 - 2 R / n` or
      somewhat less: 0.999 for 3,072 inputs at batch size 1.
    eps_relative: :math:`\epsilon_1 \geq 0`, relative to the largest variance of the layer's inputs.
    eps_absolute: :math:`\epsilon_2 \geq 0`.
    debias: Whether the running mean and variance are weighted averages over all batches so far,
      where a batch of age :math:`a` has the weight :math:`\rho^a`, whatever its number of rows. If
      False, they start from mean 0 and variance 1, as in the paper, and are biased towards them for
      a few hundred steps.
    lag_guard: Constant :math:`c \geq 0`, or None for no guard. With it, the step of each layer with
      a bias is divided by :math:`\max(1, (1 + l^2) / (1 + c n / R))`, where :math:`l^2` is the sum
      of :math:`(\mu_H - \mu)^2 / \tilde\sigma^2` over the :math:`n` inputs of one output, and
      :math:`R` is the number of rows of the batch. It makes smaller steps where the inputs of a
      layer move faster than its running mean follows. A bound on the step prevents more
      divergence (`optax.adaptive_grad_clip` inside `bnp`). Not in the paper.
    scale_layers: Whether the step of each layer is divided by :math:`q^2`, which gives the Hessian
      blocks of all layers the same norm. False sets :math:`q = 1`.
    layers: Layouts of the kernels, as `bnp_optax.linen.layers` or `bnp_optax.nnx.layers` returns
      them. None for Dense and Conv by convention: a leaf named ``kernel`` with features at axis -2,
      outputs at axis -1 and the window before, and an optional leaf named ``bias`` beside it.

  Returns:
    A transformation whose ``update`` takes the keyword ``stats``. They are the statistics of the
    forward pass that the gradients come from, as `bnp_optax.linen.sow_statistics` gathers them. A
    whole ``intermediates`` collection works; other values sown there are ignored. The gradient of
    `bnp_optax.linen.Tapped` carries the statistics, and needs no ``stats``. Gradients keep their
    dtype. Numeric arguments may be arrays, or schedules through `optax.inject_hyperparams`.

  Raises:
    TypeError: If a number is of another type, such as a schedule, or if `layers` is not a mapping
      from paths to layouts.
    ValueError: On creation, if `decay`, an epsilon or `lag_guard` is out of range. From ``init``
      and ``update``, while tracing, if kernels, biases, statistics and state do not fit together.
      Each message names the layer.

  References:
    Lange, Helfrich, Ye, `Batch Normalization Preconditioning for Neural Network Training
    <https://jmlr.org/papers/v23/20-1135.html>`_, JMLR 23(72), 2022: section 3.3 and 4.
  """
  running = RunningStatistics(
    decay, eps_relative, eps_absolute, debias, lag_guard, scale_layers, layers
  )

  def update_fn(
    updates: optax.Updates,
    state: ScaleByBnpState,
    params: optax.Params | None = None,
    *,
    stats: Any = None,
    **extra_args: Any,
  ) -> tuple[optax.Updates, ScaleByBnpState]:
    del params, extra_args
    state, preconditioners = running.update(updates, state, stats)
    return zero_taps(preconditioners.map(_preconditioner.precondition, updates)), state

  return optax.GradientTransformationExtraArgs(running.init, update_fn)  # pyright: ignore[reportArgumentType]


# Extra arguments of update that refer to the parameters, not to BNP's coordinates.
_OF_THETA = {"grad", "grad_fn", "obj_fn", "value_fn"}


class BnpState(NamedTuple):
  """State of `bnp`.

  Attributes:
    statistics: Running statistics of the layers' inputs.
    inner_state: State of the inner optimizer, in the coordinates :math:`z`.
  """

  statistics: ScaleByBnpState
  inner_state: optax.OptState


def bnp(
  inner: optax.GradientTransformation,
  decay: ArrayLike = 0.99,
  eps_relative: ArrayLike = 1e-2,
  eps_absolute: ArrayLike = 1e-4,
  *,
  debias: bool = True,
  lag_guard: ArrayLike | None = None,
  scale_layers: bool = True,
  layers: Layouts | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Run any optimizer on :math:`z`, where :math:`\theta = P z` and :math:`P` is BNP's.

  This applies the change of variable of section 3.1 of the paper to any optimizer. The inner
  optimizer receives the gradient with respect to :math:`z` and, if it reads the parameters,
  :math:`z` itself. Its step is mapped back:

  .. math::
    \Delta\theta = P \, \text{inner}(P^T \nabla_\theta L, \; P^{-1} \theta)

  With plain `optax.sgd` this equals ``optax.chain(scale_by_bnp(), optax.sgd(rate))``. With an
  optimizer that is not linear in the gradient, such as Adam, it does not. Use this function for
  such an optimizer: where :math:`q = 1`, by Proposition 7, ``bnp(optax.adam(rate))`` is Adam on the
  network with batch normalization whose statistics are frozen. Decoupled weight decay of kernels
  and biases has the same effect inside and outside, as :math:`P z = \theta`. Decay of the kernels
  alone goes outside: ``optax.chain(bnp(optax.scale_by_adam()), optax.add_decayed_weights(1e-4,
  mask), optax.scale(-rate))``.

  Examples:
    >>> import bnp_optax, flax.linen as nn, jax, jax.numpy as jnp, optax
    >>> model, x = nn.Dense(1), jax.random.uniform(jax.random.key(0), (8, 5))
    >>> params = model.init(jax.random.key(1), x)["params"]
    >>> tx = bnp_optax.bnp(optax.adam(1e-2))
    >>> def loss_fn(params):
    ...   with bnp_optax.linen.sow_statistics():
    ...     y, aux = model.apply({"params": params}, x, mutable=["intermediates"])
    ...   return jnp.mean((y - 2.0) ** 2), aux["intermediates"]
    >>> (loss, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
    >>> updates, opt_state = tx.update(grads, tx.init(params), params, stats=stats)
    >>> bool(loss_fn(optax.apply_updates(params, updates))[0] < loss)
    True

  Args:
    inner: The optimizer, including its learning rate and schedules. It receives the extra arguments
      of ``update`` other than ``stats`` and those that refer to the parameters: ``value_fn``,
      ``grad``, ``grad_fn`` and ``obj_fn``.
    decay: As in `bnp_optax.scale_by_bnp`.
    eps_relative: As in `bnp_optax.scale_by_bnp`.
    eps_absolute: As in `bnp_optax.scale_by_bnp`.
    debias: As in `bnp_optax.scale_by_bnp`.
    lag_guard: As in `bnp_optax.scale_by_bnp`. The guard divides the step that is mapped back.
    scale_layers: As in `bnp_optax.scale_by_bnp`. An inner optimizer that ignores the scale of its
      gradient scales its steps by :math:`1/q`, not :math:`1/q^2`. Try False with `optax.contrib.
      muon`, which sets the scale of the steps of dense layers itself.
    layers: As in `bnp_optax.scale_by_bnp`.

  Returns:
    An optimizer whose ``update`` takes the keyword ``stats``, as in `bnp_optax.scale_by_bnp`.

  Raises:
    TypeError: If `inner` is not an optimizer, and in the cases of `bnp_optax.scale_by_bnp`.
    ValueError: In the cases of `bnp_optax.scale_by_bnp`. From ``init``, if the inner optimizer
      keeps a copy of the parameters: the coordinates move with the statistics, and the copy would
      stay in outdated coordinates; or if it leaves out the bias of a layer and not its kernel, or
      the reverse, as with a mask. From ``update``, if the inner optimizer needs what it does not
      receive, as line searches do.

  References:
    Lange, Helfrich, Ye, `Batch Normalization Preconditioning for Neural Network Training
    <https://jmlr.org/papers/v23/20-1135.html>`_, JMLR 23(72), 2022: equations 7, 8 and 15.
  """
  running = RunningStatistics(
    decay, eps_relative, eps_absolute, debias, lag_guard, scale_layers, layers
  )
  if not (hasattr(inner, "init") and hasattr(inner, "update")):
    raise TypeError(f"inner must be an optimizer, such as optax.adam(1e-3), got {inner!r}.")
  inner = optax.with_extra_args_support(inner)

  def init_fn(params: optax.Params) -> BnpState:
    statistics = running.init(params)
    check_inner(inner, params, find_layers(params, layers))
    return BnpState(statistics, inner.init(params))

  def update_fn(
    updates: optax.Updates,
    state: BnpState,
    params: optax.Params | None = None,
    *,
    stats: Any = None,
    **extra_args: Any,
  ) -> tuple[optax.Updates, BnpState]:
    check_state(state, BnpState)
    statistics, preconditioners = running.update(updates, state.statistics, stats)
    updates = zero_taps(preconditioners.map(_preconditioner.apply_transpose, updates))
    if (z := params) is not None:
      check_parameters(params, updates)
      z = preconditioners.map(_preconditioner.apply_inverse, params)
    kept = {name: x for name, x in extra_args.items() if name not in _OF_THETA}
    try:
      updates, inner_state = inner.update(updates, state.inner_state, z, **kept)
    except (TypeError, ValueError) as error:
      if len(kept) == len(extra_args):
        raise
      raise ValueError(
        "bnp: the inner optimizer failed without value_fn= or grad=, the arguments of line "
        "searches, or grad_fn= or obj_fn=, those of sam and sophia. They refer to the parameters, "
        "but it runs in BNP's coordinates z. Put the line search after BNP, as in "
        "optax.chain(bnp_optax.scale_by_bnp(), optax.scale(-1), "
        "optax.scale_by_backtracking_linesearch(15)); its value_fn then has to take stats= as well."
      ) from error
    # Yogi and added noise move parameters whose gradient is 0, and weight decay reads them.
    updates = zero_taps(preconditioners.map(_preconditioner.apply, updates))
    return updates, BnpState(statistics, inner_state)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)  # pyright: ignore[reportArgumentType]
