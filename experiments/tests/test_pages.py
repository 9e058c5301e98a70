"""Tests of the pages that quote records: each table holds the numbers of the committed results."""

import itertools
import json
import pathlib
import re

from bnp_experiments import report
from bnp_experiments.catalogue import EXPERIMENTS
from bnp_experiments.methods import METHODS, SGD
from bnp_experiments.outcomes import find
from bnp_experiments.results import FILE, read_results
from bnp_experiments.step_time.cells import cells
import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[2]
RESULTS = ROOT / "notebooks" / "results"
COMPARED = ("sgd", "batchnorm", "layernorm", "adam", "muon", "bnp", "bnp_adam")
COMPARED += ("bnp_debias", "bnp_adam_debias")


def outcomes(name, scale="laptop"):
  experiment = EXPERIMENTS[name].at(scale)
  return experiment, report.outcomes(experiment, read_results(RESULTS / experiment.folder))


def page(name):
  return (ROOT / name).read_text().splitlines()


@pytest.mark.slow
@pytest.mark.parametrize(
  "name", ["quickstart", "batch-sizes-fc", "batch-sizes-cnn", "vit", "language-model"]
)
def test_the_tuning_guide_has_the_chosen_rates(name):
  experiment, gathered = outcomes(name)
  sizes = experiment.batch_sizes
  names = {method.name for method in experiment.methods}
  cells = [f"`{name}`", ", ".join(map(str, sizes))]
  for method in ("bnp", "bnp_adam"):
    # All methods of the quickstart have the default start.
    default = method if name == "quickstart" else f"{method}_debias"
    found = [find(gathered, default, size) for size in sizes]
    rates = ", ".join("–" if o is None else f"{o.rate:g}" for o in found)
    cells.append(rates if default in names else "not run")
  assert any(line.endswith(f"| {' | '.join(cells)} |") for line in page("docs/tuning.md")), cells


