"""Inner optimizers that `bnp` refuses, found in their traced functions."""

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bnp_optax._kernels import Layer
from bnp_optax._trees import flatten_masked, is_masked


def check_inner(
  inner: optax.GradientTransformationExtraArgs, params: optax.Params, layers: Sequence[Layer]
) -> None:
  """Raise ValueError if `bnp` cannot run an optimizer on these parameters."""
  started, state = jax.make_jaxpr(inner.init, return_shape=True)(params)
  nodes = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, optax.ScaleByLBFGSState))
  lbfgs = any(isinstance(x, optax.ScaleByLBFGSState) for x in nodes)
  if lbfgs or _reads_inputs(started.jaxpr):
    raise ValueError(
      "bnp: the inner optimizer keeps a copy of the parameters (as schedule_free, lookahead, "
      "prodigy, dog and lbfgs do). BNP's coordinates z = P^-1 theta move with the statistics, and "
      "the copy would be in outdated ones. Put BNP inside instead of outside, as in "
      "optax.contrib.schedule_free(bnp_optax.bnp(optax.sgd(rate)), rate)."
    )
  _refuse_split_layers(inner, params, layers, started, state)


def _refuse_split_layers(
  inner: optax.GradientTransformationExtraArgs,
  params: optax.Params,
  layers: Sequence[Layer],
  started: Any,
  state: Any,
) -> None:
  """Raise ValueError if `inner` leaves out the bias of a layer and not its kernel, or the reverse.

  A step of the kernel in z moves the bias in theta, so that a bias that is frozen or not decayed in
  z still moves or decays.
  """

  def update(gradients: Any, state: Any, z: Any, value: Any) -> Any:
    return inner.update(gradients, state, z, value=value)[0]

  try:
    stepped = jax.make_jaxpr(update)(params, state, params, jnp.zeros([]))
  except (KeyError, TypeError, ValueError):
    # The inner optimizer needs other extra arguments of update, which are unknown here.
    return
  leaves, _ = flatten_masked(params)
  # The positions of the leaves among the arguments, which do not have the masked ones.
  arrays = [i for i, x in enumerate(leaves) if not is_masked(x)]
  position = {i: n for n, i in enumerate(arrays)}
  zero: list[_Value] = ["zero"] * len(arrays)
  some: list[_Value] = ["nonzero"] * len(arrays)
  # Moments are zero before the first step and stay zero without a gradient. Counters grow.
  moments: list[_Value] = [
    value if jnp.issubdtype(aval.dtype, jnp.inexact) else "nonzero"
    for aval, value in zip(started.out_avals, _values(started, some), strict=True)
  ]
  for gradients, what in ((some, "gradient"), (zero, "values")):
    steps = _values(stepped, [*gradients, *moments, *some, "nonzero"])
    for layer in layers:
      if layer.bias is None:
        continue
      kernel, bias = steps[position[layer.kernel]], steps[position[layer.bias]]
      if {kernel, bias} == {"zero", "nonzero"}:
        one, other = ("kernel", "bias") if bias == "zero" else ("bias", "kernel")
        raise ValueError(
          f"bnp: layer {layer}: the inner optimizer changes the {one} through its {what} but not "
          f"the {other}, as with a mask or freeze on one of them. In BNP's coordinates a step "
          "of the kernel moves the bias too. Decay kernels alone outside, as in "
          "optax.chain(bnp_optax.bnp(optax.scale_by_adam()), "
          "optax.add_decayed_weights(1e-4, mask), optax.scale(-rate)), and freeze a "
          "layer's kernel and bias together."
        )


# What is known of an array while tracing. "nonzero" is an array that is not zero in general.
_Value = Literal["zero", "nonzero", "unknown"]

# Primitives whose result is zero if their first operand is.
_KEEPS_ZERO = {"abs", "broadcast_in_dim", "convert_element_type", "copy", "div", "integer_pow"}
_KEEPS_ZERO |= {"neg", "reduce_sum", "reshape", "sign", "split", "sqrt", "square", "squeeze"}
_KEEPS_ZERO |= {"tanh", "transpose"}
_SUMS = {"add", "concatenate", "select_n", "sub"}
_PRODUCTS = {"dot_general", "mul"}


def _values(closed: Any, inputs: Sequence[_Value]) -> list[_Value]:
  """Return what is known of the outputs of a closed jaxpr, given what is known of its inputs."""
  jaxpr, constants = getattr(closed, "jaxpr", closed), getattr(closed, "consts", ())
  given: list[_Value] = [*map(_value_of, constants), *inputs]
  known: dict[Any, _Value] = dict(zip([*jaxpr.constvars, *jaxpr.invars], given, strict=True))

  def read(x: Any) -> _Value:
    return _value_of(x.val) if hasattr(x, "val") else known[x]

  for equation in jaxpr.eqns:
    results = _results(equation, [read(x) for x in equation.invars])
    known.update(zip(equation.outvars, results, strict=True))
  return [read(x) for x in jaxpr.outvars]


def _results(equation: Any, operands: list[_Value]) -> list[_Value]:
  """Return what is known of the results of an equation."""
  name, settings = equation.primitive.name, equation.params
  if name == "cond":
    branches = [_values(branch, operands[1:]) for branch in settings["branches"]]
    return [_sum(results) for results in zip(*branches, strict=True)]
  if name == "jit":
    # jnp.clip keeps zeros; what it consists of, a maximum and a minimum, may not.
    shapes = [x.aval.shape for x in equation.outvars]
    clips = settings["name"] == "clip" and shapes == [equation.invars[0].aval.shape]
    return operands[:1] if clips else _values(settings["jaxpr"], operands)
  if name in _SUMS:
    result = _sum(operands[name == "select_n" :])
  elif name == "integer_pow" and settings["y"] <= 0:
    result = "nonzero"
  elif name in _KEEPS_ZERO:
    result = operands[0]
  elif name in _PRODUCTS and "zero" in operands:
    result: _Value = "zero"
  else:
    result = "nonzero" if set(operands) <= {"nonzero"} else "unknown"
  return [result] * len(equation.outvars)


def _sum(values: Iterable[_Value]) -> _Value:
  """Return what is known of a sum, and of an array that is one of several."""
  found = set(values)
  return "nonzero" if "nonzero" in found else "unknown" if "unknown" in found else "zero"


def _value_of(constant: Any) -> _Value:
  # A value on a device is not fetched.
  return "nonzero" if isinstance(constant, jax.Array) or np.any(constant) else "zero"


def _reads_inputs(jaxpr: Any) -> bool:
  """Return whether an output of a jaxpr depends on an input."""
  dependent = {*map(id, jaxpr.invars)}
  for equation in jaxpr.eqns:
    if dependent.intersection(map(id, equation.invars)):
      dependent.update(map(id, equation.outvars))
  return not dependent.isdisjoint(map(id, jaxpr.outvars))
