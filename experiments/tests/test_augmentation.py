"""Tests of the augmentations: possible results, their frequencies, and reproducibility."""

import collections

from bnp_experiments import augmentation
import jax
import numpy as np
import pytest

RNG = np.random.default_rng(0)
BATCH = 3240


def padded(image):
  return np.pad(image, ((4, 4), (4, 4), (0, 0)))


def parts(image, size):
  """Return the position and flip of every possible crop of an image, by its bytes."""
  found = {}
  for top in range(image.shape[0] - size + 1):
    for left in range(image.shape[1] - size + 1):
      part = image[top : top + size, left : left + size]
      found[part.tobytes()] = top, left, False
      found[part[:, ::-1].tobytes()] = top, left, True
  return found


@pytest.mark.slow
def test_cifar():
  image = RNG.integers(0, 256, (32, 32, 3), np.uint8)
  possible = parts(padded(image), 32)
  assert len(possible) == 9 * 9 * 2
  images = np.broadcast_to(image, (BATCH, 32, 32, 3))
  augmented = jax.jit(augmentation.augment_cifar)(jax.random.key(0), images)
  assert augmented.dtype == np.uint8
  counts = collections.Counter(possible[part.tobytes()] for part in np.asarray(augmented))
  # The chi-squared statistic of 20 expected images for each crop has 161 degrees of freedom.
  assert len(counts) == 9 * 9 * 2
  assert sum((count - 20) ** 2 / 20 for count in counts.values()) < 161 + 4 * np.sqrt(2 * 161)


def test_cifar_keeps_images_apart():
  images = RNG.integers(0, 256, (64, 32, 32, 3), np.uint8)
  augmented = np.asarray(augmentation.augment_cifar(jax.random.key(1), images))
  for image, result in zip(images, augmented, strict=True):
    assert result.tobytes() in parts(padded(image), 32)


def test_imagenet():
  images = RNG.integers(0, 256, (12, 256, 256, 1), np.uint8)
  augmented = np.asarray(jax.jit(augmentation.augment_imagenet)(jax.random.key(0), images))
  assert augmented.shape == (12, 224, 224, 1)
  places = set()
  for image, result in zip(images, augmented, strict=True):
    # Locate the crop by its first line of pixels, then compare every pixel.
    for flip in (False, True):
      part = result[:, ::-1] if flip else result
      windows = np.lib.stride_tricks.sliding_window_view(image[:, :, 0], 224, axis=1)
      for top, left in np.argwhere((windows == part[0, :, 0]).all(-1)):
        np.testing.assert_array_equal(image[top : top + 224, left : left + 224], part)
        places.add((int(top), int(left), flip))
  assert len(places) == 12
  assert {flip for _, _, flip in places} == {False, True}
  assert max(max(top, left) for top, left, _ in places) <= 32


@pytest.mark.parametrize("name", augmentation.AUGMENTATIONS)
def test_results_depend_on_the_key_alone(name):
  images = RNG.integers(0, 256, (8, 256, 256, 1), np.uint8)
  augment = jax.jit(augmentation.AUGMENTATIONS[name])
  first, again, other = (np.asarray(augment(jax.random.key(k), images)) for k in (0, 0, 1))
  np.testing.assert_array_equal(first, again)
  assert (first != other).any()
