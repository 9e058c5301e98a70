"""Trains networks in stacks: every function here works on a stack of lanes.

A lane is one training run, told apart from the others by its seed and its learning rate alone. The
lanes of a fully connected network are mapped with `jax.vmap` and its steps loop inside the compiled
program, so that a grid of rates or a set of seeds costs little more than one run. Other networks
train lane by lane and step by step: XLA's CPU code is many times slower for a convolution inside a
loop, or with a kernel for each lane. All randomness comes from the seeds: the same lanes give the
same bits.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import math
from typing import Any, NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from bnp_experiments.augmentation import AUGMENTATIONS
from bnp_experiments.methods import Method, Rate
from bnp_experiments.models import MLP
import bnp_optax

Tree = Any
_IMAGES_A_CALL = 30_000
_STEPS_AHEAD = 32
_AUGMENT = 2**31
# With fewer images than this on each, a step costs more on several devices than on one.
_IMAGES_A_DEVICE = 32


@dataclasses.dataclass(frozen=True)
class Setup:
  """What the compiled program of a training step depends on.

  Attributes:
    model: The network, as the method has it.
    method: What to train it with.
    batch_size: Images in a step.
    steps: Steps in an epoch.
    decays: The epochs after which the learning rate is divided by ten.
    augment: Name of the augmentation of the training images; None for none.
  """

  model: nn.Module
  method: Method
  batch_size: int
  steps: int
  decays: tuple[int, ...] = ()
  augment: str | None = None

  @property
  def stacked(self) -> bool:
    """Whether lanes are trained together, in a loop of the compiled program."""
    return isinstance(self.model, MLP)

  @property
  def devices(self) -> int:
    """Over how many devices a batch is split."""
    split = math.gcd(self.batch_size, jax.device_count())
    return split if not self.stacked and self.batch_size >= _IMAGES_A_DEVICE * split else 1

  def rate(self, rate: jax.Array) -> Rate:
    """The learning rate as the optimizer wants it: a schedule, if it changes."""
    warmup, decays = self.method.warmup, self.decays
    if warmup is None and not decays:
      return rate

    def schedule(count: Any) -> jax.Array:
      passed = sum((count >= epoch * self.steps).astype(jnp.float32) for epoch in decays)
      factor = jnp.asarray(0.1, jnp.float32) ** passed
      return rate * factor * (1.0 if warmup is None else warmup.factor(count, self.steps))

    return schedule


class Lanes(NamedTuple):
  """What tells the runs of a stack apart: arrays `[lanes]`."""

  seeds: jax.Array
  rates: jax.Array


class LaneState(NamedTuple):
  """Where the runs of a stack have got to; every leaf has the lanes as its first axis."""

  params: Tree
  model_state: dict
  opt_state: Tree


def make_lanes(seeds: Sequence[int], rates: Sequence[float]) -> Lanes:
  """Stacks the runs with these seeds and these learning rates, pairwise."""
  return Lanes(jnp.asarray(seeds, jnp.uint32), jnp.asarray(rates, jnp.float32))


def init(setup: Setup, lanes: Lanes, images: np.ndarray) -> LaneState:
  """Initializes the lanes.

  Args:
    setup: What is trained, and how.
    lanes: The runs.
    images: Any batch of images, for their shape.

  Returns:
    The state of the lanes before the first step.
  """
  # One by one: the compiler takes many times longer over a stack of random number generators.
  variables = [_init_variables(setup.model, seed, images[:1]) for seed in lanes.seeds]
  model_state = jax.tree.map(lambda *leaves: jnp.stack(leaves), *variables)
  params = model_state.pop("params")
  opt_state = jax.vmap(lambda rate, params: _optimizer(setup, rate, images[:1]).init(params))(
    lanes.rates, params
  )
  return LaneState(params, model_state, opt_state)


@functools.partial(jax.jit, static_argnames="model")
def _init_variables(model: nn.Module, seed: jax.Array, images: jax.Array) -> dict:
  key = jax.random.fold_in(jax.random.key(seed), 0)
  return dict(model.init(key, as_inputs(images), train=False))


def _optimizer(setup: Setup, rate: jax.Array, images: Any) -> optax.GradientTransformationExtraArgs:
  layers = bnp_optax.linen.layers(setup.model, as_inputs(images), train=False, strict=True)
  return setup.method.make_optimizer(setup.rate(rate), layers)


@functools.partial(jax.jit, static_argnames="count")
def epoch_order(seeds: jax.Array, epoch: int, count: int) -> jax.Array:
  """In which order each lane sees `count` images in an epoch; epochs count from 1."""

  def lane(seed: jax.Array) -> jax.Array:
    return jax.random.permutation(jax.random.fold_in(jax.random.key(seed), epoch), count)

  return jax.vmap(lane)(seeds)


def _step(
  setup: Setup,
  state: LaneState,
  seed: jax.Array,
  rate: jax.Array,
  epoch: int | jax.Array,
  number: int | jax.Array,
  images: jax.Array,
  labels: jax.Array,
) -> tuple[LaneState, jax.Array]:
  """Takes one step of one run; returns it and the training loss."""
  params, model_state, opt_state = state
  optimizer = _optimizer(setup, rate, images)
  targets = labels.astype(jnp.int32)
  if setup.augment is not None:
    # Not the keys of the order of the images, which are those of the epochs themselves.
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), _AUGMENT), epoch)
    images = AUGMENTATIONS[setup.augment](jax.random.fold_in(key, number), images)

  def loss_fn(params: Tree) -> tuple[jax.Array, dict]:
    # Every method's loop reports the statistics: where none reads them, the compiler leaves them
    # out. The loss is a mean over images, or over tokens.
    with bnp_optax.linen.sow_statistics(example_axes=labels.ndim):
      logits, variables = setup.model.apply(
        {"params": params, **model_state},
        as_inputs(images),
        train=True,
        mutable=["intermediates", *model_state],
      )
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return losses.mean(), dict(variables)

  (loss, variables), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
  stats = variables.pop("intermediates")
  updates, opt_state = optimizer.update(grads, opt_state, params, stats=stats)
  params = optax.apply_updates(params, updates)
  return LaneState(params, variables, opt_state), loss


def take_steps(
  setup: Setup,
  state: LaneState,
  seed: jax.Array,
  rate: jax.Array,
  order: jax.Array,
  epoch: int | jax.Array,
  first: int | jax.Array,
  last: int | jax.Array,
  images: jax.Array,
  labels: jax.Array,
) -> tuple[LaneState, jax.Array]:
  """Takes the steps `first` to `last` (excluded) of an epoch of one run, a stack of none.

  The bounds are traced, so that any number of steps runs in one compiled program; the images are
  arguments, because the compiler would take long over images that the program closes over.

  Args:
    setup: What is trained, and how.
    state: The run; without the axis of the lanes.
    seed: Its seed.
    rate: Its learning rate.
    order: Its order of the images, `[images]`.
    epoch: Number of the epoch.
    first: First step to take.
    last: First step not to take.
    images: The training images, uint8.
    labels: Their labels.

  Returns:
    The run after these steps, and the sum over the steps of its training loss.
  """

  def step(number: jax.Array, carry: tuple[LaneState, jax.Array]) -> tuple[LaneState, jax.Array]:
    state, loss_sum = carry
    start = number * setup.batch_size
    rows = jax.lax.dynamic_slice(order, (start,), (setup.batch_size,))
    state, loss = _step(setup, state, seed, rate, epoch, number, images[rows], labels[rows])
    return state, loss_sum + loss

  return jax.lax.fori_loop(first, last, step, (state, jnp.zeros(())))


@functools.partial(jax.jit, static_argnames="setup", donate_argnames="state")
def _advance(
  setup: Setup,
  state: LaneState,
  lanes: Lanes,
  order: jax.Array,
  epoch: int,
  first: int,
  last: int,
  images: jax.Array,
  labels: jax.Array,
) -> tuple[LaneState, jax.Array]:
  """`take_steps` for a stack of lanes, whose buffers are given away; all lanes see all images."""

  def lane(
    state: LaneState, seed: jax.Array, rate: jax.Array, order: jax.Array
  ) -> tuple[LaneState, jax.Array]:
    return take_steps(setup, state, seed, rate, order, epoch, first, last, images, labels)

  return jax.vmap(lane)(state, *lanes, order)


def take_steps_in_turn(
  setup: Setup,
  state: LaneState,
  seed: jax.Array,
  rate: jax.Array,
  order: np.ndarray,
  epoch: int,
  first: int,
  last: int,
  images: np.ndarray,
  labels: np.ndarray,
) -> tuple[LaneState, jax.Array]:
  """What `take_steps` does, by one call of a compiled step after another.

  The batch is split over the devices, if it is large enough.
  """
  mesh = jax.sharding.Mesh(np.array(jax.devices()[: setup.devices]), ("batch",))
  split = jax.NamedSharding(mesh, jax.P("batch"))
  everywhere = jax.NamedSharding(mesh, jax.P())
  state, seed, rate, loss_sum = jax.device_put((state, seed, rate, jnp.zeros(())), everywhere)
  for number in range(first, last):
    rows = order[number * setup.batch_size : (number + 1) * setup.batch_size]
    batch = jax.device_put((images[rows], labels[rows]), split)
    state, loss_sum = _take_step(
      setup, everywhere, state, loss_sum, seed, rate, np.int32(epoch), np.int32(number), *batch
    )
  return state, loss_sum.block_until_ready()


@functools.partial(
  jax.jit, static_argnames=("setup", "everywhere"), donate_argnames=("state", "loss_sum")
)
def _take_step(
  setup: Setup,
  everywhere: jax.NamedSharding,
  state: LaneState,
  loss_sum: jax.Array,
  *args: Any,
) -> tuple[LaneState, jax.Array]:
  state, loss = _step(setup, state, *args)
  return jax.lax.with_sharding_constraint((state, loss_sum + loss), everywhere)


def train_epoch(
  setup: Setup,
  state: LaneState,
  lanes: Lanes,
  epoch: int,
  images: np.ndarray,
  labels: np.ndarray,
  *,
  on_steps: Callable[[int], None],
) -> tuple[LaneState, np.ndarray]:
  """Trains for one epoch.

  Images that do not fill a last batch are left out of this epoch.

  Args:
    setup: What is trained, and how.
    state: The lanes; its buffers are given away.
    lanes: Their seeds and rates.
    epoch: Number of the epoch, from 1.
    images: The training images, uint8: on the device where lanes are stacked, else on the host.
    labels: Their labels.
    on_steps: Called every now and then, with the number of steps of all lanes taken since.

  Returns:
    The lanes after the epoch, and the mean over its steps of the training loss of each lane.
  """
  count = len(lanes.seeds)
  order = epoch_order(lanes.seeds, epoch, len(images))
  # Summed in double precision: there may be tens of thousands of steps.
  loss_sum = np.zeros(count)
  if setup.stacked:
    for first, last in _strides(setup.steps, _IMAGES_A_CALL // (setup.batch_size * count)):
      state, losses = _advance(setup, state, lanes, order, epoch, first, last, images, labels)
      loss_sum += np.asarray(losses, np.float64)
      on_steps(count * (last - first))
    return state, loss_sum / setup.steps
  trained = []
  for lane, lane_order in enumerate(np.asarray(order)):
    alone, seed, rate = jax.tree.map(lambda leaf, lane=lane: leaf[lane], (state, *lanes))
    for first, last in _strides(setup.steps, _STEPS_AHEAD):
      alone, losses = take_steps_in_turn(
        setup, alone, seed, rate, lane_order, epoch, first, last, images, labels
      )
      loss_sum[lane] += float(losses)
      on_steps(last - first)
    trained.append(jax.device_put(alone, jax.devices()[0]))
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trained), loss_sum / setup.steps


def _strides(steps: int, stride: int) -> list[tuple[int, int]]:
  stride = max(1, stride)
  return [(first, min(first + stride, steps)) for first in range(0, steps, stride)]


def as_inputs(images: Any) -> jax.Array:
  """What a network reads: images on the scale from 0 to 1, tokens as they are."""
  if images.ndim == 2:
    return images.astype(jnp.int32)
  return images.astype(jnp.float32) / 255
