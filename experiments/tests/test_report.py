"""Tests of the reports: the docs and the committed figures agree with the committed results."""

import dataclasses
import itertools
import json
import pathlib
import re

from bnp_experiments import methods, report
from bnp_experiments.__main__ import main, recorded
from bnp_experiments.catalogue import EXPERIMENTS
from bnp_experiments.outcomes import Outcome, plateau
from bnp_experiments.results import FILE, read_results
from bnp_experiments.step_time import report as times
from bnp_experiments.step_time.cells import cells
import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[2]
RESULTS = ROOT / "notebooks" / "results"


@pytest.mark.slow
@pytest.mark.parametrize("tabulate", [report.claims, report.rates])
def test_the_docs_hold_the_tables_of_the_committed_results(tabulate):
  _, markdown = tabulate(RESULTS)
  page = (ROOT / "docs" / "experiments" / "claims.md").read_text()
  assert markdown in page, "Run: bnp-optax report notebooks/results, and copy its tables."


COMMITTED = [
  experiment
  for experiment in (experiment.at("laptop") for experiment in EXPERIMENTS.values())
  if (RESULTS / experiment.folder / FILE).exists()
]


# What was not run: names of methods and the batch sizes.
MISSING = {
  "batch-sizes-fc": [
    (method, size)
    for method in ("bnp_muon_debias", "bnp_muon_unscaled")
    for size in (1, 2, 4, 6, 16)
  ],
}


@pytest.mark.parametrize("experiment", COMMITTED, ids=lambda experiment: experiment.name)
def test_committed_results_are_complete(experiment):
  gathered = report.outcomes(experiment, read_results(RESULTS / experiment.folder))
  found = [(outcome.method.name, outcome.batch_size) for outcome in gathered]
  missing = MISSING.get(experiment.name, [])
  names = [method.name for method in experiment.methods]
  assert sorted(found + missing) == sorted(itertools.product(names, experiment.batch_sizes))
  for outcome in gathered:
    timed = experiment.timed and outcome.method.name not in experiment.untimed
    assert (len(outcome.seconds) > 0) == timed
  assert (RESULTS / experiment.folder / f"{experiment.name}.png").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
  "folder", [file.parent for file in sorted(RESULTS.glob(f"*/{FILE}"))], ids=lambda x: x.name
)
def test_the_experiment_of_a_folder_is_read_from_its_records(folder):
  found = recorded(folder)
  if found is None:
    assert folder.name.partition("-")[0] in {"gallery", "online", "step"}
    return
  experiment, command = found
  assert folder.name.startswith(f"{experiment.name}-{experiment.dataset}")
  assert command.split()[:3] == ["bnp-optax", "run", experiment.name]
  # All methods and batch sizes that have outcomes, also those of earlier commands.
  whole, results = EXPERIMENTS[experiment.name], read_results(folder)
  whole = dataclasses.replace(
    experiment,
    methods=whole.at(experiment.scale).methods,
    batch_sizes=whole.at(experiment.scale).batch_sizes,
  )
  found = {(o.method, o.batch_size) for o in report.outcomes(whole, results)}
  assert found
  assert found == {(o.method, o.batch_size) for o in report.outcomes(experiment, results)}


@pytest.mark.parametrize(
  ("accuracy", "expected"),
  [
    ((0.40, 0.49, 0.50, 0.495, 0.30), (0.01, 0.1)),
    ((0.40, 0.48, 0.50, 0.48, 0.50), (0.03, 0.03)),  # Not across a gap.
    ((0.50, 0.50, 0.50, 0.50, 0.50), (0.003, 0.3)),
    ((0.10, 0.10, 0.10, 0.10, 0.50), (0.3, 0.3)),
  ],
)
def test_a_plateau_is_an_unbroken_run_of_rates_around_the_best(accuracy, expected):
  rates = (0.003, 0.01, 0.03, 0.1, 0.3)
  assert plateau(rates, np.array(accuracy)) == expected


def outcome(rates, accuracy, method, batch_size):
  none = np.zeros(0)
  return Outcome(
    *(method, batch_size, rates, np.array(accuracy), rates[0], 1, none, none, none, none)
  )


