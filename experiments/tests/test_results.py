"""Tests of the results file: lines that survive a killed run, written by one process at a time."""

import json
import math

from bnp_experiments.errors import ExperimentError, UsageError
from bnp_experiments.results import FILE, open_results
import pytest

COMMAND = ["bnp-optax", "run", "quickstart"]


def _lines(folder):
  return [json.loads(line) for line in (folder / FILE).read_text().splitlines()]


def test_records_follow_a_header_that_says_what_made_them(tmp_path):
  with open_results(tmp_path / "deep" / "folder", COMMAND) as results:
    results.append({"kind": "epoch", "epoch": 1})
    results.append({"kind": "epoch", "epoch": 2})
  header, *records = _lines(tmp_path / "deep" / "folder")
  assert header["kind"] == "run"
  assert header["command"] == COMMAND
  assert set(header["versions"]) == {"python", "bnp_optax", "jax", "flax", "optax"}
  assert header["machine"]["devices"] >= 1
  assert "git_revision" in header
  assert records == [{"kind": "epoch", "epoch": 1}, {"kind": "epoch", "epoch": 2}]


def test_a_run_that_adds_nothing_leaves_no_trace(tmp_path):
  with open_results(tmp_path, COMMAND) as results:
    results.append({"epoch": 1})
  before = (tmp_path / FILE).read_bytes()
  with open_results(tmp_path, COMMAND) as results:
    assert results.find(epoch=1)
  assert (tmp_path / FILE).read_bytes() == before


def test_find_takes_the_records_that_have_all_the_fields(tmp_path):
  with open_results(tmp_path, COMMAND) as results:
    results.append({"method": "bnp", "rate": 0.3, "seeds": [1, 2]})
    results.append({"method": "sgd", "rate": 0.3, "seeds": [1, 2]})
    assert len(results.find(rate=0.3)) == 2
    assert results.find(method="bnp", seeds=(1, 2))[0]["method"] == "bnp"
    assert results.find(method="bnp", rate=0.1) == []
    assert len(results.find(method="bnp", nothing=None)) == 1
    assert results.find(rate=0.3, method=None) == []


def test_what_diverged_is_null(tmp_path):
  with open_results(tmp_path, COMMAND) as results:
    results.append({"train_loss": [math.nan, 1.5, math.inf]})
  assert _lines(tmp_path)[-1] == {"train_loss": [None, 1.5, None]}


@pytest.mark.parametrize("torn", ['{"epoch": 2, "tra', '{"epoch": 2}', '"'])
def test_a_torn_last_line_is_dropped(tmp_path, torn):
  with open_results(tmp_path, COMMAND) as results:
    results.append({"epoch": 1})
  with (tmp_path / FILE).open("a") as file:
    file.write(torn)
  with open_results(tmp_path, COMMAND) as results:
    assert results.find(epoch=2) == []
    results.append({"epoch": 2})
  assert [line.get("epoch") for line in _lines(tmp_path)] == [None, 1, None, 2]


@pytest.mark.parametrize("line", ["not json", "[1, 2]"])
def test_a_broken_line_is_refused(tmp_path, line):
  (tmp_path / FILE).write_text('{"epoch": 1}\n' + line + '\n{"epoch": 2}\n')
  with (
    pytest.raises(ExperimentError, match=r"results\.jsonl, line 2"),
    open_results(tmp_path, COMMAND),
  ):
    pass


def test_a_second_process_is_refused(tmp_path):
  with (
    open_results(tmp_path, COMMAND),
    pytest.raises(UsageError, match="another run is writing"),
    open_results(tmp_path, COMMAND),
  ):
    pass
  with open_results(tmp_path, COMMAND):
    pass


def test_a_place_that_cannot_be_written_to(tmp_path):
  (tmp_path / "file").touch()
  with (
    pytest.raises(UsageError, match="--out"),
    open_results(tmp_path / "file" / "folder", COMMAND),
  ):
    pass
