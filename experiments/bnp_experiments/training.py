"""Training of networks in stacks of lanes.

A lane is one training run. The lanes of a stack differ in their seeds and learning rates. The lanes
of a fully connected network are mapped with `jax.vmap`, so that a grid of rates or a set of seeds
costs little more than one run. (On a CPU that holds for the 40 inputs of MNIST-1D. With the 3,072
of CIFAR-10 and Adam inside `bnp`, a stack is slower than one lane after the other.) Other networks
train lane by lane, because a convolution with a kernel for each lane is slow. Examples on the
device are trained on in a loop inside the compiled program. Examples on the host are trained on
step by step: XLA's CPU code for a convolution inside a loop is many times slower. All randomness
comes from the seeds: equal lanes give equal bits.
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
from bnp_experiments.models import MLP, find_layers
import bnp_optax

Tree = Any
_IMAGES_A_CALL = 30_000
_STEPS_AHEAD = 32
_AUGMENT = 2**31
# With fewer images on each device, a step costs more on several devices than on one.
_IMAGES_A_DEVICE = 32


@dataclasses.dataclass(frozen=True)
class Setup:
  """The settings that the compiled program of a training step depends on.

  Attributes:
    model: The network, adapted to the method.
    method: The method that trains it.
    batch_size: Number of images in a step.
    steps: Number of steps in an epoch.
    decays: Epochs after which the learning rate is divided by ten.
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
    """Whether lanes train together."""
    return isinstance(self.model, MLP)

  @property
  def devices(self) -> int:
    """Number of devices that a batch is split over."""
    split = math.gcd(self.batch_size, jax.device_count())
    return split if not self.stacked and self.batch_size >= _IMAGES_A_DEVICE * split else 1

  def rate(self, rate: jax.Array) -> Rate:
    """Return the learning rate for the optimizer: a schedule, if it changes."""
    warmup, decays = self.method.warmup, self.decays
    if warmup is None and not decays:
      return rate

    def schedule(count: Any) -> jax.Array:
      passed = sum((count >= epoch * self.steps).astype(jnp.float32) for epoch in decays)
      factor = jnp.asarray(0.1, jnp.float32) ** passed
      return rate * factor * (1.0 if warmup is None else warmup.factor(count, self.steps))

    return schedule


class Examples(NamedTuple):
  """Images (uint8), signals (float32) or texts, and their labels."""

  images: Any
  labels: Any


class Lane(NamedTuple):
  """One training run: its seed and its learning rate."""

  seed: jax.Array
  rate: jax.Array


class Lanes(NamedTuple):
  """The runs of a stack: arrays `[lanes]`."""

  seeds: jax.Array
  rates: jax.Array

  def lane(self, number: int) -> Lane:
    """Return one lane."""
    return Lane(self.seeds[number], self.rates[number])


class Steps(NamedTuple):
  """A number of steps of an epoch, from the step `first` on; epochs count from 1."""

  epoch: int | jax.Array
  first: int | jax.Array
  length: int | jax.Array


class LaneState(NamedTuple):
  """State of the runs of a stack; every leaf has the lanes as its first axis."""

  params: Tree
  model_state: dict
  opt_state: Tree


def make_lanes(seeds: Sequence[int], rates: Sequence[float]) -> Lanes:
  """Stack the runs with these pairs of seeds and learning rates."""
  return Lanes(jnp.asarray(seeds, jnp.uint32), jnp.asarray(rates, jnp.float32))


def init(setup: Setup, lanes: Lanes, images: np.ndarray) -> LaneState:
  """Initialize the lanes.

  Args:
    setup: The setup of the training.
    lanes: The runs.
    images: Any batch of images, for their shape.

  Returns:
    The state of the lanes before the first step.
  """
  # One by one: a stack of random number generators takes many times longer to compile.
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
  layers = find_layers(setup.model, as_inputs(images))
  return setup.method.make_optimizer(setup.rate(rate), layers)


@functools.partial(jax.jit, static_argnames="count")
def epoch_order(seeds: jax.Array, epoch: int, count: int) -> jax.Array:
  """Return the order of `count` images of each lane in an epoch; epochs count from 1."""

  def lane(seed: jax.Array) -> jax.Array:
    return jax.random.permutation(jax.random.fold_in(jax.random.key(seed), epoch), count)

  return jax.vmap(lane)(seeds)


def _step(
  setup: Setup,
  state: LaneState,
  lane: Lane,
  epoch: int | jax.Array,
  number: int | jax.Array,
  batch: Examples,
) -> tuple[LaneState, jax.Array]:
  """Take one step of one run; return its state and the training loss."""
  params, model_state, opt_state = state
  images, labels = batch
  optimizer = _optimizer(setup, lane.rate, images)
  targets = labels.astype(jnp.int32)
  if setup.augment is not None:
    # The order of the images uses the keys of the epochs themselves.
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(lane.seed), _AUGMENT), epoch)
    images = AUGMENTATIONS[setup.augment](jax.random.fold_in(key, number), images)

  def loss_fn(params: Tree) -> tuple[jax.Array, dict]:
    # Every method gathers the statistics; without BNP the compiler removes them. The loss is a mean
    # over images, or over tokens.
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
  lane: Lane,
  order: jax.Array,
  steps: Steps,
  examples: Examples,
) -> tuple[LaneState, jax.Array]:
  """Take steps of one run inside the compiled program.

  If the number of steps is traced, any number runs in one compiled program, but an accelerator asks
  the host after each step whether to go on. The examples are arguments, because a program that
  closes over them takes long to compile.

  Args:
    setup: The setup of the training.
    state: The state of the run, without the axis of the lanes.
    lane: Its seed and learning rate.
    order: Its order of the images, `[images]`.
    steps: The steps to take.
    examples: The training examples.

  Returns:
    The state of the run after these steps, and the sum over the steps of its training loss.
  """

  def step(i: jax.Array, carry: tuple[LaneState, jax.Array]) -> tuple[LaneState, jax.Array]:
    state, loss_sum = carry
    number = steps.first + i
    start = number * setup.batch_size
    indices = jax.lax.dynamic_slice(order, (start,), (setup.batch_size,))
    batch = Examples(examples.images[indices], examples.labels[indices])
    state, loss = _step(setup, state, lane, steps.epoch, number, batch)
    return state, loss_sum + loss

  return jax.lax.fori_loop(0, steps.length, step, (state, jnp.zeros(())))


