"""Tests of the documentation: no warnings, all public names documented, no broken links."""

import json
import pathlib
import re
import subprocess
import sys
import tomllib

import jax
import pytest

import bnp_optax
import bnp_optax.normalization

ROOT = pathlib.Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *ROOT.glob("docs/**/*.md")])
NOTEBOOKS = sorted(ROOT.glob("notebooks/*.ipynb"))
REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
# Addresses at which files of the project are also online.
ONLINE = (
  REPOSITORY,
  REPOSITORY.replace("https://github.com", "https://colab.research.google.com/github"),
)
LINK = re.compile(r"\]\(([^()\s]+)\)")
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def text(path):
  """Return the Markdown of a page or of a notebook."""
  if path.suffix != ".ipynb":
    return path.read_text()
  cells = json.loads(path.read_text())["cells"]
  return "\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")


def anchors(path):
  """Return the anchors that GitHub generates for the sections of a page."""
  headings = re.findall(r"^#+ +(.+?) *$", FENCED.sub("", text(path)), re.MULTILINE)
  plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
  return {heading.replace(" ", "-") for heading in plain}


def broken(path):
  """Yield the broken links of a page to files of the project."""
  for link in LINK.findall(FENCED.sub("", text(path))):
    target, _, anchor = link.partition("#")
    found = path.parent / target if target else path
    if target.startswith(ONLINE):
      found = ROOT / target.partition("/blob/main/")[2]
    elif re.match(r"[a-z]+:", link):
      continue
    if not found.exists() or (anchor and anchor not in anchors(found)):
      yield link


@pytest.mark.parametrize("path", [*PAGES, *NOTEBOOKS], ids=lambda p: str(p.relative_to(ROOT)))
def test_links_resolve(path):
  assert not list(broken(path))


def test_broken_links_are_found(tmp_path):
  page = tmp_path / "page.md"
  page.write_text(
    "# One: two\n[a](#one-two) [b](#two) [c](page.md#one-two) [d](none.md)\n"
    f"[e]({REPOSITORY}/blob/main/README.md) [f]({ONLINE[1]}/blob/main/none.ipynb)\n"
  )
  assert list(broken(page)) == ["#two", "none.md", f"{ONLINE[1]}/blob/main/none.ipynb"]


def public(module):
  """Return the public names that a module defines."""
  names = getattr(module, "__all__", None) or [
    name
    for name, value in vars(module).items()
    if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
  ]
  return {
    f"{module.__name__}.{name}" for name in names if not isinstance(vars(module)[name], type(sys))
  }


@pytest.mark.slow
def test_documentation_builds_and_has_all_public_names(tmp_path):
  command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q"]
  built = subprocess.run(
    [*command, "-d", tmp_path / "doctrees", ROOT / "docs", tmp_path / "html"],
    capture_output=True,
    text=True,
    check=False,
  )
  assert built.returncode == 0, built.stderr
  from sphinx.util.inventory import InventoryFile

  inventory = InventoryFile.loads((tmp_path / "html" / "objects.inv").read_bytes(), uri="")
  documented = {
    name for kind, items in inventory.data.items() if kind.startswith("py:") for name in items
  }
  modules = (
    bnp_optax,
    bnp_optax.linen,
    bnp_optax.nnx,
    bnp_optax.conditioning,
    bnp_optax.normalization,
  )
  expected = set.union(*map(public, modules))
  assert {"bnp_optax.bnp", "bnp_optax.linen.layers", "bnp_optax.nnx.Statistics"} <= expected
  assert not expected - documented

  html = {path: path.read_text() for path in (tmp_path / "html").glob("**/*.html")}
  assert {path.stem for path in html if path.parent.name == "notebooks"} == {
    path.stem for path in NOTEBOOKS
  }
  # Pages request nothing from other hosts, name no type of Sphinx or of jaxlib, and link to files
  # that exist.
  elsewhere = re.compile(r"<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)=\"(?:https?:)?//[^\"]*")
  for path, page in html.items():
    assert not elsewhere.findall(page), path
    assert not re.search(r"TypeAliasForwardRef|jaxlib\._jax", page), path
    sources = re.findall(rf'"{REPOSITORY}/(?:blob|edit)/main/([^"?#]+)', page)
    assert all((ROOT / source).is_file() for source in sources), (path, sources)
    assert not [source for source in sources if source.startswith("docs/notebooks/")], path


@pytest.mark.slow
def test_the_equinox_example_trains():
  """Equinox is no dependency; `pip install equinox` runs this."""
  pytest.importorskip("equinox")
  page = text(ROOT / "docs" / "howto" / "other_frameworks.md")
  (example,) = re.findall(r"^```python\n(import.*?)^```", page, re.MULTILINE | re.DOTALL)
  namespace = {}
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    exec(example, namespace)
  assert namespace["losses"][-1] < 0.1 * namespace["losses"][0]
