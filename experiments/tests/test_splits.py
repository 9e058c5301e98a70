"""Tests of the training, held-out and test examples of an experiment."""

import dataclasses
import types

from bnp_experiments.catalogue import EXPERIMENTS
from bnp_experiments.errors import UsageError
from bnp_experiments.splits import make_splits
import numpy as np
import pytest

CLASSES = 5


@pytest.fixture
def dataset():
  """Images that hold their own number, of five classes in equal parts."""
  x = np.arange(400).reshape(400, 1, 1).astype(np.float32)
  y = (np.arange(400) % CLASSES).astype(np.uint8)
  return types.SimpleNamespace(x_train=x[:300], y_train=y[:300], x_test=x[300:], y_test=y[300:])


def experiment(**changes):
  return dataclasses.replace(EXPERIMENTS["quickstart"], batch_sizes=(60,), **changes)


def numbers(examples):
  return np.asarray(examples.images).ravel()


def test_a_tenth_of_the_training_images_is_held_out_class_by_class(dataset):
  fit, held_out, test = make_splits(experiment(), dataset)
  assert (len(fit.labels), len(held_out.labels), len(test.labels)) == (270, 30, 100)
  np.testing.assert_array_equal(np.sort([*numbers(fit), *numbers(held_out)]), np.arange(300))
  np.testing.assert_array_equal(np.bincount(held_out.labels), [6] * CLASSES)
  for part in (fit, held_out, test):
    np.testing.assert_array_equal(part.labels, numbers(part) % CLASSES)


def test_the_splits_are_the_same_every_time(dataset):
  first, second = (make_splits(experiment(images=100, test_images=50), dataset) for _ in "12")
  assert [len(part.labels) for part in first] == [90, 10, 50]
  for a, b in zip(first, second, strict=True):
    np.testing.assert_array_equal(a.images, b.images)


def test_a_batch_that_cannot_be_filled_is_refused(dataset):
  with pytest.raises(UsageError, match="60 is more than the 45 images"):
    make_splits(experiment(images=50), dataset)
