"""Tests of the selection by held-out images."""

import dataclasses

from bnp_experiments import methods, selection
from bnp_experiments.catalogue import EXPERIMENTS
from bnp_experiments.results import open_results
import numpy as np
import pytest


@pytest.mark.parametrize(
  ("accuracy", "loss", "diverged", "expected"),
  [
    ([0.2, 0.5, 0.4], [2.0, 1.5, 1.6], [False, False, False], 1),
    # A point is less than a standard error of 100 images: the loss decides.
    ([0.50, 0.51, 0.4], [1.4, 1.5, 1.0], [False, False, False], 0),
    ([0.2, 0.5, 0.9], [2.0, 1.5, 0.1], [False, False, True], 1),
    ([0.1, 0.1], [np.nan, np.inf], [True, True], 0),
  ],
)
def test_the_winner(accuracy, loss, diverged, expected):
  assert selection.winner(*map(np.array, (accuracy, loss, diverged)), images=100) == expected


def test_a_variant_is_chosen_together_with_the_rate(tmp_path):
  plain, other = (dataclasses.replace(methods.SGD, name=name) for name in ("plain", "other"))
  method = dataclasses.replace(methods.SGD, variants=(plain, other))
  experiment = dataclasses.replace(EXPERIMENTS["quickstart"], methods=(method,), rates=(0.1, 0.3))
  with open_results(tmp_path, []) as results:
    for variant, accuracy in ((plain, [0.4, 0.5]), (other, [0.7, 0.2])):
      assert selection.chosen(experiment, results, method, 6) is None
      results.append(
        experiment.rate_settings(variant, 6)
        | {"validation_accuracy": accuracy, "validation_loss": [1.0, 1.0]}
        | {"diverged": [False, False], "held_out": 100}
        | {"rate": experiment.rates[int(np.argmax(accuracy))]}
      )
    variant, record = selection.chosen(experiment, results, method, 6)
  assert variant == other
  assert record["rate"] == 0.1


def test_one_rate_is_no_choice(tmp_path):
  experiment = dataclasses.replace(EXPERIMENTS["quickstart"], rates=(0.1,))
  with open_results(tmp_path, []) as results:
    method, record = selection.chosen(experiment, results, methods.BNP, 6)
  assert (method, record["rate"]) == (methods.BNP, 0.1)


def test_a_single_rate_gives_way_to_the_one_that_the_paper_states(tmp_path):
  experiment = EXPERIMENTS["fig6-right"]
  with open_results(tmp_path, []) as results:
    rates = {
      method.name: selection.chosen(experiment, results, method, 128)[1]["rate"]
      for method in experiment.methods
    }
  assert rates == {"batchnorm": 0.1, "groupnorm": 0.1, "bnp": 0.01, "bnp_groupnorm": 0.1}
