"""The benchmarks: each imports, is listed, and is quoted by a page that gives its command."""

import itertools
import pathlib
import re
import runpy
from unittest import mock

import chex
import jax
import pytest

from bnp_optax import _preconditioner
from tests.test_docs import broken

ROOT = pathlib.Path(__file__).parents[1]
README = ROOT / "benchmarks" / "README.md"
MODULES = {ROOT / "benchmarks" / name for name in ("cells.py", "common.py")}
SCRIPTS = sorted({*ROOT.glob("benchmarks/*.py")} - MODULES)
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/**/*.md")])
COMMAND = re.compile(r"python benchmarks/(\w+)\.py")


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


def table_rows(text):
  return {line for line in text.splitlines() if line.startswith("|")}


@pytest.mark.parametrize(
  ("name", "pages", "rows"),
  [
    ("defaults", ("docs/optimizers.md", "README.md"), 51),
    ("trainers", ("docs/howto/trainers.md",), 8),
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


def test_links_resolve():
  assert not list(broken(README))


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
