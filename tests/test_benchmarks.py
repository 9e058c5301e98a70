"""The benchmarks: each imports, is listed, and is quoted by a page that gives its command."""

import itertools
import json
import os
import pathlib
import re
import runpy
import subprocess
import sys
from unittest import mock

import chex
import jax
import numpy as np
import pytest

from bnp_optax import _preconditioner
from tests.test_docs import broken

ROOT = pathlib.Path(__file__).parents[1]
README = ROOT / "benchmarks" / "README.md"
MODULES = ("cells", "common", "defaults_report", "grid", "tables")
SCRIPTS = sorted(x for x in ROOT.glob("benchmarks/*.py") if x.stem not in MODULES)
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/**/*.md")])
COMMAND = re.compile(r"python benchmarks/(\w+)\.py")
QUOTED = re.compile(r'^Quoted by: (\S+\.md)(?:, "(.+)")?\.$', re.MULTILINE)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_imports_what_exists(script, monkeypatch):
  if "from bnp_experiments" in script.read_text():
    pytest.importorskip("bnp_experiments")
  monkeypatch.syspath_prepend(script.parent)
  assert "main" in runpy.run_path(str(script))


def test_pages_give_the_command_of_every_script():
  quoted = {name for page in PAGES for name in COMMAND.findall(page.read_text())}
  assert quoted == {script.stem for script in SCRIPTS}


def test_the_table_lists_every_script_with_the_page_that_quotes_it():
  line = r"^\| `(\w+)\.py` \|[^|]+\| \[\w+\]\(([^)#]+)"
  listed = dict(re.findall(line, README.read_text(), re.MULTILINE))
  assert set(listed) == {script.stem for script in SCRIPTS}
  for script, page in listed.items():
    assert script in COMMAND.findall((README.parent / page).read_text())


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_names_the_section_that_quotes_it(script):
  ((page, section),) = QUOTED.findall(script.read_text())
  headings = re.findall(r"^#+ (.+)$", (ROOT / page).read_text(), re.MULTILINE)
  assert not section or section in headings


def table_rows(text):
  return {line for line in text.splitlines() if line.startswith("|")}


@pytest.mark.parametrize(
  ("name", "pages", "rows"),
  [
    ("defaults", ("docs/experiments/start.md", "docs/tuning.md", "README.md"), 240),
    ("trainers", ("docs/howto/trainers.md",), 8),
    ("ahead", ("docs/experiments/step.md",), 40),
    ("high_rate", ("docs/diagnostics.md",), 25),
    ("accelerator", ("docs/performance.md",), 6),
    ("memory", ("docs/tuning.md",), 10),
  ],
)
def test_pages_show_the_tables_of_the_records(name, pages, rows, monkeypatch, capsys):
  monkeypatch.syspath_prepend(README.parent)
  report = runpy.run_path(str(README.parent / f"{name}.py"))["report"]
  report(README.parent / "records" / f"{name}.jsonl")
  table = table_rows(capsys.readouterr().out)
  assert len(table) >= rows
  assert table <= set.union(*(table_rows((ROOT / page).read_text()) for page in pages))


def test_every_run_of_the_trainers_has_a_record(monkeypatch):
  monkeypatch.syspath_prepend(README.parent)
  trainers = runpy.run_path(str(README.parent / "trainers.py"))
  keys = [
    (r["trainer"], r["learning_rate"], r["bnp"], r["seed"])
    for r in trainers["read"](trainers["RECORDS"])
  ]
  rates = {name: trainer.learning_rate for name, trainer in trainers["TRAINERS"].items()}
  expected = itertools.product(rates.items(), (False, True), range(5))
  assert sorted(keys) == sorted((*trainer, bnp, seed) for trainer, bnp, seed in expected)


@pytest.mark.parametrize("optimizer", ["Adam", "SGD"])
def test_a_long_memory_is_better_in_long_runs(optimizer):
  """As the page on tuning says of batch size 1."""
  path = README.parent / "records" / "memory.jsonl"
  records = [
    r
    for r in map(json.loads, path.read_text().splitlines())
    if (r["batch_size"], r["optimizer"]) == (1, optimizer)
  ]
  short, long = ([r["epochs"] for r in records if r["decay"] == decay] for decay in (0.99, 0.999))
  assert len(short) == len(long) == 2
  last = [[run[-1]["accuracy"] for run in runs] for runs in (short, long)]
  assert max(last[0]) < min(last[1])
  # The training loss rises again with a short memory, and still falls with a long one.
  assert all(run[-1]["loss"] > min(epoch["loss"] for epoch in run) for run in short)
  assert all(run[-1]["loss"] == min(epoch["loss"] for epoch in run) for run in long)


