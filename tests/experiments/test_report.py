"""The docs show what the committed results say, and every picture there is drawn from them."""

import pathlib

import pytest

from bnp_optax.experiments import report
from bnp_optax.experiments.__main__ import main
from bnp_optax.experiments.registry import EXPERIMENTS
from bnp_optax.experiments.results import FILE, read_results

ROOT = pathlib.Path(__file__).parents[2]
RESULTS = ROOT / "notebooks" / "results"


@pytest.mark.parametrize("tabulate", [report.claims, report.rates])
def test_the_docs_hold_the_tables_of_the_committed_results(tabulate):
  _, markdown = tabulate(RESULTS)
  page = (ROOT / "docs" / "experiments.md").read_text()
  assert markdown in page, "Run: bnp-optax report notebooks/results, and copy its tables."


COMMITTED = [
  experiment
  for experiment in (experiment.at("laptop") for experiment in EXPERIMENTS.values())
  if (RESULTS / experiment.folder / FILE).exists()
]


@pytest.mark.parametrize("experiment", COMMITTED, ids=lambda experiment: experiment.name)
def test_committed_results_are_complete(experiment):
  gathered = report.outcomes(experiment, read_results(RESULTS / experiment.folder))
  assert len(gathered) == len(experiment.methods) * len(experiment.batch_sizes)
  assert all(len(outcome.seconds) for outcome in gathered) == experiment.timed
  assert (RESULTS / experiment.folder / f"{experiment.name}.png").exists()


def test_a_report_of_nothing_says_so(capsys, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr("sys.argv", ["bnp-optax", "report", "nowhere"])
  assert main() == 0
  assert "not run" in capsys.readouterr().out
  assert not (tmp_path / "nowhere").exists()


def test_a_figure_of_nothing_is_one_line(capsys, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr("sys.argv", ["bnp-optax", "figure", "fig3-left"])
  assert main() == 2
  captured = capsys.readouterr()
  assert captured.err.startswith(
    "bnp-optax: no results in bnp_optax_results/fig3-left-mnist-laptop"
  )
  assert captured.err.count("\n") == 1
