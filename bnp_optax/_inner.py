"""Inner optimizers that `bnp` refuses, found by the dependencies in their traced functions."""

from collections.abc import Sequence
from typing import Any

import jax
import optax

from bnp_optax._matching import Layer
from bnp_optax._trees import flatten_masked, is_masked


def refuse_copies_of_parameters(inner: optax.GradientTransformation, params: optax.Params) -> None:
  """Raise ValueError if the state of `inner` depends on the values of the parameters."""
  closed, state = jax.make_jaxpr(inner.init, return_shape=True)(params)
  nodes = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, optax.ScaleByLBFGSState))
  lbfgs = any(isinstance(x, optax.ScaleByLBFGSState) for x in nodes)
  if lbfgs or any(_dependencies(closed.jaxpr)):
    raise ValueError(
      "bnp: the inner optimizer keeps a copy of the parameters (as schedule_free, lookahead, "
      "prodigy, dog and lbfgs do). BNP's coordinates z = P^-1 theta move with the statistics, and "
      "the copy would be in outdated ones. Put BNP inside instead of outside, as in "
      "optax.contrib.schedule_free(bnp_optax.bnp(optax.sgd(rate)), rate)."
    )


def refuse_split_layers(
  inner: optax.GradientTransformationExtraArgs, params: optax.Params, layers: Sequence[Layer]
) -> None:
  """Raise ValueError if `inner` leaves out the bias of a layer and not its kernel, or the reverse.

  A step of the kernel in z moves the bias in theta, so that a bias that is frozen or not decayed in
  z moves or decays all the same.
  """

  def update(gradients: Any, z: Any) -> Any:
    return inner.update(gradients, inner.init(z), z)[0]

  try:
    closed = jax.make_jaxpr(update)(params, params)
  except (KeyError, TypeError, ValueError):
    # The inner optimizer needs extra arguments of update, which are unknown here.
    return
  leaves, _ = flatten_masked(params)
  # The positions of the leaves among the arguments, which do not have the masked ones.
  arrays = [i for i, x in enumerate(leaves) if not is_masked(x)]
  position = {i: n for n, i in enumerate(arrays)}
  dependencies = _dependencies(closed.jaxpr)
  for layer in layers:
    if layer.bias is None:
      continue
    kernel, bias = position[layer.kernel], position[layer.bias]
    for first, what in ((0, "gradient"), (len(arrays), "values")):
      of_kernel = first + kernel in dependencies[kernel]
      if of_kernel != (first + bias in dependencies[bias]):
        one, other = ("kernel", "bias") if of_kernel else ("bias", "kernel")
        raise ValueError(
          f"bnp: layer {layer}: the inner optimizer steps the {one} by its {what} and the {other} "
          "not, as with a mask, freeze or set_to_zero on one of them. In BNP's coordinates a step "
          "of the kernel moves the bias too. Decay kernels alone outside, as in "
          "optax.chain(bnp_optax.bnp(optax.scale_by_adam()), "
          "optax.add_decayed_weights(1e-4, mask), optax.scale(-rate)), and freeze a "
          "layer's kernel and bias together."
        )


def _dependencies(jaxpr: Any) -> list[set[int]]:
  """Return, for each output of a jaxpr, the numbers of the inputs that it depends on."""
  inputs = {id(x): {i} for i, x in enumerate(jaxpr.invars)}
  for equation in jaxpr.eqns:
    found = set[int]().union(*(inputs.get(id(x), ()) for x in equation.invars))
    inputs.update((id(x), found) for x in equation.outvars)
  return [inputs.get(id(x), set()) for x in jaxpr.outvars]
