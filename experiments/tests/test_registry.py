"""Tests of the catalogue: every experiment runs at the smallest scale and judges its claims."""

import dataclasses
import functools
import pathlib

from bnp_experiments import data, evaluation, imagenet, training
from bnp_experiments.__main__ import main
from bnp_experiments.catalogue import EXPERIMENTS
from bnp_experiments.evaluation import evaluate
from bnp_experiments.experiment import SCALES
import jax
import numpy as np
from PIL import Image
import pytest

AVAILABLE = {"digits", "mnist", "cifar10", "pydoc"}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_is_well_formed_at_every_scale(name):
  experiment = EXPERIMENTS[name]
  names = {method.name for method in experiment.methods}
  assert set(experiment.paper_rates) <= names
  assert experiment.rates == tuple(sorted(experiment.rates))
  for scale in SCALES:
    scaled = experiment.at(scale)
    assert scaled.scale == scale
    scaled.check()
    assert len(scaled.claims) == len(experiment.claims)
    # Both the colours and the markers of the methods in one panel are distinct.
    for panel in scaled.panel_methods:
      assert len({method.colour for method in panel}) == len(panel)
      assert len({method.marker for method in panel}) == len(panel)
    for claim in scaled.claims:
      assert claim.judge([]).verdict == "not run"


@pytest.mark.data
@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("name", [n for n in EXPERIMENTS if EXPERIMENTS[n].dataset in AVAILABLE])
def test_runs_at_smoke_scale(name, monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr("sys.argv", ["bnp-optax", "run", name, "--scale", "smoke"])
  assert main() == 0
  experiment = EXPERIMENTS[name].at("smoke")
  folder = pathlib.Path("bnp_optax_results") / experiment.folder
  assert list(folder.glob("*.png"))
  monkeypatch.setattr("sys.argv", ["bnp-optax", "report"])
  assert main() == 0
  report = pathlib.Path("bnp_optax_results/claims.md").read_text()
  claims = [line for line in report.splitlines() if line.startswith(f"| {name} ")]
  assert len(claims) == len(experiment.claims)
  assert not any("not run" in line for line in claims)


def _cifar100(folder):
  rng = np.random.default_rng(0)
  (folder / "cifar-100-binary").mkdir(parents=True)
  for file, count in (("train.bin", 500), ("test.bin", 100)):
    records = rng.integers(0, 256, (count, 2 + 3072), np.uint8)
    records[:, :2] = np.arange(count)[:, None] % [20, 100]
    (folder / "cifar-100-binary" / file).write_bytes(records.tobytes())


def _imagenet(folder, classes=imagenet.CLASSES):
  rng = np.random.default_rng(0)
  for split, count in (("train", 2), ("val", 1)):
    for name in range(classes):
      place = folder / split / f"n{name:08}"
      place.mkdir(parents=True)
      for number in range(count):
        pixels = rng.integers(0, 256, (10, 14, 3), np.uint8)
        Image.fromarray(pixels).save(place / f"{number}.JPEG")


@pytest.mark.slow
@pytest.mark.parametrize(
  ("name", "make", "parameters"),
  [("fig6-right", _cifar100, 1_736_000), ("fig7", _imagenet, 11_689_512)],
)
def test_takes_steps_on_generated_files(name, make, parameters, tmp_path, monkeypatch):
  """Train on generated files of data sets that are not available to the tests."""
  monkeypatch.setenv("BNP_OPTAX_DATA", str(tmp_path))
  monkeypatch.setattr(evaluation, "_AT_ONCE", 4)
  paper, smoke = EXPERIMENTS[name], EXPERIMENTS[name].at("smoke")
  make(tmp_path / paper.dataset)
  if paper.dataset == "cifar100":
    small = dataclasses.replace(data.SOURCES["cifar100"], counts=(500, 100))
    monkeypatch.setitem(data.SOURCES, "cifar100", small)
  dataset = data.load(paper.dataset)
  assert dataset.classes == {"cifar100": 100, "imagenet": 1000}[paper.dataset]
  method = paper.methods[-1]
  setup = smoke.setup(method, 4, 8, dataset.classes)
  lanes = training.make_lanes([1], [0.1])
  indices = np.arange(8)
  images = dataset.x_train.take(indices, axis=0)
  state = training.init(setup, lanes, images)
  state, loss = training.train_epoch(
    *(setup, state, lanes, 1, training.Examples(images, dataset.y_train[indices])),
    on_steps=lambda steps: None,
  )
  assert np.isfinite(loss).all()
  scores = evaluate(setup, state, dataset.x_test.take(indices, axis=0), dataset.y_test[indices])
  assert np.isfinite(scores.loss).all()
  full = paper.setup(paper.methods[0], 4, 8, dataset.classes).model
  init = functools.partial(full.init, train=False)
  shapes = jax.eval_shape(init, jax.random.key(0), np.zeros((1, 32, 32, 3)))
  count = sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(shapes["params"]))
  assert abs(count - parameters) <= 0.01 * parameters


def test_imagenet_is_read_when_indexed(tmp_path, monkeypatch):
  monkeypatch.setenv("BNP_OPTAX_DATA", str(tmp_path))
  with pytest.raises(data.DataError, match=r"train is missing.*image-net\.org"):
    data.load("imagenet")
  _imagenet(tmp_path / "imagenet")
  dataset = data.load("imagenet")
  assert len(dataset.x_train) == 2000
  assert dataset.x_train[:3].shape == (3, 256, 256, 3)
  assert dataset.x_test.take(np.array([5, 7]), axis=0)[np.array([1])].shape == (1, 224, 224, 3)
  np.testing.assert_array_equal(dataset.y_train[:4], [0, 0, 1, 1])
  np.testing.assert_array_equal(dataset.y_test, np.arange(1000))
  truncated = tmp_path / "imagenet/train/n00000003/1.JPEG"
  truncated.write_bytes(truncated.read_bytes()[:100])
  with pytest.raises(data.DataError, match=r"n00000003/1\.JPEG cannot be read"):
    dataset.x_train[6:8]
  truncated.unlink()
  (truncated.parent / "0.JPEG").unlink()
  with pytest.raises(data.DataError, match=r"1000 classes, 1 of them without"):
    data.load("imagenet")
