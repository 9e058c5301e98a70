"""Execute the notebooks in fresh kernels and store their outputs.

python notebooks/execute.py             (all of them)
python notebooks/execute.py quickstart
"""

import hashlib
import pathlib
import sys

import nbclient
import nbformat

import bnp_optax

FOLDER = pathlib.Path(__file__).parent


def source_hash(notebook: nbformat.NotebookNode) -> str:
  """Return a hash of the code, which determines the outputs."""
  code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
  return hashlib.sha256("\n\0".join(code).encode()).hexdigest()[:16]


def execute(path: pathlib.Path) -> nbformat.NotebookNode:
  """Execute a notebook, keeping its outputs but no metadata that differs between runs.

  Args:
    path: The notebook file, which is not changed.

  Returns:
    The notebook with its outputs, and with the version of the library and the hash of the code in
    its metadata.

  Raises:
    nbclient.exceptions.CellExecutionError: A cell failed.
  """
  notebook = nbformat.read(path, as_version=4)
  client = nbclient.NotebookClient(
    notebook, timeout=1200, kernel_name="python3", record_timing=False
  )
  client.execute(cwd=str(path.parent))
  for number, cell in enumerate(notebook.cells):
    cell.id = str(number)
    cell.metadata = {}
    if cell.cell_type == "code":
      cell.execution_count = None
      for output in cell.outputs:
        if output.output_type == "execute_result":
          output.execution_count = None
  notebook.metadata = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python", "pygments_lexer": "ipython3"},
    "bnp_optax": {"version": bnp_optax.__version__, "source": source_hash(notebook)},
  }
  return notebook


if __name__ == "__main__":
  for name in sys.argv[1:] or sorted(path.stem for path in FOLDER.glob("*.ipynb")):
    path = FOLDER / f"{name}.ipynb"
    print(path.name, flush=True)
    nbformat.write(execute(path), path)
