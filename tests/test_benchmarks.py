"""The benchmarks: each imports, is listed, and is quoted by a page that gives its command."""

import pathlib
import re
import runpy

import chex
import jax
import pytest

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


def test_links_resolve():
  assert not list(broken(README))


def test_other_forms_of_step_5_take_the_same_step(monkeypatch):
  monkeypatch.syspath_prepend(README.parent)
  cells = runpy.run_path(str(README.parent / "cells.py"))
  cell = cells["make_cell"]("fc3:4:f32")

  def take(method):
    step = cells["make_step"](cell, method)
    x = jax.random.uniform(jax.random.key(1), cell.inputs.shape)
    batch = x, jax.numpy.arange(4) % 10
    return jax.jit(lambda key: step.take(step.init(key), batch)[0])(jax.random.key(0))

  expected = {method: take(method) for method in ("BNP", "bnp(Adam)")}
  for form, (method, _) in cells["FORMS"].items():
    chex.assert_trees_all_close(take(form), expected[method], rtol=1e-5, atol=1e-7)
