"""Tests of the figures: the axes show the runs."""

import dataclasses

from bnp_experiments import figures, methods
from bnp_experiments.catalogue import EXPERIMENTS
from bnp_experiments.outcomes import Outcome
from matplotlib import pyplot as plt
import numpy as np
import pytest


def outcome(method, *losses):
  """Return an outcome with the losses of each epoch; the rest is empty."""
  none = np.zeros(0)
  losses = np.array(losses, float)
  return Outcome(method, 1, (0.1,), none, 0.1, 1, losses, none, none, none)


def draw(*gathered):
  """Draw losses; return the limits of the axis, its scale and the note for the footer."""
  figure, axes = plt.subplots()
  for one in gathered:
    axes.plot(one.train_loss)
  note = figures._scale_loss([axes], list(gathered))
  plt.close(figure)
  return axes.get_ylim(), axes.get_yscale(), note


@pytest.mark.parametrize("blown_up", [50.0, 5e9, np.inf, np.nan])
def test_the_axis_of_losses_ends_below_a_run_that_blew_up(blown_up):
  sgd = outcome(methods.SGD, [2.4, 2.0], [1.8, 1.6])
  bnp = outcome(methods.BNP, [2.0, 1.9], [blown_up, 1.2])
  (low, high), scale, note = draw(sgd, bnp)
  assert low <= 1.2
  assert 2.4 <= high < 5
  assert scale == "linear"
  assert note == (" Losses above 3 are not shown." if np.isfinite(blown_up) else "")


def test_losses_that_are_all_nan_are_drawn():
  assert draw(outcome(methods.SGD, [np.nan, np.nan]))[2] == ""


def test_the_axis_of_losses_shows_all_runs_otherwise():
  (low, high), scale, note = draw(
    outcome(methods.SGD, [2.4, 2.0], [1.8, 1.6]), outcome(methods.BNP, [2.0, 1.9], [19.0, 1.2])
  )
  assert low <= 1.2
  assert high >= 19.0
  assert (scale, note) == ("linear", "")


def test_the_axis_of_losses_is_logarithmic_over_a_wide_range():
  (low, high), scale, note = draw(outcome(methods.SGD, [0.3, 0.3], [0.001, 0.002]))
  assert low <= 0.001
  assert high >= 0.3
  assert (scale, note) == ("log", "")


@pytest.mark.parametrize(
  ("batch_sizes", "shown"), [((512, 60), [60, 512]), ((1, 2, 6, 60, 512), [1, 6, 60])]
)
def test_the_picture_of_rates_has_a_column_for_each_of_a_few_batch_sizes(batch_sizes, shown):
  experiment = dataclasses.replace(EXPERIMENTS["batch-sizes-fc"], batch_sizes=batch_sizes)
  figure = figures._rates(experiment, [])
  plt.close(figure)
  titles = [axes.get_title(loc="left") for axes in figure.axes]
  columns = [f"batch size {size}" for size in shown]
  assert titles == columns * len(experiment.panel_methods)
