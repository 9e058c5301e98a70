"""Tests of training in lanes: equal to single runs, reproducible, and robust to divergence."""

import dataclasses

from bnp_experiments import methods, training
from bnp_experiments.catalogue import EXPERIMENTS
from bnp_experiments.evaluation import evaluate
from bnp_experiments.models import CNN, MLP
import jax
import jax.numpy as jnp
import numpy as np
import pytest

BATCH_SIZE = 8
SMALL = MLP((16, 8), 2)
METHODS = [methods.SGD, methods.BATCHNORM, methods.LAYERNORM, methods.BNP]


@pytest.fixture(scope="module")
def images():
  """Two classes of 3x3 images, bright and dark; two images do not fill a batch."""
  rng = np.random.default_rng(0)
  labels = np.arange(50) % 2
  pixels = rng.integers(0, 100, (50, 3, 3)) + 150 * labels[:, None, None]
  return jnp.asarray(pixels, jnp.uint8), jnp.asarray(labels, jnp.uint8)


def _setup(method, images, batch_size=BATCH_SIZE, network=SMALL, **options):
  steps = len(images[0]) // batch_size
  return training.Setup(method.adapt(network), method, batch_size, steps, **options)


def _train(setup, seeds, rates, images, epochs=4, on_steps=lambda steps: None):
  lanes = training.make_lanes(seeds, rates)
  examples = training.Examples(*images)
  state = training.init(setup, lanes, examples.images)
  losses = []
  for epoch in range(1, epochs + 1):
    state, loss = training.train_epoch(setup, state, lanes, epoch, examples, on_steps=on_steps)
    losses.append(loss)
  return state, np.array(losses)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_learns(method, images):
  setup = _setup(method, images)
  state, losses = _train(setup, [1, 2, 3], [0.05, 0.1, 0.1], images, epochs=20)
  assert np.all(losses[-1] < losses[0])
  evaluation = evaluate(setup, state, *images)
  assert np.all(evaluation.accuracy > 0.9)
  assert np.all(evaluation.loss < 0.6)


@pytest.mark.slow
@pytest.mark.parametrize("method", [methods.BATCHNORM, methods.BNP], ids=lambda m: m.name)
def test_a_lane_does_what_it_does_alone(method, images):
  setup = _setup(method, images)
  stack, losses = _train(setup, [3, 4, 4], [0.1, 0.1, 0.3], images)
  alone, loss = _train(setup, [4], [0.3], images)
  np.testing.assert_allclose(losses[:, 2], loss[:, 0], rtol=1e-4)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a[2], b[0], rtol=1e-3, atol=1e-5), stack, alone
  )


@pytest.mark.slow
def test_the_same_seeds_give_the_same_bits(images):
  setup = _setup(methods.BNP, images)
  first, second = (_train(setup, [1, 2, 3], [0.1, 0.1, 0.1], images) for _ in range(2))
  jax.tree.map(np.testing.assert_array_equal, first, second)
  assert not np.array_equal(first[1][:, 0], first[1][:, 1])


def test_an_epoch_is_every_image_once_in_an_order_of_its_own():
  seeds = training.make_lanes([1, 2], [0.1, 0.1]).seeds
  orders = np.concatenate([training.epoch_order(seeds, epoch, 50) for epoch in (1, 2)])
  np.testing.assert_array_equal(np.sort(orders), np.tile(np.arange(50), (4, 1)))
  assert len({tuple(order) for order in orders}) == 4


def test_reports_its_steps_and_stops_at_whole_batches(images):
  steps = []
  setup = _setup(methods.SGD, images)
  _train(setup, [1, 2, 3], [0.1] * 3, images, epochs=1, on_steps=steps.append)
  assert sum(steps) == 3 * (50 // BATCH_SIZE)


@pytest.mark.parametrize(
  ("steps", "longest", "sizes"),
  [(351, 234, [117] * 3), (703, 400, [352, 351]), (4, 0, [1] * 4), (88, 100, [88])],
)
def test_parts_of_an_epoch_are_equal_where_few_make_them_so(steps, longest, sizes):
  parts = training._strides(steps, longest)
  assert [size for _, size in parts] == sizes
  assert [first for first, _ in parts] == [sum(sizes[:i]) for i in range(len(sizes))]


def test_evaluates_more_images_than_fit_at_once(images):
  setup = _setup(methods.SGD, images)
  state, _ = _train(setup, [1, 2, 3], [0.1, 0.2, 0.3], images)
  many = jnp.tile(images[0], (43, 1, 1)), jnp.tile(images[1], 43)
  few, all_ = evaluate(setup, state, *images), evaluate(setup, state, *many)
  np.testing.assert_allclose(few.accuracy, all_.accuracy)
  np.testing.assert_allclose(few.loss, all_.loss, rtol=1e-6)


def test_divergence_is_chance_and_not_a_crash(images):
  setup = _setup(methods.SGD, images)
  state, losses = _train(setup, [1, 2, 3], [1e30, 0.1, 0.1], images)
  evaluation = evaluate(setup, state, *images)
  assert not np.isfinite(losses[-1, 0])
  assert not np.isfinite(evaluation.loss[0])
  assert evaluation.accuracy[0] == 0.5
  assert np.isfinite(losses[:, 1]).all()


def test_batchnorm_learns_nothing_from_single_images(images):
  setup = _setup(methods.BATCHNORM, images, batch_size=1)
  _, loss = _train(setup, [1], [0.1], images, epochs=1)
  assert loss[0] > 0.6


@pytest.fixture(scope="module")
def coloured():
  """Two classes of 8x8 colour images, on the host."""
  rng = np.random.default_rng(0)
  labels = (np.arange(66) % 2).astype(np.uint8)
  pixels = rng.integers(0, 100, (66, 8, 8, 3)) + 150 * labels[:, None, None, None]
  return pixels.astype(np.uint8), labels


CONVOLUTIONAL = CNN((4,), 8, 2)


@pytest.mark.slow
def test_images_on_the_device_and_on_the_host_train_alike(coloured, monkeypatch):
  setup = _setup(methods.BNP, coloured, batch_size=16, network=CONVOLUTIONAL)
  assert not setup.stacked
  in_turn, losses = _train(setup, [1, 2], [0.1, 0.3], coloured, epochs=2)
  monkeypatch.setattr(training, "_IMAGES_A_CALL", 48)
  monkeypatch.delattr(training, "take_steps_in_turn")
  looped, expected = _train(setup, [1, 2], [0.1, 0.3], tuple(map(jnp.asarray, coloured)), epochs=2)
  np.testing.assert_allclose(losses, expected, rtol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), in_turn, looped)


