"""Trains many small networks at once: every function here works on a stack of lanes.

A lane is one training run, told apart from the others by its seed and its learning rate alone; the
lanes of a stack are mapped with `jax.vmap`, so that a grid of rates or a set of seeds costs little
more than one run. All randomness comes from the seeds: the same lanes give the same bits.
"""

from collections.abc import Callable, Sequence
import functools
from typing import Any, NamedTuple, cast

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import bnp_optax
from bnp_optax.experiments.methods import Method

Tree = Any
_EVALUATED_AT_ONCE = 1000
_IMAGES_A_CALL = 30_000


class Lanes(NamedTuple):
  """What tells the runs of a stack apart: arrays `[lanes]`."""

  seeds: jax.Array
  rates: jax.Array


class LaneState(NamedTuple):
  """Where the runs of a stack have got to; every leaf has the lanes as its first axis."""

  params: Tree
  model_state: dict
  opt_state: Tree


class Evaluation(NamedTuple):
  """How good each lane is on a set of images."""

  accuracy: np.ndarray
  loss: np.ndarray


def make_lanes(seeds: Sequence[int], rates: Sequence[float]) -> Lanes:
  """Stacks the runs with these seeds and these learning rates, pairwise."""
  return Lanes(jnp.asarray(seeds, jnp.uint32), jnp.asarray(rates, jnp.float32))


def init(model: nn.Module, method: Method, lanes: Lanes, images: jax.Array) -> LaneState:
  """Initializes the lanes.

  Args:
    model: The network, with the method's norm.
    method: What to train it with.
    lanes: The runs.
    images: Any batch of images, for their shape.

  Returns:
    The state of the lanes before the first step.
  """
  # One by one: the compiler takes many times longer over a stack of random number generators.
  variables = [_init_variables(model, seed, images[:1]) for seed in lanes.seeds]
  model_state = jax.tree.map(lambda *leaves: jnp.stack(leaves), *variables)
  params = model_state.pop("params")
  opt_state = jax.vmap(lambda rate, params: method.optimizer(rate).init(params))(
    lanes.rates, params
  )
  return LaneState(params, model_state, opt_state)


@functools.partial(jax.jit, static_argnames="model")
def _init_variables(model: nn.Module, seed: jax.Array, images: jax.Array) -> dict:
  key = jax.random.fold_in(jax.random.key(seed), 0)
  return dict(model.init(key, _scale(images), train=False))


@functools.partial(jax.jit, static_argnames="count")
def epoch_order(seeds: jax.Array, epoch: int, count: int) -> jax.Array:
  """In which order each lane sees `count` images in an epoch; epochs count from 1."""

  def lane(seed: jax.Array) -> jax.Array:
    return jax.random.permutation(jax.random.fold_in(jax.random.key(seed), epoch), count)

  return jax.vmap(lane)(seeds)


def take_steps(
  model: nn.Module,
  method: Method,
  batch_size: int,
  state: LaneState,
  rate: jax.Array,
  order: jax.Array,
  first: int,
  last: int,
  images: jax.Array,
  labels: jax.Array,
) -> tuple[LaneState, jax.Array]:
  """Takes the steps `first` to `last` (excluded) of an epoch of one run, a stack of none.

  The bounds are traced, so that any number of steps runs in one compiled program; the images are
  arguments, because the compiler would take long over images that the program closes over.

  Args:
    model: The network, with the method's norm.
    method: What to train it with.
    batch_size: Images in a step.
    state: The run; without the axis of the lanes.
    rate: Its learning rate.
    order: Its order of the images, `[images]`.
    first: First step to take.
    last: First step not to take.
    images: The training images, uint8.
    labels: Their labels.

  Returns:
    The run after these steps, and the sum over the steps of its training loss.
  """
  optimizer = optax.with_extra_args_support(method.optimizer(rate))

  def step(number: jax.Array, carry: tuple[LaneState, jax.Array]) -> tuple[LaneState, jax.Array]:
    (params, model_state, opt_state), loss_sum = carry
    rows = jax.lax.dynamic_slice(order, (number * batch_size,), (batch_size,))
    targets = labels[rows].astype(jnp.int32)

    def loss_fn(params: Tree) -> tuple[jax.Array, dict]:
      # Every method's loop reports the statistics: where none reads them, the compiler
      # leaves them out.
      with bnp_optax.linen.sow_statistics():
        logits, variables = model.apply(
          {"params": params, **model_state},
          _scale(images[rows]),
          train=True,
          mutable=["intermediates", *model_state],
        )
      losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
      return losses.mean(), dict(variables)

    (loss, variables), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
    stats = variables.pop("intermediates")
    updates, opt_state = optimizer.update(grads, opt_state, params, stats=stats)
    params = optax.apply_updates(params, updates)
    return LaneState(params, variables, opt_state), loss_sum + loss

  return jax.lax.fori_loop(first, last, step, (state, jnp.zeros(())))


