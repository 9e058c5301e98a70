"""Records as JSON lines, and the Markdown tables that several benchmarks print."""

from collections.abc import Iterable
import json
import pathlib
from typing import Any

import numpy as np


def read(path: pathlib.Path) -> list[dict[str, Any]]:
  """Return the records in a file; none if there is no file."""
  return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append(path: pathlib.Path, *records: dict[str, Any]) -> None:
  """Append records to a file."""
  with path.open("a") as file:
    file.writelines(json.dumps(record) + "\n" for record in records)


def head(columns: Iterable[str], align: str = "") -> str:
  """Return the first two lines of a table.

  Args:
    columns: The titles of the columns.
    align: "l" for each column that is aligned left and "r" for right; the rest is aligned right.
  """
  columns = [*columns]
  marks = {"l": "---", "r": "--:"}
  return row(columns) + "\n" + row(marks[side] for side in align.ljust(len(columns), "r"))


def row(cells: Iterable[str]) -> str:
  """Return a line of a table."""
  return f"| {' | '.join(cells)} |"


def mean_and_range(values: np.ndarray, digits: int = 1) -> str:
  """Format the mean of values, and the smallest and the largest one."""
  mean, low, high = (f"{x:.{digits}f}" for x in (values.mean(), values.min(), values.max()))
  return f"{mean} ({low}–{high})"


def median_and_quartiles(values: np.ndarray) -> str:
  """Format the median of values, and their quartiles."""
  low, median, high = np.quantile(values, (0.25, 0.5, 0.75))
  return f"{median:.2f} ({low:.2f}–{high:.2f})"