def test_plateaus_are_decades_and_mark_the_edge_of_the_grid():
  experiment = dataclasses.replace(
    EXPERIMENTS["batch-sizes-fc"].at("laptop"),
    batch_sizes=(1, 6, 60),
    methods=(methods.SGD, methods.BNP),
  )
  gathered = [
    outcome((0.01, 0.1, 1.0, 10.0), (0.2, 0.5, 0.495, 0.1), methods.BNP, 1),
    outcome((0.01, 0.1, 1.0, 10.0), (0.5, 0.5, 0.495, 0.1), methods.BNP, 6),
    outcome((0.01, 0.1, 1.0, 10.0), (0.1, 0.1, 0.1, 0.1), methods.BNP, 60),
  ]
  _, markdown = report.plateaus(experiment, gathered)
  assert "| SGD | not run | not run | not run |" in markdown
  assert "| BNP, paper's start | 1.0 | ≥ 2.0 | does not train |" in markdown


def test_the_figure_of_batch_sizes_has_the_plateaus(capsys, tmp_path, monkeypatch):
  records = [
    {"method": "bnp", "rates": [0.003, 0.03], "rate": 0.03, "validation_accuracy": [0.3, 0.5]},
    {"method": "bnp", "rate": 0.03, "steps": 9, "train_loss": [1.0], "test_accuracy": [0.5]},
  ]
  experiment = dataclasses.replace(
    EXPERIMENTS["batch-sizes-fc"].at("smoke"), methods=(methods.BNP,), batch_sizes=(1,)
  )
  settings = (
    experiment.rate_settings(methods.BNP, 1),
    experiment.epoch_settings(methods.BNP, 1, 0.03),
  )
  lines = [json.dumps(a | b) for a, b in zip(settings, records, strict=True)]
  (tmp_path / FILE).write_text("\n".join(lines) + "\n")
  arguments = "figure batch-sizes-fc --scale smoke --methods bnp sgd --batch-sizes 1 --out"
  monkeypatch.setattr("sys.argv", ["bnp-optax", *arguments.split(), str(tmp_path)])
  assert main() == 0
  assert "Decades" in capsys.readouterr().out
  assert "| BNP, paper's start | ≥ 0.0 |" in (tmp_path / "batch-sizes-fc-plateaus.md").read_text()


def test_the_pages_on_performance_hold_the_tables_of_the_committed_times():
  results = read_results(RESULTS / "step-time-laptop")
  measured = [(cell, results.find(**cell.settings)[-1]) for cell in cells("laptop")]
  pages = ("performance.md", "experiments/step.md")
  for page, (_, markdown) in zip(pages, times.tables(measured), strict=True):
    text = (ROOT / "docs" / page).read_text()
    assert markdown in text, "Run: bnp-optax figure step-time, and copy its tables."


