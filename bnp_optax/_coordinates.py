"""`bnp(inner)`: any optimizer, run in the coordinates that BNP chooses."""

from typing import Any, NamedTuple

import jax
import optax

from bnp_optax import _preconditioner
from bnp_optax._matching import check_state
from bnp_optax._transform import (
  Layouts,
  ScaleByBnpState,
  advance_statistics,
  check_hyperparameters,
  init_statistics,
  map_layers,
)


class BnpState(NamedTuple):
  """State of `bnp`.

  Attributes:
    statistics: the running statistics of the layers' inputs.
    inner_state: the state of the inner optimizer, in the coordinates :math:`z`.
  """

  statistics: ScaleByBnpState
  inner_state: optax.OptState


def bnp(
  inner: optax.GradientTransformation,
  decay: jax.typing.ArrayLike = 0.99,
  eps_relative: jax.typing.ArrayLike = 1e-2,
  eps_absolute: jax.typing.ArrayLike = 1e-4,
  *,
  layers: Layouts | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Run any optimizer on :math:`z`, where :math:`\theta = P z` and :math:`P` is BNP's.

  This is section 3.1 of the paper taken at its word. The inner optimizer is given the gradient with
  respect to :math:`z` and, where it reads the parameters, :math:`z` itself; its step goes back:

  .. math::
    \Delta\theta = P \, \text{inner}(P^T \nabla_\theta L, \; P^{-1} \theta)

  With plain `optax.sgd` this equals ``optax.chain(scale_by_bnp(), optax.sgd(rate))``. With any
  optimizer that is not linear in the gradient, such as Adam, it does not, and this is the one to
  use: by Proposition 7, ``bnp(optax.adam(rate))`` is Adam on the network with batch normalization.
  Decoupled weight decay in the inner optimizer means the same as outside, as :math:`P z = \theta`.

  Examples:
    >>> import bnp_optax, flax.linen as nn, jax, jax.numpy as jnp, optax
    >>> model = nn.Dense(1)
    >>> x = jax.random.uniform(jax.random.key(0), (8, 5))
    >>> params = model.init(jax.random.key(1), x)["params"]
    >>> tx = bnp_optax.bnp(optax.adam(1e-2))
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
    >>> for _ in range(300):
    ...   params, opt_state, loss = step(params, opt_state)
    >>> bool(loss < 1e-2)
    True

  Args:
    inner: the optimizer, its learning rate and schedules included. Extra arguments of ``update``
      other than ``stats`` reach it.
    decay: as in `bnp_optax.scale_by_bnp`.
    eps_relative: as in `bnp_optax.scale_by_bnp`.
    eps_absolute: as in `bnp_optax.scale_by_bnp`.
    layers: as in `bnp_optax.scale_by_bnp`.

  Returns:
    An optimizer whose ``update`` takes the keyword ``stats``, as that of `bnp_optax.scale_by_bnp`.

  Raises:
    ValueError: whatever `bnp_optax.scale_by_bnp` raises; from ``init``, if the inner optimizer
      keeps a copy of the parameters (the coordinates move with the statistics, and a copy would
      stay behind in old ones); and from ``update``, for ``value_fn`` and ``grad``, which line
      searches take.

  References:
    Lange, Helfrich, Ye, `Batch Normalization Preconditioning for Neural Network Training
    <https://jmlr.org/papers/v23/20-1135.html>`_, JMLR 23(72), 2022: equations 7, 8 and 15.
  """
  check_hyperparameters(decay, eps_relative, eps_absolute)
  inner = optax.with_extra_args_support(inner)

  def init_fn(params: optax.Params) -> BnpState:
    statistics = init_statistics(params, layers)
    _refuse_copies_of_parameters(inner, params)
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
    if extra_args.keys() & {"grad", "value_fn"}:
      raise ValueError(
        "bnp: the inner optimizer is given value_fn= or grad=, as line searches are. It would take "
        "them to be of BNP's coordinates z, and they are of the parameters. Put the line search "
        "after BNP, as in optax.chain(bnp_optax.scale_by_bnp(), optax.scale(-1), "
        "optax.scale_by_backtracking_linesearch(15)); its value_fn then has to take stats= as well."
      )
    statistics, P = advance_statistics(
      updates, state.statistics, stats, layers, decay, eps_relative, eps_absolute
    )
    updates = map_layers(_preconditioner.apply_transpose, P, updates)
    z = None if params is None else map_layers(_preconditioner.apply_inverse, P, params)
    updates, inner_state = inner.update(updates, state.inner_state, z, **extra_args)
    return map_layers(_preconditioner.apply, P, updates), BnpState(statistics, inner_state)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)  # pyright: ignore[reportArgumentType]


def _refuse_copies_of_parameters(inner: optax.GradientTransformation, params: optax.Params) -> None:
  """Raises ValueError if what `inner` keeps depends on the values of the parameters."""
  closed, state = jax.make_jaxpr(inner.init, return_shape=True)(params)
  jaxpr = closed.jaxpr
  kinds = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, optax.ScaleByLBFGSState))
  lbfgs = any(isinstance(x, optax.ScaleByLBFGSState) for x in kinds)
  used = {id(x) for x in jaxpr.outvars}.union(id(x) for eqn in jaxpr.eqns for x in eqn.invars)
  if lbfgs or any(id(x) in used for x in jaxpr.invars):
    raise ValueError(
      "bnp: the inner optimizer keeps a copy of the parameters (as schedule_free, lookahead, "
      "prodigy, dog and lbfgs do), but BNP's coordinates z = P^-1 theta move with the statistics, "
      "and the copy would stay behind in old ones. Put BNP inside instead of around it, as in "
      "optax.contrib.schedule_free(bnp_optax.bnp(optax.sgd(rate)), rate)."
    )
