"""The benchmarks: each imports, is listed, and is quoted by a page that gives its command."""

import pathlib
import re
import runpy

import pytest

from tests.test_docs import broken

ROOT = pathlib.Path(__file__).parents[1]
README = ROOT / "benchmarks" / "README.md"
SCRIPTS = sorted({*ROOT.glob("benchmarks/*.py")} - {ROOT / "benchmarks" / "common.py"})
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
