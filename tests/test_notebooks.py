"""Tests of the notebooks: they run, and their stored outputs are those of this version."""

import importlib.util
import pathlib
import re
import tomllib

import pytest

import bnp_optax

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOKS = sorted(ROOT.glob("notebooks/*.ipynb"))
REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]


@pytest.fixture(scope="module")
def executor():
  """Import notebooks/execute.py."""
  spec = importlib.util.spec_from_file_location("execute", ROOT / "notebooks" / "execute.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def path(request):
  return request.param


def outputs(notebook):
  return [out for cell in notebook.cells if cell.cell_type == "code" for out in cell.outputs]


def test_stored_outputs_are_of_this_version_and_of_this_code(path, executor):
  import nbformat

  notebook = nbformat.read(path, as_version=4)
  nbformat.validate(notebook)
  made_by = notebook.metadata["bnp_optax"]
  assert made_by["version"] == bnp_optax.__version__
  assert made_by["source"] == executor.source_hash(notebook)
  assert not [out for out in outputs(notebook) if out.output_type == "error"]
  assert any("image/png" in out.get("data", {}) for out in outputs(notebook))


def test_first_cells_are_for_colab(path):
  import nbformat

  title, install, *_ = nbformat.read(path, as_version=4).cells
  slug = REPOSITORY.removeprefix("https://github.com/")
  colab = f"https://colab.research.google.com/github/{slug}/blob/main/notebooks/{path.name}"
  assert re.search(rf"\[!\[Open in Colab\]\([^)]+\)\]\({re.escape(colab)}\)", title.source)
  assert 'if "google.colab" in sys.modules:' in install.source
  assert f'"bnp_optax @ git+{REPOSITORY}"' in install.source
  assert f'"bnp_experiments @ git+{REPOSITORY}#subdirectory=experiments"' in install.source
  if 'Path("results")' in path.read_text().replace("\\", ""):
    assert f"!git clone --quiet --depth 1 {REPOSITORY}\n" in install.source
  assert not install.outputs


def test_runs_from_top_to_bottom(path, executor):
  executed, stored = executor.execute(path), path.read_text()
  assert not [out for out in outputs(executed) if out.output_type == "error"]
  assert path.read_text() == stored
