"""Training in lanes: the same as one by one, the same every time, and sane when it diverges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnp_optax.experiments import methods, training
from bnp_optax.experiments.models import MLP

BATCH_SIZE = 8
METHODS = [methods.SGD, methods.BATCHNORM, methods.LAYERNORM, methods.BNP]


@pytest.fixture(scope="module")
def images():
  """Two classes of 3x3 images: bright ones and dark ones; two images more than fill batches."""
  rng = np.random.default_rng(0)
  labels = np.arange(50) % 2
  pixels = rng.integers(0, 100, (50, 3, 3)) + 150 * labels[:, None, None]
  return jnp.asarray(pixels, jnp.uint8), jnp.asarray(labels, jnp.uint8)


def _train(method, seeds, rates, images, epochs=4, **options):
  model = MLP((16, 8), 2, method.norm)
  lanes = training.make_lanes(seeds, rates)
  state = training.init(model, method, lanes, images[0])
  losses = []
  for epoch in range(1, epochs + 1):
    state, loss = training.train_epoch(
      *(model, method, BATCH_SIZE, state, lanes, epoch, *images),
      **{"on_steps": lambda steps: None, **options},
    )
    losses.append(loss)
  return model, state, np.array(losses)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_learns(method, images):
  model, state, losses = _train(method, [1, 2, 3], [0.05, 0.1, 0.1], images, epochs=20)
  assert np.all(losses[-1] < losses[0])
  evaluation = training.evaluate(model, state, *images)
  assert np.all(evaluation.accuracy > 0.9)
  assert np.all(evaluation.loss < 0.6)


@pytest.mark.parametrize("method", [methods.BATCHNORM, methods.BNP], ids=lambda m: m.name)
def test_a_lane_does_what_it_does_alone(method, images):
  _, stack, losses = _train(method, [3, 4, 4], [0.1, 0.1, 0.3], images)
  _, alone, loss = _train(method, [4], [0.3], images)
  np.testing.assert_allclose(losses[:, 2], loss[:, 0], rtol=1e-4)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a[2], b[0], rtol=1e-3, atol=1e-5), stack, alone
  )


def test_the_same_seeds_give_the_same_bits(images):
  first, second = (_train(methods.BNP, [1, 2, 3], [0.1, 0.1, 0.1], images) for _ in range(2))
  np.testing.assert_array_equal(first[2], second[2])
  jax.tree.map(np.testing.assert_array_equal, first[1], second[1])
  assert not np.array_equal(first[2][:, 0], first[2][:, 1])


def test_an_epoch_is_every_image_once_in_an_order_of_its_own():
  seeds = training.make_lanes([1, 2], [0.1, 0.1]).seeds
  orders = np.concatenate([training.epoch_order(seeds, epoch, 50) for epoch in (1, 2)])
  np.testing.assert_array_equal(np.sort(orders), np.tile(np.arange(50), (4, 1)))
  assert len({tuple(order) for order in orders}) == 4


def test_reports_its_steps_and_stops_at_whole_batches(images):
  steps = []
  _train(methods.SGD, [1, 2, 3], [0.1] * 3, images, epochs=1, on_steps=steps.append)
  assert sum(steps) == 50 // BATCH_SIZE


def test_evaluates_more_images_than_fit_at_once(images):
  model, state, _ = _train(methods.SGD, [1, 2, 3], [0.1, 0.2, 0.3], images)
  many = jnp.tile(images[0], (43, 1, 1)), jnp.tile(images[1], 43)
  few, all_ = training.evaluate(model, state, *images), training.evaluate(model, state, *many)
  np.testing.assert_allclose(few.accuracy, all_.accuracy)
  np.testing.assert_allclose(few.loss, all_.loss, rtol=1e-6)


def test_divergence_is_chance_and_not_a_crash(images):
  model, state, losses = _train(methods.SGD, [1, 2, 3], [1e30, 0.1, 0.1], images)
  evaluation = training.evaluate(model, state, *images)
  assert not np.isfinite(losses[-1, 0])
  assert not np.isfinite(evaluation.loss[0])
  assert evaluation.accuracy[0] == 0.5
  assert np.isfinite(losses[:, 1]).all()


def test_batchnorm_learns_nothing_from_single_images(images):
  model = MLP((16, 8), 2, methods.BATCHNORM.norm)
  lanes = training.make_lanes([1], [0.1])
  state = training.init(model, methods.BATCHNORM, lanes, images[0])
  state, loss = training.train_epoch(
    *(model, methods.BATCHNORM, 1, state, lanes, 1, *images), on_steps=lambda steps: None
  )
  assert loss[0] > 0.6
