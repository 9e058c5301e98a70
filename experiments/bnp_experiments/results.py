"""The results of a run: JSON lines in a folder, appended one by one.

Every line contains its settings, so that a file can be read, filtered and drawn without the program
that wrote it. A run looks for existing lines before it does the work for new ones, and thereby
resumes an earlier run.
"""

from collections.abc import Iterator
import contextlib
import datetime
import fcntl
import importlib.metadata
import io
import json
import math
import os
import pathlib
import platform
import subprocess
from typing import IO, Any

import jax

from bnp_experiments.errors import ExperimentError, UsageError
import bnp_optax

Record = dict[str, Any]
FILE = "results.jsonl"


class Results:
  """Reads and appends the lines of one results file."""

  def __init__(self, path: pathlib.Path, file: IO[bytes], command: list[str]) -> None:
    """Read the lines; drop a last one that was cut off while it was written."""
    self._path = path
    self._file = file
    self._command: list[str] | None = command
    file.seek(0)
    content = file.read()
    whole = content[: content.rfind(b"\n") + 1]
    file.truncate(len(whole))
    self._records = [self._parse(*line) for line in enumerate(whole.splitlines(), 1)]

  def _parse(self, number: int, line: bytes) -> Record:
    try:
      record = json.loads(line)
    except ValueError:
      record = None
    if not isinstance(record, dict):
      raise ExperimentError(
        f"{self._path}, line {number}: not a JSON object. Remove the line, or give another --out."
      )
    return record

  def find(self, **fields: object) -> list[Record]:
    """Return the records with these fields, oldest first; None matches a missing field."""
    wanted = json.loads(json.dumps(fields)).items()
    return [
      record
      for record in self._records
      if all(record.get(field) == value for field, value in wanted)
    ]

  def append(self, record: Record) -> None:
    """Append a record; it is written to the file when this returns.

    The first one is preceded by a record of the command and the machine. A run that appends nothing
    leaves the file unchanged.

    Raises:
      ExperimentError: The disk is full or missing; the file is unchanged.
    """
    if self._command is not None:
      command, self._command = self._command, None
      self.append(_header(command))
    line = json.dumps(_without_nan(record), allow_nan=False)
    self._write(line.encode() + b"\n")
    self._records.append(json.loads(line))

  def _write(self, line: bytes) -> None:
    end = self._file.seek(0, os.SEEK_END)
    try:
      while line:
        line = line[self._file.write(line) :]
    except OSError as error:
      self._file.truncate(end)
      raise ExperimentError(
        f"cannot write to {self._path}: {error.strerror}. The records so far are complete: free "
        "some disk space, and run again to resume"
      ) from error


@contextlib.contextmanager
def open_results(folder: pathlib.Path, command: list[str]) -> Iterator[Results]:
  """Open the results in a folder for this process alone.

  Args:
    folder: The folder; it is made if it does not exist.
    command: The command line, for the record.

  Yields:
    The results.

  Raises:
    UsageError: The folder cannot be written to, or another process is writing to it.
    ExperimentError: The file contains a line that is not a record.
  """
  path = folder / FILE
  try:
    folder.mkdir(parents=True, exist_ok=True)
    # Unbuffered: closing the file must not repeat a write that failed.
    file = path.open("a+b", buffering=0)
  except OSError as error:
    raise UsageError(f"cannot write to --out {folder}: {error.strerror}") from error
  with file:
    try:
      # The system releases the lock at any end of the process.
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
      raise UsageError(
        f"another run is writing to {path}: wait for it, or give another --out"
      ) from error
    yield Results(path, file, command)


@contextlib.contextmanager
def writing_to(folder: pathlib.Path) -> Iterator[None]:
  """Raise an ExperimentError in one line if a file cannot be written within this context."""
  try:
    yield
  except OSError as error:
    raise ExperimentError(f"cannot write to {folder}: {error.strerror}") from error


def read_results(folder: pathlib.Path) -> Results:
  """Read the results in a folder, possibly while another process appends to them.

  Raises:
    UsageError: There are none.
    ExperimentError: The file contains a line that is not a record.
  """
  path = folder / FILE
  try:
    content = path.read_bytes()
  except OSError as error:
    raise UsageError(f"no results in {folder} ({error.strerror}): run it first") from error
  return Results(path, io.BytesIO(content), [])


def _header(command: list[str]) -> Record:
  """Return the first record of a run: the command, the versions and the machine."""
  device = jax.devices()[0]
  return {
    "kind": "run",
    "command": command,
    "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    "versions": {
      "python": platform.python_version(),
      "bnp_optax": bnp_optax.__version__,
      **{name: importlib.metadata.version(name) for name in ("jax", "flax", "optax")},
    },
    "machine": {
      "system": f"{platform.system()} {platform.machine()}",
      "cpus": os.cpu_count(),
      "platform": device.platform,
      "device": device.device_kind,
      "devices": jax.device_count(),
    },
    "git_revision": _git_revision(),
  }


def _git_revision() -> str | None:
  """Return the commit of the clone that contains this package, or None."""
  root = pathlib.Path(__file__).parents[2]
  if not (root / ".git").exists():
    return None

  def git(*arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

  try:
    # The results do not affect later results.
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!notebooks/results")
    return git("rev-parse", "HEAD") + ("-dirty" if changed else "")
  except (OSError, subprocess.CalledProcessError):
    return None


def _without_nan(value: Any) -> Any:
  """Replace NaN and infinity, which JSON lacks, by None."""
  if isinstance(value, dict):
    return {key: _without_nan(entry) for key, entry in value.items()}
  if isinstance(value, list | tuple):
    return [_without_nan(entry) for entry in value]
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value