@pytest.mark.slow
def test_a_large_batch_is_split_over_the_devices_to_the_same_result(coloured, monkeypatch):
  one = _setup(methods.BATCHNORM, coloured, batch_size=64, network=CONVOLUTIONAL)
  assert one.devices == 1
  alone, loss = _train(one, [1], [0.1], coloured)
  monkeypatch.setattr(training, "_IMAGES_A_DEVICE", 8)
  assert one.devices == 8
  # Another setup, so that nothing that was compiled for the first one is used again.
  split = _setup(methods.BATCHNORM, coloured, 64, network=CONVOLUTIONAL, decays=(100,))
  together, losses = _train(split, [1], [0.1], coloured)
  np.testing.assert_allclose(losses, loss, rtol=1e-5)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
    *(together.params, alone.params),
  )


def test_the_rate_warms_up_and_decays(coloured):
  linear = dataclasses.replace(methods.SGD, warmup=methods.Warmup(epochs=2))
  setup = _setup(linear, coloured, batch_size=11, decays=(3, 5))
  assert setup.steps == 6
  schedule = setup.rate(jnp.float32(0.2))
  rates = [schedule(jnp.int32(count)) for count in (0, 6, 12, 17, 18, 29, 30)]
  np.testing.assert_allclose(rates, [0.02, 0.11, 0.2, 0.2, 0.02, 0.02, 0.002], rtol=1e-6)
  jump = dataclasses.replace(methods.SGD, warmup=methods.Warmup(steps=4, linear=False))
  schedule = _setup(jump, coloured).rate(jnp.float32(0.2))
  np.testing.assert_allclose([schedule(jnp.int32(i)) for i in (0, 3, 4)], [0.02, 0.02, 0.2])


@pytest.mark.slow
def test_weights_decay_after_bnp(coloured):
  decayed = dataclasses.replace(methods.BNP, weight_decay=0.1)
  states = [
    _train(_setup(method, coloured, 16, CONVOLUTIONAL), [1], [1.0], coloured, epochs=0)[0]
    for method in (methods.BNP, decayed)
  ]
  setups = [_setup(method, coloured, 66, CONVOLUTIONAL) for method in (methods.BNP, decayed)]
  lanes = training.make_lanes([1], [1.0])
  before = jax.tree.map(np.asarray, states[0].params)
  plain, with_decay = (
    training.train_epoch(
      setup, state, lanes, 1, training.Examples(*coloured), on_steps=lambda steps: None
    )[0].params
    for setup, state in zip(setups, states, strict=True)
  )
  jax.tree.map(
    lambda a, b, weight: np.testing.assert_allclose(a - b, -0.1 * weight, atol=1e-5),
    *(with_decay, plain, before),
  )


@pytest.mark.slow
def test_augmented_images_are_others_every_epoch_and_the_same_every_time(coloured):
  losses = [
    _train(_setup(methods.SGD, coloured, 66, CONVOLUTIONAL, augment=augment), [1], [0.0], coloured)[
      1
    ]
    for augment in ("cifar", "cifar", None)
  ]
  np.testing.assert_array_equal(losses[0], losses[1])
  assert len(np.unique(losses[0])) == 4
  assert len(np.unique(losses[2].round(5))) == 1


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("method", [methods.BNP, methods.BNP_ADAM], ids=lambda method: method.name)
def test_debias_reaches_bnp_and_the_records(images, method):
  debiased = dataclasses.replace(method, debias=True)
  losses = [_train(_setup(m, images), [1], [0.01], images)[1] for m in (method, debiased)]
  assert not np.allclose(*losses)
  settings = [
    EXPERIMENTS["quickstart"].epoch_settings(m, 60, 0.1)["debias"] for m in (method, debiased)
  ]
  # Earlier records lack the field, which matches None.
  assert settings == [None, True]
