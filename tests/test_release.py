"""Tests of the release: one version, a wheel of the library alone, and a light import."""

import pathlib
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile

import bnp_experiments
import pytest

import bnp_optax

ROOT = pathlib.Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def run(*command, **kwargs):
  done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, **kwargs)
  assert done.returncode == 0, done.stderr
  return done.stdout


def test_all_versions_agree():
  assert "version" not in PROJECT
  assert PROJECT["dynamic"] == ["version"]
  assert bnp_experiments.__version__ == bnp_optax.__version__


@pytest.mark.slow
def test_the_import_adds_no_other_packages_to_optax_and_flax():
  loaded = "import sys; print(*sys.modules)"
  base = set(run(sys.executable, "-c", f"import optax, flax; {loaded}").split())
  ours = set(run(sys.executable, "-c", f"import bnp_optax; {loaded}").split())
  packages = {name.partition(".")[0] for name in ours - base}
  assert packages - sys.stdlib_module_names == {"bnp_optax"}
  assert not ours & {"matplotlib", "tyro", "sklearn", "pooch", "PIL", "flax.nnx"}


@pytest.mark.slow
def test_nnx_is_imported_lazily():
  script = """
import sys
import flax.linen as nn
import jax
import jax.numpy as jnp
import bnp_optax

assert {*bnp_optax.__all__} <= {*dir(bnp_optax)}
x = jnp.ones((4, 2))
model = nn.Dense(3)
bnp_optax.conditioning.survey(model, model.init(jax.random.key(0), x), x)
assert "flax.nnx" not in sys.modules
from bnp_optax import nnx
assert nnx is bnp_optax.nnx is sys.modules["bnp_optax.nnx"]
assert nnx.Statistics is not None
bnp_optax.nonsense
"""
  done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
  assert done.stderr.endswith("module 'bnp_optax' has no attribute 'nonsense'\n"), done.stderr


@pytest.mark.parametrize("folder", ["bnp_optax", "examples"])
def test_only_the_experiments_import_the_experiments(folder):
  files = [*(ROOT / folder).rglob("*.py")]
  assert files
  imports = re.compile(r"^\s*(from|import) bnp_experiments\b", re.MULTILINE)
  assert not [file for file in files if imports.search(file.read_text())]


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
  """Build the sdist, and the wheel from it; return their folder."""
  folder = tmp_path_factory.mktemp("dist")
  run(sys.executable, "-m", "build", "--outdir", folder, ROOT)
  return folder


@pytest.mark.slow
def test_wheel_holds_the_library_alone(distributions):
  (wheel,) = distributions.glob("*.whl")
  assert wheel.name == f"bnp_optax-{bnp_optax.__version__}-py3-none-any.whl"
  names = zipfile.ZipFile(wheel).namelist()
  info = f"bnp_optax-{bnp_optax.__version__}.dist-info"
  assert {name.partition("/")[0] for name in names} == {"bnp_optax", info}
  assert all(name.endswith((".py", "py.typed")) for name in names if not name.startswith(info))
  assert {"bnp_optax/py.typed", "bnp_optax/linen.py", f"{info}/licenses/LICENSE"} <= set(names)
  assert f"{info}/entry_points.txt" not in names
  lines = sum(
    len(zipfile.ZipFile(wheel).read(name).splitlines()) for name in names if name.endswith(".py")
  )
  assert lines < 6300


@pytest.mark.slow
def test_sdist_holds_the_files_that_its_tests_need(distributions):
  (sdist,) = distributions.glob("*.tar.gz")
  with tarfile.open(sdist) as archive:
    names = {name.partition("/")[2] for name in archive.getnames()}
  needed = ("tests/conftest.py", "docs/conf.py", "experiments/pyproject.toml", "CITATION.cff")
  assert {
    *needed,
    "README.md",
    "examples/online_learning.py",
    "notebooks/quickstart.ipynb",
  } <= names
  assert not [name for name in names if "__pycache__" in name]


@pytest.mark.slow
def test_wheel_runs_the_examples_of_the_readme(distributions, tmp_path):
  (wheel,) = distributions.glob("*.whl")
  run(sys.executable, "-m", "pip", "install", "--no-deps", "--target", tmp_path / "lib", wheel)
  smoke = (
    "import bnp_optax, doctest, sys; print(bnp_optax.__file__); "
    "sys.exit(doctest.testfile(sys.argv[1], module_relative=False).failed)"
  )
  out = run(
    *(sys.executable, "-c", smoke, ROOT / "README.md"),
    cwd=tmp_path,
    env={"PYTHONPATH": str(tmp_path / "lib")},
  )
  assert out.startswith(str(tmp_path / "lib"))
