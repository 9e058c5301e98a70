"""Tests of the examples: their size, and one of their records, run again."""

import importlib
import json
import pathlib

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[1]
GALLERY = [
  path for path in sorted((ROOT / "examples").glob("*.py")) if path.stem != "online_learning"
]


@pytest.mark.parametrize("path", GALLERY, ids=lambda path: path.stem)
def test_examples_are_short(path):
  assert len(path.read_text().splitlines()) < 150


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
def test_an_example_repeats_its_record(monkeypatch):
  monkeypatch.syspath_prepend(ROOT / "examples")
  federated = importlib.import_module("federated")
  gallery = importlib.import_module("gallery")
  file = ROOT / "notebooks" / "results" / "gallery-federated" / "results.jsonl"
  records = {record["method"]: record for record in map(json.loads, file.read_text().splitlines())}
  record = records["bnp(Adam)"]
  scores = federated.run(gallery.BNP_ADAM, [record["rate"]], record["seeds"][:1])
  # Other versions of XLA round differently, and the test images are 300.
  np.testing.assert_allclose(scores.test, record["test"][:1], atol=0.01)