@functools.partial(
  jax.jit, static_argnames=("model", "method", "batch_size"), donate_argnames="state"
)
def advance(
  model: nn.Module,
  method: Method,
  batch_size: int,
  state: LaneState,
  rates: jax.Array,
  order: jax.Array,
  first: int,
  last: int,
  images: jax.Array,
  labels: jax.Array,
) -> tuple[LaneState, jax.Array]:
  """`take_steps` for a stack of lanes, whose buffers are given away; all lanes see all images."""

  def lane(state: LaneState, rate: jax.Array, order: jax.Array) -> tuple[LaneState, jax.Array]:
    return take_steps(model, method, batch_size, state, rate, order, first, last, images, labels)

  return jax.vmap(lane)(state, rates, order)


def train_epoch(
  model: nn.Module,
  method: Method,
  batch_size: int,
  state: LaneState,
  lanes: Lanes,
  epoch: int,
  images: jax.Array,
  labels: jax.Array,
  *,
  on_steps: Callable[[int], None],
) -> tuple[LaneState, np.ndarray]:
  """Trains for one epoch.

  Images that do not fill a last batch are left out of this epoch.

  Args:
    model: The network, with the method's norm.
    method: What to train it with.
    batch_size: Images in a step.
    state: The lanes; its buffers are given away.
    lanes: Their seeds and rates.
    epoch: Number of the epoch, from 1.
    images: The training images, uint8.
    labels: Their labels.
    on_steps: Called every now and then, with the number of steps taken since.

  Returns:
    The lanes after the epoch, and the mean over its steps of the training loss of each lane.
  """
  steps = len(images) // batch_size
  order = epoch_order(lanes.seeds, epoch, len(images))
  stride = max(1, _IMAGES_A_CALL // (batch_size * len(lanes.seeds)))
  loss_sum = np.zeros(len(lanes.seeds))
  for first in range(0, steps, stride):
    last = min(first + stride, steps)
    state, losses = advance(
      model, method, batch_size, state, lanes.rates, order, first, last, images, labels
    )
    # Summed in double precision: there may be tens of thousands of steps.
    loss_sum += np.asarray(losses, np.float64)
    on_steps(last - first)
  return state, loss_sum / steps


def evaluate(
  model: nn.Module, state: LaneState, images: jax.Array, labels: jax.Array
) -> Evaluation:
  """Accuracy and mean loss of each lane; a lane that has diverged is at chance, with loss NaN."""
  correct = loss = 0
  for start in range(0, len(images), _EVALUATED_AT_ONCE):
    rows = slice(start, start + _EVALUATED_AT_ONCE)
    chunk_correct, chunk_loss = _evaluate_chunk(
      model, state.params, state.model_state, *_pad(images[rows], labels[rows])
    )
    correct += np.asarray(chunk_correct, np.int64)
    loss += np.asarray(chunk_loss, np.float64)
  return Evaluation(np.asarray(correct / len(images)), np.asarray(loss / len(images)))


@functools.partial(jax.jit, static_argnames="model")
def _evaluate_chunk(
  model: nn.Module,
  params: Tree,
  model_state: dict,
  images: jax.Array,
  labels: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  def lane(params: Tree, model_state: dict) -> tuple[jax.Array, jax.Array]:
    logits = cast(
      jax.Array, model.apply({"params": params, **model_state}, _scale(images), train=False)
    )
    there = labels >= 0
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
    correct = there & (jnp.argmax(logits, axis=-1).astype(jnp.int32) == labels)
    return jnp.sum(correct), jnp.sum(jnp.where(there, losses, 0))

  return jax.vmap(lane)(params, model_state)


def _pad(images: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Fills a chunk up with images of label -1, so that all chunks share one compiled program."""
  short = _EVALUATED_AT_ONCE - len(images)
  padding = [(0, short)] + [(0, 0)] * (images.ndim - 1)
  return (
    jnp.pad(images, padding),
    jnp.pad(labels.astype(jnp.int32), (0, short), constant_values=-1),
  )


def _scale(images: jax.Array) -> jax.Array:
  return images.astype(jnp.float32) / 255