def test_a_long_memory_on_a_drifting_stream():
  """With SGD it is within the spread, and that of each layer is worse; with Adam it is better."""
  path = README.parent / "records" / "memory_stream.jsonl"
  windows = {
    r["method"]: np.array(r["windows"]) for r in map(json.loads, path.read_text().splitlines())
  }
  all_examples = {name: x.mean(axis=1) for name, x in windows.items()}
  short = all_examples["BNP, 0.99"]
  assert all_examples["BNP, 0.999"].mean() < short.mean()
  assert short.min() < all_examples["BNP, 0.999"].max()
  lost = short.mean() - all_examples["BNP, of each layer"].mean()
  assert lost > np.ptp(short)
  after = {name: x[:, 20:22].mean(axis=1) for name, x in windows.items()}
  assert after["bnp(Adam), 0.999"].min() > after["bnp(Adam), 0.99"].max()


def test_links_resolve():
  assert not list(broken(README))


@pytest.mark.slow
def test_other_forms_of_step_5_give_the_same_step(monkeypatch):
  monkeypatch.syspath_prepend(README.parent)
  forms = runpy.run_path(str(README.parent / "cells.py"))["FORMS"]
  draw = lambda i, *shape: jax.random.uniform(jax.random.key(i), shape) + 0.5
  p = _preconditioner.Preconditioner(draw(0, 2, 1, 5), draw(1, 2, 1, 5), draw(2, 2, 1, 1))
  gradient = draw(3, 2, 3, 5, 4), draw(4, 2, 4)
  expected = _preconditioner.precondition(p, *gradient)
  for _, replaced in forms.values():
    with mock.patch.multiple(_preconditioner, **replaced):
      chex.assert_trees_all_close(_preconditioner.precondition(p, *gradient), expected, rtol=2e-5)


@pytest.mark.slow
def test_the_commands_for_a_gpu_run_and_resume(tmp_path):
  """The commands of the section on a rented GPU, at a small scale and without a network."""
  pytest.importorskip("bnp_experiments")
  draw = np.random.default_rng(0).integers
  images, text = draw(0, 256, (2_000, 32, 32, 3), np.uint8), draw(0, 60, (100, 65), np.uint8)
  examples = {"x": images, "y": draw(0, 10, 2_000), "text_x": text[:, :-1], "text_y": text[:, 1:]}
  np.savez(tmp_path / "examples.npz", **examples)

  def run(script, *options):
    paths = os.pathsep.join(str(ROOT / name) for name in ("", "experiments", "benchmarks"))
    command = [sys.executable, str(ROOT / "benchmarks" / script), *options]
    environment = os.environ | {"PYTHONPATH": paths, "JAX_PLATFORMS": "cpu"}
    return subprocess.run(
      command, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True
    ).stdout

  small = ("--cells", "fc16-16:4:f32", "gpt2-tiny:2:bf16", "--rounds", "2", "--seconds", "0.001")
  accelerator = ("accelerator.py", "--out", "times.jsonl", *small)
  defaults = ("defaults.py", "run", "grid.jsonl", "--examples", "examples.npz")
  defaults += ("--workers", "2", "--only", "fc,sgd,16,paper", "fc,sgd,16,alone")
  for command in (accelerator, defaults):
    run(*command)
  records = {name: (tmp_path / name).read_text() for name in ("times.jsonl", "grid.jsonl")}
  methods = [json.loads(line)["method"] for line in records["times.jsonl"].splitlines()]
  assert methods.count("BNP") == 2
  settings = [json.loads(line)["setting"] for line in records["grid.jsonl"].splitlines()]
  assert sorted(settings) == ["alone", "paper"]
  for command in (accelerator, defaults):
    run(*command)
  assert records == {name: (tmp_path / name).read_text() for name in records}
  assert "FC 16-16, 4" in run("accelerator.py", "--out", "times.jsonl", "--report")
