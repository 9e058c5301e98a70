"""Condition numbers of the first unit of the output layer during training (Figure 8).

The Hessian of the loss with respect to that unit's bias and weights is H^T S H (Proposition 2); for
cross entropy S is the diagonal of p (1 - p) / N. With more weights than examples it is singular,
and its small eigenvalues are lost to rounding. Therefore its condition number is computed as the
square of that of S^(1/2) H, in float64.
"""

from typing import Any

import jax
import numpy as np

from bnp_experiments import training
from bnp_experiments.models import MLP
from bnp_optax import conditioning

_STEPS_APART = 5
# Relative and absolute epsilon.
_EPSILONS = {"paper": (1e-2, 1e-4), "none": (0.0, 0.0)}


def trace(
  setup: training.Setup, rate: float, epochs: int, examples: training.Examples, seed: int
) -> dict[str, Any]:
  """Train one run and measure condition numbers before every fifth step, on the batch of the step.

  Args:
    setup: The setup of the training, of a fully connected network without norm.
    rate: The learning rate.
    epochs: The number of epochs.
    examples: The training examples.
    seed: The seed of the run.

  Returns:
    Lists with one number for each measurement: the number of completed `steps` and the condition
    number of the Hessian (`plain`). With BNP also the condition numbers of the preconditioned
    Hessian (`preconditioned`) and of D (`D`), each with the paper's epsilons and with none.
  """
  lanes = training.make_lanes([seed], [rate])
  state = jax.tree.map(lambda leaf: leaf[0], training.init(setup, lanes, examples.images))
  take_steps = jax.jit(training.take_steps, static_argnums=0)
  measured: dict[str, Any] = {"steps": [], "plain": []}
  for epoch in range(1, epochs + 1):
    (order,) = training.epoch_order(lanes.seeds, epoch, len(examples.images))
    for first in range(0, setup.steps, _STEPS_APART):
      batch = order[first * setup.batch_size : (first + 1) * setup.batch_size]
      measured["steps"].append((epoch - 1) * setup.steps + first)
      for name, value in _measure(setup, state, examples.images[batch]).items():
        measured.setdefault(name, []).append(value)
      steps = training.Steps(epoch, first, min(_STEPS_APART, setup.steps - first))
      state, _ = take_steps(setup, state, lanes.lane(0), order, steps, examples)
  return measured


def _measure(
  setup: training.Setup, state: training.LaneState, images: jax.Array
) -> dict[str, float]:
  hidden, logits = (np.asarray(x, np.float64) for x in _forward(setup.model, state.params, images))
  exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
  p = exponentials[:, 0] / exponentials.sum(axis=1)
  H = np.column_stack([np.ones(len(hidden)), hidden])
  root = np.sqrt(p * (1 - p) / len(p))[:, None] * H
  measured = {"plain": _kappa(root) ** 2}
  if setup.method.bnp is not None:
    bnp = state.opt_state[0]
    layer = _layers(state.params)[-1]
    kernel = state.params[layer]["kernel"]
    mean, variance = bnp.input_mean[layer]["kernel"], bnp.input_variance[layer]["kernel"]
    with jax.enable_x64(True):
      mean, variance = (jax.numpy.asarray(x, "float64") for x in (mean, variance))
      for name, (relative, absolute) in _EPSILONS.items():
        U, D = conditioning.preconditioner(
          mean, variance, kernel.shape, eps_relative=relative, eps_absolute=absolute
        )
        P = np.asarray(U[0] @ D[0])
        measured[f"preconditioned, epsilons {name}"] = _kappa(root @ P) ** 2
        measured[f"D, epsilons {name}"] = _kappa(np.asarray(D[0]))
  return measured


@jax.jit(static_argnums=0)
def _forward(model: MLP, params: Any, images: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Return the inputs of the output layer and the logits."""
  logits, variables = model.apply(
    {"params": params},
    training.as_inputs(images),
    train=True,
    capture_intermediates=lambda module, _: module.name in params,
    mutable=["intermediates"],
  )
  outputs: Any = variables["intermediates"]
  return jax.nn.relu(outputs[_layers(params)[-2]]["__call__"][0]), logits


def _layers(params: Any) -> list[str]:
  """Return the names of the dense layers in their order."""
  return sorted(params, key=lambda name: int(name.removeprefix("Dense_")))


def _kappa(matrix: np.ndarray) -> float:
  # Without epsilons, D divides by the standard deviation of a dead unit, which decays to 0.
  return float(conditioning.condition_number(matrix)) if np.isfinite(matrix).all() else np.nan
