"""Tests of colours and markers: methods in one panel are distinct, for colour-blind readers too."""

import importlib.util
import itertools
import pathlib

from bnp_experiments.catalogue import EXPERIMENTS
from bnp_experiments.methods import METHODS
from bnp_experiments.step_time.cells import cells
import numpy as np
import pytest

# How the colours of linear RGB appear (Machado, Oliveira and Fernandes, 2009, severity 1).
VISIONS = {
  "normal": np.eye(3),
  "protanopia": np.array(
    [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.052]]
  ),
  "deuteranopia": np.array(
    [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]]
  ),
  "tritanopia": np.array(
    [
      [1.255528, -0.076749, -0.178779],
      [-0.078411, 0.930809, 0.147602],
      [0.004733, 0.691367, 0.3039],
    ]
  ),
}
XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
LEAST_DIFFERENCE = 15  # In CIELAB units; 2.3 is just noticeable in large areas side by side.

ROOT = pathlib.Path(__file__).parents[2]


def example(name):
  """Import a module of the examples."""
  spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
  module = importlib.util.module_from_spec(spec)
  with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(ROOT / "examples")
    spec.loader.exec_module(module)
  return module


EXAMPLES = [example(name).METHODS for name in ("gallery", "online_learning", "unet")]
PANELS = {
  tuple(dict.fromkeys((method.label, method.colour, method.marker) for method in panel))
  for experiment in EXPERIMENTS.values()
  for scale in ("laptop", "paper")
  for panel in experiment.at(scale).panel_methods
}
PANELS |= {tuple((m.label, m.colour, m.marker) for m in cell.methods) for cell in cells("laptop")}
PANELS |= {tuple((m.label, m.colour, m.marker) for m in methods) for methods in EXAMPLES}


def lab(colour, vision):
  """Return the CIELAB coordinates of a colour as it appears to a reader."""
  rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
  linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
  ratio = XYZ @ (VISIONS[vision] @ linear).clip(0, 1) / XYZ.sum(axis=1)
  x, y, z = np.where(ratio > (6 / 29) ** 3, np.cbrt(ratio), ratio / (3 * (6 / 29) ** 2) + 4 / 29)
  return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("experiment", EXPERIMENTS.values(), ids=lambda experiment: experiment.name)
def test_every_method_is_in_a_panel(experiment):
  names = {name for panel in experiment.panels for name in panel}
  assert not experiment.panels or names == {method.name for method in experiment.methods}
  assert {m for panel in experiment.panel_methods for m in panel} == set(experiment.methods)


@pytest.mark.parametrize("vision", VISIONS)
@pytest.mark.parametrize("panel", sorted(PANELS), ids=lambda panel: ",".join(m[0] for m in panel))
def test_methods_of_a_panel_differ(panel, vision):
  for (one, *a), (other, *b) in itertools.combinations(panel, 2):
    assert a[1] != b[1], f"{one} and {other} have the same marker"
    difference = np.linalg.norm(lab(a[0], vision) - lab(b[0], vision))
    assert difference > LEAST_DIFFERENCE, f"{one} and {other}: {difference:.1f}"


@pytest.mark.parametrize("methods", EXAMPLES)
def test_examples_have_the_colours_of_the_experiments(methods):
  ours = {m.label: (m.colour, m.marker) for m in METHODS.values()}
  theirs = {m.label: (m.colour, m.marker) for m in methods if m.label in ours}
  assert theirs.keys() >= {"Adam", "bnp(Adam)"}
  assert theirs == {label: ours[label] for label in theirs}