@functools.partial(jax.jit, static_argnames=("setup", "length"), donate_argnames="state")
def _take_steps(
  setup: Setup,
  length: int,
  state: LaneState,
  lanes: Lanes | Lane,
  order: jax.Array,
  epoch: int,
  first: int,
  examples: Examples,
) -> tuple[LaneState, jax.Array]:
  """Call `take_steps` for one lane, or a stack of them, whose buffers are donated."""

  def take(state: LaneState, lane: Lane, order: jax.Array) -> tuple[LaneState, jax.Array]:
    return take_steps(setup, state, lane, order, Steps(epoch, first, length), examples)

  return (jax.vmap(take) if setup.stacked else take)(state, Lane(*lanes), order)


def take_steps_in_turn(
  setup: Setup,
  state: LaneState,
  lane: Lane,
  order: np.ndarray,
  steps: Steps,
  examples: Examples,
) -> tuple[LaneState, jax.Array]:
  """Take steps of one run, as `take_steps` does, with one call of a compiled step for each.

  The batch is split over the devices, if it is large enough.
  """
  mesh = jax.sharding.Mesh(np.array(jax.devices()[: setup.devices]), ("batch",))
  split = jax.NamedSharding(mesh, jax.P("batch"))
  everywhere = jax.NamedSharding(mesh, jax.P())
  state, lane, loss_sum = jax.device_put((state, lane, jnp.zeros(())), everywhere)
  for number in range(int(steps.first), int(steps.first + steps.length)):
    indices = order[number * setup.batch_size : (number + 1) * setup.batch_size]
    batch = jax.device_put(Examples(examples.images[indices], examples.labels[indices]), split)
    state, loss_sum = _take_step(
      setup, everywhere, state, loss_sum, lane, np.int32(steps.epoch), np.int32(number), batch
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
  examples: Examples,
  *,
  on_steps: Callable[[int], None] = lambda steps: None,
) -> tuple[LaneState, np.ndarray]:
  """Train for one epoch.

  Images that do not fill a last batch are left out of this epoch.

  Args:
    setup: The setup of the training.
    state: The state of the lanes; its buffers are donated.
    lanes: Their seeds and rates.
    epoch: Number of the epoch, from 1.
    examples: The training examples: as JAX arrays for a loop of steps, which lanes that are stacked
      need, else on the host.
    on_steps: Called regularly with the number of steps of all lanes taken since the last call.

  Returns:
    The state of the lanes after the epoch, and the mean over its steps of the training loss of each
    lane.
  """
  count = len(lanes.seeds)
  order = epoch_order(lanes.seeds, epoch, len(examples.images))
  # Summed in double precision: there may be tens of thousands of steps.
  loss_sum = np.zeros(count)
  if setup.stacked:
    for first, steps in _strides(setup.steps, _IMAGES_A_CALL // (setup.batch_size * count)):
      state, losses = _take_steps(setup, steps, state, lanes, order, epoch, first, examples)
      loss_sum += np.asarray(losses, np.float64)
      on_steps(count * steps)
    return state, loss_sum / setup.steps
  on_device = isinstance(examples.images, jax.Array)
  stride = _IMAGES_A_CALL // setup.batch_size if on_device else _STEPS_AHEAD
  trained = []
  for number, lane_order in enumerate(order if on_device else np.asarray(order)):
    alone, lane = jax.tree.map(lambda leaf, number=number: leaf[number], state), lanes.lane(number)
    for first, steps in _strides(setup.steps, stride):
      if on_device:
        alone, loss = _take_steps(setup, steps, alone, lane, lane_order, epoch, first, examples)
      else:
        taken = Steps(epoch, first, steps)
        alone, loss = take_steps_in_turn(setup, alone, lane, lane_order, taken, examples)
      loss_sum[number] += float(loss)
      on_steps(steps)
    trained.append(jax.device_put(alone, jax.devices()[0]))
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trained), loss_sum / setup.steps


def _strides(steps: int, longest: int) -> list[tuple[int, int]]:
  """Divide the steps of an epoch: the first step and the number of steps of each part.

  Parts of equal length share a compiled program. Up to twice as many parts are made for that.
  """
  least = -(-steps // max(1, longest))
  parts = next((n for n in range(least, 2 * least + 1) if steps % n == 0), least)
  size = -(-steps // parts)
  return [(first, min(size, steps - first)) for first in range(0, steps, size)]


def as_inputs(images: Any) -> jax.Array:
  """Return the inputs of a network: images scaled to 0 to 1, signals and tokens unchanged."""
  if images.dtype == jnp.float32:
    return jnp.asarray(images)
  if images.ndim == 2:
    return images.astype(jnp.int32)
  return images.astype(jnp.float32) / 255
