"""Tests of the cost of a step: measured numbers against counts by hand, and stored cells."""

import dataclasses
import json
import sys

from bnp_experiments import methods, step_time
from bnp_experiments.__main__ import main
from bnp_experiments.models import MLP
from bnp_experiments.results import FILE
from bnp_experiments.step_time.cells import Cell, Stack, cells
import jax
import numpy as np
import pytest

import bnp_optax

# Adam's bias correction promotes int32 to float.
pytestmark = pytest.mark.usefixtures("standard_promotion")

CELL = Cell("batch", MLP((5,)), (4,), 2, (methods.SGD, methods.BNP))
SCANNED = Cell("layers", Stack(3, True, width=4), (4,), 2, (methods.SGD,))


@pytest.fixture(scope="module")
def measured():
  return step_time.measure(CELL, seconds=0.0)


@pytest.fixture
def small(monkeypatch, tmp_path, measured):
  """Call the command line on two cells, which are measured once for all tests."""
  todo = [CELL, dataclasses.replace(CELL, series="", batch_size=3)]
  taken = []
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(step_time, "cells", lambda scale: todo)
  monkeypatch.setattr(
    step_time, "measure", lambda cell, seconds: taken.append(cell.batch_size) or measured
  )

  def call(*arguments):
    monkeypatch.setattr(sys, "argv", ["bnp-optax", *map(str, arguments)])
    return main(), taken

  return call


def test_times_are_taken_in_rounds_and_divided_within_them(measured):
  sgd, bnp = (np.array(measured["seconds"][name]) for name in ("sgd", "bnp"))
  assert len(sgd) == len(bnp) >= 5
  assert np.all(sgd > 0)
  np.testing.assert_allclose(measured["relative_to_sgd"]["bnp"], bnp / sgd)


def test_the_state_is_two_vectors_a_layer_and_two_counters(measured):
  assert measured["programs"]["sgd"]["state_bytes"] == 0
  assert measured["programs"]["bnp"]["state_bytes"] == 4 * (2 * (4 + 5) + 2)


def test_the_compiler_counts_more_for_bnp_than_for_sgd(measured):
  sgd, bnp = (measured["programs"][name] for name in ("sgd", "bnp"))
  # Parameters and one batch at the least: 4x5 + 5 + 5x10 + 10 weights, 2x4 pixels, 2 labels.
  assert bnp["peak_bytes"] > sgd["peak_bytes"] >= 4 * (85 + 8 + 2)
  for kind in ("flops", "bytes_accessed"):
    assert bnp[kind] > sgd[kind] > 0
  for kind in ("trace_seconds", "compile_seconds"):
    assert bnp[kind] > 0


def test_a_sample_takes_training_steps():
  step = step_time.Step(CELL, methods.BNP)
  step._count = 3
  before = int(step._state[-1][0].count)
  step.sample()
  params, _, (bnp, _) = step._state
  assert bnp.count == before + 3
  # The batch is the same in every step, and so the running mean is on its way to that batch's.
  expected = (1 - 0.99**bnp.count) * np.mean(step._batch[0], axis=0)
  np.testing.assert_allclose(bnp.input_mean["Dense_0"]["kernel"], expected, rtol=1e-4)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))


def test_a_scanned_stack_is_one_layer_of_the_program():
  images = jax.ShapeDtypeStruct((2, 4), "float32")
  for scanned, kernels in ((True, 3), (False, 5)):
    model = Stack(3, scanned, width=4)
    layers = bnp_optax.linen.layers(model, images, train=False, strict=True)
    assert len(layers) == kernels
  times = step_time.measure(SCANNED, seconds=0.0)["seconds"]["sgd"]
  assert min(times) > 0


@pytest.mark.parametrize("scale", ["smoke", "laptop", "paper"])
def test_every_cell_is_another_one_and_has_sgd_first(scale):
  settings = [json.dumps(cell.settings) for cell in cells(scale)]
  assert len(set(settings)) == len(settings)
  assert all(cell.methods[:1] == (methods.SGD,) for cell in cells(scale))


def test_runs_goes_on_and_draws(small, tmp_path, capsys):
  folder = tmp_path / "out"
  status, taken = small("run", "step-time", "--scale", "smoke", "--out", folder)
  assert (status, taken) == (0, [2, 3])
  kinds = [json.loads(line)["kind"] for line in (folder / FILE).read_text().splitlines()]
  assert kinds == ["run", "step_cost", "step_cost"]
  assert (folder / "step-time.png").exists()

  # Killed after its first cell, it goes on with the second.
  lines = (folder / FILE).read_text().splitlines(keepends=True)
  (folder / FILE).write_text("".join(lines[:2]))
  status, taken = small("run", "step-time", "--scale", "smoke", "--out", folder)
  assert (status, taken) == (0, [2, 3, 3])

  (folder / "step-time.md").unlink()
  assert small("figure", "step-time", "--scale", "smoke", "--out", folder)[0] == 0
  table = (folder / "step-time.md").read_text().splitlines()
  assert sum(line.startswith("| FC 5 | 4 | 2 |") for line in table) == 2
  assert sum(line.startswith("| FC 5 | 4 | 3 |") for line in table) == 2
  assert "BNP" in capsys.readouterr().out


def test_options_that_it_does_not_have_are_refused(small, capsys):
  status, taken = small("run", "step-time", "--methods", "sgd")
  assert (status, taken) == (2, [])
  assert "step-time takes --scale and --out alone, found --methods" in capsys.readouterr().err


def test_is_listed(small, capsys):
  assert small("list")[0] == 0
  assert "step-time" in capsys.readouterr().out
