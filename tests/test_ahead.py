"""A step of BNP compiled by XLA's compilers for TPU and CUDA, which need no hardware."""

import json
import pathlib
import subprocess
import sys

import jax
import pytest

ROOT = pathlib.Path(__file__).parents[1]
SCRIPT = """
import ahead, json
print(json.dumps([ahead.measure("{}", "fc64:8:f32", method, "") for method in ("SGD", "BNP")]))
"""


def run(*command, **kwargs):
  return subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, **kwargs)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("target", "packages"),
  [("v5e", ["jax[tpu]"]), ("h100", ["jax-cuda13-plugin", "jax-cuda13-pjrt", "jax", "jaxlib"])],
)
def test_compiles_for_an_accelerator(tmp_path, target, packages):
  run(sys.executable, "-m", "venv", tmp_path, timeout=300)
  pip = [tmp_path / "bin" / "pip", "install", "--quiet"]
  plugin = run(*pip, *(f"{name}=={jax.__version__}" for name in packages))
  if plugin.returncode:
    pytest.skip(f"The compiler for {target} cannot be installed: {plugin.stderr[-300:]}")
  library = run(*pip, "--editable", ROOT)
  assert library.returncode == 0, library.stderr
  program = [tmp_path / "bin" / "python", "-c", SCRIPT.format(target)]
  compiled = run(*program, cwd=ROOT / "benchmarks", timeout=600)
  assert compiled.returncode == 0, compiled.stderr
  sgd, bnp = json.loads(compiled.stdout)
  assert 0 < sgd["kernels"] < bnp["kernels"]
  assert 0 < sgd["bytes"] < bnp["bytes"]
  assert ("cycles" in bnp) == (target == "v5e")