@pytest.mark.slow
def test_the_tuning_guide_counts_where_adam_is_ahead():
  ahead = []
  for name in ("batch-sizes-fc", "batch-sizes-cnn"):
    experiment, gathered = outcomes(name)
    for size in experiment.batch_sizes:
      adam, sgd = (find(gathered, x, size) for x in ("bnp_adam_debias", "bnp_debias"))
      if adam and sgd:
        ahead.append(adam.final.mean() > sgd.final.mean())
  assert f"in {sum(ahead)} of {len(ahead)} pairs" in " ".join(page("docs/tuning.md"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["batch-sizes-fc", "batch-sizes-cnn"])
def test_the_comparison_has_the_accuracies(name):
  _, gathered = outcomes(name)
  for method in COMPARED:
    found = [find(gathered, method, size) for size in (1, 6, 60, 512)]
    label = METHODS[method].label
    label = f"**{label}**" if "bnp" in method else label
    cells = (
      f"{100 * o.final.mean():.1f} at {o.rate:g}{'*' * o.at_edge}" if o else "not run"
      for o in found
    )
    line = f"| {label} | {' | '.join(cells)} |"
    assert line in page("docs/comparison.md"), line


def test_the_comparison_has_the_times_of_a_step():
  results = read_results(RESULTS / "step-time-laptop")
  for cell in cells("laptop"):
    if cell.network.title == "FC 100-100" and cell.batch_size in (1, 60, 512):
      times = results.find(**cell.settings)[-1]["relative_to_sgd"]
      for method in cell.methods:
        if method.name in ("batchnorm", "layernorm", "groupnorm", "adam", "bnp", "bnp_adam"):
          column = {1: 1, 60: 2, 512: 3}[cell.batch_size]
          (line,) = (
            line.split("|")
            for line in page("docs/comparison.md")
            if line.startswith((f"| {method.label} | ", f"| **{method.label}** | "))
            and "x |" in line
          )
          assert line[column + 1].strip() == f"{np.median(times[method.name]):.2f}x"
      assert np.median(times[SGD.name]) == 1


def test_the_readme_has_the_quickstart():
  experiment, gathered = outcomes("quickstart")
  for method in experiment.methods:
    found = [find(gathered, method.name, size) for size in experiment.batch_sizes]
    texts = [f"{100 * o.final.mean():.1f}" for o in found]
    if method.bnp:
      label, texts = f"**{method.label}**", [f"**{text}**" for text in texts]
    else:
      label = method.label
    line = f"| {label} | {' | '.join(texts)} |"
    assert line in page("README.md"), line


@pytest.mark.parametrize(
  ("name", "size", "text", "methods"),
  [
    ("fig4-right-fc", 1, "{} % with SGD and at {} % with BNP at batch size 1", ("sgd", "bnp")),
    ("batch-sizes-fc", 512, "{} and {} % at 512", ("sgd", "bnp_debias")),
    (
      *("batch-sizes-fc", 60, "{} % with Adam and at {} % with `bnp(adam)`"),
      ("adam", "bnp_adam_debias"),
    ),
    (
      *("fig5-right", 2, "{} % with BatchNorm, at {} % with SGD and at {} % with BNP"),
      ("batchnorm", "sgd", "bnp"),
    ),
    ("fig5-right", 2, "trained with Adam, ends at {} %", ("four_things",)),
  ],
)
def test_the_readme_has_the_long_runs(name, size, text, methods):
  _, gathered = outcomes(name, "paper")
  final = [100 * find(gathered, method, size).final.mean() for method in methods]
  assert text.format(*(f"{x:.1f}" for x in final)) in " ".join(page("README.md"))


@pytest.mark.parametrize("path", sorted(RESULTS.glob("gallery-*/*.md")), ids=lambda path: path.stem)
def test_the_gallery_has_the_tables_of_the_examples(path):
  assert path.read_text() in (ROOT / "docs" / "gallery.md").read_text()
  assert f"{path.parent.name}/{path.stem}.png" in (ROOT / "docs" / "gallery.md").read_text()


@pytest.mark.parametrize(
  ("title", "name"),
  [
    ("federated averaging", "federated"),
    ("padded graph network", "graph"),
    ("transformer on characters", "characters"),
  ],
)
def test_the_gallery_counts_the_seeds_that_are_better(title, name):
  path = RESULTS / f"gallery-{name}" / FILE
  records = {r["method"]: r["test"] for r in map(json.loads, path.read_text().splitlines())}
  ours, theirs = records["bnp(Adam)"], records["Adam"]
  assert min(ours) > max(theirs) if name == "federated" else max(ours) < min(theirs)
  assert f"| {title} | better, every seed |" in page("docs/gallery.md")


@pytest.mark.slow
@pytest.mark.parametrize(
  ("row", "name", "scale"),
  [
    ("FC, 1", "fig4-right-fc", "paper"),
    ("FC, 1", "batch-sizes-fc", "laptop"),
    ("FC, 6", "fig4-left", "paper"),
    ("FC, 6", "batch-sizes-fc", "laptop"),
    ("FC, 60", "fig3-right", "paper"),
    ("FC, 60", "batch-sizes-fc", "paper"),
    ("FC, 60", "batch-sizes-fc", "laptop"),
    ("FC, 512", "batch-sizes-fc", "paper"),
    ("FC, 512", "batch-sizes-fc", "laptop"),
    ("CNN, 1", "batch-sizes-cnn", "laptop"),
    ("CNN, 2", "fig5-right", "paper"),
    ("CNN, 2", "batch-sizes-cnn", "laptop"),
    ("CNN, 60", "batch-sizes-cnn", "laptop"),
    ("CNN, 128", "fig5-left", "laptop"),
    ("CNN, 512", "batch-sizes-cnn", "laptop"),
    ("ViT, 4", "vit", "laptop"),
    ("ViT, 64", "vit", "laptop"),
    ("language model, 4", "language-model", "laptop"),
    ("language model, 64", "language-model", "laptop"),
  ],
)
def test_the_summary_has_the_accuracies(row, name, scale):
  experiment, gathered = outcomes(name, scale)
  found = [find(gathered, method, int(row.split(", ")[1])) for method in COMPARED]
  texts = ["–" if o is None else f"{100 * o.final.mean():.1f}" for o in found]
  images = "all" if experiment.images is None else f"{experiment.images:,}"
  extent = f"{experiment.length}, {images}, {experiment.seeds}"
  line = f"| {row} | {' | '.join(texts)} | {extent} |"
  assert line in page("docs/experiments.md"), line


@pytest.mark.parametrize("method", ["adam", "bnp_adam", "bnp_adam_debias"])
def test_the_transformers_without_layernorm(method):
  texts = []
  for name in ("vit", "language-model"):
    _, gathered = outcomes(name)
    for layernorm, size in itertools.product(("", "_plain"), (64, 4)):
      final = find(gathered, method + layernorm, size).final
      texts.append(f"{100 * final.mean():.1f}")
  assert f"| {METHODS[method].label} | {' | '.join(texts)} |" in page(
    "docs/experiments/beyond.md"
  ), texts


@pytest.mark.parametrize(("label", "name"), [("CNN", "batch-sizes-cnn"), ("FC", "batch-sizes-fc")])
@pytest.mark.parametrize("method", ["bnp", "bnp_adam"])
def test_the_gain_of_the_default_start(method, label, name):
  _, gathered = outcomes(name)
  sizes = (1, 2, 4, 6, 16, 60, 128, 512)
  start, paper = (
    np.array([find(gathered, method + suffix, size).final.mean() for size in sizes])
    for suffix in ("_debias", "")
  )
  texts = [f"{x:.1f}" for x in (100 * (start - paper)).round(1) + 0.0]
  line = f"| {METHODS[f'{method}_debias'].label}, {label} | {' | '.join(texts)} |"
  assert line in page("docs/experiments/beyond.md"), line


@pytest.mark.slow
def test_the_findings_count_the_verdicts():
  table, _ = report.claims(RESULTS)
  count, *numbers = (
    re.search(pattern, table.title)[1]
    for pattern in (
      r"(\d+) claims",
      r"holds: (\d+)",
      r"not hold: (\d+)",
      r"spread: (\d+)",
      r"run: (\d+)",
    )
  )
  text = " ".join(" ".join(page("docs/experiments.md")).split())
  holds, fails, within, missing = numbers
  assert f"Of the {count} claims" in text
  assert f"{holds} hold, {fails} do not hold, {within} are within the spread" in text
  assert f"and {missing} were not run" in text


def test_the_lead_at_the_start_of_figure_3():
  _, gathered = outcomes("fig3-left")
  ahead = find(gathered, "bnp", 60).early.mean() - find(gathered, "batchnorm", 60).early.mean()
  assert f"BNP is ahead by {100 * ahead:.2f} points" in " ".join(page("docs/experiments/claims.md"))
