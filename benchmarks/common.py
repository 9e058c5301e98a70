"""Parts that several benchmarks share: a network, its loss, a training step, and a timer."""

from collections.abc import Callable, Mapping
import time
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import bnp_optax

Carry = tuple[optax.Params, optax.OptState]
_WARM_UP = 2


class FullyConnected(nn.Module):
  """A fully connected ReLU network with ten outputs.

  Attributes:
    hidden: The widths of the hidden layers.
    batch_norm: Whether BatchNorm follows each ReLU.
    dtype: Dtype of the activations.
  """

  hidden: tuple[int, ...]
  batch_norm: bool = False
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, h: jax.Array) -> jax.Array:
    """Return the logits of a batch."""
    for width in self.hidden:
      h = nn.relu(nn.Dense(width, dtype=self.dtype)(h))
      if self.batch_norm:
        h = nn.BatchNorm(use_running_average=False, dtype=self.dtype)(h)
    return nn.Dense(10, dtype=self.dtype)(h).astype(jnp.float32)


def cross_entropy(
  model: nn.Module, variables: Any, x: Any, y: Any, **options: Any
) -> tuple[jax.Array, Any]:
  """Compute the mean loss of a batch and the statistics of its layers.

  Args:
    model: The network.
    variables: Its variables, with the parameters.
    x: The inputs.
    y: The labels, of which the loss is a mean.
    **options: Other arguments of the network.

  Returns:
    The loss, and the statistics in the form that `update` takes.
  """
  with bnp_optax.linen.sow_statistics(example_axes=y.ndim):
    logits, aux = model.apply(variables, x, mutable=["intermediates", "batch_stats"], **options)
  loss = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
  return loss, aux["intermediates"]


def training_step(
  model: nn.Module, tx: optax.GradientTransformation, **options: Any
) -> Callable[[Carry, Any], Carry]:
  """Return a function from parameters, optimizer state and a batch to the next two.

  Args:
    model: The network.
    tx: The optimizer.
    **options: Other arguments of the network than the inputs.
  """
  tx = optax.with_extra_args_support(tx)

  def step(carry: Carry, batch: Any) -> Carry:
    params, state = carry

    def loss_fn(params: optax.Params) -> tuple[jax.Array, Any]:
      return cross_entropy(model, {"params": params}, *batch, **options)

    grads, stats = jax.grad(loss_fn, has_aux=True)(params)
    updates, state = tx.update(grads, state, params, stats=stats)
    return optax.apply_updates(params, updates), state

  return step


def repeated(step: Callable[..., Any], carry: Any, *args: Any) -> Callable[[], Any]:
  """Return a function that takes the next step from its own copy of the carry at each call."""
  carry = jax.tree.map(jnp.copy, carry)

  def take() -> Any:
    nonlocal carry
    carry = step(carry, *args)
    return carry

  return take


def time_in_turn(
  functions: Mapping[str, Callable[[], Any]], *, rounds: int, calls: int
) -> dict[str, np.ndarray]:
  """Time functions in rounds, each in turn, so that other load on the machine slows all of them.

  Args:
    functions: The functions, by name. Each returns the arrays to wait for.
    rounds: Number of rounds that are timed. Two more come before them.
    calls: Number of calls of each function in a round.

  Returns:
    The seconds of a call of each function in each round.
  """
  seconds: dict[str, list[float]] = {name: [] for name in functions}
  for number in range(_WARM_UP + rounds):
    for name, function in functions.items():
      start = time.perf_counter()
      for _ in range(calls):
        result = function()
      jax.block_until_ready(result)
      if number >= _WARM_UP:
        seconds[name].append((time.perf_counter() - start) / calls)
  return {name: np.array(values) for name, values in seconds.items()}