def test_a_report_without_results_is_one_line(capsys, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr("sys.argv", ["bnp-optax", "report", "nowhere"])
  assert main() == 2
  captured = capsys.readouterr()
  assert captured.err.startswith("bnp-optax: no results in nowhere: run an experiment first")
  assert captured.err.count("\n") == 1
  assert not (tmp_path / "nowhere").exists()


def test_a_report_starts_with_the_number_of_each_verdict(capsys, tmp_path, monkeypatch):
  (tmp_path / "fig9-cifar10-laptop").mkdir()
  lines = (RESULTS / "fig9-cifar10-laptop" / FILE).read_text()
  (tmp_path / "fig9-cifar10-laptop" / FILE).write_text(lines)
  monkeypatch.setattr("sys.argv", ["bnp-optax", "report", str(tmp_path)])
  assert main() == 0
  first = capsys.readouterr().out.splitlines()[0]
  numbers = dict(re.findall(r"([a-z ]+): (\d+)", first))
  count = sum(len(experiment.claims) for experiment in EXPERIMENTS.values())
  assert first.startswith(f"{count} claims. ")
  assert sum(map(int, numbers.values())) == count
  table = (tmp_path / "claims.md").read_text().splitlines()
  verdicts = [line.rsplit("|", 2)[1].strip() for line in table]
  assert int(numbers[" holds"]) == verdicts.count("holds") == 1


def test_a_figure_without_results_is_one_line(capsys, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr("sys.argv", ["bnp-optax", "figure", "fig3-left"])
  assert main() == 2
  captured = capsys.readouterr()
  assert captured.err.startswith(
    "bnp-optax: no results in bnp_optax_results/fig3-left-mnist-laptop"
  )
  assert captured.err.endswith("run it first\n")
  assert captured.err.count("\n") == 1


def test_an_incomplete_run_does_not_hide_a_smaller_one(tmp_path):
  for scale in ("laptop", "paper"):
    (tmp_path / f"fig4-left-cifar10-{scale}").mkdir()
  lines = (RESULTS / "fig4-left-cifar10-laptop" / FILE).read_text()
  (tmp_path / "fig4-left-cifar10-laptop" / FILE).write_text(lines)
  (tmp_path / "fig4-left-cifar10-paper" / FILE).write_text(lines.splitlines()[0] + "\n")
  table = report.claims(tmp_path)[1].splitlines()
  claims = [line for line in table if line.startswith("| fig4-left")]
  assert claims
  assert not [line for line in claims if "not run" in line]


def test_a_claim_is_judged_at_the_largest_scale_that_has_its_methods(tmp_path):
  for scale, names in (("laptop", None), ("paper", ("sgd", "bnp"))):
    folder = f"fig4-left-cifar10-{scale}"
    (tmp_path / folder).mkdir()
    lines = (RESULTS / folder / FILE).read_text().splitlines()
    kept = [line for line in lines if names is None or json.loads(line).get("method") in names]
    (tmp_path / folder / FILE).write_text("\n".join(kept) + "\n")
  table = [line for line in report.claims(tmp_path)[1].splitlines() if "fig4-left" in line]
  settings = {line.split("|")[3].strip(): line.split("|")[2] for line in table}
  assert "20 epochs, 5 seeds" in settings["BNP ends above the vanilla network"]
  assert "5 epochs, 3 seeds" in settings["BNP ends above BatchNorm"]
  chosen = [line for line in report.rates(tmp_path)[1].splitlines() if "fig4-left" in line]
  assert len(chosen) == len(EXPERIMENTS["fig4-left"].paper_rates)


def test_a_run_with_another_number_of_seeds_is_judged(tmp_path):
  """One seed decides nothing, and the setting has its number."""
  folder = tmp_path / "fig4-left-cifar10-paper"
  folder.mkdir()
  lines = []
  for line in (RESULTS / folder.name / FILE).read_text().splitlines():
    record = json.loads(line)
    if record["kind"] == "epoch":
      record |= {key: record[key][:1] for key in ("seeds", "train_loss", "test_accuracy")}
    lines.append(json.dumps(record))
  (folder / FILE).write_text("\n".join(lines) + "\n")
  table = [line for line in report.claims(tmp_path)[1].splitlines() if "fig4-left" in line]
  assert table
  for line in table:
    assert "20 epochs, 1 seed |" in line
    assert line.endswith("| within the spread |")


@pytest.mark.parametrize("file", sorted(RESULTS.glob(f"*-*/{FILE}")), ids=lambda x: x.parent.name)
def test_each_record_follows_the_command_that_made_it(file):
  records = [json.loads(line) for line in file.read_text().splitlines()]
  if "kind" not in records[0]:
    return
  assert records[0]["kind"] == "run"
  kinds = [record["kind"] for record in records]
  assert not [pair for pair in itertools.pairwise([*kinds, "run"]) if pair == ("run", "run")]
  for record in records:
    if record["kind"] == "run":
      command = " ".join(record["command"])
      options = dict(re.findall(r"--([\w-]+) ([^-][^-]*?)(?= --|$)", command))
    elif record["kind"] in ("trial", "rate", "epoch"):
      name, size = record["method"].partition(",")[0], str(record["batch_size"])
      assert name in options.get("methods", name).split()
      assert size in options.get("batch-sizes", size).split()
